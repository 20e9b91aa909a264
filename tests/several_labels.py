"""Toy rows, recipes and a teacher of the tasks with several labels, a scale, and fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conftest import write_jsonl

TAGS = ("billing", "refund", "shipping")
WORDS = {"billing": "invoice", "refund": "money", "shipping": "parcel"}


def multilabel_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows whose labels are told by a word each; some have none."""
    rows = []
    for i in range(start, start + count):
        labels = [tag for bit, tag in enumerate(TAGS) if (i % 8) >> bit & 1]
        words = " ".join(WORDS[tag] for tag in labels)
        rows.append({"id": f"r{i}", "text": f"My {words} number {i} is wrong.", "label": labels})
    return rows


def score_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows whose score is told by a word."""
    words = ["awful", "bad", "fair", "good", "great"]
    return [
        {"id": f"r{i}", "text": f"It was {words[i % 5]}, number {i}.", "label": 1 + i % 5}
        for i in range(start, start + count)
    ]


def extraction_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows with a kind and a number; some without the number."""
    rows = []
    for i in range(start, start + count):
        number = None if i % 4 == 3 else i % 3
        text = f"My {('invoice', 'parcel')[i % 2]}" + ("" if number is None else f" {number}")
        label = {"kind": ("bill", "box")[i % 2], "number": number}
        rows.append({"id": f"r{i}", "text": f"{text} is {i} days late.", "label": label})
    return rows


TASKS: dict[str, dict[str, Any]] = {
    "multilabel": {"name": "multilabel", "labels": list(TAGS)},
    "score": {"name": "score", "range": [1, 5]},
    "extraction": {
        "name": "extraction",
        "fields": {
            "kind": {"type": "label", "labels": ["bill", "box"]},
            "number": {"type": "number"},
        },
    },
}
ROWS = {"multilabel": multilabel_rows, "score": score_rows, "extraction": extraction_rows}


def recipe_file(folder: Path, kind: str, **sections: Any) -> Path:
    """A recipe of fine-tuned students on gold labels, with its rows."""
    files = {
        "train": write_jsonl(folder / "train.jsonl", ROWS[kind](96)),
        "valid": write_jsonl(folder / "valid.jsonl", ROWS[kind](16, start=2000)),
        "test": write_jsonl(folder / "test.jsonl", ROWS[kind](16, start=1000)),
    }
    recipe: dict[str, Any] = {
        "name": "toy",
        "task": TASKS[kind] | {"data": {split: str(path) for split, path in files.items()}},
        "teacher": {"model": "loopback", "base_url": "http://127.0.0.1:9/v1", "timeout_s": 10},
        "train": {
            "methods": ["finetune"],
            "labels": "gold",
            "learning_rate": 0.003,
            "batch_size": 8,
            "micro_batch_size": 4,
            "max_steps": 40,
            "eval_every": 20,
            "log_every": 10,
        },
        "eval": {"max_label_tokens": 24, "latency_calls": 2, "floors": []},
    }
    for name, value in sections.items():
        recipe[name] = recipe.get(name, {}) | value
    path = folder / "toy.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path
