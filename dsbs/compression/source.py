"""Source student: where a chain starts, how it was trained, and the steps behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dsbs.config import Recipe
from dsbs.config.load import read_recorded
from dsbs.errors import UserError
from dsbs.records.compression import RECORD, read_record
from dsbs.records.rows import TrainedStudent
from dsbs.run_folder import RunFolder, read_student
from dsbs.students import read_card

WORK = "work.json"  # the fingerprint of everything that made a compressed student


@dataclass(frozen=True, slots=True)
class SourceStudent:
    """The trained student of a chain, and the student that its next step starts from."""

    run: RunFolder
    recipe: Recipe
    student: TrainedStudent
    start: Path  # the folder that the next step starts from
    chain: tuple[str, ...]  # the steps up to ``start``
    fingerprint: str  # of ``start``

    @property
    def folder(self) -> Path:
        """The folder of the compressed students made of ``student``."""
        return self.run.compressed(self.student.name)


def find_source(student: str | Path) -> SourceStudent:
    """Read a student of a run: ``<run>/train/<name>``, or a compressed one. Raises UserError."""
    folder = Path(student).absolute()
    read_card(folder)
    run = RunFolder.containing(folder)
    if run is None:
        raise UserError(
            f"{student} is not part of a run, so there are no valid rows to compare it on",
            hint="give a folder such as runs/demo/train/step-by-step-gold-s0",
        )
    if (folder / RECORD).is_file():
        record = read_record(folder)
        trained = read_student(run.student(record.student))
        if trained.fingerprint != record.fingerprint:
            raise UserError(
                f"{student} was made of an earlier student named {record.student}",
                hint=f"compress {trained.path} itself: its chains are made anew",
            )
        fingerprint = fingerprint_of(folder) or ""
        return SourceStudent(run, _read_recipe(run), trained, folder, record.chain, fingerprint)
    trained = read_student(folder)
    return SourceStudent(run, _read_recipe(run), trained, folder, (), trained.fingerprint)


def fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of what made a compressed student; None where there is none."""
    try:
        return str(json.loads((folder / WORK).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_recipe(run: RunFolder) -> Recipe:
    recipe = read_recorded(run.manifest("train"))
    if recipe is None:
        raise UserError(
            f"{run.path}/train/manifest.json has no recipe that this version can read",
            hint="run `dsbs train` with its recipe again",
        )
    return recipe
