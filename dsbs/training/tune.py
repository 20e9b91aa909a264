"""Tuning: every system of the grid tries the same settings on valid before its students are trained.

A trial is a student like any other, trained by the grid's first seed and kept under ``train/trials/<system>/<setting>/``. The
best trial is that seed's student already; only the other seeds are left to train.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dsbs.config import Recipe, TrainSection
from dsbs.files import write_json
from dsbs.records.rows import TrainedStudent
from dsbs.training.methods import Cell

RECORD = "train.json"
_WORK = ("checkpoints", "tensorboard", RECORD)  # what a trial's folder has beside its student


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting and what came of it; it is chosen by ``selection``: valid accuracy, among equals the label loss."""

    setting: dict[str, Any]
    valid_accuracy: float
    selection: float
    best_step: int
    path: str


@dataclass(frozen=True, slots=True)
class Job:
    """One student to train: by which settings, into which folder."""

    cell: Cell
    section: TrainSection
    folder: Path
    title: str
    setting: dict[str, Any] = field(
        default_factory=dict
    )  # what tuning chose; empty where nothing is tuned
    trials: tuple[Trial, ...] = ()
    name: str | None = None  # of the student; None: the cell's
    keep_zeros: bool = False  # weights that are zero at the start stay zero

    @property
    def chosen(self) -> Trial | None:
        """The trial that used this job's setting: with the same seed, it is this student."""
        return next((trial for trial in self.trials if trial.setting == self.setting), None)


class Tuner:
    """Plans a recipe's jobs; ``train`` trains one and returns when it is done."""

    def __init__(self, recipe: Recipe, run: Path, train: Callable[[Job], Any]) -> None:
        self._section, self._folder, self._train = recipe.train, run / "train", train
        self._tried: dict[str, tuple[Trial, ...]] = {}

    def job(self, cell: Cell) -> Job:
        """The job of a cell, after the trials that decide its settings."""
        if self._section.tune is None:
            return Job(cell, self._section, self._folder / cell.name, cell.name)
        trials = self._trials(cell)
        best = max(trials, key=lambda trial: trial.selection)
        section = self._section.tuned(best.setting)
        return Job(cell, section, self._folder / cell.name, cell.name, best.setting, trials)

    def _trials(self, cell: Cell) -> tuple[Trial, ...]:
        if cell.system not in self._tried:
            first = replace(cell, seed=self._section.seeds[0])
            jobs = trial_jobs(self._section, first, self._folder)
            for job in jobs:
                self._train(job)
            self._tried[cell.system] = tuple(_read(job) for job in jobs)
        return self._tried[cell.system]


def trial_jobs(section: TrainSection, cell: Cell, folder: Path) -> list[Job]:
    """What a cell tries, in the order of the recipe's values; nothing where the recipe does not tune."""
    jobs = []
    for setting in section.tune.settings if section.tune else ():
        name = ",".join(f"{key}={value:g}" for key, value in setting.items())
        into = folder / "trials" / cell.system / name
        jobs.append(Job(cell, section.tuned(setting), into, f"{cell.name} with {name}", setting))
    return jobs


def _read(job: Job) -> Trial:
    said = json.loads((job.folder / RECORD).read_text(encoding="utf-8"))
    student = said["student"]
    return Trial(
        job.setting,
        student["valid_accuracy"],
        said["selection"],
        student["best_step"],
        str(job.folder),
    )


def adopt(trial: Path, job: Job, changes: dict[str, Any]) -> None:
    """Make a finished trial the job's student: its files, with ``changes`` to the record, which is written last."""
    for path in trial.iterdir():
        if path.name not in _WORK and path.is_file():
            shutil.copy2(path, job.folder / path.name)
    said = json.loads((trial / RECORD).read_text(encoding="utf-8"))
    record = TrainedStudent(**said["student"]).model_copy(update=changes)
    trials = [asdict(trial) for trial in job.trials]
    write_json(job.folder / RECORD, said | {"student": record.model_dump(), "trials": trials})
