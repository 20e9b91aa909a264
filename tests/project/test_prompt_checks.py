"""Warnings about a prompt before a reply is paid for."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import ROOT

from dsbs.config import Recipe
from dsbs.config.load import load_recipe
from dsbs.project.validate import check_prompt
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
