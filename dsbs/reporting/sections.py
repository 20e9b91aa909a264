"""The page's tables as plain data: what stands in which cell. How it looks is the templates'."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dsbs.formatting import (
    dollars,
    interval,
    p_number,
    parameter_count,
    points_number,
    signed_interval,
)
from dsbs.config.registry import METRICS, entry
from dsbs.records.results import Interval, Latency, Measure, SystemResult
from dsbs.records.summary import is_reliable
from dsbs.reporting import text as words
from dsbs.reporting.gather import Run

NOTHING = "–"


@dataclass(frozen=True, slots=True)
class Bar:
    """An interval and its middle on an axis, all in percent of the axis' length; ``mark`` is a value to be compared with."""

    low: float
    high: float
    middle: float
    mark: float | None
    tone: str = ""  # better, worse, or nothing to say


@dataclass(frozen=True, slots=True)
class Axis:
    """What a column of bars spans, in the data's own fractions."""

    low: float
    high: float

    @property
    def ends(self) -> tuple[str, str]:
        return f"{100 * self.low:.0f}", f"{100 * self.high:.0f}"

    def bar(self, ci95: Interval, middle: float, mark: float | None, tone: str = "") -> Bar:
        low, high, at = (self._at(x) for x in (*ci95, middle))
        return Bar(low, high, at, None if mark is None else self._at(mark), tone)

    def _at(self, value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (value - self.low) / (self.high - self.low))), 2)


@dataclass(frozen=True, slots=True)
class Line:
    """A row of a table: its head, a bar where the table has them, its cells."""

    head: str
    cells: list[str]
    strong: bool = False
    bar: Bar | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """The rows of one run; ``title`` is None where there is one run alone."""

    title: str | None
    lines: list[Line]


@dataclass(frozen=True, slots=True)
class Table:
    """Headings after the first, their explanations ("" for none), which columns are text, and the rows."""

    headings: list[str]
    notes: list[str]
    texts: list[bool]
    groups: list[Group]
    axis: Axis | None = None

    @property
    def explained(self) -> dict[str, str]:
        """Each note with the first heading that it explains."""
        found: dict[str, str] = {}
        for heading, note in zip(self.headings, self.notes, strict=True):
            if note:
                found.setdefault(note, heading)
        return {heading: note for note, heading in found.items()}


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    cell: Callable[[Any], str | None]
    note: str = ""
    text: bool = False


def accuracies(runs: Sequence[Run]) -> Table:
    """All systems: accuracy, its interval, and the measures that are means over rows."""
    systems = [system for run in runs for system in run.results.systems]
    step = 0.1
    axis = Axis(
        math.floor(min(s.ci95[0] for s in systems) / step + 1e-9) * step,
        math.ceil(max(s.ci95[1] for s in systems) / step - 1e-9) * step,
    )
    columns = [
        Column("accuracy,\u00a0%", lambda s: words.share(s.accuracy)),
        Column("95% CI", lambda s: interval(s.ci95), note=_how([s.interval for s in systems])),
        Column("seeds", lambda s: str(len(s.seeds)) if s.seeds else NOTHING),
        Column(
            "unreadable,\u00a0%",
            lambda s: words.share(s.unreadable),
            note="outputs that are no label of the task: wrong",
        ),
    ]
    columns += [_measure(name) for name in _measures(systems, rationale=False)]
    groups = []
    for run in runs:
        base = run.results.system(run.results.baseline)
        mark = base.accuracy if base else None
        lines = [
            Line(
                head=s.name,
                cells=[column.cell(s) or NOTHING for column in columns],
                strong=s.name == run.results.headline,
                bar=axis.bar(s.ci95, s.accuracy, mark),
            )
            for s in run.results.systems
        ]
        groups.append(Group(_title(run, runs), lines))
    return _table(columns, groups, axis)


def costs(runs: Sequence[Run]) -> Table | None:
    """What each system takes: parameters, bytes, time, money. None where nothing was measured."""
    columns = [
        Column(
            "parameters", lambda s: None if s.parameters is None else parameter_count(s.parameters)
        ),
        Column("MB on disk", lambda s: None if s.megabytes is None else f"{s.megabytes:,.1f}"),
        Column(
            "ms per example",
            lambda s: words.ms(s.ms_per_example),
            note="median over rows, at the evaluation's batch size",
        ),
    ]
    sizes = sorted(
        {one.batch_size for run in runs for s in run.results.systems for one in s.latency}
    )
    timed = "wall time of a call, label alone"
    columns += [
        Column(f"p50 / p95 ms, batch {size}", _at_batch(size), note=timed) for size in sizes
    ]
    columns += [
        Column("training", lambda s: words.duration(s.train_s), note="mean over seeds"),
        Column("a prediction costs", lambda s: _dollars(s.usd_per_prediction)),
        Column("timed on", lambda s: s.latency[0].device if s.latency else None, text=True),
    ]
    return _systems(columns, runs)


def recalls(runs: Sequence[Run]) -> Table | None:
    """Recall of each label of a closed set."""
    labels = dict.fromkeys(label for run in runs for s in run.results.systems for label in s.recall)
    return _systems([Column(label, _recall(label)) for label in labels], runs)


def rationales(runs: Sequence[Run]) -> Table | None:
    """The measures of the rationales that students write."""
    names = _measures([system for run in runs for system in run.results.systems], rationale=True)
    return _systems([_measure(name) for name in names], runs)


def comparisons(runs: Sequence[Run]) -> Table | None:
    """Each system against each baseline that it was compared with."""
    gaps = [
        (run, s, other, gap)
        for run in runs
        for s in run.results.systems
        for other, gap in s.versus.items()
    ]
    if not gaps:
        return None
    reach = max(abs(end) for *_, gap in gaps for end in gap.ci95)
    reach = max(0.05, math.ceil(reach / 0.05 - 1e-9) * 0.05)
    axis = Axis(-reach, reach)
    tests = list(dict.fromkeys(gap.test for *_, gap in gaps))
    how = f"two-sided{', ' + tests[0] if len(tests) == 1 else ''}; corrected over the run's comparisons (Holm)"
    columns = [
        Column("against", lambda pair: pair[0], text=True),
        Column(
            "points",
            lambda pair: points_number(pair[1].delta),
            note="the system's accuracy less the other's",
        ),
        Column("95% CI", lambda pair: signed_interval(pair[1].ci95)),
        Column("p\u00a0(Holm)", lambda pair: p_number(pair[1].p_holm), note=how),
        Column("finding", lambda pair: _finding(pair[1]), text=True),
        Column(
            "fixed",
            lambda pair: words.count(pair[1].wins),
            note="rows that the system has right and the other wrong",
        ),
        Column("broken", lambda pair: words.count(pair[1].losses), note="the other way round"),
        Column(
            "detectable",
            lambda pair: words.share(pair[1].minimum_detectable_effect),
            note="the smallest true difference, in points, that these rows would show with 80 % power in one comparison",
        ),
    ]
    if len(tests) > 1:
        columns.append(Column("test", lambda pair: pair[1].test, text=True))
    groups = []
    for run in runs:
        lines = [
            Line(
                head=s.name,
                cells=[column.cell((other, gap)) or NOTHING for column in columns],
                strong=s.name == run.results.headline,
                bar=axis.bar(gap.ci95, gap.delta, 0.0, _tone(gap)),
            )
            for one, s, other, gap in gaps
            if one is run
        ]
        if lines:
            groups.append(Group(_title(run, runs), lines))
    return _table(columns, groups, axis)


def trials(runs: Sequence[Run]) -> Table | None:
    """What tuning tried, a line for each trial; the chosen one of each system is marked."""
    columns = [
        Column("setting", lambda trial: trial["said"], text=True),
        Column("valid accuracy,\u00a0%", lambda trial: words.share(trial["valid_accuracy"])),
        Column("best step", lambda trial: words.count(trial["best_step"])),
        Column("taken", lambda trial: "taken" if trial["taken"] else "", text=True),
    ]
    groups = []
    for run in runs:
        lines: list[Line] = []
        seen = set()
        for name, record in run.students.items():
            system = name.rpartition("-s")[0]
            if system in seen:
                continue
            seen.add(system)
            for trial in record.get("trials", ()):
                said = ", ".join(f"{key} {value:g}" for key, value in trial["setting"].items())
                taken = trial["setting"] == record["student"]["tuned"]
                shown = trial | {"said": said, "taken": taken}
                lines.append(
                    Line(system, [column.cell(shown) or "" for column in columns], strong=taken)
                )
        if lines:
            groups.append(Group(_title(run, runs), lines))
    return _table(columns, groups) if groups else None


def annotation(runs: Sequence[Run]) -> Table | None:
    """The teacher's work on each split: what was accepted, how right it was, what it took."""
    columns = [
        Column("rows", lambda s: words.count(s["rows"])),
        Column("accepted", lambda s: _share(s["accepted"], s["rows"])),
        Column("rejected", lambda s: _reasons(s["rejected"]) or "none", text=True),
        Column(
            "label accuracy,\u00a0%",
            lambda s: words.share(s["label_accuracy"]),
            note="the teacher's own, of all rows; unreadable is wrong",
        ),
        Column("95% CI", lambda s: _span(s.get("label_accuracy_ci95"))),
        Column("… of accepted,\u00a0%", lambda s: words.share(s["label_accuracy_accepted"])),
        Column("prompt tokens", lambda s: words.count(s["usage"]["prompt_tokens"])),
        Column("completion tokens", lambda s: words.count(s["usage"]["completion_tokens"])),
        Column(
            "dollars",
            lambda s: _dollars(s["usd"]),
            note="of all replies in the rows, whenever they were bought",
        ),
        Column(
            "requests",
            lambda s: words.count(s["requests"]),
            note="of the last dsbs annotate; other replies were there before",
        ),
        Column(
            "wasted",
            lambda s: _reasons(s.get("wasted", {})) or "none",
            note="of those requests, what brought nothing",
            text=True,
        ),
    ]
    groups = []
    for run in runs:
        splits = run.annotated.get("splits", {})
        lines = [
            Line(name, [column.cell(split) or NOTHING for column in columns])
            for name, split in splits.items()
        ]
        if lines:
            groups.append(Group(_title(run, runs), lines))
    return _table(columns, groups) if groups else None


def _systems(columns: Sequence[Column], runs: Sequence[Run]) -> Table | None:
    """A line for each system that has something to say, and the columns in which one has."""
    rows = [
        (run, s, [column.cell(s) for column in columns])
        for run in runs
        for s in run.results.systems
    ]
    rows = [row for row in rows if any(row[2])]
    kept = [i for i in range(len(columns)) if any(cells[i] for _, _, cells in rows)]
    if not kept:
        return None
    groups = []
    for run in runs:
        lines = [
            Line(s.name, [cells[i] or NOTHING for i in kept], strong=s.name == run.results.headline)
            for one, s, cells in rows
            if one is run
        ]
        if lines:
            groups.append(Group(_title(run, runs), lines))
    return _table([columns[i] for i in kept], groups)


def _table(columns: Sequence[Column], groups: list[Group], axis: Axis | None = None) -> Table:
    return Table(
        [c.title for c in columns],
        [c.note for c in columns],
        [c.text for c in columns],
        groups,
        axis,
    )


def _title(run: Run, runs: Sequence[Run]) -> str | None:
    return run.name if len(runs) > 1 else None


def _measures(systems: Sequence[SystemResult], *, rationale: bool) -> list[str]:
    return [
        name
        for name in dict.fromkeys(n for s in systems for n in s.metrics)
        if entry(METRICS, name).of_rationales is rationale
    ]


def _measure(name: str) -> Column:
    known = entry(METRICS, name)
    better = {True: "; more is better", False: "; less is better", None: ""}[known.higher_is_better]
    title = (
        known.title if known.title[1:2].isupper() else known.title[:1].lower() + known.title[1:]
    )  # ROUGE-L stays
    return Column(
        f"{title},\u00a0%", lambda s: _value(s.metrics.get(name)), note=known.source + better
    )


def _recall(label: str) -> Callable[[SystemResult], str | None]:
    return lambda s: _value(s.recall.get(label))


def _value(measure: Measure | None) -> str | None:
    return None if measure is None else words.share(measure.value)


def _at_batch(size: int) -> Callable[[SystemResult], str | None]:
    def cell(system: SystemResult) -> str | None:
        found: Latency | None = next(
            (one for one in system.latency if one.batch_size == size), None
        )
        return None if found is None else f"{words.ms(found.p50_ms)} / {words.ms(found.p95_ms)}"

    return cell


def _span(ci95: Interval | None) -> str | None:
    return None if ci95 is None else interval(ci95)


def _dollars(usd: float | None) -> str | None:
    return None if usd is None else dollars(usd)


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({words.share(part / whole)} %)" if whole else str(part)


def _reasons(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{reason} {number:,}" for reason, number in ordered)


def _how(ways: Sequence[str]) -> str:
    return " or ".join(dict.fromkeys(ways))


def _finding(gap: Any) -> str:
    if not is_reliable(gap):
        return "no reliable difference"
    return "better" if gap.delta > 0 else "worse"


def _tone(gap: Any) -> str:
    return _finding(gap) if is_reliable(gap) else ""
