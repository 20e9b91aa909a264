"""Leakage: equal and near-equal inputs across splits, and equal inputs with different labels."""

from __future__ import annotations

import random
from pathlib import Path

from conftest import write_csv

from dsbs.config import Recipe, TaskSection
from dsbs.project.leakage import Overlap, find_overlaps
from dsbs.project.validate import validate
from dsbs.records import Example
from dsbs.tasks import make_task

WORDS = [f"{a}{b}{c}" for a in "bdgklm" for b in "aeiou" for c in "nrst"]


def rows(prefix: str, texts: list[str], label: str | None = "billing") -> list[Example]:
    return [
        Example(f"{prefix}{i}", {"text": text}, label, line=i + 2) for i, text in enumerate(texts)
    ]


def overlaps(**splits: list[Example]) -> dict[tuple[str, str, str], Overlap]:
    section = TaskSection.model_validate(
        {"name": "classification", "labels": ["billing", "shipping"], "data": {"train": "x"}}
    )
    found = find_overlaps(splits, make_task(section))
    return {(overlap.kind, overlap.earlier, overlap.split): overlap for overlap in found}


def sentences(number: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS, k=12)) for _ in range(number)]


def test_equal_inputs_are_found_whatever_their_case_spaces_and_unicode_form() -> None:
    train = rows("a", [*sentences(20, 1), "Where is  my café?"])
    test = rows("b", ["where is my cafe\u0301？", *sentences(20, 2)])
    found = overlaps(train=train, valid=[], test=test)
    assert set(found) == {("equal", "train", "test")}
    warning = found["equal", "train", "test"].warning()
    assert "test: 1 of 21 rows also in train, e.g. 'b0' (line 2) and train 'a20' (line 22)" in (
        warning
    )
    assert found["equal", "train", "test"].as_json() == {
        "kind": "equal",
        "splits": ["train", "test"],
        "rows": 1,
        "examples": [
            [
                {"id": "a20", "line": 22, "label": "billing"},
                {"id": "b0", "line": 2, "label": "billing"},
            ]
        ],
    }


def test_near_equal_inputs_are_found_and_others_are_not() -> None:
    originals = sentences(300, 3)
    changed = [f"{text[:30]}x{text[31:]}!" for text in originals[:100]]
    found = overlaps(
        train=rows("a", originals), valid=[], test=rows("b", changed + sentences(200, 4))
    )
    assert set(found) == {("near-equal", "train", "test")}
    overlap = found["near-equal", "train", "test"]
    assert 95 <= overlap.rows <= 100  # MinHash misses a few
    assert all(first.id[1:] == second.id[1:] for first, second in overlap.examples)


def test_a_template_with_many_rows_is_found_too() -> None:
    texts = [f"Where is my parcel number {i}, please?" for i in range(2000)]
    found = overlaps(train=rows("a", texts[::2]), valid=[], test=rows("b", texts[1::2]))
    assert found["near-equal", "train", "test"].rows > 900


def test_two_hypotheses_about_one_premise_are_two_examples() -> None:
    premise = " ".join(sentences(5, 5))
    section = TaskSection.model_validate({"name": "esnli", "data": {"train": "x"}})
    train = [Example("a", {"premise": premise, "hypothesis": "A man sleeps."}, "neutral")]
    test = [Example("b", {"premise": premise, "hypothesis": "Dogs run fast."}, "neutral")]
    assert find_overlaps({"train": train, "test": test}, make_task(section)) == []


def test_contradicting_labels_are_found_within_a_split_and_between_two() -> None:
    train = rows("a", ["one", "two"]) + rows("c", ["ONE"], "shipping") + rows("d", ["two"], None)
    found = overlaps(train=train, valid=[], test=rows("b", ["two"], "shipping"))
    assert found["other-label", "train", "train"].rows == 1
    assert "'c0' (line 2, shipping) and train 'a0' (line 2, billing)" in (
        found["other-label", "train", "train"].warning()
    )
    assert found["other-label", "train", "test"].rows == 1


def test_validate_reports_overlaps_but_none_of_rows_that_are_held_out(tmp_path: Path) -> None:
    texts = sentences(60, 6)
    train = write_csv(
        tmp_path / "train.csv", [{"text": text, "label": "billing"} for text in texts]
    )
    test = write_csv(tmp_path / "test.csv", [{"text": texts[7].upper(), "label": "shipping"}])
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "task": {
                "name": "classification",
                "labels": ["billing", "shipping"],
                "data": {"train": str(train), "test": str(test)},
            },
            "teacher": {"kind": "human"},
            "student": {"vocab_size": 120},
        }
    )
    found = validate(recipe)
    kinds = {(overlap["kind"], *overlap["splits"]) for overlap in found.as_json()["overlaps"]}
    splits = {split for _, *names in kinds for split in names}
    assert {kind for kind, *_ in kinds} == {"equal", "other-label"}
    assert "test" in splits
    assert not any({"train", "valid"} == set(names) for _, *names in kinds)
    assert any("also in" in warning for warning in found.warnings)
