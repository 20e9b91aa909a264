"""Shared by the tests: small recipes and data on disk, and the commands as a user runs them."""

from __future__ import annotations

import csv
import gc
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forked import DSBS, Forked

# The models are tiny: several threads would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Take the imported modules out of all later garbage collections: each would look at them."""
    gc.collect()
    gc.freeze()


ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

TEAMS = ("billing", "shipping")


def toy_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Distinct rows whose team is told by one word."""
    words = {"billing": "invoice", "shipping": "parcel"}
    return [
        {
            "id": f"r{i}",
            "text": f"My {words[TEAMS[i % 2]]} number {i} is wrong.",
            "team": TEAMS[i % 2],
        }
        for i in range(start, start + count)
    ]


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def user_environment(env: dict[str, str] | None = None) -> dict[str, str]:
    """This process's environment without the user's key, and with ``env``."""
    return {k: v for k, v in os.environ.items() if k != "OPENAI_API_KEY"} | (env or {})


def start_dsbs(
    *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None
) -> Forked:
    """`dsbs …` in a process of its own, not waited for."""
    return Forked([DSBS, *arguments], cwd=cwd, env=user_environment(env))


def run_dsbs(
    *arguments: str,
    cwd: Path,
    env: dict[str, str] | None = None,
    input: str = "",
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """`dsbs …` in a process of its own (see forked.py), with captured output."""
    command = Forked([DSBS, *arguments], cwd=cwd, env=user_environment(env), input=input)
    return command.completed(timeout)


def run_python(
    *arguments: str, cwd: Path, env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """`python …` as a user runs it, which imports everything itself: `python -m dsbs …`."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=user_environment(env),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def launcher() -> list[str]:
    """The beginning of a command that torch's launcher runs on two processes of this machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_addr=127.0.0.1",
    ]
    return [*command, f"--master_port={_free_port()}"]


def on_two_processes(
    *command: str, env: dict[str, str] | None = None, timeout: float = 120
) -> list[subprocess.CompletedProcess[str]]:
    """Run a script, or `DSBS …`, on two processes that know of each other as by a launcher.

    Either both end well, or this fails with what they wrote.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    both = [Forked(command, env=user_environment(shared | rank | (env or {}))) for rank in ranks]
    ended = [process.completed(timeout) for process in both]
    assert not any(one.returncode for one in ended), [one.stderr[-2000:] for one in ended]
    return ended


@contextmanager
def small_disk_at(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of so many megabytes. Skips the test where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small tmpfs can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data with real completions."""
    if not SHARED.is_dir():
        pytest.skip("real data is not beside this checkout (../shared/data)")
    return SHARED


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The system's Chromium, by Playwright."""
    api = pytest.importorskip(
        "playwright.sync_api",
        reason="Playwright's package is not installed (pip install dsbs[dev])",
    )
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip(f"no browser on this machine ({', '.join(names)})")
    api.expect.set_options(timeout=60_000)  # for a busy machine
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def toy(tmp_path: Path) -> Callable[..., Path]:
    """Writes a toy classification recipe with its data and returns the recipe's path."""

    def make(train: int = 40, test: int = 12, **sections: Any) -> Path:
        write_csv(tmp_path / "train.csv", toy_rows(train))
        write_csv(tmp_path / "test.csv", toy_rows(test, start=1000))
        recipe: dict[str, Any] = {
            "name": "toy",
            "task": {
                "name": "classification",
                "labels": list(TEAMS),
                "columns": {"label": "team"},
                "data": {"train": str(tmp_path / "train.csv"), "test": str(tmp_path / "test.csv")},
            },
            "teacher": {"model": "loopback", "base_url": "http://127.0.0.1:9/v1", "timeout_s": 10},
            "annotate": {"concurrency": 8},
            "student": {
                "init": "scratch",
                "vocab_size": 200,
                "max_input_tokens": 64,
                "max_target_tokens": 32,
            },
            "train": {
                "learning_rate": 0.001,
                "batch_size": 8,
                "max_steps": 6,
                "eval_every": 3,
                "log_every": 1,
            },
            "eval": {"max_label_tokens": 8, "latency_calls": 2, "floors": []},
        }
        for name, value in sections.items():
            recipe[name] = recipe.get(name, {}) | value if isinstance(value, dict) else value
        path = tmp_path / "toy.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
        return path

    return make


def good_answer(body: dict[str, Any], number: int) -> str:
    """A teacher that reasons and is right about the toy rows."""
    question = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    team = "billing" if "invoice" in question else "shipping"
    word = "an invoice" if team == "billing" else "a parcel"
    return f"The message is about {word}.\nAnswer: {team}"
