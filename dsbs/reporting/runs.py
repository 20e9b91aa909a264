"""Evaluated runs: the records of a run folder that reports, figures and model cards read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs.config import TaskSection
from dsbs.config.diff import MISSING, differences, inline_yaml
from dsbs.config.load import recorded
from dsbs.errors import UserError
from dsbs.files import read_jsonl
from dsbs.formatting import ABSENT
from dsbs.records import Prediction
from dsbs.records.results import Compressed, Results, SystemResult
from dsbs.records.subsets import Subset, subset_rank
from dsbs.run_folder import (
    TRAINING_RECORD,
    RunFolder,
    read_annotations,
    read_student,
    training_record,
)
from dsbs.tasks import Task, make_task


@dataclass(frozen=True, slots=True)
class EvaluatedRun:
    """The records of a run folder."""

    folder: RunFolder
    name: str
    """The recipe's name, or what tells the run from others of that name on the same page."""
    results: Results
    recipe: dict[str, Any]
    """The resolved recipe of the evaluation."""
    manifests: dict[str, dict[str, Any]]
    """``manifest.json`` of annotate, train and eval; {} for a stage without one."""
    students: dict[str, dict[str, Any]]
    """``train.json`` by student, for the students in the results."""
    compressed: list[Compressed]
    """Compressed students whose original is unchanged, by student and chain."""
    outdated: int = 0
    """The number of compressed students whose original was retrained since."""

    def members(self, system: SystemResult) -> list[str]:
        """The names of a system's prediction files: one for each seed."""
        return [f"{system.name}-s{seed}" for seed in system.seeds] or [system.name]

    def predictions(self, member: str) -> dict[str, Prediction]:
        """A prediction file by row id; {} where a later evaluation has moved it away."""
        path = self.folder.predictions(member)
        if not path.is_file():
            return {}
        predictions = {}
        for number, row in read_jsonl(path):
            try:
                predictions[str(row["id"])] = Prediction.model_validate(row)
            except (KeyError, ValidationError):
                raise UserError(
                    f"{path}:{number}: not a prediction", hint="run `dsbs eval` again"
                ) from None
        return predictions

    @property
    def task(self) -> Task | None:
        """None where the recipe of the results cannot be read any more."""
        try:
            return make_task(TaskSection.model_validate(self.recipe.get("task")))
        except ValidationError:
            return None

    def inputs(self) -> dict[str, dict[str, Any]]:
        """The annotated rows' inputs by id, for prediction files without inputs; {} if absent."""
        path = self.folder.annotations(self.results.split)
        if not path.is_file():
            return {}
        return {row.id: row.input for row in read_annotations(path)}

    def metrics(self, student: str) -> Iterator[dict[str, Any]]:
        """The lines of a student's ``metrics.jsonl``."""
        path = self.folder.student(student) / "metrics.jsonl"
        if path.is_file():
            for _, row in read_jsonl(path):
                yield row


def load_run(path: Path) -> EvaluatedRun:
    """Read a run folder. Raises UserError if it was not evaluated or a record is unreadable."""
    folder = RunFolder(path)
    results = folder.read_results()
    manifests = {stage: folder.manifest(stage) for stage in ("annotate", "train", "eval")}
    names = [f"{system.name}-s{seed}" for system in results.systems for seed in system.seeds]
    students = {  # one that was moved away is left out: its predictions are enough
        name: training_record(folder.student(name)) for name in names if _is_trained(folder, name)
    }
    compressed = folder.read_compressed()
    current = [record for record in compressed if _is_current(folder, record)]
    return EvaluatedRun(
        folder=folder,
        name=results.name,
        results=results,
        recipe=results.recipe or manifests["eval"].get("recipe", {}),
        manifests=manifests,
        students=students,
        compressed=current,
        outdated=len(compressed) - len(current),
    )


def load_runs(paths: Sequence[Path]) -> list[EvaluatedRun]:
    """Read several run folders and give each a distinct name.

    Raises UserError as ``load_run`` does, and for a folder that is named twice.
    """
    for path, times in Counter(path.resolve() for path in paths).items():
        if times > 1:
            raise UserError(f"the run {path} is given {times} times", hint="name each run once")
    runs = [load_run(path) for path in paths]
    return [replace(run, name=title) for run, title in zip(runs, run_titles(runs), strict=True)]


def _is_trained(folder: RunFolder, student: str) -> bool:
    return (folder.student(student) / TRAINING_RECORD).is_file()


def _is_current(folder: RunFolder, compressed: Compressed) -> bool:
    """Whether its original still has the weights it was made from, or is gone."""
    if not _is_trained(folder, compressed.student):
        return True
    fingerprint = read_student(folder.student(compressed.student)).fingerprint
    return fingerprint == compressed.fingerprint


# --- names


def run_titles(runs: Sequence[EvaluatedRun]) -> list[str]:
    """A distinct name for each run: the recipe's, or as much of the folder's path as it takes."""
    titles = [run.name for run in runs]
    paths = [run.folder.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, paths), default=0) + 1):
        counts = Counter(titles)
        if len(counts) == len(runs):
            break
        for number, title in enumerate(titles):
            if counts[title] > 1:
                titles[number] = "/".join(paths[number][-depth:])
    return titles


def name_among(run: EvaluatedRun, runs: Sequence[EvaluatedRun]) -> str | None:
    """The run's name on a page of several runs; None on the page of a single run."""
    if len(runs) == 1:
        return None
    return run.name


def prefixed(sentence: str, run: EvaluatedRun, runs: Sequence[EvaluatedRun]) -> str:
    """The sentence with its run's name, where the page has several runs."""
    return ": ".join(filter(None, [name_among(run, runs), sentence]))


def series_title(system: SystemResult) -> str:
    """The name that a method's students, or a floor, have at every subset of the rows; other
    systems keep their name. That of one of several students begins with its name.
    """
    return ": ".join(filter(None, [system.student, method_title(system)]))


def method_title(system: SystemResult) -> str:
    """The name of a series without the student's."""
    if system.floor is not None:
        return system.floor
    if system.method is None:
        return system.name
    return f"{system.method}, {system.labels} labels"


def student_names(runs: Sequence[EvaluatedRun]) -> list[str]:
    """The names of students, where the runs have several in a recipe; in order, each once."""
    names = [
        system.student
        for run in runs
        for system in run.results.systems
        if system.kind == "student" and system.student is not None
    ]
    return list(dict.fromkeys(names))


def student_groups(
    run: EvaluatedRun, runs: Sequence[EvaluatedRun]
) -> list[tuple[str | None, list[SystemResult]]]:
    """The run's systems by student, with titles: first the named students, then all others. A run
    of a single student is one group.
    """
    name = name_among(run, runs)
    students = student_names([run])
    if not students:
        return [(name, run.results.systems)]
    groups = {
        student: [s for s in run.results.systems if s.student == student] for student in students
    }
    unnamed = [system for system in run.results.systems if system.student not in students]
    titled = [(f"student {student}", systems) for student, systems in groups.items()]
    if unnamed:
        titled.append(("other systems", unnamed))
    return [(prefixed(title, run, runs), systems) for title, systems in titled]


def full_data_systems(systems: Sequence[SystemResult]) -> list[SystemResult]:
    """The teacher, external systems, and each method's students, and floors, of the largest
    subset of rows.
    """
    largest: dict[str, Subset] = {}
    for system in systems:
        if system.subset is not None:
            title = series_title(system)
            largest[title] = max(system.subset, largest.get(title, system.subset), key=subset_rank)
    return [
        system
        for system in systems
        if system.subset is None or system.subset == largest[series_title(system)]
    ]


# --- several runs


def recipe_differences(runs: Sequence[EvaluatedRun]) -> list[tuple[str, list[str]]]:
    """The dotted recipe keys whose values differ, with each run's value. ``name`` is left out."""
    differing = differences([recorded({"recipe": run.recipe}) for run in runs])
    differing.pop("name", None)
    return [
        (key, [ABSENT if value is MISSING else inline_yaml(value) for value in values])
        for key, values in differing.items()
    ]


def have_same_rows(runs: Sequence[EvaluatedRun]) -> bool:
    """Whether all runs were evaluated on the same rows, by the data's hash."""
    hashes = {run.results.data.get(run.results.split) for run in runs}
    return len(hashes) == 1 and None not in hashes
