"""Run folder: the paths, records, manifests and locks of one run, and its files that are set aside.

A run is the folder ``runs/<name>/``. Only this module knows where a stage's files are in it:

    annotate/<split>.jsonl  annotate/replies.sqlite  annotate/next.json  shards/<i>-of-<n>/
    review/<split>.jsonl  review/<split>-signs.json
    train/<student>/train.json  train/teachers/<name>/
    eval/predictions/<system>.jsonl  eval/results.json
    serve/ledger.sqlite  serve/rows.jsonl
    compress/<student>/<chain>/  report/  report.html
    <stage>/manifest.json  <stage>/.lock  …/aside/
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs.config import MemberSection, Recipe
from dsbs.errors import PartialError, UserError
from dsbs.files import (
    canonical_json,
    expand_user,
    is_locked,
    lock_folder,
    make_folder,
    move,
    now,
    read_jsonl,
    versions,
    write_json,
)
from dsbs.formatting import count
from dsbs.records import Annotation, Example, NextRounds, TrainedStudent
from dsbs.records.results import (
    COMPRESSION_RECORD,
    Compressed,
    Results,
    read_compression_record,
    read_results,
)
from dsbs.records.reviews import Review, read_reviews, write_reviews

STAGES = ("annotate", "train", "eval")
MANIFEST = "manifest.json"
TRAINING_RECORD = "train.json"


class RunFolder:
    """One run on disk. Nothing is created before something is written.

    A ``stage`` is a folder of the run by its relative path: "annotate", "train", "eval",
    "compress/<student>".
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __repr__(self) -> str:
        return f"RunFolder({str(self.path)!r})"

    @classmethod
    def of(cls, recipe: Recipe, out: str | Path | None = None) -> RunFolder:
        """The run of a recipe: ``out``, or ``runs/<name>`` where that is None. Raises UserError for
        a file.
        """
        folder = Path("runs") / recipe.name if out is None else Path(out)
        if folder.is_file():
            raise UserError(f"{folder} is a file, and a run is a folder", hint="give another --out")
        return cls(folder)

    @classmethod
    def of_member(cls, recipe: Recipe, member: MemberSection) -> RunFolder:
        """The run of an ensemble's member, from here or beside the recipe's file. It need not
        exist.
        """
        path = expand_user(member.run)
        folder = (recipe.folder or Path()) / path
        if not path.is_dir() and folder.is_dir():
            return cls(folder)
        return cls(path)

    @classmethod
    def containing(cls, student: Path) -> RunFolder | None:
        """The run that contains a student's folder; None for a student outside any run."""
        parents = student.absolute().parents
        names = [folder.name for folder in parents]
        if names[:1] == ["train"]:
            return cls(parents[1])
        if names[:2] == ["teachers", "train"] or names[1:2] == ["compress"]:
            return cls(parents[2])
        return None

    def stage(self, name: str) -> Path:
        """The folder of a stage."""
        return self.path / name

    # --- annotate

    @property
    def replies(self) -> Path:
        """The store of every reply that the teacher was paid for."""
        return self.path / "annotate" / "replies.sqlite"

    def annotations(self, split: str) -> Path:
        """The annotation file of a split."""
        return self.path / "annotate" / f"{split}.jsonl"

    def load_annotations(self, split: str, source: str) -> dict[str, Annotation]:
        """The split's annotations by id.

        ``source`` is the recipe's ``source_fingerprint``. Raises UserError where the annotations
        are missing, unfinished, or come from another teacher, prompt or sampling.
        """
        path = self.annotations(split)
        hint = f"run `dsbs annotate` with this recipe first (annotate.splits must name {split})"
        if not path.is_file():
            raise UserError(f"{path} does not exist", hint=hint)
        manifest = self.manifest("annotate")
        if manifest.get("status") not in ("done", "partial"):
            status = manifest.get("status", "no manifest")
            raise UserError(
                f"the annotation in {path.parent} is not finished ({status})", hint=hint
            )
        if manifest.get("source") != source:
            raise UserError(
                f"{path} comes from another teacher, prompt or sampling than this recipe's",
                hint=hint,
            )
        return {row.id: row for row in read_annotations(path)}

    def check_inputs(
        self, annotations: Mapping[str, Annotation], rows: Iterable[Example], split: str
    ) -> None:
        """Raises UserError where rows have the id of an annotation and another input than it."""
        changed_ids = [
            row.id
            for row in rows
            if row.id in annotations
            and canonical_json(row.input) != canonical_json(annotations[row.id].input)
        ]
        if changed_ids:
            raise UserError(
                f"{count(len(changed_ids), f'{split} row')} (first: {changed_ids[0]}) "
                f"{'has' if len(changed_ids) == 1 else 'have'} another input than when "
                f"{self.annotations(split)} was made",
                hint="the data has changed: run `dsbs annotate` again, which keeps the replies to "
                "all other rows",
            )

    def next_rounds(self) -> NextRounds:
        """The rounds of ``annotate --next``. Raises UserError where they cannot be read."""
        path = self._next_rounds_file
        try:
            return NextRounds.model_validate_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return NextRounds()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} cannot be read ({type(error).__name__}): it says which train rows "
                "`dsbs annotate --next` chose",
                hint="restore it, or move it away to annotate all train rows",
            ) from None

    def write_next_rounds(self, rounds: NextRounds) -> None:
        write_json(self._next_rounds_file, rounds.model_dump(mode="json", by_alias=True))

    @property
    def _next_rounds_file(self) -> Path:
        return self.path / "annotate" / "next.json"

    def reviews(self, split: str) -> Path:
        """People's decisions on the annotations of a split: see ``dsbs.records.reviews``."""
        return self.path / "review" / f"{split}.jsonl"

    def review_signs(self, split: str) -> Path:
        """Signs of mistakes that take long to find, kept for the next time."""
        return self.path / "review" / f"{split}-signs.json"

    def read_reviews(self, split: str) -> dict[str, list[Review]]:
        """The decisions on the split's rows by id. Raises UserError for a line that is none."""
        return read_reviews(self.reviews(split))

    def shard(self, name: str) -> RunFolder:
        """The run folder of a shard, by its name ("2-of-8")."""
        return RunFolder(self.path / "shards" / name)

    def shards(self) -> list[RunFolder]:
        """The run folders of all shards, by name."""
        return [RunFolder(path) for path in sorted((self.path / "shards").glob("*-of-*"))]

    # --- train and compress

    def student(self, name: str) -> Path:
        """The folder of a student."""
        return self.path / "train" / name

    def students(self) -> list[TrainedStudent]:
        """Every finished student, by name. Raises UserError for a record that cannot be read."""
        records = sorted(self.stage("train").glob(f"*/{TRAINING_RECORD}"))
        students = [(record.parent.name, read_student(record.parent)) for record in records]
        return [student for folder, student in students if student.name == folder]  # no copies

    def trained_at(self, student: TrainedStudent) -> float:
        """When a student of the run was trained, in seconds since 1970."""
        return (self.student(student.name) / TRAINING_RECORD).stat().st_mtime

    def local_teachers(self) -> list[Path]:
        """The folders of the finished local teachers that the run trained itself."""
        records = self.path.glob(f"train/teachers/*/{TRAINING_RECORD}")
        return sorted(record.parent for record in records)

    def compressed(self, student: str) -> Path:
        """The folder that holds the compressed students made of ``student``."""
        return self.path / "compress" / student

    def read_compressed(self) -> list[Compressed]:
        """Every compressed student, by student and chain. Raises UserError for a record that cannot
        be read.
        """
        return [read_compression_record(folder) for folder in self.compressed_students()]

    def compressed_students(self) -> list[Path]:
        """The folders of the finished compressed students, by student and chain."""
        records = self.path.glob(f"compress/*/*/{COMPRESSION_RECORD}")
        return sorted(record.parent for record in records)

    def exports(self) -> list[Path]:
        """The folders of the finished exports of students and compressed students."""
        records = [
            *self.path.glob("train/*/export/[!.]*/export.json"),
            *self.path.glob("compress/*/*/export/[!.]*/export.json"),
        ]
        return sorted(record.parent for record in records)

    # --- eval and report

    def predictions(self, system: str) -> Path:
        """The prediction file of a system: a student's name, "teacher", or an external system's
        name.
        """
        return self.path / "eval" / "predictions" / f"{system}.jsonl"

    @property
    def results(self) -> Path:
        """The results of the evaluation."""
        return self.path / "eval" / "results.json"

    def read_results(self) -> Results:
        """The results of the evaluation. Raises UserError where there are none, or they cannot be
        read.
        """
        return read_results(self.results)

    @property
    def ledger(self) -> Path:
        """Counts, audits and spending of ``dsbs serve --fallback``."""
        return self.path / "serve" / "ledger.sqlite"

    @property
    def served_rows(self) -> Path:
        """The rows that such a server asked the teacher, as input rows."""
        return self.path / "serve" / "rows.jsonl"

    @property
    def report(self) -> Path:
        """The folder of the report's tables and figures; the page is ``report.html`` in the run."""
        return self.path / "report"

    # --- manifests and locks

    def manifest(self, stage: str) -> dict[str, Any]:
        """A stage's manifest, or {} where there is none that can be read."""
        try:
            manifest = json.loads(self._manifest_file(stage).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(manifest, dict):
            return {}
        return manifest

    def has_manifest(self, stage: str) -> bool:
        """Whether a stage has begun. Raises PermissionError for a folder that may not be read."""
        return self._manifest_file(stage).exists()

    @contextmanager
    def record(
        self, stage: str, recipe: Recipe | Mapping[str, Any], data: Mapping[str, str]
    ) -> Iterator[dict[str, Any]]:
        """Write a stage's manifest as it starts and as it ends: recipe, versions, data hashes,
        times, status.

        ``data`` maps a split to the hash of its rows. What the body adds to the yielded dict is
        written too. The status is "done" unless the body sets another one; "interrupted", "partial"
        or "failed" where it raises.
        """
        if isinstance(recipe, Recipe):
            recipe = recipe.model_dump(mode="json")
        path = self._manifest_file(stage)
        manifest: dict[str, Any] = {
            "status": "running",
            "started": now(),
            "ended": None,
            "recipe": dict(recipe),
            "data": dict(data),
            "versions": versions(),
        }
        write_json(path, manifest)
        try:
            yield manifest
        except BaseException as error:
            with suppress(PartialError):  # the disk may be full; the body's message says so better
                write_json(path, manifest | {"status": _status_after(error), "ended": now()})
            raise
        if manifest["status"] == "running":
            manifest["status"] = "done"
        write_json(path, manifest | {"ended": now()})

    def lock(self, stage: str) -> AbstractContextManager[None]:
        """Hold a stage for this process. Raises DsbsError naming the process that holds it."""
        return lock_folder(self.stage(stage))

    def is_locked(self, stage: str) -> bool:
        """Whether a process holds a stage. A manifest alone does not know that its process was
        killed.
        """
        return is_locked(self.stage(stage))

    def _manifest_file(self, stage: str) -> Path:
        return self.stage(stage) / MANIFEST

    # --- set aside and taken back

    @staticmethod
    def set_aside(path: Path, mark: str | None) -> None:
        """Move a file or folder that no longer fits to ``aside/`` beside it, under the mark of what
        it was made by.

        ``mark`` is its fingerprint (None: unknown). Nothing is overwritten.
        """
        names = _aside_names(path, mark or "unknown")
        target = next(name for name in names if not name.exists())
        make_folder(target.parent)
        move(path, target)

    @staticmethod
    def restore(path: Path, mark: str, mark_of: Callable[[Path], str | None]) -> bool:
        """Move what was set aside under ``mark`` back to ``path``, which must not exist. Returns
        whether there was any.

        ``mark_of`` reads the mark of a file or folder; names hold only the beginning of a mark.
        """
        for candidate in _aside_names(path, mark):
            if not candidate.exists():
                return False
            if mark_of(candidate) == mark:
                move(candidate, path)
                return True
        return False


def read_annotations(path: Path) -> Iterator[Annotation]:
    """The rows of an annotation file. Raises UserError with file and line."""
    for number, row in read_jsonl(path):
        try:
            yield Annotation.model_validate(row)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{path}:{number}: not an annotation ({field}: {first['msg']})",
                hint="run `dsbs annotate` again: it rebuilds the file from the stored replies",
            ) from None


def append_review(folder: RunFolder, split: str, review: Review) -> None:
    """Save a decision, and return once it is on the disk. Raises DsbsError where it cannot be."""
    write_reviews(folder.reviews(split), [review])


def training_record(folder: Path) -> dict[str, Any]:
    """The record that training wrote into a student's folder. Raises UserError where there is none
    that can be read.
    """
    path = folder / TRAINING_RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: the student is not trained, or not part of a run",
            hint="give a folder such as runs/tickets/train/step-by-step-gold-s0",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _not_a_record(path, error) from None
    if not isinstance(record, dict):
        raise _not_a_record(path, TypeError(type(record).__name__))
    return record


def read_student(folder: Path) -> TrainedStudent:
    """A finished student by its training record; its path is ``folder``, as a run may have moved.
    Raises UserError.
    """
    record = training_record(folder)
    try:
        return TrainedStudent.model_validate(record["student"] | {"path": str(folder)})
    except (KeyError, TypeError, ValueError) as error:
        raise _not_a_record(folder / TRAINING_RECORD, error) from None


def _not_a_record(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} is not a training record ({error!r})", hint="train that student again"
    )


def _status_after(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, PartialError):
        return "partial"
    return "failed"


def _aside_names(path: Path, mark: str) -> Iterator[Path]:
    """The names under which ``path`` is set aside, in the order in which they are used."""
    suffix = ".jsonl" if path.name.endswith(".jsonl") else ""
    name = f"{path.name.removesuffix(suffix)}-{mark[:12]}"
    while True:
        yield path.parent / "aside" / f"{name}{suffix}"
        name += "+"
