"""dsbs show: a recipe with all its keys, and the differences between two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, run_dsbs

from dsbs.config import Recipe
from dsbs.config.diff import MISSING, differences
from dsbs.config.load import load_recipe, resolved_values
from dsbs.errors import UserError
from dsbs.project.runs import resolve_recipe

SHIPPED = sorted(
    str(path.relative_to(ROOT))
    for path in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "recipes" / "paper").glob("*.yaml")]
)


def recipe(tmp_path: Path, **sections: Any) -> str:
    values: dict[str, Any] = {
        "name": "one",
        "task": {"name": "classification", "labels": ["yes", "1"], "data": {"train": "x.csv"}},
        "teacher": {"model": "m"},
    }
    path = tmp_path / "one.yaml"
    path.write_text(json.dumps(values | sections), encoding="utf-8")
    return str(path)


def a_run(folder: Path, started: dict[str, str], **changes: dict[str, Any]) -> Path:
    """A run folder whose stages were given the demo's recipe, some of them with changes."""
    for stage, when in started.items():
        stage_recipe = load_recipe(
            "recipes/demo.yaml", [f"{key}={value}" for key, value in changes.get(stage, {}).items()]
        )
        (folder / stage).mkdir(parents=True)
        record = {
            "status": "done",
            "started": when,
            "ended": when,
            "recipe": stage_recipe.model_dump(mode="json"),
        }
        (folder / stage / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", SHIPPED)
def test_what_is_shown_is_the_same_recipe_again(path: str, tmp_path: Path) -> None:
    (tmp_path / "again.yaml").write_text(resolve_recipe(path).as_yaml(), encoding="utf-8")
    assert resolved_values(load_recipe(tmp_path / "again.yaml")) == resolved_values(
        load_recipe(path)
    )


def test_awkward_values_stay_on_their_line_and_are_read_again(tmp_path: Path) -> None:
    path = recipe(
        tmp_path,
        task={
            "name": "classification",
            "labels": ["yes", "1", "null", "a: b # c"],
            "data": {"train": "x.csv"},
            "input": "{{ a }}\n---\n{{ b }}",
            "description": "«ж» \u2028 \\ '\"" + " long" * 60,
        },
        teacher={
            "model": "1.0",
            "extra_body": {"stop": ["\n"], "seed": 3, "logit_bias": None},
            "endpoints": [
                {"base_url": "http://127.0.0.1:1/v1", "weight": 2},
                {"base_url": "http://127.0.0.1:2/v1"},
            ],
        },
        student={"model": "google/t5-v1_1-base"},
        train={"lora": {"rank": 4}, "tune": {"learning_rate": [1e-4, 3e-4]}},
    )
    text = resolve_recipe(path).as_yaml()
    assert len(text.splitlines()) == text.count("\n") + 1
    (tmp_path / "again.yaml").write_text(text, encoding="utf-8")
    assert resolved_values(load_recipe(tmp_path / "again.yaml")) == resolved_values(
        load_recipe(path)
    )


def test_what_is_not_the_default_is_marked_and_nothing_else(tmp_path: Path) -> None:
    shown = resolve_recipe(
        recipe(
            tmp_path, train={"batch_size": 8, "patience": None}, annotate={"batch": {"poll_s": 5}}
        )
    )
    assert shown.changed == {
        "task.labels": None,
        "teacher.model": None,
        "train.batch_size": 64,
        "annotate.batch.poll_s": 30.0,
    }
    lines = shown.as_yaml().splitlines()
    assert "  batch_size: 8  # default: 64" in lines and "    poll_s: 5.0  # default: 30.0" in lines
    assert "  max_steps: 1000" in lines, "a scratch student's own default is no change"
    pretrained = resolve_recipe(
        recipe(tmp_path, student={"model": "t5-small"}, train={"max_steps": 1000, "lora": {}})
    )
    assert pretrained.changed["train.max_steps"] == 10_000
    assert (
        pretrained.changed["train.lora"] is None
        and "  lora:  # default: null" in pretrained.as_yaml().splitlines()
    )


def test_two_recipes_differ_in_their_keys_alone(tmp_path: Path) -> None:
    first = resolve_recipe(recipe(tmp_path), ["train.seeds=[0, 1]"]).recipe
    other = resolve_recipe(
        recipe(tmp_path), ["student.model=t5-small", "train.lora.rank=8", "task.columns.label=team"]
    ).recipe
    changes = differences([first, other])
    assert changes["train.seeds"] == [[0, 1], [0]] and changes["student.model"] == [
        None,
        "t5-small",
    ]
    assert changes["task.columns"] == [{}, {"label": "team"}]
    assert changes["train.lora.rank"] == [MISSING, 8] and "train.lora" not in changes
    assert changes["train.learning_rate"] == [0.001, 5e-05], (
        "what follows from the change is told as well"
    )
    assert not differences([first, first])


def test_a_run_shows_what_its_newest_stage_was_given_and_says_where_others_differ(
    tmp_path: Path,
) -> None:
    times = {
        "annotate": "2026-01-01T00:00:00+00:00",
        "train": "2026-01-03T00:00:00+00:00",
        "eval": "2026-01-02T00:00:00+00:00",
    }
    run = a_run(
        tmp_path / "run", times, eval={"train.max_steps": 60}, train={"train.max_steps": 50}
    )
    shown = resolve_recipe(str(run))
    assert shown.recipe["train"]["max_steps"] == 50 and "train/manifest.json" in shown.source
    assert shown.remarks == (
        "annotate used another recipe, different in train.max_steps",
        "eval used another recipe, different in train.max_steps",
    )
    done = run_dsbs("show", "recipes/demo.yaml", str(run), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "train.max_steps" in line]
    assert "null" in line and "50" in line
    result = json.loads(
        run_dsbs("show", "recipes/demo.yaml", str(run), "--json", cwd=tmp_path).stdout
    )
    assert result["differs"] == {"train.max_steps": {"a": None, "b": 50}}
    same = run_dsbs(
        "show", "recipes/demo.yaml", str(run), "--set", "train.max_steps=50", cwd=tmp_path
    )
    assert "are the same recipe" in same.stdout


def test_a_run_of_another_version_is_shown_as_it_is(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", {"train": "2026-01-01T00:00:00+00:00"})
    path = run / "train" / "manifest.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["recipe"]["train"]["warp"] = 9
    record["recipe"]["bridge"] = {"deck": [1]}
    path.write_text(json.dumps(record), encoding="utf-8")
    text = resolve_recipe(str(run)).as_yaml()
    assert "  warp: 9  # unknown to this version" in text.splitlines()
    assert yaml.safe_load(text) == record["recipe"]


def test_what_is_neither_a_recipe_nor_a_run_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is not a run"):
        resolve_recipe(str(tmp_path / "empty"))
    run = a_run(tmp_path / "run", {"train": "2026-01-01T00:00:00+00:00"})
    with pytest.raises(UserError, match="is a run"):
        resolve_recipe(str(run), ["train.max_steps=3"])
    done = run_dsbs("show", "recipes/demo.yaml", "train.max_steps=3", cwd=tmp_path)
    assert done.returncode == 2 and "--set train.max_steps=3" in done.stderr


def test_a_key_never_shows(tmp_path: Path) -> None:
    done = run_dsbs(
        "show", recipe(tmp_path), "--json", cwd=tmp_path, env={"OPENAI_API_KEY": "sk-very-secret"}
    )
    assert done.returncode == 0 and "sk-very-secret" not in done.stdout
    assert (
        Recipe.model_validate(json.loads(done.stdout)["recipe"]).teacher.api_key_env
        == "OPENAI_API_KEY"
    )
