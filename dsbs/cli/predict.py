"""``dsbs predict``: label rows with a trained student."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsbs.cli.common import Out, SetKeys, load, read_rows

if TYPE_CHECKING:
    from dsbs.students.student import Student

Line = tuple[int, str | dict[str, Any]]


def predict(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT",
            help="A student's folder; or a recipe: the student of its run that is best on valid.",
        ),
    ],
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Text or JSONL, one row per line; - is stdin.")
    ] = "-",
    rationale: Annotated[
        bool,
        typer.Option(
            "--rationale",
            help="Add a rationale. A step-by-step student writes it separately: it is not why the "
            "label was chosen.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 64,
    max_label_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens of a label.")
    ] = 64,
    overrides: SetKeys = None,
    out: Out = None,
) -> None:
    """Label rows: text or JSONL in, JSONL out."""
    from dsbs.students.student import Student

    if student.endswith((".yaml", ".yml")):
        from dsbs.evaluation.predictions import best_student

        student = best_student(load(student, overrides), out, needs_rationales=rationale)
        print(f"student: {student}", file=sys.stderr)
    loaded = Student.load(student)
    for batch in _batches(read_rows(file), batch_size):
        for row in _answers(loaded, batch, rationale, max_label_tokens):
            print(json.dumps(row, ensure_ascii=False))
        sys.stdout.flush()


def _batches(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    iterator = iter(lines)
    while batch := list(islice(iterator, size)):
        yield batch


def _answers(
    student: Student, batch: list[Line], rationale: bool, max_label_tokens: int
) -> Iterator[dict[str, Any]]:
    answers = student.predict(
        [_input(item) for _, item in batch],
        rationale=rationale,
        batch_size=len(batch),
        max_label_tokens=max_label_tokens,
    )
    for (number, item), answer in zip(batch, answers, strict=True):
        row_id: Any = str(number)
        if isinstance(item, dict) and "id" in item:
            row_id = item["id"]
        row: dict[str, Any] = {
            "id": row_id,
            "prediction": answer.label,
            "raw": answer.raw,
            "probability": answer.probability,
            "truncated": answer.truncated,
        }
        if rationale:
            row["rationale"] = answer.rationale
            row["rationale_is_causal"] = student.card.reasons_first
        yield row


def _input(item: str | dict[str, Any]) -> str | dict[str, Any]:
    """A row's fields: those under ``input`` where it has such an object, else the whole row."""
    if isinstance(item, dict) and isinstance(item.get("input"), dict):
        fields: dict[str, Any] = item["input"]
        return fields
    return item
