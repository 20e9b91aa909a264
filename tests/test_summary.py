"""What is said of a comparison, and how surely."""

from __future__ import annotations

import pytest

from dsbs.records.results import (
    BreakEven,
    Comparison,
    LabelEfficiency,
    Measure,
    Results,
    SystemResult,
)
from dsbs.records.summary import (
    cells,
    dollars,
    headline,
    markdown,
    milliseconds,
    needed_sentence,
    pay_off_sentence,
    points,
    verdict,
)


def gap(delta: float = 0.1, p_holm: float = 0.004, **other: object) -> Comparison:
    values = {
        "delta": delta,
        "ci95": (delta - 0.05, delta + 0.05),
        "p": p_holm / 2,
        "p_holm": p_holm,
        "test": "mcnemar-exact",
    }
    return Comparison.model_validate(
        values | {"wins": 9, "losses": 4, "minimum_detectable_effect": 0.081} | other
    )


def system(name: str, **other: object) -> SystemResult:
    values = {
        "name": name,
        "kind": "student",
        "accuracy": 0.5,
        "ci95": (0.4, 0.6),
        "interval": "wilson",
        "unreadable": 0.0,
    }
    return SystemResult.model_validate(values | {"seeds": [0, 1]} | other)


def results(*systems: SystemResult, **other: object) -> Results:
    values = {
        "run": "r",
        "name": "tickets",
        "task": "classification",
        "split": "test",
        "n": 1234,
        "reportable": True,
    }
    return Results.model_validate(
        values
        | {"baseline": "finetune-gold", "headline": "step-by-step-gold", "systems": list(systems)}
        | other
    )


BASE = system("finetune-gold")


def test_rows_name_their_baseline_where_there_are_several() -> None:
    one = results(BASE, system("a", versus={"finetune-gold": gap(), "distill-teacher": gap(0.02)}))
    headings, rows = cells(one)
    assert "to finetune-gold" in headings and rows[1][4] == "+10.0"
    two = results(*one.systems, system("a-n0.5", versus={"finetune-gold-n0.5": gap()}))
    headings, rows = cells(two)
    assert "to baseline" in headings
    assert [row[4] for row in rows[1:]] == ["+10.0 to finetune-gold", "+10.0 to finetune-gold-n0.5"]
    assert [sentence.partition(" (")[0] for sentence in verdict(two)] == [
        "a: 10.0 points above finetune-gold",
        "a: 2.0 points above distill-teacher",
        "a-n0.5: 10.0 points above finetune-gold-n0.5",
    ]


def test_the_headline_says_who_against_whom_and_how_surely() -> None:
    said = headline(
        results(
            BASE,
            system(
                "step-by-step-gold", versus={"distill-teacher": gap(-0.2), "finetune-gold": gap()}
            ),
        )
    )
    assert said == (
        "step-by-step-gold is 10.0 points more accurate than finetune-gold on test (1,234 rows): "
        "95 % interval +5.0 to +15.0, p = 0.004 (mcnemar-exact, Holm)."
    )
    worse = headline(
        results(BASE, system("step-by-step-gold", versus={"finetune-gold": gap(-0.1, 0.0004)}))
    )
    assert "10.0 points less accurate" in worse and "p < .001" in worse


def test_no_reliable_difference_is_said_in_words_with_what_could_have_been_seen() -> None:
    one = results(BASE, system("step-by-step-gold", versus={"finetune-gold": gap(0.02, 0.3)}))
    assert headline(one) == (
        "No reliable difference between step-by-step-gold and finetune-gold on test (1,234 rows): +2.0 points, 95 % interval "
        "-3.0 to +7.0, p = 0.300 (mcnemar-exact, Holm); in one comparison so many rows show a true "
        "difference of 8.1 points with 80 % power."
    )
    assert verdict(one)[0].startswith(
        "step-by-step-gold: no reliable difference to finetune-gold (+2.0 points, "
    )
    silent = results(
        BASE,
        system(
            "step-by-step-gold",
            versus={"finetune-gold": gap(0.0, 1.0, minimum_detectable_effect=None)},
        ),
    )
    assert "power" not in headline(silent)


def test_an_interval_beside_zero_without_a_reliable_p_is_explained() -> None:
    one = results(BASE, system("step-by-step-gold", versus={"finetune-gold": gap(0.06, 0.08)}))
    assert "not corrected for the number of comparisons" in verdict(one)[0]
    alone = results(
        BASE, system("step-by-step-gold", versus={"finetune-gold": gap(0.06, 0.06, p=0.06)})
    )
    assert (
        "different approximations" in verdict(alone)[0] and "not corrected" not in verdict(alone)[0]
    )


def test_a_smoke_run_says_so_and_a_run_without_baselines_too() -> None:
    alone = results(system("step-by-step-gold"), baseline=None, reportable=False)
    assert headline(alone) == (
        "Smoke, not reportable: step-by-step-gold is right on 50.0 % of test (1,234 rows), 95 % interval 40.0 to 60.0 %; "
        "it is compared with no baseline."
    )
    assert "add finetune" in verdict(alone)[-1]
    assert "smoke: not reportable" in markdown(alone)
    assert (
        headline(results(headline=None, baseline=None))
        == "Nothing is compared on test (1,234 rows)."
    )


def test_the_page_has_every_part_that_the_results_have() -> None:
    needed = LabelEfficiency(
        method="step-by-step",
        labels="gold",
        system="finetune-gold",
        accuracy=0.55,
        rows=310,
        ci95=(240, None),
        smallest=100,
        largest=800,
    )
    pay_off = BreakEven(
        system="step-by-step-gold",
        spent_usd=0.32,
        teacher_usd_per_prediction=0.0004,
        predictions=800,
    )
    measured = system(
        "step-by-step-gold",
        versus={"finetune-gold": gap()},
        metrics={"macro_f1": Measure(value=0.61, ci95=(0.55, 0.67), n=1234)},
    )
    page = markdown(results(BASE, measured, label_efficiency=[needed], break_even=[pay_off]))
    assert (
        "| step-by-step-gold | 0.610 (0.550 to 0.670) |" in page and "| finetune-gold | – |" in page
    )
    for part in ("## Systems", "## Comparisons", "## Metrics", "## Labels needed", "## Pay-off"):
        assert part in page
    assert "## Metrics" not in markdown(results(BASE)) and "## Comparisons" not in markdown(
        results(BASE)
    )
    assert needed_sentence(needed) == (
        "step-by-step with gold labels needs 310 rows (95 % interval 240 to more than 800) "
        "to be as accurate as finetune-gold (55.0 %)."
    )
    never = needed.model_copy(update={"rows": None})
    assert (
        "does not become as accurate as finetune-gold (55.0 %) within 800 rows"
        in needed_sentence(never)
    )
    assert pay_off_sentence(pay_off).startswith(
        "step-by-step-gold: the teacher's bill of $0.32 for its training rows is paid"
    )


@pytest.mark.parametrize(
    ("usd", "text"),
    [
        (0, "$0.00"),
        (12345.6, "$12,345.60"),
        (0.4, "$0.40"),
        (0.0301, "$0.03"),
        (0.00012, "$0.00012"),
        (1e-9, "$0.000000001"),
    ],
)
def test_money_keeps_the_digits_that_count(usd: float, text: str) -> None:
    assert dollars(usd) == text


def test_times_keep_the_digits_that_count() -> None:
    assert [milliseconds(time) for time in (0.01234, 26.61, 610.4, 1034.2)] == [
        "0.0123 ms",
        "26.6 ms",
        "610 ms",
        "1,034 ms",
    ]


def test_no_difference_has_no_minus() -> None:
    assert points(-0.0001) == "+0.0"
