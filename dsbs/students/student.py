"""A trained student: rows in, labels and rationales out. What decodes is its engine's business."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.errors import UserError
from dsbs.files import write_json
from dsbs.records.rows import Unread
from dsbs.students.architecture import kind_of
from dsbs.students.backends import Engine, load_engine, make_engine
from dsbs.students.card import CARD, StudentCard, read_card
from dsbs.students.targets import THEN_LABEL, THEN_RATIONALE, Start, Target, take_apart
from dsbs.tasks import make_task


@dataclass(frozen=True, slots=True)
class Written:
    """What a student wrote to one input."""

    text: str
    truncated: bool  # the token budget ended it, not its end token
    probability: (
        float | None
    )  # of its tokens together, the end token included, in [0, 1]; None: not asked for
    latency_ms: float  # wall time of its batch over the rows


@dataclass(frozen=True, slots=True)
class Answer:
    """A student's answer to one input.

    ``raw`` is the label as written. A step-by-step student's ``rationale`` is decoded apart from it and did not cause it; one
    that writes both in one sequence says them in that order.
    """

    raw: str
    label: str | None  # None: the raw text is no label of the task
    probability: (
        float | None
    )  # of the raw text, in [0, 1]; None: a rationale is in the same sequence
    truncated: bool  # the token budget ended the label
    rationale: str | None  # None: not asked for; "": it wrote none
    rationale_truncated: bool | None
    latency_ms: float  # wall time of the label's batch over its rows


class Student:
    """A trained student: load one, then ``predict``."""

    def __init__(self, engine: Engine, card: StudentCard) -> None:
        self.engine = engine
        self.card = card
        self.task = make_task(card.task)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, card: StudentCard) -> Student:
        """A student in memory, of transformers' model and tokenizer."""
        return cls(make_engine(model, tokenizer, card), card)

    @classmethod
    def load(cls, path: str | Path) -> Student:
        """Read a student folder: ``train/<name>/`` of a run, or an export's. Raises UserError where there is none."""
        card = read_card(path)
        has_config = card.format == "transformers" and (Path(path) / "config.json").is_file()
        if has_config and (found := kind_of(str(path))) != card.kind:
            raise UserError(
                f"{path}: {CARD} says kind: {card.kind}, and the model beside it is {found}",
                hint=f"put the {CARD} back that was saved with this model, or train the student again",
            )
        return cls(load_engine(Path(path), card), card)

    def save(self, folder: Path) -> None:
        """Model, tokenizer and card."""
        self.engine.save(folder)
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
                f"{self.card.name} was trained without rationales",
                hint="use a step-by-step student, or leave --rationale out",
            )
        fields = [self._fields(item, canonical) for item in items]
        texts = [
            item if isinstance(item, str) else self.task.text(row)
            for item, row in zip(items, fields, strict=True)
        ]
        target, prefix = next(iter(self.card.prefixes.items()))
        most = self.card.max_target_tokens if self.card.reasons_first else max_label_tokens
        written = self.generate(
            [prefix + text for text in texts], most, batch_size, probabilities=target == "label"
        )
        explained: Sequence[Written | None] = [None] * len(texts)
        if (
            rationale and not self.card.reasons_first
        ):  # a second decode: the label and its time are the same without it
            second: Target = "rationale" if target == "label" else target
            prefix, start = self.card.prefixes[second], self.card.starts.get(second, "pad")
            explained = self.generate(
                [prefix + text for text in texts], self.card.max_target_tokens, batch_size, start
            )
        return [self._answer(target, *one) for one in zip(written, explained, fields, strict=True)]

    def _answer(
        self, target: Target, written: Written, explained: Written | None, fields: Mapping[str, Any]
    ) -> Answer:
        """``explained`` is what was decoded for the rationale's sake: it alone, or the label's sequence once more and whole."""
        raw, why = take_apart(target, written.text)
        truncated, why_truncated = written.truncated, None
        if target == "label":
            if explained is not None:
                why, why_truncated = explained.text, explained.truncated
        elif target == "rationale-then-label":
            why, why_truncated = (
                why or "",
                written.truncated and THEN_LABEL.strip() not in written.text,
            )
        else:
            truncated = written.truncated and THEN_RATIONALE.strip() not in written.text
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
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        batch_size: int,
        start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[Written]:
        """Greedy decoding of ``texts``, prefixes included, in batches of like lengths."""
        found: dict[int, Written] = {}
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            began = time.perf_counter()
            said = self.engine.write(
                [texts[i] for i in chosen], max_new_tokens, start, probabilities=probabilities
            )
            per_row = 1000 * (time.perf_counter() - began) / len(chosen)
            for i, one in zip(chosen, said, strict=True):
                found[i] = Written(*one, latency_ms=per_row)
        return [found[i] for i in range(len(texts))]
