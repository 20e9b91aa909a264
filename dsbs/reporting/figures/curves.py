"""Accuracy against what was put in: training rows, parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsbs.records.results import Results, SystemResult
from dsbs.reporting.figures.canvas import MUTE, Figure, drawing, short
from dsbs.reporting.figures.style import (
    FILLS,
    Look,
    beside,
    handle,
    level,
    looks,
    point,
    shares,
    teachers,
    thinned,
    told,
    where,
)
from dsbs.reporting.gather import Run
from dsbs.reporting.naming import run_titles, series_title, whole

Curve = dict[
    str, list[SystemResult]
]  # a series' systems by their title, in the order of their rows


def curve_points(results: Results) -> Curve:
    """The students of every series by training rows. {} where no series has two shares of the rows."""
    lines: Curve = {}
    for system in results.systems:
        if system.kind == "student" and system.training_rows:
            lines.setdefault(series_title(system), []).append(system)
    if (
        max((len({system.training_rows for system in line}) for line in lines.values()), default=0)
        < 2
    ):
        return {}
    return {
        title: sorted(line, key=lambda system: system.training_rows or 0)
        for title, line in lines.items()
    }


def curve(runs: Sequence[Run]) -> list[Figure]:
    """Accuracy against training rows, a line for each method, 95 % intervals as bands, the teacher as a level."""
    shown = [
        (title, run.results, points)
        for title, run in zip(run_titles(runs), runs, strict=True)
        if (points := curve_points(run.results))
    ]
    if not shown:
        return []
    styles = looks(runs)
    several = len(shown) > 1
    size = {"width": 6.4, "height": 2.7} if several else {"width": 5.4, "height": 3.5}
    with drawing("curve", panels=len(shown), columns=2, share="y", **size) as sheet:
        entries: dict[str, Any] = {}
        for axes, (run_title, results, points) in zip(sheet.axes, shown, strict=True):
            for title, line in points.items():
                _line(sheet, axes, line, styles[title])
                entries[title] = handle(styles[title])
            for system in results.systems:
                if system.kind != "student":
                    entries[system.name] = level(axes, system, styles[system.name])
            rows = thinned(
                (s.training_rows or 0 for line in points.values() for s in line),
                size["width"] * 0.4,
                0.5,
            )
            axes.set_xscale("log")
            axes.set_xticks(rows, [f"{count:,.0f}" for count in rows])
            axes.set_xticks([], minor=True)
            axes.set_xlabel("training rows")
            shares(axes, where(results) if axes in sheet.first_column else "")
            if len(runs) > 1:
                axes.set_title(short(run_title))
        sheet.legend([(entries[title], short(title)) for title in styles if title in entries])
        said = "Every method was trained on the same nested parts of the rows. Bands: 95 % intervals over test rows."
        return [sheet.finish("Accuracy against training rows", said)]


def _line(sheet: Any, axes: Any, line: list[SystemResult], look: Look) -> None:
    counts = [system.training_rows for system in line]
    lows, highs = zip(*(system.ci95 for system in line), strict=True)
    axes.plot(counts, [system.accuracy for system in line], color=look.color, linestyle=look.line)
    axes.fill_between(counts, lows, highs, color=look.color, alpha=0.13, linewidth=0)
    for system in line:
        tip = f"{told(system)} with {system.training_rows:,} rows"
        point(sheet, axes, system.training_rows or 0, system.accuracy, look, tip)


def size(runs: Sequence[Run]) -> list[Figure]:
    """Accuracy against parameters, a point with its interval for each series of each run, teachers as levels."""
    placed = [
        (number, system)
        for number, run in enumerate(runs)
        for system in whole(run.results.systems)
        if system.kind != "teacher" and system.parameters
    ]
    counts = sorted({system.parameters or 0 for _, system in placed})
    if len(counts) < 2:
        return []
    styles = looks(runs)
    order = [
        title for title in styles if any(series_title(system) == title for _, system in placed)
    ]
    at_size = {
        count: sorted({number for number, system in placed if system.parameters == count})
        for count in counts
    }
    one_each = all(len(numbers) == 1 for numbers in at_size.values())
    placed.sort(key=lambda pair: (pair[0], order.index(series_title(pair[1]))))
    reach = 3.2 * counts[-1] / counts[0]  # of the axis, as a factor
    places = beside([float(system.parameters or 0) for _, system in placed], reach ** (1 / 45))
    with drawing("size", height=3.6) as sheet:
        (axes,) = sheet.axes
        lines: dict[str, list[tuple[float, float]]] = {}
        for x, (number, system) in zip(places, placed, strict=True):
            title, count = series_title(system), system.parameters or 0
            tip = f"{told(system)} with {count:,} parameters"
            fill = "full" if one_each else FILLS[number % len(FILLS)]
            point(
                sheet, axes, x, system.accuracy, styles[title], tip, y_span=system.ci95, fill=fill
            )
            lines.setdefault(title, []).append((x, system.accuracy))
        entries = [(handle(styles[title], line=False), short(title)) for title in order]
        if one_each:  # else a line would jump between runs
            for title, points in lines.items():
                axes.plot(
                    *zip(*sorted(points), strict=True),
                    color=styles[title].color,
                    linewidth=0.8,
                    alpha=0.5,
                )
        entries += teachers(axes, runs, styles)
        titles = [short(title) for title in run_titles(runs)]
        if not one_each:
            grey = Look("", MUTE, "o")
            entries += [
                (handle(grey, line=False, fill=FILLS[number % len(FILLS)]), title)
                for number, title in enumerate(titles)
            ]
        named = one_each and len(counts) <= 4
        ticks = thinned(counts, 4.3, 0.6)
        below = [f"\n{titles[at_size[int(count)][0]]}" if named else "" for count in ticks]
        axes.set_xscale("log")
        axes.set_xlim(counts[0] / 1.8, counts[-1] * 1.8)
        axes.set_xticks(
            ticks, [f"{count / 1e6:.3g} M{name}" for count, name in zip(ticks, below, strict=True)]
        )
        axes.set_xticks([], minor=True)
        axes.set_xlabel("parameters")
        shares(
            axes,
            where(runs[0].results)
            if len({where(run.results) for run in runs}) == 1
            else "accuracy",
        )
        sheet.legend(entries)
        said = "Students of the largest share of the rows; bars are 95 % intervals over test rows."
        said += " Students of one size stand side by side."
        return [sheet.finish("Accuracy against parameters", said)]
