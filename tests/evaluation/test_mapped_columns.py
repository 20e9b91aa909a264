"""Rows as users have them: other column names, an unlabeled row; and mistakes in a recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import run_dsbs, toy_rows, write_csv

from dsbs import UserError, evaluate, load_recipe, train
from dsbs.config import Recipe


def mapped(toy: Callable[..., Path], tmp_path: Path, *overrides: str) -> Recipe:
    """The toy data with its text in a column `message`, learned without a teacher."""
    path = toy(train=40, test=12)
    for name, start, count in (("train", 0, 40), ("test", 1000, 12)):
        rows = [
            {"id": row["id"], "message": row["text"], "team": row["team"]}
            for row in toy_rows(count, start=start)
        ]
        write_csv(tmp_path / f"{name}.csv", rows)
    changes = [
        "task.columns={label: team, text: message}",
        "train.methods=finetune",
        "train.max_steps=1",
        "eval.latency_calls=0",
    ]
    return load_recipe(path, [*changes, *overrides])


def test_a_mapped_column_works_in_every_stage(toy: Callable[..., Path], tmp_path: Path) -> None:
    recipe = mapped(toy, tmp_path)
    train(recipe, out=tmp_path / "run")
    assert evaluate(recipe, out=tmp_path / "run").n == 12
    rows = [{"id": "01", "message": "My parcel\nis late."}, {"id": "02", "message": "An invoice."}]
    write_csv(tmp_path / "in.csv", [*rows, {"id": "03", "message": " "}])
    result = run_dsbs(
        "predict",
        str(tmp_path / "run" / "train" / "finetune-gold-s0"),
        "in.csv",
        "--batch-size=1",
        cwd=tmp_path,
    )
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ["01", "02"]
    assert result.returncode == 2 and "in.csv:5: message is empty" in result.stderr


def test_one_unlabeled_validation_row_costs_that_row_alone(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {"id": f"v{i}", "message": f"My parcel {i} is late.", "team": "" if i == 3 else "shipping"}
        for i in range(8)
    ]
    write_csv(tmp_path / "valid.csv", rows)
    recipe = mapped(toy, tmp_path, f"task.data.valid={tmp_path / 'valid.csv'}")
    train(recipe, out=tmp_path / "run")
    record = json.loads(
        (tmp_path / "run" / "train" / "finetune-gold-s0" / "train.json").read_text(encoding="utf-8")
    )
    assert (record["valid_rows"], record["valid_labels"]) == (7, "gold")


def test_predicting_with_something_else_is_an_error(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "messages.txt").write_text("hello\n", encoding="utf-8")
    result = run_dsbs("predict", "messages.txt", cwd=tmp_path)
    assert result.returncode == 2 and "does not contain a student" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("teacher.api_key_env=sk-proj-SECRET123", "not a valid environment variable name"),
        ("teacher.base_url=https://a.example/v1?key=SECRET123", "query"),
        ("teacher.extra_body={api_key: SECRET123}", "credentials"),
        ("teacher.extra_body={headers: {X-Auth: SECRET123}}", "credentials"),
        ("teacher.extra_body={metadata: {note: sk-SECRET123456}}", "credentials"),
        ("teacher.extra_body={token: SECRET123}", "credentials"),
        ("train.seeds=[-1]", "greater than or equal to 0"),
        ("train.methods=[]", "at least 1"),
        ("eval.baseline=finetun", "did you mean 'finetune'"),
    ],
)
def test_mistakes_are_reported_without_secrets(
    toy: Callable[..., Path], change: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(toy(), [change])
    text = f"{error.value}\n{error.value.hint}"
    assert message in text
    assert "SECRET123" not in text.replace(change, "")
