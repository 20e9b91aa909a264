"""``dsbs run``: all stages in one command, resumable, and a dry run that spends nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import good_answer, run_dsbs
from loopback import LoopbackServer

TRAIN = {"methods": ["step-by-step", "finetune"], "max_steps": 6, "eval_every": 6}
EVAL = {"latency_calls": 1, "max_label_tokens": 4}


def test_run_goes_through_all_stages_and_a_second_run_does_nothing_anew(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = _recipe(toy, tmp_path)
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        first = run_dsbs("run", path, url, "--json", cwd=tmp_path)
        assert first.returncode == 0, first.stderr
        requests = server.requests
        students = tmp_path / "runs" / "toy" / "train"
        weights = {file: file.stat().st_mtime_ns for file in students.rglob("model.safetensors")}
        second = run_dsbs("run", path, url, cwd=tmp_path)
        assert second.returncode == 0, second.stderr
        assert server.requests == requests == 46, "no reply is bought twice"
    summaries = json.loads(first.stdout)
    assert list(summaries) == ["annotate", "train", "eval", "report"]
    assert len(summaries["train"]["students"]) == len(weights) == 2
    assert (tmp_path / "runs" / "toy" / "report.html").is_file()
    assert {file: file.stat().st_mtime_ns for file in weights} == weights, "students are kept"
    headings = [line for line in second.stdout.splitlines() if line.startswith("== ")]
    assert headings == ["== 1/4 annotate", "== 2/4 train", "== 3/4 eval", "== 4/4 report"]


def test_a_dry_run_sends_and_writes_nothing_and_shows_the_whole_plan(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = _recipe(toy, tmp_path)
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        shown = run_dsbs("run", path, url, "--dry-run", cwd=tmp_path)
        plan = run_dsbs("run", path, url, "--dry-run", "--json", cwd=tmp_path)
        assert server.requests == 0 and not (tmp_path / "runs").exists()
    assert shown.returncode == plan.returncode == 0, shown.stderr
    assert "46 requests to send" in shown.stdout and "price unknown" in shown.stdout
    assert "step-by-step-gold-s0: at most " in shown.stdout
    lines = json.loads(plan.stdout)
    assert lines["annotate"]["requests"] == 46
    assert [line["name"] for line in lines["train"]["students"]] == [
        "step-by-step-gold-s0",
        "finetune-gold-s0",
    ]


def test_rows_without_a_reply_stop_the_run_before_training(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def flaky(body: dict[str, Any], number: int) -> Any:
        return (503, {}, b"{}") if number == 3 else good_answer(body, number)

    path = _recipe(toy, tmp_path)
    arguments = ("teacher.max_attempts=1", "annotate.concurrency=1", "--json")
    with LoopbackServer(flaky) as server:
        url = f"teacher.base_url={server.url}"
        first = run_dsbs("run", path, url, *arguments, cwd=tmp_path)
        assert first.returncode == 3 and "1 row got no reply" in first.stderr
        assert list(json.loads(first.stdout)) == ["annotate"]
        assert not (tmp_path / "runs" / "toy" / "train").exists()
        second = run_dsbs("run", path, url, *arguments, cwd=tmp_path)
        assert second.returncode == 0, second.stderr
        assert server.requests == 47


def test_a_killed_run_continues(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = _recipe(toy, tmp_path)
    steps = "train.max_steps=80"
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        command = [sys.executable, "-m", "dsbs", "run", path, url, steps, "train.eval_every=40"]
        process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
        train = tmp_path / "runs" / "toy" / "train"
        deadline = time.monotonic() + 120
        while not list(train.glob("*/metrics.jsonl")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not list(train.glob("*/train.json")), "killed in the middle of training"
        requests = server.requests
        again = run_dsbs("run", path, url, steps, "train.eval_every=40", cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert server.requests == requests == 46
    assert len(list(train.glob("*/train.json"))) == 2


def _recipe(toy: Callable[..., Path], tmp_path: Path) -> str:
    """Two students of few steps on 40 train rows."""
    path = toy(train=40, test=6, eval=EVAL)
    recipe = json.loads(path.read_text(encoding="utf-8"))
    recipe["train"] |= TRAIN
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return str(path)
