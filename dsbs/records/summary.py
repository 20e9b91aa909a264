"""Summary of an evaluation: headline, comparison sentences, results table and results.md."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsbs.formatting import (
    ABSENT,
    confidence_interval,
    count,
    escape_markdown,
    interval,
    markdown_paragraph,
    markdown_table,
    p_number,
    p_value,
    parameter_count,
    percent,
    points,
    points_number,
    signed,
    signed_confidence_interval,
    signed_interval,
)
from dsbs.records.results import (
    Comparison,
    Results,
    SystemResult,
)
from dsbs.records.sentences import (
    ALPHA,
    break_even_sentence,
    cascade_answer,
    cascade_details,
    cascade_rows,
    caveats_of,
    comparison_sentence,
    distance,
    floor_details,
    floor_sentences,
    floor_warnings,
    is_reliable,
    label_efficiency_sentence,
    review_sentences,
    seed_caveats,
    selective_rows,
    student_sentences,
    time_sentences,
)

TARGET_DIFFERENCE = 0.05  # the headline says how many rows would show this difference
HEADINGS = (
    "system",
    "seeds",
    "accuracy",
    "95% CI",
    "points vs baseline",
    "95% CI",
    "p (Holm)",
    "parameters",
    "ms/example",
)
TEST_NAMES = {  # as results.json has them -> for people
    "mcnemar-exact": "exact McNemar test",
    "sign-flip permutation": "exact sign-flip permutation test",
    "approximate randomization": "approximate randomization test",
}


def first_comparison(system: SystemResult) -> tuple[str | None, Comparison | None]:
    """The first baseline that a system is compared with, and the comparison."""
    return next(iter(system.versus.items()), (None, None))


def headline_comparison(results: Results) -> tuple[SystemResult | None, str | None]:
    """The headline system and the baseline it is compared with; None for what there is not."""
    system = results.system(results.headline)
    if system is None:
        compared = (s for s in results.systems if s.versus or s.versus_floors)
        system = next(compared, None)
    if system is None or not system.versus:
        return system, None
    if results.baseline in system.versus:
        return system, results.baseline
    return system, next(iter(system.versus))


def rows_needed(
    rows: int, comparison: Comparison, difference: float = TARGET_DIFFERENCE
) -> int | None:
    """The number of rows that would show a true ``difference`` with 80% power.

    The minimum detectable difference of the paired test, which reflects how often the two systems
    disagree, shrinks with the square root of the number of rows. None where it is unknown.
    """
    if comparison.minimum_detectable_effect is None:
        return None
    return math.ceil(rows * (comparison.minimum_detectable_effect / difference) ** 2)


# --- sentences


def headline(results: Results) -> str:
    """The headline system against its baseline, in plain words.

    Floors that it does not beat come first. With ``eval.cascade``, the second sentence says what
    share of the requests it can take over from its teacher.
    """
    system = headline_comparison(results)[0]
    sentences = [*floor_warnings(results, system), *_headline(results)]
    sentences[1:1] = cascade_answer(results)
    sentence = " ".join(sentences)
    if results.reportable:
        return sentence
    return f"Smoke run, not reportable: {sentence}"


def _headline(results: Results) -> list[str]:
    rows = count(results.n, f"{results.split} row")
    system, baseline = headline_comparison(results)
    if system is None:
        return [f"No systems were compared on these {rows}."]
    if baseline is None:
        return [
            f"{system.name} labels {percent(system.accuracy)} of these {rows} correctly "
            f"({confidence_interval(system.ci95)}).",
            "It was not compared with a baseline.",
        ]
    comparison = system.versus[baseline]
    ci95 = signed_confidence_interval(comparison.ci95)
    if is_reliable(comparison):
        return [
            f"{system.name} is {distance(comparison)} accurate than {baseline} "
            f"on these {rows} ({ci95}).",
            *_caveat_sentences(seed_caveats(comparison)),
        ]
    sentence = (
        f"{system.name} and {baseline} cannot be told apart on these {rows} "
        f"({points(comparison.delta)}, {ci95})."
    )
    return [sentence, *_rows_sentence(results.n, comparison)]


def closing(results: Results, train_accuracy: float | None = None) -> str:
    """Closing summary of a run: its most accurate student, its teacher and its best floor.

    ``train_accuracy`` is the teacher's on the train rows, for a run that did not annotate the
    compared ones.
    """
    best = {
        kind: max(group, key=lambda system: system.accuracy)
        for kind in ("student", "teacher", "floor")
        if (group := [system for system in results.systems if system.kind == kind])
    }
    rows = count(results.n, f"{results.split} row")
    if "student" not in best:
        return f"No student was compared on these {rows}."
    student = best["student"]
    students = sum(system.kind == "student" for system in results.systems)
    name = student.name if students == 1 else f"{student.name}, the best of {students} students,"
    references = []
    if "teacher" in best:
        references.append(f"the teacher {percent(best['teacher'].accuracy)}")
    elif train_accuracy is not None:
        references.append(f"the teacher {percent(train_accuracy)} of the train rows")
    if "floor" in best:
        floor = best["floor"]
        references.append(f"the best floor, {floor.name}, {percent(floor.accuracy)}")
    sentence = (
        f"{name} labels {percent(student.accuracy)} of these {rows} correctly "
        f"({confidence_interval(student.ci95)})"
    )
    return f"{'; '.join([sentence, *references])}."


def _rows_sentence(rows: int, comparison: Comparison) -> list[str]:
    """How many rows would show a difference, where these are too few."""
    needed = rows_needed(rows, comparison)
    if needed is None or needed <= rows:
        return []
    target = f"a difference of {100 * TARGET_DIFFERENCE:g} points"
    return [f"To detect {target} you would need about {_two_digits(needed):,} rows."]


def _two_digits(number: int) -> int:
    """``number`` rounded to two significant digits."""
    return int(float(f"{number:.2g}"))


def headline_details(results: Results) -> list[str]:
    """Sentences to follow the headline: its p value, and its caveats."""
    return [*_agreement_sentences(results), *_comparison_details(results)]


def _agreement_sentences(results: Results) -> list[str]:
    """Where no test label differs from a teacher's: that accuracy may only be agreement with it."""
    return [
        f"All {count(results.n, f'{results.split} row')} have the label that {system.name} gave: "
        "if their labels were taken from it, as those of an imported log are, accuracy here is "
        "agreement with the teacher."
        for system in results.systems
        if system.kind == "teacher" and system.accuracy == 1
    ][:1]


def _comparison_details(results: Results) -> list[str]:
    system, baseline = headline_comparison(results)
    floors = [*cascade_details(results), *floor_details(results, system)]
    if results.baseline is None:
        if any(system.method == "finetune" for system in results.systems):
            return floors
        return [*floors, "To compare students with fine-tuning, add finetune to train.methods."]
    if system is None or baseline is None:
        return floors
    comparison = system.versus[baseline]
    test = TEST_NAMES.get(comparison.test, comparison.test)
    details = [
        f"The {test} gives {p_value(comparison.p_holm)}, Holm-corrected for all comparisons in "
        "this run."
    ]
    if is_reliable(comparison):
        return [*details, *time_sentences(system, results.system(baseline)), *floors]
    details += _caveat_sentences(caveats_of(comparison))
    return [*details, "Finding no difference does not show that there is none.", *floors]


def _caveat_sentences(caveats: Sequence[str]) -> list[str]:
    return [f"{caveat[0].upper()}{caveat[1:]}." for caveat in caveats]


def system_sentences(results: Results, system: SystemResult) -> list[str]:
    """A sentence for each floor and each system that this one is compared with."""
    against_others = [
        f"{system.name}: {comparison_sentence(baseline, comparison)}."
        for baseline, comparison in system.comparisons.items()
    ]
    return floor_sentences(results, system) + against_others


# --- tables


def results_table(results: Results) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of text: every system, beside the first baseline it is compared with.

    Where the baselines differ, each row names its own.
    """
    baselines = {next(iter(system.versus)) for system in results.systems if system.versus}
    rows = []
    for system in results.systems:
        row = [
            system.name,
            str(len(system.seeds) or ABSENT),
            percent(system.accuracy),
            interval(system.ci95),
            *_comparison_cells(system, names_baseline=len(baselines) > 1),
            ABSENT if system.parameters is None else parameter_count(system.parameters),
            ABSENT if system.ms_per_example is None else f"{system.ms_per_example:.2f}",
        ]
        rows.append(row)
    headings = list(HEADINGS)
    baseline = next(iter(baselines), results.baseline)
    if len(baselines) < 2 and baseline is not None:
        headings[HEADINGS.index("points vs baseline")] = f"points vs {baseline}"
    return headings, rows


def _comparison_cells(system: SystemResult, *, names_baseline: bool) -> list[str]:
    baseline, comparison = first_comparison(system)
    if comparison is None:
        return [ABSENT] * 3
    difference = points_number(comparison.delta)
    if names_baseline:
        difference += f" vs {baseline}"
    return [difference, signed_interval(comparison.ci95), p_number(comparison.p_holm)]


# --- results.md


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
    lines += _list_section("Students", student_sentences(results))
    lines += _comparisons_section(results)
    lines += _floors_section(results)
    lines += _graded_section(results)
    lines += _metrics_section(results)
    lines += _table_section("Selective prediction", *selective_rows(results))
    lines += _table_section("Cascade", *cascade_rows(results))
    lines += _list_section("Reviews", review_sentences(results))
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
        for baseline, comparison in system.comparisons.items():
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
        for baseline, comparison in system.comparisons.items():
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


def _table_section(title: str, headings: list[str], rows: list[list[str]]) -> list[str]:
    return ["", f"## {title}", "", *_escaped_table(headings, rows)] if rows else []


def _escaped_table(headings: list[str] | tuple[str, ...], rows: list[list[str]]) -> list[str]:
    return markdown_table(
        [escape_markdown(heading) for heading in headings],
        [[escape_markdown(cell) for cell in row] for row in rows],
    )
