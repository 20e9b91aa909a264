"""Line figures: accuracy against training rows, training curves, and the break-even point."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np

from dsbs.formatting import count, dollars
from dsbs.records.results import BreakEven, Results, SystemResult
from dsbs.reporting.figures.canvas import INK, MUTE, Canvas, Figure, open_canvas, shorten
from dsbs.reporting.figures.style import (
    GREY,
    Style,
    accuracy_axis,
    accuracy_tooltip,
    draw_level,
    draw_point,
    figure_names,
    legend_handle,
    line_handle,
    log_axis,
    marker_settings,
    rows_label,
    series_entries,
    series_styles,
    thin_ticks,
)
from dsbs.reporting.runs import EvaluatedRun, full_data_systems, run_titles, series_title

# A series' systems by its title, in the order of their training rows.
Curve = dict[str, list[SystemResult]]
Line = tuple[list[float], list[float]]  # steps, values

_MAX_POINTS = 80  # of a training curve; more steps are averaged
_MAX_BILLS = 4  # lines of training costs in a figure
_TEACHER_DASHES = (0, (6, 3))
# Keys of metrics.jsonl, with their name in the legend and their dashes.
_LOSSES = {
    "label_loss": ("label loss, training", "-"),
    "rationale_loss": ("rationale loss, training", (0, (4, 1.5))),
    "eval_label_loss": ("label loss, validation", (0, (1, 1.2))),
}
# Dashes for losses with other names, such as those of single-sequence methods and loss terms.
_OTHER_DASHES = (
    (0, (6, 1, 1, 1)),
    (0, (7, 1.5, 1, 1.5)),
    (0, (2.5, 1)),
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (9, 2)),
    (0, (1, 2.5)),
)


# --- accuracy against training rows


def curve_points(results: Results) -> Curve:
    """The students of each series by training rows; {} if none has two subsets of the rows."""
    curves: Curve = {}
    for system in results.systems:
        if system.kind == "student" and system.training_rows:
            curves.setdefault(series_title(system), []).append(system)
    sizes = [len({system.training_rows for system in curve}) for curve in curves.values()]
    if max(sizes, default=0) < 2:
        return {}
    return {
        title: sorted(curve, key=lambda system: system.training_rows or 0)
        for title, curve in curves.items()
    }


def learning_curve(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """Accuracy against training rows: a line for each method with its interval as a band.

    A panel for each run and, of several students, for each student.
    """
    curves = [
        (title, run.results, points)
        for run_title, run in zip(run_titles(runs), runs, strict=True)
        for title, points in _by_student(run_title, len(runs) > 1, curve_points(run.results))
    ]
    if not curves:
        return []
    styles = series_styles(runs)
    width = 5.4
    height = 3.5
    if len(curves) > 1:
        width = 6.4
        height = 2.7
    with open_canvas(
        "curve", width=width, height=height, panels=len(curves), columns=2, share="y"
    ) as canvas:
        handles: dict[str, Any] = {}
        drawn: list[str] = []
        for axes, (run_title, results, points) in zip(canvas.axes, curves, strict=True):
            student = next(iter(points.values()))[0].student
            for title, systems in points.items():
                _draw_curve(canvas, axes, systems, styles[title])
                drawn.append(title)
            for title, systems in _other_series(results, student).items():
                handles[title] = _draw_other(axes, systems, styles[title])
            counts = (s.training_rows or 0 for systems in points.values() for s in systems)
            ticks = thin_ticks(counts, width * 0.4, 0.5)
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{rows:,.0f}" for rows in ticks])
            axes.set_xticks([], minor=True)
            axes.set_xlabel("training rows")
            accuracy_axis(axes, "")
            if axes in canvas.first_column:
                axes.set_ylabel(rows_label(results))
            if len(curves) > 1:
                axes.set_title(shorten(run_title))
        entries = series_entries(runs, styles, drawn)
        entries += [(handles[title], shorten(title)) for title in styles if title in handles]
        canvas.legend(entries)
        caption = (
            "All methods were trained on the same nested subsets of the rows. "
            "Bands are 95% confidence intervals over test rows. Gray lines are floors."
        )
        return [canvas.finish("Accuracy against training rows", caption)]


def _by_student(run_title: str, names_run: bool, curves: Curve) -> list[tuple[str, Curve]]:
    """The curves of each panel with its title: those of each student, or all of them."""
    panels: dict[str, Curve] = {}
    for series, systems in curves.items():
        title = run_title
        student = systems[0].student
        if student is not None:
            title = f"{run_title}: {student}" if names_run else student
        panels.setdefault(title, {})[series] = systems
    return list(panels.items())


def _other_series(results: Results, student: str | None) -> Curve:
    """The teacher, external systems and floors of each series, by training rows; of those that
    belong to a student, this one's.
    """
    series: Curve = {}
    for system in results.systems:
        if system.kind != "student" and system.student in (None, student):
            series.setdefault(series_title(system), []).append(system)
    return {
        title: sorted(systems, key=lambda system: system.training_rows or 0)
        for title, systems in series.items()
    }


def _draw_other(axes: Any, systems: list[SystemResult], style: Style) -> Any:
    """A line without markers through floors of several subsets, else a level; its legend entry."""
    rows = [system.training_rows for system in systems]
    if len(systems) < 2 or not all(rows):
        return draw_level(axes, systems[-1], style)
    accuracies = [system.accuracy for system in systems]
    axes.plot(rows, accuracies, color=style.color, linestyle=style.line, linewidth=1.3)
    return line_handle(style.color, style.line, 1.3)


def _draw_curve(canvas: Canvas, axes: Any, systems: list[SystemResult], style: Style) -> None:
    rows = [system.training_rows or 0 for system in systems]
    accuracies = [system.accuracy for system in systems]
    lows, highs = zip(*(system.ci95 for system in systems), strict=True)
    axes.plot(rows, accuracies, color=style.color, linestyle=style.line)
    axes.fill_between(rows, lows, highs, color=style.color, alpha=0.13, linewidth=0)
    for system in systems:
        tooltip = f"{accuracy_tooltip(system)} with {count(system.training_rows or 0, 'row')}"
        draw_point(canvas, axes, system.training_rows or 0, system.accuracy, style, tooltip)


# --- break-even


def break_even(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """The teacher's price for every prediction against its bill for the training rows.

    Runs whose teachers cost the same, such as students of one teacher, share a figure.
    """
    groups: dict[tuple[tuple[float, float], ...], tuple[EvaluatedRun, list[str]]] = {}
    for title, run in zip(run_titles(runs), runs, strict=True):
        bills = tuple((bill.spent_usd, bill.teacher_usd_per_prediction) for bill, _ in _bills(run))
        if bills:
            groups.setdefault(bills, (run, []))[1].append(title)
    styles = series_styles(runs)
    if len(groups) == 1:
        ((run, _),) = groups.values()
        return [_draw_break_even("pay-off", "", run, styles)]
    return [
        _draw_break_even(f"pay-off-{number}", f": {', '.join(titles)}", run, styles)
        for number, (run, titles) in enumerate(groups.values(), 1)
    ]


def _draw_break_even(name: str, suffix: str, run: EvaluatedRun, styles: dict[str, Style]) -> Figure:
    bills = _bills(run)
    usd = bills[0][0].teacher_usd_per_prediction
    crossings = [bill.predictions for bill, _ in bills]
    ends = (max(1.0, min(crossings) / 50), max(crossings) * 50.0)
    with open_canvas(name) as canvas:
        (axes,) = canvas.axes
        axes.plot(ends, [usd * end for end in ends], color=INK, linestyle=_TEACHER_DASHES)
        teacher = f"calling the teacher, {dollars(1000 * usd)} per 1,000"
        entries = [(line_handle(INK, _TEACHER_DASHES), teacher)]
        for bill, names in bills:
            system = run.results.system(bill.system)
            style = GREY if system is None else styles[series_title(system)]
            axes.plot(ends, [bill.spent_usd] * 2, color=style.color, linestyle=style.line)
            predictions = count(bill.predictions, "prediction")
            spent = dollars(bill.spent_usd)
            tooltip = f"{', '.join(names)}: {spent}, recovered after {predictions}"
            draw_point(canvas, axes, bill.predictions, usd * bill.predictions, style, tooltip)
            who = shorten(names[0])
            if len(names) > 1:
                who += f" and {len(names) - 1} more"
            entries.append((legend_handle(style), f"{who}, {spent} once"))
        first = bills[0][0]
        axes.annotate(  # nothing is drawn to the left of the crossing, above its line
            count(first.predictions, "prediction"),
            (first.predictions, first.spent_usd),
            (-8, 5),
            textcoords="offset points",
            ha="right",
        )
        heights = [*(bill.spent_usd for bill, _ in bills), usd * ends[0], usd * ends[1]]
        log_axis(axes.xaxis, ends, lambda value, _: f"{value:,.0f}")
        log_axis(axes.yaxis, (min(heights), max(heights)), lambda value, _: dollars(value))
        axes.set(xlabel="predictions", ylabel="total paid to the teacher (US dollars)")
        axes.grid()
        canvas.legend(entries)
        caption = (
            "The cost of calling the teacher for every prediction, against its one-time bill for "
            "the training rows. Distillation has paid for itself where the lines cross. The cost "
            "of training and running the student is not included."
        )
        return canvas.finish(f"Break-even{suffix}", caption)


def _bills(run: EvaluatedRun) -> list[tuple[BreakEven, list[str]]]:
    """The bills for the largest subset of rows, the headline's first, each with its systems."""
    systems = {system.name for system in full_data_systems(run.results.systems)}
    bills: dict[float, tuple[BreakEven, list[str]]] = {}
    headline = run.results.headline
    for bill in sorted(run.results.break_even, key=lambda bill: bill.system != headline):
        amounts = (bill.spent_usd, bill.teacher_usd_per_prediction, bill.predictions)
        if bill.system in systems and min(amounts) > 0:
            bills.setdefault(bill.spent_usd, (bill, []))[1].append(bill.system)
    return list(islice(bills.values(), _MAX_BILLS))


# --- training curves


def training_curves(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """For each run a panel of losses for each series, and one with all validation accuracies."""
    figures = []
    styles = series_styles(runs)
    for (name, suffix), run in zip(figure_names("training", runs), runs, strict=True):
        logs = {}
        for system in full_data_systems(run.results.systems):
            lines = _logged_lines(run, system)
            if lines and system.kind == "student":
                logs[series_title(system)] = lines
        if logs:
            ordered = {title: logs[title] for title in styles if title in logs}
            figures.append(_draw_training(name, suffix, styles, ordered))
    return figures


def _draw_training(
    name: str, suffix: str, styles: dict[str, Style], logs: dict[str, dict[str, list[Line]]]
) -> Figure:
    from matplotlib.ticker import MaxNLocator

    validated = [title for title, lines in logs.items() if "eval_accuracy" in lines]
    losses = _LOSSES | _other_losses(logs)
    last_step = max(
        step
        for lines in logs.values()
        for seeds in lines.values()
        for steps, _ in seeds
        for step in steps
    )
    panels = len(logs) + bool(validated)
    with open_canvas(name, width=6.4, height=2.2, panels=panels, columns=2) as canvas:
        limits = _loss_limits(logs, losses)
        for axes, (title, lines) in zip(canvas.axes, logs.items(), strict=False):
            axes.set_title(shorten(title))
            _draw_losses(axes, lines, losses, styles[title].color)
            if axes in canvas.first_column:
                axes.set_ylabel("loss in nats per token")
            if limits and limits[1] >= 5 * limits[0]:
                log_axis(axes.yaxis, (limits[0] / 1.15, limits[1] * 1.15))
            elif limits:
                axes.set_ylim(limits[0] * 0.95, limits[1] * 1.05)
            axes.grid(axis="y")
        if validated:
            axes = canvas.axes[-1]
            axes.set_title("validation accuracy")
            for title in validated:
                _draw_accuracy(axes, logs[title]["eval_accuracy"], styles[title])
            accuracy_axis(axes, "")
        for axes in canvas.axes:
            axes.set_xlim(0, last_step * 1.02)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            if axes in canvas.last_row:
                axes.set_xlabel("step")
        drawn = [key for key in losses if any(key in lines for lines in logs.values())]
        entries = [
            (line_handle(MUTE, dashes, 1.4), shorten(text))
            for text, dashes in (losses[key] for key in drawn)
        ]
        entries += [(legend_handle(styles[title]), shorten(title)) for title in validated]
        canvas.legend(entries)
        caption = (
            "Means over seeds, up to the step that all of them reached; faint lines are single "
            "seeds. Students of the largest subset of the rows. Label and rationale losses are of "
            "different texts."
        )
        if set(drawn) - set(_LOSSES):
            caption += " Losses of additional terms are unweighted, each in its own unit."
        return canvas.finish(f"Training curves{suffix}", caption)


def _draw_losses(
    axes: Any, lines: dict[str, list[Line]], losses: dict[str, tuple[str, Any]], color: str
) -> None:
    for key, (_, dashes) in losses.items():
        seeds = lines.get(key, [])
        if len(seeds) > 1:
            for seed in seeds:
                axes.plot(*_thin(seed), color=color, linewidth=0.5, alpha=0.35)
        axes.plot(*_thin(_mean(seeds)), color=color, linestyle=dashes, linewidth=1.4)


def _draw_accuracy(axes: Any, seeds: list[Line], style: Style) -> None:
    steps, accuracies = _thin(_mean(seeds))
    axes.plot(
        steps,
        accuracies,
        linestyle=style.line,
        linewidth=1.2,
        **marker_settings(style),
        markevery=max(1, len(steps) // 8),
    )


def _loss_limits(
    logs: dict[str, dict[str, list[Line]]], losses: dict[str, tuple[str, Any]]
) -> tuple[float, float] | None:
    """The smallest and the largest loss that is drawn."""
    values = [
        value
        for lines in logs.values()
        for key in losses
        for seed in lines.get(key, ())
        for value in _thin(seed)[1]
    ]
    return (min(values), max(values)) if values else None


def _other_losses(logs: dict[str, dict[str, list[Line]]]) -> dict[str, tuple[str, Any]]:
    """Names and dashes of the losses that ``_LOSSES`` does not have."""
    keys = dict.fromkeys(key for lines in logs.values() for key in lines)
    other_keys = [key for key in keys if key not in _LOSSES and key != "eval_accuracy"]
    return {
        key: (
            f"{key.removesuffix('_loss')} loss, training",
            _OTHER_DASHES[number % len(_OTHER_DASHES)],
        )
        for number, key in enumerate(other_keys)
    }


def _logged_lines(run: EvaluatedRun, system: SystemResult) -> dict[str, list[Line]]:
    """The logged losses and accuracies of a system's students, a line for each seed."""
    lines: dict[str, list[Line]] = {}
    for member in run.members(system):
        by_key: dict[str, Line] = {}
        for row in run.metrics(member):
            for key, value in row.items():
                if _is_drawable(key, value):
                    steps, values = by_key.setdefault(key, ([], []))
                    steps.append(float(row["step"]))
                    values.append(float(value))
        for key, line in by_key.items():
            lines.setdefault(key, []).append(line)
    return lines


def _is_drawable(key: str, value: Any) -> bool:
    """A finite accuracy, or a finite loss above zero, which has a logarithm."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return False
    return key == "eval_accuracy" or (key.endswith("_loss") and value > 0)


def _thin(line: Line) -> Line:
    """At most ``_MAX_POINTS`` points, each the mean of its neighbors."""
    steps, values = line
    width = -(-len(steps) // _MAX_POINTS) or 1
    starts = range(0, len(steps), width)
    return (
        [float(np.mean(steps[start : start + width])) for start in starts],
        [float(np.mean(values[start : start + width])) for start in starts],
    )


def _mean(seeds: list[Line]) -> Line:
    """The mean over seeds at the steps that all have: over fewer it would jump as seeds end."""
    if not seeds:
        return [], []
    steps = sorted(set.intersection(*(set(steps) for steps, _ in seeds)))
    values = [dict(zip(*line, strict=True)) for line in seeds]
    return steps, [float(np.mean([by_step[step] for by_step in values])) for step in steps]
