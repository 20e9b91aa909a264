"""validate: what it measures and what it warns of."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TEAMS, run_dsbs, toy_rows, write_csv, write_jsonl
from test_student import make_student

from dsbs import UserError, load_recipe, validate
from dsbs.project.validate import Validation


def test_a_sound_recipe_has_figures_and_no_warnings(toy: Callable[..., Path]) -> None:
    result = validate(load_recipe(toy(), ["task.data.valid_fraction=0.3"]))
    # The toy's rows differ in a number alone.
    assert all("nearly the same" in warning for warning in result.warnings)
    assert result.splits["train"]["rows"] == 40 and result.splits["train"]["labels"] == {
        "billing": 20,
        "shipping": 20,
    }
    assert result.splits["test"]["inputs"]["truncated"] == 0.0
    assert result.first_prompt is not None and "invoice number 0" in result.first_prompt


def test_cut_inputs_unknown_tokens_missing_labels_and_repeated_rows_are_told(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy()
    folder = tmp_path / "pretrained"
    make_student(words=["billing", "shipping"]).save(folder)
    rows = [
        *toy_rows(3),
        {"id": "t1", "text": "My parcel 駅 駅 駅 is late " * 30, "team": "shipping"},
    ]
    write_csv(
        tmp_path / "test.csv", [row | {"id": f"t-{row['id']}", "team": "shipping"} for row in rows]
    )
    result = validate(
        load_recipe(path, [f"student={{model: {folder}}}", "student.max_input_tokens=64"])
    )
    messages = "\n".join(result.warnings)
    assert "test: 25.0% of inputs are longer than student.max_input_tokens" in messages
    assert "that the student's tokenizer does not know" in messages and "駅" in messages
    assert "test: no row is labeled billing" in messages
    assert "test: 3 of 4 rows also in train" in messages


def test_what_training_would_refuse_is_refused_here(toy: Callable[..., Path]) -> None:
    terms = ["train.methods=rationale-then-label+labels", "train.terms=[{kind: labels}]"]
    with pytest.raises(UserError, match="writes them beside a rationale"):
        validate(load_recipe(toy(), terms))


def test_tokens_are_counted_by_the_start_that_training_has(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    # Of other texts: characters of the rows are unknown to it.
    make_student(words=["billing", "shipping"]).save(tmp_path / "start")
    fresh = validate(load_recipe(toy()))
    started = validate(load_recipe(toy(), [f"train.init={tmp_path / 'start'}"]))
    assert started.splits["test"]["inputs"]["longest"] > fresh.splits["test"]["inputs"]["longest"]


def test_rows_without_a_label_are_a_warning_that_says_what_to_do(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    write_csv(tmp_path / "own.csv", [{"id": str(i), "text": f"row {i}"} for i in range(40)])
    recipe = json.loads(toy().read_text())
    recipe["task"] |= {"data": {"train": str(tmp_path / "own.csv")}, "columns": {}}
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(recipe))
    result = validate(load_recipe(path))
    assert any("train: no row has a label; if a column holds it" in w for w in result.warnings)
    unlabeled = validate(load_recipe(path, ["train.labels=teacher"]))
    assert not any("no row has a label" in warning for warning in unlabeled.warnings)


def test_labels_that_the_student_cannot_write_whole_are_an_error(
    toy: Callable[..., Path],
) -> None:
    with pytest.raises(UserError, match="'billing' is written '', which reads as 'empty'"):
        validate(load_recipe(toy(), ["student.max_target_tokens=1"]))


def test_labels_of_every_kind_are_read_back_through_a_scratch_vocabulary(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    labels = ["A*", "A", "CO₂", "Food, drink", "first\nsecond", "007", "ru\u0308", "{x}"]
    rows = [{"id": str(i), "text": f"row {i}", "team": labels[i % 6]} for i in range(40)]
    write_csv(tmp_path / "own.csv", rows)
    recipe = json.loads(toy().read_text())
    recipe["task"] |= {"labels": labels, "data": {"train": str(tmp_path / "own.csv")}}
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(recipe))
    result = validate(load_recipe(path, ["eval.max_label_tokens=32"]))
    assert "\n- Food, drink\n- first second\n" in (result.first_prompt or "")


def shape(tmp_path: Path, task: dict[str, object], labels: list[object]) -> Validation:
    """The validation of rows with these labels, for train, valid and test alike."""
    rows = [{"text": f"Ann wrote line {i}.", "label": label} for i, label in enumerate(labels)]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    recipe = {
        "name": "r",
        "task": {"data": {"train": path, "valid": path, "test": path}} | task,
        "teacher": {"model": "m"},
        "student": {"init": "scratch"},
        "eval": {"max_label_tokens": 8},
    }
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    return validate(load_recipe(tmp_path / "r.json"))


def test_several_labels_are_counted_one_by_one(tmp_path: Path) -> None:
    labels: list[object] = [["a", "b"], ["b"], ["b", "a"], ["b"]]
    result = shape(tmp_path, {"name": "multilabel", "labels": ["a", "b", "c"]}, labels)
    figures = result.splits["train"]
    assert figures["labels"] == {"b": 4, "a": 2} and figures["labels_per_row"] == 1.5
    assert "train: no row is labeled c" in result.warnings
    assert "train: every row is labeled b: there is nothing to learn" in result.warnings
    none = shape(tmp_path, {"name": "multilabel", "labels": ["a", "b"]}, [["a"], [], []])
    assert none.splits["train"]["labels"] == {"none": 2, "a": 1}


def test_the_points_of_a_scale_are_counted_in_their_order(tmp_path: Path) -> None:
    result = shape(tmp_path, {"name": "score", "range": [1, 4]}, [4, 1, 4, 4, 2])
    assert list(result.splits["train"]["labels"].items()) == [("1", 1), ("2", 1), ("4", 3)]
    assert "train: no row is labeled 3" in result.warnings
    wide = shape(tmp_path, {"name": "score", "range": [0, 100]}, [4, 1])
    assert any("99 of the scale's 101 points have no row" in w for w in wide.warnings)


def test_fields_are_counted_and_their_values_looked_for_in_the_input(tmp_path: Path) -> None:
    fields = {
        "name": {"type": "text", "verbatim": True},
        "kind": {"type": "label", "labels": ["a", "b"]},
        "due": {"type": "date"},
    }
    labels: list[object] = [{"name": "Ann", "kind": "a"}, {"name": "Bob"}, {"kind": "a"}, {}]
    result = shape(tmp_path, {"name": "extraction", "fields": fields}, labels)
    figures = result.splits["train"]["fields"]
    assert figures["kind"] == {"filled": 0.5, "labels": {"a": 2, "b": 0}}
    assert figures["name"]["filled"] == 0.5 and len(figures["name"]["not_in_input"]) == 1
    messages = "\n".join(result.warnings)
    assert "train: no row has kind b" in messages and "no row has a value for due" in messages
    assert "train: name is verbatim, but in 1 row its gold value does not occur" in messages
    assert "labels are longer than eval.max_label_tokens and can never be right" in messages


def test_a_long_prompt_is_cut_in_the_middle_and_whole_as_json(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    labels = [*TEAMS, *(f"team {number:03}" for number in range(300))]
    recipe = str(toy())
    setting = f"task.labels={json.dumps(labels)}"
    result = run_dsbs("validate", recipe, setting, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    shown = result.stdout
    assert (
        " characters not shown; --json has the whole text" in shown and "invoice number 0" in shown
    )
    assert "team 160" not in shown.partition("The first prompt:")[2].partition("warning:")[0]
    assert "train: no row is labeled team 000, " in shown and " and 292 more" in shown
    printed = run_dsbs("validate", recipe, setting, "--json", cwd=tmp_path).stdout
    assert "team 160" in json.loads(printed)["first_prompt"]
