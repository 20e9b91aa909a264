"""The comparison in words and tables for people: what ``dsbs eval`` prints and every report begins with."""

from __future__ import annotations

from dsbs.formatting import escape, paragraph, table
from dsbs.records.results import (
    METRICS,
    BreakEven,
    Comparison,
    Interval,
    LabelEfficiency,
    Results,
    SystemResult,
)

ALPHA = 0.05  # a difference is reliable where its p value after Holm's correction is below
HEADINGS = (
    "system",
    "seeds",
    "accuracy",
    "95 % interval",
    "to baseline",
    "95 % interval",
    "p (Holm)",
    "parameters",
    "ms/example",
)
_NOTHING = "–"
_DETECTABLE = "Detectable: the smallest true difference, in points, that so many rows show with 80 % power in one comparison."


def cells(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text. A system stands beside its first baseline; where those differ, each row names its own."""
    several = len({next(iter(system.versus)) for system in results.systems if system.versus}) > 1
    rows = []
    for system in results.systems:
        baseline, versus = against(system)
        other = f" to {baseline}" if several else ""
        rows.append(
            [
                system.name,
                str(len(system.seeds)) if system.seeds else _NOTHING,
                percent(system.accuracy),
                span(system.ci95),
                f"{points(versus.delta)}{other}" if versus else _NOTHING,
                signed_span(versus.ci95) if versus else _NOTHING,
                p_value(versus.p_holm).removeprefix("= ") if versus else _NOTHING,
                millions(system.parameters),
                f"{system.ms_per_example:.2f}" if system.ms_per_example is not None else _NOTHING,
            ]
        )
    baseline = (
        next((name for system in results.systems for name in system.versus), None)
        or results.baseline
    )
    headings = list(HEADINGS)
    if not several and baseline is not None:
        headings[HEADINGS.index("to baseline")] = f"to {baseline}"
    return headings, rows


def against(system: SystemResult) -> tuple[str | None, Comparison | None]:
    """The first baseline that a system is compared with, and what came of it."""
    return next(iter(system.versus.items()), (None, None))


def is_reliable(comparison: Comparison) -> bool:
    return comparison.p_holm < ALPHA


def headline(results: Results) -> str:
    """The system that the recipe is about against its baseline, in one sentence with its uncertainty."""
    said = _headline(results)
    return said if results.reportable else f"Smoke, not reportable: {said}"


def _headline(results: Results) -> str:
    where = f"{results.split} ({results.n:,} rows)"
    system = results.system(results.headline) or next(
        (one for one in results.systems if one.versus), None
    )
    if system is None:
        return f"Nothing is compared on {where}."
    if not system.versus:
        right = f"{system.name} is right on {percent(system.accuracy)} of {where}, 95 % interval {span(system.ci95)} %"
        return f"{right}; it is compared with no baseline."
    name = results.baseline if results.baseline in system.versus else next(iter(system.versus))
    versus = system.versus[name]
    if is_reliable(versus):
        way = "more" if versus.delta > 0 else "less"
        found = f"{system.name} is {abs(100 * versus.delta):.1f} points {way} accurate than {name} on {where}"
        return f"{found}: {_spread(versus)} ({versus.test}, Holm)."
    found = f"No reliable difference between {system.name} and {name} on {where}"
    return f"{found}: {points(versus.delta)} points, {_spread(versus)} ({versus.test}, Holm){_reservations(versus)}."


def verdict(results: Results) -> list[str]:
    """One sentence for each comparison; "no reliable difference" in words where there is none."""
    sentences = [sentence for system in results.systems for sentence in compared(system)]
    if results.baseline is None:
        sentences.append(
            "The run has no baseline students, so nothing is compared: add finetune to train.methods."
        )
    return sentences


def compared(system: SystemResult) -> list[str]:
    """A sentence for each system that this one is compared with, and for each metric that grades rows."""
    said = []
    for name, versus in system.versus.items():
        said.append(f"{system.name}: {_sentence(name, versus)}.")
        for metric, graded in versus.graded.items():
            low, high = graded.ci95
            found = f"{graded.delta:+.3f} to {name} (95 % interval {low:+.3f} to {high:+.3f}, p {p_value(graded.p_holm)})"
            reliable = "" if graded.p_holm < ALPHA else ", no reliable difference"
            said.append(f"{system.name}: {METRICS[metric].title} {found}{reliable}.")
    return said


def _sentence(name: str, versus: Comparison) -> str:
    if is_reliable(versus):
        way = "above" if versus.delta > 0 else "below"
        return f"{abs(100 * versus.delta):.1f} points {way} {name} ({_spread(versus)})"
    return f"no reliable difference to {name} ({points(versus.delta)} points, {_spread(versus)}{_reservations(versus)})"


def _spread(versus: Comparison) -> str:
    return f"95 % interval {signed_span(versus.ci95)}, p {p_value(versus.p_holm)}"


def _reservations(versus: Comparison) -> str:
    """What stands beside a difference that is not reliable."""
    alone = not versus.ci95[0] <= 0 <= versus.ci95[1]
    said = ""
    if alone and versus.p < ALPHA:
        said = "; the interval is not corrected for the number of comparisons, p is"
    elif alone:
        said = "; interval and p rest on different approximations"
    if versus.detectable is not None:
        said += f"; in one comparison so many rows show a true difference of {100 * versus.detectable:.1f} points with 80 % power"
    return said


def needed_sentence(needed: LabelEfficiency) -> str:
    who = f"{needed.method} with {needed.labels} labels"
    matched = f"{needed.system} ({percent(needed.accuracy)})"
    if needed.rows is None:
        reach = f"does not become as accurate as {matched} within {needed.largest:,} rows"
        low = needed.ci95[0]
        return (
            f"{who} {reach}"
            + ("" if low is None else f"; the 95 % interval begins at {low:,} rows")
            + "."
        )
    ends = [
        "more than " + format(needed.largest, ",") if end is None else _at_most(end, needed)
        for end in needed.ci95
    ]
    rows, between = _at_most(needed.rows, needed), f"{ends[0]} to {ends[1]}"
    return f"{who} needs {rows} rows (95 % interval {between}) to be as accurate as {matched}."


def _at_most(rows: int, needed: LabelEfficiency) -> str:
    """What is reached by the curve's first point may be reached before it."""
    return f"at most {rows:,}" if rows <= needed.smallest else f"{rows:,}"


def pay_off_sentence(pay_off: BreakEven) -> str:
    each = f"{dollars(1000 * pay_off.teacher_usd_per_prediction)} per 1,000 from the teacher"
    return (
        f"{pay_off.system}: the teacher's bill of {dollars(pay_off.spent_usd)} for its training rows is paid back after "
        f"{pay_off.predictions:,} predictions, at {each}."
    )


def markdown(results: Results, title: str | None = None) -> str:
    """A Markdown page: what is found in a sentence, then all systems, comparisons and metrics. ``title`` is the run's name."""
    lines = [f"# {escape(title or results.name)}: {results.split}, {results.n:,} rows", ""]
    if not results.reportable:
        lines += ["**smoke: not reportable** (task.limit is set)", ""]
    lines += [paragraph(headline(results)), "", "## Systems", "", *_escaped(*cells(results))]
    pairs = [
        (system, name, versus)
        for system in results.systems
        for name, versus in system.versus.items()
    ]
    if pairs:
        lines += ["", "## Comparisons", "", *_comparisons(pairs)]
        lines += [
            "",
            f"Reliable: a p value below {ALPHA:g} after Holm's correction over all comparisons.",
            _DETECTABLE,
        ]
    lines += ["", *(f"- {paragraph(sentence)}" for sentence in verdict(results))]
    lines += _metrics(results)
    if results.needed:
        lines += [
            "",
            "## Labels needed",
            "",
            *(f"- {paragraph(needed_sentence(one))}" for one in results.needed),
        ]
    if results.pay_off:
        lines += [
            "",
            "## Pay-off",
            "",
            *(f"- {paragraph(pay_off_sentence(one))}" for one in results.pay_off),
        ]
    return "\n".join(lines)


def _comparisons(pairs: list[tuple[SystemResult, str, Comparison]]) -> list[str]:
    headings = (
        "system",
        "against",
        "points",
        "95 % interval",
        "p",
        "p (Holm)",
        "test",
        "fixed",
        "broken",
        "detectable",
    )
    rows = [
        [
            system.name,
            name,
            points(versus.delta),
            signed_span(versus.ci95),
            p_value(versus.p).removeprefix("= "),
            p_value(versus.p_holm).removeprefix("= "),
            versus.test,
            str(versus.fixed),
            str(versus.broken),
            _NOTHING if versus.detectable is None else f"{100 * versus.detectable:.1f}",
        ]
        for system, name, versus in pairs
    ]
    return _escaped(headings, rows)


def _metrics(results: Results) -> list[str]:
    """Every metric that some system has, a column each."""
    names = list(dict.fromkeys(name for system in results.systems for name in system.metrics))
    if not names:
        return []
    rows = []
    for system in results.systems:
        row = [system.name]
        for name in names:
            measure = system.metrics.get(name)
            interval = (
                ""
                if measure is None or measure.ci95 is None
                else " ({:.3f} to {:.3f})".format(*measure.ci95)
            )
            row.append(_NOTHING if measure is None else f"{measure.value:.3f}{interval}")
        rows.append(row)
    return ["", "## Metrics", "", *_escaped(["system", *names], rows)]


def _escaped(headings: list[str] | tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return table(
        [escape(heading) for heading in headings], [[escape(cell) for cell in row] for row in rows]
    )


# --- numbers


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(delta: float) -> str:
    """A difference of shares in percentage points, signed; nothing is never negative."""
    return f"{round(100 * delta, 1) + 0.0:+.1f}"


def span(interval: Interval) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"


def signed_span(interval: Interval) -> str:
    return f"{points(interval[0])} to {points(interval[1])}"


def p_value(p: float) -> str:
    return "< .001" if p < 0.001 else f"= {p:.3f}"


def millions(parameters: int | None) -> str:
    return _NOTHING if parameters is None else f"{parameters / 1e6:.1f} M"


def milliseconds(time: float) -> str:
    """Three digits that count, and never fewer than the whole ones."""
    return f"{time:,.0f} ms" if time >= 100 else f"{time:.3g} ms"


def dollars(usd: float) -> str:
    """Cents; below ten of them, two digits that count."""
    return (
        f"${usd:,.2f}" if usd == 0 or usd >= 0.0995 else f"${float(f'{usd:.2g}'):.12f}".rstrip("0")
    )
