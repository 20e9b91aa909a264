"""Several labels, fields and scores from predictions and floors to the report."""

from __future__ import annotations

import base64
import csv
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from dsbs import evaluate, report
from dsbs.config import Recipe
from dsbs.config.cascade import CascadeSection
from dsbs.evaluation.cascade import Answers
from dsbs.evaluation.metrics import score
from dsbs.evaluation.predictions import read_predictions
from dsbs.records.results import Results, read_results
from dsbs.run_folder import RunFolder
from dsbs.tasks import make_task
from dsbs.tasks.data import load

WORDS = {"billing": "invoice", "shipping": "parcel", "returns": "refund"}
TAGS = {"name": "multilabel", "labels": list(WORDS)}
SCALE = {"name": "score", "range": [1, 5]}
FIELDS = {
    "name": "extraction",
    "fields": {
        "sender": {"type": "text", "verbatim": True},
        "total": {"type": "number"},
    },
}


def tag_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    rows = []
    for i in range(first, first + count):
        labels = [label for bit, label in enumerate(WORDS) if (i % 8) >> bit & 1]
        words = " ".join(WORDS[label] for label in labels)
        rows.append({"id": f"r{i}", "text": f"message {i}: {words} please", "label": labels})
    return rows


def score_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "text": f"note {i} " + "good " * (i % 5), "label": i % 5 + 1}
        for i in range(first, first + count)
    ]


def field_rows(count: int, first: int = 0) -> list[dict[str, Any]]:
    names = ("Ann", "Bob", "Eve")
    return [
        {
            "id": f"r{i}",
            "text": f"mail {i} from {names[i % 3]} over {i % 2 + 1} dollars",
            "label": {"sender": names[i % 3], "total": i % 2 + 1},
        }
        for i in range(first, first + count)
    ]


def run(
    folder: Path,
    task: dict[str, Any],
    rows: Any,
    predictions: dict[str, list[str]],
    **sections: Any,
) -> tuple[Recipe, Results]:
    test = rows(24, 1000)
    files = {}
    for name, answers in predictions.items():
        lines = [
            {"id": row["id"], "prediction": answer}
            for row, answer in zip(test, answers, strict=True)
        ]
        files[name] = str(write_jsonl(folder / f"{name}.jsonl", lines))
    data = {
        "train": str(write_jsonl(folder / "train.jsonl", rows(60))),
        "test": str(write_jsonl(folder / "test.jsonl", test)),
    }
    recipe = Recipe.model_validate(
        {
            "name": "shapes",
            "task": task | {"data": data},
            "teacher": {"kind": "human"},
            "eval": {"predictions": files, "latency_calls": 0},
        }
    )
    return recipe, evaluate(recipe, out=folder / "run")


def packed(page: Path) -> dict[str, Any]:
    match = re.search(r'id="packed">([^<]+)<', page.read_text(encoding="utf-8"))
    assert match is not None
    examples: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(match.group(1))))
    return examples


def test_several_labels_from_predictions_to_the_report(tmp_path: Path) -> None:
    gold = [row["label"] for row in tag_rows(24, 1000)]
    right = ["; ".join(sorted(labels)) or "none" for labels in gold]
    fewer = ["; ".join(sorted(labels)[1:]) or "none" for labels in gold]
    recipe, results = run(tmp_path, TAGS, tag_rows, {"base": fewer, "right": right})
    systems = {system.name: system for system in results.systems}
    assert set(systems) == {"base", "right", "majority", "tfidf"}
    assert systems["tfidf"].accuracy > 0.9 and systems["tfidf"].labels == "gold"
    assert systems["tfidf"].metrics["micro_f1"].value > 0.95
    assert systems["tfidf"].selective is not None, "as sure as its least sure label"
    assert systems["right"].parts["billing"].gold == 12
    graded = systems["right"].versus["base"].graded
    assert {"micro_f1", "macro_f1", "hamming", "micro_recall"} <= set(graded)
    assert graded["micro_f1"].delta > 0 and graded["micro_f1"].p < 0.05
    floor = read_predictions(RunFolder(tmp_path / "run").predictions("tfidf"))
    for line in floor.values():
        shares = line.distribution or {}
        chosen = [label for label in sorted(shares) if shares[label] >= 0.5]
        assert line.raw == ("; ".join(chosen) or "none")
        least = min(max(share, 1 - share) for share in shares.values())
        assert line.probability == pytest.approx(least, abs=1e-6)
    page = report(recipe, out=tmp_path / "run")
    assert "Labels and fields" in page.read_text(encoding="utf-8")
    examples = packed(page)
    (parts,) = examples["parts"]
    assert parts["names"] == list(WORDS)
    assert set(parts["of"]["billing; returns"]) == {"billing", "returns"}
    assert all(system["parts"] == 0 for system in examples["systems"])
    with (tmp_path / "run/report/metrics.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert {"precision", "recall", "f1", "accuracy"} <= {
        line["metric"] for line in lines if line["label"] == "billing"
    }
    assert read_results(tmp_path / "run/eval/results.json") == results


def test_fields_from_predictions_to_the_report(tmp_path: Path) -> None:
    rows = field_rows(24, 1000)
    right = [f"sender: {row['label']['sender']}\ntotal: {row['label']['total']}.0" for row in rows]
    invented = ["sender: Zed\ntotal: null" if i % 2 else text for i, text in enumerate(right)]
    recipe, results = run(tmp_path, FIELDS, field_rows, {"base": invented, "right": right})
    systems = {system.name: system for system in results.systems}
    assert systems["right"].accuracy == 1 and systems["base"].accuracy == 0.5
    assert systems["base"].metrics["not_in_input"].value == 0.5
    assert systems["base"].parts["total"].precision is not None
    assert systems["base"].parts["total"].precision.value == 1
    assert systems["base"].parts["total"].recall is not None
    assert systems["base"].parts["total"].recall.value == 0.5
    assert systems["tfidf"].parts["sender"].accuracy.value > 0.6, "the nearest row's fields"
    assert systems["majority"].metrics["not_in_input"].value > 0
    examples = packed(report(recipe, out=tmp_path / "run"))
    (parts,) = examples["parts"]
    texts = {answer["text"] for answer in examples["answers"]}
    assert "sender: Zed\ntotal: null" in texts
    assert set(parts["of"]["sender: Zed\ntotal: null"]) == {"sender"}


def test_scores_from_predictions_to_the_report(tmp_path: Path) -> None:
    gold = [row["label"] for row in score_rows(24, 1000)]
    near = [str(min(5, label + 1)) for label in gold]
    recipe, results = run(tmp_path, SCALE, score_rows, {"base": ["3"] * 24, "near": near})
    systems = {system.name: system for system in results.systems}
    assert systems["near"].metrics["within_one"].value == 1
    assert systems["tfidf"].metrics["mae"].value < 0.8 < systems["base"].metrics["mae"].value
    assert systems["tfidf"].metrics["quadratic_kappa"].value > 0.8
    graded = systems["near"].versus["base"].graded
    assert {"quadratic_kappa", "mae", "within_one"} <= set(graded) and "spearman" not in graded
    page = report(recipe, out=tmp_path / "run").read_text(encoding="utf-8")
    for title in ("quadratic weighted kappa", "spearman", "mean absolute error", "within one step"):
        assert title in page.lower()
    assert "parts" not in packed(tmp_path / "run/report.html")


def test_a_cascade_counts_an_answer_that_is_wholly_right(tmp_path: Path) -> None:
    recipe, _ = run(tmp_path, TAGS, tag_rows, {"base": ["billing; shipping"] * 24})
    task = make_task(recipe.task)
    rows = load(recipe, task, "test")
    lines = read_predictions(RunFolder(tmp_path / "run").predictions("tfidf"))
    file = score(task, rows, lines, "tfidf")
    answers = Answers(file, [row.label for row in rows]).rows(task, "margin", CascadeSection())
    assert answers is not None and (answers.agrees == answers.correct).all()
    assert answers.confidence == pytest.approx([lines[row.id].probability or 0 for row in rows])
