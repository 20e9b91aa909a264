"""What accuracy costs: milliseconds of a student, dollars of a teacher. Two figures, as the two share no unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsbs.formatting import dollars, milliseconds
from dsbs.records.results import BreakEven, Latency, SystemResult
from dsbs.reporting.figures.canvas import INK, MUTE, Figure, drawing, short
from dsbs.reporting.figures.style import (
    FILLS,
    Look,
    beside,
    handle,
    log_axis,
    looks,
    point,
    shares,
    teachers,
    told,
    where,
)
from dsbs.reporting.gather import Run
from dsbs.reporting.naming import run_titles, series_title, whole

_BILLS = 4  # lines of what was spent, in one figure


def speed(runs: Sequence[Run]) -> list[Figure]:
    """Accuracy against the time of one prediction: the median at batch 1, with a bar to its 95th percentile."""
    timed = [
        (number, system, latency)
        for number, run in enumerate(runs)
        for system in whole(run.results.systems)
        if (latency := _alone(system)) is not None
    ]
    if not timed:
        return []
    styles, titles = looks(runs), [short(title) for title in run_titles(runs)]
    several = len({number for number, _, _ in timed}) > 1
    with drawing("speed") as sheet:
        (axes,) = sheet.axes
        times = [time for _, _, latency in timed for time in (latency.p50_ms, latency.p95_ms)]
        ends = (min(times) / 2, max(times) * 2)
        places = beside(
            [latency.p50_ms for _, _, latency in timed], (ends[1] / ends[0]) ** (1 / 45)
        )
        for x, (number, system, latency) in zip(places, timed, strict=True):
            taken = f"{milliseconds(latency.p50_ms)} (95 % within {milliseconds(latency.p95_ms)}) on {latency.device}"
            tip = f"{told(system)}, {taken}"
            spans: dict[str, Any] = {
                "x_span": (x, x * latency.p95_ms / latency.p50_ms),
                "y_span": system.ci95,
            }
            fill = FILLS[number % len(FILLS)]
            point(
                sheet,
                axes,
                x,
                system.accuracy,
                styles[series_title(system)],
                tip,
                fill=fill,
                **spans,
            )
        shown = {series_title(system) for _, system, _ in timed}
        entries = [
            (handle(look, line=False), short(title))
            for title, look in styles.items()
            if title in shown
        ]
        if several:
            grey = Look("", MUTE, "o")
            entries += [
                (handle(grey, line=False, fill=FILLS[n % len(FILLS)]), title)
                for n, title in enumerate(titles)
            ]
        entries += teachers(axes, runs, styles)
        log_axis(axes.xaxis, ends)
        devices = sorted({latency.device for _, _, latency in timed})
        axes.set_xlabel(f"ms for one row alone, on {short(', '.join(devices))}")
        shares(
            axes,
            where(runs[0].results)
            if len({where(run.results) for run in runs}) == 1
            else "accuracy",
        )
        sheet.legend(entries)
        said = (
            "A student's label for one row at a time: the marker is the median time, its bar to the right ends where 95 % of "
            "the calls were done; upright bars are 95 % intervals of accuracy. Students of the largest share of the rows; "
            "those of nearly equal times stand side by side. A teacher has no place on this axis: its time is not measured."
        )
        return [sheet.finish("Accuracy against time", said)]


def _alone(system: SystemResult) -> Latency | None:
    return next(
        (latency for latency in system.latency if latency.batch_size == 1 and latency.p50_ms > 0),
        None,
    )


def pay_off(runs: Sequence[Run]) -> list[Figure]:
    """What calling the teacher for each prediction adds up to, against what it was paid once for training.

    Runs whose teachers cost the same, as those of several students of one teacher do, share a figure.
    """
    groups: dict[tuple[tuple[float, float], ...], tuple[Run, list[str]]] = {}
    for title, run in zip(run_titles(runs), runs, strict=True):
        key = tuple((bill.spent_usd, bill.teacher_usd_per_prediction) for bill, _ in _bills(run))
        if key:
            groups.setdefault(key, (run, []))[1].append(title)
    styles, found = looks(runs), []
    for number, (run, titles) in enumerate(groups.values(), 1):
        name = f"pay-off-{number}" if len(groups) > 1 else "pay-off"
        of = f": {', '.join(titles)}" if len(groups) > 1 else ""
        found.append(_pay_off(name, of, run, styles))
    return found


def _pay_off(name: str, of: str, run: Run, styles: dict[str, Look]) -> Figure:
    bills = _bills(run)
    usd = bills[0][0].teacher_usd_per_prediction
    crossings = [bill.predictions for bill, _ in bills]
    ends = (max(1.0, min(crossings) / 50), max(crossings) * 50.0)
    with drawing(name) as sheet:
        (axes,) = sheet.axes
        axes.plot(ends, [usd * end for end in ends], color=INK, linestyle=(0, (6, 3)))
        entries = [
            (_stroke(INK, (0, (6, 3))), f"calling the teacher, {dollars(1000 * usd)} per 1,000")
        ]
        for place, (bill, names) in enumerate(bills):
            system = run.results.system(bill.system)
            look = (
                styles[series_title(system)] if system is not None else Look(bill.system, MUTE, "o")
            )
            axes.plot(ends, [bill.spent_usd] * 2, color=look.color, linestyle=look.line)
            tip = f"{', '.join(names)}: {dollars(bill.spent_usd)}, paid back after {bill.predictions:,} predictions"
            point(sheet, axes, bill.predictions, usd * bill.predictions, look, tip)
            more = "" if len(names) == 1 else f" and {len(names) - 1} more"
            entries.append(
                (handle(look), f"{short(names[0])}{more}, {dollars(bill.spent_usd)} once")
            )
            if place == 0:  # left of the crossing and above its line nothing is drawn
                words = f"{bill.predictions:,} predictions"
                axes.annotate(
                    words,
                    (bill.predictions, bill.spent_usd),
                    (-8, 5),
                    textcoords="offset points",
                    ha="right",
                )
        heights = [*(bill.spent_usd for bill, _ in bills), usd * ends[0], usd * ends[1]]
        log_axis(axes.xaxis, ends, lambda value, _: f"{value:,.0f}")
        log_axis(axes.yaxis, (min(heights), max(heights)), lambda value, _: dollars(value))
        axes.set(xlabel="predictions", ylabel="paid to the teacher, in all (US dollars)")
        axes.grid()
        sheet.legend(entries)
        said = (
            "What the teacher is paid when it answers every prediction, against its bill for the rows that students learned "
            "from. Where the lines cross, distilling has paid for itself. The student's own machine, in training and in use, "
            "has no price here."
        )
        return sheet.finish(f"Pay-off{of}", said)


def _bills(run: Run) -> list[tuple[BreakEven, list[str]]]:
    """What was spent on the largest share of the rows, the headline's first, with the systems that share it."""
    shown = {system.name for system in whole(run.results.systems)}
    found: dict[float, tuple[BreakEven, list[str]]] = {}
    for one in sorted(run.results.break_even, key=lambda one: one.system != run.results.headline):
        if (
            one.system in shown
            and one.spent_usd > 0
            and one.teacher_usd_per_prediction > 0
            and one.predictions > 0
        ):
            found.setdefault(one.spent_usd, (one, []))[1].append(one.system)
    return list(found.values())[:_BILLS]


def _stroke(color: str, dashes: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=dashes)
