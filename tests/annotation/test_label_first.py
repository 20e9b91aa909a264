"""Replies that give the label first, and patterns: reading, prompts, checks and lanes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from loopback import LoopbackServer, read_rows

from dsbs import UserError, annotate, load_recipe, validate
from dsbs.annotation.parse import label_logprob, parse_reply
from dsbs.config import Recipe, TaskSection
from dsbs.project.validate import check_prompt, check_written_labels
from dsbs.prompting import Prompt, PromptRenderer, load_prompt, read_prompt
from dsbs.records import Example, Sample
from dsbs.tasks import make_task

LABELS = ("billing", "shipping", "card", "card fraud")
TASK = make_task(TaskSection(name="classification", labels=LABELS, data={"train": "-"}))
SVAMP = make_task(TaskSection(name="svamp", data={"train": "-"}))
TEXT = make_task(TaskSection(name="generation", data={"train": "-"}))
ANCHOR = Prompt(template="{{ text }}", order="label-first", stop=("\nText:",))
BARE = ANCHOR.model_copy(update={"anchor": ()})
PATTERN = Prompt(
    template="{{ text }}",
    order="label-first",
    pattern=r"\[(?P<label>[^\]]+)\]\s*(?P<rationale>[^\[]*)",
    answer="[{{ label }}] {{ rationale }}",
)
WHY = "The message is about money."


def read(text: str, prompt: Prompt = ANCHOR, finish_reason: str | None = "stop") -> Sample:
    return parse_reply(text, prompt, TASK, {"text": "-"}, finish_reason)


# --- reading


@pytest.mark.parametrize(
    "text",
    [
        f"Answer: billing\n{WHY}",
        f"Answer: billing\n\nReasoning: {WHY}",
        f"**Answer:** billing\n\n**Explanation:** {WHY}",
        f"**Answer: billing**\n{WHY}",
        f"## Answer: billing\n\n## Reasoning\n{WHY}",
        f"```\nAnswer: billing\n```\n{WHY}",
        f"Answer: billing\n\n---\n\n{WHY}",
        f"Answer: billing, {WHY}",
        f"Answer:\nBilling.\n\n{WHY}",
        f"Answer: billing. {WHY}",
        f"Answer: billing - {WHY}",
        f"Certainly.\nANSWER: 'BILLING'\nMy reasoning: {WHY}",
        f"<think>Answer: shipping? No.</think>Answer: billing\n{WHY}",
        f"Answer: billing\n{WHY}\n\nText: Another\nAnswer: shipping",
        f"Answer: billing\n{WHY}\n**Answer: billing**",
    ],
)
def test_the_rationale_follows_the_label(text: str) -> None:
    sample = read(text)
    assert (sample.label, sample.rationale, sample.reason) == ("billing", WHY, None)


@pytest.mark.parametrize(
    "text", ["'BILLING'\n\n", "billing\nRationale: ", "Billing: ", "- billing\n"]
)
def test_without_an_anchor_the_reply_begins_with_the_label(text: str) -> None:
    sample = read(text + WHY, BARE, None)
    assert (sample.label, sample.rationale) == ("billing", WHY)


@pytest.mark.parametrize(
    ("text", "prompt", "finish_reason", "reason"),
    [
        ("Answer: billing\nThe message is", ANCHOR, "length", "truncated"),
        ("Answer: bill", ANCHOR, "length", "truncated"),
        ("Answer: card", ANCHOR, "length", "truncated"),
        ("The message is about", ANCHOR, "length", "truncated"),
        (f"billing\n{WHY}", ANCHOR, "stop", "unparsed"),
        (f"Answer: returns\n{WHY}", ANCHOR, "stop", "label-outside-set"),
        (f"Answer: bill\n{WHY}", ANCHOR, "stop", "label-outside-set"),
        (f"Answer: not billing\n{WHY}", ANCHOR, "stop", "label-outside-set"),
        ("Answer: billing or shipping\nBoth.", ANCHOR, "stop", "several-answers"),
        ("Answer: billing\nshipping", ANCHOR, "stop", "several-answers"),
        ("Answer:\n1. billing\n2. shipping", ANCHOR, "stop", "several-answers"),
        ("Answer: billing, shipping and card", ANCHOR, "stop", "several-answers"),
        ("Answer: billing - shipping - card fraud", ANCHOR, "stop", "several-answers"),
        ("Answer: billing. Actually, it is shipping.", ANCHOR, "stop", "several-answers"),
        ("Answer: billing\nWait, no: it is shipping.", ANCHOR, "stop", "several-answers"),
        ("Answer: billing\nOr shipping.", ANCHOR, "stop", "several-answers"),
        (f"Answer: billing\n{WHY}\nAnswer: shipping", ANCHOR, "stop", "several-answers"),
        ("", ANCHOR, "stop", "empty"),
        ("Answer:", ANCHOR, "stop", "empty"),
        ("<think>Answer: billing", ANCHOR, "length", "spent-on-reasoning"),
        ("I'm sorry, but I can't help with that.", BARE, "stop", "refused"),
        ("I'm sorry, but I can't help with that.", ANCHOR, "stop", "refused"),
        (f"billing: {WHY}", PATTERN, "stop", "unparsed"),
        ("[billing] The message", PATTERN, "length", "truncated"),
        (f"[billing] {WHY} [shipping] No.", PATTERN, "stop", "several-answers"),
        (f"[returns] {WHY}", PATTERN, "stop", "label-outside-set"),
    ],
)
def test_what_is_not_one_whole_answer_gives_no_label(
    text: str, prompt: Prompt, finish_reason: str, reason: str
) -> None:
    sample = read(text, prompt, finish_reason)
    assert (sample.label, sample.reason) == (None, reason)


def test_a_rationale_may_speak_of_other_labels() -> None:
    why = "It is neither shipping nor card fraud, but money that was charged twice."
    sample = read(f"Answer: billing\n{why}")
    assert (sample.label, sample.rationale, sample.reason) == ("billing", why, None)


def test_a_label_of_several_lines_is_read_whole() -> None:
    labels = ("card", "card\nfraud")
    task = make_task(TaskSection(name="classification", labels=labels, data={"train": "-"}))
    sample = parse_reply(f"Answer: card\nfraud\n{WHY}", ANCHOR, task, {"text": "-"}, "stop")
    assert (sample.label, sample.rationale) == ("card\nfraud", WHY)


def test_equations_and_free_text_come_first_too() -> None:
    sample = parse_reply("Answer: (3 + 4)\n3 and 4 are 7.", ANCHOR, SVAMP, {}, "stop")
    assert (sample.label, sample.rationale) == ("( 3.0 + 4.0 )", "3 and 4 are 7.")
    text = "Answer: Paris\nFrance's capital; Answer: is only a word here."
    sample = parse_reply(text, ANCHOR, TEXT, {"text": "-"}, "stop")
    assert (sample.label, sample.reason) == ("Paris", None)
    prompt = Prompt(
        template="-", order="label-first", answer="Answer: {{ label }} Reason: {{ rationale }}"
    )
    sample = parse_reply("Answer: Paris Reason: It is.", prompt, TEXT, {"text": "-"}, "stop")
    assert (sample.label, sample.rationale) == ("Paris", "It is.")


@given(
    st.sampled_from(LABELS),
    st.sampled_from(["\n", "\n\n", "\nReasoning: ", "\n**Explanation:** ", ". ", " - "]),
    st.lists(
        st.sampled_from(["this", "message", "says", "that", "money", "was", "charged"]), min_size=3
    ),
    st.sampled_from([ANCHOR, BARE]),
)
def test_a_written_answer_is_read_back(
    label: str, between: str, words: list[str], prompt: Prompt
) -> None:
    anchor = "Answer: " if prompt.anchor else ""
    why = f"The {' '.join(words)}."
    sample = read(f"{anchor}{label}{between}{why}", prompt)
    assert (sample.label, sample.rationale) == (label, why)


@given(st.text(max_size=60), st.sampled_from([ANCHOR, BARE, PATTERN]))
def test_any_text_is_read_without_an_error_and_never_when_it_is_cut(
    text: str, prompt: Prompt
) -> None:
    read(text, prompt)
    read(f"Answer: {text}", prompt, None)
    assert read(f"Answer: {text}", prompt, "length").label is None


def test_a_pattern_takes_linear_time_and_any_text() -> None:
    nested = Prompt(
        template="-", pattern=r"(?s)^(?P<rationale>(\w+\s?)*)=(?P<label>.+)$", answer="-"
    )
    assert read("word " * 20_000, nested).reason == "unparsed"
    assert read(f"\ud83d[billing] {WHY}", PATTERN).label == "billing"
    last_number = Prompt(
        template="-",
        pattern=r"(?s)^(?P<rationale>.*[^\d.,](?P<label>\d[\d,]*(?:\.\d+)?)\D*)$",
        answer="{{ rationale }} It is {{ label }}.",
    )
    text = "Two packs are $98. So, you pay $49 for each."
    sample = parse_reply(text, last_number, SVAMP, {}, "stop")
    assert (sample.label, sample.rationale) == ("49.0", text)


def test_the_labels_tokens_are_found_where_the_label_comes_first() -> None:
    tokens = [("Answer:", -9.0), (" bill", -0.25), ("ing", -0.5), ("\n", -3.0), (WHY, -2.0)]
    content = [{"token": token, "logprob": logprob} for token, logprob in tokens]
    raw = json.dumps({"choices": [{"logprobs": {"content": content}}]})
    text = "".join(token for token, _ in tokens)
    assert label_logprob(raw, text, ANCHOR, TASK) == pytest.approx(-0.75)


# --- prompts


def own_recipe(**annotate: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "task": {"name": "classification", "labels": LABELS, "data": {"train": "-"}},
            "teacher": {"model": "m"},
            "annotate": annotate,
        }
    )


@pytest.mark.parametrize("format", ["text", "json"])
def test_the_zero_shot_prompt_asks_in_the_recipes_order(format: str) -> None:
    recipe = own_recipe(order="label-first", format=format)
    prompt = load_prompt(recipe, TASK)
    instruction = PromptRenderer(prompt, TASK).render(Example("1", {"text": "x"})).text
    assert instruction.index("Give the answer first") < instruction.index("then explain")
    if format == "json":
        assert instruction.index('"label"') < instruction.index('"rationale"')
    else:
        assert "first line of its own, in this form:\nAnswer: <label>" in instruction
    check_written_labels(TASK, prompt, Example("1", {"text": "x"}))


@pytest.mark.parametrize("format", ["text", "json"])
def test_exemplars_are_written_in_order_and_read_back(format: str) -> None:
    exemplar = {"input": {"text": "t"}, "rationale": WHY, "label": "billing"}
    prompt = Prompt.model_validate(
        {
            "template": "{{ text }}",
            "order": "label-first",
            "exemplars": [exemplar],
            "format": format,
        }
    )
    _, answer = PromptRenderer(prompt, TASK).exemplar(prompt.exemplars[0], 1)
    assert answer.index("billing") < answer.index(WHY)
    sample = read(answer, prompt)
    assert (sample.label, sample.rationale) == ("billing", WHY)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"anchor": []}, "may anchor be empty"),
        ({"answer": "{{ label }}\n{{ rationale }}"}, "set order: label-first"),
        ({"order": "label-first", "answer": "{{ rationale }} {{ label }}"}, "rationale-first"),
        ({"pattern": "(?P<label>.+)"}, "pattern needs answer"),
        ({"pattern": "(?P<label>.+)", "answer": "-", "anchor": "A:"}, "keep one of them"),
        ({"pattern": "(?P<name>.+)", "answer": "-"}, "named groups"),
        ({"pattern": "(?P<label>.+", "answer": "-"}, "missing )"),
        ({"pattern": "(?P<label>.+)(?=x)", "answer": "-"}, "without lookaround"),
        ({"pattern": "(?P<label>(a{500}){500})", "answer": "-"}, "repetition size"),
        ({"pattern": "(?P<label>.+)" + "x" * 1000, "answer": "-"}, "1000 characters"),
        ({"order": "label-last"}, "label-first"),
    ],
)
def test_a_form_that_cannot_be_read_is_an_error(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"template": "{{ text }}"} | keys), encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_prompt(str(path), None)
    assert message in f"{error.value}"


def test_the_recipe_may_replace_the_files_order(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("template: '{{ text }}'\n", encoding="utf-8")
    assert read_prompt(str(path), None).answer == "{{ rationale }}\nAnswer: {{ label }}"
    prompt = read_prompt(str(path), None, "label-first")
    assert prompt.answer == "Answer: {{ label }}\n{{ rationale }}"
    assert prompt.hash != read_prompt(str(path), None).hash


def test_labels_and_rationale_are_proved_in_the_prompts_form() -> None:
    example = Example("1", {"text": "x"})
    for prompt in (ANCHOR, BARE, PATTERN):
        check_written_labels(TASK, prompt, example)
    with pytest.raises(UserError, match="4 labels would not be read back"):
        check_written_labels(TASK, PATTERN.model_copy(update={"answer": "{{ label }}"}), example)
    label_alone = PATTERN.model_copy(update={"pattern": r"\[(?P<label>[^\]]+)\]"})
    with pytest.raises(UserError, match="without its rationale"):
        check_written_labels(TASK, label_alone, example)
    exemplar = {"input": {"text": "t"}, "rationale": WHY, "label": "billing"}
    shown = Prompt.model_validate(label_alone.model_dump() | {"exemplars": [exemplar]})
    warnings = check_prompt(own_recipe(), shown, TASK, {"train": [example]})
    assert "prompt: exemplar 1 is read without its rationale" in warnings


# --- lanes


def label_first(body: dict[str, Any], _number: int) -> str:
    team = "billing" if "invoice" in body["messages"][-1]["content"] else "shipping"
    return f"Answer: {team}\n\nReasoning: the message is a matter of the {team} team."


def test_an_answer_before_its_reasons_is_told_or_read(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    prompt = tmp_path / "p.yaml"
    prompt.write_text("template: '{{ text }}'\n", encoding="utf-8")
    path = toy(train=6, annotate={"splits": ["train"], "prompt": str(prompt)})
    with LoopbackServer(label_first) as server:
        url = f"teacher.base_url={server.url}"
        result = annotate(load_recipe(path, [url]), out=tmp_path / "run")
        assert result.splits["train"].warnings("train", []) == [], "if the recipe only distils"
        (warning,) = result.splits["train"].warnings("train", ["step-by-step"])
        assert "6 of 6 accepted rows without a rationale" in warning
        assert "order: label-first" in warning
        # read again, without a request
        prompt.write_text("template: '{{ text }}'\norder: label-first\n", encoding="utf-8")
        result = annotate(load_recipe(path, [url]), out=tmp_path / "run")
        assert server.requests == 6
    assert not result.splits["train"].warnings("train")
    for row in read_rows(tmp_path / "run"):
        assert row["label"] == row["gold"]
        assert row["rationale"] == f"the message is a matter of the {row['label']} team."


def test_the_recorded_teacher_is_one_of_several(toy: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {
            "id": f"r{i}",
            "input": {"text": f"invoice {i}"},
            "label": "billing",
            "teacher": {"model": "a", "completion": f"billing\n{WHY}"},
            "teachers": [
                {"model": "a", "completion": f"billing\n{WHY}"},
                {"model": "b", "completion": "shipping\nIt is about parcels."},
            ],
        }
        for i in range(4)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    prompt = tmp_path / "p.yaml"
    prompt.write_text("{template: '{{ text }}', order: label-first, anchor: []}", encoding="utf-8")
    path = toy(
        task={
            "name": "classification",
            "labels": ["billing", "shipping"],
            "columns": {},
            "data": {"train": str(data), "valid": str(data), "test": str(data)},
        },
        teacher={"kind": "recorded", "model": None},
        annotate={"splits": ["train"], "prompt": str(prompt)},
    )
    validate(load_recipe(path))
    for model, label in (("null", "billing"), ("a", "billing"), ("b", "shipping")):
        out = tmp_path / model
        annotate(load_recipe(path, [f"teacher.model={model}"]), out=out)
        assert {row["label"] for row in read_rows(out)} == {label}
    with pytest.raises(UserError, match=r"teacher\.completion"):
        annotate(load_recipe(path, ["teacher.model=c"]), out=tmp_path / "none")


def test_values_of_json_members_are_read_without_their_escapes() -> None:
    labels = ("café", "bar")
    task = make_task(TaskSection(name="classification", labels=labels, data={"train": "-"}))
    prompt = Prompt(
        template="{{ text }}",
        pattern=r'(?s)"why"\s*:\s*"(?P<rationale>(?:[^"\\]|\\.)*)".*?"kind"\s*:\s*"(?P<label>(?:[^"\\]|\\.)*)"',
        answer="-",
    )
    reply = json.dumps({"why": 'It says "a small cup".\nSo …', "kind": "café"})
    assert "\\u00e9" in reply
    sample = parse_reply(reply, prompt, task, {"text": "-"}, "stop")
    assert (sample.label, sample.rationale) == ("café", 'It says "a small cup".\nSo …')
