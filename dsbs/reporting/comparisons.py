"""Comparisons in a report: tables of systems against baselines and floors, and what floors are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from dsbs.config.registry import FLOORS, entry
from dsbs.formatting import p_number, percent_number, points_number, signed_interval
from dsbs.records.measures import Interval
from dsbs.records.results import Comparison, FloorComparison, SystemResult
from dsbs.records.sentences import is_reliable
from dsbs.records.summary import TEST_NAMES
from dsbs.reporting.runs import EvaluatedRun, name_among
from dsbs.reporting.tables import BarAxis, Column, RowGroup, Table, TableRow, cells, optional

_DIFFERENCE_STEP = 0.05  # of a table's axis
_FLOOR_RESULTS = {True: "beaten", False: "not beaten"}
_FLOOR_COLUMNS = [
    Column("floor", lambda pair: pair[0], is_text=True),
    Column(
        "difference, points",
        lambda pair: points_number(pair[1].delta),
        note="the system's accuracy minus the floor's",
    ),
    Column("95% CI", lambda pair: signed_interval(pair[1].ci95)),
    Column("result", lambda pair: _FLOOR_RESULTS[pair[1].is_beaten], is_text=True),
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
_BY_SEED = Column(
    "by seed, points",
    lambda pair: ", ".join(map(points_number, pair[1].delta_per_seed.values())),
    note="the difference for each seed that both systems have; the p value is about rows alone",
)


def comparison_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """Each system against each of its baselines. None if nothing was compared."""
    comparisons = [
        comparison
        for run in runs
        for system in run.results.systems
        for comparison in system.comparisons.values()
    ]
    columns = _comparison_columns(comparisons)
    return difference_table(runs, lambda system: system.comparisons.items(), columns, _tone)


def difference_table(
    runs: Sequence[EvaluatedRun],
    pairs: Callable[[SystemResult], Iterable[tuple[str, Any]]],
    columns: list[Column],
    tone: Callable[[Any], str],
) -> Table | None:
    """A row for each of a system's ``pairs``: the other's name, and the comparison with it.

    ``tone`` is the kind of bar that a comparison gets. None without a comparison.
    """
    intervals = [
        comparison.ci95
        for run in runs
        for system in run.results.systems
        for _, comparison in pairs(system)
    ]
    if not intervals:
        return None
    axis = _difference_axis(intervals)
    groups = []
    for run in runs:
        rows = [
            TableRow(
                system.name,
                cells(columns, (other, comparison)),
                strong=system.name == run.results.headline,
                bar=axis.bar(comparison.ci95, comparison.delta, 0.0, tone(comparison)),
            )
            for system in run.results.systems
            for other, comparison in pairs(system)
        ]
        if rows:
            groups.append(RowGroup(name_among(run, runs), rows))
    return Table(columns, groups, axis)


def _difference_axis(intervals: Sequence[Interval]) -> BarAxis:
    """An axis around zero that holds all intervals."""
    reach = max(abs(end) for ci95 in intervals for end in ci95)
    reach = max(1, math.ceil(reach / _DIFFERENCE_STEP - 1e-9)) * _DIFFERENCE_STEP
    return BarAxis(-reach, reach)


def _comparison_columns(comparisons: Sequence[Comparison]) -> list[Column]:
    """The columns for pairs of a baseline's name and a comparison."""
    tests = dict.fromkeys(comparison.test for comparison in comparisons)
    names = [TEST_NAMES.get(test, test) for test in tests]
    by_seed = []
    if any(len(comparison.delta_per_seed) > 1 for comparison in comparisons):
        by_seed.append(_BY_SEED)
    return [
        Column("baseline", lambda pair: pair[0], is_text=True),
        Column(
            "difference, points",
            lambda pair: points_number(pair[1].delta),
            note="the system's accuracy minus the baseline's",
        ),
        Column("95% CI", lambda pair: signed_interval(pair[1].ci95)),
        Column(
            "p\u00a0(Holm)",
            lambda pair: p_number(pair[1].p_holm),
            note=f"two-sided {' or '.join(names)}, Holm-corrected for the run's comparisons",
        ),
        Column("result", lambda pair: _tone(pair[1]) or "no reliable difference", is_text=True),
        *by_seed,
        Column(
            "wins",
            lambda pair: f"{pair[1].wins:,}",
            note="rows that the system gets right and the baseline wrong",
        ),
        Column(
            "losses",
            lambda pair: f"{pair[1].losses:,}",
            note="rows that the baseline gets right and the system wrong",
        ),
        Column(
            "detectable, points",
            lambda pair: optional(percent_number, pair[1].minimum_detectable_effect),
            note="the smallest true difference that these rows would show in one comparison "
            "with 80% power",
        ),
    ]


def _tone(comparison: Comparison) -> str:
    if not is_reliable(comparison):
        return ""
    return "better" if comparison.delta > 0 else "worse"


def floor_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """Each system against each floor. None without floors."""
    return difference_table(
        runs, lambda system: system.versus_floors.items(), _FLOOR_COLUMNS, _floor_tone
    )


def _floor_tone(comparison: FloorComparison) -> str:
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
