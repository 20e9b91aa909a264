"""``dsbs ls``: the runs in a folder, how far each stage came, and what came of it. A broken file is told, never fatal."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from dsbs.config.load import read_recorded
from dsbs.errors import UserError
from dsbs.records.results import Comparison, Interval
from dsbs.run_folder import MANIFEST, STAGES, TRAINING_RECORD, RunFolder, training_record
from dsbs.training.grid import grid

Status = Literal["done", "partial", "running", "interrupted", "failed", "broken"]


@dataclass(frozen=True, slots=True)
class Headline:
    """The system that a run is about; ``versus`` is its comparison with ``baseline``, the first there is."""

    system: str
    accuracy: float
    ci95: Interval
    baseline: str | None
    versus: Comparison | None

    def as_json(self) -> dict[str, Any]:
        return {
            "system": self.system,
            "accuracy": self.accuracy,
            "ci95": list(self.ci95),
            "baseline": self.baseline,
            "versus": None if self.versus is None else self.versus.model_dump(mode="json"),
        }


@dataclass(frozen=True, slots=True)
class RunState:
    """One run folder. A stage's status is None where it has not begun; ``planned`` is None where its recipe is not readable.

    ``beside`` counts what stands beside the grid's students: local teachers, compressed and exported students, where there are.
    ``when`` is the newest start or end of a stage (ISO 8601); ``problems`` are sentences about files that cannot be read.
    """

    name: str
    path: Path
    stages: dict[str, Status | None]
    finished: int
    planned: int | None
    beside: dict[str, int]
    when: str | None
    headline: Headline | None
    reportable: bool | None  # None: not evaluated
    problems: list[str]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": _shown(str(self.path)),
            "stages": self.stages,
            "students": {"finished": self.finished, "planned": self.planned},
            "beside": self.beside,
            "when": self.when,
            "headline": None if self.headline is None else self.headline.as_json(),
            "reportable": self.reportable,
            "problems": self.problems,
        }


def list_runs(folder: Path) -> list[RunState]:
    """The runs in a folder by name, or the folder itself where it is one. Raises UserError where there is no such folder."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder",
            hint="give the folder that holds runs; dsbs writes them into runs/",
        )
    if _is_run(folder):
        return [look(folder)]
    return [look(path) for path in sorted(folder.iterdir()) if path.is_dir() and _is_run(path)]


def look(path: Path) -> RunState:
    """The state of one run folder, from its files."""
    run = RunFolder(path)
    problems: list[str] = []
    records = {stage: _manifest(run, stage, problems) for stage in STAGES}
    stages = {stage: _status(run, stage, record) for stage, record in records.items()}
    finished, planned = _students(run, records["train"] or {}, stages["train"])
    times = [
        record[key]
        for record in records.values()
        if record
        for key in ("started", "ended")
        if _is_time(record.get(key))
    ]
    headline, reportable = None, None
    if run.results.exists():
        try:
            results = run.read_results()
            reportable = results.reportable
            system = results.system(results.headline)
            if system is not None:
                baseline, versus = next(iter(system.versus.items()), (None, None))
                headline = Headline(
                    _shown(system.name), system.accuracy, system.ci95, baseline, versus
                )
        except (UserError, OSError) as error:
            problems.append(error.problem if isinstance(error, UserError) else str(error))
    return RunState(
        name=_shown(path.resolve().name),
        path=path,
        stages=stages,
        finished=finished,
        planned=planned,
        beside=_beside(run),
        when=max(times, key=datetime.fromisoformat, default=None),
        headline=headline,
        reportable=reportable,
        problems=[_shown(problem) for problem in problems],
    )


def _is_run(path: Path) -> bool:
    try:
        return any(RunFolder(path).has_manifest(stage) for stage in STAGES)
    except PermissionError:  # another user's folder
        return False


def _manifest(run: RunFolder, stage: str, problems: list[str]) -> dict[str, Any] | None:
    """A stage's manifest; None where there is none, {} (and a problem) where it cannot be read."""
    manifest = run.manifest(stage)
    if manifest:
        return manifest
    try:
        if not run.has_manifest(stage):
            return None
    except PermissionError:
        pass
    problems.append(f"{run.stage(stage) / MANIFEST} cannot be read: run its stage again")
    return {}


def _status(run: RunFolder, stage: str, manifest: dict[str, Any] | None) -> Status | None:
    if manifest is None:
        return None
    status = manifest.get("status")
    if status == "running":
        return "running" if run.is_locked(stage) else "interrupted"
    ended: tuple[Status, ...] = ("done", "partial", "interrupted", "failed")
    return next((known for known in ended if known == status), "broken")


def _students(
    run: RunFolder, manifest: dict[str, Any], status: Status | None
) -> tuple[int, int | None]:
    """The numbers of finished and of planned students of the last training's recipe.

    All finished students, and None, where the recipe cannot be read.
    """
    names = manifest.get("students")
    if status == "done" and isinstance(names, list):
        finished = [(run.student(str(name)) / TRAINING_RECORD).is_file() for name in names]
        return sum(finished), len(names)
    recipe = read_recorded(manifest)
    if recipe is None:
        return len(list(run.stage("train").glob(f"*/{TRAINING_RECORD}"))), None
    specs = grid(recipe.train)
    finished = [
        _settings(run.student(spec.name)) == recipe.training_of(spec.method) for spec in specs
    ]
    return sum(finished), len(specs)


def _beside(run: RunFolder) -> dict[str, int]:
    """Finished models beside the grid's students. Those set aside do not count."""
    counts = {
        "local teachers": len(run.local_teachers()),
        "compressed": len(run.compressed_students()),
        "exported": len(run.exports()),
    }
    return {name: count for name, count in counts.items() if count}


def _settings(student: Path) -> str | None:
    """The hash of the settings that a finished student was trained with; None where it cannot be read."""
    try:
        return str(training_record(student)["student"]["settings"])
    except (UserError, KeyError, TypeError):
        return None


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _shown(text: str) -> str:
    """A name from disk or from a file, without what a terminal would obey or an encoder refuse."""
    return "".join(c if c.isprintable() else "�" for c in text)
