"""Warnings about a prompt before a reply is paid for."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT

from dsbs.config import Recipe, TaskSection
from dsbs.config.load import load_recipe
from dsbs.errors import UserError
from dsbs.project.validate import check_prompt, check_written_labels
from dsbs.prompting import Prompt, load_prompt
from dsbs.records import Example
from dsbs.tasks import make_task

TEXT = "the parcel that I ordered two weeks ago has still not come to my door"


def warnings(
    exemplars: list[tuple[str, str, str]], rows: list[str] = (), **changes: Any
) -> list[str]:  # type: ignore[assignment]
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "task": {
                "name": "classification",
                "labels": ["billing", "shipping"],
                "data": {"train": "-"},
            },
            "teacher": {"model": "m"} | changes.pop("teacher", {}),
        }
    )
    prompt = Prompt.model_validate(
        {"template": "Text: {{ text }}", "stop": ["\nText:"]}
        | changes
        | {
            "exemplars": [
                {"input": {"text": text}, "rationale": why, "label": label}
                for text, why, label in exemplars
            ]
        }
    )
    parts = {
        "train": [Example("t0", {"text": "something else"})],
        "test": [Example(f"r{i}", {"text": t}) for i, t in enumerate(rows)],
    }
    return check_prompt(recipe, prompt, make_task(recipe.task), parts)


GOOD = [
    ("where is my box", "It is a box.", "shipping"),
    ("what does it cost", "It is a price.", "billing"),
]


def test_a_sound_prompt_is_passed_in_silence() -> None:
    assert warnings(GOOD, [TEXT]) == []


@pytest.mark.parametrize("name", ["demo", "svamp", "cqa", "anli", "esnli"])
def test_the_shipped_prompts_are_sound(name: str) -> None:
    recipe = load_recipe(ROOT / "recipes" / f"{name}.yaml")
    task = make_task(recipe.task)
    assert check_prompt(recipe, load_prompt(recipe, task), task, {}) == []


def test_an_exemplar_that_cannot_be_read_is_named() -> None:
    (message,) = warnings(GOOD, answer="{{ rationale }} So: {{ label }}")[:1]
    assert "exemplar 1 does not parse (unparsed)" in message
    assert any("exemplar 1 does not parse" in w for w in warnings(GOOD, stop=["It is"]))
    messages = warnings([*GOOD, ("a", "b", "shipping")], answer="{{ rationale }}\nAnswer: billing")
    assert any("exemplar 3 says 'shipping' but is read as 'billing'" in w for w in messages)


@pytest.mark.parametrize(
    ("exemplar", "row", "leaks"),
    [
        (TEXT, TEXT.upper() + "!!", True),
        (TEXT, "hello, the parcel that I ordered two weeks ago, and more", True),
        (TEXT, "the parcel that I ordered is here", False),
        ("Where is it?", "where is  it", True),
        ("Where is it?", "where is it now", False),
    ],
)
def test_words_shared_with_the_data_are_a_leak(exemplar: str, row: str, leaks: bool) -> None:
    messages = [
        w
        for w in warnings([(exemplar, "It is a box.", "shipping"), GOOD[1]], [row])
        if "shares" in w
    ]
    assert bool(messages) is leaks
    if leaks:
        assert "exemplar 1" in messages[0] and "test: r0" in messages[0]


def test_labels_that_are_missing_or_rare_are_told() -> None:
    assert any("no exemplar is labeled billing" in w for w in warnings(GOOD[:1]))
    assert any(
        "unbalanced" in w
        for w in warnings([*GOOD, *[(f"box {i}", "It is a box.", "shipping") for i in range(2)]])
    )


def test_prompts_beyond_the_context_are_counted() -> None:
    messages = warnings(GOOD, ["word " * 400, "word"], teacher={"context_tokens": 400})
    assert any("1 of 3 prompts" in w and "context of 400" in w for w in messages)
    assert warnings(GOOD, ["word " * 400]) == [], "an endpoint's context is not known"


def test_labels_with_commas_in_a_prompt_file_of_ones_own_must_be_kept_apart() -> None:
    labels = ["Food, drink", "Travel", "Food"]
    recipe = Recipe(
        name="r",
        task={"name": "classification", "labels": labels, "data": {"train": "-"}},
        teacher={"model": "m"},
        annotate={"prompt": "own.yaml"},
    )
    task = make_task(recipe.task)

    def warned(instruction: str) -> bool:
        prompt = Prompt(instruction=instruction, template="Text: {{ text }}")
        messages = check_prompt(recipe, prompt, task, {"train": []})
        return any("'Food, drink' has a comma" in message for message in messages)

    assert warned("One of: Food, drink, Travel, Food.")
    assert warned("One of: Travel, Food, drink")
    assert not warned('One of: "Food, drink", "Travel", "Food".')
    assert not warned("One of:\n- Food, drink\n- Travel\n- Food")


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"stop": ["ing"]}, "billing"),
        ({"answer": "{{ label }}", "exemplars": True}, "billing"),
    ],
)
def test_a_label_that_a_reply_would_not_be_read_as_is_an_error(
    changes: dict[str, Any], label: str
) -> None:
    section = TaskSection(
        name="classification", labels=["billing", "shipping"], data={"train": "-"}
    )
    if changes.pop("exemplars", False):
        changes["exemplars"] = [{"input": {"text": "t"}, "rationale": "r", "label": label}]
    prompt = Prompt.model_validate({"template": "{{ text }}"} | changes)
    with pytest.raises(UserError, match=f"{label!r} is written .* which reads as"):
        check_written_labels(make_task(section), prompt, Example("1", {"text": "t"}))


@pytest.mark.parametrize(("name", "number"), [("banking77", 77), ("clinc150", 151)])
@pytest.mark.parametrize(
    "changes", [[], ["annotate.order=label-first"], ["annotate.format=json"]], ids=str
)
def test_every_intent_of_the_shipped_recipes_is_read_back(
    name: str, number: int, changes: list[str]
) -> None:
    recipe = load_recipe(f"recipes/{name}.yaml", changes)
    task = make_task(recipe.task)
    assert len(task.labels or ()) == number
    check_written_labels(task, load_prompt(recipe, task), Example("1", {"text": TEXT}))
