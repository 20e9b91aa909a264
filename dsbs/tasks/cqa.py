"""CommonsenseQA (Talmor et al., 2019; rationales: CoS-E, Rajani et al., 2019): one of five lettered choices."""

from __future__ import annotations

import json
import re
from typing import Any

from dsbs.errors import UserError
from dsbs.records.rows import Unread
from dsbs.tasks.base import Fields, Task, column_of, first_line, fold, missing_column, tidy

LETTERS = "abcdefghij"
_LETTER = re.compile(r"\(\s*([a-z])\s*\)", re.IGNORECASE)
_LETTERED = re.compile(r"\([a-j]\)\s*(.+?)\s*(?=\([a-j]\)|$)", re.DOTALL)
_LEADING = re.compile(r"^([a-z])(?:[).:]|\s*$)", re.IGNORECASE)


class Cqa(Task):
    inputs = {"question": ()}
    needs_fields = True
    label_columns = ("label", "answer", "answerKey")
    rationale_columns = ("rationale", "abstractive_explanation")

    def check_fields(self, found: dict[str, Any], row: Fields, where: str) -> dict[str, Any]:
        found = super().check_fields(found, row, where)
        choices = _choices(row, self.section.columns.get("choices", "choices"), where)
        folded = [fold(choice) for choice in choices]
        if not 2 <= len(choices) <= len(LETTERS) or "" in folded:
            raise UserError(
                f"{where}: 2 to {len(LETTERS)} non-empty choices are needed", hint="mend the row"
            )
        return found | {"choices": choices}

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        text = str(value).strip()
        choices: list[str] = fields["choices"]
        for choice in choices:
            if fold(choice) == fold(text):
                return choice
        letter = text.strip("()").lower()
        if len(letter) == 1 and letter in LETTERS[: len(choices)]:
            return choices[LETTERS.index(letter)]
        raise UserError(
            f"{where}: label {text[:60]!r} is none of the choices {choices}", hint="mend the row"
        )

    def text(self, fields: Fields) -> str:
        """Question and lettered choices: the published code's input."""
        return f"{fields['question']}\nAnswer Choices:\n{_lettered(fields['choices'])}"

    def view(self, fields: Fields, label: str | None = None) -> dict[str, Any]:
        seen = super().view(fields, label) | {"lettered_choices": _lettered(fields["choices"])}
        if label is not None:
            seen["letter"] = LETTERS[fields["choices"].index(label)]
        return seen

    def read_label(self, text: str, fields: Fields) -> str | Unread:
        """By the letter where one is named (spelling of the words varies), else by the words of exactly one choice."""
        choices: list[str] = fields["choices"]
        answer = tidy(first_line(text))
        if not answer:
            return Unread("empty")
        by_fold = {fold(choice): choice for choice in choices}
        if fold(answer) in by_fold:
            return by_fold[fold(answer)]
        letters = {match.lower() for match in _LETTER.findall(answer)}
        if not letters and (leading := _LEADING.match(answer)):
            letters = {leading.group(1).lower()}
        if len(letters) > 1:
            return Unread("several-answers", answer)
        if letters:
            index = LETTERS.find(letters.pop())
            return (
                choices[index] if 0 <= index < len(choices) else Unread("label-outside-set", answer)
            )
        named = {
            choice
            for key, choice in by_fold.items()
            if re.search(rf"(?<!\w){re.escape(key)}(?!\w)", fold(answer))
        }
        # "bank" inside "river bank" is not a second answer
        named = {
            c for c in named if not any(c != other and fold(c) in fold(other) for other in named)
        }
        if len(named) == 1:
            return named.pop()
        return Unread("several-answers" if named else "label-outside-set", answer)

    def correct(self, predicted: str, gold: str) -> bool:
        return fold(predicted) == fold(gold)


def _lettered(choices: list[str]) -> str:
    return "\n".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


def _choices(row: Fields, column: str, where: str) -> list[str]:
    """Choices as a list, as CommonsenseQA's {label, text}, as columns c_0, c_1, …, or in a cell as JSON or "(a) … (b) …"."""
    found = column_of(row, (column,))
    if found is None:
        numbered = [row[name] for name in (f"c_{i}" for i in range(len(LETTERS))) if name in row]
        if not numbered:
            raise missing_column(where, "choices", row)
        return [str(choice).strip() for choice in numbered]
    value = row[found]
    if isinstance(value, str):
        lettered = _LETTERED.findall(value)
        if len(lettered) > 1:
            return [choice.strip() for choice in lettered]
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise UserError(
                f"{where}: choices is not a JSON list",
                hint='write ["bank", "river", …] in the cell',
            ) from None
    if isinstance(value, dict):
        value = value.get("text")
    if value is None or isinstance(value, str) or not hasattr(value, "__iter__"):
        raise UserError(f"{where}: choices is not a list", hint='write ["bank", "river", …]')
    return [str(choice["text"] if isinstance(choice, dict) else choice).strip() for choice in value]
