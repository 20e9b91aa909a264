"""Reviews in results and report: what people changed, and what it did to measured accuracy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import TEAMS, toy_rows, write_jsonl

from dsbs import annotate, evaluate, load_recipe, report, train
from dsbs.config import Recipe
from dsbs.records.measures import wilson
from dsbs.records.results import read_results
from dsbs.records.reviews import Review
from dsbs.records.sentences import review_sentences
from dsbs.run_folder import RunFolder, append_review, read_annotations


def recorded(rows: list[dict[str, str]], wrong: set[int]) -> list[dict[str, Any]]:
    """Rows with the answers of a teacher that is wrong about some."""
    completed: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        label = TEAMS[(number + (number in wrong)) % 2]
        completion = f"The message is about {label}.\nAnswer: {label}"
        completed.append({**row, "teacher": {"completion": completion}})
    return completed


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("reviewed")
    train_rows = recorded(toy_rows(20), {3, 4})
    test_rows = recorded(toy_rows(10, start=1000), {5})
    section = {
        "name": "reviewed",
        "task": {
            "name": "classification",
            "labels": list(TEAMS),
            "columns": {"label": "team"},
            "data": {
                "train": str(write_jsonl(folder / "train.jsonl", train_rows)),
                "valid": str(write_jsonl(folder / "valid.jsonl", toy_rows(4, start=500))),
                "test": str(write_jsonl(folder / "test.jsonl", test_rows)),
            },
        },
        "teacher": {"kind": "recorded"},
        "annotate": {"splits": ["train", "test"]},
        "student": {"init": "scratch", "vocab_size": 100, "max_input_tokens": 32},
        "train": {"methods": ["distill"], "batch_size": 8, "max_steps": 1},
        "eval": {"floors": ["majority"], "max_label_tokens": 4, "latency_calls": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(section))
    return load_recipe(folder / "recipe.yaml")


def decide(run: RunFolder, split: str, number: int, decision: str, **fields: Any) -> None:
    row_id = f"r{number}"
    shown = {row.id: row.label for row in read_annotations(run.annotations(split))}[row_id]
    values = {"id": row_id, "decision": decision, "shown": shown, "reviewer": "ada"}
    values |= {"time": "2026-11-26T10:00:00+00:00"}
    append_review(run, split, Review.model_validate(values | fields))


def test_results_and_report_show_accuracy_before_and_after_the_review(
    recipe: Recipe, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    annotate(recipe, out=run.path)
    train(recipe, out=run.path)
    unreviewed = evaluate(recipe, out=run.path)
    assert "reviews" not in json.loads(run.results.read_text())
    assert review_sentences(unreviewed) == []

    decide(run, "train", 3, "corrected", label=TEAMS[1])
    decide(run, "train", 4, "accepted", gold_is_wrong=True)  # here the teacher was right
    decide(run, "train", 6, "rejected")
    decide(run, "train", 7, "skipped")
    decide(run, "test", 1005, "accepted", gold_is_wrong=True)
    lines: list[str] = []
    results = evaluate(recipe, out=run.path, progress=Lines(lines))
    assert any("people's reviews have changed since the training" in line for line in lines)
    assert read_results(run.results) == results

    of_train = results.reviews["train"]
    assert (of_train.rows, of_train.reviewed, of_train.reviewers) == (20, 3, 1)
    assert (of_train.accepted, of_train.rejected) == (1, 1)
    assert (of_train.labels_changed, of_train.gold_changed) == (1, 1)
    assert of_train.teacher_before == wilson(18, 20) and of_train.teacher_after == wilson(19, 20)
    assert of_train.labels_before == wilson(18, 20) and of_train.labels_after == wilson(19, 19)
    assert of_train.true_accuracy is None

    # Gold labels of test rows stay as they are; what the corrected ones say stands beside them.
    assert [system.accuracy for system in results.systems] == [
        system.accuracy for system in unreviewed.systems
    ]
    of_test = results.reviews["test"]
    assert of_test.corrected.keys() == {system.name for system in results.systems}
    teacher = of_test.corrected["teacher"]
    assert (teacher.before, teacher.value, teacher.n) == (0.9, 1.0, 10)

    report(recipe, out=run.path)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    markdown = (run.stage("eval") / "results.md").read_text(encoding="utf-8").replace("\\", "")
    for sentence in (
        "train: 1 reviewer decided on 3 of 20 annotated rows: 1 label changed, 0 rationales "
        "edited, 1 annotation rejected and 1 gold label corrected.",
        "train: the teacher's measured accuracy is 90.0% (95% CI [69.9, 97.2]) by the data's gold "
        "labels and 95.0% (95% CI [76.4, 99.1]) by the corrected ones.",
        "train: of the teacher's labels in training, 90.0% (95% CI [69.9, 97.2]) were right "
        "before the review, and 100.0% (95% CI [83.2, 100.0]) are now.",
    ):
        assert sentence in page.replace("&#39;", "'") and sentence in markdown
    assert "test: teacher is right on 100.0% (95% CI [69.2, 100.0]), instead of 90.0%." in markdown


class Lines:
    """Progress that keeps what is said."""

    def __init__(self, lines: list[str]) -> None:
        self.say = lines.append

    def start(self, *values: object) -> None: ...
    def update(self, *values: object) -> None: ...
    def finish(self) -> None: ...
