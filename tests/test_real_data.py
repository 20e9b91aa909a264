"""Real data with recorded completions, read in place: rows, labels and what is rejected."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from dsbs import annotate, load_recipe, validate
from dsbs.config import Recipe

SVAMP = {"anchor": "the answer is", "answer": "{{ rationale }} The answer is {{ label }}."}
LAST_NUMBER = {
    "pattern": r"(?s)^(?P<rationale>.*[^\d.,](?P<label>\d[\d,]*(?:\.\d+)?)\D*)$",
    "answer": "{{ rationale }} It is {{ label }}.",
}
LABEL_FIRST = {"order": "label-first", "anchor": []}


def labels_of(folder: Path) -> list[str]:
    with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        return sorted({json.loads(line)["label"] for line in file})


def recipe(
    shared_data: Path, tmp_path: Path, name: str, prompt: dict[str, Any], **teacher: Any
) -> Recipe:
    """A recipe over a folder of ``shared_data``, with a prompt file of its own."""
    folder = shared_data / name
    if not folder.is_dir():
        pytest.skip(f"../shared/data/{name} is not there")
    data = {
        split: str(folder / f"{split}.jsonl.gz")
        for split in ("train", "valid", "test")
        if (folder / f"{split}.jsonl.gz").is_file()
    }
    task: dict[str, Any] = {"name": "svamp", "data": data}
    if name != "svamp_teachers":
        task |= {"name": "classification", "labels": labels_of(folder)}
    fields = "{{ body }} {{ question }}" if task["name"] == "svamp" else "{{ text }}"
    (tmp_path / "prompt.yaml").write_text(json.dumps({"template": fields} | prompt))
    path = tmp_path / "recipe.yaml"
    sections = {
        "name": name,
        "task": task,
        "teacher": {"kind": "recorded"} | teacher,
        "annotate": {"prompt": "prompt.yaml", "splits": ["train", "test"]},
        "student": {"init": "scratch", "size": "nano"},
    }
    path.write_text(json.dumps(sections), encoding="utf-8")
    return load_recipe(path)


@pytest.mark.parametrize(
    ("name", "prompt", "model", "accuracies", "rejected"),
    [
        ("banking77_open", LABEL_FIRST | {"answer": "{{ label }}"}, None, (0.692, 0.731), 0),
        ("fpb", LABEL_FIRST, None, (0.932, 0.957), 0),
        ("fpb", LABEL_FIRST, "gpt-3.5-turbo", (0.888, 0.897), 0),
        ("strategyqa", SVAMP, None, (0.724, 0.729), 0.01),
        ("svamp_teachers", SVAMP, "gpt-3.5-turbo", (0.829, 0.795), 0.05),
        ("svamp_teachers", LAST_NUMBER, "gpt-4", (0.919, 0.920), 0.01),
    ],
)
def test_recorded_completions_are_read_in_place(
    shared_data: Path,
    tmp_path: Path,
    name: str,
    prompt: dict[str, Any],
    model: str | None,
    accuracies: tuple[float, float],
    rejected: float,
) -> None:
    result = annotate(recipe(shared_data, tmp_path, name, prompt, model=model), out=tmp_path / "r")
    for split, accuracy in zip(("train", "test"), accuracies, strict=True):
        summary = result.splits[split]
        assert summary.label_accuracy is not None
        assert summary.label_accuracy.value == pytest.approx(accuracy, abs=0.0006)
        assert summary.rows - summary.accepted <= rejected * summary.rows, summary.rejected
        assert summary.without_rationale == (summary.rows if name == "banking77_open" else 0)


def test_77_intents_are_validated(shared_data: Path, tmp_path: Path) -> None:
    made = recipe(shared_data, tmp_path, "banking77", {}, kind="human")
    result = validate(made)
    assert {name: split["rows"] for name, split in result.splits.items()}["test"] == 3080
    assert len(result.splits["train"]["labels"]) == 77
