"""Flaws of rationales, early stopping, and the label's log-probability."""

from __future__ import annotations

import json
from itertools import product

import pytest

from dsbs.annotation.parse import (
    contradicts,
    copies_exemplar,
    is_short,
    label_logprob,
    leaks_hint,
    read_sample,
)
from dsbs.annotation.vote import majority, samples_needed
from dsbs.config import TaskSection
from dsbs.prompting import Prompt
from dsbs.records import Sample
from dsbs.tasks import make_task

ROUTING = make_task(
    TaskSection(name="classification", labels=("billing", "shipping"), data={"train": "-"})
)
SVAMP = make_task(TaskSection(name="svamp", data={"train": "-"}))
FREE = make_task(TaskSection(name="generation", data={"train": "-"}))
NUMERIC = make_task(TaskSection(name="generation", numeric=True, data={"train": "-"}))
FIELDS = {"text": "Where is my parcel?"}
PROMPT = Prompt(
    template="{{ text }}",
    exemplars=[
        {
            "input": {"text": "My box is wet."},
            "rationale": "A box that got wet is a delivery matter.",
            "label": "shipping",
        }
    ],
)


@pytest.mark.parametrize(
    ("rationale", "label", "task", "expected"),
    [
        ("It is about a parcel. So the answer is shipping.", "billing", ROUTING, True),
        ("It is about a parcel. So the answer is shipping.", "shipping", ROUTING, False),
        ("This is about a parcel that is late: shipping.", "billing", ROUTING, True),
        ("The parcel is late, so this is a shipping", "billing", ROUTING, True),
        ("Shipping costs money, and billing handles money.", "billing", ROUTING, False),
        ("It could be shipping. In the end it is about money.", "billing", ROUTING, False),
        ("The answer is not obvious", "billing", ROUTING, False),
        ("He has 3 and 4. The answer is 8.", "( 3.0 + 4.0 )", SVAMP, True),
        ("He has 3 and 4. The answer is 7.", "( 3.0 + 4.0 )", SVAMP, False),
        ("The answer is probably Paris", "Lyon", FREE, False),
        ("So the answer is 12.", "13", NUMERIC, True),
        ("So the answer is 12.", "12.0", NUMERIC, False),
    ],
)
def test_only_a_stated_other_conclusion_contradicts(
    rationale: str, label: str, task: object, expected: bool
) -> None:
    assert (
        contradicts(rationale, label, task, {"text": "t", "body": "b", "question": "q"}) is expected
    )  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rationale", "question", "expected"),
    [
        ("A box that got wet is a delivery matter.", "Where is my parcel?", True),
        ("a box that got wet, is a delivery matter", "Where is my parcel?", True),
        ("A box that got wet is a delivery matter.", "Hello! My box is wet.", False),
        ("A parcel that is late is a delivery matter.", "Where is my parcel?", False),
    ],
)
def test_a_rationale_that_copies_an_exemplars_is_recognized(
    rationale: str, question: str, expected: bool
) -> None:
    assert (
        copies_exemplar(rationale, question, [(e.input, e.rationale) for e in PROMPT.exemplars])
        is expected
    )


def test_a_long_run_out_of_an_exemplar_is_a_copy_even_with_a_word_before_it() -> None:
    exemplar = "the courier left the box in the rain and it is soaked so the delivery went wrong"
    assert copies_exemplar(f"Well, {exemplar}", "q", [({"text": "other"}, exemplar)])
    assert not copies_exemplar(
        "the courier left the box in the rain", "q", [({"text": "other"}, exemplar)]
    )


@pytest.mark.parametrize(
    ("rationale", "shortest", "expected"),
    [
        ("Yes.", 2, True),
        ("Two words", 2, False),
        ("包裹没有送到客户手中", 2, False),
        ("", 0, False),
        ("One", 0, False),
    ],
)
def test_length_is_counted_in_words_or_without_spaces_in_characters(
    rationale: str, shortest: int, expected: bool
) -> None:
    assert is_short(rationale, shortest) is expected


@pytest.mark.parametrize(
    ("rationale", "question", "expected"),
    [
        ("As the hint says, it is about money.", "q", True),
        ("The given answer is billing, so it must be money.", "q", True),
        ("We are told that it belongs to billing.", "q", True),
        ("Since the answer is billing, money must be meant.", "q", True),
        ("The customer wants a refund, which is about money.", "q", False),
        ("He asked for a hint about the riddle.", "Can you give me a hint?", False),
        ("Give the reasoning that leads there from money.", "q", True),
    ],
)
def test_a_hinted_rationale_must_not_mention_the_hint(
    rationale: str, question: str, expected: bool
) -> None:
    hint = PROMPT.hint.replace("{{ label }}", "…")
    assert leaks_hint(rationale, hint, question) is expected


def test_a_flawed_rationale_keeps_its_label_and_says_why() -> None:
    text = "A box that got wet is a delivery matter.\nAnswer: shipping"
    sample = read_sample(text, PROMPT, ROUTING, FIELDS, min_words=2)
    assert (sample.label, sample.reason) == ("shipping", "copies-exemplar")
    hinted = read_sample("\nAnswer: shipping", PROMPT, ROUTING, FIELDS, min_words=2, hint="h")
    assert hinted.hinted and hinted.reason == "empty", "a label that was given away teaches nothing"


# --- when enough samples have been seen


def votes(*labels: str | None) -> list[Sample]:
    return [Sample(text="", label=label, reason=None if label else "unparsed") for label in labels]


@pytest.mark.parametrize(
    ("first_samples", "total", "needed"),
    [
        ((), 1, 1),
        ((), 3, 2),
        ((), 4, 2),  # two of four, named first: a tie goes to them
        ((), 5, 3),
        (("a", "a", "a"), 5, 0),
        (("a", "a", "b"), 5, 1),
        (("a", "b"), 3, 1),
        (("a", "b", "b"), 4, 1),
        (("a", "a"), 4, 0),
        ((None, None, None), 5, 1),  # one more could settle it: the last could only draw level
        (("a", "b", "a", "b", "a"), 5, 0),
    ],
)
def test_samples_needed_are_the_fewest_that_can_settle_the_majority(
    first_samples: tuple[str | None, ...], total: int, needed: int
) -> None:
    assert samples_needed(votes(*first_samples), total, ROUTING) == needed


def test_stopping_early_never_changes_the_winner() -> None:
    for labels in product(("a", "b", "c", None), repeat=5):
        samples = votes(*labels)
        first_samples: list[Sample] = []
        while more := samples_needed(first_samples, 5, ROUTING):
            first_samples = samples[: len(first_samples) + more]
        assert majority(first_samples, ROUTING).label == majority(samples, ROUTING).label, labels


# --- log-probabilities


def chat(*tokens: tuple[str, float]) -> str:
    return json.dumps(
        {"choices": [{"logprobs": {"content": [{"token": t, "logprob": p} for t, p in tokens]}}]}
    )


def test_the_labels_tokens_are_summed_and_no_others() -> None:
    tokens = [
        ("\n", -9.0),
        ("Late.", -5.0),
        ("\nAnswer:", -1.0),
        (" ship", -0.25),
        ("ping", -0.5),
        ("\n", -3.0),
        ("Text: x", -7.0),
    ]
    text = "".join(token for token, _ in tokens)
    assert label_logprob(chat(*tokens), text, PROMPT, ROUTING) == pytest.approx(-0.75)


def test_a_draft_in_the_thoughts_is_not_the_answer() -> None:
    tokens = [("<think>so Answer:", -1.0), (" A</think>", -5.0), ("Answer:", -1.0), (" A", -0.25)]
    prompt = Prompt(template="{{ text }}")
    assert label_logprob(
        chat(*tokens), "".join(t for t, _ in tokens), prompt, ROUTING
    ) == pytest.approx(-0.25)
    parts = [(b"Answer: ", -1.0), ("é".encode()[:1], -0.5), ("é".encode()[1:], -0.25)]
    content = [{"token": str(piece), "bytes": list(piece), "logprob": p} for piece, p in parts]
    raw = json.dumps({"choices": [{"logprobs": {"content": content}}]})
    assert label_logprob(raw, "Answer: é", prompt, ROUTING) == pytest.approx(-0.75)


def test_the_completions_form_and_replies_without_log_probabilities() -> None:
    logprobs = {"tokens": ["Answer", ": ", "billing"], "token_logprobs": [None, -1, -0.125]}
    legacy = json.dumps({"choices": [{"logprobs": logprobs}]})
    assert label_logprob(legacy, "Answer: billing", PROMPT, ROUTING) == pytest.approx(-0.125)
    for raw in ('{"choices": [{}]}', '{"choices": [{"logprobs": null}]}', "{}"):
        assert label_logprob(raw, "Answer: billing", PROMPT, ROUTING) is None
    assert label_logprob(chat(("no anchor", -1.0)), "no anchor", PROMPT, ROUTING) is None
