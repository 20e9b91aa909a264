"""The student: sole owner of the T5 model and its tokenizer. Nothing here imports torch before a model is needed."""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from dsbs.artefacts import digest, write_json
from dsbs.errors import DsbsError, UserError
from dsbs.recipe import StudentSection, TaskSection
from dsbs.records import Unread
from dsbs.tasks import make_task

# Shapes of students made from scratch (T5 v1.0 layout, Raffel et al., 2020; embeddings are tied).
SIZES: dict[str, dict[str, int]] = {
    "nano": {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 384, "num_layers": 4, "num_decoder_layers": 3},
    "mini": {"d_model": 256, "d_kv": 32, "num_heads": 8, "d_ff": 1024, "num_layers": 6, "num_decoder_layers": 5},
    "small": {"d_model": 512, "d_kv": 64, "num_heads": 6, "d_ff": 1024, "num_layers": 8, "num_decoder_layers": 8},
}
CARD = "student.json"
_MAX_VOCABULARY_LINES = 200_000


Target = Literal["label", "rationale", "rationale-then-label", "label-then-rationale"]  # what a task's outputs are
# The token that a decoder begins with: T5's padding, or its end token, which is in every vocabulary and no other input has.
Start = Literal["pad", "eos"]
_THEN_LABEL, _THEN_RATIONALE = " Answer: ", " Because: "  # between the parts of one sequence


def compose(target: Target, label: str | None, rationale: str | None) -> str | None:
    """The text that a student is to write; in one sequence a label stands alone where there is no rationale."""
    if target == "label":
        return label
    if target == "rationale":
        return rationale
    if label is None:
        return None
    if target == "rationale-then-label":
        return f"{rationale or ''}{_THEN_LABEL}{label}".strip()
    return f"{label}{_THEN_RATIONALE}{rationale}" if rationale else label


def take_apart(target: Target, text: str) -> tuple[str, str | None]:
    """Label's part and rationale's part of what a student wrote. A sequence that never came to its label has an empty one."""
    if target == "rationale-then-label":
        rationale, found, label = text.rpartition(_THEN_LABEL.strip())
        return (label.strip(), rationale.strip() or None) if found else ("", text.strip() or None)
    if target == "label-then-rationale":
        label, _, rationale = text.partition(_THEN_RATIONALE.strip())
        return label.strip(), rationale.strip() or None
    return text, None


def start_token(config: Any, start: Start) -> int:
    """The id, by a model's configuration."""
    return int(config.decoder_start_token_id if start == "pad" else config.eos_token_id)


class StudentCard(BaseModel):
    """``student.json``: what a student needs to know about itself to predict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: str = "dsbs.student/1"
    name: str
    method: str
    labels: str  # whose labels it learned: gold or teacher
    seed: int
    task: TaskSection
    prefixes: dict[Target, str]  # of each task it learned; the first one holds the label
    starts: dict[Target, Start] = {}  # what the decoder begins each with; none given: pad
    max_input_tokens: int
    max_target_tokens: int

    @property
    def explains(self) -> bool:
        """Whether it learned rationales."""
        return set(self.prefixes) != {"label"}

    @property
    def reasons_first(self) -> bool:
        """Whether it writes the label after its rationale, and with it in view."""
        return "rationale-then-label" in self.prefixes


def read_card(path: str | Path) -> StudentCard:
    """A student folder's card, without its model. Raises UserError where there is none."""
    file = Path(path) / CARD
    try:
        return StudentCard.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path} holds no student (no {CARD})", hint="give a folder such as runs/demo/train/step-by-step-gold-s0"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not a student card ({error})", hint="train the student again") from None


@dataclass(frozen=True, slots=True)
class Written:
    """What a student wrote to one input."""

    text: str
    truncated: bool  # the token budget ended it, not its end token
    probability: float | None  # of its tokens together, the end token included, in [0, 1]; None: not asked for
    latency_ms: float  # wall time of its batch over the rows


@dataclass(frozen=True, slots=True)
class Answer:
    """A student's answer to one input.

    ``raw`` is the label as written. A step-by-step student's ``rationale`` is decoded apart from it and did not cause it; one
    that writes both in one sequence says them in that order.
    """

    raw: str
    label: str | None  # None: the raw text is no label of the task
    probability: float | None  # of the raw text, in [0, 1]; None: a rationale is in the same sequence
    truncated: bool  # the token budget ended the label
    rationale: str | None  # None: not asked for; "": it wrote none
    rationale_truncated: bool | None
    latency_ms: float  # wall time of the label's batch over its rows


class _Confidence:
    """Sees each decoding step's scores go by and keeps the log-probability of the likeliest token, which greedy decoding takes.

    Keeping the scores themselves would take batch × tokens × vocabulary floats; forced decoding afterwards, a second pass.
    """

    def __init__(self) -> None:
        self._steps: list[Any] = []

    def __call__(self, ids: Any, scores: Any) -> Any:
        """ids (B, T), scores (B, V) in nats up to a constant -> the same scores. A step adds (B,) log-probabilities."""
        del ids
        self._steps.append(scores.amax(-1) - scores.logsumexp(-1))
        return scores

    def probabilities(self, open_: Any) -> list[float]:
        """open_ (B, T), true where a row's own tokens are -> their joint probability for each row, in [0, 1]."""
        import torch

        logs = torch.stack(self._steps[: open_.shape[1]], 1).double()  # on some devices decoding takes a step too many
        total = torch.where(open_, logs, 0.0).sum(1).clamp(max=0.0)
        return [float(one) for one in total.exp()]


class Student:
    """A trained student: load one, then ``predict``."""

    def __init__(self, model: Any, tokenizer: Any, card: StudentCard) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.card = card
        self.task = make_task(card.task)

    @classmethod
    def load(cls, path: str | Path) -> Student:
        """Read a student folder (``train/<name>/`` of a run). Raises UserError where there is none."""
        card = read_card(path)
        import torch

        model = load_model(str(path))
        return cls(model.to("cuda") if torch.cuda.is_available() else model, load_tokenizer(str(path)), card)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_json(folder / CARD, self.card.model_dump(mode="json"))

    def _fields(self, item: str | Mapping[str, Any], canonical: bool) -> Mapping[str, Any]:
        """What a label may have to be read by: the row's fields, of which a plain text has none but itself."""
        if not isinstance(item, str):
            return item if canonical else self.task.fields(item, "input")
        if self.task.needs_fields:
            raise UserError(
                f"{self.card.name} cannot answer plain text: a row of {self.task.name} has more fields than one",
                hint='give JSON lines such as {"question": "…", "choices": ["…", "…"]}',
            )
        return {"text": item}

    def predict(
        self,
        items: Sequence[str | Mapping[str, Any]],
        *,
        rationale: bool = False,
        batch_size: int = 64,
        max_label_tokens: int = 64,
        canonical: bool = False,
    ) -> list[Answer]:
        """Answer texts or rows of fields, greedily. With ``rationale``, decode one for each too (it explains nothing that
        the label was made from: two tasks, two decodes). Rows have the columns that the data had, or with ``canonical``
        the task's own field names. Raises UserError where the student learned no rationales or an item lacks a field.
        """
        if rationale and not self.card.explains:
            raise UserError(
                f"{self.card.name} was trained without rationales", hint="use a step-by-step student, or leave --rationale out"
            )
        fields = [self._fields(item, canonical) for item in items]
        texts = [item if isinstance(item, str) else self.task.text(row) for item, row in zip(items, fields, strict=True)]
        target, prefix = next(iter(self.card.prefixes.items()))
        most = self.card.max_target_tokens if self.card.reasons_first else max_label_tokens
        written = self.generate([prefix + text for text in texts], most, batch_size, probabilities=target == "label")
        explained: Sequence[Written | None] = [None] * len(texts)
        if rationale and not self.card.reasons_first:  # a second decode: the label and its time are the same without it
            second: Target = "rationale" if target == "label" else target
            prefix, start = self.card.prefixes[second], self.card.starts.get(second, "pad")
            explained = self.generate([prefix + text for text in texts], self.card.max_target_tokens, batch_size, start)
        return [self._answer(target, *one) for one in zip(written, explained, fields, strict=True)]

    def _answer(self, target: Target, written: Written, explained: Written | None, fields: Mapping[str, Any]) -> Answer:
        """``explained`` is what was decoded for the rationale's sake: it alone, or the label's sequence once more and whole."""
        raw, why = take_apart(target, written.text)
        truncated, why_truncated = written.truncated, None
        if target == "label":
            if explained is not None:
                why, why_truncated = explained.text, explained.truncated
        elif target == "rationale-then-label":
            why, why_truncated = why or "", written.truncated and _THEN_LABEL.strip() not in written.text
        else:
            truncated = written.truncated and _THEN_RATIONALE.strip() not in written.text
            whole = explained or written
            why, why_truncated = take_apart(target, whole.text)[1] or "", whole.truncated
        label = self.task.read_label(raw, fields)
        return Answer(
            raw=raw,
            label=None if isinstance(label, Unread) else label,
            probability=written.probability,
            truncated=truncated,
            rationale=why,
            rationale_truncated=why_truncated,
            latency_ms=written.latency_ms,
        )

    def generate(
        self, texts: Sequence[str], max_new_tokens: int, batch_size: int, start: Start = "pad", *, probabilities: bool = False
    ) -> list[Written]:
        """Greedy decoding of ``texts``; their probabilities cost about a hundredth of its time more."""
        import torch

        self.model.eval()
        found: dict[int, Written] = {}
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            began = time.perf_counter()
            batch = self.tokenizer(
                [texts[i] for i in chosen],
                padding=True,
                truncation=True,
                max_length=self.card.max_input_tokens,
                return_tensors="pt",
            ).to(self.model.device)
            confidence = _Confidence()
            with torch.inference_mode():
                ids = self.model.generate(
                    input_ids=batch["input_ids"],
                    attention_mask=batch["attention_mask"],
                    max_new_tokens=max_new_tokens,
                    decoder_start_token_id=start_token(self.model.config, start),
                    num_beams=1,
                    do_sample=False,
                    logits_processor=[confidence] if probabilities else None,
                )
                ends = (ids[:, 1:] == self.model.config.eos_token_id).long()  # (B, T) without the token it starts with
                whole = ends.any(1).tolist()
                given: Sequence[float | None] = [None] * len(chosen)
                if probabilities:
                    given = confidence.probabilities(ends.cumsum(1) - ends == 0)
            decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            per_row = 1000 * (time.perf_counter() - began) / len(chosen)
            for i, text, ended, probability in zip(chosen, decoded, whole, given, strict=True):
                found[i] = Written(text.strip(), not ended, probability, per_row)
        return [found[i] for i in range(len(texts))]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


# --- where models and tokenizers come from


def load_tokenizer(source: str) -> Any:
    """The T5 tokenizer of a Hub id or local folder. Needs no torch."""
    from transformers import T5Tokenizer

    _quiet()
    try:
        tokenizer = T5Tokenizer.from_pretrained(_local(source))
    except Exception as error:  # hub, network and file errors share no root
        raise _not_loaded("tokenizer", source, error) from None
    pieces = sum(not token.startswith("<") for token in tokenizer.get_vocab())
    if pieces < 32:  # files that are missing or not understood silently yield the special tokens alone
        raise DsbsError(
            f"the tokenizer of student {source!r} has only {pieces} pieces of text",
            hint="check the name and the network, or that the local folder has tokenizer.json or spiece.model",
        )
    return tokenizer


def load_model(source: str, dropout: float | None = None) -> Any:
    """The sequence-to-sequence model of a Hub id or local folder, in float32 whatever it was saved in, in main memory.

    ``dropout`` takes the place of the model's own rate.
    """
    import torch
    from transformers import AutoModelForSeq2SeqLM

    _quiet()
    try:
        changes = {} if dropout is None else {"dropout_rate": dropout}
        model = AutoModelForSeq2SeqLM.from_pretrained(_local(source), dtype=torch.float32, **changes)
    except Exception as error:
        raise _not_loaded("model", source, error) from None
    return model


def _local(source: str) -> str:
    path = Path(source).expanduser()
    return str(path) if path.is_dir() else source


def _not_loaded(what: str, source: str, error: Exception) -> DsbsError:
    said = " ".join(str(error).split())[:240]
    return DsbsError(
        f"the {what} of student {source!r} cannot be loaded ({type(error).__name__}: {said})",
        hint="check student.model and the network, give a local folder, or use student: {init: scratch}",
    )


@cache
def start_hash(start: str | None) -> tuple[str, ...]:
    """Of the weights in the local folder that training starts from; nothing for a Hub id, whose name stands in the recipe."""
    folder = Path(start or "").expanduser()
    if not start or not folder.is_dir():
        return ()
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".bin") or path.name == "config.json"]
    hashes = []
    for path in files:
        with path.open("rb") as file:
            hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
    return tuple(hashes)


def new_model(section: StudentSection, tokenizer: Any, seed: int, init: str | None = None) -> Any:
    """The model that training starts from: ``init`` or pretrained weights, or random ones that depend on ``seed`` alone."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    start = init or section.model
    if start is not None:
        model = load_model(start, section.dropout)
        if len(tokenizer) > model.config.vocab_size:
            raise UserError(
                f"{start} has {model.config.vocab_size} embeddings for a tokenizer of {len(tokenizer)} pieces",
                hint="its weights and its tokenizer are of two models: save both of one into the folder",
            )
        return model
    _quiet()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "dropout_rate": 0.1 if section.dropout is None else section.dropout,
    }
    config = T5Config(**shape | SIZES[section.size])
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config)


def new_tokenizer(section: StudentSection, texts: Iterable[str], init: str | None = None) -> Any:
    """The tokenizer that training starts from: the model's own, or a SentencePiece vocabulary learned from ``texts``."""
    if init is not None and not Path(init).expanduser().is_dir():
        raise UserError(f"train.init: there is no folder {init}", hint="give the folder of a student or of a T5's weights")
    start = init or section.model
    return load_tokenizer(start) if start is not None else learn_vocabulary(texts, section.vocab_size)


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


def _quiet() -> None:
    """Transformers' own bars and notes do not belong between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
