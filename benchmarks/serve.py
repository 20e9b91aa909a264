"""Load test of `dsbs serve`: many clients at once, with and without batching.

    python benchmarks/serve.py STUDENT INPUTS.jsonl   # 200 clients, 60 s each way, loopback
    python benchmarks/serve.py STUDENT INPUTS.jsonl --clients 20 --seconds 10

INPUTS.jsonl has one row of the student's task per line. Each client sends its next request as soon
as the last one is answered. The server runs in its own process; its resident memory is read every
half second once it is ready. The peer in the same run is the same server with --batch-size 1
--max-wait-ms 0. At the end of each load, SIGTERM is sent while every client has a request in
flight: each must be answered or never have been accepted. Exit code 1 where a request failed, the
memory did not level off, or the shutdown was not clean.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil


class Memory(threading.Thread):
    """A process's resident memory over time, in MB."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._process = psutil.Process(pid)
        self.sizes: list[float] = []
        self.done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.done.wait(0.5):
            self.sizes.append(self._process.memory_info().rss / 2**20)


async def load(url: str, rows: list[Any], clients: int, seconds: float, pid: int) -> dict[str, Any]:
    """Send requests for ``seconds``, then SIGTERM; return counts, latencies and throughput."""
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    draining: Counter[str] = Counter()
    flying = 0
    stop = time.monotonic() + seconds
    stopped = asyncio.Event()
    metrics = ""

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        nonlocal flying
        turn = number
        while not stopped.is_set():
            count = statuses if time.monotonic() < stop else draining
            began = time.perf_counter()
            flying += 1
            try:
                async with session.post(
                    f"{url}/predict", json={"inputs": [rows[turn % len(rows)]]}
                ) as response:
                    answer = await response.json()
                    good = response.status == 200 and len(answer["predictions"]) == 1
                    count[
                        str(response.status)
                        if good or response.status != 200
                        else "200 without an answer"
                    ] += 1
                    if count is statuses:
                        latencies.append(time.perf_counter() - began)
            except (aiohttp.ClientError, OSError) as error:
                count[type(error).__name__] += 1
                if count is draining:
                    return
            finally:
                flying -= 1
            turn += clients

    async def end() -> None:
        nonlocal metrics
        await asyncio.sleep(seconds)
        async with aiohttp.ClientSession() as session, session.get(f"{url}/metrics") as response:
            metrics = await response.text()
        psutil.Process(pid).send_signal(signal.SIGTERM)
        stopped.set()

    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(end(), *(client(session, number) for number in range(clients)))

    def read(name: str) -> float:
        return float(re.findall(rf"^{name} (\S+)$", metrics, re.MULTILINE)[0])

    ordered = sorted(latencies)
    return {
        "requests": len(latencies),
        "failed": {status: count for status, count in statuses.items() if status != "200"},
        "while stopping": dict(draining),
        "requests/s": round(len(latencies) / seconds, 1),
        **{
            f"p{p} ms": round(1000 * ordered[min(len(ordered) - 1, len(ordered) * p // 100)], 1)
            for p in (50, 95, 99)
        },
        "mean batch": round(read("dsbs_batch_rows_sum") / read("dsbs_batch_rows_count"), 1),
    }


def measured(options: argparse.Namespace, rows: list[Any], *more: str) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "dsbs",
        "serve",
        options.student,
        "--port",
        "0",
        "--json",
        *more,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(process.communicate()[1])
    server = json.loads(line)
    memory = Memory(server["pid"])
    before = psutil.Process(server["pid"]).memory_info().rss / 2**20
    try:
        result = asyncio.run(
            load(server["url"], rows, options.clients, options.seconds, server["pid"])
        )
        process.wait(60)
    finally:
        memory.done.set()
        process.kill()
    stderr = process.communicate()[1]
    middle = len(memory.sizes) // 2  # by then every client has been answered many times
    sizes = {
        "before": before,
        "half-way": memory.sizes[middle],
        "peak": max(memory.sizes),
        "after": memory.sizes[-1],
    }
    result["memory MB"] = {name: round(size) for name, size in sizes.items()}
    return result | {"exit": process.returncode, "stderr": stderr}


def problems(result: dict[str, Any]) -> list[str]:
    """Reasons why the load test failed."""
    memory = result["memory MB"]
    refused = [
        status
        for status in result["while stopping"]
        if status.isdigit() and status not in ("200", "503")
    ]
    failures = {
        "requests failed": bool(result["failed"] or refused),
        "memory still grew in the second half": memory["peak"] > 1.1 * memory["half-way"],
        "the shutdown was not clean": result["exit"] != 0,
    }
    return [problem for problem, failed in failures.items() if failed]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student")
    parser.add_argument("inputs", type=Path, help="JSONL, a row or {input: row} a line")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    rows = [
        json.loads(line)
        for line in options.inputs.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    rows = [row.get("input", row) for row in rows]
    print(
        f"{options.clients} clients, {options.seconds:g} s, {len(rows)} different rows", flush=True
    )
    results = {}
    missed = []
    for name, more in {
        "batched": (),
        "one at a time": ("--batch-size", "1", "--max-wait-ms", "0"),
    }.items():
        results[name] = measured(options, rows, *more)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        missed += [f"{name}: {problem}" for problem in problems(results[name])]
    batched, single = (result["requests/s"] for result in results.values())
    print(f"batching: {batched / single:.2f} times the requests per second")
    print("\n".join(missed) or "no request failed, memory levelled off, SIGTERM drained")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
