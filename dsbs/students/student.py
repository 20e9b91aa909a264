"""Student: a trained small model. Rows in, labels and rationales out."""

from __future__ import annotations

import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbs.errors import UserError
from dsbs.files import write_json
from dsbs.records import Unreadable
from dsbs.students.backends import (
    Backend,
    GeneratedText,
    ScoringBackend,
    StatesBackend,
    load_backend,
    make_backend,
)
from dsbs.students.calibration import (
    Calibration,
    ConfidenceKind,
    confidence_of,
    rationale_agreement,
    read_calibration,
    tempered,
    tempered_each,
    write_record,
)
from dsbs.students.card import CARD, Start, StudentCard, Target, architecture_of, read_card
from dsbs.students.long_texts import shortened
from dsbs.students.novelty import Novelty, read_novelty, write_novelty
from dsbs.students.targets import has_label_part, split_target
from dsbs.students.tokenizer import text_ends
from dsbs.tasks import CHOICE_SEPARATOR, make_task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Answer:
    """A student's answer to one input.

    A step-by-step student decodes its ``rationale`` apart from the label; the rationale did not
    cause the label. A student that writes both in one sequence writes them in that order.
    """

    raw: str
    """The label as written."""
    label: str | None
    """In canonical form. None: ``raw`` is not a label of the task."""
    probability: float | None
    """Of ``label`` where there is a distribution, else of ``raw``, in [0, 1]; None: a rationale is
    in the same sequence. Of several labels or fields, that of the least sure one."""
    truncated: bool
    """Whether the token limit ended the label."""
    rationale: str | None
    """None: not asked for; "": it wrote none."""
    rationale_truncated: bool | None
    latency_ms: float
    """Wall time of the label's batch divided by its rows."""
    distribution: dict[str, float] | None = None
    """The calibrated probability of each label, in [0, 1]; None: the label was written as text, and
    no label was scored. Where a row has several labels, each has its own, and the sum is not 1."""
    distance: float | None = None
    """Of the input from the validation rows (`Novelty`), where a server asks for it."""
    value: Any = None
    """``label`` as JSON has it: a text, a number, a list of labels or an object of fields."""
    expected_number: float | None = None
    """The mean of the distribution over the points of a scale. None: there is none."""
    field_probabilities: dict[str, float] | None = None
    """The calibrated probability of each field's value, in [0, 1]. None: there are no fields, the
    label is unreadable, or ``probability`` is that of ``raw`` or unknown, as in CTranslate2."""


class Student:
    """A trained student: ``load`` one, then ``predict``."""

    def __init__(
        self, backend: Backend, card: StudentCard, calibration: Calibration | None = None
    ) -> None:
        self.backend = backend
        self.card = card
        self.calibration = calibration
        self.novelty: Novelty | None = None
        self.task = make_task(card.task)

    @classmethod
    def of(cls, model: Any, tokenizer: Any, card: StudentCard) -> Student:
        """A student in memory, from a model and a tokenizer of transformers."""
        return cls(make_backend(model, tokenizer, card), card)

    @classmethod
    def load(cls, path: str | Path) -> Student:
        """Load a student's folder: ``train/<name>/`` of a run, or an export.

        Raises UserError where there is none, or where its card does not fit its model.
        """
        card = read_card(path)
        if card.format == "transformers" and (Path(path) / "config.json").is_file():
            architecture = architecture_of(str(path))
            if architecture != card.kind:
                raise UserError(
                    f"{path}: {CARD} says kind: {card.kind}, but the model beside it is "
                    f"{architecture}",
                    hint=f"restore the {CARD} that was saved with this model, or train the "
                    "student again",
                )
        student = cls(load_backend(Path(path), card), card, read_calibration(path))
        student.novelty = read_novelty(Path(path))
        return student

    def save(self, folder: Path) -> None:
        """Write model, tokenizer, card, calibration and novelty."""
        self.backend.save(folder)
        write_json(folder / CARD, self.card.model_dump(mode="json"))
        if self.calibration is not None:
            write_record(folder, self.calibration)
        if self.novelty is not None:
            write_novelty(folder, self.novelty)

    @property
    def temperature(self) -> float:
        """The divisor of the logits in distributions over the labels; 1: not calibrated."""
        return 1.0 if self.calibration is None else self.calibration.temperature

    @property
    def label_thresholds(self) -> dict[str, float | None] | None:
        """The smallest probability with which each of several labels is given. None: 0.5."""
        thresholds = None if self.calibration is None else self.calibration.label_thresholds
        return None if thresholds is None else thresholds.values

    def measure_novelty(self) -> Novelty | None:
        """Give each answer of `predict` its distance from here on. None: it has none."""
        from dsbs.students.backends.label_head import LabelHeadBackend

        if self.novelty is None or not isinstance(self.backend, LabelHeadBackend):
            return None
        self.backend.novelty = self.novelty
        return self.novelty

    def predict(
        self,
        items: Sequence[str | Mapping[str, Any]],
        *,
        rationale: bool = False,
        batch_size: int = 64,
        max_label_tokens: int | None = None,
        canonical: bool = False,
        score_labels: bool = False,
    ) -> list[Answer]:
        """Answer texts or rows of fields, with greedy decoding.

        ``rationale`` decodes a rationale for each item too. It does not explain how the label came
        about: they are two tasks and two decodes. ``max_label_tokens`` None: the card's. Rows have
        the columns of the data, or with ``canonical`` the task's own fields. ``score_labels`` gives
        students that write their label a distribution over a closed set, and an unreadable label
        becomes the most likely one. Raises UserError where the student learned no rationales,
        cannot score labels, or an item lacks a field.
        """
        if isinstance(items, str | Mapping):
            raise UserError(
                "predict takes a list of texts or rows, and got one alone",
                hint="student.predict([text])",
            )
        if rationale and not self.card.explains:
            reason = "was trained without rationales"
            if self.card.format != "transformers" and self.card.head == "labels":
                reason = "is the export of a label head, which has no rationales"
            raise UserError(
                f"{self.card.name} {reason}",
                hint="use a step-by-step student, or leave --rationale out",
            )
        rows = [self._fields(item, canonical) for item in items]
        texts = self._texts(items, rows)
        scores_labels = score_labels and self.card.head == "text"
        if scores_labels:
            self._check_scoring()
        target, prefix = next(iter(self.card.prefixes.items()))
        max_tokens = max_label_tokens or self.card.max_label_tokens
        if self.card.reasons_first:
            max_tokens = self.card.max_target_tokens
        inputs = texts
        if self.card.scores_choices:
            inputs = [CHOICE_SEPARATOR.join(self.task.choice_texts(row).values()) for row in rows]
        generated = self.generate(
            [prefix + text for text in inputs],
            max_tokens,
            batch_size,
            probabilities=target == "label",
        )
        if scores_labels:
            distributions = self.label_distributions([prefix + text for text in texts], batch_size)
            generated = [
                output._replace(distribution=distribution)
                for output, distribution in zip(generated, distributions, strict=True)
            ]
        explanations: Sequence[GeneratedText | None] = [None] * len(texts)
        if rationale and not self.card.reasons_first:
            # A second decode, so that the label and its latency are the same without it.
            explanations = self._explain(texts, target, batch_size)
        return [
            self._answer(target, *parts)
            for parts in zip(generated, explanations, rows, strict=True)
        ]

    def pooled_states(
        self, rows: Sequence[Mapping[str, Any]], batch_size: int = 64
    ) -> NDArray[np.float32]:
        """The states of rows with the task's fields, (rows, D): what a label head reads, else the
        mean of the last states.

        Raises UserError for an export, whose states cannot be read.
        """
        import numpy as np

        if not isinstance(self.backend, StatesBackend):
            raise UserError(
                f"{self.card.name} is in {self.card.format} format: its states cannot be read",
                hint="use the student that it was exported from",
            )
        prefix = next(iter(self.card.prefixes.values()))
        texts = [prefix + text for text in self._texts(rows, rows)]
        states: dict[int, NDArray[np.float32]] = {}
        for batch in _longest_first(texts, batch_size):
            vectors = self.backend.pooled_states([texts[i] for i in batch]).float().cpu().numpy()
            states.update(zip(batch, vectors, strict=True))
        return np.stack([states[i] for i in range(len(texts))])

    def _texts(
        self, items: Sequence[str | Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
    ) -> list[str]:
        """The texts that the student reads, without prefix."""
        texts = [
            item if isinstance(item, str) else self.task.text(row)
            for item, row in zip(items, rows, strict=True)
        ]
        if self.card.max_text_tokens is None:
            return texts
        section = self.card.task.max_input
        return shortened(texts, self.backend.tokenizer, self.card.max_text_tokens, section)

    def confidence(
        self, answer: Answer, fields: Mapping[str, Any], kind: ConfidenceKind | None = None
    ) -> float | None:
        """The confidence of an answer to a row's ``fields``, in [0, 1].

        ``kind`` None: the one chosen on the validation rows, or the probability. The kind views
        needs the answer's rationale. None: the label is unreadable, or the confidence unknown.
        """
        if answer.label is None:
            return None
        if kind is None:
            kind = "probability" if self.calibration is None else self.calibration.confidence
        agreement = None
        if kind == "views" and answer.rationale is not None:
            agreement = rationale_agreement(answer.label, answer.rationale, self.task, fields)
        return confidence_of(kind, answer.probability, answer.distribution, agreement)

    @property
    def has_distribution(self) -> bool:
        """Whether it can give the probability of every label, with ``score_labels`` or without."""
        try:
            self._check_scoring()
        except UserError:
            return self.card.head == "labels"
        return True

    def _check_scoring(self) -> None:
        """Raises UserError where ``score_labels`` does not apply.

        It applies to a student that writes the label of a closed set, and that alone: in a sequence
        with a rationale, no end token follows the label.
        """
        if self.card.head == "text" and self.task.has_several_labels:
            raise UserError(
                f"{self.card.name} has no probability for every label: it writes all labels of a "
                "row as one text, and there are too many such texts to score",
                hint="leave score_labels (--top) out, or use a student with a label head",
            )
        if not self.card.writes_label_alone or self.task.labels is None:
            raise UserError(
                f"{self.card.name} has no probability for every label: it does not write the label "
                "of a closed set alone",
                hint="leave score_labels (--top) out, or use a student with a label head",
            )
        if not isinstance(self.backend, ScoringBackend):
            raise UserError(
                f"{self.card.name}: {self.card.kind} students in {self.card.format} format cannot "
                "score labels",
                hint="use the student that it was exported from, or leave score_labels (--top) out",
            )

    def label_distributions(self, texts: Sequence[str], batch_size: int) -> list[tuple[float, ...]]:
        """The probability of each of the task's labels as the answer to ``texts``, with prefixes.

        The probability of a label's text with its end token, normalized over the labels and not
        calibrated.
        """
        self._check_scoring()
        assert isinstance(self.backend, ScoringBackend)
        labels = self.task.labels or ()
        distributions: dict[int, tuple[float, ...]] = {}
        for batch in _longest_first(texts, batch_size):
            scores = self.backend.score([texts[i] for i in batch], labels)
            for i, row in zip(batch, scores, strict=True):
                distributions[i] = _softmax(row)
        return [distributions[i] for i in range(len(texts))]

    def _fields(self, item: str | Mapping[str, Any], canonical: bool) -> Mapping[str, Any]:
        """The fields that reading a label may need. A plain text has no field but itself."""
        if not isinstance(item, str):
            return item if canonical else self.task.fields(item, "input")
        if self.task.needs_fields:
            raise UserError(
                f"{self.card.name} needs the fields of a {self.task.name} row, not plain text",
                hint='give JSON lines such as {"question": "…", "choices": ["…", "…"]}',
            )
        return {"text": item}

    def _explain(
        self, texts: Sequence[str], label_target: Target, batch_size: int
    ) -> list[GeneratedText]:
        target: Target = "rationale" if label_target == "label" else label_target
        prefix = self.card.prefixes[target]
        return self.generate(
            [prefix + text for text in texts],
            self.card.max_target_tokens,
            batch_size,
            self.card.starts.get(target, "pad"),
        )

    def _answer(
        self,
        target: Target,
        generated: GeneratedText,
        explanation: GeneratedText | None,
        fields: Mapping[str, Any],
    ) -> Answer:
        """``explanation``: the rationale alone, or the full text of a sequence with both parts."""
        raw, rationale = split_target(target, generated.text)
        truncated = generated.truncated
        rationale_truncated: bool | None = None
        if target == "label":
            if explanation is not None:
                rationale = explanation.text
                rationale_truncated = explanation.truncated
        elif target == "rationale-then-label":
            rationale = rationale or ""
            rationale_truncated = generated.truncated and not has_label_part(target, generated.text)
        else:
            truncated = generated.truncated and not has_label_part(target, generated.text)
            full = explanation or generated
            rationale = split_target(target, full.text)[1] or ""
            rationale_truncated = full.truncated
        distribution = None
        if generated.distribution is not None:
            classes = self.card.classes or self.task.labels or self.task.choice_texts(fields)
            temper = tempered_each if self.task.has_several_labels else tempered
            shares = temper(generated.distribution, self.temperature)
            distribution = dict(zip(classes, shares, strict=True))
            if self.card.classes:
                raw = self.task.choose(tuple(distribution), shares, self.label_thresholds)
        answer = self.task.answer(raw, fields, distribution)
        label = None if isinstance(answer, Unreadable) else answer
        probability = generated.probability
        if distribution is not None and label is not None:
            of_label = self.task.probability_of(label, distribution)
            probability = probability if of_label is None else of_label
        field_probabilities = None
        if label is not None:
            field_probabilities = self.field_probabilities(generated, self.temperature)
        if field_probabilities is not None:
            probability = min(field_probabilities.values())
        return Answer(
            raw=raw,
            label=label,
            probability=probability,
            truncated=truncated,
            rationale=rationale,
            rationale_truncated=rationale_truncated,
            latency_ms=generated.latency_ms,
            distribution=distribution,
            distance=generated.distance,
            value=None if label is None else self.task.value(label),
            expected_number=self.task.expected_number(distribution) if distribution else None,
            field_probabilities=field_probabilities,
        )

    def field_probabilities(
        self, generated: GeneratedText, temperature: float = 1.0
    ) -> dict[str, float] | None:
        """The probability of each field's value in a readable text, in [0, 1], given the fields
        before it. None: there are no fields, or the tokens' probabilities are unknown.

        The product over the value's tokens and the one after them, which ends the value: what
        remains of the text's probability are the fields' names. A geometric mean would be no
        probability, and would let one doubtful token hide in a long value.
        """
        spans = self.task.part_spans(generated.text) if generated.tokens else {}
        if not spans:
            return None
        ends = text_ends(self.backend.tokenizer, [token_id for token_id, _ in generated.tokens])
        starts = [0, *ends[:-1]]
        values = []
        for name in self.task.part_names:
            start, end = spans[name]
            first = min(bisect_right(ends, start), bisect_left(starts, start))
            after = max(first, bisect_left(starts, end))
            if after == first or ends[after - 1] <= end:  # else the last one ends the value itself
                after += 1
            tokens = generated.tokens[first:after]
            values.append(min(1.0, math.exp(math.fsum(value for _, value in tokens))))
        return dict(zip(self.task.part_names, tempered_each(values, temperature), strict=True))

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        batch_size: int,
        start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """Greedy decoding of ``texts``, prefixes included, in batches of similar length."""
        generated: dict[int, GeneratedText] = {}
        for batch in _longest_first(texts, batch_size):
            started = time.perf_counter()
            outputs = self.backend.generate(
                [texts[i] for i in batch], max_new_tokens, start, probabilities=probabilities
            )
            per_row_ms = 1000 * (time.perf_counter() - started) / len(batch)
            for i, output in zip(batch, outputs, strict=True):
                generated[i] = output._replace(latency_ms=per_row_ms)
        return [generated[i] for i in range(len(texts))]


def _longest_first(texts: Sequence[str], batch_size: int) -> Iterator[list[int]]:
    """Indices of ``texts`` in batches of similar length."""
    indices = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for first in range(0, len(indices), batch_size):
        yield indices[first : first + batch_size]


def _softmax(log_probabilities: Sequence[float]) -> tuple[float, ...]:
    highest = max(log_probabilities)
    shares = [math.exp(value - highest) for value in log_probabilities]
    total = math.fsum(shares)
    return tuple(share / total for share in shares)
