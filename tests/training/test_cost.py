"""Training cost: memory, device, and totals that survive an interruption."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dsbs.progress import NoProgress
from dsbs.records import TrainingCost
from dsbs.students.weights import device_name
from dsbs.training.callbacks import MetricsLogger, peak_memory


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures a CPU")
def test_the_device_has_a_name_and_the_process_a_peak_memory(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name\t: An Example CPU\nmodel name\t: another\n")
    assert device_name(cpuinfo) == "An Example CPU"
    assert device_name(tmp_path / "missing")
    before, source = peak_memory()
    assert source == "process"
    filled = bytearray(int(before * 1.1e6))
    assert peak_memory()[0] >= len(filled) / 1e6


def test_a_resumed_trainings_cost_includes_the_run_before(tmp_path: Path) -> None:
    rows = [
        {"step": 3, "step_ms": 4000.0, "elapsed_s": 20.0, "tokens": 500, "examples": 48},
        {"step": 4, "eval_accuracy": 0.5, "elapsed_s": 35.0, "tokens": 700, "examples": 64},
        {"step": 5, "step_ms": 3000.0, "elapsed_s": 40.0, "tokens": 900, "examples": 80}
        | {"peak_memory_mb": 1e9},
        {
            "step": 7,
            "step_ms": 9000.0,
            "elapsed_s": 60.0,
            "tokens": 1300,
            "examples": 99,
            "peak_memory_mb": 2e9,
        },
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    metrics = MetricsLogger(path, NoProgress(), 4, Path("checkpoint-5"))
    history = [{"step": 5, "tokens": 900}, {"step": 8, "tokens": 1450}, {"train_runtime": 1.0}]
    cost = metrics.cost(SimpleNamespace(log_history=history))
    assert cost.tokens == 1450
    assert cost.wall_s >= 40.0
    assert cost.peak_memory_mb == 1e9, "the line after the checkpoint does not count"
    assert metrics.stepping_s == 3 * 4 + 2 * 3, "seconds, without validating and saving"
    assert cost.tokens_per_s == pytest.approx(1450 / 18, rel=0.01)


def test_a_record_with_the_energy_of_earlier_versions_is_still_read() -> None:
    fields = {"device": "a CPU", "processes": 1, "wall_s": 2.0, "tokens": 10, "tokens_per_s": 5.0}
    fields |= {"peak_memory_mb": 100.0, "peak_memory_of": "process"}
    earlier = fields | {"energy_j": 12.5, "energy_of": "cpu packages"}
    assert TrainingCost.model_validate(earlier) == TrainingCost.model_validate(fields)
