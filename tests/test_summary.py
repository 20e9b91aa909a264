"""Summary of an evaluation: the headline, its details, sentences, tables and results.md."""

from __future__ import annotations

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower

from dsbs.evaluation.significance import paired_difference
from dsbs.records.measures import Measure
from dsbs.records.results import (
    BreakEven,
    Comparison,
    FloorComparison,
    GradedComparison,
    LabelEfficiency,
    Results,
    SystemResult,
)
from dsbs.records.sentences import break_even_sentence, label_efficiency_sentence
from dsbs.records.summary import (
    closing,
    headline,
    headline_details,
    results_markdown,
    results_table,
    rows_needed,
    system_sentences,
)


def comparison(delta: float = 0.1, p_holm: float = 0.004, **changes: object) -> Comparison:
    fields = {
        "delta": delta,
        "ci95": (delta - 0.05, delta + 0.05),
        "p": p_holm / 2,
        "p_holm": p_holm,
        "test": "mcnemar-exact",
        "wins": 9,
        "losses": 4,
        "minimum_detectable_effect": 0.081,
    }
    return Comparison.model_validate(fields | changes)


def system(name: str, **changes: object) -> SystemResult:
    fields = {
        "name": name,
        "kind": "student",
        "accuracy": 0.5,
        "ci95": (0.4, 0.6),
        "interval": "wilson",
        "unreadable": 0.0,
        "seeds": [0, 1],
    }
    return SystemResult.model_validate(fields | changes)


def results(*systems: SystemResult, **changes: object) -> Results:
    fields = {
        "run": "r",
        "name": "tickets",
        "task": "classification",
        "split": "test",
        "n": 1234,
        "reportable": True,
        "baseline": "finetune-gold",
        "headline": "step-by-step-gold",
        "systems": list(systems),
    }
    return Results.model_validate(fields | changes)


BASE = system("finetune-gold")


def against_base(**changes: object) -> Results:
    versus = {"finetune-gold": comparison(**changes)}  # type: ignore[arg-type]
    return results(BASE, system("step-by-step-gold", versus=versus))


# --- the headline


def test_a_reliable_difference_is_the_headline() -> None:
    versus = {"distill-teacher": comparison(-0.2), "finetune-gold": comparison()}
    both = results(BASE, system("step-by-step-gold", versus=versus))
    assert headline(both) == (
        "step-by-step-gold is 10.0 points more accurate than finetune-gold on these 1,234 test "
        "rows (95% CI [+5.0, +15.0])."
    )
    assert headline_details(both) == [
        "The exact McNemar test gives p = .004, Holm-corrected for all comparisons in this run."
    ]
    worse = against_base(delta=-0.1, p_holm=0.0004)
    assert "10.0 points less accurate than finetune-gold" in headline(worse)
    assert headline_details(worse)[0].startswith("The exact McNemar test gives p < .001,")


def test_a_headline_without_a_difference_says_how_many_rows_would_show_one() -> None:
    assert headline(against_base(delta=0.042, p_holm=0.71)) == (
        "step-by-step-gold and finetune-gold cannot be told apart on these 1,234 test rows "
        "(+4.2 points, 95% CI [−0.8, +9.2]). "
        "To detect a difference of 5 points you would need about 3,200 rows."
    )
    enough = against_base(delta=0.01, p_holm=0.71, minimum_detectable_effect=0.04)
    assert headline(enough).endswith("on these 1,234 test rows (+1.0 points, 95% CI [−4.0, +6.0]).")
    unknown = against_base(delta=0.0, p_holm=1.0, minimum_detectable_effect=None)
    assert "5 points" not in headline(unknown)


def test_a_run_closes_with_its_best_student_its_teacher_and_its_best_floor() -> None:
    systems = [
        system("teacher", kind="teacher", accuracy=0.7),
        system("majority", kind="floor", accuracy=0.2),
        system("tfidf", kind="floor", accuracy=0.3),
        system("finetune-gold", accuracy=0.5),
        system("distill-teacher", accuracy=0.4),
    ]
    made = results(*systems)
    assert closing(made) == (
        f"finetune-gold, the best of 2 students, labels 50.0% of these {made.n:,} test rows "
        "correctly (95% CI [40.0, 60.0]); the teacher 70.0%; the best floor, tfidf, 30.0%."
    )
    assert closing(results(systems[3])).startswith("finetune-gold labels 50.0%")
    assert closing(results(systems[3]), 0.7).endswith("; the teacher 70.0% of the train rows.")
    assert closing(results(systems[0])).startswith("No student was compared")


def test_where_no_label_differs_from_the_teachers_accuracy_may_be_agreement() -> None:
    student = system("distill-teacher")
    said = headline_details(results(system("teacher", kind="teacher", accuracy=1.0), student))
    assert said[0].startswith("All 1,234 test rows have the label that teacher gave: if")
    said = headline_details(results(system("teacher", kind="teacher", accuracy=0.999), student))
    assert not any("agreement" in sentence for sentence in said)


def test_the_details_have_the_p_value_and_what_would_go_unnoticed() -> None:
    details = headline_details(against_base(delta=0.02, p_holm=0.3))
    assert details == [
        "The exact McNemar test gives p = .30, Holm-corrected for all comparisons in this run.",
        "With this test set, a difference below 8.1 points would usually go unnoticed (80% power).",
        "Finding no difference does not show that there is none.",
    ]


def test_an_interval_beside_zero_without_a_reliable_p_is_explained() -> None:
    corrected = " ".join(headline_details(against_base(delta=0.06, p_holm=0.08)))
    assert "corrected for the number of comparisons, the interval is not" in corrected
    alone = " ".join(headline_details(against_base(delta=0.06, p_holm=0.06, p=0.06)))
    assert "different approximations" in alone and "the interval is not" not in alone


def test_a_smoke_run_and_a_run_without_baselines_say_so() -> None:
    alone = results(system("step-by-step-gold"), baseline=None, reportable=False)
    assert headline(alone) == (
        "Smoke run, not reportable: step-by-step-gold labels 50.0% of these 1,234 test rows "
        "correctly (95% CI [40.0, 60.0]). It was not compared with a baseline."
    )
    assert "add finetune to train.methods" in headline_details(alone)[0]
    finetuned = results(system("finetune-gold", method="finetune"), baseline=None)
    assert headline_details(finetuned) == []
    assert "smoke: not reportable" in results_markdown(alone)
    nothing = results(headline=None, baseline=None)
    assert headline(nothing) == "No systems were compared on these 1,234 test rows."


UNSURE = "By seed the difference is +9.0, +1.0 and +12.0 points: other seeds may not confirm it."


def test_a_significant_difference_whose_seeds_disagree_says_so() -> None:
    versus = comparison(0.0733, delta_per_seed={0: 0.09, 1: 0.01, 2: 0.12})
    student = system("step-by-step-gold", seeds=[0, 1, 2], versus={"finetune-gold": versus})
    assert headline(results(BASE, student)).endswith(UNSURE)
    assert "other seeds may not confirm it" in system_sentences(results(BASE, student), student)[0]


def test_seeds_that_agree_and_differences_that_are_not_significant_need_no_word_on_seeds() -> None:
    agreeing = {0: 0.09, 1: 0.08, 2: 0.1}
    for versus in (
        comparison(0.09, delta_per_seed=agreeing),
        comparison(0.09, delta_per_seed={0: 0.09, 1: 0.09}),
        comparison(0.03, p_holm=0.4, delta_per_seed={0: 0.09, 1: -0.03}),
        comparison(0.09),  # external predictions and the teacher have no seeds
    ):
        student = system("step-by-step-gold", versus={"finetune-gold": versus})
        said = " ".join(
            [headline(results(BASE, student)), *system_sentences(results(BASE, student), student)]
        )
        assert "seed" not in said


def test_a_significant_difference_of_one_seed_says_so() -> None:
    versus = comparison(delta_per_seed={0: 0.1})
    student = system("step-by-step-gold", seeds=[0], versus={"finetune-gold": versus})
    assert "Trained with one seed:" in headline(results(BASE, student))


@pytest.mark.parametrize(
    ("delta", "seconds", "baseline_s", "is_said"),
    [
        (0.1, 780, 420, True),
        (0.1, 500, 420, False),
        (-0.1, 780, 420, False),
        (0.1, 780, None, False),
    ],
)
def test_a_better_system_that_trained_longer_says_so(
    delta: float, seconds: float, baseline_s: float | None, is_said: bool
) -> None:
    student = system(
        "step-by-step-gold", train_s=seconds, versus={"finetune-gold": comparison(delta)}
    )
    baseline = BASE.model_copy(update={"train_s": baseline_s})
    said = " ".join(headline_details(results(baseline, student)))
    expected = (
        "step-by-step-gold trained 1.9 times as long as finetune-gold (13 min and 7 min): train "
        "finetune-gold as long, too, before you choose."
    )
    assert (expected in said) == is_said
    assert is_said or "as long" not in said


@pytest.mark.parametrize(
    ("student_labels", "floor_labels", "note"),
    [
        ("teacher", "gold", "which learned gold labels: "),
        ("gold", "teacher", "which learned the teacher's labels: "),
        ("gold", "gold", ""),
        ("gold", None, ""),
        (None, "gold", ""),
    ],
)
def test_a_floor_that_learned_other_labels_than_the_system_says_so(
    student_labels: str | None, floor_labels: str | None, note: str
) -> None:
    versus = FloorComparison(
        delta=-0.2, ci95=(-0.3, -0.1), p=0.001, test="mcnemar-exact", wins=1, losses=9
    )
    student = system("distill-teacher", labels=student_labels, versus_floors={"tfidf": versus})
    floor = system("tfidf", kind="floor", labels=floor_labels)
    (sentence,) = system_sentences(results(floor, student), student)
    difference = f"{note}−20.0 points, 95% CI [−30.0, −10.0]"
    assert sentence == f"distill-teacher does not beat the floor tfidf ({difference})."


# --- rows needed


def answers(rows: int, wins: float, losses: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong answers of two systems; ``wins`` and ``losses`` are shares of the rows."""
    draw = np.random.default_rng(seed).random(rows)
    first = (draw < wins).astype(float)
    second = ((wins <= draw) & (draw < wins + losses)).astype(float)
    return first, second


def compared(rows: int, wins: float, losses: float, seed: int) -> Comparison:
    difference = paired_difference(*answers(rows, wins, losses, seed))
    return comparison(minimum_detectable_effect=difference.minimum_detectable_effect)


@pytest.mark.parametrize(("rows", "target"), [(212, 0.05), (212, 0.1), (1500, 0.03)])
def test_the_rows_needed_agree_with_statsmodels(rows: int, target: float) -> None:
    first, second = answers(rows, 0.2, 0.18, seed=1)
    effect = target / (first - second).std(ddof=1)
    expected = TTestPower().solve_power(effect_size=effect, power=0.8, alpha=0.05)
    needed = rows_needed(rows, compared(rows, 0.2, 0.18, seed=1), target)
    assert needed == pytest.approx(expected, rel=0.02)


def test_the_rows_needed_detect_the_difference_four_times_in_five() -> None:
    discordant = 0.3
    target = 0.05
    needed = rows_needed(400, compared(400, discordant / 2, discordant / 2, seed=2), target)
    assert needed is not None
    detected = 0
    for seed in range(200):
        wins, losses = (discordant + target) / 2, (discordant - target) / 2
        detected += paired_difference(*answers(needed, wins, losses, seed)).p < 0.05
    assert 0.7 < detected / 200 < 0.9


def test_more_discordant_pairs_need_more_rows() -> None:
    few = rows_needed(500, compared(500, 0.05, 0.05, seed=3))
    many = rows_needed(500, compared(500, 0.25, 0.25, seed=3))
    assert few is not None and many is not None and many > 3 * few
    assert rows_needed(500, comparison(minimum_detectable_effect=None)) is None


# --- tables and the page


def test_rows_name_their_baseline_where_there_are_several() -> None:
    versus = {"finetune-gold": comparison(), "distill-teacher": comparison(0.02)}
    single = results(BASE, system("a", versus=versus))
    headings, rows = results_table(single)
    assert "points vs finetune-gold" in headings and rows[1][4] == "+10.0"
    subset = system("a-n0.5", versus={"finetune-gold-n0.5": comparison()})
    headings, rows = results_table(results(*single.systems, subset))
    assert "points vs baseline" in headings
    assert [row[4] for row in rows[1:]] == ["+10.0 vs finetune-gold", "+10.0 vs finetune-gold-n0.5"]
    assert [
        sentence.partition(" (")[0] for sentence in system_sentences(single, single.systems[1])
    ] == [
        "a: 10.0 points more accurate than finetune-gold",
        "a: 2.0 points more accurate than distill-teacher",
    ]


def test_the_page_has_every_section_that_the_results_have() -> None:
    efficiency = LabelEfficiency(
        method="step-by-step",
        labels="gold",
        system="finetune-gold",
        accuracy=0.55,
        rows=310,
        ci95=(240, None),
        smallest=100,
        largest=800,
    )
    break_even = BreakEven(
        system="step-by-step-gold",
        spent_usd=0.32,
        teacher_usd_per_prediction=0.0004,
        predictions=800,
    )
    graded = GradedComparison(
        delta=0.042, ci95=(-0.01, 0.09), p=0.2, p_holm=0.4, test="sign-flip permutation", n=90
    )
    measured = system(
        "step-by-step-gold",
        versus={"finetune-gold": comparison(graded={"rouge_l": graded})},
        metrics={"macro_f1": Measure(value=0.61, ci95=(0.55, 0.67), n=1234)},
    )
    page = results_markdown(
        results(BASE, measured, label_efficiency=[efficiency], break_even=[break_even])
    )
    for title in (
        "Systems",
        "Comparisons",
        "Comparisons by other metrics",
        "Metrics",
        "Labels needed",
        "Break-even",
    ):
        assert f"\n## {title}\n" in page
    assert "| step-by-step-gold | 0.610 \\[0.550, 0.670\\] |" in page
    assert "rouge\\_l | +0.042 | \\[−0.010, +0.090\\] | .20 | .40 | 90 |" in page
    assert page.count("more accurate than finetune-gold") == 1, "a comparison has one sentence"
    empty = results_markdown(results(BASE))
    assert "## Metrics" not in empty and "## Comparisons" not in empty


def test_label_efficiency_and_break_even_are_sentences() -> None:
    efficiency = LabelEfficiency(
        method="step-by-step",
        labels="gold",
        system="finetune-gold",
        accuracy=0.55,
        rows=310,
        ci95=(240, None),
        smallest=100,
        largest=800,
    )
    assert label_efficiency_sentence(efficiency) == (
        "step-by-step with gold labels needs 310 rows to match finetune-gold (55.0%) "
        "(95% CI 240 to more than 800 rows)."
    )
    never = efficiency.model_copy(update={"rows": None})
    assert label_efficiency_sentence(never) == (
        "step-by-step with gold labels does not match finetune-gold (55.0%) within 800 rows; "
        "the 95% CI begins at 240 rows."
    )
    break_even = BreakEven(
        system="step-by-step-gold",
        spent_usd=0.32,
        teacher_usd_per_prediction=0.0004,
        predictions=800,
    )
    assert break_even_sentence(break_even) == (
        "step-by-step-gold: annotating its training rows cost $0.32. It recovers that after "
        "800 predictions, since the teacher costs $0.40 per 1,000 predictions."
    )
