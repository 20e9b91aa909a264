"""dsbs ls: the state of runs, also with broken files or killed processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from conftest import run_dsbs
from reporting.sample_run import make_run

from dsbs.config.load import load_recipe
from dsbs.errors import UserError
from dsbs.files import lock_folder
from dsbs.project.runs import list_runs, run_state


def manifest(stage: Path, status: str, **more: Any) -> None:
    stage.mkdir(parents=True, exist_ok=True)
    record = {"status": status, "started": "2026-01-01T10:00:00+00:00", "ended": None} | more
    (stage / "manifest.json").write_text(json.dumps(record), encoding="utf-8")


def student(run: Path, name: str, settings: str) -> None:
    (run / "train" / name).mkdir(parents=True)
    (run / "train" / name / "train.json").write_text(
        json.dumps({"student": {"settings": settings}}), encoding="utf-8"
    )


def test_a_finished_run_shows_its_stages_students_and_headline(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "made", subsets=(1.0,), seeds=(0, 1))
    (state,) = list_runs(tmp_path / "runs")
    assert state.name == "made" and not state.problems and state.reportable
    assert set(state.stages.values()) == {"done"}
    assert state.when == "2026-01-01T00:10:00+00:00"
    assert state.headline is not None and state.headline.versus is not None
    assert (state.headline.system, state.headline.baseline) == (
        "step-by-step-gold",
        "finetune-gold",
    )
    done = run_dsbs("ls", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "made" in line]
    assert "62.0% [54.0, 70.0]" in line and "+7.0 [+1.0, +13.0] to finetune-gold" in line


def test_a_stage_that_says_running_is_running_only_while_its_lock_is_held(tmp_path: Path) -> None:
    manifest(tmp_path / "a" / "train", "running")
    assert run_state(tmp_path / "a").stages == {
        "annotate": None,
        "train": "interrupted",
        "eval": None,
    }
    with lock_folder(tmp_path / "a" / "train"):
        assert run_state(tmp_path / "a").stages["train"] == "running"
    assert run_state(tmp_path / "a").stages["train"] == "interrupted"
    with lock_folder(tmp_path / "a" / "train"):  # to have asked leaves nothing behind
        pass


@pytest.mark.parametrize("status", ["done", "partial", "interrupted", "failed"])
def test_other_words_of_a_manifest_are_told_as_they_are(status: str, tmp_path: Path) -> None:
    manifest(tmp_path / "a" / "annotate", status)
    assert run_state(tmp_path / "a").stages["annotate"] == status


def test_students_are_counted_against_the_grid_and_by_their_settings(tmp_path: Path) -> None:
    changes = ["student={init: scratch}", "train.labels=[gold, teacher]"]
    recipe = load_recipe("recipes/demo.yaml", changes)
    run = tmp_path / "demo"
    manifest(run / "train", "interrupted", recipe=recipe.model_dump(mode="json"))
    student(run, "step-by-step-gold-s0", recipe.students[None].training)
    student(run, "finetune-gold-s0", "of another recipe")
    assert (run_state(run).finished, run_state(run).planned) == (1, 4)
    manifest(
        run / "train",
        "done",
        students=["step-by-step-gold-s0", "finetune-gold-s0", "moved-away-s0"],
    )
    assert (run_state(run).finished, run_state(run).planned) == (2, 3)
    manifest(run / "train", "failed", recipe={"of": "another version"})
    assert (run_state(run).finished, run_state(run).planned) == (2, None)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"done"', '{"status": 3}', "\udcff", "[" * 100_000]
)
def test_a_broken_manifest_is_shown_and_hides_nothing_else(text: str, tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    (tmp_path / "a" / "train" / "manifest.json").write_bytes(
        text.encode("utf-8", "surrogateescape")
    )
    first, second = list_runs(tmp_path)
    assert (
        first.stages == {"annotate": "done", "train": "broken", "eval": "done"}
        and first.headline is not None
    )
    assert set(second.stages.values()) == {"done"} and not second.problems


@pytest.mark.parametrize("text", ["{", '{"run": "x", "systems": []}', "null", "\udcff"])
def test_broken_results_are_told_and_no_failure(text: str, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "a" / "eval" / "results.json").write_bytes(
        text.encode("utf-8", "surrogateescape")
    )
    (state,) = list_runs(tmp_path / "runs")
    assert state.headline is None and "results.json" in state.problems[0]
    done = run_dsbs("ls", cwd=tmp_path)
    assert done.returncode == 0 and "results.json" in done.stdout and "Traceback" not in done.stderr


def test_names_from_disk_and_files_cannot_steer_a_terminal(tmp_path: Path) -> None:
    for name in (b"\x1b[31mred", b"caf\xe9", b"[bold]x"):
        manifest(
            tmp_path / "runs" / os.fsdecode(name) / "train", "done", started="[/]", students=[]
        )
    done = run_dsbs("ls", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "[bold]x" in done.stdout and "caf�" in done.stdout
    runs = json.loads(run_dsbs("ls", "--json", cwd=tmp_path).stdout)["runs"]
    assert len(runs) == 3 and all(run["when"] is None for run in runs)


def test_where_no_runs_are_that_is_said(tmp_path: Path) -> None:
    fresh = run_dsbs("ls", cwd=tmp_path)
    assert fresh.returncode == 0 and "no runs in runs/" in fresh.stdout
    assert json.loads(run_dsbs("ls", "--json", cwd=tmp_path).stdout) == {"runs": []}
    named = run_dsbs("ls", "elsewhere", cwd=tmp_path)
    assert named.returncode == 2 and "elsewhere is not a directory" in named.stderr
    (tmp_path / "some" / "folder").mkdir(parents=True)
    assert list_runs(tmp_path / "some") == []
    with pytest.raises(UserError):
        list_runs(tmp_path / "some" / "file")


def test_a_run_folder_itself_is_listed_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "made")
    assert [state.name for state in list_runs(tmp_path / "runs" / "made")] == ["made"]


def test_what_was_made_of_students_and_for_them_is_counted_beside_them(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "made", subsets=(1.0,), seeds=(0,))
    make_run(tmp_path / "runs" / "plain", name="plain", subsets=(1.0,), seeds=(0,))
    alone = run_dsbs("ls", str(tmp_path / "runs" / "plain"), cwd=tmp_path)
    assert run_state(run).other_models == {} and "other models" not in alone.stdout, (
        "no column of dashes"
    )
    for record in (
        "train/teachers/mini-s0/train.json",
        "train/trials/a/b/train.json",
        "train/finetune-gold-s0/export/ct2/export.json",
        "train/finetune-gold-s0/export/.onnx.partial/export.json",
        "train/finetune-gold-s0/export/aside/ct2-1/export.json",
        "compress/finetune-gold-s0/quantize=int8/compress.json",
        "compress/finetune-gold-s0/aside/x-1/compress.json",
        "compress/finetune-gold-s0/quantize=int8/export/onnx/export.json",
    ):
        (run / record).parent.mkdir(parents=True, exist_ok=True)
        (run / record).write_text("{}", encoding="utf-8")
    assert run_state(run).other_models == {"local teachers": 1, "compressed": 1, "exported": 2}
    done = run_dsbs("ls", cwd=tmp_path)
    assert done.returncode == 0 and {
        "other",
        "models",
        "teachers,",
        "compressed,",
        "exported",
    } <= set(done.stdout.split())


def test_teachers_and_trials_are_no_students_of_the_grid(tmp_path: Path) -> None:
    from dsbs.run_folder import RunFolder

    run = make_run(tmp_path / "made", subsets=(1.0,), seeds=(0,))
    names = [student.name for student in RunFolder(run).students()]
    for key in (
        "teachers/mini-s0",
        "trials/finetune-gold/learning_rate=0.001",
        "aside/finetune-gold-s0-1",
    ):
        (run / "train" / key).mkdir(parents=True)
        (run / "train" / key / "train.json").write_text(
            "{}", encoding="utf-8"
        )  # no record of a student
    assert [student.name for student in RunFolder(run).students()] == names and len(names) == 3
