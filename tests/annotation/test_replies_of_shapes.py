"""Replies with several labels, scores and fields: in text and JSON, label first or last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

import dsbs
from dsbs.annotation.parse import parse_reply
from dsbs.config import Recipe, TaskSection
from dsbs.project.validate import check_prompt
from dsbs.prompting import Prompt, PromptRenderer, load_prompt, read_prompt
from dsbs.records import Example, Sample
from dsbs.tasks import Task, make_task
from dsbs.tasks.conclusion import concluded_label

FIELDS = {
    "sender": {"type": "text"},
    "kind": {"type": "label", "labels": ["invoice", "refund"]},
    "amount": {"type": "number"},
    "items": {"type": "list"},
}
SECTIONS: dict[str, dict[str, Any]] = {
    "multilabel": {"labels": ["noise", "price", "food, drink"]},
    "score": {"range": [-1, 1], "step": 0.5},
    "extraction": {"fields": FIELDS},
}
TASKS: dict[str, Task] = {
    name: make_task(TaskSection(name=name, data={"train": "-"}, **keys))
    for name, keys in SECTIONS.items()
}
LABELS = {
    "multilabel": ["noise; price", "food, drink", "none"],
    "score": ["-0.5", "1", "0"],
    "extraction": [
        "sender: Ann\nkind: refund\namount: 12.5\nitems: pen | red ink",
        "sender: null\nkind: null\namount: null\nitems: null",
        "sender: Ann\nkind: invoice\namount: 3\nitems: null",
    ],
}
WHY = "The text says so in its first line."
CASES = [(kind, label) for kind, labels in LABELS.items() for label in labels]


def read(kind: str, text: str, finish_reason: str | None = "stop", **keys: Any) -> Sample:
    prompt = Prompt(template="{{ text }}", **keys)
    return parse_reply(text, prompt, TASKS[kind], {"text": "-"}, finish_reason)


@pytest.mark.parametrize("order", ["rationale-first", "label-first"])
@pytest.mark.parametrize(("kind", "label"), CASES)
def test_what_a_prompt_shows_is_read_back(kind: str, label: str, order: str) -> None:
    task = TASKS[kind]
    for form in ("text", "json"):
        exemplar = {"input": {"text": "-"}, "rationale": WHY, "label": _as_yaml(task, label)}
        prompt = Prompt.model_validate(
            {"template": "{{ text }}", "order": order, "format": form, "exemplars": [exemplar]}
        )
        _, answer = PromptRenderer(prompt, task).exemplar(prompt.exemplars[0], 1)
        if form == "json":
            assert json.loads(answer)["label"] == task.value(label)
        else:
            assert label in answer
        sample = parse_reply(answer, prompt, task, {"text": "-"}, "stop")
        assert (sample.label, sample.rationale, sample.reason) == (label, WHY, None)


def _as_yaml(task: Task, label: str) -> Any:
    """As the reader of prompt files has it: numbers are text."""
    value = task.value(label)
    return label if isinstance(value, int | float) else value


LINES = LABELS["extraction"][0]


@pytest.mark.parametrize(
    "text",
    [
        f"Answer:\n{LINES}\n{WHY}",
        f"Answer:\n{LINES}\n\nReasoning: {WHY}",
        f"**Answer:**\n- **Sender:** Ann\n- **Kind:** refund\n- **Amount:** 12.50\n"
        f"- **Items:** pen | red ink\n\n{WHY}",
        f"Answer:\n```\n{LINES}\n```\n{WHY}",
        f"Answer:\nsender: Ann\nkind: refund\namount: 12.5\nitems:\n- pen\n- red ink\n{WHY}",
        'Answer: {"sender": "Ann", "kind": "refund", "amount": 12.5, "items": ["pen", "red ink"]}'
        f"\n{WHY}",
    ],
)
def test_the_rationale_begins_where_the_fields_end(text: str) -> None:
    sample = read("extraction", text, order="label-first")
    assert (sample.label, sample.rationale) == (LINES, WHY)


@pytest.mark.parametrize(
    "text",
    [
        f"Answer: noise; price\n{WHY}",
        f"Answer:\n- price\n- noise\n\n{WHY}",
        f'Answer: ["noise",\n  "price"]\n{WHY}',
        f"**Answer:** noise, price\n\n**Explanation:** {WHY}",
    ],
)
def test_the_rationale_begins_where_the_list_ends(text: str) -> None:
    sample = read("multilabel", text, order="label-first")
    assert (sample.label, sample.rationale) == ("noise; price", WHY)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LINES.replace("items: pen | red ink", "items: pen\nred ink"), "unparsed"),
        (LINES.replace("sender: Ann", "sender:\n- Ann\n- Bob"), "several-answers"),
        (LINES.replace("sender: Ann", "sender:\nAnn"), "unparsed"),
        (LINES + "\namount: 13", "several-answers"),
        ('{"sender": "Ann", "sender": "Bob", "kind": null, "amount": 1, "items": []}', "unparsed"),
        ("I do not know.", "unparsed"),
    ],
)
def test_lines_that_may_be_a_value_are_not_read_as_another(text: str, reason: str) -> None:
    sample = read("extraction", f"{WHY}\nAnswer:\n{text}")
    assert sample.label is None and sample.reason == reason


@given(st.integers(1, len(LINES) - 1))
def test_fields_that_the_budget_cut_are_no_label(length: int) -> None:
    sample = read("extraction", f"{WHY}\nAnswer:\n{LINES[:length]}", "length")
    assert sample.label is None


def test_a_list_that_the_budget_cut_is_no_label() -> None:
    text = f"{WHY}\nAnswer: noise"
    assert read("multilabel", text, "length").reason == "truncated"
    assert read("multilabel", f"{text}\n\nThat is", "length").label == "noise"


def test_a_sentence_about_one_of_several_labels_contradicts_nothing() -> None:
    assert concluded_label("It is loud. So the label is noise.", TASKS["multilabel"], {}) is None


# --- prompts


def recipe_of(kind: str, **changes: Any) -> Recipe:
    task = {"name": kind, "data": {"train": "-"}} | SECTIONS[kind]
    return Recipe.model_validate({"name": "r", "task": task, "teacher": {"model": "m"}} | changes)


@pytest.mark.parametrize("kind", SECTIONS)
@pytest.mark.parametrize("order", ["rationale-first", "label-first"])
@pytest.mark.parametrize("form", ["text", "json"])
def test_the_default_prompt_names_the_answers_and_their_form(
    kind: str, order: str, form: str
) -> None:
    recipe = recipe_of(kind, annotate={"order": order, "format": form})
    task = TASKS[kind]
    text = PromptRenderer(load_prompt(recipe, task), task).render(Example("1", {"text": "Hi"})).text
    for name in (*SECTIONS[kind].get("labels", ()), *SECTIONS[kind].get("fields", ())):
        assert name in text
    assert (task.goal or "") in text
    if form == "json":
        shown = json.loads(text[text.index("{") : text.rindex("}") + 1])
        assert isinstance(shown["label"], type(task.value(LABELS[kind][0])) | str)
    if kind == "extraction" and form == "text":
        assert "on lines of their own" in text and "sender: <value or null>" in text


def test_labels_in_a_prompt_file_are_text_as_they_are_spelled(tmp_path: Path) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text(
        "template: '{{ text }}'\nexemplars:\n"
        "  - {input: {text: a}, rationale: r, label: {sender: no, amount: 07, items: [1.0, yes]}}\n"
        "  - {input: {text: b}, rationale: r, label: {sender: null, kind: refund}}\n",
        encoding="utf-8",
    )
    prompt = read_prompt("prompt.yaml", tmp_path)
    texts = [
        PromptRenderer(prompt, TASKS["extraction"]).exemplar(e, 1)[1] for e in prompt.exemplars
    ]
    assert texts[0].endswith("sender: no\nkind: null\namount: 7\nitems: 1.0 | yes")
    assert texts[1].endswith("sender: null\nkind: refund\namount: null\nitems: null")


def test_a_label_that_no_exemplar_shows_is_a_warning() -> None:
    exemplar = {"input": {"text": "a"}, "rationale": WHY, "label": ["noise"]}
    prompt = Prompt.model_validate({"template": "{{ text }}", "exemplars": [exemplar]})
    (warning,) = check_prompt(recipe_of("multilabel"), prompt, TASKS["multilabel"], {})
    assert "no exemplar is labeled price, food, drink" in warning


# --- teachers on disk


@pytest.mark.parametrize("teacher", ["recorded", "human"])
@pytest.mark.parametrize("kind", SECTIONS)
def test_recorded_and_human_teachers(kind: str, teacher: str, tmp_path: Path) -> None:
    task = TASKS[kind]
    rows = [
        {
            "id": f"r{i}",
            "text": f"Text {i}",
            "label": task.value(label),
            "rationale": WHY,
            "teacher": {"completion": f"{WHY}\nAnswer:\n{label}"},
        }
        for i, label in enumerate(LABELS[kind] * 8)
    ]
    data = {"train": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    path = tmp_path / "recipe.yaml"
    section = {"name": kind, "data": data} | SECTIONS[kind]
    recipe = {"name": "r", "task": section, "teacher": {"kind": teacher}}
    path.write_text(json.dumps(recipe), encoding="utf-8")
    result = dsbs.annotate(dsbs.load_recipe(path), out=tmp_path / "run")
    assert all(split.accepted == split.rows for split in result.splits.values())


FREE = {
    "generation": make_task(TaskSection(name="generation", data={"train": "-"})),
    "extraction": make_task(
        TaskSection.model_validate(
            {
                "name": "extraction",
                "data": {"train": "-"},
                "fields": {"reason": {"type": "text"}, "note": {"type": "text"}},
            }
        )
    ),
}
FORMS = {
    "rationale-first": "{{ rationale }}\nAnswer: {{ label }}",
    "label-first": "Answer: {{ label }}\nReason: {{ rationale }}",
}
# words, anchors and headings that may be a text's own
PIECES = st.sampled_from(
    [
        "Answer:",
        "answer is",
        "**Answer:**",
        "Reason:",
        "Reasonings:",
        "Because:",
        "7",
        "the box",
        "Ann",
    ]
)


def sentence(pieces: list[str]) -> str:
    return " ".join(["It says", *pieces, "there"])


Texts = st.lists(PIECES, max_size=5)


@settings(max_examples=60)
@given(Texts, Texts, Texts)
@pytest.mark.parametrize("order", list(FORMS))
@pytest.mark.parametrize("kind", list(FREE))
def test_free_text_with_anchors_is_read_back(
    kind: str, order: str, why: list[str], first: list[str], second: list[str]
) -> None:
    task = FREE[kind]
    label = sentence(first)
    if kind == "extraction":  # a value with a field's name and a colon is refused as gold
        values = [text.replace("Reason:", "Answer:") for text in (label, sentence(second))]
        label = task.gold(dict(zip(("reason", "note"), values, strict=True)), {}, "row")
    prompt = Prompt.model_validate(
        {"template": "{{ text }}", "order": order, "answer": FORMS[order], "anchor": ["Answer:"]}
    )
    written = FORMS[order].replace("{{ rationale }}", sentence(why)).replace("{{ label }}", label)
    sample = parse_reply(written, prompt, task, {"text": "-"}, "stop")
    assert (sample.label, sample.rationale, sample.reason) == (label, sentence(why), None)
