"""Choosing a teacher: several of them on the same rows, with what each gets right, how they agree, and what a rationale costs.

It stands above the stages because it needs both: annotation asks, evaluation's paired tests compare.
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
from dsbs.records.results import Rate, wilson
from dsbs.run_folder import RunFolder, read_annotations
from dsbs.tasks.base import Task


@dataclass(frozen=True, slots=True)
class Contender:
    """One teacher's figures. ``labels`` are its own answers by row id (None: unreadable)."""

    name: str
    summary: SplitSummary
    labels: dict[str, str | None]
    rationales: int  # accepted ones
    seconds_a_reply: float | None

    @property
    def parse_rate(self) -> Rate | None:
        return wilson(self.summary.accepted, self.summary.rows)

    @property
    def usd_a_rationale(self) -> float | None:
        """What one accepted rationale cost, its rejected neighbours included; None where the price is not known."""
        if self.summary.usd is None or not self.rationales:
            return None
        return self.summary.usd / self.rationales


@dataclass(frozen=True, slots=True)
class TeacherComparison:
    """Teachers on the same rows; ``versus`` compares each with the first: points, p by exact McNemar, p after Holm."""

    rows: int
    with_gold: int
    contenders: list[Contender]
    versus: dict[str, dict[str, float]]
    agreement: dict[
        str, dict[str, float]
    ]  # share of rows on which two teachers' labels say the same
    path: Path

    def as_json(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "with_gold": self.with_gold,
            "path": str(self.path),
            "teachers": [
                {
                    "name": one.name,
                    **{k: v for k, v in one.summary.as_json().items() if k != "rows"},
                    "parse_rate": None
                    if one.parse_rate is None
                    else round(one.parse_rate.value, 4),
                    "rationales": one.rationales,
                    "usd_a_rationale": one.usd_a_rationale,
                    "seconds_a_reply": one.seconds_a_reply,
                    "versus_first": self.versus.get(one.name),
                    "agreement": self.agreement[one.name],
                }
                for one in self.contenders
            ],
        }


def compare_teachers(
    recipes: Mapping[str, Recipe],
    *,
    rows: int = 100,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> TeacherComparison:
    """Annotate the same stratified sample of the first split with each recipe's teacher, through the run's store.

    ``recipes`` differ in their teachers; what is bought here a later run with that teacher finds bought. Raises UserError, and
    PartialError where a limit ended one of them.
    """
    if len(recipes) < 2:
        raise UserError(
            "one teacher cannot be compared",
            hint="name two or more: recipes/teachers/vllm.yaml model=gpt-4.1",
        )
    progress = progress or NoProgress()
    works = {name: Annotator(recipe) for name, recipe in recipes.items()}
    first = next(iter(works.values()))
    run = RunFolder.of(first.recipe, out)
    sample, _ = stratified(
        first.examples(first.recipe.annotate.splits[0]), rows, closed=first.task.labels is not None
    )
    contenders = []
    for name, work in works.items():
        path = run.stage("annotate/teachers") / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)}.jsonl"
        summary, seconds = annotate_sample(work, sample, run, path, progress)
        annotations = list(read_annotations(path))
        contenders.append(
            Contender(
                name=name,
                summary=summary,
                labels={row.id: row.own_label for row in annotations},
                rationales=sum(row.accepted and row.rationale is not None for row in annotations),
                seconds_a_reply=seconds,
            )
        )
    gold = {example.id: example.label for example in sample if example.label is not None}
    result = TeacherComparison(
        rows=len(sample),
        with_gold=len(gold),
        contenders=contenders,
        versus=_versus(contenders, gold, first.task),
        agreement={
            a.name: {b.name: _agreement(a, b, first.task) for b in contenders if b is not a}
            for a in contenders
        },
        path=run.stage("annotate") / "teachers.json",
    )
    write_json(result.path, result.as_json())
    return result


def _versus(
    contenders: list[Contender], gold: dict[str, str], task: Task
) -> dict[str, dict[str, float]]:
    if not gold:
        return {}
    import numpy as np

    from dsbs.evaluation.significance import holm, paired_difference

    def scores(one: Contender) -> Any:
        return np.array(
            [
                float((label := one.labels[i]) is not None and task.correct(label, right))
                for i, right in gold.items()
            ]
        )

    baseline, *others = contenders
    found = {one.name: paired_difference(scores(one), scores(baseline)) for one in others}
    adjusted = holm([one.p for one in found.values()])
    return {
        name: {
            "delta": round(one.delta, 4),
            "ci95_low": round(one.ci95[0], 4),
            "ci95_high": round(one.ci95[1], 4),
            "p": one.p,
            "p_holm": p,
        }
        for (name, one), p in zip(found.items(), adjusted, strict=True)
    }


def _agreement(a: Contender, b: Contender, task: Task) -> float:
    """Unreadable answers agree with nothing."""
    same = sum(
        (mine := a.labels[i]) is not None
        and (theirs := b.labels[i]) is not None
        and task.correct(mine, theirs)
        for i in a.labels
    )
    return round(same / len(a.labels), 4) if a.labels else 0.0
