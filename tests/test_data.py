"""The data that ships: whole, balanced, distinct."""

from __future__ import annotations

import csv
import re
from collections import Counter

import pytest
from conftest import ROOT

from dsbs import load_recipe
from dsbs.tasks import make_task
from dsbs.tasks.data import load

AT_LEAST = {"train": 240, "valid": 60, "test": 200}


def messages(split: str) -> list[dict[str, str]]:
    with (ROOT / "data" / "support" / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def runs_of_words(text: str, length: int = 6) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


@pytest.mark.parametrize("split", AT_LEAST)
def test_support_is_as_large_and_balanced_as_promised(split: str) -> None:
    rows = messages(split)
    assert len(rows) >= AT_LEAST[split]
    teams = Counter(row["team"] for row in rows)
    assert set(teams) == {"billing", "shipping", "technical", "account"}
    assert max(teams.values()) - min(teams.values()) <= 0.06 * len(rows)
    assert len({row["text"].strip().lower() for row in rows}) == len(rows)


def test_no_split_repeats_another_or_the_prompts_exemplars() -> None:
    import yaml

    phrases = {
        split: set().union(*(runs_of_words(row["text"]) for row in messages(split)))
        for split in AT_LEAST
    }
    prompt = yaml.safe_load((ROOT / "prompts" / "support.yaml").read_text(encoding="utf-8"))
    phrases["prompt"] = set().union(
        *(runs_of_words(exemplar["input"]["text"]) for exemplar in prompt["exemplars"])
    )
    names = sorted(phrases)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not phrases[a] & phrases[b], (a, b, phrases[a] & phrases[b])


def test_the_demo_recipe_reads_it() -> None:
    recipe = load_recipe("recipes/demo.yaml")
    task = make_task(recipe.task)
    for split, least in AT_LEAST.items():
        assert len(load(recipe, task, split)) >= least
