"""Served model: turns clients' rows into a student's inputs and its answers into responses."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsbs.errors import UserError
from dsbs.serving.middleware import MAX_ROW_VALUES, count_values
from dsbs.serving.settings import DEFAULT_ANCHOR, ApiError, Settings
from dsbs.students.calibration import Threshold
from dsbs.students.student import Answer, Student
from dsbs.students.tokenizer import token_ids_of

# A tokenizer's time grows with the whole text, including what is cut off afterwards.
_MAX_CHARACTERS_PER_TOKEN = 64


@dataclass(frozen=True, slots=True)
class Item:
    """One input, with options of its own: rows that differ in them still share a batch."""

    value: str | Mapping[str, Any]  # a text, or a row of the task's own fields
    max_tokens: int | None = None  # of its completion; None: no limit
    answer: Answer | None = None  # of a teacher, that only lacks its completion
    # the members of the JSON object that its completion is; (): the label as JSON; None: text
    json_names: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """Options that all rows of a batch share."""

    rationale: bool
    label_tokens: int
    completes: bool = False  # whether to build completions
    predicts: bool = True  # False: the items have their answers
    score_labels: bool = False  # of a student that writes its label: every label's probability


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer as one text."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    distribution: dict[str, float] | None = None  # of the label, the text's last part
    label: str | None = None  # None: unreadable


@dataclass(frozen=True, slots=True)
class Outcome:
    answer: Answer
    completion: Completion | None  # None: the options ask for none
    confidence: float | None = None  # None: unknown, or there is no threshold
    is_novel: bool = False  # whether the input is unlike the validation rows


class Model:
    """A student with the server's settings. Raises UserError where it cannot reply as they say.

    ``threshold`` is that of a cascade; None: the student answers everything. ``finds_novel``: it
    measures how far inputs are from the validation rows, if it can.
    """

    def __init__(
        self,
        student: Student,
        settings: Settings,
        threshold: Threshold | None = None,
        *,
        finds_novel: bool = False,
    ) -> None:
        self.student = student
        novelty = student.measure_novelty() if finds_novel else None
        self._distance_limit = None if novelty is None else novelty.limit
        self.threshold = threshold
        self.name = student.card.name
        self.replies_with_rationale = settings.reply == "step-by-step"
        if self.replies_with_rationale and not student.card.explains:
            raise UserError(
                f"{self.name} was trained without rationales and cannot reply step by step",
                hint="serve a step-by-step student, or pass --reply label --anchor 'Answer:' "
                "for labels that `dsbs annotate` can read",
            )
        self._anchor = settings.anchor
        if self._anchor is None:
            self._anchor = DEFAULT_ANCHOR if self.replies_with_rationale else ""
        # Longer than any target of its training is a waste of time.
        self._max_label_tokens = max(student.card.max_label_tokens, student.card.max_target_tokens)

    @property
    def has_distribution(self) -> bool:
        """Whether a completion is one label alone, and every label can have a probability."""
        is_label = not self.replies_with_rationale and not self._anchor
        has_one = not self.student.task.has_several_labels
        return is_label and has_one and self._can_distribute

    @property
    def _can_distribute(self) -> bool:
        """Whether every label can have a probability.

        Scoring labels changes the confidence of a student that writes its label, so that a cascade
        does what its threshold was chosen with.
        """
        threshold = self.threshold
        is_text = self.student.card.head == "text"
        if threshold is not None and is_text and not threshold.scores_labels:
            return False
        return self.student.has_distribution

    def predict_options(
        self, *, rationale: bool, max_label_tokens: int | None, distribution: bool = False
    ) -> GenerationOptions:
        """Options of ``/predict``. Raises ApiError where the student learned no rationales, or
        cannot give every label a probability.
        """
        if rationale and not self.student.card.explains:
            raise ApiError(400, f"{self.name} was trained without rationales", "no_rationales")
        if distribution and not self._can_distribute:
            raise ApiError(
                400, f"{self.name} has no probability for every label", "no_distribution"
            )
        label_tokens = max_label_tokens or self.student.card.max_label_tokens
        label_tokens = min(label_tokens, self._max_label_tokens)
        return GenerationOptions(rationale, label_tokens, score_labels=distribution)

    def completion_options(self, top: int | None) -> GenerationOptions:
        """Options of the completion endpoints; ``top`` as in ``_Form``."""
        return GenerationOptions(
            self.replies_with_rationale,
            self._max_label_tokens,
            completes=True,
            score_labels=top is not None,
        )

    def item(
        self,
        value: Any,
        field: str,
        max_tokens: int | None = None,
        json_names: tuple[str, ...] | None = None,
    ) -> Item:
        """A text or a row as the student reads it. Raises ApiError (400, 413)."""
        return Item(self._read(value, field), max_tokens, json_names=json_names)

    def _read(self, value: Any, field: str) -> str | Mapping[str, Any]:
        task = self.student.task
        if isinstance(value, str):
            self._check_length(value, field)
        if isinstance(value, str) and task.needs_fields:
            problem = f"{field}: {self.name} needs the fields of a {task.name} row, not plain text"
            value = _parse_row(value, problem)
        if isinstance(value, str):
            if not value.strip():
                raise ApiError(400, f"{field} is empty", "invalid_row")
            return value if self.threshold is None else self._fields_of_text(value, field)
        if not isinstance(value, dict):
            raise ApiError(400, f"{field} is neither a text nor a row of fields", "invalid_row")
        try:
            fields = task.fields(value, field)
            text = task.text(fields)
        except UserError as error:
            raise ApiError(400, f"{error.problem}; {error.hint}", "invalid_row") from None
        except Exception:  # all that runs here reads the client's row, so the row is at fault
            raise ApiError(
                400, f"{field} cannot be read as a row of {task.name}", "invalid_row"
            ) from None
        self._check_length(text, field)
        return fields

    def _fields_of_text(self, text: str, field: str) -> Mapping[str, Any]:
        """The row with this text, which a teacher's prompt needs. Raises ApiError (400)."""
        task = self.student.task
        with contextlib.suppress(UserError):
            fields = task.fields({task.section.columns.get("text", "text"): text}, field)
            if task.text(fields).split() == text.split():
                return fields
        row = _parse_row(text, f"{field}: the teacher needs the fields of a {task.name} row")
        parsed: Mapping[str, Any] = self._read(row, field)  # type: ignore[assignment]
        return parsed

    def _check_length(self, text: str, field: str) -> None:
        """Raises ApiError (413)."""
        max_tokens = self.student.card.max_input_tokens
        max_characters = _MAX_CHARACTERS_PER_TOKEN * max_tokens
        if len(text) > max_characters:
            raise ApiError(
                413,
                f"{field} has {len(text)} characters; the limit is {max_characters}, and "
                f"{self.name} reads only {max_tokens} tokens",
                "text_too_long",
            )

    def warm_up(self) -> None:
        """Generate once, so that a runtime's work at its first call is done."""
        card = self.student.card
        for target, prefix in card.prefixes.items():
            self.student.generate([f"{prefix}ready"], 2, 1, card.starts.get(target, "pad"))

    # --- in the model's thread

    def answer(self, items: Sequence[Item], options: GenerationOptions) -> list[Outcome]:
        """One batch. Only this thread uses the tokenizer, which is not safe for two."""
        answers = [item.answer for item in items if item.answer is not None]
        if options.predicts:
            answers = self._predict(items, options)
        outcomes = []
        for item, answer in zip(items, answers, strict=True):
            completion = self._completion(item, answer) if options.completes else None
            confidence = self._confidence(item, answer)
            limit = self._distance_limit
            is_novel = limit is not None and (answer.distance or 0.0) > limit
            outcomes.append(Outcome(answer, completion, confidence, is_novel))
        return outcomes

    def _predict(self, items: Sequence[Item], options: GenerationOptions) -> list[Answer]:
        threshold = self.threshold
        return self.student.predict(
            [item.value for item in items],
            rationale=options.rationale
            or (threshold is not None and threshold.confidence == "views"),
            batch_size=len(items),
            max_label_tokens=options.label_tokens,
            canonical=True,
            score_labels=options.score_labels
            or (threshold is not None and threshold.scores_labels),
        )

    def _confidence(self, item: Item, answer: Answer) -> float | None:
        if self.threshold is None or isinstance(item.value, str):
            return None
        return self.student.confidence(answer, item.value, self.threshold.confidence)

    def _completion(self, item: Item, answer: Answer) -> Completion:
        tokenizer = self.student.backend.tokenizer
        text = self._text(item, answer)
        all_token_ids = token_ids_of(tokenizer, text)
        token_ids = all_token_ids[: item.max_tokens]
        is_cut = len(token_ids) < len(all_token_ids)
        if is_cut:
            text = tokenizer.decode(token_ids, skip_special_tokens=True)
        is_unfinished = is_cut or answer.truncated
        has_rationale = item.json_names is None or "rationale" in item.json_names
        if self.replies_with_rationale and has_rationale:
            is_unfinished = is_unfinished or bool(answer.rationale_truncated)
        prompt = item.value
        if not isinstance(prompt, str):
            prompt = self.student.task.text(prompt)
        return Completion(
            text=text,
            finish_reason="length" if is_unfinished else "stop",
            prompt_tokens=len(token_ids_of(tokenizer, prompt, special=True)),
            completion_tokens=len(token_ids),
            distribution=answer.distribution,
            label=answer.label,
        )

    def _text(self, item: Item, answer: Answer) -> str:
        if item.json_names is not None:  # of an unreadable label, null
            value = answer.value
            if item.json_names:
                values = {"rationale": answer.rationale or ""}
                value = {name: values.get(name, answer.value) for name in item.json_names}
            return json.dumps(value, ensure_ascii=False)
        label = answer.raw if answer.label is None else answer.label
        text = f"{self._anchor} {label}".strip()
        if self.replies_with_rationale and answer.rationale:
            text = f"{answer.rationale}\n{text}"
        return text


def _parse_row(text: str, problem: str) -> Any:
    """Parse a row of fields that a client sent as JSON text. Raises ApiError (400)."""
    if count_values(text.encode()) > MAX_ROW_VALUES:
        raise ApiError(400, f"{problem}; a row has at most {MAX_ROW_VALUES} values", "invalid_row")
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise ApiError(400, f"{problem}; send its fields as a JSON object", "invalid_row")
    return row
