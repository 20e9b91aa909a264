"""What asking costs: wall time against the ideal, CPU time and memory a row, beside other annotation tools under the same load.

    python benchmarks/annotate.py                                        # dsbs alone: 2 latencies x 3 concurrencies, 2000 rows
    python benchmarks/annotate.py --peer <venv>/bin/python:benchmarks/peers/curator_peer.py --peer …

A loopback server in a process of its own answers every chat request after a latency that is the same for all tools: fixed, or
log-normal with the same mean. The ideal wall time is what a scheduler without any cost of its own would take for the very
latencies that were drawn, in the order of the rows. CPU time is that of the asking process alone (user and system), the
server's is not in it; the request window runs from the first request to arrive at the server to the last reply it has sent. The
aiohttp line is the floor: the same requests and nothing else.
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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIGMA = 0.5  # of the log-normal latency's logarithm


def latencies(kind: str, mean_s: float, rows: int) -> list[float]:
    """Seconds for each request in order of arrival; seeded, so that every tool meets the same ones."""
    if kind == "fixed":
        return [mean_s] * rows
    dice = random.Random(20230503)
    return [dice.lognormvariate(math.log(mean_s) - SIGMA**2 / 2, SIGMA) for _ in range(rows)]


def ideal_wall(waits: list[float], concurrency: int) -> float:
    """Seconds that list scheduling without overhead takes: each slot takes the next request when it is free."""
    slots = [0.0] * min(concurrency, len(waits))
    for wait in waits:
        heapq.heapreplace(slots, slots[0] + wait)
    return max(slots)


def serve(waits: list[float], port: Any, report: Any) -> None:
    """A chat endpoint: a bare asyncio protocol, so that it is never what holds a tool up."""
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
    state = {"received": 0, "in_flight": 0, "most": 0, "first": 0.0, "last": 0.0}

    class Chat(asyncio.Protocol):
        def connection_made(self, transport: Any) -> None:
            self.transport, self.buffer = transport, b""

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
                    self.transport.write(
                        reply
                    )  # a look at the endpoint's limits, no part of the load
                    continue
                now = time.monotonic()
                state["first"] = state["first"] or now
                wait = waits[state["received"] % len(waits)]
                state["received"] += 1
                state["in_flight"] += 1
                state["most"] = max(state["most"], state["in_flight"])
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
    """The server in its own process."""

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
        "task": {"name": "classification", "labels": ["billing", "shipping"], "columns": {"label": "team"},
                 "data": {"train": str(folder / "rows.csv"), "test": str(folder / "rows.csv")}},
        "teacher": {"model": "loopback", "api_key_env": None},
        "annotate": {"splits": ["train"]},
    }  # fmt: skip
    (folder / "bench.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder / "bench.yaml"


def measured(command: list[str], cwd: Path) -> tuple[str, float, float, float]:
    """Standard output, wall seconds, CPU seconds and peak MB of a whole process."""
    began = time.monotonic()
    process = subprocess.Popen(
        command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return said, time.monotonic() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def dsbs(folder: Path, url: str, rows: int, concurrency: int) -> dict[str, float]:
    """A whole `dsbs annotate`; asking is that less the same command with all replies there (start, files)."""
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
    said, _, cpu, peak = measured(command, folder)
    assert json.loads(said)["splits"]["train"]["accepted"] == rows
    _, _, again, _ = measured(command, folder)
    return {"cpu_ms": 1000 * cpu / rows, "asking_ms": 1000 * (cpu - again) / rows, "peak_mb": peak}


def floor(url: str, rows: int, concurrency: int) -> dict[str, float]:
    """The same requests through aiohttp and nothing else."""
    import aiohttp

    async def main() -> None:
        body = json.dumps(
            {
                "model": "loopback",
                "messages": [{"role": "user", "content": "x" * 400}],
                "max_tokens": 256,
            }
        ).encode()
        todo = iter(range(rows))
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def worker() -> None:
                for _ in todo:
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
    """Another tool by its script in `benchmarks/peers/`, run by its own environment's Python."""
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
        said = json.loads(measured(arguments, Path(folder))[0].strip().rpartition("\n")[2])
    cpu = 1000 * said["cpu_s"] / rows
    return f"{said['tool']} ({said['rows_ok']} of {rows})", {
        "cpu_ms": cpu,
        "asking_ms": cpu,
        "peak_mb": said["peak_mb"],
    }


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
    parser.add_argument("--peer", action="append", default=[], metavar="PYTHON:SCRIPT")
    options = parser.parse_args()
    print(
        f"{options.rows} rows, mean latency {options.mean:g} s; wall <= 1.1 x ideal + 1 s is the aim"
    )
    headings = ("wall s", "ideal s", "in flight", "CPU ms/row", "asking", "peak MB")
    print(
        f"{'latency':11}{'C':>5}  {'tool':38}" + "".join(f"{heading:>12}" for heading in headings)
    )
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows_file(folder, options.rows)
        for kind in options.latency:
            waits = latencies(kind, options.mean, options.rows)
            for concurrency in options.concurrency:
                ideal = ideal_wall(waits, concurrency)
                for tool in ["dsbs", *options.peer, "aiohttp alone"]:
                    endpoint = Endpoint(waits)
                    if tool == "dsbs":
                        label, found = tool, dsbs(folder, endpoint.url, options.rows, concurrency)
                    elif tool == "aiohttp alone":
                        label, found = tool, floor(endpoint.url, options.rows, concurrency)
                    else:
                        label, found = peer(tool, endpoint.url, options.rows, concurrency)
                    seen = endpoint.close()
                    wall = seen["last"] - seen["first"]
                    late = tool == "dsbs" and wall > 1.1 * ideal + 1
                    missed += late
                    figures = f"{wall:12.2f}{ideal:12.2f}{int(seen['most']):12}{found['cpu_ms']:12.2f}{found['asking_ms']:12.2f}"
                    print(
                        f"{kind:11}{concurrency:5}  {label:38}{figures}{found['peak_mb']:12.0f}{'  LATE' if late else ''}",
                        flush=True,
                    )
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
