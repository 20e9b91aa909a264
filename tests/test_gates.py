"""Gates: `dsbs eval` exits with code 4 if the headline system misses a threshold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, run_dsbs
from loopback import LoopbackServer

from dsbs.errors import UserError
from dsbs.records.gates import gate_failures
from dsbs.records.results import Results


def results(
    accuracy: float = 0.6, delta: float | None = 0.02, headline: str | None = "step-by-step-gold"
) -> Results:
    def system(name: str, versus: dict[str, Any]) -> dict[str, Any]:
        fields = {
            "name": name,
            "kind": "student",
            "accuracy": accuracy,
            "ci95": [0.5, 0.7],
            "interval": "wilson",
        }
        return fields | {"unreadable": 0.0, "versus": versus}

    gap = {
        "delta": delta,
        "ci95": [-0.03, 0.07],
        "p": 0.2,
        "p_holm": 0.41,
        "test": "exact McNemar",
        "wins": 3,
        "losses": 1,
    }
    return Results.model_validate(
        {
            "run": "runs/x",
            "name": "x",
            "task": "esnli",
            "split": "test",
            "n": 50,
            "baseline": "finetune-gold",
            "headline": headline,
            "reportable": True,
            "systems": [
                system("finetune-gold", {}),
                system(
                    "step-by-step-gold",
                    {}
                    if delta is None
                    else {"finetune-gold": gap, "teacher": gap | {"delta": -1.0}},
                ),
            ],
        }
    )


def test_a_gate_that_is_reached_gives_no_message() -> None:
    assert gate_failures(results()) == []
    assert gate_failures(results(), min_accuracy=0.6, min_delta=0.02) == []
    assert gate_failures(results(accuracy=0.1 + 0.2), min_accuracy=0.3) == [], (
        "a gate of .3 is reached by a mean that is .3"
    )
    assert (
        gate_failures(results(accuracy=0.3, delta=1 / 3 - 0.3), min_accuracy=0.3, min_delta=1 / 30)
        == []
    )


def test_a_missed_gate_is_reported_with_the_uncertainty() -> None:
    (accuracy,) = gate_failures(results(), min_accuracy=0.61)
    assert accuracy == (
        "step-by-step-gold: accuracy 60.00% (95% CI [50.0, 70.0]) is below the gate of 61%"
    )
    (delta,) = gate_failures(results(), min_delta=0.03)
    assert delta.startswith(
        "step-by-step-gold: +2.00 points against finetune-gold "
        "(95% CI [−3.0, +7.0], p = .41) is below"
    )
    assert len(gate_failures(results(), min_accuracy=0.9, min_delta=0.5)) == 2


def test_a_gate_that_cannot_be_checked_is_an_error() -> None:
    for headline in (None, "rationale-then-label-gold"):
        with pytest.raises(UserError, match="no headline system"):
            gate_failures(results(headline=headline), min_accuracy=0.1)
    with pytest.raises(UserError, match="not compared with any system"):
        gate_failures(results(delta=None), min_delta=-1.0)
    assert gate_failures(results(delta=None), min_accuracy=0.1) == []


@pytest.mark.slow
def test_a_missed_gate_exits_4_after_everything_is_written(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy()
    with LoopbackServer(good_answer) as server:
        settings = [
            f"teacher.base_url={server.url}",
            "train.max_steps=2",
            "train.methods=[step-by-step, finetune]",
        ]
        assert run_dsbs("annotate", str(path), *settings, cwd=tmp_path).returncode == 0
    assert run_dsbs("train", str(path), *settings, cwd=tmp_path).returncode == 0
    missed = run_dsbs(
        "eval",
        str(path),
        *settings,
        "--json",
        "--min-accuracy",
        "1",
        "--min-delta",
        "1",
        cwd=tmp_path,
    )
    assert missed.returncode == 4, missed.stderr
    assert missed.stderr.count("is below the gate of") == 2 and "Traceback" not in missed.stderr
    assert {system["name"] for system in json.loads(missed.stdout)["systems"]} >= {
        "step-by-step-gold",
        "finetune-gold",
    }
    assert (tmp_path / "runs" / "toy" / "eval" / "results.json").is_file()
    passed = run_dsbs(
        "eval", str(path), *settings, "--min-accuracy", "0", "--min-delta", "-1", cwd=tmp_path
    )
    assert passed.returncode == 0, passed.stderr
    alone = run_dsbs(
        "eval", str(path), *settings, "train.methods=step-by-step", "--min-delta", "0", cwd=tmp_path
    )
    assert alone.returncode == 2 and "not compared with any system" in alone.stderr
    assert (
        run_dsbs("eval", str(path), *settings, "--min-accuracy", "80", cwd=tmp_path).returncode == 2
    )
