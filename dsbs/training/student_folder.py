"""Student folder: one student's directory, with its record and checkpoints.

A directory belongs to one fingerprint, the hash of all that decides a student's weights. Another
recipe's student under the same name is set aside, and brought back when its recipe returns.
``train.json`` is written last: it says that the student is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsbs.files import write_json
from dsbs.records.rows import TrainedStudent
from dsbs.run_folder import TRAINING_RECORD, RunFolder, training_record
from dsbs.training.grid import StudentSpec

# A trial's files that do not become its student's.
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
        RunFolder.take_back(self.path, self.fingerprint, _fingerprint_of)

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
            if path.name not in _OF_TRIAL and path.is_file():
                shutil.copy2(path, self.path / path.name)
        record = training_record(Path(trial.path))
        changes = {"path": str(self.path), "settings": settings, "tuned": self._spec.setting}
        student = TrainedStudent(**record["student"]).model_copy(update=changes)
        self._write(record | {"student": student.model_dump()})

    def follow_recipe(self, origin: Mapping[str, Any]) -> None:
        """Update a kept student's record: another grid of settings may lead to equal weights."""
        record = self.read_record()
        changed = record | {"student": record["student"] | origin, "trials": self._trials}
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
