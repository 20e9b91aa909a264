"""How series look, and how their numbers are put on axes: the same in every figure of a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dsbs.config.terms import base_of, names_of_terms
from dsbs.records.results import Interval, Results, SystemResult
from dsbs.reporting.figures.canvas import INK, PAPER, Sheet, short
from dsbs.reporting.gather import Run
from dsbs.reporting.naming import run_titles, series_title, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 6  # systems in one panel
# Distinct to colour-blind eyes (Okabe and Ito, 2008), each with a marker of its own for grey.
_COLORS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "p", "h", "d")
_METHODS = (
    "finetune",
    "distill",
    "step-by-step",
    "rationale-then-label",
    "label-then-rationale",
)  # have their own look
# What a method with terms is drawn as, in its base's colour: the terms by their own names first, in this order, then the rest.
_TERMS = ("response", "labels", "feature", "relation")
_STARS: tuple[Any, ...] = tuple(
    (corners, 1, turn) for turn in (0, 45) for corners in (4, 3, 6, 5, 8, 7)
)  # as no other has
_TERM_LINE = (0, (6, 1.2, 1.2, 1.2))
FILLS = ("full", "none", "left", "bottom", "right", "top")  # of markers, by run


@dataclass(frozen=True, slots=True)
class Look:
    """Of one series: the students of one method and label source, the teacher, or an outside system."""

    title: str
    color: str
    marker: Any  # a name of matplotlib's, or (corners, 1, turn) of a star
    line: Any = "-"


def looks(runs: Sequence[Run]) -> dict[str, Look]:
    """A look for the title of every series, in the order in which legends name them."""
    methods: dict[str, str] = {}  # title -> method
    for run in runs:
        for system in run.results.systems:
            methods.setdefault(
                series_title(system), "teacher" if system.kind == "teacher" else system.method or ""
            )
    order = sorted(
        methods,
        key=lambda title: (_rank(methods[title]), len(names_of_terms(methods[title])), title),
    )
    free = [*range(len(_METHODS), len(_COLORS)), *range(len(_COLORS), len(_COLORS) + len(order))]
    taken: set[str] = set()
    stars: dict[str, set[int]] = {}  # places taken, by base
    found = {}
    for title in order:
        method = methods[title]
        if method == "teacher":
            found[title] = Look(title, INK, "*", (0, (6, 3)))
            continue
        base, terms = base_of(method), "+".join(names_of_terms(method))
        if terms and base in _METHODS:
            used = stars.setdefault(base, set())
            place = _TERMS.index(terms) if terms in _TERMS and method not in taken else _rest(used)
            used.add(place)
            taken.add(method)
            found[title] = Look(
                title, _COLORS[_METHODS.index(base)], _STARS[place % len(_STARS)], _TERM_LINE
            )
            continue
        place = free.pop(0) if method in taken or method not in _METHODS else _METHODS.index(method)
        taken.add(method)
        found[title] = sign(title, place)
    return found


def sign(title: str, place: int) -> Look:
    """One of the looks that are there, in their order."""
    line: Any = "-" if place < len(_COLORS) else (0, (3, 1.2))
    return Look(title, _COLORS[place % len(_COLORS)], _MARKERS[place % len(_MARKERS)], line)


def _rest(used: set[int]) -> int:
    """The first place behind the terms' own that nothing has."""
    return next(
        place for place in range(len(_TERMS), len(_TERMS) + len(used) + 1) if place not in used
    )


def _rank(method: str) -> int:
    base = base_of(method)  # a method with terms follows its base
    return len(_METHODS) + (method == "teacher") if base not in _METHODS else _METHODS.index(base)


def leading(results: Results, most: int = MOST) -> list[SystemResult]:
    """The systems that a crowded figure is left with: the headline, its baselines, the teacher, then the most accurate."""
    systems = whole(results.systems)
    head = results.system(results.headline)
    first = {results.headline, results.baseline, *(head.versus if head else ())}
    chosen = sorted(
        systems, key=lambda one: (one.name not in first, one.kind != "teacher", -one.accuracy)
    )[:most]
    return sorted(chosen, key=systems.index)


def point(
    sheet: Sheet,
    axes: Axes,
    x: float,
    y: float,
    look: Look,
    tip: str,
    *,
    x_span: Interval | None = None,
    y_span: Interval | None = None,
    fill: str = "full",
) -> None:
    """A marker with what its intervals reach over, saying ``tip``."""
    bars: dict[str, Any] = {}
    for name, value, ends in (("xerr", x, x_span), ("yerr", y, y_span)):
        if ends is not None:  # an end on the wrong side of its value is a rounding error
            bars[name] = [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]]
    drawn = axes.errorbar(
        [x], [y], **bars, fmt="none", ecolor=look.color, elinewidth=1.2, capsize=2.5
    )
    drawn.set_label("_")
    (marker,) = axes.plot([x], [y], **marked(look, fill), linestyle="none")
    sheet.tip(marker, tip)


def marked(look: Look, fill: str = "full") -> dict[str, Any]:
    """Keywords of a line's markers: an edge of paper parts those that lie on each other."""
    half = (
        {"fillstyle": fill, "markerfacecoloralt": PAPER}
        if fill != "none"
        else {"markerfacecolor": PAPER}
    )
    edge = PAPER if fill == "full" else look.color
    size = 9 if look.marker == "*" else 6.5
    return {
        "color": look.color,
        "marker": look.marker,
        "markersize": size,
        "markeredgecolor": edge,
        "markeredgewidth": 0.8,
    } | half


def handle(look: Look, *, line: bool = True, fill: str = "full") -> Any:
    """A legend's picture of a series."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle=look.line if line else "none", **marked(look, fill))


def level(axes: Axes, system: SystemResult, look: Look) -> Any:
    """A system that has no place on the axis, as a line over all of it with its interval. Returns a legend's picture of it."""
    from matplotlib.lines import Line2D

    axes.axhspan(*system.ci95, color=look.color, alpha=0.1, linewidth=0)
    axes.axhline(system.accuracy, color=look.color, linestyle=look.line, linewidth=1.3)
    return Line2D([], [], color=look.color, linestyle=look.line, linewidth=1.3)


def teachers(axes: Axes, runs: Sequence[Run], styles: dict[str, Look]) -> list[tuple[Any, str]]:
    """A level for each teacher, once where runs share it."""
    found: dict[tuple[float, float, float], tuple[SystemResult, list[str]]] = {}
    for title, run in zip(run_titles(runs), runs, strict=True):
        for system in run.results.systems:
            if system.kind == "teacher":
                found.setdefault((system.accuracy, *system.ci95), (system, []))[1].append(title)
    entries = []
    for place, (system, titles) in enumerate(found.values()):
        look = Look(
            system.name, styles[series_title(system)].color, "*", (0, (6, 3, *(1, 3) * place))
        )
        name = system.name if len(found) == 1 else f"{system.name} ({', '.join(titles)})"
        entries.append((level(axes, system, look), short(name)))
    return entries


def percents(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))


def shares(axes: Axes, label: str) -> None:
    """The upright axis of accuracies, with a grid."""
    percents(axes.yaxis)
    axes.set_ylabel(label)
    axes.grid(axis="y")


def log_axis(axis: Any, ends: Interval, form: Any = "{x:g}") -> None:
    """A logarithmic axis with readable numbers at 1, 2 and 5; ``ends`` should be a factor of four apart."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": ends})
    low, high = math.log10(ends[0]), math.log10(ends[1])
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    every = max(1, math.ceil((high - low) / 7))
    powers = range(math.floor(low), math.ceil(high) + 1, every)
    ticks = [
        step * 10.0**power
        for power in powers
        for step in steps
        if low <= math.log10(step * 10.0**power) <= high
    ]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(form)


def thinned(values: Iterable[float], inches: float, each: float) -> list[float]:
    """Of sorted values on a logarithmic axis of so many inches those that leave ``each`` inches for a number, ends first."""
    ordered = sorted(set(values))
    if len(ordered) < 2:
        return ordered
    low, high = ordered[0], ordered[-1]
    gap = math.log(high / low) * each / inches
    kept = [low]
    for value in ordered[1:-1]:
        if math.log(value / kept[-1]) >= gap and math.log(high / value) >= gap:
            kept.append(value)
    return [*kept, high]


def beside(values: Sequence[float], each: float) -> list[float]:
    """Values for a logarithmic axis, each apart from its neighbours by a factor of ``each`` where they would hide one another.

    Those that lie closer make a group, which is spread about its middle in the given order.
    """
    placed = list(values)
    group: list[int] = []
    for place in sorted(range(len(values)), key=values.__getitem__):
        if group and values[place] >= values[group[-1]] * each:
            _spread(placed, values, group, each)
            group = []
        group.append(place)
    _spread(placed, values, group, each)
    return placed


def _spread(
    placed: list[float], values: Sequence[float], group: Sequence[int], each: float
) -> None:
    middle = math.exp(sum(math.log(values[place]) for place in group) / max(1, len(group)))
    for slot, place in enumerate(sorted(group) if len(group) > 1 else ()):
        placed[place] = middle * each ** (slot - (len(group) - 1) / 2)


def told(system: SystemResult) -> str:
    """A system's accuracy for a tip."""
    return f"{short(system.name)}: {100 * system.accuracy:.1f} % ({100 * system.ci95[0]:.1f} to {100 * system.ci95[1]:.1f})"


def where(results: Results) -> str:
    return f"accuracy on {results.split} ({results.n:,} rows)"
