"""Run folder: paths, manifests, locks, training records, and files set aside and taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsbs.config.load import load_recipe
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.run_folder import RunFolder, read_student, training_record


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_a_recipes_run_is_in_runs_unless_another_folder_is_given() -> None:
    recipe = load_recipe("recipes/demo.yaml")
    assert RunFolder.of(recipe).path == Path("runs/demo")
    assert RunFolder.of(recipe, "elsewhere").path == Path("elsewhere")


@pytest.mark.parametrize(
    "student", ["train/distill-s0", "train/teachers/mini-s0", "compress/distill-s0/quantize=int8"]
)
def test_the_run_of_a_student_is_found_from_its_folder(run: RunFolder, student: str) -> None:
    containing = RunFolder.containing(run.path / student)
    assert containing is not None and containing.path == run.path


def test_a_student_outside_any_run_has_none(tmp_path: Path) -> None:
    assert RunFolder.containing(tmp_path / "student") is None
    assert RunFolder.containing(Path("/")) is None


# --- manifests


def test_a_manifest_is_running_and_then_done(run: RunFolder) -> None:
    assert run.manifest("train") == {} and not run.has_manifest("train")
    with run.record("train", {"name": "x"}, {"train": "abc"}) as manifest:
        assert run.manifest("train")["status"] == "running"
        manifest["rows"] = 3
    written = run.manifest("train")
    assert written["status"] == "done"
    assert (written["recipe"], written["data"]) == ({"name": "x"}, {"train": "abc"})
    assert written["rows"] == 3
    assert written["started"] <= written["ended"]
    assert written["versions"]["python"]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bug"), "failed"),
        (DsbsError("no teacher", hint="-"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
        (PartialError("stopped", hint="-"), "partial"),
    ],
    ids=["bug", "failure", "interrupt", "partial"],
)
def test_a_manifest_records_how_the_stage_ended(
    run: RunFolder, error: BaseException, status: str
) -> None:
    with pytest.raises(type(error)), run.record("eval", {}, {}):
        raise error
    assert run.manifest("eval")["status"] == status
    assert run.manifest("eval")["ended"]


def test_a_stage_may_set_its_own_status(run: RunFolder) -> None:
    with run.record("annotate", {}, {}) as manifest:
        manifest["status"] = "partial"
    assert run.manifest("annotate")["status"] == "partial"


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_manifest_that_cannot_be_read_is_empty(run: RunFolder, text: str) -> None:
    run.stage("train").mkdir(parents=True)
    (run.stage("train") / "manifest.json").write_text(text)
    assert run.manifest("train") == {}


def test_a_stage_is_locked_while_it_is_held(run: RunFolder) -> None:
    assert not run.is_locked("train")
    with run.lock("train"):
        assert run.is_locked("train")
        with pytest.raises(DsbsError, match="is in use by process"), run.lock("train"):
            pass
    assert not run.is_locked("train")


# --- set aside and taken back


def mark_of(path: Path) -> str | None:
    return path.read_text() if path.is_file() else None


def test_a_file_that_is_set_aside_comes_back_by_its_mark(run: RunFolder) -> None:
    path = run.predictions("distill-s0")
    path.parent.mkdir(parents=True)
    path.write_text("first-mark-of-many-letters")
    RunFolder.set_aside(path, "first-mark-of-many-letters")
    assert not path.exists()
    names = [aside.name for aside in (path.parent / "aside").iterdir()]
    assert names == ["distill-s0-first-mark-o.jsonl"]
    assert not RunFolder.restore(path, "second-mark", mark_of)
    assert RunFolder.restore(path, "first-mark-of-many-letters", mark_of)
    assert path.read_text() == "first-mark-of-many-letters"


def test_nothing_that_is_set_aside_is_overwritten(run: RunFolder) -> None:
    path = run.student("distill-s0")
    for text in ("the-same-beginning-1", "the-same-beginning-2"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        RunFolder.set_aside(path, text)
    assert RunFolder.restore(path, "the-same-beginning-2", mark_of), "names share a beginning"
    assert path.read_text() == "the-same-beginning-2"


def test_a_folder_without_a_mark_is_set_aside_as_unknown(run: RunFolder) -> None:
    run.student("distill-s0").mkdir(parents=True)
    RunFolder.set_aside(run.student("distill-s0"), None)
    assert (run.stage("train") / "aside" / "distill-s0-unknown").is_dir()


# --- training records

STUDENT = {
    "name": "distill-s0",
    "method": "distill",
    "labels": "teacher",
    "seed": 0,
    "path": "where/it/was/trained",
    "valid_accuracy": 0.5,
    "best_step": 10,
    "steps": 10,
    "examples_per_s": 1.0,
    "wall_s": 1.0,
    "parameters": 1000,
    "fingerprint": "abc",
}


def test_students_are_read_where_they_are_now(run: RunFolder) -> None:
    folder = run.student("distill-s0")
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(json.dumps({"student": STUDENT, "rows": 3}))
    (run.stage("train") / "unfinished-s0").mkdir()
    (student,) = run.students()
    assert (student.name, student.path) == ("distill-s0", str(folder))
    assert training_record(folder)["rows"] == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"student": 1}', '{"student": {"seed": "x"}}'])
def test_a_record_that_cannot_be_read_is_reported_with_its_path(run: RunFolder, text: str) -> None:
    folder = run.student("distill-s0")
    folder.mkdir(parents=True)
    (folder / "train.json").write_text(text)
    with pytest.raises(UserError, match=r"distill-s0/train\.json is not a training record"):
        run.students()


def test_a_student_without_a_record_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.json does not exist: the student is not trained"):
        read_student(tmp_path)
