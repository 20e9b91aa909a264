"""Several labels, scores and fields: each mistake in recipe, rows or prompt is one message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_dsbs, write_jsonl

FIELDS = {
    "kind": {"type": "label", "labels": ["invoice", "refund"], "required": True},
    "sender": {"type": "text"},
    "amount": {"type": "number"},
    "due": {"type": "date"},
    "items": {"type": "list"},
}
TASKS: dict[str, dict[str, Any]] = {
    "multilabel": {"labels": ["red", "blue", "green"]},
    "score": {"range": [1, 5]},
    "extraction": {"fields": FIELDS},
}
GOOD = {"multilabel": ["red", "blue"], "score": 4, "extraction": {"kind": "invoice", "amount": 3}}


def check(kind: str, folder: Path, mistake: dict[str, Any], message: str) -> None:
    """``mistake``: keys of the task, or a ``row``, the ``label`` of a row or of an ``exemplar``."""
    rows = [{"text": f"The text of row {i}.", "label": GOOD[kind]} for i in range(20)]
    mistake = dict(mistake)
    bad_row = {"text": "Another one.", "label": mistake.pop("label", GOOD[kind])}
    rows.append(mistake.pop("row", bad_row))
    write_jsonl(folder / "rows.jsonl", rows)
    label = mistake.pop("exemplar", GOOD[kind])
    exemplar = {"input": {"text": "A text."}, "rationale": "It says so.", "label": label}
    prompt = {"template": "Text: {{ text }}", "exemplars": [exemplar]}
    (folder / "prompt.yaml").write_text(json.dumps(prompt), encoding="utf-8")
    task = {"name": kind, "data": {"train": "rows.jsonl"}} | TASKS[kind] | mistake
    recipe = {
        "name": "bad",
        "task": {key: value for key, value in task.items() if value != "absent"},
        "teacher": {"model": "m"},
        "annotate": {"prompt": "prompt.yaml"},
        "student": {"init": "scratch"},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    done = run_dsbs("validate", "recipe.yaml", cwd=folder)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr and done.stderr.count("\n  try: ") == 1, done.stderr
    assert done.stderr.startswith("dsbs: ") and message in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"labels": "absent"}, "task.labels is needed for multilabel, e.g. labels:"),
        ({"labels": ["red"]}, "at least two labels are needed"),
        ({"labels": ["red", "red"]}, "the label 'red' is given twice"),
        ({"labels": ["red", "Red"]}, "cannot be told apart"),
        ({"labels": ["red", "a; b"]}, "has a semicolon or a line break"),
        ({"labels": ["red", "None"]}, "means that a row has no label"),
        ({"labels": ["red", ""]}, "a label must not be empty"),
        ({"labels": ["red", ["blue"]]}, "entry 2 is ['blue'], not text"),
        ({"range": [1, 5]}, "task.range belongs to score, not to multilabel"),
        ({"fields": {"a": {"type": "text"}}}, "task.fields belongs to extraction"),
        ({"numeric": True}, "task.numeric belongs to generation"),
        ({"lables": ["a", "b"]}, "did you mean"),
        ({"columns": {"separator": ""}}, "task.columns.separator is empty"),
        ({"columns": {"label": "topics"}}, "no column 'topics'"),
        ({"label": ["red", "pink"]}, "rows.jsonl:21: 'pink' is not one of the task's labels"),
        ({"label": "red; pink"}, "rows.jsonl:21: 'pink' is not one of the task's labels"),
        ({"label": "red, blue"}, "rows.jsonl:21: 'red, blue' is not one of the task's labels"),
        ({"label": '["red", "blue"'}, "is not one of the task's labels"),
        ({"label": {"red": True}}, "rows.jsonl:21: label is a dict, not text"),
        ({"label": [["red"]]}, "is not one of the task's labels"),
        ({"label": [None]}, "is not one of the task's labels"),
        ({"label": True}, "is not one of the task's labels"),
        ({"label": 3}, "rows.jsonl:21: '3' is not one of the task's labels"),
        ({"row": {"label": ["red"]}}, "rows.jsonl:21: no column 'text'"),
        ({"exemplar": ["pink"]}, "prompt, exemplar 1: 'pink' is not one of the task's labels"),
        ({"exemplar": {"red": 1}}, "prompt, exemplar 1: label is a dict, not text"),
        ({"exemplar": ""}, "prompt, exemplar 1: no label"),
    ],
)
def test_a_mistake_about_several_labels(
    mistake: dict[str, Any], message: str, tmp_path: Path
) -> None:
    check("multilabel", tmp_path, mistake, message)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"range": "absent"}, "task.range is needed for score, e.g. range: [1, 5]"),
        ({"range": [5, 1]}, "the first number must be the smaller one"),
        ({"range": [1, 1]}, "the first number must be the smaller one"),
        ({"range": [1, 5], "step": 3}, "a whole number of steps must lie between them"),
        ({"step": 0}, "greater than 0"),
        ({"step": -1}, "greater than 0"),
        ({"range": [1, 2, 3]}, "task.range"),
        ({"range": ["low", "high"]}, "task.range[0]: must be a number"),
        ({"range": 5}, "task.range"),
        ({"range": [0, 1000]}, "has 1001 points: at most 201 are supported"),
        ({"range": [0, 1], "step": 0.001}, "has 1001 points: at most 201 are supported"),
        ({"labels": ["good", "bad"]}, "task.labels belongs to classification and multilabel"),
        ({"stpe": 0.5}, "did you mean"),
        ({"columns": {"label": "stars"}}, "no column 'stars'"),
        ({"label": 6}, "rows.jsonl:21: the score '6' is not a number from 1 to 5"),
        ({"label": 3.5}, "rows.jsonl:21: the score '3.5' is not a number from 1 to 5"),
        ({"label": "good"}, "the score 'good' is not a number from 1 to 5 in steps of 1"),
        ({"label": "4/10"}, "the score '4/10' is not a number"),
        ({"label": "3-4"}, "the score '3-4' is not a number"),
        ({"label": "1,5"}, "the score '1,5' is not a number"),
        ({"label": True}, "the score 'True' is not a number"),
        ({"label": [4]}, "rows.jsonl:21: label is a list, not text"),
        ({"label": {"stars": 4}}, "rows.jsonl:21: label is a dict, not text"),
        ({"exemplar": 9}, "prompt, exemplar 1: the score '9' is not a number from 1 to 5"),
        ({"exemplar": [4]}, "prompt, exemplar 1: label is a list, not text"),
    ],
)
def test_a_mistake_about_a_score(mistake: dict[str, Any], message: str, tmp_path: Path) -> None:
    check("score", tmp_path, mistake, message)


def with_value(**values: Any) -> dict[str, Any]:
    return {"label": {"kind": "invoice"} | values}


def with_fields(**fields: Any) -> dict[str, Any]:
    return {"fields": FIELDS | fields}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"fields": "absent"}, "task.fields is needed for extraction, e.g. fields:"),
        ({"fields": {}}, "at least one field is needed"),
        ({"labels": ["a", "b"]}, "task.labels belongs to classification and multilabel"),
        (with_fields(city={}), "task.fields.city.type"),
        (with_fields(city={"type": "place"}), "task.fields.city.type"),
        (with_fields(city={"type": "label"}), "labels is needed for a field of type label"),
        (with_fields(city={"type": "label", "labels": ["a"]}), "at least two labels are needed"),
        (with_fields(city={"type": "label", "labels": ["null", "a"]}), "there is no value"),
        (with_fields(city={"type": "label", "labels": ["a\nb", "c"]}), "must be on one line"),
        (with_fields(city={"type": "text", "labels": ["a", "b"]}), "labels belongs to fields of"),
        (with_fields(city={"type": "number", "verbatim": True}), "verbatim belongs to fields of"),
        (with_fields(city={"type": "text", "day_first": True}), "day_first belongs to fields of"),
        (with_fields(city={"type": "text", "reqired": True}), "did you mean"),
        (with_fields(**{"a:b": {"type": "text"}}), "the field name 'a:b'"),
        (with_fields(**{"1st": {"type": "text"}}), "the field name '1st'"),
        (with_fields(text={"type": "text"}), "a column with another meaning"),
        (with_fields(Label={"type": "text"}), "a column with another meaning"),
        (with_fields(Sender={"type": "text"}), "cannot be told apart"),
        ({"label": '{"kind": "invoice", "kind": "refund"}'}, "not an object with a value"),
        ({"label": "hello"}, "not an object with a value for each field"),
        ({"label": ["invoice"]}, "rows.jsonl:21: label is a list, not text"),
        ({"label": {"amount": 3}}, "kind has no value, and task.fields requires one"),
        (with_value(colour="red"), "a field 'colour' that task.fields does not have"),
        (with_value(kind="letter"), "kind is 'letter', which is not one of the field's labels"),
        (with_value(amount="many"), "amount is 'many', which is not a number"),
        (with_value(amount="3 or 4"), "which is more than one number"),
        (with_value(amount=[3]), "amount is '[3]', which is not a number"),
        (with_value(due="soon"), "due is 'soon', which is not a day"),
        (with_value(due="03/2025"), "which lacks the year, the month or the day"),
        (with_value(due="31 February 2025"), "which is not a day"),
        (with_value(due=3), "which lacks the year, the month or the day"),
        (with_value(sender="null"), "which means that there is no value"),
        (with_value(sender="see due: Monday"), "which has a field's name and a colon in it"),
        (with_value(sender=["Ann"]), "sender is \"['Ann']\", which is not text"),
        (with_value(items=["a | b"]), "with an item that is not text or has a |"),
        (with_value(items={"a": 1}), "which is not a list"),
        ({"exemplar": {"kind": "letter"}}, "prompt, exemplar 1: kind is 'letter', which is not"),
        ({"exemplar": {"kind": "refund", "x": 1}}, "prompt, exemplar 1: the label has a field 'x'"),
        ({"exemplar": "refund"}, "prompt, exemplar 1: label is 'refund', not an object"),
    ],
)
def test_a_mistake_about_fields(mistake: dict[str, Any], message: str, tmp_path: Path) -> None:
    check("extraction", tmp_path, mistake, message)
