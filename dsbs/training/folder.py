"""A student's folder: begun, finished, adopted from a trial, set aside for another recipe's and brought back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsbs.files import write_json
from dsbs.records.rows import TrainedStudent
from dsbs.run_folder import RunFolder
from dsbs.training.checkpoints import last_checkpoint
from dsbs.training.tune import RECORD, Job, adopt


class StudentFolder:
    """Where a job's student is made. ``fingerprint`` tells its student from others under the same name."""

    def __init__(self, job: Job, fingerprint: str) -> None:
        self.path, self.fingerprint = job.folder, fingerprint
        self.checkpoints = job.folder / "checkpoints"
        self._job = job

    def is_finished(self) -> bool:
        return (self.path / RECORD).is_file()

    def record(self) -> TrainedStudent:
        return TrainedStudent(**self._said()["student"])

    def last_checkpoint(self) -> Path | None:
        """Where the training stood; what a kill left half-written is removed."""
        return last_checkpoint(self.checkpoints)

    def make_room(self) -> None:
        """Another recipe's or other data's student under this name moves aside, and ours comes back if it was aside."""
        there = _mark(self.path)
        if there == self.fingerprint:
            return
        if self.path.exists():
            RunFolder.set_aside(self.path, there)
        RunFolder.take_back(self.path, self.fingerprint, _mark)

    def begin(self, changes: Mapping[str, Any]) -> None:
        """Say whose folder it is. Where tuning has trained this very student, the trial becomes it, its record changed so."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "work.json", {"fingerprint": self.fingerprint})
        trial = self._job.chosen
        if trial is not None and _fingerprint(Path(trial.path)) == self.fingerprint:
            adopt(Path(trial.path), self._job, {"path": str(self.path), **changes})

    def follow_recipe(self, changes: Mapping[str, Any]) -> None:
        """A kept student is this recipe's now: equal weights may come of another grid of settings."""
        said = self._said()
        changed = said | {"student": said["student"] | changes, "trials": self._trials}
        if changed != said:
            write_json(self.path / RECORD, changed)

    def finish(self, student: TrainedStudent, said: Mapping[str, Any]) -> None:
        """Write the record, which says that the student is whole; then nothing will resume."""
        write_json(
            self.path / RECORD, {"student": student.model_dump(), "trials": self._trials, **said}
        )
        shutil.rmtree(
            self.checkpoints, ignore_errors=True
        )  # the best one is the student; the rest served resuming

    @property
    def _trials(self) -> list[dict[str, Any]]:
        return [asdict(trial) for trial in self._job.trials]

    def _said(self) -> dict[str, Any]:
        said: dict[str, Any] = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        return said


def _mark(folder: Path) -> str | None:
    """The fingerprint of a student's folder; None where it has none."""
    try:
        return _fingerprint(folder)
    except (OSError, ValueError, KeyError):
        return None


def _fingerprint(folder: Path) -> str:
    return str(json.loads((folder / "work.json").read_text(encoding="utf-8"))["fingerprint"])
