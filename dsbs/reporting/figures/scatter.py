"""Scatter plots: accuracy against size and time, and the frontier of compressed students."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsbs.formatting import milliseconds, percent, sentence_list
from dsbs.records.results import Compressed, Latency, Measurement, SystemResult
from dsbs.reporting.compression import UNCHANGED, by_original
from dsbs.reporting.figures.canvas import INK, MUTE, Canvas, Figure, open_canvas, shorten
from dsbs.reporting.figures.style import (
    FILLS,
    GREY,
    Style,
    accuracy_axis,
    accuracy_label,
    accuracy_tooltip,
    draw_levels,
    draw_point,
    legend_handle,
    log_axis,
    numbered_style,
    run_handles,
    series_entries,
    series_styles,
    spread_apart,
    thin_ticks,
)
from dsbs.reporting.runs import EvaluatedRun, full_data_systems, run_titles, series_title

_NEIGHBOURS = 45  # points that fit side by side on an axis
_MAX_CHAINS = 12  # compression chains with a style of their own
_OTHER_CHAINS = "other chains"
_HEALER_MARKERS: dict[str | None, str] = {
    "rows": "$r$",
    "both": "$b$",
}  # letters: healing from the original has none
_STUDENT_FILLS = [fill for fill in FILLS if fill != "none"]  # an empty marker means rejected


# --- accuracy against size and time


def size_figure(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """Accuracy against the number of parameters, for runs with students of several sizes."""
    points = [
        (number, system)
        for number, run in enumerate(runs)
        for system in full_data_systems(run.results.systems)
        if system.kind not in ("teacher", "floor") and system.parameters
    ]
    sizes = sorted({system.parameters or 0 for _, system in points})
    if len(sizes) < 2:
        return []
    styles = series_styles(runs)
    titles = {series_title(system) for _, system in points}
    order = [title for title in styles if title in titles]
    points.sort(key=lambda point: (point[0], order.index(series_title(point[1]))))
    runs_by_size = {
        size: sorted({number for number, system in points if system.parameters == size})
        for size in sizes
    }
    is_run_by_size = all(len(numbers) == 1 for numbers in runs_by_size.values())
    axis_factor = 3.2 * sizes[-1] / sizes[0]
    positions = spread_apart(
        [float(system.parameters or 0) for _, system in points], axis_factor ** (1 / _NEIGHBOURS)
    )
    with open_canvas("size", height=3.6) as canvas:
        (axes,) = canvas.axes
        lines: dict[str, list[tuple[float, float]]] = {}
        for x, (number, system) in zip(positions, points, strict=True):
            title = series_title(system)
            tooltip = f"{accuracy_tooltip(system)} with {system.parameters:,} parameters"
            fill = "full" if is_run_by_size else FILLS[number % len(FILLS)]
            draw_point(
                canvas,
                axes,
                x,
                system.accuracy,
                styles[title],
                tooltip,
                y_interval=system.ci95,
                fill=fill,
            )
            lines.setdefault(title, []).append((x, system.accuracy))
        entries = series_entries(runs, styles, order, line=False)
        if is_run_by_size:  # otherwise a line would jump between runs
            for title, line in lines.items():
                color = styles[title].color
                axes.plot(*zip(*sorted(line), strict=True), color=color, linewidth=0.8, alpha=0.5)
        entries += draw_levels(axes, runs, styles)
        if not is_run_by_size:
            entries += run_handles(runs)
        ticks = thin_ticks(sizes, 4.3, 0.6)
        labels = [f"{size / 1e6:.3g} M" for size in ticks]
        if is_run_by_size and len(sizes) <= 4:
            names = _names_of_sizes(runs, points)
            labels = [
                f"{label}\n{shorten(names[int(size)])}"
                for label, size in zip(labels, ticks, strict=True)
            ]
        axes.set_xscale("log")
        axes.set_xlim(sizes[0] / 1.8, sizes[-1] * 1.8)
        axes.set_xticks(ticks, labels)
        axes.set_xticks([], minor=True)
        axes.set_xlabel("parameters")
        accuracy_axis(axes, accuracy_label(runs))
        canvas.legend(entries)
        caption = (
            "Students of the largest subset of the rows; bars are 95% confidence intervals over "
            "test rows. Students of one size are drawn side by side. Gray lines are floors."
        )
        return [canvas.finish("Accuracy against parameters", caption)]


def _names_of_sizes(
    runs: Sequence[EvaluatedRun], points: Sequence[tuple[int, SystemResult]]
) -> dict[int, str]:
    """The student of each size, or the run where students have no names."""
    titles = run_titles(runs)
    names: dict[int, dict[str, None]] = {}
    for number, system in points:
        name = titles[number] if system.student is None else system.student
        names.setdefault(system.parameters or 0, {})[name] = None
    return {size: ", ".join(named) for size, named in names.items()}


def speed_figure(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """Accuracy against the time of a prediction: median at batch size 1, 95th percentile as bar."""
    points = [
        (number, system, latency)
        for number, run in enumerate(runs)
        for system in full_data_systems(run.results.systems)
        if (latency := _single_row_latency(system)) is not None
    ]
    if not points:
        return []
    styles = series_styles(runs)
    times = [time for _, _, latency in points for time in (latency.p50_ms, latency.p95_ms)]
    ends = (min(times) / 2, max(times) * 2)
    positions = spread_apart(
        [latency.p50_ms for _, _, latency in points], (ends[1] / ends[0]) ** (1 / _NEIGHBOURS)
    )
    with open_canvas("speed") as canvas:
        (axes,) = canvas.axes
        for x, (number, system, latency) in zip(positions, points, strict=True):
            tooltip = (
                f"{accuracy_tooltip(system)}, {milliseconds(latency.p50_ms)} "
                f"(95% within {milliseconds(latency.p95_ms)}) on {latency.device}"
            )
            draw_point(
                canvas,
                axes,
                x,
                system.accuracy,
                styles[series_title(system)],
                tooltip,
                x_interval=(x, x * latency.p95_ms / latency.p50_ms),
                y_interval=system.ci95,
                fill=FILLS[number % len(FILLS)],
            )
        timed = {series_title(system) for _, system, _ in points}
        entries = series_entries(runs, styles, timed, line=False)
        if len({number for number, _, _ in points}) > 1:
            entries += run_handles(runs)
        entries += draw_levels(axes, runs, styles)
        log_axis(axes.xaxis, ends)
        devices = ", ".join(sorted({latency.device for _, _, latency in points}))
        axes.set_xlabel(f"ms for a single row, on {shorten(devices)}")
        accuracy_axis(axes, accuracy_label(runs))
        canvas.legend(entries)
        caption = (
            "The time of a student's label, one row at a time: the marker is the median, the bar "
            "to the right ends at the 95th percentile; vertical bars are 95% confidence intervals "
            "of the accuracy. Students of the largest subset of the rows; those with nearly equal "
            "times are drawn side by side. The teacher's time is not measured."
        )
        return [canvas.finish("Accuracy against time", caption)]


def _single_row_latency(system: SystemResult) -> Latency | None:
    for latency in system.latency:
        if latency.batch_size == 1 and latency.p50_ms > 0:
            return latency
    return None


# --- compressed students


@dataclass(frozen=True, slots=True)
class _CompressedPoint:
    """A student as trained (``chain`` None) or compressed."""

    student: str
    chain: str | None
    measurement: Measurement
    time_ms: float | None
    """For a single row; None if not measured."""
    accepted: bool = True

    @property
    def tooltip(self) -> str:
        text = (
            f"{shorten(self.student)}, {shorten(self.chain or UNCHANGED)}: "
            f"{percent(self.measurement.accuracy)}, {self.measurement.megabytes:,.2f} MB"
        )
        time_ms = self.measurement.median_ms(1)
        if time_ms is not None:
            text += f", {milliseconds(time_ms)}"
        if not self.accepted:
            text += ", rejected"
        return text


def frontier_figure(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """For each run accuracy against megabytes, and against the time of a single row if measured."""
    titled = [
        (title, run)
        for title, run in zip(run_titles(runs), runs, strict=True)
        if any(record.original.megabytes > 0 for record in run.compressed)
    ]
    styles = _chain_styles([record for _, run in titled for record in run.compressed])
    if len(runs) == 1:
        return [_draw_frontier("frontier", "", run, styles) for _, run in titled]
    return [
        _draw_frontier(f"frontier-{number}", f": {title}", run, styles)
        for number, (title, run) in enumerate(titled, 1)
    ]


def _chain_styles(records: Sequence[Compressed]) -> dict[str, Style]:
    """A style for each chain, the same for all students and runs of a page.

    Students of one chain that were healed in different ways share its color and differ in their
    marker.
    """
    steps = list(dict.fromkeys(record.chain for record in records))
    styles: dict[str, Style] = {}
    for record in records:
        number = steps.index(record.chain)
        if number >= _MAX_CHAINS:
            styles[record.name] = Style(_OTHER_CHAINS, MUTE, "o")
            continue
        style = numbered_style(record.name, number)
        marker = _HEALER_MARKERS.get(record.healer if record.healed_by else None)
        styles[record.name] = replace(style, marker=marker or style.marker)
    return styles


def _draw_frontier(
    name: str, suffix: str, run: EvaluatedRun, chain_styles: dict[str, Style]
) -> Figure:
    points = _compressed_points(run)
    students = list(dict.fromkeys(point.student for point in points))
    fills = {
        student: _STUDENT_FILLS[number % len(_STUDENT_FILLS)]
        for number, student in enumerate(students)
    }
    styles = chain_styles | {None: Style(UNCHANGED, INK, "*")}
    sizes = [(point, point.measurement.megabytes) for point in points]
    times = [(point, point.time_ms or 0.0) for point in points]
    panels = [(sizes, "megabytes on disk"), (times, "ms for a single row, median")]
    panels = [([pair for pair in pairs if pair[1] > 0], label) for pairs, label in panels]
    panels = [(pairs, label) for pairs, label in panels if pairs]
    rows = sentence_list([f"{rows:,}" for rows in sorted({record.n for record in run.compressed})])
    with open_canvas(name, height=2.7, panels=len(panels)) as canvas:
        for axes, (pairs, label) in zip(canvas.axes, panels, strict=True):
            _draw_frontier_panel(canvas, axes, pairs, styles, fills)
            axes.set_xlabel(label)
            accuracy_axis(axes, f"validation accuracy ({rows} rows)")
        drawn = {styles[point.chain].title: styles[point.chain] for point in points}
        entries = [
            (legend_handle(style, line=False), shorten(title)) for title, style in drawn.items()
        ]
        if len(students) > 1:
            entries += [
                (legend_handle(GREY, line=False, fill=fills[student]), shorten(student))
                for student in students
            ]
        if not all(point.accepted for point in points):
            entries.append((legend_handle(GREY, line=False, fill="none"), "rejected"))
        canvas.legend(entries)
        caption = (
            "Students as trained and as compressed by dsbs compress. The line joins the named "
            "students: no other is as accurate and also smaller, or faster. Differences within the "
            "table's intervals may be chance."
        )
        title = "Accuracy against size"
        if len(panels) > 1:
            title += " and time"
        return canvas.finish(f"{title}{suffix}", caption)


def _draw_frontier_panel(
    canvas: Canvas,
    axes: Any,
    pairs: Sequence[tuple[_CompressedPoint, float]],
    styles: dict[Any, Style],
    fills: dict[str, str],
) -> None:
    candidates = [(x, point.measurement.accuracy) for point, x in pairs if point.accepted]
    best = sorted(candidates[index] for index in frontier_of(candidates))
    axes.plot(*zip(*best, strict=True), color=MUTE, linewidth=1, zorder=1)
    values = [x for _, x in pairs]
    ends = (min(values) / 1.3, max(values) * 1.6)
    for point, x in pairs:
        accuracy = point.measurement.accuracy
        fill = fills[point.student] if point.accepted else "none"
        draw_point(canvas, axes, x, accuracy, styles[point.chain], point.tooltip, fill=fill)
        if point.accepted and (x, accuracy) in best:
            is_right = math.log(x / ends[0]) > 0.75 * math.log(ends[1] / ends[0])
            axes.annotate(
                shorten(point.chain or UNCHANGED, 30),
                (x, accuracy),
                (-6 if is_right else 6, -9),  # below the line, which rises to the right
                textcoords="offset points",
                fontsize=8,
                color=INK,
                ha="right" if is_right else "left",
            )
    log_axis(axes.xaxis, ends)
    axes.margins(y=0.12)


def _compressed_points(run: EvaluatedRun) -> list[_CompressedPoint]:
    points: list[_CompressedPoint] = []
    for records in by_original(run.compressed):
        student = records[0].student
        original = records[0].original
        time_ms = original.median_ms(1)
        points.append(_CompressedPoint(student, None, original, time_ms))
        for record in records:
            scaled = _scaled_time(time_ms, record)
            points.append(
                _CompressedPoint(student, record.name, record.compressed, scaled, record.accepted)
            )
    return points


def _scaled_time(original_ms: float | None, record: Compressed) -> float | None:
    """A compressed student's time, as a share of its original's applied to ``original_ms``.

    Both were timed in turns, so that a busy machine slowed both; the share is fairer than the time.
    """
    before = record.original.median_ms(1)
    after = record.compressed.median_ms(1)
    if not before or after is None or original_ms is None:
        return after
    return original_ms * after / before


def frontier_of(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the (cost, accuracy) points that no other matches in both and beats in one."""
    return {
        index
        for index, (cost, accuracy) in enumerate(points)
        if not any(x <= cost and y >= accuracy and (x, y) != (cost, accuracy) for x, y in points)
    }
