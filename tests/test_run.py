"""``dsbs run``: all stages in one command, resumable, and a dry run that spends nothing."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import good_answer, run_dsbs, run_python, start_dsbs
from loopback import LoopbackServer


def test_run_goes_through_all_stages(toy: Callable[..., Path], tmp_path: Path) -> None:
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        done = run_python("-m", "dsbs", "run", _recipe(toy), url, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summaries = json.loads(done.stdout)
    assert list(summaries) == ["annotate", "train", "eval", "report"]
    assert [student["name"] for student in summaries["train"]["students"]] == ["finetune-gold-s0"]
    assert summaries["eval"]["headline"] == "finetune-gold"
    assert (tmp_path / "runs" / "toy" / "report.html").is_file()


def test_a_dry_run_sends_and_writes_nothing_and_shows_the_whole_plan(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = _recipe(toy)
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        shown = run_dsbs("run", path, url, "--dry-run", cwd=tmp_path)
        plan = run_dsbs("run", path, url, "--dry-run", "--json", cwd=tmp_path)
        assert server.requests == 0 and not (tmp_path / "runs").exists()
    assert shown.returncode == plan.returncode == 0, shown.stderr
    assert "46 requests to send" in shown.stdout and "price unknown" in shown.stdout
    assert "finetune-gold-s0: 3" in shown.stdout and "; 4 steps" in shown.stdout
    lines = json.loads(plan.stdout)
    assert lines["annotate"]["requests"] == 46
    assert [line["name"] for line in lines["train"]["students"]] == [
        "finetune-gold-s0",
    ]


def test_rows_without_a_reply_stop_the_run_before_training(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def flaky(body: dict[str, Any], number: int) -> Any:
        return (503, {}, b"{}") if number == 3 else good_answer(body, number)

    path = _recipe(toy)
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


def test_a_killed_run_continues_and_a_finished_one_is_kept(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        arguments = ["run", _recipe(toy), f"teacher.base_url={server.url}", "train.max_steps=40"]
        process = start_dsbs(*arguments, cwd=tmp_path)
        student = tmp_path / "runs" / "toy" / "train" / "finetune-gold-s0"
        deadline = time.monotonic() + 120
        while not (student / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (student / "train.json").exists(), "killed in the middle of training"
        continued = run_dsbs(*arguments, cwd=tmp_path)
        assert continued.returncode == 0, continued.stderr
        trained = (student / "train.json").read_bytes()
        again = run_dsbs(*arguments, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert server.requests == 46, "no reply is bought twice"
    assert (student / "train.json").read_bytes() == trained, "the student is kept"
    headings = [line for line in again.stdout.splitlines() if line.startswith("== ")]
    assert headings == ["== 1/4 annotate", "== 2/4 train", "== 3/4 eval", "== 4/4 report"]


def _recipe(toy: Callable[..., Path]) -> str:
    """A recipe for one small student on 40 train rows."""
    train = {"methods": ["finetune"], "max_steps": 4, "eval_every": 50, "log_every": 1}
    path = toy(test=6, eval={"latency_calls": 1, "max_label_tokens": 8})
    recipe = json.loads(path.read_text(encoding="utf-8"))
    recipe["train"] |= train
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return str(path)
