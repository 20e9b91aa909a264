"""What systems get right, and whether they know it: reliability, and recall by label."""

from __future__ import annotations

from collections.abc import Sequence

from dsbs.reporting.figures.canvas import MUTE, Figure, drawing, short
from dsbs.reporting.figures.style import MOST, Look, handle, leading, looks, marked, percents, point
from dsbs.reporting.gather import Run
from dsbs.reporting.naming import run_titles, series_title

_LABELS = 30  # in one figure
_ROOMY, _CROWD = 8, 4  # up to so many labels have intervals; beyond, so many systems


def reliability(runs: Sequence[Run]) -> list[Figure]:
    """For each run the share that was right against the probability that the system gave its label."""
    found = []
    for number, (title, run) in enumerate(zip(run_titles(runs), runs, strict=True), 1):
        systems = [
            system for system in leading(run.results) if any(one.n for one in system.calibration)
        ]
        if not systems:
            continue
        several, styles = len(runs) > 1, looks(runs)
        most = max(one.n for system in systems for one in system.calibration)
        with drawing(
            f"reliability-{number}" if several else "reliability", width=5.0, height=4.6
        ) as sheet:
            (axes,) = sheet.axes
            axes.plot([0, 1], [0, 1], color=MUTE, linestyle=(0, (2, 2)), linewidth=1)
            axes.text(
                0.04,
                0.06,
                "calibrated",
                color=MUTE,
                fontsize=8.5,
                rotation=45,
                rotation_mode="anchor",
            )
            entries = []
            for system in systems:
                look = styles[series_title(system)]
                bins = [one for one in system.calibration if one.n]
                line = [one.confidence for one in bins], [one.accuracy for one in bins]
                axes.plot(*line, color=look.color, linestyle=look.line, linewidth=1, alpha=0.6)
                for one in bins:
                    style = marked(look) | {
                        "markersize": 3 + 9 * (one.n / most) ** 0.5
                    }  # the area tells how many
                    (dot,) = axes.plot(
                        [one.confidence], [one.accuracy], linestyle="none", alpha=0.85, **style
                    )
                    held = f"{one.n:,} predictions from {one.low:g} to {one.high:g}"
                    sheet.tip(
                        dot,
                        f"{short(system.name)}: {held}, {100 * one.confidence:.1f} % sure, {100 * one.accuracy:.1f} % right",
                    )
                ece = system.metrics.get("ece")
                entries.append(
                    (
                        handle(look),
                        short(look.title) + ("" if ece is None else f", ECE {ece.value:.3f}"),
                    )
                )
            axes.set(
                xlim=(0, 1.02),
                ylim=(0, 1.02),
                xlabel="probability given to the label",
                ylabel="share that was right",
            )
            axes.set_aspect("equal")
            percents(axes.xaxis)
            percents(axes.yaxis)
            axes.grid()
            sheet.legend(entries)
            said = (
                f"Rows of {run.results.split} in bins of the label's probability; a larger marker holds more. Below the "
                "diagonal a system is surer than it is right. ECE, expected calibration error: their mean distance from it."
            )
            found.append(sheet.finish("Reliability" + (f": {title}" if several else ""), said))
    return found


def recall(runs: Sequence[Run]) -> list[Figure]:
    """For each run the recall of every label of a closed set, a dot for each system, with its interval where there is room."""
    found, styles = [], looks(runs)
    for number, (title, run) in enumerate(zip(run_titles(runs), runs, strict=True), 1):
        several = len(runs) > 1
        rows = {
            label: measure.n
            for system in run.results.systems
            for label, measure in system.recall.items()
        }
        if rows:
            name = f"recall-{number}" if several else "recall"
            found.append(_recall(name, f": {title}" if several else "", run, rows, styles))
    return found


def _recall(name: str, of: str, run: Run, rows: dict[str, int], styles: dict[str, Look]) -> Figure:
    labels = sorted(sorted(rows, key=lambda label: -rows[label])[:_LABELS], key=list(rows).index)
    crowded = len(labels) > _ROOMY
    systems = [
        system for system in leading(run.results, _CROWD if crowded else MOST) if system.recall
    ]
    gap = (0.5 if crowded else 0.7) / len(systems)
    line_height = 0.28 if crowded else 0.2 + 0.13 * len(systems)
    with drawing(name, height=0.9 + len(labels) * line_height) as sheet:
        (axes,) = sheet.axes
        for place, system in enumerate(systems):
            for line, label in enumerate(labels):
                if label in system.recall:
                    measure = system.recall[label]
                    y = line + gap * (place - (len(systems) - 1) / 2)
                    tip = f"{short(system.name)}: {100 * measure.value:.1f} % of {measure.n:,} rows of {short(label)}"
                    ends = None if crowded else measure.ci95
                    point(
                        sheet,
                        axes,
                        measure.value,
                        y,
                        styles[series_title(system)],
                        tip,
                        x_span=ends,
                    )
        for line in range(1, len(labels)):
            axes.axhline(line - 0.5, color=MUTE, linewidth=0.4, alpha=0.5)
        axes.set(ylim=(len(labels) - 0.5, -0.5), xlabel=f"recall on {run.results.split}")
        axes.set_yticks(
            range(len(labels)), [f"{short(label, 24)} ({rows[label]:,})" for label in labels]
        )
        axes.tick_params(axis="y", length=0)
        percents(axes.xaxis)
        axes.grid(axis="x")
        sheet.legend(
            [(handle(styles[series_title(s)], line=False), short(series_title(s))) for s in systems]
        )
        said = "The share of each label's rows that a system labels so; how many there are stands in brackets."
        said += "" if crowded else " Bars are 95 % intervals."
        if len(labels) < len(rows):
            said += f" The {len(labels)} labels with the most rows, of {len(rows)}."
        return sheet.finish(f"Recall by label{of}", said)
