"""The training benchmarks run on made-up rows."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def run_benchmark(name: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), "--tiny", "--runs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_speed_benchmark_prints_median_and_range() -> None:
    lines = run_benchmark("train.py").splitlines()
    plain, exact = (float(word) for word in lines[1].replace(",", "").split() if "." in word)
    assert abs(plain - exact) < 1e-4, "both train the same objective"
    rows = [line.split() for line in lines if line.startswith("tiny")]
    assert [row[1] for row in rows] == ["16", "64"]
    assert all(row[3].startswith("(") and "–" in row[3] for row in rows)


def test_the_memory_benchmark_prints_a_line_with_and_without_checkpointing() -> None:
    rows = [line.split() for line in run_benchmark("memory.py").splitlines() if "tiny" in line]
    assert [row[3] for row in rows] == ["yes", "no"]
