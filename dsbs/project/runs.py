"""``dsbs ls``: the runs in a folder, how far each stage came, and what came of it. A broken file is told, never fatal."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from dsbs.config.load import read_recorded
from dsbs.errors import UserError
from dsbs.files import is_locked
from dsbs.records.results import Comparison, Interval, read_results
from dsbs.run_folder import STAGES
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
    problems: list[str] = []
    records = {stage: _record(path / stage / "manifest.json", problems) for stage in STAGES}
    stages = {stage: _status(path / stage, record) for stage, record in records.items()}
    finished, planned = _students(path, records["train"] or {}, stages["train"])
    times = [
        record[key]
        for record in records.values()
        if record
        for key in ("started", "ended")
        if _is_time(record.get(key))
    ]
    headline, reportable = None, None
    if (path / "eval" / "results.json").exists():
        try:
            results = read_results(path)
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
        beside=_beside(path),
        when=max(times, key=datetime.fromisoformat, default=None),
        headline=headline,
        reportable=reportable,
        problems=[_shown(problem) for problem in problems],
    )


def _is_run(path: Path) -> bool:
    try:
        return any((path / stage / "manifest.json").exists() for stage in STAGES)
    except PermissionError:  # somebody else's
        return False


def _record(path: Path, problems: list[str]) -> dict[str, Any] | None:
    """A manifest; None where there is none, {} (and a problem) where it cannot be read."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        problems.append(f"{path} cannot be read: run its stage again")
        return {}
    return record


def _status(stage: Path, record: dict[str, Any] | None) -> Status | None:
    if record is None:
        return None
    said = record.get("status")
    if said == "running":
        return "running" if is_locked(stage) else "interrupted"
    known: tuple[Status, ...] = ("done", "partial", "interrupted", "failed")
    return next((status for status in known if status == said), "broken")


def _students(path: Path, record: dict[str, Any], status: Status | None) -> tuple[int, int | None]:
    """How many students of the last training's recipe are finished, and how many it has; all there are where it cannot be
    read.
    """
    names = record.get("students")
    if status == "done" and isinstance(names, list):
        return sum((path / "train" / str(name) / "train.json").is_file() for name in names), len(
            names
        )
    recipe = read_recorded(record)
    if recipe is None:
        return len(list((path / "train").glob("*/train.json"))), None
    cells = grid(recipe.train)
    return sum(
        _settings(path / "train" / cell.name / "train.json") == recipe.training_of(cell.method)
        for cell in cells
    ), len(cells)


def _beside(path: Path) -> dict[str, int]:
    """By the records alone, which are written last. What was set aside, or is half-written, does not count."""
    patterns = {
        "local teachers": ("train/teachers/*/train.json",),
        "compressed": ("compress/*/*/compress.json",),
        "exported": ("train/*/export/[!.]*/export.json", "compress/*/*/export/[!.]*/export.json"),
    }
    counts = {
        name: sum(len(list(path.glob(pattern))) for pattern in some)
        for name, some in patterns.items()
    }
    return {name: count for name, count in counts.items() if count}


def _settings(record: Path) -> str | None:
    """The settings that a finished student was trained with."""
    try:
        return str(json.loads(record.read_text(encoding="utf-8"))["student"]["settings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _shown(text: str) -> str:
    """A name from disk or from a file, without what a terminal would obey or an encoder refuse."""
    return "".join(c if c.isprintable() else "�" for c in text)
