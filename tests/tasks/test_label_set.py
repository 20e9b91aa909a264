"""Labels read as themselves, whatever they are made of, and never from a text that negates them."""

from __future__ import annotations

import unicodedata
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dsbs.annotation.parse import parse_reply
from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.prompting import Prompt
from dsbs.records import Unreadable
from dsbs.tasks import Task, make_task
from dsbs.tasks.conclusion import concluded_label
from dsbs.tasks.label_set import LabelSet

PROMPT = Prompt(template="Text: {{ text }}", stop=("\nText:",))
AWKWARD = [
    ["A*", "A", "B"], ["__label__pos", "__label__neg"], ["A", "I", "O"], ["a", "the", "no", "none"],
    ["yes", "no", "Answer: yes"], ["Answer:", "none", "Answer: none"], ["007", "010", "7.5"],
    ["1.0", "1.1", "1.10", "1e3"], ["+", "-", "#", "~"], ["card", "card fraud", "card fraud!"],
    ["Food, drink", "Food", "drink"], ["first\nsecond", "first", "second\nthird"], ["U.S.", "U.K."],
    ["'single'", '"double"', "`code`"], ["(a)", "[b]", "<c>", "{d}"], ["toxic", "non-toxic"],
    ["spam", "not spam"], ["C", "C++", "C#", "C*"], ["CO₂", "H₂O"], ["Ru\u0308ckgabe", "Zahlung"],
    ["Maße", "Masse"], ["👍", "👎", "❤️"], ["退款", "付款"], ["a_b", "b_a"], ["T", "F"],
    ["$1", "1", "1%"], ["- x", "x - y", "# z"], ["0", "1", "-1"], ["...", "!", "?"],
]  # fmt: skip
ALPHABET = "aAbI10 .,;:*_`\"'()[]-+#?!\n\u0308üé（₂"
LABELS = st.lists(st.text(ALPHABET, min_size=1, max_size=6), min_size=2, max_size=6, unique=True)
WORD = st.text("abcdefgh", min_size=4, max_size=7)
WORDS = st.lists(WORD, min_size=1, max_size=3).map(" ".join)
checked = settings(deadline=None, max_examples=60)


def task(labels: list[str]) -> Task:
    return make_task(TaskSection(name="classification", labels=labels, data={"train": "-"}))


def accepted(labels: list[str]) -> Task:
    """The task of a set of labels that the recipe does not refuse."""
    try:
        return task(labels)
    except ValidationError:
        assume(False)
        raise


def label_in(reply: str, labels: Task) -> str | None:
    return parse_reply(reply, PROMPT, labels, {"text": "-"}, "stop").label


# --- a label is itself


@settings(deadline=None, max_examples=400)
@given(LABELS)
def test_a_label_reads_as_itself_alone_and_at_the_end_of_a_reply(labels: list[str]) -> None:
    own = accepted(labels)
    for label in labels:
        assert own.read_label(label, {}) == label
        assert own.read_label(f" {label}\n", {}) == label
        assert own.gold(label, {}, "row 1") == label


@pytest.mark.parametrize("labels", AWKWARD, ids=lambda labels: " ".join(labels)[:30])
def test_an_awkward_label_reads_as_itself(labels: list[str]) -> None:
    own = task(labels)
    for label in labels:
        assert own.gold(label, {}, "row 1") == label
        for form in ("NFC", "NFD"):
            text = unicodedata.normalize(form, label)
            for reply in (
                f"It is so.\nAnswer: {text}",
                f"It is so.\n**Answer:** {text}",
                f"It is so.\n**Answer: {text}**",
                f"*Answer: {text}*",
                f"Answer:\n{text}\n",
                f"Answer: **{text}**",
                f"Answer: \\boxed{{{' '.join(text.split())}}}",
            ):
                assert label_in(reply, own) == label, reply


@checked
@given(
    wrapping=st.sampled_from(["**{}**", '"{}"', "`{}`", "“{}”", "*{}*", "[{}]", "«{}»", "{}."]),
    labels=st.lists(WORDS, min_size=2, max_size=6, unique=True),
)
def test_wrapping_that_models_add_is_no_part_of_a_label(wrapping: str, labels: list[str]) -> None:
    own = accepted(labels)
    for label in labels:
        assert own.read_label(wrapping.format(label) + "\n", {}) == label
        assert own.read_label(wrapping.format(label.upper()), {}) == label


@checked
@given(LABELS, st.text(ALPHABET, max_size=8))
@example(["A*", "A"], "A**")
def test_a_text_is_never_another_label_than_the_one_it_is_spelled_as(
    labels: list[str], text: str
) -> None:
    own = accepted(labels)
    spelled = [label for label in labels if label == text]
    if spelled:
        assert own.read_label(text, {}) == spelled[0]


@checked
@given(WORDS, WORDS)
def test_a_label_that_begins_another_is_told_from_it(short: str, more: str) -> None:
    longer = f"{short} {more}"
    own = accepted([short, longer])
    for label in (short, longer):
        assert own.read_label(f"It is {label}.", {}) == label


@checked
@given(st.lists(WORDS, min_size=2, max_size=5, unique=True))
def test_two_labels_named_are_several_answers(labels: list[str]) -> None:
    own = accepted(labels)
    assume(not any(a != b and (a in b or b in a) for a in labels for b in labels))
    read = own.read_label(f"{labels[0]} or {labels[1]}", {})
    assert isinstance(read, Unreadable) and read.reason == "several-answers"


@pytest.mark.parametrize(
    ("labels", "text", "label"),
    [
        (["A*", "A", "B"], "**A***", "A*"),
        (["A*", "A", "B"], "*A*.", "A"),
        (["A*", "A", "B"], "**A**", "A"),
        (["A*", "A", "B"], "** A*", "A*"),
        (["__label__pos", "__label__neg"], "label__pos", "__label__pos"),
        (["CO₂", "H₂O"], "CO2", "CO₂"),
        (["（a）", "（b）"], "(a)", "（a）"),
        (["non-toxic", "toxic"], "Non toxic.", "non-toxic"),
        (["non-toxic", "toxic"], "It is non\u2011toxic", "non-toxic"),
        (["card_fraud", "card"], "card fraud", "card_fraud"),
        (["card_fraud", "card"], "It is card-fraud, I think", "card_fraud"),
        (["007", "010"], "7", "007"),
        (["1", "2"], "1.0", "1"),
        (["1e3", "10"], "1000", "1e3"),
        (["first\nsecond", "x"], "first\nsecond\n\nBecause it is so.", "first\nsecond"),
        (["first\nsecond", "x"], "first second", "first\nsecond"),
    ],
)
def test_the_least_tidying_that_finds_a_label_decides(
    labels: list[str], text: str, label: str
) -> None:
    assert task(labels).read_label(text, {}) == label


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (["1.1", "2"], "1.10"),  # a version, not a decimal
        (["1", "2"], "1.5"),
        (["5", "4"], "5%"),
        (["1", "2"], "-1"),
        (["C", "Java"], "C++"),
        (["Maße", "Masse"], "MASSE"),
    ],
)
def test_a_text_that_may_be_something_else_is_no_label(labels: list[str], text: str) -> None:
    assert isinstance(task(labels).read_label(text, {}), Unreadable)


@pytest.mark.parametrize(
    ("labels", "value", "label"),
    [
        (["007", "010"], 7, "007"),
        (["1", "2"], 1.0, "1"),
        (["1.50", "2.50"], 2.5, "2.50"),
        (["1e3", "1e4"], 1000.0, "1e3"),
        (["true", "false"], True, "true"),
        (["7", "007"], 7, "7"),
        (["Rückgabe", "Zahlung"], "Ru\u0308ckgabe", "Rückgabe"),
    ],
)
def test_a_cell_that_is_a_number_is_the_label_that_is_that_number(
    labels: list[str], value: Any, label: str
) -> None:
    assert LabelSet(labels).of_value(value) == label


def test_a_cell_that_could_be_two_labels_is_refused() -> None:
    with pytest.raises(UserError, match="'7' is not one of 007, 07"):
        task(["007", "07"]).gold(7, {}, "row 1")
    with pytest.raises(UserError, match="does not match exactly one of the labels"):
        task(["1.1", "1.10"]).gold(1.1, {}, "row 1")


# --- common words

LETTERS = task(["A", "B", "C", "D"])
NUMBERS = task(["1", "2", "3", "4", "5"])
YES_NO = task(["yes", "no"])


@pytest.mark.parametrize(
    ("own", "text", "label"),
    [
        *((LETTERS, text, "B") for text in ("(B)", "B.", "Option B", "This is a B", "b", "B) x")),
        *((LETTERS, text, "B") for text in ("Grade B, a good piece", "**B** is best", "B, not A")),
        *((LETTERS, text, "B") for text in ("B because it fits", "B is correct", "It's B")),
        *((NUMBERS, text, "4") for text in ("It is a 4", "Rating: 4", "(4)", "4.", "score 4.")),
        *((YES_NO, text, "no") for text in ("No, it is fine", "The answer is no", "no, not yes")),
        (YES_NO, "**Yes** – it is", "yes"),
    ],
)
def test_a_letter_a_number_or_a_common_word_counts_where_an_answer_stands(
    own: Task, text: str, label: str
) -> None:
    assert own.read_label(text, {}) == label


@pytest.mark.parametrize(
    ("own", "text"),
    [
        *(
            (LETTERS, text)
            for text in ("a tie", "It is a second choice", "A or B", "not a good one")
        ),
        *((LETTERS, text) for text in ("not B", "Both A and B", "A good answer", "vitamin B")),
        *((NUMBERS, text) for text in ("4 out of 5", "4/5", "$4", "There are 2 complaints", "4.5")),
        *((YES_NO, text) for text in ("There is no refund", "yes and no", "not yes")),
        (task(["I", "II", "III"]), "I think so"),
        (task(["other", "billing"]), "It is one or the other"),
    ],
)
def test_an_article_a_pronoun_or_a_count_is_no_label(own: Task, text: str) -> None:
    assert isinstance(own.read_label(text, {}), Unreadable)


# --- negation

NEGATED = [
    "not {}", "not really {}", "not at all {}", "hardly {}", "barely {}", "isn't {}", "isn’t {}",
    "It is not a {} one", "no {} content", "no longer {}", "none {}", "without {} language",
    "free of {} words", "far from {}", "anything but {}", "never {}", "neither {} nor rude",
    "rude rather than {}", "rude instead of {}", "cannot be called {}", "not, in my view, {}",
    "non {}", "non-{}", "non\u2010{}", "non\u2011{}", "non\u2013{}", "non\u2014{}", "non\u2212{}",
    "un-{}", "{}-free", "{} free", "{} is wrong", "{} does not apply", "{}? No", "{}: no", "!{}",
    "{} (no)", "{}, no", "{}: hardly", "{} = false", "too kind to be {}", "almost {}",
    "unlike {} ones", "different from {}", "{} words are absent", '{{"{}": false}}',
    "{} is not right, nice is", "{} isn't the label, which is nice",
    "less {} than rude", "It lacks {} language", "nicht {}", "kein {}", "pas {}", "¬{}",
]  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(sentence=st.sampled_from(NEGATED), label=WORDS)
def test_a_negated_label_is_never_the_label(sentence: str, label: str) -> None:
    own = accepted([label, "nice"])
    for text in (
        sentence.format(label),
        f"**{sentence.format(label)}**",
        f"So: {sentence.format(label)}.",
    ):
        assert isinstance(own.read_label(text, {}), Unreadable), text
    assert (
        concluded_label(f"It says so. So the answer is {sentence.format(label)}.", own, {}) is None
    )


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("not entailment but neutral", "neutral"),
        ("It isn't a contradiction, it is neutral", "neutral"),
        ("neutral (not contradiction)", "neutral"),
        ("nothing but neutral", "neutral"),
        ("neutral because nothing is said", "neutral"),
        ("It is not clear. So it is neutral", "neutral"),
    ],
)
def test_a_negation_ends_with_its_clause(text: str, label: str) -> None:
    own = make_task(TaskSection(name="esnli", data={"train": "-"}))
    assert own.read_label(text, {}) == label


@pytest.mark.parametrize(
    ("labels", "rationale", "label"),
    [
        (["A*", "A"], "It is good. So the answer is A*.", "A*"),
        (["A", "B"], "It is hard to say. So it is a tie.", None),
        (["A", "B"], "It is good. So it is a.", None),
        (["toxic", "non-toxic"], "It is kind. So it is non\u2011toxic.", "non-toxic"),
        (["U.S.", "U.K."], "They vote there. So the answer is U.S.", "U.S."),
        (["007", "010"], "The code says so. The label is: 007.", "007"),
    ],
)
def test_a_rationales_conclusion_is_read_by_the_same_rules(
    labels: list[str], rationale: str, label: str | None
) -> None:
    assert concluded_label(rationale, task(labels), {}) == label


# --- choices and free answers


@pytest.mark.parametrize(
    ("choices", "text", "label"),
    [
        (["A*", "A", "B"], "A*", "A*"),
        (["A*", "A", "B"], "**A***", "A*"),
        (["b", "c", "a"], "(a) b", "b"),
        (["b", "c", "a"], "a", "a"),
        (["bank", "sea"], "not (a) but (b)", "sea"),
        (["bank", "sea"], "not the bank but the sea", "sea"),
        (["bank", "not enough money"], "(b) not enough money", "not enough money"),
    ],
)
def test_a_choice_reads_as_itself(choices: list[str], text: str, label: str) -> None:
    cqa = make_task(TaskSection(name="cqa", data={"train": "-"}))
    assert cqa.read_label(text, {"question": "?", "choices": choices}) == label


@pytest.mark.parametrize("text", ["not the bank", "not (a)", "It isn't the sea", "a boat"])
def test_a_negated_choice_is_no_answer(text: str) -> None:
    cqa = make_task(TaskSection(name="cqa", data={"train": "-"}))
    assert isinstance(
        cqa.read_label(text, {"question": "?", "choices": ["bank", "sea"]}), Unreadable
    )


def test_a_gold_letter_that_is_also_another_choices_text_must_be_in_parentheses() -> None:
    cqa = make_task(TaskSection(name="cqa", data={"train": "-"}))
    fields = {"question": "?", "choices": ["b", "c", "a"]}
    assert cqa.gold("(A)", fields, "row 1") == "b"
    with pytest.raises(UserError, match="the letter of 'b' and the text of another"):
        cqa.gold("A", fields, "row 1")


@pytest.mark.parametrize("answer", ["A*", "C++", '6"', "(x + 1)", "Ru\u0308ckgabe"])
def test_a_free_answer_keeps_the_marks_that_are_its_own(answer: str) -> None:
    own = make_task(TaskSection(name="generation", data={"train": "-"}))
    assert own.read_label(f" **{answer}**.\n", {}) == answer
    assert own.correct(unicodedata.normalize("NFC", answer), answer)
    assert not own.correct(answer.strip('*+"()'), answer) or answer.isalpha() or "\u0308" in answer
