"""Confidence: risk-coverage curves, and what a student can take over from its teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsbs.formatting import dollars, percent
from dsbs.records.measures import Cascade
from dsbs.reporting.figures.canvas import MUTE, Canvas, Figure, open_canvas, shorten
from dsbs.reporting.figures.style import (
    Style,
    draw_point,
    figure_names,
    legend_handle,
    line_handle,
    main_systems,
    percent_axis,
    series_styles,
)
from dsbs.reporting.runs import EvaluatedRun, full_data_systems, series_title

_TARGET_DASHES = (0, (2, 2))
_MAX_CASCADES = 6


def risk_figure(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """For each run the share of wrong answers among those that a system is surest of."""
    figures = []
    styles = series_styles(runs)
    for (name, suffix), run in zip(figure_names("risk", runs), runs, strict=True):
        systems = [system for system in main_systems(run.results) if system.selective]
        if not systems:
            continue
        with open_canvas(name) as canvas:
            (axes,) = canvas.axes
            entries = []
            for system in systems:
                assert system.selective is not None
                style = styles[series_title(system)]
                axes.plot(*zip(*system.selective.curve, strict=True), color=style.color,
                          linestyle=style.line)  # fmt: skip
                area = system.selective.measures["aurc"].value
                entries.append((line_handle(style.color, style.line), _entry(style, area)))
            axes.set(xlim=(0, 1.02), xlabel="share of the rows answered, the surest first")
            axes.set_ylim(bottom=0)
            axes.set_ylabel(f"wrong answers among them, on {run.results.split}")
            percent_axis(axes.xaxis)
            percent_axis(axes.yaxis)
            axes.grid()
            canvas.legend(entries)
            caption = (
                "The risk-coverage curve of each system, averaged over seeds. A system whose "
                "confidence says nothing has a level line. AURC is the area under the curve."
            )
            figures.append(canvas.finish(f"Risk and coverage{suffix}", caption))
    return figures


def _entry(style: Style, area: float) -> str:
    return f"{shorten(style.title)}, AURC {area:.3f}"


def cascade_figure(runs: Sequence[EvaluatedRun]) -> list[Figure]:
    """For each run agreement and accuracy, and cost if known, against the student's share."""
    figures = []
    styles = series_styles(runs)
    for (name, suffix), run in zip(figure_names("cascade", runs), runs, strict=True):
        cascades = _main_cascades(run)
        if cascades:
            figures.append(_draw_cascades(name, suffix, cascades, styles))
    return figures


def _main_cascades(run: EvaluatedRun) -> list[tuple[str, Cascade]]:
    """The first cascade of each system, the headline's first, with the title of its series."""
    systems = {system.name: system for system in full_data_systems(run.results.systems)}
    first: dict[str, Cascade] = {}
    headline = run.results.headline
    for cascade in sorted(run.results.cascades, key=lambda cascade: cascade.system != headline):
        if cascade.system in systems and cascade.curve:
            first.setdefault(cascade.system, cascade)
    chosen = list(first.items())[:_MAX_CASCADES]
    return [(series_title(systems[name]), cascade) for name, cascade in chosen]


def _draw_cascades(
    name: str, suffix: str, cascades: Sequence[tuple[str, Cascade]], styles: dict[str, Style]
) -> Figure:
    measures = ["agreement", "accuracy"]
    if any(cascade.usd_per_1000 is not None for _, cascade in cascades):
        measures.append("usd_per_1000")
    with open_canvas(name, height=2.5, panels=len(measures), share="x") as canvas:
        for axes, measure in zip(canvas.axes, measures, strict=True):
            for title, cascade in cascades:
                _draw_cascade(canvas, axes, cascade, measure, styles[title])
            _label_axis(axes, measure)
            axes.grid()
        first = cascades[0][1]
        entries = [(legend_handle(styles[title]), shorten(title)) for title, _ in cascades]
        if first.target is not None:
            axes = canvas.axes[measures.index(first.of)]
            axes.axhline(first.target, color=MUTE, linestyle=_TARGET_DASHES, linewidth=1)
            entries.append((line_handle(MUTE, _TARGET_DASHES, 1), "target"))
        canvas.axes[-1].set(xlim=(0, 1.02), xlabel="share of the requests answered by the student")
        percent_axis(canvas.axes[-1].xaxis)
        canvas.legend(entries)
        caption = (
            "Each student in front of its teacher, on the test rows, from the strictest threshold "
            "(left) to none (right). The marker is the chosen threshold; a student without one "
            "has none. Agreement counts requests that the teacher answers as agreeing."
        )
        return canvas.finish(f"What the student could take over{suffix}", caption)


def _draw_cascade(canvas: Canvas, axes: Any, cascade: Cascade, measure: str, style: Style) -> None:
    points = [
        (point.coverage, value)
        for point in cascade.curve
        if (value := getattr(point, measure)) is not None
    ]
    if not points:
        return
    axes.plot(*zip(*points, strict=True), color=style.color, linestyle=style.line, linewidth=1.3)
    if cascade.threshold is None:
        return
    value = getattr(cascade, measure)
    if measure != "usd_per_1000":
        value = value.value
    text = dollars(value) if measure == "usd_per_1000" else percent(value)
    tooltip = (
        f"{shorten(cascade.student)}: answers {percent(cascade.coverage.value)}, "
        f"{measure.partition('_')[0]} {text}"
    )
    draw_point(canvas, axes, cascade.coverage.value, value, style, tooltip)


def _label_axis(axes: Any, measure: str) -> None:
    if measure == "usd_per_1000":
        axes.set_ylabel("dollars per 1,000 requests")
        axes.set_ylim(bottom=0)
        return
    labels = {"agreement": "agreement with the teacher", "accuracy": "accuracy of the cascade"}
    axes.set_ylabel(labels[measure])
    percent_axis(axes.yaxis)
