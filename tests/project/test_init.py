"""A new project: whole or not at all, never over anything, and ready for every command."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from conftest import ROOT, run_dsbs
from jsonschema import Draft202012Validator
from loopback import LoopbackServer

import dsbs
from dsbs.cli.init import Template
from dsbs.errors import UserError
from dsbs.project.compare_teachers import compare_teachers
from dsbs.project.init import SCHEMA, Kind, init

KINDS = get_args(Kind)
# The columns of the label, where it is not "label".
LABEL = {
    "generation": ("answer",),
    "multilabel": ("topics",),
    "score": ("stars",),
    "extraction": ("kind", "sender", "amount", "due", "items"),
}


def label_columns(kind: Kind) -> tuple[str, ...]:
    return LABEL.get(kind, ("label",))


def inputs_of(kind: Kind, row: dict[str, str]) -> tuple[str, ...]:
    return tuple(text for column, text in row.items() if column not in label_columns(kind))


def label_of(kind: Kind, row: dict[str, str]) -> str:
    """The row's label as a teacher writes it."""
    if kind == "extraction":
        lines = (f"{name}: {row[name] or 'null'}" for name in label_columns(kind))
        return "\n" + "\n".join(lines)
    return row[label_columns(kind)[0]]


def rows(folder: Path, split: str) -> list[dict[str, str]]:
    with (folder / f"{split}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_command_offers_the_templates_that_ship() -> None:
    assert [template.value for template in Template] == list(KINDS)
    assert sorted(path.name for path in (ROOT / "data" / "templates").iterdir()) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_balanced_distinct_and_apart_from_one_another(kind: Kind) -> None:
    folder = ROOT / "data" / "templates" / kind
    splits = [rows(folder, path.stem) for path in sorted(folder.glob("*.csv"))]
    assert 24 <= sum(map(len, splits)) <= 120
    inputs = [" ".join(inputs_of(kind, row)) for split in splits for row in split]
    prompt = yaml.safe_load((folder / "prompt.yaml").read_text(encoding="utf-8"))
    inputs += [" ".join(exemplar["input"].values()) for exemplar in prompt["exemplars"]]
    assert len({text.casefold() for text in inputs}) == len(inputs)
    for split in splits:
        labels = [row[label_columns(kind)[0]] for row in split]
        if kind == "math":
            labels = [re.sub(r"[\d ]", "", label) for label in labels]  # the kind of arithmetic
        if kind == "multilabel":
            counts = Counter(label for cell in labels for label in cell.split("; "))
            assert 2 * min(counts.values()) >= max(counts.values()) / 2 and counts["none"] >= 4
            continue
        counts = Counter(labels)
        assert max(counts.values()) - min(counts.values()) <= (kind == "extraction"), counts
    all_rows = [row for split in splits for row in split]
    if kind in ("multilabel", "score", "extraction"):
        assert sorted(map(len, splits)) == [20, 40, 60]
    if kind == "extraction":
        for name in ("sender", "due", "items"):
            assert 0.05 < sum(not row[name] for row in all_rows) / len(all_rows) < 0.5, name
    if kind == "math":
        for row in all_rows:
            numbers = set(re.findall(r"\d+", row["label"]))
            assert numbers <= set(re.findall(r"\d+", f"{row['body']} {row['question']}")), (
                "a number that the problem lacks"
            )
            assert eval(row["label"]) == int(eval(row["label"])), row
    if kind == "generation":
        assert all(re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", row["answer"]) for row in all_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_project_is_valid_for_dsbs_and_for_an_editor(kind: Kind, tmp_path: Path) -> None:
    done = run_dsbs("init", "my-project", "--template", kind, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "my-project"
    recipe = (folder / "recipe.yaml").read_text(encoding="utf-8")
    assert recipe.startswith(f"# yaml-language-server: $schema={SCHEMA}\nname: my-project\n")
    schema = json.loads((folder / SCHEMA).read_text(encoding="utf-8"))
    assert not list(Draft202012Validator(schema).iter_errors(yaml.safe_load(recipe)))
    for where, path in ((tmp_path, "my-project/recipe.yaml"), (folder, "recipe.yaml")):
        valid = run_dsbs("validate", path, "--json", cwd=where)
        assert valid.returncode == 0, valid.stderr
        warnings = json.loads(valid.stdout)["warnings"]
        assert not [warning for warning in warnings if "'\\n'" not in warning], (
            "SVAMP's input has a line break of its own"
        )
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert readme.startswith("# my-project\n") and "runs/my-project/report.html" in readme
    assert {path.name for path in tmp_path.iterdir()} == {"my-project"}, "nothing else is left"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_project_goes_through_all_stages(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = init("mine", kind, tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    labels = {
        inputs_of(kind, row): label_of(kind, row)
        for path in folder.glob("*.csv")
        for row in rows(folder, path.stem)
    }
    template = (
        "It is plain to see. The answer is ({})."
        if kind == "math"
        else "It is plain to see.\nAnswer: {}"
    )

    def answer(body: dict[str, Any], number: int) -> str:
        question = body["messages"][-1]["content"]
        (gold,) = {
            gold for words, gold in labels.items() if all(word in question for word in words)
        }
        return template.format(gold)

    with LoopbackServer(answer) as server:
        changes = [
            f"teacher.base_url={server.url}",
            "train.max_steps=3",
            "train.eval_every=3",
            "eval.latency_calls=0",
        ]
        recipe = dsbs.load_recipe("recipe.yaml", changes)
        annotated = dsbs.annotate(recipe)
        assert server.requests == sum(split.rows for split in annotated.splits.values())
        assert set(server.keys) == {"Bearer a-key"}
        compared = compare_teachers({"one": recipe, "two": recipe}, rows=10)
        assert compared.agreement == {"one": {"two": 1.0}, "two": {"one": 1.0}}
    assert all(
        split.label_accuracy is not None and split.label_accuracy.value == 1.0
        for split in annotated.splits.values()
    )
    assert all(split.accepted == split.rows for split in annotated.splits.values())
    dsbs.train(recipe)
    results = dsbs.evaluate(recipe)
    assert results.n == len(rows(folder, "test"))
    assert {system.name for system in results.systems if system.kind != "floor"} == {
        "teacher",
        "step-by-step-gold",
        "finetune-gold",
        "distill-teacher",
    }
    assert dsbs.report(recipe).is_file()


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "/abs", "-x", ".hidden", "a b", "name\n", "ünïcode", "a\0b"]
)
def test_a_name_that_no_recipe_can_have_is_refused_with_what_it_may_be(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is not a valid name"):
        init(name, parent=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["1.5", "null", "true", "1e3", "0x1f"])
def test_a_name_that_yaml_would_read_as_something_else_stays_a_name(
    name: str, tmp_path: Path
) -> None:
    folder = init(name, parent=tmp_path)
    assert dsbs.load_recipe(folder / "recipe.yaml").name == name


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        done = run_dsbs("init", name, cwd=tmp_path)
        assert done.returncode == 2 and f"{name} exists already" in done.stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine" and not (
        tmp_path / "nowhere"
    ).exists()
    (tmp_path / "empty").mkdir()
    assert (init("empty", parent=tmp_path) / "recipe.yaml").is_file()


def test_killed_in_the_middle_it_leaves_no_folder_of_that_name_and_can_be_run_again(
    tmp_path: Path,
) -> None:
    code = (
        "import os, signal, dsbs.project.init as it\n"
        "it.recipe_schema = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "it.init('mine', 'math')\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [".mine.partial"]
    (tmp_path / ".mine.partial" / "left-over.csv").touch()
    init("mine", "classification", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    names = {path.name for path in (ROOT / "data" / "templates" / "classification").iterdir()}
    assert {path.name for path in (tmp_path / "mine").iterdir()} == names | {SCHEMA}


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"):
        init("mine", parent=tmp_path / "file")
    with pytest.raises(UserError, match="cannot be created"):
        init("a" * 300, parent=tmp_path)
