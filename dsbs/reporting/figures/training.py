"""What training looked like: the loss of each task against the step, and accuracy on valid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dsbs.records.results import SystemResult
from dsbs.reporting.figures.canvas import MUTE, Figure, drawing, short
from dsbs.reporting.figures.style import Look, handle, log_axis, looks, marked, shares
from dsbs.reporting.gather import Run
from dsbs.reporting.naming import run_titles, series_title, whole

_POINTS = 80  # of a line; more steps are averaged
_LOSSES = {  # key of metrics.jsonl -> its name and how its line is drawn
    "label_loss": ("label loss, train", "-"),
    "rationale_loss": ("rationale loss, train", (0, (4, 1.5))),
    "rationale-then-label_loss": ("loss of both in one text, train", (0, (6, 1, 1, 1))),
    "label-then-rationale_loss": ("loss of both in one text, train", (0, (6, 1, 1, 1))),
    "eval_label_loss": ("label loss, valid", (0, (1, 1.2))),
}
_TERM_DASHES = (
    (0, (7, 1.5, 1, 1.5)),
    (0, (2.5, 1)),
    (0, (5, 1, 1, 1, 1, 1)),
    (0, (9, 2)),
    (0, (1, 2.5)),
)  # in their order
Line = tuple[list[float], list[float]]  # steps, values


def training(runs: Sequence[Run]) -> list[Figure]:
    """For each run a panel of losses for each series, and one with all accuracies on valid."""
    found = []
    for number, (title, run) in enumerate(zip(run_titles(runs), runs, strict=True), 1):
        systems = [system for system in whole(run.results.systems) if system.kind == "student"]
        logged = {
            series_title(system): lines for system in systems if (lines := _lines(run, system))
        }
        if logged:
            several = len(runs) > 1
            name = f"training-{number}" if several else "training"
            found.append(_draw(name, f": {title}" if several else "", looks(runs), logged))
    return found


def _draw(
    name: str, of: str, styles: dict[str, Look], logged: dict[str, dict[str, list[Line]]]
) -> Figure:
    from matplotlib.ticker import MaxNLocator

    order = [title for title in styles if title in logged]
    judged = [title for title in order if "eval_accuracy" in logged[title]]
    drawn = _LOSSES | _terms(logged)
    losses = [
        _shorter(line) for title in order for key in drawn for line in logged[title].get(key, ())
    ]
    last = max(
        step
        for lines in logged.values()
        for line in lines.values()
        for steps, _ in line
        for step in steps
    )
    values = [value for _, heights in losses for value in heights]
    with drawing(name, width=6.4, height=2.2, panels=len(order) + bool(judged), columns=2) as sheet:
        for axes, title in zip(sheet.axes, order, strict=False):
            axes.set_title(short(title))
            for key, (_, dashes) in drawn.items():
                seeds = logged[title].get(key, [])
                for seed in seeds if len(seeds) > 1 else []:
                    axes.plot(*_shorter(seed), color=styles[title].color, linewidth=0.5, alpha=0.35)
                axes.plot(
                    *_shorter(_mean(seeds)),
                    color=styles[title].color,
                    linestyle=dashes,
                    linewidth=1.4,
                )
            axes.set_ylabel("loss in nats per token" if axes in sheet.first_column else "")
            axes.set_xlim(0, last * 1.02)
            if values and max(values) >= 5 * min(values):
                log_axis(axes.yaxis, (min(values) / 1.15, max(values) * 1.15))
            elif values:
                axes.set_ylim(min(values) * 0.95, max(values) * 1.05)
            axes.grid(axis="y")
        if judged:
            axes = sheet.axes[-1]
            axes.set_title("accuracy on valid")
            for title in judged:
                steps, heights = _shorter(_mean(logged[title]["eval_accuracy"]))
                look = styles[title]
                axes.plot(
                    steps,
                    heights,
                    linestyle=look.line,
                    linewidth=1.2,
                    **marked(look),
                    markevery=_marks(steps),
                )
            axes.set_xlim(0, last * 1.02)
            shares(axes, "")
        for axes in sheet.axes:
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.set_xlabel("step" if axes in sheet.last_row else "")
        keys = [key for key in drawn if any(key in logged[title] for title in order)]
        grey = [
            (_stroke(dashes), short(name))
            for name, dashes in dict(drawn[key] for key in keys).items()
        ]
        sheet.legend([*grey, *((handle(styles[title]), short(title)) for title in judged)])
        said = "Means over seeds, as far as all of them went; faint lines are single seeds."
        said += " Students of the largest share of the rows. The losses of label and rationale are of different texts."
        if len(drawn) > len(_LOSSES):
            said += " Losses of further terms are not weighted, and each is in its own unit."
        return sheet.finish(f"Training curves{of}", said)


def _terms(logged: dict[str, dict[str, list[Line]]]) -> dict[str, tuple[str, Any]]:
    """The losses of further terms, as ``_LOSSES`` has the tasks'."""
    keys = dict.fromkeys(
        key for lines in logged.values() for key in lines if key not in (*_LOSSES, "eval_accuracy")
    )
    return {
        key: (f"{key.removesuffix('_loss')} loss, train", _TERM_DASHES[place % len(_TERM_DASHES)])
        for place, key in enumerate(keys)
    }


def _stroke(dashes: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=MUTE, linestyle=dashes, linewidth=1.4)


def _marks(steps: list[float]) -> int:
    return max(1, len(steps) // 8)


def _lines(run: Run, system: SystemResult) -> dict[str, list[Line]]:
    """The logged values of a system's students by name, a line for each seed."""
    found: dict[str, list[Line]] = {}
    for member in run.members(system):
        by_key: dict[str, Line] = {}
        for row in run.metrics(member):
            for key, value in row.items():
                if not (key.endswith("_loss") or key == "eval_accuracy"):
                    continue
                # no logarithm holds 0, and what training lost is no loss
                if (
                    isinstance(value, int | float)
                    and math.isfinite(value)
                    and (value > 0 or key == "eval_accuracy")
                ):
                    steps, values = by_key.setdefault(key, ([], []))
                    steps.append(float(row["step"]))
                    values.append(float(value))
        for key, line in by_key.items():
            found.setdefault(key, []).append(line)
    return found


def _shorter(line: Line) -> Line:
    """At most so many points, each the mean of as many neighbours."""
    steps, values = line
    each = -(-len(steps) // _POINTS) or 1
    cuts = range(0, len(steps), each)
    return [float(np.mean(steps[i : i + each])) for i in cuts], [
        float(np.mean(values[i : i + each])) for i in cuts
    ]


def _mean(seeds: list[Line]) -> Line:
    """Over seeds, where all of them have a value: a mean over fewer would jump as seeds end."""
    if not seeds:
        return [], []
    common = sorted(set.intersection(*(set(steps) for steps, _ in seeds)))
    values = [dict(zip(*line, strict=True)) for line in seeds]
    return common, [float(np.mean([one[step] for one in values])) for step in common]
