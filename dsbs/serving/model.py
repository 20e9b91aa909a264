"""A student behind a server: a client's rows into what it reads, and what it writes into an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsbs.errors import UserError
from dsbs.serving.settings import ANCHOR, LABEL_TOKENS, ROW_VALUES, ApiError, Settings, values_in
from dsbs.students import Answer, Student, ids_of

_TOKEN_CHARACTERS = 64  # of a text, for each token that the student reads: a tokenizer's time goes with the whole text


@dataclass(frozen=True, slots=True)
class Item:
    """One input, and what is its own in the way it is asked: rows that differ in it share a batch."""

    given: str | Mapping[str, Any]  # a text, or a row of the task's own fields
    most_tokens: int | None = None  # of its completion, which is cut there; None: it ends by itself


@dataclass(frozen=True, slots=True)
class GenerationOptions:
    """How rows are asked; those of one batch are asked in the same way."""

    rationale: bool
    label_tokens: int
    completes: bool = False  # whether completions are made


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer as one text."""

    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    answer: Answer
    completion: Completion | None  # None: not asked for


class Model:
    """Raises UserError where the student cannot reply as ``settings`` has it."""

    def __init__(self, student: Student, settings: Settings) -> None:
        self.student, self.name = student, student.card.name
        self.reasons = settings.reply == "step-by-step"
        if self.reasons and not student.card.explains:
            raise UserError(
                f"{self.name} was trained without rationales and cannot reply step by step",
                hint="serve a step-by-step student, or give --reply label --anchor 'Answer:' for labels that annotate reads",
            )
        self._anchor = (
            settings.anchor if settings.anchor is not None else ANCHOR if self.reasons else ""
        )
        self._most = max(
            LABEL_TOKENS, student.card.max_target_tokens
        )  # more than it ever learned to write is waste

    def how(self, *, rationale: bool, tokens: int | None) -> GenerationOptions:
        """Of `/predict`. Raises Refused where the student learned no rationales."""
        if rationale and not self.student.card.explains:
            raise ApiError(400, f"{self.name} was trained without rationales", "no_rationales")
        return GenerationOptions(rationale, min(tokens or LABEL_TOKENS, self._most))

    @property
    def how_completed(self) -> GenerationOptions:
        """Of completions."""
        return GenerationOptions(self.reasons, self._most, completes=True)

    def item(self, given: Any, where: str, most_tokens: int | None = None) -> Item:
        """A text or a row as the student reads it. Raises Refused (400, 413)."""
        return Item(self._read(given, where), most_tokens)

    def _read(self, given: Any, where: str) -> str | Mapping[str, Any]:
        task = self.student.task
        if isinstance(given, str):
            self._refuse_long(given, where)
        if isinstance(given, str) and task.needs_fields:
            given = _row_in(
                given,
                f"{where}: {self.name} cannot answer plain text, a row of {task.name} has more fields",
            )
        if isinstance(given, str):
            if not given.strip():
                raise ApiError(400, f"{where} is empty", "invalid_row")
            return given
        if not isinstance(given, dict):
            raise ApiError(400, f"{where} is neither a text nor a row of fields", "invalid_row")
        try:
            fields = task.fields(given, where)
            text = task.text(fields)
        except UserError as error:
            raise ApiError(400, f"{error.problem}; {error.hint}", "invalid_row") from None
        except (
            Exception
        ):  # all that runs here reads the client's row: what it trips over is in the row
            raise ApiError(
                400, f"{where} cannot be read as a row of {task.name}", "invalid_row"
            ) from None
        self._refuse_long(text, where)
        return fields

    def _refuse_long(self, text: str, where: str) -> None:
        """Raises Refused (413)."""
        most = _TOKEN_CHARACTERS * self.student.card.max_input_tokens
        if len(text) > most:
            raise ApiError(
                413,
                f"{where} has {len(text)} characters, {most} at most: {self.name} reads "
                f"{self.student.card.max_input_tokens} tokens of it",
                "text_too_long",
            )

    def warm(self) -> None:
        """One answer to nothing in particular: whatever a runtime does at its first call is done."""
        card = self.student.card
        for target, prefix in card.prefixes.items():
            self.student.generate([f"{prefix}ready"], 2, 1, card.starts.get(target, "pad"))

    # --- in the model's thread

    def answer(self, items: Sequence[Item], how: GenerationOptions) -> list[Outcome]:
        """One batch. The tokenizer is used in this thread alone: it is not made for two."""
        answers = self.student.predict(
            [item.given for item in items],
            rationale=how.rationale,
            batch_size=len(items),
            max_label_tokens=how.label_tokens,
            canonical=True,
        )
        if not how.completes:
            return [Outcome(answer, None) for answer in answers]
        return [
            Outcome(answer, self._completion(item, answer))
            for item, answer in zip(items, answers, strict=True)
        ]

    def _completion(self, item: Item, answer: Answer) -> Completion:
        tokenizer = self.student.engine.tokenizer
        label = answer.raw if answer.label is None else answer.label
        text = f"{self._anchor} {label}".strip()
        if self.reasons and answer.rationale:
            text = f"{answer.rationale}\n{text}"
        ids = ids_of(tokenizer, text)
        kept = ids[: item.most_tokens]
        cut = len(kept) < len(ids)
        if cut:
            text = tokenizer.decode(kept, skip_special_tokens=True)  # of both kinds of tokenizer
        unfinished = cut or answer.truncated or (self.reasons and bool(answer.rationale_truncated))
        asked = item.given if isinstance(item.given, str) else self.student.task.text(item.given)
        return Completion(
            text=text,
            finish_reason="length" if unfinished else "stop",
            prompt_tokens=len(ids_of(tokenizer, asked, special=True)),
            completion_tokens=len(kept),
        )


def _row_in(text: str, problem: str) -> Any:
    """The row that a text is, as JSON. Raises Refused (400)."""
    if values_in(text.encode()) > ROW_VALUES:
        raise ApiError(400, f"{problem}; and none has more than {ROW_VALUES} values", "invalid_row")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ApiError(400, f"{problem}; give its fields as a JSON object", "invalid_row")
    return found
