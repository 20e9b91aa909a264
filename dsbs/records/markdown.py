"""Markdown of an evaluation's results: ``eval/results.md``."""

from __future__ import annotations

from dsbs.formatting import (
    ABSENT,
    count,
    escape_markdown,
    markdown_paragraph,
    markdown_table,
    p_number,
    points_number,
    signed,
    signed_interval,
)
from dsbs.records.results import Results
from dsbs.records.summary import (
    ALPHA,
    TEST_NAMES,
    break_even_sentence,
    headline,
    headline_details,
    label_efficiency_sentence,
    results_table,
)


def results_markdown(results: Results) -> str:
    """``eval/results.md``."""
    rows = count(results.n, "row")
    lines = [f"# {escape_markdown(results.name)}: {results.split}, {rows}", ""]
    if not results.reportable:
        lines += ["**smoke: not reportable** (task.limit is set)", ""]
    lines += [markdown_paragraph(headline(results)), ""]
    details = " ".join(headline_details(results))
    if details:
        lines += [markdown_paragraph(details), ""]
    lines += ["## Systems", "", *_escaped_table(*results_table(results))]
    lines += _comparisons_section(results)
    lines += _floors_section(results)
    lines += _graded_section(results)
    lines += _metrics_section(results)
    lines += _list_section(
        "Labels needed", [label_efficiency_sentence(item) for item in results.label_efficiency]
    )
    lines += _list_section("Break-even", [break_even_sentence(item) for item in results.break_even])
    return "\n".join(lines)


def _list_section(title: str, sentences: list[str]) -> list[str]:
    if not sentences:
        return []
    return ["", f"## {title}", "", *(f"- {markdown_paragraph(text)}" for text in sentences)]


def _comparisons_section(results: Results) -> list[str]:
    headings = (
        "system",
        "against",
        "points",
        "95% CI",
        "p",
        "p (Holm)",
        "test",
        "wins",
        "losses",
        "detectable",
    )
    rows = []
    for system in results.systems:
        for baseline, comparison in system.versus.items():
            detectable = comparison.minimum_detectable_effect
            row = [
                system.name,
                baseline,
                points_number(comparison.delta),
                signed_interval(comparison.ci95),
                p_number(comparison.p),
                p_number(comparison.p_holm),
                TEST_NAMES.get(comparison.test, comparison.test),
                f"{comparison.wins:,}",
                f"{comparison.losses:,}",
                ABSENT if detectable is None else f"{100 * detectable:.1f}",
            ]
            rows.append(row)
    if not rows:
        return []
    return [
        "",
        "## Comparisons",
        "",
        *_escaped_table(headings, rows),
        "",
        f"A difference is reliable where p, Holm-corrected for all comparisons, is < {ALPHA:g}.",
        "Wins are rows that the system gets right and the other wrong; losses are the reverse.",
        "Detectable: the smallest true difference, in points, that this test set would show in "
        "one comparison with 80% power.",
    ]


def _floors_section(results: Results) -> list[str]:
    headings = ("system", "floor", "points", "95% CI", "p", "wins", "losses", "beaten")
    rows = [
        [
            system.name,
            floor,
            points_number(comparison.delta),
            signed_interval(comparison.ci95),
            p_number(comparison.p),
            f"{comparison.wins:,}",
            f"{comparison.losses:,}",
            "yes" if comparison.is_beaten else "no",
        ]
        for system in results.systems
        for floor, comparison in system.versus_floors.items()
    ]
    if not rows:
        return []
    return [
        "",
        "## Floors",
        "",
        *_escaped_table(headings, rows),
        "",
        "A floor is beaten where the whole interval is above 0. These comparisons are outside "
        "Holm's correction.",
    ]


def _graded_section(results: Results) -> list[str]:
    """The comparisons by metrics that grade rows."""
    headings = ("system", "against", "metric", "difference", "95% CI", "p", "p (Holm)", "rows")
    rows = []
    for system in results.systems:
        for baseline, comparison in system.versus.items():
            for metric, graded in comparison.graded.items():
                low, high = graded.ci95
                row = [
                    system.name,
                    baseline,
                    metric,
                    signed(graded.delta, 3),
                    f"[{signed(low, 3)}, {signed(high, 3)}]",
                    p_number(graded.p),
                    p_number(graded.p_holm),
                    f"{graded.n:,}",
                ]
                rows.append(row)
    if not rows:
        return []
    return ["", "## Comparisons by other metrics", "", *_escaped_table(headings, rows)]


def _metrics_section(results: Results) -> list[str]:
    """Every metric that a system has, a column each."""
    names = list(dict.fromkeys(name for system in results.systems for name in system.metrics))
    if not names:
        return []
    rows = []
    for system in results.systems:
        row = [system.name]
        for name in names:
            measure = system.metrics.get(name)
            if measure is None:
                row.append(ABSENT)
            elif measure.ci95 is None:
                row.append(f"{measure.value:.3f}")
            else:
                low, high = measure.ci95
                row.append(f"{measure.value:.3f} [{low:.3f}, {high:.3f}]")
        rows.append(row)
    return ["", "## Metrics", "", *_escaped_table(["system", *names], rows)]


def _escaped_table(headings: list[str] | tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return markdown_table(
        [escape_markdown(heading) for heading in headings],
        [[escape_markdown(cell) for cell in row] for row in rows],
    )
