"""What the other stages left in a run folder, for its pages, figures and cards."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs.errors import UserError
from dsbs.files import read_jsonl
from dsbs.records.compression import Compressed, read_compressed
from dsbs.records.results import Results, SystemResult, read_results
from dsbs.records.rows import Prediction
from dsbs.run_folder import annotation_file, read_annotations, read_manifest


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder's records. ``recipe`` is the resolved one that ``results`` were found with.

    ``name`` is the recipe's, or what tells the run from others of that name beside it.
    """

    path: Path
    name: str
    results: Results
    recipe: dict[str, Any]
    annotated: dict[str, Any]  # annotate/manifest.json; {} where there is none
    trained: dict[str, Any]  # train/manifest.json
    evaluated: dict[str, Any]  # eval/manifest.json
    students: dict[
        str, dict[str, Any]
    ]  # name -> train.json of the students that the results speak of
    compressed: list[
        Compressed
    ]  # what `dsbs compress` made of the students that are there, by student and chain
    outdated: int = 0  # records of compressed students whose student was trained anew since

    def members(self, system: SystemResult) -> list[str]:
        """The prediction files' names of a system: one for each seed."""
        return [f"{system.name}-s{seed}" for seed in system.seeds] or [system.name]

    def predictions(self, member: str) -> dict[str, dict[str, Any]]:
        """A prediction file by id; {} where a later evaluation has set it aside."""
        path = self.path / "eval" / "predictions" / f"{member}.jsonl"
        found: dict[str, dict[str, Any]] = {}
        for number, row in read_jsonl(path) if path.is_file() else ():
            try:
                found[str(row["id"])] = Prediction.model_validate(row).model_dump(mode="json")
            except (KeyError, ValidationError):
                raise UserError(
                    f"{path}:{number}: not a prediction", hint="run `dsbs eval` again"
                ) from None
        return found

    def inputs(self) -> dict[str, dict[str, Any]]:
        """The split's rows by id as the teacher was asked about them, for prediction files that do not hold them; {} else."""
        file = annotation_file(self.path, self.results.split)
        return {row.id: row.input for row in read_annotations(file)} if file.is_file() else {}

    def metrics(self, student: str) -> Iterator[dict[str, Any]]:
        """The lines of a student's ``metrics.jsonl``."""
        path = self.path / "train" / student / "metrics.jsonl"
        if path.is_file():
            for _, row in read_jsonl(path):
                yield row


def gather(path: Path) -> Run:
    """Read a run folder. Raises UserError where it has not been evaluated, or a record cannot be read."""
    results = read_results(path)
    evaluated = read_manifest(path / "eval")
    students = {}
    for system in results.systems:
        for name in (f"{system.name}-s{seed}" for seed in system.seeds):
            record = path / "train" / name / "train.json"
            try:
                students[name] = json.loads(record.read_text(encoding="utf-8"))
            except FileNotFoundError:
                continue  # moved away since: its predictions are enough
            except ValueError:
                raise UserError(f"{record} is not JSON", hint="train that student again") from None
    compressed = read_compressed(path)
    of_today = [one for one in compressed if _is_of_today(path, one)]
    return Run(
        path=path,
        name=results.name,
        results=results,
        recipe=results.recipe or evaluated.get("recipe", {}),
        annotated=read_manifest(path / "annotate"),
        trained=read_manifest(path / "train"),
        evaluated=evaluated,
        students=students,
        compressed=of_today,
        outdated=len(compressed) - len(of_today),
    )


def _is_of_today(path: Path, one: Compressed) -> bool:
    """Whether it was made of the weights that bear its student's name now. Where those are gone, it is all there is of them."""
    record = path / "train" / one.student / "train.json"
    try:
        fingerprint = json.loads(record.read_text(encoding="utf-8"))["student"]["fingerprint"]
    except OSError:
        return True
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{record} is not a student's record", hint="train that student again"
        ) from None
    return bool(fingerprint == one.fingerprint)
