"""The recipe's JSON schema: editors accept what dsbs accepts, and every key is described."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, run_dsbs
from jsonschema import Draft202012Validator

from dsbs.config import Recipe, TrainSection
from dsbs.config.load import load_recipe
from dsbs.config.schema import descriptions, recipe_schema, sections
from dsbs.errors import UserError

SHIPPED = sorted(
    path.relative_to(ROOT)
    for folder in ("recipes", "recipes/paper", "data/templates")
    for path in (ROOT / folder).glob("*.yaml" if folder.startswith("recipes") else "*/recipe.yaml")
)


@pytest.fixture(scope="module")
def schema() -> Any:
    schema = recipe_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def minimal(**sections: Any) -> dict[str, Any]:
    recipe: dict[str, Any] = {
        "task": {"name": "classification", "labels": ["a", "b"], "data": {"train": "x.csv"}},
        "teacher": {"model": "m"},
    }
    for name, value in sections.items():
        recipe[name] = recipe.get(name, {}) | value if isinstance(value, dict) else value
    return recipe


def loads(recipe: dict[str, Any], tmp_path: Path) -> bool:
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    try:
        load_recipe(tmp_path / "recipe.yaml")
    except UserError:
        return False
    return True


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_every_recipe_that_ships_fits(path: Path, schema: Any) -> None:
    assert not [
        error.message
        for error in schema.iter_errors(yaml.safe_load((ROOT / path).read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize(
    "more",
    [
        {"train": {"methods": "finetune", "labels": "teacher", "seeds": 3, "subset": 0.5}},
        {
            "train": {
                "tune": {"learning_rate": 0.001, "max_steps": [10, 20]},
                "select": {"provenance": "own"},
            }
        },
        {"train": {"select": {"provenance": ["own", "hinted"]}, "tune": None}},
        {"train": {"lora": {}}, "student": {"model": "google/t5-v1_1-base"}},
        {"task": {"labels": [1, 2]}},
        {"annotate": None, "train": None, "report": None},
        {"annotate": {"splits": "train"}},
        {"teacher": "recipes/teachers/openai.yaml"},
        {"teacher": {"endpoints": [{"base_url": "http://127.0.0.1:1/v1", "weight": 2}]}},
        {"name": "a.b-c_1"},
        {"eval": {"baseline": "finetune", "predictions": {"mine": "mine.jsonl"}}},
    ],
    ids=json.dumps,
)
def test_what_dsbs_takes_the_schema_takes(
    more: dict[str, Any], schema: Any, tmp_path: Path
) -> None:
    recipe = minimal(**more)
    assert loads(recipe, tmp_path)
    assert not [error.message for error in schema.iter_errors(recipe)]


@pytest.mark.parametrize(
    "more",
    [
        {"train": {"metods": "finetune"}},
        {"train": {"methods": ["stepbystep"]}},
        {"train": {"methods": []}},
        {"train": {"seeds": [-1]}},
        {"train": {"max_steps": 0}},
        {"task": {"name": "sentiment"}},
        {"task": {"data": {}}},
        {"teacher": {"kind": "oracle"}},
        {"name": "a b"},
        {"task": None},
        {"extra": 1},
    ],
    ids=json.dumps,
)
def test_what_dsbs_refuses_the_schema_refuses(
    more: dict[str, Any], schema: Any, tmp_path: Path
) -> None:
    recipe = minimal(**more)
    assert not loads(recipe, tmp_path)
    assert [error.message for error in schema.iter_errors(recipe)]


def test_every_key_of_every_section_has_a_description() -> None:
    for path, section in sections().items():
        for key, text in descriptions(section).items():
            assert text.endswith("."), f"{path}.{key}: write a sentence below the field"
    schema = recipe_schema()
    for definition in (schema, *schema["$defs"].values()):
        assert all(spec["description"] for spec in definition["properties"].values())


def test_descriptions_are_the_docstrings_below_the_fields() -> None:
    train = descriptions(TrainSection)
    assert train["warmup_steps"] == "Steps in which the learning rate rises to its peak."
    assert train["micro_batch_size"].endswith("null: the whole batch."), "YAML has no None"
    assert set(descriptions(Recipe)) == set(Recipe.model_fields)


def test_the_command_prints_or_writes_the_schema(tmp_path: Path) -> None:
    printed = run_dsbs("schema", cwd=tmp_path)
    written = run_dsbs("schema", "--out", "recipe.schema.json", cwd=tmp_path)
    assert printed.returncode == written.returncode == 0, written.stderr
    assert json.loads(printed.stdout) == json.loads(
        (tmp_path / "recipe.schema.json").read_text(encoding="utf-8")
    )
    assert json.loads(printed.stdout)["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert "# yaml-language-server: $schema=recipe.schema.json" in written.stdout
