"""Compressed students: accuracy against megabytes and against milliseconds, and which of them nothing beats in both."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dsbs.formatting import milliseconds
from dsbs.records.compression import Compressed, Measurement
from dsbs.reporting.compression import UNCHANGED, by_original
from dsbs.reporting.figures.canvas import INK, MUTE, Figure, drawing, short
from dsbs.reporting.figures.style import FILLS, Look, handle, log_axis, point, shares, sign
from dsbs.reporting.gather import Run
from dsbs.reporting.naming import run_titles

_MOST = 12  # chains with a look of their own
_OTHERS = "other chains"
_FILLS = [fill for fill in FILLS if fill != "none"]  # by student; an empty marker was refused


@dataclass(frozen=True, slots=True)
class _Place:
    """A student on the frontier's plane: as trained (``chain`` None) or compressed."""

    student: str
    chain: str | None
    standing: Measurement
    ms: float | None  # for one row alone; None: not measured
    accepted: bool = True


def frontier(runs: Sequence[Run]) -> list[Figure]:
    """For each run accuracy against megabytes, and against the median time of one row alone where that was measured."""
    named = zip(run_titles(runs), runs, strict=True)
    shown = [
        (title, run)
        for title, run in named
        if any(one.original.megabytes > 0 for one in run.compressed)
    ]
    looks = _looks([one for _, run in shown for one in run.compressed])
    found = []
    for number, (title, run) in enumerate(shown, 1):
        several = len(runs) > 1
        name = f"frontier-{number}" if several else "frontier"
        found.append(_draw(name, f": {title}" if several else "", run, looks))
    return found


def _looks(records: Sequence[Compressed]) -> dict[str, Look]:
    """A look for each chain, the same for all students and runs of a page."""
    chains = list(dict.fromkeys(one.name for one in records))
    found = {chain: sign(chain, place) for place, chain in enumerate(chains[:_MOST])}
    return found | {chain: Look(_OTHERS, MUTE, "o") for chain in chains[_MOST:]}


def _draw(name: str, of: str, run: Run, looks: dict[str, Look]) -> Figure:
    places = _places(run)
    students = list(dict.fromkeys(place.student for place in places))
    fills = {student: _FILLS[number % len(_FILLS)] for number, student in enumerate(students)}
    sizes = [(place, place.standing.megabytes) for place in places if place.standing.megabytes > 0]
    times = [(place, time) for place in places if (time := place.ms) is not None and time > 0]
    panels = [(sizes, "megabytes on disk"), (times, "ms for one row alone, median")]
    panels = [(placed, label) for placed, label in panels if placed]
    with drawing(name, height=2.7, panels=len(panels)) as sheet:
        for axes, (placed, label) in zip(sheet.axes, panels, strict=True):
            taken = [(x, place.standing.accuracy) for place, x in placed if place.accepted]
            best = [taken[i] for i in frontier_of(taken)]
            axes.plot(*zip(*sorted(best), strict=True), color=MUTE, linewidth=1, zorder=1)
            values = [x for _, x in placed]
            ends = (min(values) / 1.3, max(values) * 1.6)
            for place, x in placed:
                fill = fills[place.student] if place.accepted else "none"
                point(
                    sheet,
                    axes,
                    x,
                    place.standing.accuracy,
                    _look(place, looks),
                    _told(place),
                    fill=fill,
                )
                if place.accepted and (x, place.standing.accuracy) in best:
                    words = short(place.chain or UNCHANGED, 30)
                    side, shift = (
                        ("right", -6)
                        if math.log(x / ends[0]) > 0.75 * math.log(ends[1] / ends[0])
                        else ("left", 6)
                    )
                    where = (
                        (x, place.standing.accuracy),
                        (shift, -9),
                    )  # below the line, which rises to the right
                    axes.annotate(
                        words, *where, textcoords="offset points", fontsize=8, color=INK, ha=side
                    )
            log_axis(axes.xaxis, ends)
            axes.margins(y=0.12)
            axes.set_xlabel(label)
            rows = " or ".join(f"{count:,}" for count in sorted({one.n for one in run.compressed}))
            shares(axes, f"accuracy on valid ({rows} rows)")
        entries = {look.title: look for place in places for look in [_look(place, looks)]}
        pictures = [(handle(look, line=False), short(title)) for title, look in entries.items()]
        grey = Look("", MUTE, "o")
        if len(students) > 1:
            pictures += [
                (handle(grey, line=False, fill=fills[student]), short(student))
                for student in students
            ]
        if not all(place.accepted for place in places):
            pictures.append((handle(grey, line=False, fill="none"), "refused"))
        sheet.legend(pictures)
        said = (
            "Students as trained and as dsbs compress made them smaller. A line joins those that no other matches in accuracy "
            "while it is smaller, or faster; they bear their names. Differences within the table's intervals may be chance."
        )
        return sheet.finish(
            f"Accuracy against size and time{of}" if times else f"Accuracy against size{of}", said
        )


def _places(run: Run) -> list[_Place]:
    found: list[_Place] = []
    for records in by_original(run.compressed):
        before = records[0]
        time = before.original.median_ms(1)
        found.append(_Place(before.student, None, before.original, time))
        found += [
            _Place(one.student, one.name, one.compressed, _beside(time, one), one.accepted)
            for one in records
        ]
    return found


def _beside(original: float | None, one: Compressed) -> float | None:
    """Its time by its share of the original's, which was timed in turns with it: a busy machine slows both."""
    before, after = one.original.median_ms(1), one.compressed.median_ms(1)
    return after if not before or after is None or original is None else original * after / before


def frontier_of(points: Sequence[tuple[float, float]]) -> set[int]:
    """Places of the (cost, accuracy) points that no other is at least as good as in both and better in one."""
    return {
        i
        for i, (cost, accuracy) in enumerate(points)
        if not any(x <= cost and y >= accuracy and (x, y) != (cost, accuracy) for x, y in points)
    }


def _look(place: _Place, looks: dict[str, Look]) -> Look:
    return Look(UNCHANGED, INK, "*") if place.chain is None else looks[place.chain]


def _told(place: _Place) -> str:
    standing, time = place.standing, place.standing.median_ms(1)
    said = f"{short(place.student)}, {short(place.chain or UNCHANGED)}: {100 * standing.accuracy:.1f} %"
    said += f", {standing.megabytes:,.2f} MB" + ("" if time is None else f", {milliseconds(time)}")
    return said if place.accepted else f"{said}, refused"
