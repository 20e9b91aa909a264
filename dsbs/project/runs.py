"""Runs and recipes on disk: the state of every run, and the recipe that a run was made with."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from dsbs.config.diff import differences, entries
from dsbs.config.load import load_recipe, read_recorded, recorded, resolved_values
from dsbs.errors import UserError
from dsbs.formatting import count, dollars, percent
from dsbs.records.measures import Interval
from dsbs.records.results import Comparison
from dsbs.run_folder import MANIFEST, STAGES, TRAINING_RECORD, RunFolder, training_record
from dsbs.serving.ledger import CascadeState, read_states
from dsbs.training.grid import grid

Status = Literal["done", "partial", "running", "interrupted", "failed", "broken"]


# --- the state of runs (dsbs ls)


@dataclass(frozen=True, slots=True)
class Headline:
    """The headline system of an evaluation; ``versus`` compares it with its first ``baseline``."""

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
    """The state of a run folder."""

    name: str
    path: Path
    stages: dict[str, Status | None]
    """None: the stage has not begun."""
    finished: int
    """Finished students of the last training's recipe."""
    planned: int | None
    """Students of that recipe; None where it cannot be read."""
    other_models: dict[str, int]
    """Other models, if any: local teachers, compressed and exported students."""
    when: str | None
    """The latest start or end of a stage (ISO 8601)."""
    headline: Headline | None
    reportable: bool | None
    """None: not evaluated."""
    problems: list[str]
    """Messages about files that cannot be read."""

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "path": _printable(str(self.path)),
            "stages": self.stages,
            "students": {"finished": self.finished, "planned": self.planned},
            "other_models": self.other_models,
            "when": self.when,
            "headline": None if self.headline is None else self.headline.as_json(),
            "reportable": self.reportable,
            "problems": self.problems,
        }


def list_runs(folder: Path) -> list[RunState]:
    """The runs in a folder by name, or the folder itself if it is a run.

    Raises UserError where the folder does not exist. Unreadable files are reported in the states.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a directory",
            hint="give the folder that contains the runs; dsbs writes them to runs/",
        )
    if _is_run(folder):
        return [run_state(folder)]
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir()]
    return [run_state(path) for path in folders if _is_run(path)]


def run_state(path: Path) -> RunState:
    """The state of a run folder, read from its files."""
    run = RunFolder(path)
    problems: list[str] = []
    manifests = {stage: _manifest(run, stage, problems) for stage in STAGES}
    stages = {stage: _status(run, stage, manifest) for stage, manifest in manifests.items()}
    finished, planned = _students(run, manifests["train"] or {}, stages["train"])
    headline, reportable = _evaluation(run, problems)
    times = [
        manifest[key]
        for manifest in manifests.values()
        if manifest
        for key in ("started", "ended")
        if _is_time(manifest.get(key))
    ]
    return RunState(
        name=_printable(path.resolve().name),
        path=path,
        stages=stages,
        finished=finished,
        planned=planned,
        other_models=_other_models(run),
        when=max(times, key=datetime.fromisoformat, default=None),
        headline=headline,
        reportable=reportable,
        problems=[_printable(problem) for problem in problems],
    )


def _is_run(path: Path) -> bool:
    try:
        return any(RunFolder(path).has_manifest(stage) for stage in STAGES)
    except PermissionError:  # another user's folder
        return False


def _manifest(run: RunFolder, stage: str, problems: list[str]) -> dict[str, Any] | None:
    """A stage's manifest; None if it has none, {} (and a problem) if it cannot be read."""
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
    return next((name for name in ended if name == status), "broken")


def _evaluation(run: RunFolder, problems: list[str]) -> tuple[Headline | None, bool | None]:
    """The headline of the results, and whether they are reportable."""
    if not run.results.exists():
        return None, None
    try:
        results = run.read_results()
    except UserError as error:
        problems.append(error.problem)
        return None, None
    except OSError as error:
        problems.append(str(error))
        return None, None
    system = results.system(results.headline)
    if system is None:
        return None, results.reportable
    baseline, versus = next(iter(system.versus.items()), (None, None))
    name = _printable(system.name)
    return Headline(name, system.accuracy, system.ci95, baseline, versus), results.reportable


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
    finished = [
        _settings(run.student(spec.name)) == student.training_of(spec.method)
        for name, student in recipe.students.items()
        for spec in grid(student.train, name)
    ]
    return sum(finished), len(finished)


def _other_models(run: RunFolder) -> dict[str, int]:
    """The numbers of finished models that are not the recipe's students."""
    counts = {
        "local teachers": len(run.local_teachers()),
        "compressed": len(run.compressed_students()),
        "exported": len(run.exports()),
    }
    return {name: count for name, count in counts.items() if count}


def _settings(student: Path) -> str | None:
    """The hash of a finished student's settings; None where it cannot be read."""
    try:
        return str(training_record(student)["student"]["settings"])
    except (UserError, KeyError, TypeError):
        return None


def _is_time(value: object) -> bool:
    try:
        return isinstance(value, str) and datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        return False


def _printable(text: str) -> str:
    """Text from a file without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "�" for c in text)


# --- recipes in files and runs (dsbs show)


@dataclass(frozen=True, slots=True)
class ResolvedRecipe:
    """A recipe with all its keys, and where it comes from.

    ``remarks`` name stages of the same run that were given another recipe.
    """

    source: str
    recipe: dict[str, Any]
    remarks: tuple[str, ...] = ()
    served: tuple[CascadeState, ...] = ()
    """What servers with the teacher behind a student counted."""

    @property
    def changed(self) -> dict[str, Any]:
        """The default values of the dotted keys that do not have their default."""
        return {entry.key: entry.default for entry in entries(self.recipe) if entry.is_changed}

    def as_yaml(self) -> str:
        """The recipe as YAML, with a comment on every line that is not the default."""
        remarks = (self.source, *self.remarks, *map(_served_remark, self.served))
        header = [" ".join(remark.split()) for remark in remarks]
        lines = [f"# {remark}" for remark in header]
        return "\n".join([*lines, *(entry.as_yaml() for entry in entries(self.recipe))])

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "remarks": list(self.remarks),
            "served": [state.as_json() for state in self.served],
            "recipe": self.recipe,
            "not_default": self.changed,
        }


def resolve_recipe(source: str, overrides: list[str] | None = None) -> ResolvedRecipe:
    """The recipe in a file, or the one that the newest stage of a run folder was given.

    Raises UserError.
    """
    path = Path(source)
    if not path.is_dir():
        return ResolvedRecipe(source, resolved_values(load_recipe(source, overrides or ())))
    if overrides:
        raise UserError(
            f"{source} is a run, and the recipe of a run cannot be changed",
            hint="leave --set out, or give a recipe's file",
        )
    manifests = {stage: RunFolder(path).manifest(stage) for stage in STAGES}
    manifests = {
        stage: manifest
        for stage, manifest in manifests.items()
        if isinstance(manifest.get("recipe"), dict)
    }
    if not manifests:
        raise UserError(
            f"{source} is not a run: none of its stages has a readable {MANIFEST}",
            hint="give runs/<name>",
        )
    newest = max(manifests, key=lambda stage: str(manifests[stage].get("started", "")))
    recipe = recorded(manifests[newest])
    remarks = []
    for stage, manifest in manifests.items():
        keys = differences([recorded(manifest), recipe])
        if keys:
            remarks.append(f"{stage} used another recipe, different in {', '.join(keys)}")
    started = manifests[newest].get("started")
    source = f"{path / newest / MANIFEST}, {started}"
    served = tuple(read_states(RunFolder(path).ledger))
    return ResolvedRecipe(source, recipe, tuple(remarks), served)


def _served_remark(state: CascadeState) -> str:
    """A served student in one line."""
    parts = [f"served: {_printable(state.student)}"]
    if state.coverage is not None:
        parts.append(f"sure of {percent(state.coverage)} of the rows")
    agreement = state.agreement
    if agreement is not None:
        low, high = (percent(bound) for bound in agreement.ci95)
        parts.append(
            f"the teacher agrees with {percent(agreement.value)} ({low} to {high}) of "
            f"{count(state.audited, 'audited answer')}"
        )
    parts.append(f"{dollars(state.usd)} for replies, {dollars(state.usd_today)} today")
    if state.breach is not None:
        parts.append(f"closed: {_printable(state.breach)}")
    return "; ".join(parts)
