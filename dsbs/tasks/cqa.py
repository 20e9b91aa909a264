"""CommonsenseQA (Talmor et al., 2019; rationales: CoS-E, Rajani et al., 2019): one of five lettered
choices.
"""

from __future__ import annotations

import json
import re
from itertools import takewhile
from typing import Any

from dsbs.errors import UserError
from dsbs.records import Unreadable
from dsbs.tasks import Fields, Task, cell_text, column_of, missing_column
from dsbs.tasks.label_set import LabelSet
from dsbs.tasks.marks import first_line, fold, tidy, unwrapped

LETTERS = "abcdefghij"
_LETTER_SET = LabelSet(f"({letter})" for letter in LETTERS)
_LETTER = re.compile(r"\(\s*([a-z])\s*\)", re.IGNORECASE)
_LETTERED = re.compile(r"\([a-j]\)\s*(.+?)\s*(?=\([a-j]\)|$)", re.DOTALL)
_LEADING = re.compile(r"^([a-z])(?:[).:]|\s*$)", re.IGNORECASE)


class Cqa(Task):
    inputs = {"question": ()}
    needs_fields = True
    has_choices = True
    label_columns = ("label", "answer", "answerKey")
    rationale_columns = ("rationale", "abstractive_explanation")

    def check_fields(self, fields: dict[str, Any], row: Fields, where: str) -> dict[str, Any]:
        fields = super().check_fields(fields, row, where)
        choices = _choices(row, self.section.columns.get("choices", "choices"), where)
        folded = [fold(choice) for choice in choices]
        if not 2 <= len(choices) <= len(LETTERS) or "" in folded:
            raise UserError(
                f"{where}: 2 to {len(LETTERS)} non-empty choices are needed", hint="fix the row"
            )
        return fields | {"choices": choices}

    def gold(self, value: Any, fields: Fields, where: str) -> str:
        text = str(value).strip()
        choices: list[str] = fields["choices"]
        by_text = LabelSet(choices).of_value(value)
        letter = text.strip("()").lower()
        if len(letter) != 1 or letter not in LETTERS[: len(choices)]:
            letter = ""
        by_letter = choices[LETTERS.index(letter)] if letter else None
        if by_letter and (by_text is None or self.correct(by_text, by_letter) or text[0] == "("):
            return by_letter
        if by_text and by_letter:
            raise UserError(
                f"{where}: label {text!r} is the letter of {by_letter!r} and the text of another "
                "choice",
                hint="write the letter in parentheses, such as (a)",
            )
        if by_text:
            return by_text
        raise UserError(
            f"{where}: label {text[:60]!r} is not one of the choices {choices}", hint="fix the row"
        )

    def text(self, fields: Fields) -> str:
        """Question and lettered choices: the published code's input."""
        return f"{fields['question']}\nAnswer Choices:\n{_lettered(fields['choices'])}"

    def choice_texts(self, fields: Fields) -> dict[str, str]:
        """Question and choice as a pair, in the order of the choices; of equal ones the first."""
        question = _plain(fields["question"])
        return {choice: f"{question}</s>{_plain(choice)}" for choice in fields["choices"]}

    def template_variables(self, fields: Fields, label: str | None = None) -> dict[str, Any]:
        variables = super().template_variables(fields, label)
        variables["lettered_choices"] = _lettered(fields["choices"])
        if label is not None:
            variables["letter"] = LETTERS[fields["choices"].index(label)]
        return variables

    def read_label(self, text: str, fields: Fields) -> str | Unreadable:
        """By the choice's own text; else by the letter, as the words may be spelled differently;
        else by exactly one choice's words.
        """
        choices: list[str] = fields["choices"]
        labels = LabelSet({fold(choice): choice for choice in reversed(choices)}.values())
        line = first_line(text)
        without_brackets = takewhile(lambda layer: layer[0] != "(", unwrapped(line))
        for candidate in (text, *without_brackets):
            label = labels.spelled(candidate)
            if label is not None:
                return label
        answer = tidy(line)
        if not answer:
            return Unreadable("empty")
        letters = {match.lower() for match in _LETTER.findall(answer)}
        if letters:
            stated = {label[1] for label in _LETTER_SET.not_negated(answer)}
            letters -= {*LETTERS} - stated
            if not letters:
                return Unreadable("label-outside-set", answer)
        elif leading := _LEADING.match(answer):
            letters = {leading.group(1).lower()}
        if len(letters) > 1:
            return Unreadable("several-answers", answer)
        if letters:
            index = LETTERS.find(letters.pop())
            if 0 <= index < len(choices):
                return choices[index]
            return Unreadable("label-outside-set", answer)
        return labels.read(text)

    def correct(self, predicted: str, gold: str) -> bool:
        return fold(predicted) == fold(gold)


def _plain(text: str) -> str:
    """One line without control characters and without the separator of a pair."""
    return " ".join(text.replace("</s>", " ").split())


def _lettered(choices: list[str]) -> str:
    return "\n".join(
        f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False)
    )


def _choices(row: Fields, column: str, where: str) -> list[str]:
    """Choices as a list, CommonsenseQA's {label, text}, columns c_0, c_1, …, or a cell of JSON or
    "(a) … (b) …".
    """
    name = column_of(row, (column,))
    if name is None:
        numbered = [row[f"c_{i}"] for i in range(len(LETTERS)) if f"c_{i}" in row]
        if not numbered:
            raise missing_column(where, "choices", row)
        return [_choice(choice, where) for choice in numbered]
    value = row[name]
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
    texts = [choice["text"] if isinstance(choice, dict) else choice for choice in value]
    return [_choice(text, where) for text in texts]


def _choice(value: Any, where: str) -> str:
    return (cell_text(value, "a choice", where) or "").strip()
