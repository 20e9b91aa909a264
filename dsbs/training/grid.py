"""Grid: the students that a recipe trains, and the tuning trials that choose their settings.

Every system tries the same settings on valid before its students are trained. A trial is a student
like any other, trained with the grid's first seed and kept under
``train/trials/<system>/<setting>/``. The best trial is that seed's student already; only the other
seeds are left to train.

A student's directory belongs to one fingerprint, the hash of all that decides its weights. Another
recipe's student under the same name is set aside, and restored when that recipe is used again.
``train.json`` is written last: it says that the student is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dsbs.config import LabelSource, TrainSection
from dsbs.errors import DsbsError
from dsbs.files import write_json
from dsbs.formatting import setting_text
from dsbs.records import TrainedStudent
from dsbs.records.subsets import Subset, subset_rank, subset_suffix
from dsbs.run_folder import TRAINING_RECORD, RunFolder, training_record
from dsbs.training.methods import method_of


class DivergedError(DsbsError):
    """A student's loss is no longer finite."""


@dataclass(frozen=True, slots=True)
class Trial:
    """A setting and its result."""

    setting: dict[str, Any]
    valid_accuracy: float
    selection: float
    """What the best trial is chosen by: valid accuracy, among equals the label loss."""
    best_step: int
    path: str


@dataclass(frozen=True, slots=True)
class StudentSpec:
    """One student to train: its method, data and seed; its settings; and where it is saved."""

    method: str
    labels: LabelSource
    seed: int
    section: TrainSection
    """Its training settings, tuned ones included."""
    subset: Subset = 1.0
    """The train rows that it learns from."""
    learns_votes: bool = False
    """Whether a term of its method has its targets from the annotations."""
    alias: str | None = None
    """Its name where that is not ``<system>-s<seed>``."""
    heading: str | None = None
    """Its name in progress messages. None: its name."""
    directory: str | None = None
    """Where it is saved, absolute or relative to the run's ``train/``. None: its name."""
    setting: dict[str, Any] = field(default_factory=dict)
    """The tuned settings; empty where nothing is tuned."""
    trials: tuple[Trial, ...] = ()
    student: str | None = None
    """The name of its section in the recipe. None: it is the only one."""
    keep_zeros: bool = False
    """Whether weights that are zero at the start stay zero, as magnitude pruning needs it."""
    without_targets: tuple[str, ...] = ()
    """Views whose own loss does not count: terms alone train them."""

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that decide its weights, the settings aside; part of its fingerprint."""
        names = ("method", "labels", "seed", "subset")
        return {name: getattr(self, name) for name in names}

    @property
    def system(self) -> str:
        """The common name of the students of all seeds."""
        student = "" if self.student is None else f"{self.student}-"
        return f"{student}{self.method}-{self.labels}{subset_suffix(self.subset)}"

    @property
    def name(self) -> str:
        return self.alias or f"{self.system}-s{self.seed}"

    @property
    def title(self) -> str:
        return self.heading or self.name

    def path(self, train: Path) -> Path:
        """Its directory, given the run's ``train`` directory."""
        return train / (self.directory or self.name)

    @property
    def needs_teacher(self) -> bool:
        """Whether it learns from annotations."""
        if self.labels == "teacher" or self.learns_votes:
            return True
        return method_of(self.method).needs_rationales

    @property
    def chosen_trial(self) -> Trial | None:
        """The trial of this spec's setting: with the same seed, it is this student."""
        return next((trial for trial in self.trials if trial.setting == self.setting), None)


def grid(train: TrainSection, student: str | None = None) -> list[StudentSpec]:
    """Every student of one section: all methods of one seed and subset before the next.

    ``student`` is the section's name where the recipe has several.
    """
    return [
        StudentSpec(
            name,
            labels,
            seed,
            train,
            subset,
            learns_votes=_learns_votes(train, name),
            student=student,
        )
        for seed in train.seeds
        for subset in sorted(train.subset, key=subset_rank, reverse=True)
        for name in train.methods
        for labels in method_of(name).labels or train.labels
    ]


def _learns_votes(train: TrainSection, method: str) -> bool:
    return any(term.learns_votes for term in train.terms_of(method))


def trial_specs(spec: StudentSpec) -> list[StudentSpec]:
    """The trials of a student, in the order of the recipe's values; none without tuning.

    A method that learns no rationales as a task of their own has no λ to try.
    """
    specs = []
    for setting in _settings(spec):
        values = ",".join(f"{key}={setting_text(value)}" for key, value in setting.items())
        trial = replace(
            spec,
            section=spec.section.tuned(setting),
            heading=f"{spec.name} with {values}",
            directory=f"trials/{spec.system}/{values}",
            setting=setting,
        )
        specs.append(trial)
    return specs


def _settings(spec: StudentSpec) -> list[dict[str, Any]]:
    tune = spec.section.tune
    settings = tune.settings if tune else []
    views = method_of(spec.method).views(spec.section)
    if not any(view.target == "rationale" for view in views):
        shorter = [
            {key: value for key, value in setting.items() if key != "rationale_weight"}
            for setting in settings
        ]
        settings = [
            setting for i, setting in enumerate(shorter) if setting and setting not in shorter[:i]
        ]
    return settings


class Tuner:
    """Chooses each system's settings; ``run_trial`` trains one trial and returns its result, or
    None where the loss diverged.
    """

    def __init__(
        self, seeds: Sequence[int], run_trial: Callable[[StudentSpec], Trial | None]
    ) -> None:
        self._first_seed = seeds[0]
        self._run_trial = run_trial
        self._trials: dict[str, tuple[Trial, ...]] = {}  # by system

    def tuned(self, spec: StudentSpec) -> StudentSpec:
        """``spec`` with the settings of its system's best trial.

        Raises DivergedError where every trial's loss diverged.
        """
        if spec.section.tune is None:
            return spec
        if spec.system not in self._trials:
            first = trial_specs(replace(spec, seed=self._first_seed))
            results = tuple(filter(None, map(self._run_trial, first)))
            if first and not results:
                raise DivergedError(
                    f"{spec.system}: the loss diverged with every setting of train.tune",
                    hint="give lower values of train.tune.learning_rate",
                )
            self._trials[spec.system] = results
        trials = self._trials[spec.system]
        if not trials:
            return replace(spec, section=spec.section.tuned({}))
        best = max(trials, key=lambda trial: trial.selection)
        section = spec.section.tuned(best.setting)
        return replace(spec, section=section, setting=best.setting, trials=trials)


# What a trial's student does not take over.
_OF_TRIAL = ("checkpoints", "tensorboard", TRAINING_RECORD)


class StudentFolder:
    """The directory of the student that ``spec`` describes and ``fingerprint`` identifies."""

    def __init__(self, path: Path, fingerprint: str, spec: StudentSpec) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.checkpoints = path / "checkpoints"
        self._spec = spec

    def is_finished(self) -> bool:
        return (self.path / TRAINING_RECORD).is_file()

    def student(self) -> TrainedStudent:
        return TrainedStudent(**self.read_record()["student"])

    def read_record(self) -> dict[str, Any]:
        return training_record(self.path)

    def last_checkpoint(self) -> Path | None:
        return last_checkpoint(self.checkpoints)

    def claim(self) -> None:
        """Set another fingerprint's student aside, and bring ours back if it was."""
        present = _fingerprint_of(self.path)
        if present == self.fingerprint:
            return
        if self.path.exists():
            RunFolder.set_aside(self.path, present)
        RunFolder.restore(self.path, self.fingerprint, _fingerprint_of)

    def begin(self, settings: str) -> None:
        """Create the directory; where a trial trained this very student, copy it.

        ``settings`` is the hash of the recipe's settings.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "work.json", {"fingerprint": self.fingerprint})
        trial = self._spec.chosen_trial
        if trial is None or _read_fingerprint(Path(trial.path)) != self.fingerprint:
            return
        for path in Path(trial.path).iterdir():
            if path.name in _OF_TRIAL:
                continue
            if path.is_dir():
                shutil.copytree(path, self.path / path.name, dirs_exist_ok=True)
            else:
                shutil.copy2(path, self.path / path.name)
        record = training_record(Path(trial.path))
        changes = {"path": str(self.path), "settings": settings, "tuned": self._spec.setting}
        student = TrainedStudent(**record["student"]).model_copy(update=changes)
        self._write(record | {"student": student.model_dump()})

    def follow_recipe(self, origin: Mapping[str, Any]) -> None:
        """Update a kept student's record: another grid of settings may lead to equal weights."""
        record = self.read_record()
        student = record["student"] | origin
        if student["reviews"] is None:
            del student["reviews"]  # as in the records of runs without reviews
        changed = record | {"student": student, "trials": self._trials}
        if changed != record:
            self._write(changed)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Write the record, after which nothing resumes, and remove the checkpoints."""
        self._write(record)
        # The best checkpoint is the student; the last served resuming.
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _write(self, record: Mapping[str, Any]) -> None:
        write_json(self.path / TRAINING_RECORD, {**record, "trials": self._trials})

    @property
    def _trials(self) -> list[dict[str, Any]]:
        return [asdict(trial) for trial in self._spec.trials]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest intact checkpoint. Removes those that a kill left half-written."""
    intact = []
    for path in folder.glob("checkpoint-*") if folder.is_dir() else ():
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            intact.append((int(path.name.rpartition("-")[2]), path))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
    return max(intact)[1] if intact else None


def _fingerprint_of(folder: Path) -> str | None:
    """The fingerprint in a student's folder; None where there is none that can be read."""
    try:
        return _read_fingerprint(folder)
    except (OSError, ValueError, KeyError):
        return None


def _read_fingerprint(folder: Path) -> str:
    return str(json.loads((folder / "work.json").read_text(encoding="utf-8"))["fingerprint"])
