"""A student's tokenizer: a model's own, or a SentencePiece vocabulary learned from the training text."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dsbs.config import StudentSection
from dsbs.errors import DsbsError, UserError
from dsbs.files import digest
from dsbs.students.architecture import kind_of
from dsbs.students.gguf import gguf_file, is_gguf
from dsbs.students.weights import located, not_loaded, quiet

_MAX_VOCABULARY_LINES = 200_000


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a Hub id, a local folder or a GGUF file. A T5's needs no torch.

    Where a decoder-only model's has no padding token, its end token stands in: padding is masked wherever it is.
    """
    quiet()
    kind, place = kind_of(source), located(source)
    try:
        if kind == "seq2seq":
            from transformers import T5Tokenizer

            tokenizer: Any = T5Tokenizer.from_pretrained(**place)
        else:
            from transformers import AutoTokenizer

            beside = gguf_file(source).parent if is_gguf(source) else None
            if (
                beside and (beside / "tokenizer_config.json").is_file()
            ):  # an export's, which is whole
                place = {"pretrained_model_name_or_path": str(beside)}
            tokenizer = AutoTokenizer.from_pretrained(**place)
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
    except Exception as error:  # hub, network and file errors share no root
        raise not_loaded("tokenizer", source, error) from None
    pieces = sum(not token.startswith("<") for token in tokenizer.get_vocab())
    if (
        pieces < 32
    ):  # files that are missing or not understood silently yield the special tokens alone
        raise DsbsError(
            f"the tokenizer of student {source!r} has only {pieces} pieces of text",
            hint="check the name and the network, or that the local folder has tokenizer.json or spiece.model",
        )
    return tokenizer


def read_pieces(folder: Path, most: int) -> Any:
    """The tokenizer of an export's ``tokenizer.json``, which cuts after ``most`` tokens. Needs no transformers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(most)
    tokenizer.no_padding()
    return tokenizer


def new_tokenizer(section: StudentSection, texts: Iterable[str], init: str | None = None) -> Any:
    """The tokenizer that training starts from: the model's own, or a SentencePiece vocabulary learned from ``texts``."""
    if init is not None and not Path(init).expanduser().is_dir():
        raise UserError(
            f"train.init: there is no folder {init}",
            hint="give the folder of a student or of a pretrained model",
        )
    start = init or section.source
    return (
        load_tokenizer(start) if start is not None else learn_vocabulary(texts, section.vocab_size)
    )


def learn_vocabulary(texts: Iterable[str], size: int) -> Any:
    """A T5 tokenizer over a unigram SentencePiece vocabulary (Kudo, 2018) of at most ``size`` pieces; deterministic."""
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
            f"no vocabulary can be learned from the training text ({error})",
            hint="a scratch student needs a few dozen rows of text; or name a pretrained student.model",
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
        for line in text.replace("</s>", "\n").split("\n"):
            if line.strip():
                yield line


def tokenizer_hash(tokenizer: Any) -> str:
    return digest(json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False))


def ids_of(tokenizer: Any, text: str, *, special: bool = False) -> list[int]:
    """All of a text's token ids, by an engine's tokenizer: transformers', or that of the package tokenizers. ``special``: with
    those that end a text. Not for two threads at once.
    """
    if hasattr(tokenizer, "encode_batch"):
        cut = (
            tokenizer.truncation
        )  # an export's tokenizer cuts inputs, and what is counted here may be longer
        tokenizer.no_truncation()
        try:
            return list(tokenizer.encode(text, add_special_tokens=special).ids)
        finally:
            if cut is not None:
                tokenizer.enable_truncation(**cut)
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])
