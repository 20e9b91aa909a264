"""Systems: scoring, pairing and comparing them, from prediction files alone."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from dsbs.config import EvalSection, Recipe, base_of
from dsbs.config.registry import METRICS, entry
from dsbs.errors import UserError
from dsbs.evaluation.aggregates import GradedDifference, RowSums, RowValues, graded_difference
from dsbs.evaluation.bootstrap import Clusters, Scores, accuracy, label_efficiency
from dsbs.evaluation.calibration import calibration_bins
from dsbs.evaluation.metrics import Scored, SystemPredictions, measure
from dsbs.evaluation.metrics_of_parts import part_results
from dsbs.evaluation.selective import selective
from dsbs.evaluation.significance import holm, paired_difference
from dsbs.records import Example, TrainedStudent
from dsbs.records.results import (
    Comparison,
    FloorComparison,
    GradedComparison,
    LabelEfficiency,
    Latency,
    SystemKind,
    SystemResult,
)
from dsbs.records.subsets import Subset, subset_rank
from dsbs.students.calibration import ConfidenceKind
from dsbs.tasks import Task


@dataclass(slots=True)
class System:
    """A system before it is scored: its predictions, one file for each seed, and its facts."""

    name: str
    kind: SystemKind
    files: list[Scored]
    students: list[TrainedStudent] = field(default_factory=list)  # by seed
    floor: str | None = None  # as the recipe names it
    learned_subset: Subset | None = None  # of the train rows, for a floor that learns
    labels: str | None = None  # whose labels such a floor learned
    start_of: str | None = None  # the named student whose model a floor asks before training
    training_rows: int | None = None
    settings_tried: int | None = None  # by tuning, of one of several students
    megabytes: float | None = None
    latency: list[Latency] = field(default_factory=list)
    usd_per_prediction: float | None = None
    confidence_kinds: list[ConfidenceKind] = field(default_factory=list)  # chosen on valid
    # of metrics that compare systems
    compared: dict[str, RowValues | RowSums] = field(default_factory=dict)

    @property
    def method(self) -> str | None:
        return self.students[0].method if self.students else None

    @property
    def student(self) -> str | None:
        """The name of its student in the recipe, if it has one."""
        return self.students[0].student if self.students else self.start_of

    @property
    def subset(self) -> Subset | None:
        return self.students[0].subset if self.students else self.learned_subset

    @property
    def member_names(self) -> list[str]:
        """The names of the prediction files."""
        return [student.name for student in self.students] or [self.name]

    @property
    def scores(self) -> Scores:
        """Whether each row is right, averaged over the seeds."""
        return np.asarray(np.mean([file.correct for file in self.files], axis=0), dtype=np.float64)


def clusters_of(rows: Sequence[Example], field_name: str | None) -> Clusters:
    """Each row's cluster number: rows with equal values in an input field are one cluster.

    None without a field. Raises UserError if a row has no such field, or all are one cluster.
    """
    if field_name is None:
        return None
    numbers: dict[str, int] = {}
    clusters = np.empty(len(rows), dtype=np.int64)
    for i, row in enumerate(rows):
        if field_name not in row.input:
            raise UserError(
                f"eval.cluster: row {row.id!r} has no field {field_name!r} "
                f"(fields: {', '.join(row.input)})",
                hint="name an input field of the task; task.columns renames columns",
            )
        clusters[i] = numbers.setdefault(str(row.input[field_name]), len(numbers))
    if len(numbers) < 2:
        raise UserError(
            f"eval.cluster: all rows have the same {field_name}, so nothing can be resampled",
            hint="name another field",
        )
    return clusters


def score_system(
    system: System,
    task: Task,
    clusters: Clusters,
    teacher_rationales: Mapping[str, str | None] | None = None,
) -> SystemResult:
    """Compute all metrics of a system, as `SystemPredictions` has it, and set ``compared``."""
    predictions = SystemPredictions(task, system.files, clusters, teacher_rationales)
    measures = measure(predictions)
    system.compared = measures.compared
    total = accuracy(system.scores, len(system.files), clusters)
    unreadable = [label is None for file in system.files for label in file.labels]
    result = SystemResult(
        name=system.name,
        kind=system.kind,
        student=system.student,
        floor=system.floor,
        labels=system.labels,
        subset=system.subset,
        training_rows=system.training_rows,
        accuracy=total.value,
        ci95=total.ci95,
        interval=total.interval,
        accuracy_per_seed=[float(file.correct.mean()) for file in system.files],
        unreadable=statistics.mean(unreadable),
        metrics=measures.metrics,
        recall=measures.recall,
        confusions=measures.confusions,
        parts=part_results(predictions),
        calibration=calibration_bins(predictions),
        selective=selective(system.files, task, system.confidence_kinds, clusters),
        megabytes=system.megabytes,
        ms_per_example=_ms_per_example(system),
        latency=system.latency,
        usd_per_prediction=system.usd_per_prediction,
    )
    if not system.students:
        return result
    first = system.students[0]
    train_s = statistics.mean(student.wall_s for student in system.students)
    student_facts = {
        "method": first.method,
        "labels": first.labels,
        "subset": first.subset,
        "seeds": [student.seed for student in system.students],
        "parameters": first.parameters,
        "train_s": round(train_s, 1),
        "settings_tried": system.settings_tried,
    }
    return result.model_copy(update=student_facts)


def _ms_per_example(system: System) -> float | None:
    latencies = [
        prediction.latency_ms
        for file in system.files
        for prediction in file.predictions
        if prediction.latency_ms is not None
    ]
    return round(statistics.median(latencies), 3) if latencies else None


# --- comparisons


def pairs(systems: Sequence[System], section: EvalSection) -> list[tuple[System, System]]:
    """The (system, baseline) pairs to compare; no two systems twice.

    Each system with each baseline that learned from the same subset of the rows and, of several
    students, belongs to the same one; then each student with further loss terms with its method
    without them. Systems that are not students count to the largest subset and to every student.
    If no baseline exists but external files do, the first of them is the baseline. Students are
    compared with one another by `student_pairs`. Floors are outside this family: see
    `compare_with_floors`.
    """
    systems = [system for system in systems if system.kind != "floor"]
    subsets = [system.subset for system in systems if system.subset is not None]
    largest = max(subsets, key=subset_rank, default=None)
    subset = {
        system.name: largest if system.subset is None else system.subset for system in systems
    }
    external = [system for system in systems if system.kind == "external"]
    baselines = [
        system for name in section.baseline for system in systems if _is_named(system, name)
    ]
    chosen: list[tuple[System, System]] = []

    def add(system: System, baseline: System) -> None:
        if (system, baseline) not in chosen and (baseline, system) not in chosen:
            chosen.append((system, baseline))

    for baseline in baselines or external[:1]:
        for system in systems:
            is_same = subset[system.name] == subset[baseline.name] and system.name != baseline.name
            if is_same and _are_of_one_student(system, baseline):
                add(system, baseline)
    for system in systems:
        plain = _without_terms(system, systems)
        if plain is not None:
            add(system, plain)
    return chosen


def _are_of_one_student(system: System, other: System) -> bool:
    """Whether two systems do not belong to different students."""
    return not system.students or not other.students or system.student == other.student


def student_pairs(systems: Sequence[System]) -> list[tuple[System, System]]:
    """Pairs of different students by the same method, from the same labels and the largest subset
    of the rows; the one that the recipe names first comes first.
    """
    candidates = [system for system in systems if system.students]
    largest = max((system.subset for system in candidates), key=subset_rank, default=None)
    candidates = [system for system in candidates if system.subset == largest]
    return [
        (first, second)
        for first, second in itertools.combinations(candidates, 2)
        if first.student != second.student
        and (first.method, first.students[0].labels) == (second.method, second.students[0].labels)
    ]


def first_baselines(chosen: Sequence[tuple[System, System]]) -> list[System]:
    """The first baseline of each student in pairs of systems and baselines."""
    baselines: dict[str | None, System] = {}
    for _, baseline in chosen:
        baselines.setdefault(baseline.student, baseline)
    return list(baselines.values())


def _is_named(system: System, baseline: str) -> bool:
    """Whether ``eval.baseline`` names a system: students by method, external files by name."""
    if system.kind == "external":
        return system.name == baseline
    return system.method == baseline


def _without_terms(system: System, systems: Sequence[System]) -> System | None:
    """The system of the same method, labels and subset without further loss terms, if any."""
    if system.method is None or base_of(system.method) == system.method:
        return None
    for other in systems:
        if other.student != system.student:
            continue
        is_plain = other.method == base_of(system.method) and other.subset == system.subset
        if is_plain and other.students[0].labels == system.students[0].labels:
            return other
    return None


def compare(
    chosen: Sequence[tuple[System, System]], clusters: Clusters
) -> dict[str, dict[str, Comparison]]:
    """The comparison of each pair: system -> baseline -> comparison.

    p values are Holm-corrected over all pairs, separately for each metric.
    """
    graded: dict[tuple[str, str], dict[str, GradedComparison]] = {}
    for metric in METRICS:
        if entry(METRICS, metric).compares_systems:
            for pair, comparison in _compare_graded(metric, chosen, clusters).items():
                graded.setdefault(pair, {})[metric] = comparison
    differences = [
        paired_difference(system.scores, baseline.scores, clusters) for system, baseline in chosen
    ]
    adjusted = holm([difference.p for difference in differences])
    comparisons: dict[str, dict[str, Comparison]] = {}
    for (system, baseline), difference, p_holm in zip(chosen, differences, adjusted, strict=True):
        comparisons.setdefault(system.name, {})[baseline.name] = Comparison(
            **asdict(difference),
            p_holm=p_holm,
            delta_per_seed=_delta_per_seed(system, baseline),
            graded=graded.get((system.name, baseline.name), {}),
        )
    return comparisons


def _delta_per_seed(system: System, baseline: System) -> dict[int, float]:
    ours, theirs = (
        {student.seed: float(file.correct.mean()) for student, file in zip(*members, strict=False)}
        for members in ((each.students, each.files) for each in (system, baseline))
    )
    return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}


def compare_with_floors(
    systems: Sequence[System], clusters: Clusters
) -> dict[str, dict[str, FloorComparison]]:
    """Each student, and external system, against the floors of its subset of the train rows:
    system -> floor -> comparison.

    p values are not corrected. Systems that are not students count to the largest subset, and a
    floor that learned from no rows is compared with all.
    """
    subsets = [system.subset for system in systems if system.subset is not None]
    largest = max(subsets, key=subset_rank, default=None)
    comparisons: dict[str, dict[str, FloorComparison]] = {}
    for system in systems:
        if system.kind not in ("student", "external"):
            continue
        subset = largest if system.subset is None else system.subset
        for floor in systems:
            if floor.kind != "floor" or floor.subset not in (None, subset):
                continue
            if floor.student not in (None, system.student):
                continue
            difference = paired_difference(system.scores, floor.scores, clusters)
            comparisons.setdefault(system.name, {})[floor.name] = FloorComparison(
                delta=difference.delta,
                ci95=difference.ci95,
                p=difference.p,
                test=difference.test,
                wins=difference.wins,
                losses=difference.losses,
            )
    return comparisons


def _compare_graded(
    metric: str, chosen: Sequence[tuple[System, System]], clusters: Clusters
) -> dict[tuple[str, str], GradedComparison]:
    """The pairs' comparisons by a metric that both systems have."""
    differences: dict[tuple[str, str], GradedDifference] = {}
    for system, baseline in chosen:
        if metric in system.compared and metric in baseline.compared:
            difference = graded_difference(
                system.compared[metric], baseline.compared[metric], clusters
            )
            if difference is not None:
                differences[system.name, baseline.name] = difference
    adjusted = holm([difference.p for difference in differences.values()])
    return {
        pair: GradedComparison(
            delta=difference.delta,
            ci95=difference.ci95,
            p=difference.p,
            p_holm=p_holm,
            test=difference.test,
            n=difference.n,
        )
        for (pair, difference), p_holm in zip(differences.items(), adjusted, strict=True)
    }


# --- label efficiency and cost


def label_efficiencies(
    systems: Sequence[System], targets: Sequence[System], clusters: Clusters
) -> list[LabelEfficiency]:
    """For each learning curve, the training rows that it takes to match each target.

    A curve is a method's students on two or more shares of the training rows. Of several students,
    each is compared with its own systems.
    """
    curves: dict[tuple[str | None, str, str], list[tuple[int, Scores]]] = {}
    for system in systems:
        if system.students and system.training_rows is not None:
            curves.setdefault(_curve_of(system), []).append((system.training_rows, system.scores))
    efficiencies = []
    for (student, method, labels), points in curves.items():
        sizes = sorted({rows for rows, _ in points})
        if len(sizes) < 2:
            continue
        points.sort(key=lambda point: point[0])
        for target in targets:
            if target.students and _curve_of(target) == (student, method, labels):
                continue
            if target.students and target.student != student:
                continue
            rows, ci95 = label_efficiency(points, target.scores, clusters)
            efficiencies.append(
                LabelEfficiency(
                    student=student,
                    method=method,
                    labels=labels,
                    system=target.name,
                    accuracy=float(target.scores.mean()),
                    rows=rows,
                    ci95=ci95,
                    smallest=sizes[0],
                    largest=sizes[-1],
                )
            )
    return efficiencies


def _curve_of(system: System) -> tuple[str | None, str, str]:
    first = system.students[0]
    return first.student, first.method, first.labels


def headline_system(recipe: Recipe, systems: Sequence[System]) -> str | None:
    """The system that the recipe is about; None if it does not exist.

    Of the students, the largest subset of the first method that is not a baseline, or of the last
    baseline if all are; of several students, the first in the recipe. Without students, the first
    external system that is not a baseline.
    """
    baselines = recipe.eval.baseline
    if any(system.students for system in systems):
        methods = sorted(
            recipe.train.methods,
            key=lambda name: -baselines.index(name) if name in baselines else -len(baselines),
        )
        candidates = [system for system in systems if system.method == methods[0]]
        if not candidates:
            return None
        labels = recipe.train.labels[0]
        return max(
            candidates,
            key=lambda system: (subset_rank(system.subset), system.students[0].labels == labels),
        ).name
    external = [system.name for system in systems if system.kind == "external"]
    external_baselines = [name for name in external if name in baselines] or external[:1]
    return next((name for name in external if name not in external_baselines), None)
