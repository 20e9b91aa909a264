"""Tables of the report page, as plain data. The templates decide how they look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsbs.config.registry import METRICS, entry
from dsbs.formatting import (
    ABSENT,
    dollars,
    duration,
    integer,
    interval,
    listing,
    milliseconds_number,
    parameter_count,
    percent,
    percent_number,
    setting_text,
)
from dsbs.records.measures import Interval, Measure
from dsbs.records.results import SystemResult
from dsbs.reporting.runs import EvaluatedRun, name_among, student_groups, student_names

_AXIS_STEP = 0.1  # an axis of accuracies ends at multiples of this


@dataclass(frozen=True, slots=True)
class IntervalBar:
    """A value with its interval and a reference line, in percent of the axis' length."""

    low: float
    high: float
    value: float
    reference: float | None
    tone: str = ""
    """``better``, ``worse``, or nothing for an unreliable difference."""


@dataclass(frozen=True, slots=True)
class BarAxis:
    """The range of a column of bars, as fractions."""

    low: float
    high: float

    @property
    def ends(self) -> tuple[str, str]:
        return f"{100 * self.low:.0f}".replace("-", "−"), f"{100 * self.high:.0f}"

    def bar(
        self, ci95: Interval, value: float, reference: float | None, tone: str = ""
    ) -> IntervalBar:
        mark = None if reference is None else self._position(reference)
        low, high = map(self._position, ci95)
        return IntervalBar(low, high, self._position(value), mark, tone)

    def _position(self, value: float) -> float:
        position = 100 * (value - self.low) / (self.high - self.low)
        return round(min(100.0, max(0.0, position)), 2)


@dataclass(frozen=True, slots=True)
class TableRow:
    """A row: its heading, its cells, and a bar in tables that have them."""

    heading: str
    cells: list[str]
    strong: bool = False
    bar: IntervalBar | None = None


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The rows of one run. ``title`` is None on the page of a single run."""

    title: str | None
    rows: list[TableRow]


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, its cell for an item (None: absent), and a note below the table."""

    heading: str
    cell: Callable[[Any], str | None]
    note: str = ""
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table: the columns after the row headings, and the rows by run."""

    columns: list[Column]
    groups: list[RowGroup]
    axis: BarAxis | None = None

    @property
    def headings(self) -> list[str]:
        return [column.heading for column in self.columns]

    @property
    def notes(self) -> dict[str, str]:
        """Each note with the first heading that has it."""
        headings: dict[str, str] = {}
        for column in self.columns:
            if column.note:
                headings.setdefault(column.note, column.heading)
        return {heading: note for note, heading in headings.items()}


# --- tables of systems


def accuracy_table(runs: Sequence[EvaluatedRun]) -> Table:
    """All systems: accuracy with its interval, and the metrics that are means over rows."""
    systems = [system for run in runs for system in run.results.systems]
    low = min(system.ci95[0] for system in systems)
    high = max(system.ci95[1] for system in systems)
    axis = BarAxis(
        math.floor(low / _AXIS_STEP + 1e-9) * _AXIS_STEP,
        math.ceil(high / _AXIS_STEP - 1e-9) * _AXIS_STEP,
    )
    methods = " or ".join(dict.fromkeys(system.interval for system in systems))
    columns = [
        Column("accuracy,\u00a0%", lambda system: percent_number(system.accuracy)),
        Column(
            "95% CI", lambda system: interval(system.ci95), note=f"confidence interval, {methods}"
        ),
        Column("seeds", lambda system: str(len(system.seeds) or ABSENT)),
        Column(
            "unreadable,\u00a0%",
            lambda system: percent_number(system.unreadable),
            note="outputs without a label of the task; they count as wrong",
        ),
    ]
    if student_names(runs):
        columns += _size_and_time()
    columns += [_metric_column(name) for name in _metric_names(systems, rationale=False)]
    groups = []
    for run in runs:
        for title, members in student_groups(run, runs):
            baseline = _baseline_among(run, members)
            reference = None if baseline is None else baseline.accuracy
            rows = [
                TableRow(
                    system.name,
                    cells(columns, system),
                    strong=system.name == run.results.headline,
                    bar=axis.bar(system.ci95, system.accuracy, reference),
                )
                for system in members
            ]
            groups.append(RowGroup(title, rows))
    return Table(columns, groups, axis)


def _baseline_among(run: EvaluatedRun, systems: Sequence[SystemResult]) -> SystemResult | None:
    """The baseline of a student's systems, or of the run."""
    names = [name for system in systems for name in system.versus]
    baselines = [system for system in systems if system.student and system.name in names]
    return next(iter(baselines), run.results.system(run.results.baseline))


def _size_and_time() -> list[Column]:
    """What students of several sizes are chosen by, beside accuracy."""
    return [
        Column("parameters", lambda system: optional(parameter_count, system.parameters)),
        Column(
            "ms, batch 1",
            lambda system: next(
                (milliseconds_number(x.p50_ms) for x in system.latency if x.batch_size == 1), None
            ),
            note="median wall time of a call with one row, label only",
        ),
    ]


def cost_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """The size, speed and price of each system. None if nothing was measured."""
    columns = [
        Column("parameters", lambda system: optional(parameter_count, system.parameters)),
        Column("MB on disk", lambda system: optional("{:,.1f}".format, system.megabytes)),
        Column(
            "ms per example",
            lambda system: optional(milliseconds_number, system.ms_per_example),
            note="median over rows, at the evaluation's batch size",
        ),
    ]
    sizes = {
        latency.batch_size
        for run in runs
        for system in run.results.systems
        for latency in system.latency
    }
    note = "median and 95th percentile of the wall time of a call, label only"
    columns += [
        Column(f"p50 / p95 ms, batch {size}", _latency_cell(size), note=note)
        for size in sorted(sizes)
    ]
    columns += [
        Column(
            "training time",
            lambda system: optional(duration, system.train_s),
            note="mean over seeds",
        ),
        Column("price per prediction", lambda system: optional(dollars, system.usd_per_prediction)),
        Column(
            "timed on",
            lambda system: next((latency.device for latency in system.latency), None),
            is_text=True,
        ),
    ]
    return system_table(columns, runs)


def rationale_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """The metrics of the rationales that students write. None if none was measured."""
    systems = [system for run in runs for system in run.results.systems]
    names = _metric_names(systems, rationale=True)
    return system_table([_metric_column(name) for name in names], runs)


def system_table(columns: Sequence[Column], runs: Sequence[EvaluatedRun]) -> Table | None:
    """The columns in which some system has a value, and the systems that have some value."""
    filled = [
        column
        for column in columns
        if any(column.cell(system) for run in runs for system in run.results.systems)
    ]
    if not filled:
        return None
    groups = []
    for run in runs:
        for title, systems in student_groups(run, runs):
            rows = [
                TableRow(
                    system.name, cells(filled, system), strong=system.name == run.results.headline
                )
                for system in systems
                if any(column.cell(system) for column in filled)
            ]
            if rows:
                groups.append(RowGroup(title, rows))
    return Table(filled, groups)


def _latency_cell(batch_size: int) -> Callable[[SystemResult], str | None]:
    def cell(system: SystemResult) -> str | None:
        for latency in system.latency:
            if latency.batch_size == batch_size:
                return " / ".join(map(milliseconds_number, (latency.p50_ms, latency.p95_ms)))
        return None

    return cell


def measure_cell(measure: Measure | None) -> str | None:
    """A fraction in percent."""
    return optional(percent_number, _value_of(measure))


def _value_of(measure: Measure | None) -> float | None:
    return None if measure is None else measure.value


def _metric_names(systems: Sequence[SystemResult], *, rationale: bool) -> list[str]:
    names = dict.fromkeys(name for system in systems for name in system.metrics)
    return [name for name in names if entry(METRICS, name).of_rationales is rationale]


def _metric_column(name: str) -> Column:
    metric = entry(METRICS, name)
    title = metric.title
    if not title[1:2].isupper():  # ROUGE-L keeps its capitals
        title = title[:1].lower() + title[1:]
    directions = {True: "; higher is better", False: "; lower is better", None: ""}
    note = metric.source + directions[metric.higher_is_better]
    if not metric.is_fraction:
        return Column(
            title,
            lambda system: optional("{:.3f}".format, _value_of(system.metrics.get(name))),
            note=note,
        )
    return Column(
        f"{title},\u00a0%",
        lambda system: measure_cell(system.metrics.get(name)),
        note=note,
    )


# --- other tables


def tuning_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """The settings that tuning tried, the chosen one of each system marked. None without tuning."""
    columns = [
        Column("setting", _setting_cell, is_text=True),
        Column(
            "validation accuracy,\u00a0%", lambda trial: percent_number(trial["valid_accuracy"])
        ),
        Column("best step", lambda trial: f"{trial['best_step']:,}"),
        Column("chosen", lambda trial: "chosen" * trial["chosen"], is_text=True),
    ]
    groups = []
    for run in runs:
        rows: list[TableRow] = []
        first_seeds: dict[str, str] = {}
        for student in run.students:
            first_seeds.setdefault(student.rpartition("-s")[0], student)
        for system, student in first_seeds.items():
            record = run.students[student]
            for trial in record.get("trials", ()):
                chosen = trial["setting"] == record["student"]["tuned"]
                cells = [column.cell(trial | {"chosen": chosen}) or "" for column in columns]
                rows.append(TableRow(system, cells, strong=chosen))
        if rows:
            groups.append(RowGroup(name_among(run, runs), rows))
    return _table(columns, groups)


def _setting_cell(trial: dict[str, Any]) -> str:
    return ", ".join(f"{key} {setting_text(value)}" for key, value in trial["setting"].items())


def annotation_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """The teacher's work on each split: accepted rows, label accuracy, requests and cost."""
    columns = [
        Column("rows", lambda split: f"{split['rows']:,}"),
        Column("accepted", _accepted_cell),
        Column("rejected", lambda split: listing(split["rejected"]) or "none", is_text=True),
        Column(
            "label accuracy,\u00a0%",
            lambda split: optional(percent_number, split["label_accuracy"]),
            note="of the teacher's own labels, over rows with a reply; unreadable ones are wrong",
        ),
        Column("95% CI", lambda split: optional(interval, split.get("label_accuracy_ci95"))),
        Column(
            "of accepted rows,\u00a0%",
            lambda split: optional(percent_number, split["label_accuracy_accepted"]),
            note="rows that were accepted with a hint are left out: their label is the gold one",
        ),
        Column("prompt tokens", lambda split: integer(split["usage"]["prompt_tokens"])),
        Column("completion tokens", lambda split: integer(split["usage"]["completion_tokens"])),
        Column(
            "cost",
            lambda split: optional(dollars, split["usd"]),
            note="US dollars for all replies in these rows, whenever they were paid for",
        ),
        Column(
            "requests",
            lambda split: f"{split['requests']:,}",
            note="sent by the last dsbs annotate; other replies had been stored before",
        ),
        Column(
            "wasted",
            lambda split: listing(split.get("wasted", {})) or "none",
            note="requests of these that brought no usable reply",
            is_text=True,
        ),
    ]
    by_run = [run.manifests["annotate"].get("splits", {}) for run in runs]
    if any("label_accuracy_random" in split for splits in by_run for split in splits.values()):
        columns.insert(
            5,
            Column(
                "of random rows,\u00a0%",
                lambda split: optional(percent_number, split.get("label_accuracy_random")),
                note="where dsbs annotate --next chose the rows: the random ones alone estimate "
                "the accuracy on all rows",
            ),
        )
    groups = []
    for run, splits in zip(runs, by_run, strict=True):
        rows = [TableRow(name, cells(columns, split)) for name, split in splits.items()]
        if rows:
            groups.append(RowGroup(name_among(run, runs), rows))
    return _table(columns, groups)


def _accepted_cell(split: dict[str, Any]) -> str:
    return f"{split['accepted']:,} ({percent(split['accepted'] / max(1, split['rows']))})"


# --- cells


def cells(columns: Sequence[Column], item: Any) -> list[str]:
    return [column.cell(item) or ABSENT for column in columns]


def optional(form: Callable[[Any], str], value: Any) -> str | None:
    """``form(value)``; None for None."""
    if value is None:
        return None
    return form(value)


def _table(columns: list[Column], groups: list[RowGroup]) -> Table | None:
    return Table(columns, groups) if groups else None
