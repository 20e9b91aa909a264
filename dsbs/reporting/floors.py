"""Floors in a report: a table of all comparisons with them, and their definitions."""

from __future__ import annotations

from collections.abc import Sequence

from dsbs.config.registry import FLOORS, entry
from dsbs.formatting import points_number, signed_interval
from dsbs.records.results import FloorComparison
from dsbs.reporting.runs import EvaluatedRun, name_among
from dsbs.reporting.tables import Column, RowGroup, Table, TableRow, cells, difference_axis

_RESULTS = {True: "beaten", False: "not beaten"}
_COLUMNS = [
    Column("floor", lambda pair: pair[0], is_text=True),
    Column(
        "difference, points",
        lambda pair: points_number(pair[1].delta),
        note="the system's accuracy minus the floor's",
    ),
    Column("95% CI", lambda pair: signed_interval(pair[1].ci95)),
    Column("result", lambda pair: _RESULTS[pair[1].is_beaten], is_text=True),
    Column(
        "wins",
        lambda pair: f"{pair[1].wins:,}",
        note="rows that the system gets right and the floor wrong",
    ),
    Column(
        "losses",
        lambda pair: f"{pair[1].losses:,}",
        note="rows that the floor gets right and the system wrong",
    ),
]


def floor_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """Each system against each floor. None without floors."""
    intervals = [
        comparison.ci95
        for run in runs
        for system in run.results.systems
        for comparison in system.versus_floors.values()
    ]
    if not intervals:
        return None
    axis = difference_axis(intervals)
    groups = []
    for run in runs:
        rows = [
            TableRow(
                system.name,
                cells(_COLUMNS, (floor, comparison)),
                strong=system.name == run.results.headline,
                bar=axis.bar(comparison.ci95, comparison.delta, 0.0, _tone(comparison)),
            )
            for system in run.results.systems
            for floor, comparison in system.versus_floors.items()
        ]
        if rows:
            groups.append(RowGroup(name_among(run, runs), rows))
    return Table(_COLUMNS, groups, axis)


def _tone(comparison: FloorComparison) -> str:
    if comparison.is_beaten:
        return "better"
    return "worse" if comparison.ci95[1] < 0 else ""


def floor_definitions(runs: Sequence[EvaluatedRun]) -> list[str]:
    """A sentence for each floor of the runs, and whose labels it learned."""
    definitions: dict[str, str] = {}
    for run in runs:
        for system in run.results.systems:
            if system.floor is None:
                continue
            base, _, limited_to = system.floor.partition("-")
            text = f"{system.floor}: {entry(FLOORS, base).source}"
            if limited_to:
                text += f", from the field {limited_to} alone"
            if system.labels == "teacher":
                text += "; it learned the teacher's labels, as no train row has a gold label"
            definitions.setdefault(system.floor, f"{text}.")
    return list(definitions.values())
