"""Calibration and recall: how reliable a system's probabilities are, and its recall by label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsbs.formatting import count, percent
from dsbs.records.results import Bin, SystemResult
from dsbs.reporting.figures.canvas import MUTE, Canvas, Figure, open_canvas, shorten
from dsbs.reporting.figures.style import (
    MAX_SYSTEMS,
    Style,
    draw_point,
    figure_names,
    legend_handle,
    main_systems,
    marker_settings,
    percent_axis,
    series_styles,
)
from dsbs.reporting.runs import EvaluatedRun, series_title

_MAX_LABELS = 30  # in a figure of recall
_FEW_LABELS = 8  # up to so many labels have intervals
_MAX_SYSTEMS_MANY_LABELS = 4


def reliability_figure(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """For each run the share of correct labels against the probability that they were given."""
    figures = []
    styles = series_styles(runs)
    for (name, suffix), run in zip(figure_names("reliability", runs), runs, strict=True):
        systems = [
            system for system in main_systems(run.results) if any(b.n for b in system.calibration)
        ]
        if systems:
            figures.append(_draw_reliability(name, suffix, run, systems, styles))
    return figures


def _draw_reliability(
    name: str,
    suffix: str,
    run: EvaluatedRun,
    systems: Sequence[SystemResult],
    styles: dict[str, Style],
) -> Figure:
    largest = max(b.n for system in systems for b in system.calibration)
    with open_canvas(name, width=5.0, height=4.6) as canvas:
        (axes,) = canvas.axes
        axes.plot([0, 1], [0, 1], color=MUTE, linestyle=(0, (2, 2)), linewidth=1)
        text: dict[str, Any] = {"rotation": 45, "rotation_mode": "anchor"}
        axes.text(0.04, 0.06, "calibrated", color=MUTE, fontsize=8.5, **text)
        entries = []
        for system in systems:
            style = styles[series_title(system)]
            bins = [b for b in system.calibration if b.n]
            _draw_bins(canvas, axes, system.name, bins, largest, style)
            error = system.metrics.get("ece")
            title = shorten(style.title)
            if error is not None:
                title += f", ECE {error.value:.3f}"
            entries.append((legend_handle(style), title))
        axes.set(
            xlim=(0, 1.02),
            ylim=(0, 1.02),
            xlabel="probability of the label",
            ylabel="share of correct labels",
        )
        axes.set_aspect("equal")
        percent_axis(axes.xaxis)
        percent_axis(axes.yaxis)
        axes.grid()
        canvas.legend(entries)
        caption = (
            f"{run.results.split.capitalize()} rows in bins of the label's probability; a larger "
            "marker holds more rows. Below the diagonal a system is overconfident. ECE, the "
            "expected calibration error, is the mean distance from the diagonal: of each seed "
            "alone, then averaged. The markers show all seeds together."
        )
        return canvas.finish(f"Reliability{suffix}", caption)


def _draw_bins(
    canvas: Canvas, axes: Any, system: str, bins: Sequence[Bin], largest: int, style: Style
) -> None:
    confidences = [b.confidence for b in bins]
    accuracies = [b.accuracy for b in bins]
    axes.plot(
        confidences, accuracies, color=style.color, linestyle=style.line, linewidth=1, alpha=0.6
    )
    for b in bins:
        size = 3 + 9 * (b.n / largest) ** 0.5  # the marker's area grows with the rows
        settings = marker_settings(style) | {"markersize": size}
        (marker,) = axes.plot(
            [b.confidence], [b.accuracy], linestyle="none", alpha=0.85, **settings
        )
        canvas.tooltip(
            marker,
            f"{shorten(system)}: {count(b.n, 'prediction')} from {b.low:g} to {b.high:g}, "
            f"mean probability {percent(b.confidence)}, {percent(b.accuracy)} correct",
        )


def recall_figure(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """For each run the recall of every label of a closed set, a marker for each system."""
    figures = []
    styles = series_styles(runs)
    for (name, suffix), run in zip(figure_names("recall", runs), runs, strict=True):
        rows = {
            label: measure.n
            for system in run.results.systems
            for label, measure in system.recall.items()
        }
        if rows:
            figures.append(_draw_recall(name, suffix, run, rows, styles))
    return figures


def _draw_recall(
    name: str, suffix: str, run: EvaluatedRun, rows: dict[str, int], styles: dict[str, Style]
) -> Figure:
    frequent = sorted(rows, key=lambda label: -rows[label])[:_MAX_LABELS]
    labels = [label for label in rows if label in frequent]
    has_intervals = len(labels) <= _FEW_LABELS
    limit = MAX_SYSTEMS if has_intervals else _MAX_SYSTEMS_MANY_LABELS
    systems = [system for system in main_systems(run.results, limit) if system.recall]
    spacing = (0.7 if has_intervals else 0.5) / len(systems)
    row_height = 0.2 + 0.13 * len(systems) if has_intervals else 0.28
    with open_canvas(name, height=0.9 + len(labels) * row_height) as canvas:
        (axes,) = canvas.axes
        for number, system in enumerate(systems):
            offset = spacing * (number - (len(systems) - 1) / 2)
            style = styles[series_title(system)]
            for row, label in enumerate(labels):
                measure = system.recall.get(label)
                if measure is None:
                    continue
                tooltip = (
                    f"{shorten(system.name)}: {percent(measure.value)} of "
                    f"{count(measure.n, 'row')} with label {shorten(label)}"
                )
                ends = measure.ci95 if has_intervals else None
                draw_point(
                    canvas, axes, measure.value, row + offset, style, tooltip, x_interval=ends
                )
        for row in range(1, len(labels)):
            axes.axhline(row - 0.5, color=MUTE, linewidth=0.4, alpha=0.5)
        axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel=f"recall on {run.results.split}")
        axes.set_yticks(
            range(len(labels)), [f"{shorten(label, 24)} ({rows[label]:,})" for label in labels]
        )
        axes.tick_params(axis="y", length=0)
        percent_axis(axes.xaxis)
        axes.grid(axis="x")
        titles = [series_title(system) for system in systems]
        canvas.legend(
            [(legend_handle(styles[title], line=False), shorten(title)) for title in titles]
        )
        caption = (
            "The share of each label's rows that a system labels correctly; the number of rows is "
            "in brackets."
        )
        if has_intervals:
            caption += " Bars are 95% confidence intervals."
        if len(labels) < len(rows):
            caption += f" Only the {len(labels)} most frequent of {len(rows)} labels are shown."
        return canvas.finish(f"Recall by label{suffix}", caption)
