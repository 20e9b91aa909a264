"""The stage: predict what is missing, score all systems by one path, compare them with the baseline."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsbs.annotations import learned_source, run_folder
from dsbs.artefacts import hold, manifest, write_json
from dsbs.errors import UserError
from dsbs.eval.predict import (
    TEACHER,
    predict_student,
    predict_teacher,
    prediction_file,
    read_predictions,
    trained_students,
)
from dsbs.eval.score import score
from dsbs.eval.stats import Scores, accuracy, difference, holm
from dsbs.eval.table import markdown
from dsbs.progress import Meter, Silent
from dsbs.recipe import Recipe
from dsbs.records import Example, TrainedStudent
from dsbs.tasks import make_task
from dsbs.tasks.base import Task
from dsbs.tasks.load import load, survey


@dataclass(slots=True)
class System:
    """One line of the comparison: the teacher, or the students of one method over their seeds."""

    name: str
    subset: float | None  # the share of the train rows; None: the teacher's
    seeds: list[int]
    accuracy: float
    ci95: tuple[float, float]
    interval: str
    per_seed: list[float]
    unreadable: float  # share of outputs that are no label of the task
    parameters: int | None
    ms_per_example: float | None  # median over rows of a batch's time divided by its rows
    train_s: float | None  # mean over seeds
    versus: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "subset": self.subset,
            "accuracy": self.accuracy,
            "ci95": list(self.ci95),
            "interval": self.interval,
            "seeds": self.seeds,
            "accuracy_per_seed": self.per_seed,
            "unreadable": self.unreadable,
            "parameters": self.parameters,
            "ms_per_example": self.ms_per_example,
            "train_s": self.train_s,
            "versus": self.versus,
        }


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The closing table of ``dsbs eval``."""

    run: Path
    split: str
    n: int
    systems: list[System]
    baseline: str | None
    reportable: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "split": self.split,
            "n": self.n,
            "baseline": self.baseline,
            "reportable": self.reportable,
            "systems": [system.as_json() for system in self.systems],
        }

    def as_markdown(self) -> str:
        return markdown(self.as_json())


def evaluate(recipe: Recipe, *, out: str | Path | None = None, meter: Meter | None = None) -> EvalResult:
    """Predict the split with every student of the recipe and compare them all, the teacher included.

    Writes ``eval/predictions/*.jsonl``, ``eval/results.json`` and ``eval/results.md``. Raises UserError where nothing was
    trained or no row has a gold label.
    """
    meter = meter or Silent()
    run = run_folder(recipe, out)
    task = make_task(recipe.task)
    students = _of_recipe(recipe, task, trained_students(run), run)
    missing = _missing(recipe, students)
    if missing:
        meter.say(f"not trained, or not finished: {', '.join(missing)}")
    rows = [row for row in load(recipe, task, recipe.eval.split) if row.label is not None]
    if not rows:
        raise UserError(
            f"no row of the {recipe.eval.split} split has a gold label, so nothing can be compared",
            hint="label some test rows; they are never trained on",
        )
    data: dict[str, str] = {recipe.eval.split: survey(rows).hash}
    with hold(run / "eval"), manifest(run / "eval" / "manifest.json", recipe.model_dump(mode="json"), data):
        teacher = predict_teacher(recipe, task, rows, run, needed=any(s.source is not None for s in students))
        for student in students:
            predict_student(recipe, student, rows, run, meter)
        result = _compare(recipe, task, rows, run, students, with_teacher=teacher is not None)
        write_json(run / "eval" / "results.json", result.as_json())
        (run / "eval" / "results.md").write_text(result.as_markdown() + "\n", encoding="utf-8")
    return result


def _of_recipe(recipe: Recipe, task: Task, students: list[TrainedStudent], run: Path) -> list[TrainedStudent]:
    wanted = [s for s in students if s.method in recipe.train.methods and s.seed in recipe.train.seeds]
    free = ("finetune", "distill")  # their labels are in their names
    wanted = [s for s in wanted if s.method in free or s.labels in recipe.train.labels]
    wanted = [s for s in wanted if s.subset in recipe.train.subset]
    if not wanted:
        raise UserError(f"{run}/train has no finished student of this recipe", hint="run `dsbs train` with this recipe first")
    settings, source = recipe.training, learned_source(recipe, task)
    others = [s.name for s in wanted if s.settings != settings or s.source not in (None, source)]
    if others:
        raise UserError(
            f"{', '.join(others)}: trained by other settings, or on another teacher's annotations, than this recipe's",
            hint="run `dsbs train` with this recipe: students that fit are kept, others are set aside",
        )
    return wanted


def _missing(recipe: Recipe, students: list[TrainedStudent]) -> list[str]:
    """Seeds that a method's other students have been trained with and this recipe asks for as well."""
    names = {student.name for student in students}
    systems = sorted({student.system for student in students})
    return [name for system in systems for seed in recipe.train.seeds if (name := f"{system}-s{seed}") not in names]


def _compare(
    recipe: Recipe, task: Task, rows: Sequence[Example], run: Path, students: list[TrainedStudent], *, with_teacher: bool
) -> EvalResult:
    scores: dict[str, Scores] = {}
    systems: list[System] = []
    groups: dict[str, list[TrainedStudent]] = {}
    for student in students:
        groups.setdefault(student.system, []).append(student)
    order = sorted(groups, key=lambda name: (groups[name][0].method not in recipe.eval.baseline, -groups[name][0].subset, name))
    for name in ([TEACHER] if with_teacher else []) + order:
        members = sorted(groups.get(name, []), key=lambda student: student.seed)
        files = [read_predictions(prediction_file(run, s.name)) for s in members] or [
            read_predictions(prediction_file(run, TEACHER))
        ]
        right, unreadable, latencies = [], 0, []
        for predictions in files:
            scored = score(task, rows, predictions, name)
            unreadable += sum(label is None for label in scored.labels)
            right.append(scored.correct)
            latencies += [p.latency_ms for p in predictions.values() if p.latency_ms is not None]
        scores[name] = np.asarray(right, dtype=np.float64).mean(axis=0)
        found = accuracy(scores[name], len(files))
        systems.append(
            System(
                name=name,
                subset=members[0].subset if members else None,
                seeds=[student.seed for student in members],
                accuracy=found.value,
                ci95=found.ci95,
                interval=found.interval,
                per_seed=[float(np.mean(one)) for one in right],
                unreadable=unreadable / len(files) / len(rows),
                parameters=members[0].parameters if members else None,
                ms_per_example=round(statistics.median(latencies), 3) if latencies else None,
                train_s=round(statistics.mean(s.wall_s for s in members), 1) if members else None,
            )
        )
    # each is compared at equal data: with the baseline of the same share, where there is one
    baselines = {groups[name][0].subset: name for name in reversed(order) if groups[name][0].method == recipe.eval.baseline[0]}
    baseline = next((name for name in order if name in baselines.values()), None)
    if baseline is not None:
        pairs = [(system, baselines.get(system.subset or 1.0, baseline)) for system in systems]
        pairs = [(system, other) for system, other in pairs if system.name != other]
        gaps = [difference(scores[system.name], scores[other]) for system, other in pairs]
        for (system, other), gap, adjusted in zip(pairs, gaps, holm([gap.p for gap in gaps]), strict=True):
            system.versus[other] = {
                "delta": gap.delta,
                "ci95": list(gap.ci95),
                "p": gap.p,
                "p_holm": adjusted,
                "test": gap.test,
            }
    reportable = recipe.task.limit is None and all(student.reportable for student in students)
    return EvalResult(run, recipe.eval.split, len(rows), systems, baseline, reportable=reportable)
