"""Reviews in training: a correction follows its row into the next student, and changes no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TEAMS, toy_rows, write_jsonl

from dsbs import annotate, load_recipe, train
from dsbs.config import Recipe
from dsbs.evaluation.floors import _labeled_rows
from dsbs.progress import NoProgress
from dsbs.records import Annotation
from dsbs.records.reviews import Review
from dsbs.run_folder import RunFolder, append_review, read_annotations, training_record
from dsbs.tasks import make_task
from dsbs.tasks.data import is_held_out, load
from dsbs.training.grid import grid
from dsbs.training.rows import Row, gather
from dsbs.training.run import StudentGrid
from dsbs.training.student_run import StudentRun
from dsbs.training.training_set import checked_students

REASON = "The parcel is wrong."


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A teacher that is wrong about every tenth row."""
    folder = tmp_path_factory.mktemp("reviewed")
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(toy_rows(40)):
        label = TEAMS[(number + (number % 10 == 3)) % 2]
        completion = f"The message is about {label}.\nAnswer: {label}"
        rows.append({**row, "teacher": {"completion": completion}})
    section = {
        "name": "reviewed",
        "task": {
            "name": "classification",
            "labels": list(TEAMS),
            "columns": {"label": "team"},
            "data": {"train": str(write_jsonl(folder / "rows.jsonl", rows))},
        },
        "teacher": {"kind": "recorded"},
        "annotate": {"splits": ["train"]},
        "student": {"init": "scratch", "vocab_size": 200, "max_input_tokens": 32},
        "train": {
            "methods": ["step-by-step", "finetune"],
            "labels": "teacher",
            "batch_size": 8,
            "max_steps": 1,
        },
        "eval": {"baseline": ["finetune"]},
    }
    (folder / "recipe.yaml").write_text(json.dumps(section))
    return load_recipe(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "run")
    annotate(recipe, out=folder.path)
    return folder


def decide(run: RunFolder, of_row: Annotation, decision: str, **fields: Any) -> None:
    values = {"id": of_row.id, "decision": decision, "shown": of_row.label, "reviewer": "ada"}
    values |= {"time": "2026-11-26T10:00:00+00:00"}
    append_review(run, "train", Review.model_validate(values | fields))


def row_of(recipe: Recipe, run: RunFolder, row_id: str) -> Row:
    data = gather(recipe.students[None], make_task(recipe.task), run.path, grid(recipe.train))
    return next(row for row in data.train if row.id == row_id)


def marks(recipe: Recipe, run: RunFolder) -> dict[str, str]:
    """The fingerprint of each method's student as it would be trained now."""
    [(student, specs)] = checked_students(recipe, make_task(recipe.task))
    data = gather(student, make_task(recipe.task), run.path, specs)
    tokens = StudentGrid(student, specs, data).tokens(run, NoProgress())
    folder = run.stage("train")
    runs = [StudentRun(student, spec, data, tokens.tokenizer, tokens, folder) for spec in specs]
    return {student_run.spec.method: student_run.folder.fingerprint for student_run in runs}


def test_a_row_goes_from_its_correction_to_the_next_training(
    recipe: Recipe, run: RunFolder
) -> None:
    held_out = {e.id for e in load(recipe, make_task(recipe.task), "valid")}
    trained = [row for row in read_annotations(run.annotations("train")) if row.id not in held_out]
    wrong = next(row for row in trained if row.label != row.gold)
    right, other, rejected = [row for row in trained if row.label == row.gold][:3]
    original = run.annotations("train").read_bytes()
    students = train(recipe, out=run.path).students
    before = marks(recipe, run)
    assert {s.method: s.fingerprint for s in students} == before
    assert "reviews" not in training_record(Path(students[0].path))["student"]

    # Agreement changes no row: every student fits as it is.
    decide(run, right, "accepted")
    assert marks(recipe, run) == before

    # A new rationale changes the student that learns rationales, and no other.
    decide(run, other, "corrected", rationale=REASON)
    assert row_of(recipe, run, other.id).rationales == (REASON,)
    edited = marks(recipe, run)
    assert edited["step-by-step"] != before["step-by-step"]
    assert edited["finetune"] == before["finetune"]

    # So does another label: finetune learns gold labels.
    assert row_of(recipe, run, wrong.id).teacher == wrong.label
    decide(run, wrong, "corrected", label=wrong.gold)
    followed = row_of(recipe, run, wrong.id)
    assert (followed.teacher, followed.rationales) == (wrong.gold, ())
    corrected = marks(recipe, run)
    assert corrected["step-by-step"] != edited["step-by-step"]
    assert corrected["finetune"] == before["finetune"]

    # A rejected row teaches its gold label alone; a wrong gold label gives way to the right one.
    right_gold = next(team for team in TEAMS if team != rejected.gold)
    decide(run, rejected, "rejected", gold_is_wrong=True, gold=right_gold)
    followed = row_of(recipe, run, rejected.id)
    assert (followed.teacher, followed.rationales, followed.gold) == (None, (), right_gold)
    last = marks(recipe, run)
    assert all(last[method] != corrected[method] for method in last)
    floors = _labeled_rows(recipe, make_task(recipe.task), run)
    assert floors.labels[rejected.id] == right_gold
    retrained = train(recipe, out=run.path).students
    assert {s.method: s.fingerprint for s in retrained} == last
    assert all(student.reviews is not None for student in run.students())

    # Undone, all is as it was: the first students are taken back, not trained again.
    for row in (right, other, wrong, rejected):
        decide(run, row, "undone")
    taken_back = train(recipe, out=run.path).students
    assert [s.fingerprint for s in taken_back] == [s.fingerprint for s in students]
    assert [s.wall_s for s in taken_back] == [s.wall_s for s in students]
    assert all(student.reviews is None for student in run.students())
    assert run.annotations("train").read_bytes() == original


def test_a_correction_of_a_held_out_rows_gold_label_changes_validation_alone(
    recipe: Recipe, run: RunFolder
) -> None:
    task = make_task(recipe.task)
    held_out = next(row for row in load(recipe, task, "train") if is_held_out(recipe, row))
    annotations = {row.id: row for row in read_annotations(run.annotations("train"))}
    specs = grid(recipe.train)
    before = gather(recipe.students[None], task, run.path, specs)
    other = next(team for team in TEAMS if team != held_out.label)
    decide(run, annotations[held_out.id], "accepted", gold_is_wrong=True, gold=other)
    after = gather(recipe.students[None], task, run.path, specs)
    assert after.train == before.train and after.teacher_texts == before.teacher_texts
    assert {row.id: row.gold for row in after.valid}[held_out.id] == other
    assert [row for row in after.valid if row.id != held_out.id] == [
        row for row in before.valid if row.id != held_out.id
    ]
    decide(run, annotations[held_out.id], "undone")


def test_what_a_person_accepted_passes_votes_and_provenance(recipe: Recipe, run: RunFolder) -> None:
    held_out = {e.id for e in load(recipe, make_task(recipe.task), "valid")}
    row = next(row for row in read_annotations(run.annotations("train")) if row.id not in held_out)
    strict = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(
                update={
                    "select": recipe.train.select.model_copy(
                        update={"provenance": ("reviewed",), "min_vote": 1.0, "min_logprob": 0.0}
                    )
                }
            )
        }
    )
    decide(run, row, "accepted")
    data = gather(strict.students[None], make_task(strict.task), run.path, grid(strict.train))
    assert [row.id for row in data.train if row.annotated is not None] == [row.id]
    decide(run, row, "undone")
