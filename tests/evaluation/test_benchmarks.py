"""The benchmark of rescoring, on a tiny input."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def test_the_rescoring_benchmark_runs() -> None:
    command = [sys.executable, "benchmarks/rescore.py", "--rows", "60", "--systems", "3"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert "60 rows, 3 systems, one core" in done.stdout, done.stderr
