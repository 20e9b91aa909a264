"""Text read as a label, task by task: the awkward cases that real teachers wrote."""

from __future__ import annotations

from typing import Any

import pytest

from dsbs.config import TaskSection
from dsbs.config.registry import TASKS
from dsbs.records import Unreadable
from dsbs.tasks import Task, make_task


def task(name: str, **settings: Any) -> Task:
    return make_task(TaskSection(name=name, data={"train": "-"}, **settings))


SVAMP, CQA, ESNLI, ANLI = task("svamp"), task("cqa"), task("esnli"), task("anli")
NUMERIC, TEXT = task("generation", numeric=True), task("generation")
FRAUD = task("classification", labels=["card", "card fraud", "spam", "not spam", "other"])
QUESTION = {"question": "Where?", "choices": ["bank", "river bank", "Apple pie", "the sea", "city"]}


# A task's own keys.
SETTINGS: dict[str, dict[str, Any]] = {
    "classification": {"labels": ["card", "spam"]},
    "multilabel": {"labels": ["card", "spam"]},
    "score": {"range": [1, 5]},
    "extraction": {"fields": {"sender": {"type": "text"}}},
}


def reason(read: str | Unreadable) -> str:
    assert isinstance(read, Unreadable), f"read as {read!r}"
    return read.reason


@pytest.mark.parametrize("name", sorted(TASKS))
@pytest.mark.parametrize("text", ["", "  ", "\n\n", "**", "...", '""', "_ _", "\t*\n `"])
def test_an_answer_of_nothing_is_empty_in_every_task(name: str, text: str) -> None:
    assert reason(task(name, **SETTINGS.get(name, {})).read_label(text, QUESTION)) == "empty"


# --- svamp: the whole expression


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" (16 * 17) * 4.", "( ( 16.0 * 17.0 ) * 4.0 )"),
        (" (102 - 22) / 8.", "( ( 102.0 - 22.0 ) / 8.0 )"),
        (" (10 - (3 + 6)).", "( 10.0 - ( 3.0 + 6.0 ) )"),
        ("84 / 2", "( 84.0 / 2.0 )"),
        ("( 84.0 / 2.0 )", "( 84.0 / 2.0 )"),
        (" (249).", "249.0"),
        ("1.5 * 2.", "( 1.5 * 2.0 )"),
        ("11,210 / 84", "( 11210.0 / 84.0 )"),
        ("$4 * 3", "( 4.0 * 3.0 )"),
        ("$7 * 12$", "( 7.0 * 12.0 )"),
        ("**(7 * 12)**", "( 7.0 * 12.0 )"),
        ("\n`7 * 12`\n", "( 7.0 * 12.0 )"),
        ("(10 * 45) seeds.", "( 10.0 * 45.0 )"),
        ("10 * 45 = 450", "( 10.0 * 45.0 )"),
        ("10 * 45 = 450 seeds.", "( 10.0 * 45.0 )"),
        ("(7 * 12). That is 84.", "( 7.0 * 12.0 )"),
        ("(7 * 12).\n\nQ: 3 * 4", "( 7.0 * 12.0 )"),
        ("7 × 12", "( 7.0 * 12.0 )"),
        ("7 x 12", "( 7.0 * 12.0 )"),
        ("7 · 12", "( 7.0 * 12.0 )"),
        ("84 ÷ 2", "( 84.0 / 2.0 )"),
        ("75 − (82 + 19)", "( 75.0 - ( 82.0 + 19.0 ) )"),
    ],
)
def test_svamp_reads_the_whole_expression(text: str, label: str) -> None:
    assert SVAMP.read_label(text, {}) == label


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("some - 18", "unparsed"),
        ("(some - 8).", "unparsed"),
        ("(2 * x).", "unparsed"),
        ("(7x = 14).", "unparsed"),
        ("((8 action figures + 10 cabinets) * 4 shelves).", "unparsed"),
        ("10 * 45 = 451", "unparsed"),
        ("__import__('os')", "unparsed"),
        ("(120 /", "truncated"),
        ("((309 + 356", "truncated"),
        ("(53 + 17) and (14 - 10).", "several-answers"),
        ("((29/2) and (30/2)).", "several-answers"),
        ("(3 + 4) or 7.", "several-answers"),
    ],
)
def test_svamp_gives_the_reason_where_there_is_no_one_expression(text: str, why: str) -> None:
    assert reason(SVAMP.read_label(text, {})) == why


def test_svamp_compares_by_value() -> None:
    assert SVAMP.correct("( 84.0 / 2.0 )", "84 / 2")
    assert SVAMP.correct("( 3.0 + 4.0 )", "( 4.0 + 3.0 )")
    assert not SVAMP.correct("( 16.0 * 17.0 )", "( ( 16.0 * 17.0 ) * 4.0 )")
    assert not SVAMP.correct("( 1.0 / 0.0 )", "( 1.0 / 0.0 )")


# --- cqa: the letter first


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" (b) river bank.", "river bank"),
        ("(B)", "river bank"),
        ("( b )", "river bank"),
        ("b", "river bank"),
        ("B.", "river bank"),
        ("b) river", "river bank"),
        ("b: river bank", "river bank"),
        ("**(c) Apple pie**", "Apple pie"),
        ("(c) apple pies", "Apple pie"),  # the words differ, the letter decides
        ("(a) river bank", "bank"),
        ("apple PIE.", "Apple pie"),
        ('"the sea"', "the sea"),
        ("the river bank", "river bank"),  # "bank" in it is not a second answer
        ("it is the sea", "the sea"),
        ("(d) the sea\n\nQ: What?\nA: (a)", "the sea"),
    ],
)
def test_cqa_goes_by_the_letter_and_else_by_the_words(text: str, label: str) -> None:
    assert CQA.read_label(text, QUESTION) == label


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("either (a) bank or (d) the sea", "several-answers"),
        ("(a) or (b).", "several-answers"),
        ("the city and the sea", "several-answers"),
        ("(f) none of these", "label-outside-set"),
        ("(z)", "label-outside-set"),
        ("a mountain", "label-outside-set"),
        ("banker", "label-outside-set"),
    ],
)
def test_cqa_takes_no_choice_where_not_one_is_named(text: str, why: str) -> None:
    assert reason(CQA.read_label(text, QUESTION)) == why


def test_cqa_reads_each_rows_own_choices() -> None:
    assert CQA.read_label("(b)", {"question": "?", "choices": ["x", "y"]}) == "y"
    assert (
        reason(CQA.read_label("(c)", {"question": "?", "choices": ["x", "y"]}))
        == "label-outside-set"
    )


def test_cqa_labels_differ_in_more_than_case() -> None:
    assert CQA.correct("apple pie", "Apple Pie")
    assert not CQA.correct("bank", "river bank")


# --- natural language inference


@pytest.mark.parametrize("nli", [ESNLI, ANLI], ids=["esnli", "anli"])
@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" neutral\n", "neutral"),
        ("Neutral.", "neutral"),
        ("**neutral**", "neutral"),
        ("`contradiction`", "contradiction"),
        ('"entailment"', "entailment"),
        ("\n\n**Entailment**\n\nPremise: A neutral man", "entailment"),
        ("**\nneutral", "neutral"),
        ("The label is neutral", "neutral"),
        ("not entailment but neutral", "neutral"),
        ("neutral, not a contradiction", "neutral"),
        ("contradiction rather than entailment", "contradiction"),
    ],
)
def test_nli_reads_the_one_label_named(nli: Task, text: str, label: str) -> None:
    assert nli.read_label(text, {}) == label


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("entail", "truncated"),
        ("contr", "truncated"),
        ("neutr", "truncated"),
        ("not neutral", "label-outside-set"),
        ("It isn't a contradiction", "label-outside-set"),
        ("It isn’t a contradiction", "label-outside-set"),
        ("non-neutral", "label-outside-set"),
        ("neither entailment nor contradiction", "label-outside-set"),
        ("entailments", "label-outside-set"),
        ("yes", "label-outside-set"),
        ("entailment or neutral", "several-answers"),
        ("entailment / contradiction", "several-answers"),
    ],
)
def test_nli_takes_no_label_where_not_one_is_stated(text: str, why: str) -> None:
    assert reason(ESNLI.read_label(text, {})) == why


@pytest.mark.parametrize(
    ("given", "gold"),
    [(0, "entailment"), ("1", "neutral"), ("2", "contradiction"), (" NEUTRAL ", "neutral")],
)
def test_nli_knows_the_hubs_class_numbers(given: Any, gold: str) -> None:
    assert ESNLI.gold(given, {}, "row 1") == gold


# --- your own classes


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("card", "card"),
        ("card fraud", "card fraud"),
        ("CARD  Fraud.", "card fraud"),
        ("**card fraud**", "card fraud"),
        ("It is card fraud", "card fraud"),
        ("It is about a card", "card"),
        ("spam", "spam"),
        ("not spam", "not spam"),
        ("This is not spam.", "not spam"),
    ],
)
def test_a_label_inside_another_is_not_mistaken_for_it(text: str, label: str) -> None:
    assert FRAUD.read_label(text, {}) == label


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("card fraud, or a lost card", "several-answers"),
        ("fraud", "label-outside-set"),
        ("cardigan", "label-outside-set"),
    ],
)
def test_no_class_is_guessed(text: str, why: str) -> None:
    assert reason(FRAUD.read_label(text, {})) == why


@pytest.mark.parametrize(
    "labels",
    [
        ["C", "C++", "C#"],
        ["U.S.", "U.K."],
        ["+", "-"],
        ["1", "2", "10"],
        ["ja", "nein"],
        ["Größe", "Straße"],
        ["a_b", "b_a"],
    ],
    ids=" ".join,
)
def test_every_label_of_a_set_is_read_as_itself(labels: list[str]) -> None:
    own = task("classification", labels=labels)
    for label in labels:
        for text in (label, f" {label}\n", label.upper(), f"**{label}**"):
            assert own.read_label(text, {}) == label, text


# --- free answers


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        ("$1,250", "1250"),
        ("1250.00", "1250"),
        ("1,250 a year", "$1,250"),
        ("about 12.", "12"),
        ("0.33333", "0.33334"),
        ("50 %", "50%"),
        ("-5", "-5.0"),
        ("-$5", "-5"),
        ("−5", "-5"),
        (".5", "0.5"),
        ("Twelve", "twelve."),
    ],
)
def test_numbers_are_compared_as_numbers(predicted: str, gold: str) -> None:
    assert NUMERIC.correct(predicted, gold)


@pytest.mark.parametrize(
    ("predicted", "gold"),
    [
        ("1250", "1251"),
        ("12 or 13", "12"),
        ("-5", "5"),
        ("-$5", "5"),
        ("−5", "5"),
        ("1,25", "125"),
        ("12", "twelve"),
        ("", "0"),
        ("2024-05-01", "2024"),
    ],
)
def test_different_numbers_are_not_the_same(predicted: str, gold: str) -> None:
    assert not NUMERIC.correct(predicted, gold)


def test_text_is_compared_without_case_space_and_a_full_stop() -> None:
    assert TEXT.correct(" The  Nile.", "the nile")
    assert not TEXT.correct("$1,250", "1250")
    assert not TEXT.correct("12.0", "12")


def test_a_free_answer_loses_its_wrapping() -> None:
    assert TEXT.read_label("  **The Nile**.\n", {}) == "The Nile"
