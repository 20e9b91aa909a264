"""Comparison of teachers on the same rows: accuracy, agreement, and the price of a rationale.

It ranks above the stages because it uses two of them, annotation and evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.annotation.annotator import Annotator
from dsbs.annotation.planning import annotate_sample, stratified
from dsbs.annotation.summary import SplitSummary
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.files import write_json
from dsbs.progress import NoProgress, Progress
from dsbs.records import Example
from dsbs.records.measures import Rate, wilson
from dsbs.run_folder import RunFolder, read_annotations
from dsbs.tasks import Task


@dataclass(frozen=True, slots=True)
class Contender:
    """One teacher's figures. ``labels`` are its own answers by row id (None: unreadable)."""

    name: str
    summary: SplitSummary
    labels: dict[str, str | None]
    rationales: int
    """Accepted rationales."""
    seconds_per_reply: float | None

    @property
    def acceptance_rate(self) -> Rate | None:
        return wilson(self.summary.accepted, self.summary.rows)

    @property
    def usd_per_rationale(self) -> float | None:
        """The cost of an accepted rationale, rejected ones included; None: the price is unknown."""
        if self.summary.usd is None or not self.rationales:
            return None
        return self.summary.usd / self.rationales

    def as_json(self) -> dict[str, Any]:
        summary = {key: value for key, value in self.summary.as_json().items() if key != "rows"}
        rate = self.acceptance_rate
        return {
            "name": self.name,
            **summary,
            "acceptance_rate": None if rate is None else round(rate.value, 4),
            "rationales": self.rationales,
            "usd_per_rationale": self.usd_per_rationale,
            "seconds_per_reply": self.seconds_per_reply,
        }


@dataclass(frozen=True, slots=True)
class TeacherComparison:
    """Teachers on the same rows."""

    rows: int
    with_gold: int
    contenders: list[Contender]
    versus: dict[str, dict[str, float]]
    """Each teacher against the first: the difference in accuracy, p by exact McNemar and Holm."""
    agreement: dict[str, dict[str, float]]
    """The share of rows on which two teachers' labels are equal."""
    path: Path

    def as_json(self) -> dict[str, Any]:
        teachers = []
        for contender in self.contenders:
            comparison = {
                "versus_first": self.versus.get(contender.name),
                "agreement": self.agreement[contender.name],
            }
            teachers.append(contender.as_json() | comparison)
        return {
            "rows": self.rows,
            "with_gold": self.with_gold,
            "path": str(self.path),
            "teachers": teachers,
        }


def compare_teachers(
    recipes: Mapping[str, Recipe],
    *,
    rows: int = 100,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> TeacherComparison:
    """Annotate one stratified sample of the first split with each recipe's teacher.

    ``recipes`` differ in their teachers. Replies are stored in the run, so a later run with that
    teacher does not buy them again. Raises UserError, and PartialError where a limit ended one.
    """
    if len(recipes) < 2:
        raise UserError(
            "one teacher cannot be compared",
            hint="name two or more: recipes/teachers/vllm.yaml model=gpt-6.1-sol",
        )
    annotators = {name: Annotator(recipe) for name, recipe in recipes.items()}
    first = next(iter(annotators.values()))
    task = first.task
    run = RunFolder.of(first.recipe, out)
    examples = first.examples(first.recipe.annotate.splits[0])
    sample, _ = stratified(examples, rows, closed=task.labels is not None)
    contenders = [
        _contender(name, annotator, sample, run, progress or NoProgress())
        for name, annotator in annotators.items()
    ]
    gold = {example.id: example.label for example in sample if example.label is not None}
    agreement = {
        first.name: {
            second.name: _agreement(first, second, task)
            for second in contenders
            if second is not first
        }
        for first in contenders
    }
    result = TeacherComparison(
        rows=len(sample),
        with_gold=len(gold),
        contenders=contenders,
        versus=_versus(contenders, gold, task),
        agreement=agreement,
        path=run.stage("annotate") / "teachers.json",
    )
    write_json(result.path, result.as_json())
    return result


def _contender(
    name: str, annotator: Annotator, sample: list[Example], run: RunFolder, progress: Progress
) -> Contender:
    file_name = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    path = run.stage("annotate/teachers") / f"{file_name}.jsonl"
    summary, seconds = annotate_sample(annotator, sample, run, path, progress)
    annotations = list(read_annotations(path))
    return Contender(
        name=name,
        summary=summary,
        labels={row.id: row.own_label for row in annotations},
        rationales=sum(row.accepted and row.rationale is not None for row in annotations),
        seconds_per_reply=seconds,
    )


def _versus(
    contenders: list[Contender], gold: dict[str, str], task: Task
) -> dict[str, dict[str, float]]:
    if not gold:
        return {}
    import numpy as np

    from dsbs.evaluation.significance import holm, paired_difference

    scores = {
        contender.name: np.array(
            [_is_correct(contender.labels[row_id], label, task) for row_id, label in gold.items()],
            dtype=float,
        )
        for contender in contenders
    }
    baseline = scores.pop(contenders[0].name)
    differences = {name: paired_difference(values, baseline) for name, values in scores.items()}
    adjusted = holm([difference.p for difference in differences.values()])
    return {
        name: {
            "delta": round(difference.delta, 4),
            "ci95_low": round(difference.ci95[0], 4),
            "ci95_high": round(difference.ci95[1], 4),
            "p": difference.p,
            "p_holm": p_holm,
        }
        for (name, difference), p_holm in zip(differences.items(), adjusted, strict=True)
    }


def _agreement(first: Contender, second: Contender, task: Task) -> float:
    """The share of rows with equal labels; an unreadable answer agrees with nothing."""
    if not first.labels:
        return 0.0
    equal = 0
    for row_id, label in first.labels.items():
        other = second.labels[row_id]
        equal += other is not None and _is_correct(label, other, task)
    return round(equal / len(first.labels), 4)


def _is_correct(label: str | None, gold: str, task: Task) -> bool:
    return label is not None and task.correct(label, gold)
