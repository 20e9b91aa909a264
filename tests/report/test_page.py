"""The page shows what is in the files, as text, and nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import write_jsonl

from dsbs import UserError, load_recipe, report

HOSTILE = "<script>alert(1)</script> {{ 7*7 }} \u202eevil"


def test_text_from_data_is_shown_as_text(toy: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    system = {
        "name": "a", "accuracy": 0.5, "ci95": [0.1, 0.9], "interval": "wilson", "seeds": [0], "accuracy_per_seed": [0.5],
        "unreadable": 0.0, "parameters": 10, "ms_per_example": 1.5, "train_s": 3.0, "versus": {},
    }  # fmt: skip
    (run / "eval" / "predictions").mkdir(parents=True)
    (run / "annotate").mkdir()
    results = {"split": "test", "n": 2, "baseline": "a", "reportable": True, "systems": [system, system | {"name": "b"}]}
    (run / "eval" / "results.json").write_text(json.dumps(results), encoding="utf-8")
    for name, correct in (("a", True), ("b", False)):
        row = {"id": "r1", "gold": HOSTILE, "raw": "x", "prediction": HOSTILE, "correct": correct, "made_by": "t"}
        write_jsonl(run / "eval" / "predictions" / f"{name}-s0.jsonl", [row])
    teacher = {"kind": "openai", "model": "m"}
    write_jsonl(
        run / "annotate" / "test.jsonl",
        [{"schema": "dsbs.annotation/1", "id": "r1", "input": {"text": HOSTILE}, "rationale": HOSTILE, "teacher": teacher}],
    )
    page = report(load_recipe(toy()), out=run).read_text(encoding="utf-8")
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert "r1: gold" in page and "1 " in page


def test_reporting_before_evaluating_says_what_to_do(toy: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dsbs eval"):
        report(load_recipe(toy()), out=tmp_path / "nothing")
