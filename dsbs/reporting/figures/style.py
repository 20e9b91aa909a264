"""Style: each series' color, marker and line, and the axes and points that figures share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from dsbs.config import registry
from dsbs.config.terms import base_of, names_of_terms
from dsbs.formatting import interval, percent
from dsbs.records.measures import Interval
from dsbs.records.results import Results, SystemResult
from dsbs.reporting.figures.canvas import INK, MUTE, PAPER, Canvas, shorten
from dsbs.reporting.runs import (
    EvaluatedRun,
    full_data_systems,
    method_title,
    run_titles,
    series_title,
    student_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_SYSTEMS = 6  # in one panel
# Distinct for color-blind readers (Okabe and Ito, 2008), each with its own marker for grayscale.
_PALETTE = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "<", ">", "p", "h", "d")
# Markers of methods with additional loss terms, in the order of the registry: (corners, 1, angle).
_STARS = tuple((corners, 1, angle) for angle in (0, 45) for corners in (4, 3, 6, 5, 8, 7))
_DASHED = (0, (3, 1.2))
_LONG_DASHED = (0, (6, 3))
_TERM_DASHES = (0, (6, 1.2, 1.2, 1.2))
_STUDENT_DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_FLOOR_DASHES = ((0, (1, 1.5)), (0, (4, 2)), (0, (4, 1.5, 1, 1.5)), (0, (8, 2, 1, 2)))
_FLOOR_MARKERS = ("1", "2", "3", "4")  # three-legged, unlike those of students
FILLS = ("full", "none", "left", "bottom", "right", "top")  # of markers, by run


@dataclass(frozen=True, slots=True)
class Style:
    """The style of a series: a method's students, the teacher, a floor, or an external system."""

    title: str
    color: str
    marker: Any
    """A name of matplotlib's, or (corners, 1, angle) for a star."""
    line: Any = "-"


GREY = Style("", MUTE, "o")


def series_styles(runs: Sequence[EvaluatedRun]) -> dict[str, Style]:
    """A style for the title of every series, in the order of legends.

    A registered method has the color of its record. With additional loss terms it keeps the color
    and gets a star as marker. A method's second source of labels, and external systems, get what is
    left of the palette. Floors are gray, each with dashes of its own. Of several students, each has
    a marker and dashes of its own, in the colors of the methods.
    """
    by_method = _method_styles(runs)
    names = student_names(runs)
    systems = [system for run in runs for system in run.results.systems]
    titles: dict[str, Style] = {}
    for method, style in by_method.items():
        for name in [None, *names]:
            for system in systems:
                if system.student == name and method_title(system) == method:
                    titles[series_title(system)] = _student_style(style, system, names)
    return titles


def _student_style(style: Style, system: SystemResult, names: Sequence[str]) -> Style:
    """A method's style for one of several students; otherwise as it is."""
    title = series_title(system)
    if system.student is None or system.kind != "student":
        return replace(style, title=title)
    marker, dashes = student_marks(names.index(system.student))
    return Style(title, style.color, marker, dashes)


def student_marks(number: int) -> tuple[Any, Any]:
    """The marker and the dashes of a student by its place in the recipe."""
    return _MARKERS[number % len(_MARKERS)], _STUDENT_DASHES[number % len(_STUDENT_DASHES)]


def _method_styles(runs: Sequence[EvaluatedRun]) -> dict[str, Style]:
    """A style for each method, teacher, floor and external system, in the order of legends."""
    methods: dict[str, str] = {}
    teachers = set()
    floors: list[str] = []
    for run in runs:
        for system in run.results.systems:
            title = method_title(system)
            methods.setdefault(title, system.method or "")
            if system.kind == "teacher":
                teachers.add(title)
            if system.kind == "floor" and title not in floors:
                floors.append(title)

    def rank(title: str) -> tuple[bool, bool, int, int, str]:
        return title in floors, title in teachers, *_legend_key(methods[title]), title

    order = sorted(methods, key=rank)
    colors = {name: registry.entry(registry.METHODS, name).color for name in registry.METHODS}
    free = _free_styles(set(colors.values()))
    stars: dict[str, list[int]] = {}  # by base method
    styled: set[str] = set()
    styles = {}
    for title in order:
        method = methods[title]
        base = base_of(method)
        if title in teachers:
            styles[title] = Style(title, INK, "*", _LONG_DASHED)
        elif title in floors:
            number = floors.index(title) % len(_FLOOR_DASHES)
            styles[title] = Style(title, MUTE, _FLOOR_MARKERS[number], _FLOOR_DASHES[number])
        elif base in colors and base != method:
            number = _star_number(method, stars.setdefault(base, []), is_first=method not in styled)
            star = _STARS[number % len(_STARS)]
            styles[title] = Style(title, colors[base], star, _TERM_DASHES)
        elif method in colors and method not in styled:
            number = list(registry.METHODS).index(method)
            styles[title] = Style(title, colors[method], _MARKERS[number % len(_MARKERS)])
        else:
            styles[title] = replace(next(free), title=title)
        styled.add(method)
    return styles


def _legend_key(method: str) -> tuple[int, int]:
    """Registered methods first, each followed by its variants with additional loss terms."""
    ranks = {name: rank for rank, name in enumerate(registry.METHODS)}
    return ranks.get(base_of(method), len(ranks)), len(names_of_terms(method))


def _free_styles(used_colors: set[str]) -> Iterator[Style]:
    """Styles with colors and markers that no registered method has, then dashed ones."""
    colors = [color for color in _PALETTE if color not in used_colors]
    for number in count():
        marker = _MARKERS[(len(registry.METHODS) + number) % len(_MARKERS)]
        if number < len(colors):
            yield Style("", colors[number], marker)
        else:
            yield Style("", _PALETTE[number % len(_PALETTE)], marker, _DASHED)


def _star_number(method: str, used: list[int], *, is_first: bool) -> int:
    """The number of a term's star: by the registry, or the next free one for a combination."""
    terms = "+".join(names_of_terms(method))
    registered = list(registry.TERMS)
    if is_first and terms in registered:
        number = registered.index(terms)
    else:
        number = next(number for number in count(len(registered)) if number not in used)
    used.append(number)
    return number


def numbered_style(title: str, number: int) -> Style:
    """One of an endless series of styles."""
    color = _PALETTE[number % len(_PALETTE)]
    marker = _MARKERS[number % len(_MARKERS)]
    return Style(title, color, marker, "-" if number < len(_PALETTE) else _DASHED)


def main_systems(results: Results, limit: int = MAX_SYSTEMS) -> list[SystemResult]:
    """Systems for a crowded figure: headline, its baselines, teacher, then the most accurate."""
    systems = full_data_systems(results.systems)
    head = results.system(results.headline)
    first = {results.headline, results.baseline}
    if head is not None:
        first |= set(head.versus)

    def priority(system: SystemResult) -> tuple[bool, int, float]:
        rank = {"teacher": 0, "floor": 2}.get(system.kind, 1)
        return system.name not in first, rank, -system.accuracy

    return sorted(sorted(systems, key=priority)[:limit], key=systems.index)


# --- points and lines


def draw_point(
    canvas: Canvas,
    axes: Axes,
    x: float,
    y: float,
    style: Style,
    tooltip: str,
    *,
    x_interval: Interval | None = None,
    y_interval: Interval | None = None,
    fill: str = "full",
) -> None:
    """A marker with its error bars and a tooltip."""
    bars: dict[str, Any] = {}
    for name, value, ends in (("xerr", x, x_interval), ("yerr", y, y_interval)):
        if ends is not None:  # an end on the wrong side of its value is a rounding error
            bars[name] = [[max(0.0, value - ends[0])], [max(0.0, ends[1] - value)]]
    error_bars = axes.errorbar(
        [x], [y], **bars, fmt="none", ecolor=style.color, elinewidth=1.2, capsize=2.5
    )
    error_bars.set_label("_")
    (marker,) = axes.plot([x], [y], **marker_settings(style, fill), linestyle="none")
    canvas.tooltip(marker, tooltip)


def marker_settings(style: Style, fill: str = "full") -> dict[str, Any]:
    """matplotlib keywords for markers. A full marker has an edge of paper, for overlaps."""
    settings = {
        "color": style.color,
        "marker": style.marker,
        "markersize": 9 if style.marker == "*" else 6.5,
        "markeredgecolor": PAPER if fill == "full" else style.color,
        "markeredgewidth": 0.8,
    }
    if style.marker in _FLOOR_MARKERS:  # three lines, which have nothing to fill
        return settings | {"markeredgecolor": style.color, "markeredgewidth": 1.2}
    if fill == "none":
        return settings | {"markerfacecolor": PAPER}
    return settings | {"fillstyle": fill, "markerfacecoloralt": PAPER}


def legend_handle(style: Style, *, line: bool = True, fill: str = "full") -> Any:
    """A series' entry in a legend."""
    from matplotlib.lines import Line2D

    return Line2D([], [], linestyle=style.line if line else "none", **marker_settings(style, fill))


def series_entries(
    runs: Sequence[EvaluatedRun],
    styles: dict[str, Style],
    titles: Iterable[str],
    *,
    line: bool = True,
) -> list[tuple[Any, str]]:
    """Legend entries for series, in the order of ``styles``.

    Of several students, one for each method's color and one for each student's marker.
    """
    drawn = set(titles)
    names = student_names(runs)
    systems = {series_title(s): s for run in runs for s in run.results.systems}
    entries: dict[str, Any] = {}
    for title, style in styles.items():
        if title not in drawn:
            continue
        if systems[title].student is None:
            entries[title] = legend_handle(style, line=line)
        else:
            entries.setdefault(method_title(systems[title]), line_handle(style.color, "-", 5))
    students = [name for name in names if any(systems[title].student == name for title in drawn)]
    for name in students:
        marker, dashes = student_marks(names.index(name))
        entries[f"student {name}"] = legend_handle(Style("", MUTE, marker, dashes), line=line)
    return [(handle, shorten(title)) for title, handle in entries.items()]


def line_handle(color: str, dashes: Any, width: float = 1.7) -> Any:
    """A legend entry for a line without markers."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=color, linestyle=dashes, linewidth=width)


def run_handles(runs: Sequence[EvaluatedRun]) -> list[tuple[Any, str]]:
    """Legend entries for the fills of markers, by run."""
    return [
        (legend_handle(GREY, line=False, fill=FILLS[number % len(FILLS)]), shorten(title))
        for number, title in enumerate(run_titles(runs))
    ]


def draw_level(axes: Axes, system: SystemResult, style: Style) -> Any:
    """A horizontal line for a system without a place on the x axis, with its interval unless it is
    a floor.

    Returns its legend entry.
    """
    if system.kind != "floor":
        axes.axhspan(*system.ci95, color=style.color, alpha=0.1, linewidth=0)
    axes.axhline(system.accuracy, color=style.color, linestyle=style.line, linewidth=1.3)
    return line_handle(style.color, style.line, 1.3)


def draw_levels(
    axes: Axes, runs: Sequence[EvaluatedRun], styles: dict[str, Style]
) -> list[tuple[Any, str]]:
    """A level for each teacher and each floor, one for runs with the same.

    Returns their legend entries.
    """
    levels: dict[str, dict[tuple[float, float, float], tuple[SystemResult, list[str]]]] = {}
    for title, run in zip(run_titles(runs), runs, strict=True):
        for system in full_data_systems(run.results.systems):
            if system.kind in ("teacher", "floor"):
                key = (system.accuracy, *system.ci95)
                same = levels.setdefault(series_title(system), {})
                same.setdefault(key, (system, []))[1].append(title)
    entries = []
    for name in (name for name in styles if name in levels):
        for number, (system, titles) in enumerate(levels[name].values()):
            style = styles[name]
            if system.kind == "teacher":
                style = replace(style, line=(0, (6, 3, *(1, 3) * number)))
            label = name
            if len(levels[name]) > 1:
                label += f" ({', '.join(titles)})"
            entries.append((draw_level(axes, system, style), shorten(label)))
    return entries


# --- axes


def percent_axis(axis: Any) -> None:
    from matplotlib.ticker import PercentFormatter

    axis.set_major_formatter(PercentFormatter(1.0))


def accuracy_axis(axes: Axes, label: str) -> None:
    """The vertical axis of accuracies, with a grid."""
    percent_axis(axes.yaxis)
    axes.set_ylabel(label)
    axes.grid(axis="y")


def log_axis(axis: Any, ends: Interval, form: Any = "{x:g}") -> None:
    """A logarithmic axis with readable numbers at 1, 2 and 5.

    ``ends`` should be a factor of at least four apart.
    """
    from matplotlib.ticker import FixedLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": ends})
    low = math.log10(ends[0])
    high = math.log10(ends[1])
    steps = [1]
    if high - low <= 2:
        steps = [1, 2, 5]
    every = max(1, math.ceil((high - low) / 7))
    powers = range(math.floor(low), math.ceil(high) + 1, every)
    ticks = [step * 10.0**power for power in powers for step in steps]
    ticks = [tick for tick in ticks if low <= math.log10(tick) <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(form)


def thin_ticks(values: Iterable[float], axis_inches: float, label_inches: float) -> list[float]:
    """The values for which a logarithmic axis has space for a label, first and last included."""
    ordered = sorted(set(values))
    if len(ordered) < 2:
        return ordered
    low = ordered[0]
    high = ordered[-1]
    gap = math.log(high / low) * label_inches / axis_inches
    ticks = [low]
    for value in ordered[1:-1]:
        if math.log(value / ticks[-1]) >= gap and math.log(high / value) >= gap:
            ticks.append(value)
    return [*ticks, high]


def spread_apart(values: Sequence[float], factor: float) -> list[float]:
    """Values for a logarithmic axis, moved apart by ``factor`` where they would hide one another.

    Values closer than that form a group, which is spread about its middle in the given order.
    """
    spread = list(values)
    group: list[int] = []
    for index in sorted(range(len(values)), key=values.__getitem__):
        if group and values[index] >= values[group[-1]] * factor:
            _spread_group(spread, values, group, factor)
            group = []
        group.append(index)
    _spread_group(spread, values, group, factor)
    return spread


def _spread_group(
    spread: list[float], values: Sequence[float], group: Sequence[int], factor: float
) -> None:
    if len(group) < 2:
        return
    middle = math.exp(sum(math.log(values[index]) for index in group) / len(group))
    for slot, index in enumerate(sorted(group)):
        spread[index] = middle * factor ** (slot - (len(group) - 1) / 2)


# --- text


def accuracy_tooltip(system: SystemResult) -> str:
    return f"{shorten(system.name)}: {percent(system.accuracy)} {interval(system.ci95)}"


def accuracy_label(runs: Sequence[EvaluatedRun]) -> str:
    """The label of an axis of accuracies, with the rows if all runs have the same number."""
    labels = {rows_label(run.results) for run in runs}
    return labels.pop() if len(labels) == 1 else "accuracy"


def rows_label(results: Results) -> str:
    return f"accuracy on {results.split} ({results.n:,} rows)"


def figure_names(name: str, runs: Sequence[EvaluatedRun]) -> list[tuple[str, str]]:
    """For each run the figure's name and the suffix of its title, "" for a single run."""
    if len(runs) == 1:
        return [(name, "")]
    return [(f"{name}-{number}", f": {title}") for number, title in enumerate(run_titles(runs), 1)]
