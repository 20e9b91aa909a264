"""Where a chain begins: a run's student, what its run records of its training, and the steps that it has behind it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from dsbs.config import Recipe
from dsbs.config.load import read_recorded
from dsbs.errors import UserError
from dsbs.records.compression import RECORD, read_record
from dsbs.records.rows import TrainedStudent
from dsbs.run_folder import read_manifest
from dsbs.students import read_card

WORK = "work.json"  # with the fingerprint of all that made a compressed student
_HINT = "give a folder such as runs/demo/train/step-by-step-gold-s0"


@dataclass(frozen=True, slots=True)
class SourceStudent:
    """``student`` is the trained one, ``start`` the folder that the next step begins with, ``chain`` the steps up to it."""

    run: Path
    recipe: Recipe
    student: TrainedStudent
    start: Path
    chain: tuple[str, ...]
    fingerprint: str  # of what lies in ``start``

    @property
    def folder(self) -> Path:
        return self.run / "compress" / self.student.name


def find_origin(student: str | Path) -> SourceStudent:
    """Of a folder ``<run>/train/<name>``, or of a compressed one of a run. Raises UserError for any other."""
    folder = Path(student).absolute()
    read_card(folder)
    if (folder / RECORD).is_file():
        run = folder.parents[2]
        record = read_record(folder)
        trained = _trained(run / "train" / record.student)
        if trained.fingerprint != record.fingerprint:
            raise UserError(
                f"{student} was made of an earlier student of the name {record.student}",
                hint=f"compress {trained.path} itself: its chains are made anew",
            )
        return SourceStudent(
            run, _recipe(run), trained, folder, record.chain, fingerprint_of(folder) or ""
        )
    if folder.parent.name != "train":
        raise UserError(
            f"{student} lies in no run, so there are no rows of valid to hold it against",
            hint=_HINT,
        )
    trained = _trained(folder)
    return SourceStudent(
        folder.parents[1], _recipe(folder.parents[1]), trained, folder, (), trained.fingerprint
    )


def fingerprint_of(folder: Path) -> str | None:
    """What a compressed student's folder says that it was made by; None where there is none."""
    try:
        return str(json.loads((folder / WORK).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _trained(folder: Path) -> TrainedStudent:
    path = folder / "train.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["student"]
        return TrainedStudent.model_validate(said | {"path": str(folder)})  # the run may have moved
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: that student is not trained, or not in a run", hint=_HINT
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a training record ({error!r})", hint="train that student again"
        ) from None


def _recipe(run: Path) -> Recipe:
    found = read_recorded(read_manifest(run / "train"))
    if found is None:
        raise UserError(
            f"{run}/train/manifest.json has no recipe that this version can read",
            hint="run `dsbs train` with its recipe again",
        )
    return found
