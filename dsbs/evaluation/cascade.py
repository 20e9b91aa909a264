"""Cascade: each student in front of its teacher, its threshold and what it shows on test rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dsbs.config import CascadeSection, Recipe
from dsbs.errors import UserError
from dsbs.evaluation.bootstrap import Clusters, Floats, accuracy
from dsbs.evaluation.costs import Costs
from dsbs.evaluation.metrics import Scored
from dsbs.evaluation.recorded import check_replies
from dsbs.evaluation.selective import confidence_values, kinds_of
from dsbs.evaluation.systems import System
from dsbs.evaluation.thresholds import (
    FOLDS,
    Bools,
    CascadeRows,
    Fitted,
    fewest_rows,
    fit_and_test,
    fit_on,
)
from dsbs.formatting import count
from dsbs.records import Annotation, Example, TrainedStudent
from dsbs.records.measures import Cascade, CascadePoint, Measure
from dsbs.records.reviews import Reviews, apply_gold, apply_reviews
from dsbs.run_folder import RunFolder
from dsbs.students.calibration import ConfidenceKind, Threshold, read_calibration, write_record
from dsbs.students.card import CARD, read_card
from dsbs.tasks import Task, make_task
from dsbs.tasks.data import load, position, validation_rows

_POINTS = 40  # of a curve


def check_cascade(recipe: Recipe, run: RunFolder | None = None) -> None:
    """Raises UserError where ``eval.cascade`` lacks the teacher's answers, or calibration rows.

    ``run`` None: before anything is annotated.
    """
    section = recipe.eval.cascade
    if section is None:
        return
    split = recipe.eval.split
    if split != "test":
        raise UserError(
            f"eval.cascade needs test rows, and eval.split is {split}", hint="set eval.split: test"
        )
    is_annotated = split in recipe.annotate.splits and recipe.teacher.kind != "human"
    if not is_annotated or (run is not None and not run.annotations(split).is_file()):
        raise UserError(
            f"eval.cascade needs the teacher's answers on the {split} rows",
            hint=f"name {split} in annotate.splits and run `dsbs annotate`, or remove eval.cascade",
        )
    if section.calibration == "valid":
        if recipe.task.data.valid is not None and "valid" not in recipe.annotate.splits:
            raise UserError(
                "eval.cascade.calibration: valid needs the teacher's answers on the validation "
                "rows",
                hint="name valid in annotate.splits, or use a share of the test rows, e.g. "
                "calibration: 0.5",
            )
        calibration_examples(recipe, make_task(recipe.task))


def rows_warning(recipe: Recipe, test_rows: int) -> str | None:
    """Why no threshold can hold with so few test rows. None: one can."""
    section = recipe.eval.cascade
    if section is None or section.calibration == "valid":
        return None
    needed = fewest_rows(section)
    if max(section.calibration * test_rows, test_rows * (FOLDS - 1) // FOLDS) >= needed:
        return None
    return (
        f"eval.cascade: a threshold needs at least {count(needed, 'calibration row')}, more than "
        f"{count(test_rows, 'test row')} can give: the teacher would answer everything"
    )


def calibration_examples(
    recipe: Recipe,
    task: Task,
    reviews: Reviews | None = None,
    annotations: Mapping[str, Annotation] | None = None,
) -> list[Example]:
    """The validation rows that chose no student's best step, with the gold labels that people
    corrected.

    The step is chosen on ``train.valid_limit`` rows that have a label: a gold one, or without any
    gold labels the teacher's. ``annotations`` None: the rows are not annotated yet. Raises
    UserError where no rows are left.
    """
    assert recipe.eval.cascade is not None
    rows = apply_gold(load(recipe, task, "valid"), reviews or {}, task)
    labeled = [row for row in rows if row.label is not None]
    if not labeled and annotations is not None:
        reviewed = apply_reviews(annotations, reviews or {}, task)
        labeled = [row for row in rows if row.id in reviewed and reviewed[row.id].accepted]
    selected = {row.id for row in validation_rows(labeled or rows, recipe.train.valid_limit)}
    rest = [row for row in rows if row.id not in selected]
    if recipe.eval.cascade.of == "accuracy":
        rest = [row for row in rest if row.label is not None]
    if not rest:
        raise UserError(
            f"eval.cascade.calibration: valid: all {count(len(rows), 'validation row')} are used "
            "to choose the students' best steps",
            hint=f"set train.valid_limit below {len(rows)} and train again, or use a share of the "
            "test rows, e.g. calibration: 0.5",
        )
    return rest


def teacher_labels(
    rows: Sequence[Example], annotations: Mapping[str, Annotation], split: str
) -> list[str | None]:
    """The teacher's labels of validation rows, which may be rows of the train split.

    Its own ones whatever people made of them: it will answer the same in a cascade.
    """
    missing = [row.id for row in rows if row.id not in annotations]
    if missing:
        raise UserError(
            f"{count(len(missing), 'calibration row')} without an annotation (first: {missing[0]})",
            hint=f"name {split} in annotate.splits and run `dsbs annotate`",
        )
    check_replies([annotations[row.id] for row in rows], "calibration row")
    return [annotations[row.id].own_label for row in rows]


@dataclass(frozen=True, slots=True)
class Answers:
    """A student's answers and its teacher's labels, by row; ``labels`` None: unreadable."""

    file: Scored
    labels: Sequence[str | None]

    def rows(
        self, task: Task, kind: ConfidenceKind, section: CascadeSection, clusters: Clusters = None
    ) -> CascadeRows | None:
        """The rows that ``used`` names. None: the confidence is unknown."""
        confidence = confidence_values(self.file, task, kind)
        if confidence is None:
            return None
        pairs = list(zip(self.file.labels, self.labels, strict=True))
        agrees = [a is not None and b is not None and task.correct(a, b) for a, b in pairs]
        correct = [
            label is not None and row.label is not None and task.correct(label, row.label)
            for label, row in zip(self.labels, self.file.rows, strict=True)
        ]
        rows = CascadeRows(
            confidence,
            np.array(agrees, bool),
            self.file.correct,
            np.array(correct, bool),
            clusters,
        )
        return rows.of(self.used(section))

    def used(self, section: CascadeSection) -> Bools:
        """The rows with a label of the teacher; of accuracy, all rows: no label is a wrong one."""
        of_accuracy = section.of == "accuracy"
        return np.array([of_accuracy or label is not None for label in self.labels])


def cascades(
    recipe: Recipe,
    task: Task,
    systems: Sequence[System],
    costs: Costs,
    clusters: Clusters = None,
    calibration: Mapping[str, Answers] | None = None,
) -> list[Cascade]:
    """The cascade of each prediction file with a confidence, and ``threshold.json`` of students.

    ``calibration``: the answers to validation rows, by prediction file. None: a share of the rows.
    """
    section = recipe.eval.cascade
    teacher = next((system for system in systems if system.kind == "teacher"), None)
    if section is None or teacher is None:
        return []
    labels = teacher.files[0].labels
    results = []
    for system in systems:
        if system is teacher:
            continue
        kinds = kinds_of(system.files, system.confidence_kinds)
        for number in _best_first(system):
            name = system.member_names[number]
            file = system.files[number]
            kind = kinds[number]
            answers = Answers(file, labels)
            rows = answers.rows(task, kind, section, clusters)
            if rows is None or not len(rows):
                continue
            if calibration is None:
                positions = _positions(file.rows, recipe.eval.cluster)[answers.used(section)]
                fitted = fit_and_test(rows, positions, section, float(section.calibration))
            else:
                of_file = calibration.get(name)
                held_out = None if of_file is None else of_file.rows(task, kind, section)
                if held_out is None:
                    continue
                fitted = fit_on(held_out, rows, section)
            left_out = len(labels) - len(rows)
            cascade = _result(system, name, kind, section, fitted, costs, left_out)
            # Calls are timed without what these confidences need.
            if kind == "views" or (
                system.students and _scores_labels(recipe, system.students[number])
            ):
                cascade = cascade.model_copy(update={"ms_per_request": None})
            results.append(cascade)
            if system.students:
                _write_threshold(recipe, system.students[number], fitted, kind, section)
    return results


def _best_first(system: System) -> list[int]:
    """The indices of a system's files, the student that was best on valid first."""
    accuracies = [student.valid_accuracy for student in system.students] or [0.0]
    return sorted(range(len(accuracies)), key=lambda number: -accuracies[number])


def _positions(rows: Sequence[Example], cluster: str | None) -> Floats:
    """Each row's position in [0, 1) by a hash of its id; equal for the rows of a cluster."""
    keys = [row.id if cluster is None else str(row.input[cluster]) for row in rows]
    return np.array([position(key, "cascade") for key in keys])


def _result(
    system: System,
    name: str,
    kind: ConfidenceKind,
    section: CascadeSection,
    fitted: Fitted,
    costs: Costs,
    left_out: int,
) -> Cascade:
    test = fitted.test
    choice = fitted.choice
    answered = fitted.answered
    if not len(test):
        raise UserError(
            f"eval.cascade: no test rows are left beside {count(fitted.rows, 'calibration row')}",
            hint="lower eval.cascade.calibration, or use valid",
        )
    return Cascade(
        system=system.name,
        student=name,
        confidence=kind,
        threshold=choice.threshold,
        of=section.of,
        target=section.goal,
        margin=section.margin,
        level=section.confidence,
        bound=fitted.guaranteed(section),
        source="valid" if section.calibration == "valid" else "test",
        rows=fitted.rows,
        folds=fitted.folds,
        rows_needed=choice.rows_needed,
        n=len(test),
        left_out=left_out,
        coverage=_share(answered, test.clusters),
        agreement=_share(~answered | test.agrees, test.clusters),
        accuracy=_share(np.where(answered, test.correct, test.teacher_correct), test.clusters),
        teacher_accuracy=_share(test.teacher_correct, test.clusters),
        student_accuracy=_share(test.correct, test.clusters),
        curve=_curve(test, costs),
        **_money_and_time(system, float(answered.mean()), costs),
    )


def _share(values: Bools, clusters: Clusters) -> Measure:
    rate = accuracy(values.astype(np.float64), 1, clusters)
    return Measure(value=rate.value, ci95=rate.ci95, n=len(values))


def _money_and_time(system: System, coverage: float, costs: Costs) -> dict[str, Any]:
    """Money and time of a request of the cascade, by field."""
    values: dict[str, Any] = {"teacher_ms": costs.ms_per_request}
    price = costs.usd_per_request
    if price is not None:
        values["teacher_usd_per_1000"] = 1000 * price
        values["usd_per_1000"] = 1000 * price * (1 - coverage)
    single = [latency.p50_ms for latency in system.latency if latency.batch_size == 1]
    if single and costs.ms_per_request is not None:
        values["ms_per_request"] = single[0] + (1 - coverage) * costs.ms_per_request
    if price and coverage and system.name in costs.bills:
        values["break_even"] = math.ceil(costs.bills[system.name] / (price * coverage))
    return values


def _curve(test: CascadeRows, costs: Costs) -> list[CascadePoint]:
    readable = np.sort(test.confidence[test.confidence >= 0])[::-1]
    index = np.unique(np.linspace(0, len(readable) - 1, _POINTS).astype(np.int64))
    points = []
    for threshold in [None, *readable[index].tolist()] if len(readable) else []:
        answered = test.answered(threshold)
        share = float(answered.mean())
        usd = None
        if costs.usd_per_request is not None:
            usd = 1000 * costs.usd_per_request * (1 - share)
        is_correct = np.where(answered, test.correct, test.teacher_correct)
        point = CascadePoint(
            coverage=share,
            agreement=float((~answered | test.agrees).mean()),
            accuracy=float(is_correct.mean()),
            usd_per_1000=usd,
        )
        points.append(point)
    return points


def _scores_labels(recipe: Recipe, student: TrainedStudent) -> bool:
    is_here = (Path(student.path) / CARD).is_file()
    return recipe.eval.score_labels and is_here and read_card(student.path).writes_label_alone


def _write_threshold(
    recipe: Recipe,
    student: TrainedStudent,
    fitted: Fitted,
    kind: ConfidenceKind,
    section: CascadeSection,
) -> None:
    """Write ``threshold.json`` beside a student, unless its folder is elsewhere."""
    folder = Path(student.path)
    if not (folder / CARD).is_file():
        return
    calibration = read_calibration(folder)
    record = Threshold(
        student=student.fingerprint,
        scores_labels=_scores_labels(recipe, student),
        confidence=kind,
        temperature=1.0 if calibration is None else calibration.temperature,
        label_thresholds=None if calibration is None else calibration.label_thresholds,
        threshold=fitted.choice.threshold,
        of=section.of,
        target=section.goal,
        margin=section.margin,
        level=section.confidence,
        bound=fitted.guaranteed(section),
        rows=fitted.rows,
        coverage=fitted.coverage,
    )
    write_record(folder, record)
