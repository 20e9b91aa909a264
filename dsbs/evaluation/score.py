"""The one scorer, of the teacher's, the students' and outside predictions alike: it reads files and needs no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dsbs.errors import UserError
from dsbs.records.rows import Example, Prediction, Unread
from dsbs.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Scored:
    """A prediction file against the gold labels. ``predictions``, ``labels`` and ``correct`` go along with ``rows``."""

    rows: Sequence[Example]
    predictions: list[Prediction]
    labels: list[
        str | None
    ]  # read anew in the raw text, so that a better reader needs no new prediction; None: unreadable
    correct: NDArray[np.bool_]  # (rows,)


def score(
    task: Task, rows: Sequence[Example], predictions: Mapping[str, Prediction], name: str
) -> Scored:
    """Read and mark the predictions of the system ``name``, by id. Rows have gold labels.

    Raises UserError where there are no rows or the file lacks some.
    """
    if not rows:
        raise UserError(
            "nothing to score: no row of the split has a gold label",
            hint="check eval.split and task.columns",
        )
    missing = [row.id for row in rows if row.id not in predictions]
    if missing:
        raise UserError(
            f"the predictions of {name} lack {len(missing)} of {len(rows)} rows (first: {missing[0]!r})",
            hint="a student's file: remove it and run `dsbs eval` again; a file from outside: give it a line for every row",
        )
    from dsbs.evaluation.accuracy import TaskAccuracy

    told = [predictions[row.id] for row in rows]
    others = [
        row.id
        for row, one in zip(rows, told, strict=True)
        if one.input is not None and one.input != row.input
    ]
    if others:
        raise UserError(
            f"the predictions of {name} are of other inputs than the data's in {len(others)} rows (first: {others[0]!r})",
            hint="the data changed since: run `dsbs eval` without --score-only",
        )
    labels = _read(task, rows, told)
    marks = TaskAccuracy(task).compute(
        predictions=[label or "" for label in labels], references=[str(row.label) for row in rows]
    )
    return Scored(rows, told, labels, np.asarray(marks["correct"], dtype=np.bool_))


def _read(
    task: Task, rows: Sequence[Example], predictions: Sequence[Prediction]
) -> list[str | None]:
    known: dict[
        str, str | Unread
    ] = {}  # where the row's fields do not matter, a few outputs stand for thousands
    labels = []
    for row, prediction in zip(rows, predictions, strict=True):
        if task.needs_fields:
            label = task.read_label(prediction.raw, row.input)
        elif prediction.raw in known:
            label = known[prediction.raw]
        else:
            label = known[prediction.raw] = task.read_label(prediction.raw, row.input)
        labels.append(None if isinstance(label, Unread) else label)
    return labels
