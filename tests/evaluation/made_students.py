"""Untrained students, saved where training saves its own, to test what is done with outputs."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import toy_rows

from dsbs.config import Recipe
from dsbs.records import Example, TrainedStudent
from dsbs.students.card import StudentCard, Target
from dsbs.students.student import Student
from dsbs.students.tokenizer import learn_vocabulary
from dsbs.students.weights import new_model
from dsbs.tasks import make_task
from dsbs.tasks.data import load

PREFIXES: dict[str, dict[Target, str]] = {
    "finetune": {"label": ""},
    "step-by-step": {"label": "predict: ", "rationale": "explain: "},
    "rationale-then-label": {"rationale-then-label": ""},
    "label-then-rationale": {"label-then-rationale": ""},
}


def make_student(
    recipe: Recipe, run: Path, method: str = "finetune", *, fingerprint: str = "made"
) -> TrainedStudent:
    """A student with random weights in ``run``, and its record."""
    name = f"{method}-gold-s0"
    tokenizer = learn_vocabulary((row["text"] for row in toy_rows(80)), 200)
    card = StudentCard(
        name=name,
        method=method,
        labels="gold",
        seed=0,
        task=recipe.task,
        prefixes=PREFIXES[method],
        max_input_tokens=recipe.student.max_input_tokens,
        max_target_tokens=recipe.student.max_target_tokens,
    )
    folder = run / "train" / name
    Student.of(new_model(recipe.student, tokenizer, 0), tokenizer, card).save(folder)
    trained = TrainedStudent(
        name=name,
        method=method,
        labels="gold",
        seed=0,
        path=str(folder),
        valid_accuracy=0.5,
        best_step=1,
        steps=1,
        examples_per_s=1.0,
        wall_s=1.0,
        parameters=1,
        fingerprint=fingerprint,
    )
    (folder / "train.json").write_text(
        json.dumps({"student": trained.model_dump(mode="json")}), encoding="utf-8"
    )
    return trained


def rows_of(recipe: Recipe) -> list[Example]:
    return list(load(recipe, make_task(recipe.task), recipe.eval.split))
