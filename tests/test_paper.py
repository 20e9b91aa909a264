"""The paper's recipes: published settings, `make paper`, published rows, a small full run."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_dsbs

from dsbs.config.load import load_recipe
from dsbs.tasks import make_task
from dsbs.tasks.data import load
from dsbs.training.grid import grid

TASKS = ("anli", "cqa", "esnli", "svamp")
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = ["make", "-C", str(ROOT), "--no-print-directory", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def real_rows(folder: Path, split: str) -> list[dict[str, Any]]:
    with gzip.open(folder / "svamp" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_there_is_a_recipe_for_each_of_the_papers_tasks() -> None:
    assert sorted(path.stem for path in (ROOT / "recipes" / "paper").iterdir()) == sorted(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_a_papers_recipe_holds_the_published_settings(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # found by its name alone, from anywhere
    recipe = load_recipe(f"recipes/paper/{name}.yaml")
    assert (recipe.name, recipe.task.name) == (f"paper-{name}", name)
    train, student = recipe.train, recipe.student
    assert (
        train.optimizer,
        train.learning_rate,
        train.schedule,
        train.warmup_steps,
        train.weight_decay,
    ) == (
        "adamw",
        5e-5,
        "linear",
        0,
        0.0,
    )
    assert (train.batch_size, train.max_steps, train.eval_every) == (64, 10_000, 250)
    assert (train.rationale_weight, train.rationale_schedule, train.patience) == (
        1.0,
        "constant",
        None,
    )
    assert (student.model, student.max_input_tokens, student.max_target_tokens) == (
        "google/t5-v1_1-base",
        1024,
        256,
    )
    assert recipe.eval.max_label_tokens == 64
    kinds = {(cell.method, cell.labels) for cell in grid(train)}
    assert kinds == {
        ("step-by-step", "gold"),
        ("step-by-step", "teacher"),
        ("finetune", "gold"),
        ("distill", "teacher"),
    }


@pytest.mark.parametrize("name", TASKS)
def test_a_papers_recipe_reads_the_rows_and_prompt_of_the_plain_recipe(name: str) -> None:
    paper, plain = (
        load_recipe(ROOT / "recipes" / folder / f"{name}.yaml") for folder in ("paper", "")
    )
    assert (paper.task, paper.teacher, paper.annotate) == (
        plain.task,
        plain.teacher,
        plain.annotate,
    )


# --- make paper


@needs_make
@pytest.mark.parametrize("name", TASKS)
def test_make_paper_runs_the_four_stages_of_the_tasks_recipe(name: str) -> None:
    shown = make("-n", "paper", f"TASK={name}", "SIZE=large", "SET=train.seeds=0 task.limit=9")
    assert shown.returncode == 0, shown.stderr
    commands = [
        line.partition("/bin/dsbs ")[2]
        for line in shown.stdout.splitlines()
        if "/bin/dsbs " in line
    ]
    arguments = (
        f"recipes/paper/{name}.yaml student.model=google/t5-v1_1-large train.seeds=0 task.limit=9"
    )
    assert commands == [f"run {arguments}"]


@needs_make
def test_make_paper_takes_the_base_model_where_no_size_is_given() -> None:
    assert "student.model=google/t5-v1_1-base" in make("-n", "paper", "TASK=cqa").stdout


@needs_make
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "TASK='' is not one of the paper's tasks"),
        (["TASK=mnli"], "TASK='mnli' is not one of the paper's tasks"),
        (["TASK=svamp cqa"], "TASK='svamp cqa' is not one of the paper's tasks"),
        (["TASK=cqa", "SIZE=11b"], "SIZE='11b' is not a size of T5 v1.1"),
    ],
)
def test_make_paper_names_what_there_is_before_it_installs_anything(
    arguments: list[str], message: str
) -> None:
    done = make("paper", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and "try: make paper TASK=" in done.stderr
    choices = "small base large xl xxl" if "SIZE" in message else " ".join(TASKS)
    assert f"({choices})" in done.stderr


@needs_make
def test_other_targets_ask_for_no_task() -> None:
    assert make("-n", "train").returncode == 0
    assert "make paper" in make("help").stdout


# --- the published rows


@pytest.fixture
def published(shared_data: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The repository's layout made of real SVAMP rows; converts it."""
    folder = tmp_path / "datasets" / "svamp"
    (folder / "llm").mkdir(parents=True)
    for split in ("train", "test"):
        rows = real_rows(shared_data, split)
        lines = [
            {"input": f"{r['input']['body']}\n{r['input']['question']}", "label": r["label"]}
            for r in rows
        ]
        (folder / f"svamp_{split}.json").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        for start in range(0, len(rows), 500):
            texts = [row["teacher"]["completion"] for row in rows[start : start + 500]]
            (folder / "llm" / f"{split}_CoT_{start // 500}.json").write_text(
                json.dumps(texts), encoding="utf-8"
            )

    def convert(name: str = "svamp") -> subprocess.CompletedProcess[str]:
        script = [
            sys.executable,
            str(ROOT / "tools" / "published_rows.py"),
            name,
            "datasets",
            "rows",
        ]
        return subprocess.run(
            script, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
        )

    return convert


def test_the_published_rows_are_the_papers_parts_with_their_completions(
    published: Callable[..., subprocess.CompletedProcess[str]], shared_data: Path, tmp_path: Path
) -> None:
    done = published()
    assert done.returncode == 0, done.stderr
    arguments = [
        f"task.data.{split}={tmp_path}/rows/{split}.jsonl" for split in ("train", "valid", "test")
    ]
    recipe = load_recipe(
        ROOT / "recipes" / "paper" / "svamp.yaml", [*arguments, "teacher.kind=recorded"]
    )
    task = make_task(recipe.task)
    real = {split: real_rows(shared_data, split) for split in ("train", "test")}
    held_out = json.loads((shared_data / "splits.json").read_text(encoding="utf-8"))["svamp"][
        "paper_valid_rows_of_train"
    ]
    expected = {
        "train": [row for i, row in enumerate(real["train"]) if i not in set(held_out)],
        "valid": [real["train"][i] for i in sorted(held_out)],
        "test": real["test"],
    }
    for split, rows in expected.items():
        examples = load(recipe, task, split)
        assert [(row.input, row.completion) for row in examples] == [
            (row["input"], row["teacher"]["completion"]) for row in rows
        ]
        assert all(
            task.correct(str(row.label), real_row["label"])
            for row, real_row in zip(examples, rows, strict=True)
        )
    validated = run_dsbs(
        "validate",
        str(ROOT / "recipes" / "paper" / "svamp.yaml"),
        "--json",
        *arguments,
        "teacher.kind=recorded",
        "student.model=null",
        "student.init=scratch",
        cwd=tmp_path,
    )
    assert validated.returncode == 0, validated.stderr
    assert {
        name: split["rows"] for name, split in json.loads(validated.stdout)["splits"].items()
    } == {
        "train": 720,
        "valid": 80,
        "test": 200,
    }


def test_published_rows_without_their_completions_or_of_no_known_task_are_refused(
    published: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    unknown = published("mnli")
    assert unknown.returncode == 1 and "no mnli_train.json in datasets/mnli" in unknown.stderr
    (tmp_path / "datasets" / "svamp" / "llm" / "train_CoT_1.json").unlink()
    short = published()
    assert short.returncode == 1 and "800 train rows but 500 completions" in short.stderr
    assert not (tmp_path / "rows").exists()


# --- the whole way


@needs_make
@pytest.mark.slow
def test_make_paper_goes_from_recorded_completions_to_a_report(
    shared_data: Path, tmp_path: Path
) -> None:
    ready = tmp_path / ".ready"
    ready.touch()
    small = [
        "student.model=null",
        "student.init=scratch",
        "student.vocab_size=300",
        "train.seeds=0",
        "train.batch_size=8",
        "train.max_steps=2",
        "train.eval_every=2",
        "eval.max_label_tokens=4",
        "eval.latency_calls=2",
        "task.limit=40",
        "teacher.kind=recorded",
        *(f"task.data.{split}={shared_data}/svamp/{split}.jsonl.gz" for split in ("train", "test")),
    ]
    run = tmp_path / "run"
    done = make(
        "paper",
        "TASK=svamp",
        f"BIN={Path(sys.executable).parent}",
        f"READY={ready}",
        f"SET=--out {run} {' '.join(small)}",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))
    names = {system["name"] for system in results["systems"]}
    assert names == {
        "teacher",
        "finetune-gold",
        "distill-teacher",
        "step-by-step-gold",
        "step-by-step-teacher",
    }
    assert (run / "report.html").is_file()
