"""From prediction files to the comparison: every system scored by one path, paired with its baselines, no model at hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsbs.config import EvalSection, base_of
from dsbs.errors import UserError
from dsbs.evaluation.metrics import measures
from dsbs.evaluation.rationales import GRADED, Values, rationale_measures
from dsbs.evaluation.score import Scored
from dsbs.evaluation.stats import Clusters, Difference, Scores, accuracy, difference, holm, needed
from dsbs.records.results import (
    BreakEven,
    Comparison,
    GradedComparison,
    LabelEfficiency,
    Latency,
    SystemKind,
    SystemResult,
)
from dsbs.records.rows import Example, TrainedStudent
from dsbs.tasks.base import Task


@dataclass(slots=True)
class System:
    """A line of the comparison before it is scored: its prediction files, one for each seed, and what is known of it."""

    name: str
    kind: SystemKind
    files: list[Scored]
    students: list[TrainedStudent] = field(default_factory=list)  # by seed; of a student alone
    training_rows: int | None = None
    megabytes: float | None = None
    latency: list[Latency] = field(default_factory=list)
    usd_per_prediction: float | None = None
    written: dict[str, Values] = field(
        default_factory=dict
    )  # what its rationales are worth, by metric

    @property
    def method(self) -> str | None:
        return self.students[0].method if self.students else None

    @property
    def subset(self) -> float | None:
        return self.students[0].subset if self.students else None

    @property
    def scores(self) -> Scores:
        """Whether each row is right, averaged over the seeds."""
        return np.asarray(np.mean([one.correct for one in self.files], axis=0), dtype=np.float64)


def clusters_of(rows: Sequence[Example], name: str | None) -> Clusters:
    """The number of each row's cluster: rows are together where their input field ``name`` is equal. None without a name."""
    if name is None:
        return None
    numbers: dict[str, int] = {}
    found = np.empty(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        if name not in row.input:
            raise UserError(
                f"eval.cluster: row {row.id!r} has no field {name!r} (fields: {', '.join(row.input)})",
                hint="name an input field of the task; columns are renamed by task.columns",
            )
        found[i] = numbers.setdefault(str(row.input[name]), len(numbers))
    if len(numbers) < 2:
        raise UserError(
            f"eval.cluster: all rows have the same {name}, so nothing can be resampled",
            hint="name another field",
        )
    return found


def score_system(system: System, task: Task, clusters: Clusters) -> SystemResult:
    """All measures of one system."""
    found = accuracy(system.scores, len(system.files), clusters)
    measured = measures(task, system.files, clusters)
    written = rationale_measures(system.written, clusters)
    unreadable = [label is None for one in system.files for label in one.labels]
    latencies = [
        p.latency_ms for one in system.files for p in one.predictions if p.latency_ms is not None
    ]
    first = system.students[0] if system.students else None
    return SystemResult(
        name=system.name,
        kind=system.kind,
        method=system.method,
        labels=first.labels if first else None,
        subset=system.subset,
        training_rows=system.training_rows,
        seeds=[student.seed for student in system.students],
        accuracy=found.value,
        ci95=found.ci95,
        interval=found.interval,
        accuracy_per_seed=[float(one.correct.mean()) for one in system.files],
        unreadable=statistics.mean(unreadable),
        metrics=measured.metrics | written,
        recall=measured.recall,
        calibration=measured.calibration,
        parameters=first.parameters if first else None,
        megabytes=system.megabytes,
        ms_per_example=round(statistics.median(latencies), 3) if latencies else None,
        latency=system.latency,
        train_s=round(statistics.mean(s.wall_s for s in system.students), 1)
        if system.students
        else None,
        usd_per_prediction=system.usd_per_prediction,
    )


def pairs(systems: Sequence[System], section: EvalSection) -> list[tuple[System, System]]:
    """Each system with each baseline that learned from the same share of the rows; no two systems twice.

    After those a student that learned further terms is paired with its method without them, of the same labels and share.
    Systems that are no students stand beside those of the largest share. Where none of the baselines is there and files from
    outside are, the first of these is the baseline.
    """
    largest = max((system.subset for system in systems if system.subset is not None), default=None)
    share = {
        system.name: system.subset if system.subset is not None else largest for system in systems
    }
    outside = [system for system in systems if system.kind == "external"]
    groups = [
        [s for s in systems if name in (s.method, s.name if s.kind == "external" else None)]
        for name in section.baseline
    ]
    if not any(groups) and outside:
        groups = [outside[:1]]
    found: list[tuple[System, System]] = []
    for group in groups:
        for baseline in group:
            for system in systems:
                alike = share[system.name] == share[baseline.name] and system.name != baseline.name
                if alike and (baseline, system) not in found and (system, baseline) not in found:
                    found.append((system, baseline))
    for system in systems:
        plain = _without_terms(system, systems)
        if plain is not None and (system, plain) not in found and (plain, system) not in found:
            found.append((system, plain))
    return found


def _without_terms(system: System, systems: Sequence[System]) -> System | None:
    """The system of the same method, labels and share without further terms; None where it is not there, or has none."""
    if system.method is None or base_of(system.method) == system.method:
        return None
    labels, base = system.students[0].labels, base_of(system.method)
    alike = (one for one in systems if one.method == base and one.subset == system.subset)
    return next((one for one in alike if one.students[0].labels == labels), None)


def compare(
    chosen: Sequence[tuple[System, System]], clusters: Clusters
) -> dict[str, dict[str, Comparison]]:
    """Every pair's difference; Holm's correction over all of them, for each metric apart. System -> baseline -> comparison."""
    graded: dict[tuple[str, str], dict[str, GradedComparison]] = {}
    for metric in GRADED:
        for pair, found_graded in _graded(metric, chosen, clusters).items():
            graded.setdefault(pair, {})[metric] = found_graded
    gaps = [difference(system.scores, other.scores, clusters) for system, other in chosen]
    found: dict[str, dict[str, Comparison]] = {}
    for (system, other), gap, adjusted in zip(
        chosen, gaps, holm([gap.p for gap in gaps]), strict=True
    ):
        found.setdefault(system.name, {})[other.name] = Comparison(
            delta=gap.delta,
            ci95=gap.ci95,
            p=gap.p,
            p_holm=adjusted,
            test=gap.test,
            wins=gap.wins,
            losses=gap.losses,
            minimum_detectable_effect=gap.minimum_detectable_effect,
            graded=graded.get((system.name, other.name), {}),
        )
    return found


def _graded(
    metric: str, chosen: Sequence[tuple[System, System]], clusters: Clusters
) -> dict[tuple[str, str], GradedComparison]:
    """The pairs' differences by a metric that grades rows, where both have it."""
    gaps: dict[tuple[str, str], tuple[Difference, int]] = {}
    for system, other in chosen:
        if metric in system.written and metric in other.written:
            ours, theirs = (one.written[metric] for one in (system, other))
            both = ~(np.isnan(ours).all(axis=0) | np.isnan(theirs).all(axis=0))
            if both.any():
                mine, other_one = (np.nanmean(one[:, both], axis=0) for one in (ours, theirs))
                among = None if clusters is None else clusters[both]
                gaps[system.name, other.name] = difference(mine, other_one, among), int(both.sum())
    adjusted = holm([gap.p for gap, _ in gaps.values()])
    return {
        pair: GradedComparison(
            delta=gap.delta, ci95=gap.ci95, p=gap.p, p_holm=p_holm, test=gap.test, n=n
        )
        for (pair, (gap, n)), p_holm in zip(gaps.items(), adjusted, strict=True)
    }


def label_efficiency_of(
    systems: Sequence[System], targets: Sequence[System], clusters: Clusters
) -> list[LabelEfficiency]:
    """For each curve (a method's students on growing parts of the rows): how many rows it takes to match each target."""
    curves: dict[tuple[str, str], list[tuple[int, Scores]]] = {}
    for system in systems:
        if system.students and system.training_rows is not None:
            first = system.students[0]
            curves.setdefault((first.method, first.labels), []).append(
                (system.training_rows, system.scores)
            )
    found = []
    for (method, labels), points in curves.items():
        if len({rows for rows, _ in points}) < 2:
            continue
        points.sort(key=lambda point: point[0])
        for target in targets:
            if target.students and (target.students[0].method, target.students[0].labels) == (
                method,
                labels,
            ):
                continue
            rows, interval = needed(points, target.scores, clusters)
            found.append(
                LabelEfficiency(
                    method=method,
                    labels=labels,
                    system=target.name,
                    accuracy=float(target.scores.mean()),
                    rows=rows,
                    ci95=interval,
                    smallest=points[0][0],
                    largest=points[-1][0],
                )
            )
    return found


def break_evens(
    systems: Sequence[System], spent_usd: float | None, per_prediction: float | None
) -> Iterator[BreakEven]:
    """Of the students that learned from the teacher: after how many predictions the teacher's bill for the train rows is
    less than its bill for those predictions would be. Nothing where a price is unknown or nothing was paid.

    A student on a part of the rows is charged that part of the bill.
    """
    if not spent_usd or not per_prediction:
        return
    for system in systems:
        if system.students and system.students[0].source is not None:
            spent = spent_usd * system.students[0].subset
            yield BreakEven(
                system=system.name,
                spent_usd=spent,
                teacher_usd_per_prediction=per_prediction,
                predictions=math.ceil(spent / per_prediction),
            )


def bill(manifest: Mapping[str, Any], split: str) -> tuple[float | None, float | None]:
    """What the teacher's rows of a split cost, and one of them, in dollars, by the annotation's manifest; None: unknown."""
    said = manifest.get("splits", {}).get(split, {})
    usd, rows = said.get("usd"), said.get("rows")
    return usd, usd / rows if usd is not None and rows else None
