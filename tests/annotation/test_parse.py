"""Parsing replies: first turn, answer anchor, rationale, label, and reasons of rejection."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from dsbs.annotation.parse import first_turn, parse_reply
from dsbs.config import Recipe, TaskSection
from dsbs.prompting import Prompt, read_prompt
from dsbs.records import Sample
from dsbs.tasks import make_task
from dsbs.tasks.data import load

STOP = ("\n\nPremise:", "\nQ:")
PROMPT = Prompt(template="Premise: {{ premise }}", stop=("\nPremise:",))
SO = Prompt(template="-", anchor="So the answer is", stop=("\nPremise:",))
NLI = make_task(TaskSection(name="esnli", data={"train": "-"}))
SVAMP = make_task(TaskSection(name="svamp", data={"train": "-"}))


def read(text: str, finish_reason: str | None = "stop", prompt: Prompt = PROMPT) -> Sample:
    return parse_reply(text, prompt, NLI, {}, finish_reason)


# --- the first turn


@pytest.mark.parametrize(
    ("text", "turn", "ran_on"),
    [
        ("a b", "a b", False),
        ("a\n", "a", False),
        ("\n\na", "a", False),
        ("a\n\nPremise: b", "a", True),
        ("a\nQ: b\n\nPremise: c", "a", True),  # whichever stop comes first
        ("a\n\nPremise: b\nQ: c", "a", True),
        ("a\n\nPre", "a", True),  # cut inside the delimiter
        ("a\n\nP", "a", True),
        ("a\nQ", "a", True),
        ("a\n\nPreface", "a\n\nPreface", False),
        ("a P", "a P", False),
        ("a Q: b", "a Q: b", False),
        ("", "", False),
    ],
)
def test_the_first_turn_ends_where_an_invented_example_begins(
    text: str, turn: str, ran_on: bool
) -> None:
    assert first_turn(text, STOP) == (turn, ran_on)


@pytest.mark.parametrize("text", ["\n\na\nb\n\nPremise: c", "a\nb\n\n", "\na\nb"])
def test_a_blank_line_may_end_the_first_turn(text: str) -> None:
    assert first_turn(text, ("\n\n",))[0] == "a\nb"


@pytest.mark.parametrize(("reply", "label"), [("Answer:\nT", "T"), ("Answer: Q", "Q")])
def test_an_answer_that_begins_a_stop_string_is_no_invented_example(reply: str, label: str) -> None:
    section = TaskSection(name="classification", labels=["T", "Q"], data={"train": "-"})
    prompt = Prompt(template="Text: {{ text }}", stop=("\nText:", "Q:"))
    assert parse_reply(reply, prompt, make_task(section), {"text": "-"}, "stop").label == label


def test_without_stop_strings_the_whole_reply_is_one_turn() -> None:
    assert first_turn("a\n\nPremise: b", ()) == ("a\n\nPremise: b", False)


# --- rationale and label


def test_a_run_on_answer_is_not_this_rows() -> None:
    sample = read(
        "Men are people.\nAnswer: entailment\n\n"
        "Premise: Two men.\nHypothesis: x\nReasonings: y\nAnswer: neutral",
        None,
    )
    assert (sample.label, sample.rationale, sample.reason) == (
        "entailment",
        "Men are people.",
        None,
    )


def test_a_run_on_answer_does_not_stand_in_for_a_missing_one() -> None:
    sample = read("Men are people.\n\nPremise: Two men.\nAnswer: neutral", None)
    assert (sample.label, sample.reason) == (None, "unparsed")


def test_the_last_anchor_of_the_first_turn_wins() -> None:
    sample = read("One could say\nAnswer: neutral\nbut look closer.\nAnswer: contradiction")
    assert sample.label == "contradiction"
    assert sample.rationale is not None
    assert sample.rationale.endswith("but look closer.")


def test_earlier_anchors_in_the_list_take_precedence() -> None:
    prompt = Prompt(template="-", anchor=("So the answer is", "Answer:"))
    text = "Rain is wet. So the answer is entailment. Answer: none"
    assert read(text, prompt=prompt).label == "entailment"
    assert read("Rain is wet.\nAnswer: entailment", prompt=prompt).label == "entailment"


@pytest.mark.parametrize(
    "anchor",
    ["ANSWER:", "answer:", "**Answer:**", "**Answer**:", "Answer：", "### Answer:", "Answer: \n\n"],
)
def test_the_anchor_is_found_whatever_its_case_and_markup(anchor: str) -> None:
    sample = read(f"Rain is wet.\n{anchor} neutral")
    assert (sample.label, sample.rationale) == ("neutral", "Rain is wet.")


@pytest.mark.parametrize("word", ["So", "so", "Therefore,", "Thus", "Hence,", "And so", "So,"])
def test_a_rationale_loses_a_word_that_leads_to_the_answer(word: str) -> None:
    prompt = Prompt(template="-", anchor="the answer is")
    assert (
        read(f"Rain is wet. {word} the answer is neutral.", prompt=prompt).rationale
        == "Rain is wet."
    )


@pytest.mark.parametrize(
    "rationale", ["They said so.", "It is also", "A man is sew-and-so", "He hates his torso"]
)
def test_a_rationale_keeps_words_that_only_end_like_one(rationale: str) -> None:
    assert read(f"{rationale}\nAnswer: neutral").rationale == rationale


def test_a_label_without_a_rationale_is_still_a_label() -> None:
    sample = read("Answer: neutral")
    assert (sample.label, sample.rationale, sample.reason) == ("neutral", None, None)


def test_the_raw_text_is_unchanged() -> None:
    text = "\n  Rain.\nAnswer: neutral \n\nPremise: x"
    sample = read(text, "length")
    assert (sample.text, sample.finish_reason) == (text, "length")


@pytest.mark.parametrize(
    "rationale",
    [
        "Das Wasser ist heiß.",
        "İstanbul is in Turkey.",
        "İİİİ are letters.",
        "ﬁve ﬁsh are ﬁsh.",
        "東京は日本です。",
        "The 😀 smiles.",
    ],
)
def test_letters_of_other_scripts_do_not_shift_the_answer(rationale: str) -> None:
    sample = read(f"{rationale} So the answer is entailment.", prompt=SO)
    assert (sample.label, sample.rationale) == ("entailment", rationale)


def test_an_anchor_in_another_language_is_found() -> None:
    prompt = Prompt(template="-", anchor="Also heißt die Antwort:")
    sample = read("Es regnet. Also heißt die Antwort: neutral", prompt=prompt)
    assert (sample.label, sample.rationale) == ("neutral", "Es regnet.")
    assert read("Straße nass. also heißt die antwort: neutral", prompt=prompt).label == "neutral"


# --- reasons


@pytest.mark.parametrize(
    ("text", "finish_reason", "reason"),
    [
        ("Rain is wet, and rain", "length", "truncated"),
        ("Rain is wet.", "length", "truncated"),
        (
            "Rain is wet, and rain",
            None,
            "truncated",
        ),  # recorded without a finish reason: it ends in mid-sentence
        ("Rain is wet.", None, "unparsed"),
        ("Rain is wet, and rain", "stop", "unparsed"),
        ("Rain is wet.\nAnswer:", "length", "truncated"),
        ("Rain is wet.\nAnswer: ent", "length", "truncated"),
        ("Rain is wet.\nAnswer:", "stop", "empty"),
        (
            "Rain is wet.\nAnswer:\n\nPremise: x",
            "length",
            "empty",
        ),  # it had gone on: the budget cut something else
        ("Rain is wet.\n\nPremise: x", "length", "unparsed"),
        ("Rain is wet.\nAnswer: maybe", "stop", "label-outside-set"),
        ("Rain is wet.\nAnswer: neutral or entailment", "stop", "several-answers"),
        ("", "stop", "empty"),
        (" \n**\n", "stop", "empty"),
        (
            "",
            "length",
            "truncated",
        ),  # a reasoning model that spent its budget before the first word
        ("\n", None, "empty"),
        ("Rain.\nAnswer: neutral", "content_filter", "refused"),
        ("", "content_filter", "refused"),
    ],
)
def test_a_reply_without_a_readable_label_has_a_reason(
    text: str, finish_reason: str | None, reason: str
) -> None:
    sample = read(text, finish_reason)
    assert (sample.label, sample.reason) == (None, reason)


def test_a_complete_label_is_read_though_the_budget_ended_after_it() -> None:
    assert read("Rain is wet.\nAnswer: entailment", "length").label == "entailment"


# --- recorded replies


def recorded(folder: Path, name: str, split: str) -> Iterator[dict[str, Any]]:
    with gzip.open(
        folder / name / f"{split}.jsonl.gz", "rt", encoding="utf-8", newline="\n"
    ) as file:
        for line in file:
            yield json.loads(line)


@pytest.mark.parametrize(
    ("name", "split", "rows", "at_least"),
    [
        ("svamp", "train", 800, 0.7425),
        ("svamp", "test", 200, 0.7750),
        ("esnli", "valid", 9842, 0.7316),
        ("esnli", "test", 9824, 0.7299),
    ],
)
def test_recorded_replies_are_read_at_least_as_well_as_published(
    shared_data: Path, name: str, split: str, rows: int, at_least: float
) -> None:
    task, prompt = (
        make_task(TaskSection(name=name, data={"train": "-"})),
        read_prompt(f"prompts/{name}.yaml", None),
    )
    correct, reasons = 0, Counter()
    for row in recorded(shared_data, name, split):
        sample = parse_reply(row["teacher"]["completion"], prompt, task, row["input"])
        assert (sample.label is None) == (sample.reason is not None), row["id"]
        gold = task.gold(row["label"], row["input"], row["id"])
        correct += sample.label is not None and task.correct(sample.label, gold)
        reasons[sample.reason] += 1
    assert reasons.total() == rows
    assert round(correct / rows, 4) >= at_least, reasons
    assert reasons[None] / rows > 0.95, reasons
    assert set(reasons) <= {
        None,
        "unparsed",
        "empty",
        "truncated",
        "label-outside-set",
        "several-answers",
    }


def test_reading_does_not_depend_on_the_gold_label(shared_data: Path, tmp_path: Path) -> None:
    rows = list(recorded(shared_data, "svamp", "test"))
    prompt = read_prompt("prompts/svamp.yaml", None)

    def labels(
        file: str, change: dict[str, Any]
    ) -> dict[str, tuple[str | None, str | None, str | None]]:
        path = write_jsonl(
            tmp_path / file,
            [{k: v for k, v in (row | change).items() if v is not None} for row in rows],
        )
        data = {"train": str(path), "test": str(path)}
        recipe = Recipe(name="x", task={"name": "svamp", "data": data}, teacher={"model": "m"})
        parsed = {}
        for example in load(recipe, SVAMP, "test"):
            assert example.completion is not None
            sample = parse_reply(example.completion, prompt, SVAMP, example.input)
            parsed[example.id] = (sample.label, sample.rationale, sample.reason)
        return parsed

    with_gold = labels("gold.jsonl", {})
    assert len(with_gold) == 200
    assert labels("none.jsonl", {"label": None}) == with_gold
    assert labels("wrong.jsonl", {"label": "12345 + 1"}) == with_gold


def test_irregular_recorded_replies_are_read_by_their_kind(shared_data: Path) -> None:
    kinds = json.loads((shared_data / "hard_cases.json").read_text(encoding="utf-8"))
    expected = {
        ("svamp", 'several answers ("(a) and (b)")'): {"several-answers"},
        ("svamp", "no marker, cut off by length"): {"truncated", "unparsed"},
        ("svamp", "no marker although the turn ended"): {"unparsed"},
        ("svamp", "answer cut off (no final full stop / unbalanced parentheses)"): {
            "truncated",
            "unparsed",
        },
        ("svamp", "bare number rather than an expression"): {None},
        ("svamp", "unknown in the answer (x, some)"): {"unparsed", "several-answers"},
        ("svamp", "no marker, degenerate loop"): {"truncated", "unparsed"},
        ("svamp", "negative value"): {None},
        ("svamp", "thousands comma inside the answer"): {None},
        ("svamp", '"=" inside the answer'): {"unparsed"},
        ("svamp", "words or units inside the answer"): {"unparsed"},
        ("esnli", "no marker, rationale cut off by length"): {"truncated", "unparsed"},
        ("esnli", "marker present, label missing"): {"empty", "truncated"},
        ("esnli", 'label cut off ("entail", "contr")'): {"truncated"},
        ("esnli", "label outside the three classes"): {"label-outside-set", "several-answers"},
        ("esnli", "empty rationale"): {None},
        ("esnli", 'cut inside the next delimiter ("P", "Pre", "Premis")'): {None},
    }
    checked = 0
    for name, splits in (("svamp", ("train", "test")), ("esnli", ("valid", "test"))):
        task, prompt = (
            make_task(TaskSection(name=name, data={"train": "-"})),
            read_prompt(f"prompts/{name}.yaml", None),
        )
        rows = {row["id"]: row for split in splits for row in recorded(shared_data, name, split)}
        for kind in (kind for named, kind in expected if named == name):
            ids = [row_id for row_id in kinds[name][kind] if row_id in rows]
            checked += len(ids)  # some kinds occur only in sets that are not here
            for row_id in ids:
                sample = parse_reply(
                    rows[row_id]["teacher"]["completion"], prompt, task, rows[row_id]["input"]
                )
                assert sample.reason in expected[name, kind], (kind, row_id, sample)
    assert checked >= 60


# --- a model that declines


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m unable to answer.",
        "Sorry, no.",
        "As an AI, I do not judge.",
        "I cannot say.",
    ],
)
def test_a_model_that_declines_is_refused_not_unparsed(text: str) -> None:
    assert read(text).reason == "refused"


@pytest.mark.parametrize(
    "text",
    [
        "I cannot see a contradiction here.\nAnswer: neutral",
        "Sorry, this is long, but it follows.\nAnswer: entailment",
    ],
)
def test_an_answer_is_read_however_it_begins(text: str) -> None:
    assert read(text).reason is None


def test_a_reply_that_merely_lacks_an_answer_is_unparsed() -> None:
    assert read("The men are outside. They cannot be asleep.").reason == "unparsed"


@pytest.mark.parametrize("tag", ["think", "reasoning"])
def test_thoughts_in_tags_are_reasoning_and_not_the_rationale(tag: str) -> None:
    text = f"<{tag}>Hm. Answer: neutral? No.</{tag}>\nA dog is an animal.\nAnswer: entailment"
    visible = parse_reply(text, PROMPT, NLI, {}, "stop")
    assert (visible.label, visible.rationale) == ("entailment", "A dog is an animal.")
    thought = parse_reply(text, PROMPT, NLI, {}, "stop", rationale_from="reasoning")
    assert thought.rationale == "Hm. Answer: neutral? No."
    cut = parse_reply(f"<{tag}>Hm. Answer: neutral", PROMPT, NLI, {}, "length")
    assert (cut.label, cut.reason) == (None, "spent-on-reasoning")


@pytest.mark.parametrize(
    "answer",
    [
        "neutral\n\nWait, actually it contradicts the premise: contradiction.",
        "neutral\n\nCorrection: contradiction",
        "neutral\ncontradiction",
        "neutral is not right, contradiction is",
    ],
)
def test_an_answer_that_is_taken_back_is_no_answer(answer: str) -> None:
    sample = read(f"Rain is wet.\nAnswer: {answer}")
    assert sample.label is None and sample.reason is not None


@pytest.mark.parametrize("after", ["Confidence: high", "neutral", "Because it is not said.", "---"])
def test_what_else_follows_an_answer_does_not_matter(after: str) -> None:
    assert read(f"Rain is wet.\nAnswer: neutral\n\n{after}").label == "neutral"
