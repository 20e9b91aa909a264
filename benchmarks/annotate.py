"""Cost of annotation: wall time against the ideal, CPU time per row and memory.

    python benchmarks/annotate.py      # 2 latency distributions x 3 concurrencies, 2,000 rows
    python benchmarks/annotate.py --peer <venv>/bin/python:benchmarks/peers/curator_peer.py

Other annotation tools (--peer) get the same load. A loopback server in its own process answers
every chat request after a latency that is the same for all tools: fixed, or log-normal with the
same mean. The ideal wall time is that of a scheduler without overhead for the latencies that were
drawn, in the order of the rows. Wall time is measured at the server, from the first request to the
last reply. CPU time (user and system) is that of the client process. The line "aiohttp alone" is
the lower bound: the same requests without any annotation tool. Median (range) of all runs. Exit
code 1 if dsbs takes more than 1.1 times the ideal plus 1 s.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import heapq
import json
import math
import multiprocessing
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIGMA = 0.5  # of the log-normal latency's logarithm


def latencies(kind: str, mean_s: float, rows: int) -> list[float]:
    """Seconds for each request in order of arrival; seeded, so that all tools get the same."""
    if kind == "fixed":
        return [mean_s] * rows
    generator = random.Random(20230503)
    return [generator.lognormvariate(math.log(mean_s) - SIGMA**2 / 2, SIGMA) for _ in range(rows)]


def ideal_wall(waits: list[float], concurrency: int) -> float:
    """Seconds of list scheduling without overhead: a free slot takes the next request."""
    slots = [0.0] * min(concurrency, len(waits))
    for wait in waits:
        heapq.heapreplace(slots, slots[0] + wait)
    return max(slots)


def serve(waits: list[float], port: Any, report: Any) -> None:
    """A chat endpoint; a bare asyncio protocol, so that it never is the bottleneck."""
    message = {"role": "assistant", "content": "The message is about a parcel.\nAnswer: shipping"}
    usage = {"prompt_tokens": 90, "completion_tokens": 12, "total_tokens": 102}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    about = {"id": "r", "object": "chat.completion", "created": 0, "model": "loopback"}
    body = json.dumps({**about, "choices": [choice], "usage": usage}).encode()
    reply = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
        + body
    )
    state: dict[str, Any] = {"received": 0, "in_flight": 0, "max_in_flight": 0}
    state |= {"first": 0.0, "last": 0.0}

    class Chat(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport = transport
            self.buffer = b""

        def data_received(self, data: bytes) -> None:
            self.buffer += data
            while b"\r\n\r\n" in self.buffer:
                head, rest = self.buffer.split(b"\r\n\r\n", 1)
                fields = head.lower().split(b"\r\n")
                length = next(
                    (int(field[15:]) for field in fields if field.startswith(b"content-length:")), 0
                )
                if len(rest) < length:
                    return
                self.buffer = rest[length:]
                if b"/chat/completions" not in fields[0]:
                    self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}")
                    continue
                if b'"messages": []' in rest[:length] or b'"messages":[]' in rest[:length]:
                    # A probe of the endpoint's limits is not part of the load.
                    self.transport.write(reply)
                    continue
                now = time.monotonic()
                state["first"] = state["first"] or now
                wait = waits[state["received"] % len(waits)]
                state["received"] += 1
                state["in_flight"] += 1
                state["max_in_flight"] = max(state["max_in_flight"], state["in_flight"])
                asyncio.get_running_loop().call_later(wait, self.answer)

        def answer(self) -> None:
            state["in_flight"] -= 1
            state["last"] = time.monotonic()
            if not self.transport.is_closing():
                self.transport.write(reply)

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Chat, "127.0.0.1", 0, backlog=1024)
        port.put(server.sockets[0].getsockname()[1])
        while not report.poll():
            await asyncio.sleep(0.02)
        report.recv()
        report.send(state)

    asyncio.run(main())


class Endpoint:
    """The server, in its own process."""

    def __init__(self, waits: list[float]) -> None:
        queue: Any = multiprocessing.Queue()
        self._ours, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(
            target=serve, args=(waits, queue, theirs), daemon=True
        )
        self._process.start()
        self.url = f"http://127.0.0.1:{queue.get()}/v1"

    def close(self) -> dict[str, float]:
        self._ours.send("done")
        state: dict[str, float] = self._ours.recv()
        self._process.join()
        return state


def rows_file(folder: Path, rows: int) -> Path:
    with (folder / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "team"])
        writer.writerows(
            [f"r{i}", f"My parcel number {i} is wrong.", "shipping"] for i in range(rows)
        )
    recipe = {
        "name": "bench",
        "task": {
            "name": "classification",
            "labels": ["billing", "shipping"],
            "columns": {"label": "team"},
            "data": {"train": str(folder / "rows.csv"), "test": str(folder / "rows.csv")},
        },
        "teacher": {"model": "loopback", "api_key_env": None},
        "annotate": {"splits": ["train"]},
    }
    (folder / "bench.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder / "bench.yaml"


def measured(command: list[str], cwd: Path) -> tuple[str, float, float]:
    """Run a process; return its standard output, CPU seconds and peak memory in MB."""
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return output, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def dsbs(folder: Path, url: str, rows: int, concurrency: int) -> dict[str, float]:
    """Run `dsbs annotate`; the cost of asking excludes that of a second run without requests."""
    out = str(folder / f"run-{time.monotonic_ns()}")
    changes = [f"teacher.base_url={url}", f"annotate.concurrency={concurrency}"]
    command = [
        sys.executable,
        "-m",
        "dsbs",
        "annotate",
        str(folder / "bench.yaml"),
        *changes,
        "--out",
        out,
        "--json",
    ]
    output, cpu, peak = measured(command, folder)
    assert json.loads(output)["splits"]["train"]["accepted"] == rows
    _, resumed_cpu, _ = measured(command, folder)
    return {
        "cpu_ms": 1000 * cpu / rows,
        "asking_ms": 1000 * (cpu - resumed_cpu) / rows,
        "peak_mb": peak,
    }


def floor(url: str, rows: int, concurrency: int) -> dict[str, float]:
    """Send the same requests with aiohttp alone."""
    import aiohttp

    async def main() -> None:
        body = json.dumps(
            {
                "model": "loopback",
                "messages": [{"role": "user", "content": "x" * 400}],
                "max_tokens": 256,
            }
        ).encode()
        requests = iter(range(rows))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def worker() -> None:
                for _ in requests:
                    async with session.post(f"{url}/chat/completions", data=body) as response:
                        json.loads(await response.read())

            await asyncio.gather(*(worker() for _ in range(concurrency)))

    before = resource.getrusage(resource.RUSAGE_SELF)
    asyncio.run(main())
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "cpu_ms": 1000 * cpu / rows,
        "asking_ms": 1000 * cpu / rows,
        "peak_mb": after.ru_maxrss / 1024,
    }


def peer(command: str, url: str, rows: int, concurrency: int) -> tuple[str, dict[str, float]]:
    """Run another tool by its script in benchmarks/peers, with its own environment's Python."""
    python, _, script = command.partition(":")
    arguments = [
        python,
        str(Path(script).resolve()),
        "--base-url",
        url,
        "--rows",
        str(rows),
        "--concurrency",
        str(concurrency),
    ]
    with tempfile.TemporaryDirectory() as folder:
        output, _, _ = measured(arguments, Path(folder))
    result = json.loads(output.strip().rpartition("\n")[2])
    cpu = 1000 * result["cpu_s"] / rows
    return f"{result['tool']} ({result['rows_ok']} of {rows})", {
        "cpu_ms": cpu,
        "asking_ms": cpu,
        "peak_mb": result["peak_mb"],
    }


def measure(
    tool: str, waits: list[float], folder: Path, concurrency: int
) -> tuple[str, dict[str, float]]:
    """Run one tool against a fresh server; return its label and its figures."""
    rows = len(waits)
    endpoint = Endpoint(waits)
    if tool == "dsbs":
        label, figures = tool, dsbs(folder, endpoint.url, rows, concurrency)
    elif tool == "aiohttp alone":
        label, figures = tool, floor(endpoint.url, rows, concurrency)
    else:
        label, figures = peer(tool, endpoint.url, rows, concurrency)
    state = endpoint.close()
    figures["wall_s"] = state["last"] - state["first"]
    figures["in_flight"] = state["max_in_flight"]
    return label, figures


def summary(runs: list[dict[str, float]], name: str, digits: int) -> str:
    """Median and range of one figure, e.g. ``4.31 (4.28–4.40)``."""
    values = [figures[name] for figures in runs]
    median = statistics.median(values)
    return f"{median:.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument(
        "--latency", choices=["fixed", "log-normal"], nargs="+", default=["fixed", "log-normal"]
    )
    parser.add_argument("--mean", type=float, default=0.5, help="mean latency in seconds")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peer", action="append", default=[], metavar="PYTHON:SCRIPT")
    options = parser.parse_args()
    print(f"{options.rows} rows, mean latency {options.mean:g} s, {options.runs} runs")
    print(
        f"{'latency':11}{'C':>5}  {'tool':38}{'ideal s':>9}{'wall s':>24}{'in flight':>11}"
        f"{'CPU ms/row':>24}{'of it asking':>24}{'peak MB':>9}"
    )
    late_runs = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows_file(folder, options.rows)
        for kind in options.latency:
            waits = latencies(kind, options.mean, options.rows)
            for concurrency in options.concurrency:
                ideal = ideal_wall(waits, concurrency)
                for tool in ["dsbs", *options.peer, "aiohttp alone"]:
                    runs: list[dict[str, float]] = []
                    for _ in range(options.runs):
                        label, figures = measure(tool, waits, folder, concurrency)
                        runs.append(figures)
                    wall = statistics.median(figures["wall_s"] for figures in runs)
                    late = tool == "dsbs" and wall > 1.1 * ideal + 1
                    late_runs += late
                    print(
                        f"{kind:11}{concurrency:5}  {label:38}{ideal:9.2f}"
                        f"{summary(runs, 'wall_s', 2):>24}"
                        f"{max(figures['in_flight'] for figures in runs):11.0f}"
                        f"{summary(runs, 'cpu_ms', 2):>24}{summary(runs, 'asking_ms', 2):>24}"
                        f"{max(figures['peak_mb'] for figures in runs):9.0f}"
                        f"{'  LATE' if late else ''}",
                        flush=True,
                    )
    sys.exit(1 if late_runs else 0)


if __name__ == "__main__":
    main()
