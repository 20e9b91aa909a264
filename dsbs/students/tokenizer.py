"""Tokenizer: a model's own, or a SentencePiece vocabulary learned from the training text."""

from __future__ import annotations

import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsbs.config import StudentSection
from dsbs.errors import DsbsError, UserError
from dsbs.files import digest, expand_user
from dsbs.formatting import percent
from dsbs.students.card import architecture_of, has_t5_tokenizer
from dsbs.students.weights import (
    gguf_file,
    is_gguf,
    loading_error,
    pretrained_arguments,
    silence_transformers,
)

_MAX_VOCABULARY_LINES = 200_000
_MAX_VOCABULARY_TEXT = 1 << 16  # characters of one text: the rest adds time, and little else
# SentencePiece fails at longer words (a base64 file), and its time grows with the square of a line.
_LONG_WORD = re.compile(r"(\S{1000})(?=\S)")
_PART_OF_LINE = re.compile(r".{1,8000}(?:\s|$)", re.DOTALL)
_MIN_PIECES = 32  # a tokenizer with fewer was not loaded properly
_RARE = 0.001  # missing characters in a smaller share of the texts are not reported
_MAX_SHOWN = 8  # characters in one message


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a Hub id, a local folder or a GGUF file. A T5's needs no torch.

    A decoder-only model without a padding token gets its end token: padding is always masked.
    Raises DsbsError where it cannot be loaded.
    """
    silence_transformers()
    architecture = architecture_of(source)
    arguments = pretrained_arguments(source)
    try:
        if architecture == "seq2seq" and has_t5_tokenizer(source):
            from transformers import T5Tokenizer

            tokenizer: Any = T5Tokenizer.from_pretrained(**arguments)
        elif architecture != "causal":
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(**arguments)
        else:
            tokenizer = _load_decoder_tokenizer(source, arguments)
    except Exception as error:  # Hub, network and file errors share no root
        raise loading_error("tokenizer", source, error) from None
    pieces = sum(not token.startswith("<") for token in tokenizer.get_vocab())
    if pieces < _MIN_PIECES:  # missing or unknown files silently give the special tokens alone
        raise DsbsError(
            f"the tokenizer of student {source!r} has only {pieces} pieces of text",
            hint="check the name and the network, or that the local folder has tokenizer.json or "
            "spiece.model",
        )
    tokenizer.truncation_side = "right"  # some cut texts at their beginning
    return tokenizer


def _load_decoder_tokenizer(source: str, arguments: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    if is_gguf(source):
        folder = gguf_file(source).parent
        if (folder / "tokenizer_config.json").is_file():  # an export has its complete tokenizer
            arguments = {"pretrained_model_name_or_path": str(folder)}
    tokenizer = AutoTokenizer.from_pretrained(**arguments)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_export_tokenizer(folder: Path, max_tokens: int) -> Any:
    """An export's ``tokenizer.json``, which truncates at ``max_tokens``. Needs no transformers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    return tokenizer


def without_limit(tokenizer: Any) -> Any:
    """A copy of an export's tokenizer that never truncates, for answers to be scored."""
    unlimited = type(tokenizer).from_str(tokenizer.to_str())
    unlimited.no_truncation()
    return unlimited


def new_tokenizer(section: StudentSection, texts: Iterable[str], init: str | None = None) -> Any:
    """The tokenizer that training starts from: the model's own, or a vocabulary of ``texts``."""
    if init is not None and not expand_user(init).is_dir():
        raise UserError(
            f"train.init: {init} is not a directory",
            hint="give the folder of a student or of a pretrained model",
        )
    start = init or section.source
    if start is None:
        return learn_vocabulary(texts, section.vocab_size)
    return load_tokenizer(start)


def learn_vocabulary(texts: Iterable[str], size: int) -> Any:
    """A T5 tokenizer with a unigram SentencePiece vocabulary (Kudo, 2018) of up to ``size`` pieces.

    Deterministic. Raises UserError where there is too little text.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2
    from transformers import T5Tokenizer

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            character_coverage=1.0,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            num_threads=1,
            max_sentence_length=1 << 20,
            input_sentence_size=_MAX_VOCABULARY_LINES,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(
            f"cannot learn a vocabulary from the training text ({error})",
            hint="a scratch student needs a few dozen rows of text; or name a pretrained "
            "student.model",
        ) from None
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.getvalue())
    return T5Tokenizer(
        vocab=[(piece.piece, piece.score) for piece in proto.pieces],
        extra_ids=0,
        _spm_precompiled_charsmap=proto.normalizer_spec.precompiled_charsmap,
    )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text[:_MAX_VOCABULARY_TEXT].replace("</s>", "\n").split("\n"):
            if line.strip():
                yield from _PART_OF_LINE.findall(_LONG_WORD.sub(r"\1 ", line))


def tokenizer_hash(tokenizer: Any) -> str:
    return digest(json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False))


def token_ids_of(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """All token ids of a text, never truncated. ``special``: with the tokens that end a text.

    ``tokenizer`` is transformers' or one of the package tokenizers. Not thread-safe.
    """
    if not hasattr(tokenizer, "encode_batch"):
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    truncation = tokenizer.truncation  # an export's tokenizer truncates inputs
    tokenizer.no_truncation()
    try:
        return list(tokenizer.encode(text, add_special_tokens=special).ids)
    finally:
        if truncation is not None:
            tokenizer.enable_truncation(**truncation)


def text_ends(tokenizer: Any, token_ids: Sequence[int]) -> list[int]:
    """The length of the text that ends with each token, without blanks at its start.

    ``tokenizer`` is transformers' or one of the package tokenizers. Special tokens have no text.
    """
    ends: list[int] = []
    for count in range(1, len(token_ids) + 1):
        text = tokenizer.decode(list(token_ids[:count]), skip_special_tokens=True).lstrip()
        ends.append(max(len(text), ends[-1] if ends else 0))
    return ends


# --- characters that a vocabulary lacks


def vocabulary_warnings(
    section: StudentSection,
    tokenizer: Any,
    labels: Iterable[str],
    texts: Mapping[str, Sequence[str]],
) -> list[str]:
    """Warnings about labels that a student can never write, and about characters that it loses.

    T5's own vocabulary lacks braces, ``<``, ``~`` and more, and reads a line break as a space.
    ``texts`` maps the name of a group of texts ("inputs") to them.
    """
    if section.is_scratch:
        remedy = "note that a scratch vocabulary has the characters of the train rows alone"
    elif tokenizer.cls_token is not None:  # an encoder's
        remedy = "use a student.model with more characters, such as FacebookAI/xlm-roberta-base"
    else:
        remedy = (
            "use student: {init: scratch}, whose vocabulary is learned from your text, or a "
            "student.model with more characters, such as google/mt5-small"
        )
    warnings = _lost_labels(tokenizer, sorted(set(labels)), remedy)
    for group, group_texts in texts.items():
        unknown, blank = _lost_characters(tokenizer, group_texts)
        if unknown.share > _RARE:
            warnings.append(
                f"{percent(unknown.share)} of the {group} have characters that the student's "
                f"tokenizer does not know: {unknown.listing()}; keep them out with task.input or "
                f"the teacher's prompt, or {remedy}"
            )
        if blank.share > _RARE:
            warnings.append(
                f"{percent(blank.share)} of the {group} have characters that the student reads as "
                f"a space or as nothing: {blank.listing()}"
            )
    return warnings


def _lost_labels(tokenizer: Any, labels: list[str], remedy: str) -> list[str]:
    if not labels:
        return []
    written = tokenizer.batch_decode(tokenizer(labels)["input_ids"], skip_special_tokens=True)
    missing = [
        (label, text)
        for label, text in zip(labels, written, strict=True)
        if _normalized(label) != _normalized(text)
    ]
    if not missing:
        return []
    label, text = missing[0]
    return [
        f"the student can never write {len(missing)} of {len(labels)} labels, as its vocabulary "
        f"lacks some characters: {label!r} becomes {text!r}. It will be wrong on those rows: "
        f"rename the labels, or {remedy}"
    ]


class _LostCharacters:
    """Characters of one kind, the number of texts that contain each, and the share of the texts."""

    def __init__(self, characters: set[str]) -> None:
        self.characters = characters
        self.counts: Counter[str] = Counter()
        self.rows = 0
        self.share = 0.0

    def add(self, missing: set[str]) -> None:
        self.counts.update(missing & self.characters)
        self.rows += bool(missing & self.characters)

    def listing(self) -> str:
        shown = ", ".join(
            f"{character!r} in {count}" for character, count in self.counts.most_common(_MAX_SHOWN)
        )
        if len(self.counts) > _MAX_SHOWN:
            shown += f" and {len(self.counts) - _MAX_SHOWN} more"
        return shown


def _lost_characters(
    tokenizer: Any, texts: Sequence[str]
) -> tuple[_LostCharacters, _LostCharacters]:
    """The characters without a token, and those that are read as blank."""
    # The tokenizer normalizes texts in the same way.
    normalized = [text if text.isascii() else unicodedata.normalize("NFKC", text) for text in texts]
    characters = sorted(set[str]().union(*normalized) - {" "})
    unknown = _LostCharacters(set())
    blank = _LostCharacters(set())
    if not characters:
        return unknown, blank
    rows = tokenizer(characters)["input_ids"]
    decoded = tokenizer.batch_decode(rows, skip_special_tokens=True)
    for character, token_ids, text in zip(characters, rows, decoded, strict=True):
        if tokenizer.unk_token_id in token_ids:
            unknown.characters.add(character)
        elif text != character and not text.strip():
            blank.characters.add(character)
    missing = unknown.characters | blank.characters
    if not missing:
        return unknown, blank
    any_missing = re.compile("[" + "".join(map(re.escape, sorted(missing))) + "]")
    # </s> between two sentences is one token.
    special = re.compile("|".join(map(re.escape, tokenizer.all_special_tokens)))
    for text in normalized:
        if any_missing.search(text):
            lost_here = set(any_missing.findall(special.sub("", text)))
            unknown.add(lost_here)
            blank.add(lost_here)
    unknown.share = unknown.rows / len(texts)
    blank.share = blank.rows / len(texts)
    return unknown, blank


def _normalized(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
