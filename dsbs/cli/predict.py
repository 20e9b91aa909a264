"""``dsbs predict``: label rows with a trained student."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsbs.cli.common import Out, SetKeys, load, print_json, read_rows

if TYPE_CHECKING:
    from dsbs.students.student import Student

Row = tuple[str, str | dict[str, Any]]  # its id, and a text or the task's fields


def predict(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT",
            help="A student's folder; or a recipe: the student of its run that is best on valid.",
        ),
    ],
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Rows (.csv, .tsv, .jsonl, .parquet), or text, one row per line; - is stdin.",
        ),
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
    """Label rows: a file of rows or lines of text in, JSONL out."""
    from dsbs.students.student import Student

    if student.endswith((".yaml", ".yml")):
        from dsbs.evaluation.predictions import best_student

        student = best_student(load(student, overrides), out, needs_rationales=rationale)
        print(f"student: {student}", file=sys.stderr)
    loaded = Student.load(student)
    for batch in _batches(read_rows(file, loaded.task), batch_size):
        for row in _answers(loaded, batch, rationale, max_label_tokens):
            print_json(row)
        sys.stdout.flush()


def _batches(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch


def _answers(
    student: Student, batch: list[Row], rationale: bool, max_label_tokens: int
) -> Iterator[dict[str, Any]]:
    answers = student.predict(
        [item for _, item in batch],
        rationale=rationale,
        batch_size=len(batch),
        max_label_tokens=max_label_tokens,
        canonical=True,
    )
    for (row_id, _), answer in zip(batch, answers, strict=True):
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
