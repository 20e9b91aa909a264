"""Killed at any moment, the same command goes on and buys nothing twice."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import good_answer, run_dsbs, start_dsbs
from forked import Forked
from loopback import LoopbackServer

CONCURRENCY = 8
KILLS = 6


def start(path: Path, url: str, out: Path) -> Forked:
    return start_dsbs("annotate", str(path), f"teacher.base_url={url}", "--out", str(out))


def wait_for(condition: Callable[[], bool], process: Forked) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_at_random_moments_a_run_ends_like_an_undisturbed_one(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    moments = sorted(random.Random(20230503).sample(range(1, 118), KILLS))
    path = toy(train=120, test=4, annotate={"concurrency": CONCURRENCY})
    with LoopbackServer(good_answer, latency_s=0.05) as server:
        undisturbed = start(path, server.url, tmp_path / "undisturbed")
        assert undisturbed.communicate(timeout=120) and undisturbed.returncode == 0
        server.received.clear()
        server.completed.clear()
        for goal in moments:
            process = start(path, server.url, tmp_path / "run")
            wait_for(lambda goal=goal: sum(server.completed.values()) >= goal, process)
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            time.sleep(0.2)  # replies to the dead process's last requests
        last = start(path, server.url, tmp_path / "run")
        assert last.communicate(timeout=120) and last.returncode == 0
        # only replies in flight when the process died may be requested again
        assert server.requests - 124 <= KILLS * CONCURRENCY
        store = sqlite3.connect(tmp_path / "run" / "annotate" / "replies.sqlite")
        assert store.execute("SELECT count(*) FROM replies").fetchone() == (124,)
    for split in ("train", "test"):
        ours, theirs = (
            tmp_path / run / "annotate" / f"{split}.jsonl" for run in ("run", "undisturbed")
        )
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_interrupt_lets_paid_replies_arrive(
    toy: Callable[..., Path], tmp_path: Path, number: int
) -> None:
    path = toy(train=120, test=4, annotate={"concurrency": CONCURRENCY})
    with LoopbackServer(good_answer, latency_s=0.1) as server:
        process = start(path, server.url, tmp_path / "run")
        wait_for(lambda: sum(server.completed.values()) >= 20, process)
        process.send_signal(number)
        _, output = process.communicate(timeout=60)
        assert (
            process.returncode == 130
            and "run the same command" in output
            and "Traceback" not in output
        )
        again = start(path, server.url, tmp_path / "run")
        assert again.communicate(timeout=120) and again.returncode == 0
        assert server.requests == 124, "not one request was sent twice"


def test_an_empty_key_variable_is_an_error_before_anything_is_written(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(teacher={"api_key_env": "OPENAI_API_KEY"})
    done = run_dsbs("annotate", str(path), cwd=tmp_path, env={"OPENAI_API_KEY": ""})
    assert done.returncode == 2 and "OPENAI_API_KEY is not set" in done.stderr
    assert not (tmp_path / "runs").exists()
