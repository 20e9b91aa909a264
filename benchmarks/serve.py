"""Load test of `dsbs serve`: many clients at once, with and without batching.

    python benchmarks/serve.py STUDENT INPUTS.jsonl   # 200 clients, 60 s each way, loopback
    python benchmarks/serve.py STUDENT INPUTS.jsonl --clients 20 --seconds 10
    python benchmarks/serve.py STUDENT INPUTS.jsonl --fallback --clients 100 --seconds 60

INPUTS.jsonl has one row of the student's task per line. Each client sends its next request as soon
as the last one is answered. The server runs in its own process; its resident memory is read every
half second once it is ready. The peer in the same run is the same server with --batch-size 1
--max-wait-ms 0. At the end of each load, SIGTERM is sent while every client has a request in
flight: each must be answered or never have been accepted. Exit code 1 where a request failed, the
memory did not level off, or the shutdown was not clean.

With --fallback a teacher is behind the student, which needs its threshold.json. The teacher is a
server of this script: it takes a second for a reply, answers every twentieth request with a 429,
and breaks every connection for ten seconds (a sixth of shorter loads) in the middle. Every row is
made unique, so that none is answered from the store. Its replies must be as many as the deferred
and audited rows, no two to the same row; the server must have counted as many answers as the
clients got; and the student's answers must be at most twice as late at p99 as without a teacher.
Clients that send as fast as they can queue for the student, and that queue hides what a teacher
adds. So both loads are repeated at a third of the student's rate.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from dsbs.serving.ledger import read_states


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
            size = self._process.memory_info().rss / 2**20
            if size:  # none once it has ended
                self.sizes.append(size)


class SlowTeacher:
    """A teacher in a process of its own: slow, throttling, and dead for a while."""

    def __init__(self, label: str, seconds: float) -> None:
        context = multiprocessing.get_context("spawn")
        self.answered = context.Value("i", 0)
        self.repeated = context.Value("i", 0)
        port = context.Value("i", 0)
        dead = (seconds / 3, min(10.0, seconds / 6))
        self._process = context.Process(
            target=_serve_teacher,
            args=(label, dead, self.answered, self.repeated, port),
            daemon=True,
        )
        self._process.start()
        while not port.value:
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{port.value}/v1"

    def stop(self) -> None:
        self._process.kill()


def _serve_teacher(
    label: str, dead: tuple[float, float], answered: Any, repeated: Any, port: Any
) -> None:
    from aiohttp import web

    begin, length = dead
    started: list[float] = []
    requests = 0
    prompts: set[str] = set()

    async def answer(request: web.Request) -> web.StreamResponse:
        nonlocal requests
        now = time.monotonic()
        started.append(now)
        requests += 1
        if begin <= now - started[0] < begin + length:
            assert request.transport is not None
            request.transport.abort()
            return web.Response(status=503)
        if requests % 20 == 0:
            return web.json_response({}, status=429)
        await asyncio.sleep(1)
        message = {"role": "assistant", "content": f"It seems so.\nAnswer: {label}"}
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        answered.value += 1
        prompt = json.dumps((await request.json())["messages"])
        repeated.value += prompt in prompts
        prompts.add(prompt)
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return web.json_response({"choices": [choice], "usage": usage})

    async def main() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.value = runner.addresses[0][1]
        await asyncio.Event().wait()

    asyncio.run(main())


def unique(row: Any, number: int) -> Any:
    """The row with a number in its longest text."""
    if isinstance(row, str):
        return f"{row} {number}"
    field = max(row, key=lambda name: len(str(row[name])))
    return row | {field: f"{row[field]} {number}"}


class Sources:
    """Who answered, and how late the student's answers were."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._of_student: list[float] = []

    def add(self, prediction: dict[str, Any], latency_s: float) -> None:
        source = prediction.get("source", "student")
        if "teacher_failure" in prediction:
            source = "failed"
        self._counts[source] += 1
        if source == "student":
            self._of_student.append(latency_s)

    def as_json(self) -> dict[str, Any]:
        ordered = sorted(self._of_student) or [0.0]
        result: dict[str, Any] = {"sources": dict(self._counts)}
        for p in (50, 99):
            result[f"student p{p} ms"] = round(1000 * ordered[len(ordered) * p // 100], 1)
        return result


async def load(
    url: str,
    rows: list[Any],
    clients: int,
    seconds: float,
    pid: int,
    *,
    repeats: bool = True,
    per_second: float | None = None,
) -> dict[str, Any]:
    """Send requests for ``seconds``, then SIGTERM; return counts, latencies and throughput.

    ``repeats`` False: every row is unique. ``per_second``: so many requests of all clients; one
    whose client still waits for an answer is left out.
    """
    latencies: list[float] = []
    sources = Sources()
    statuses: Counter[str] = Counter()
    draining: Counter[str] = Counter()
    start = time.monotonic()
    stop = start + seconds
    stopped = asyncio.Event()
    metrics = ""

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        turn = number
        while not stopped.is_set():
            if per_second is not None:
                while (wait_s := start + turn / per_second - time.monotonic()) < 0:
                    turn += clients
                await asyncio.sleep(wait_s)
            count = statuses if time.monotonic() < stop else draining
            began = time.perf_counter()
            row = rows[turn % len(rows)]
            if not repeats:
                row = unique(row, turn)
            try:
                async with session.post(f"{url}/predict", json={"inputs": [row]}) as response:
                    answer = await response.json()
                    good = response.status == 200 and len(answer["predictions"]) == 1
                    count[
                        str(response.status)
                        if good or response.status != 200
                        else "200 without an answer"
                    ] += 1
                    if count is statuses:
                        latencies.append(time.perf_counter() - began)
                    if count is statuses and good:
                        sources.add(answer["predictions"][0], latencies[-1])
            except (aiohttp.ClientError, OSError) as error:
                count[type(error).__name__] += 1
                if count is draining:
                    return
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
        **sources.as_json(),
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


def measured(
    options: argparse.Namespace,
    rows: list[Any],
    *more: str,
    repeats: bool = True,
    per_second: float | None = None,
) -> dict[str, Any]:
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
            load(
                server["url"],
                rows,
                options.clients,
                options.seconds,
                server["pid"],
                repeats=repeats,
                per_second=per_second,
            )
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


def before_teacher(
    options: argparse.Namespace, rows: list[Any], per_second: float | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Load a student before a teacher; return what was measured and reasons why that failed."""
    task = json.loads((Path(options.student) / "student.json").read_text(encoding="utf-8"))["task"]
    teacher = SlowTeacher(task["labels"][0], options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        settings = {
            "name": "load",
            "task": task,
            "teacher": {
                "model": "slow",
                "base_url": teacher.url,
                "price": {"input": 1, "output": 1},
            },
        }
        recipe.write_text(json.dumps(settings), encoding="utf-8")
        more = ("--fallback", str(recipe), "--out", folder, "--on-breach", "warn")
        result = measured(options, rows, *more, repeats=False, per_second=per_second)
        (state,) = read_states(Path(folder) / "serve" / "ledger.sqlite")
    teacher.stop()
    counts = dict(state.counts)
    result |= {"counts": counts, "teacher's replies": teacher.answered.value, "usd": state.usd}
    bought = counts.get("deferred", 0) + counts.get("audited", 0)
    sent = sum(counts.get(source, 0) for source in ("student", "teacher", "failed"))
    received = result["requests"] + result["while stopping"].get("200", 0)
    failures = {
        "the teacher's replies are not those counted": bought != teacher.answered.value,
        "the teacher was paid twice for a row": teacher.repeated.value > 0,
        "an answer was lost or sent twice": sent != received,
        "the dollars are not those of the replies": abs(state.usd - bought * 110e-6) > 1e-9,
    }
    missed = [problem for problem, failed in failures.items() if failed]
    return result, [*problems(result), *missed]


def with_teacher(options: argparse.Namespace, rows: list[Any]) -> list[str]:
    """Load the student alone and before a teacher, as fast as it can and then at a third of that
    rate; return reasons why that failed.
    """
    missed = []
    per_second = None
    for pace in ("", " at a third of the rate"):
        alone = measured(options, rows, repeats=False, per_second=per_second)
        print(f"alone{pace}: {json.dumps(alone)}", flush=True)
        result, reasons = before_teacher(options, rows, per_second)
        print(f"with a teacher{pace}: {json.dumps(result)}", flush=True)
        missed += problems(alone) + reasons
        if result["student p99 ms"] > 2 * alone["student p99 ms"]:
            missed.append(f"the student's answers wait for the teacher{pace}")
        per_second = alone["requests/s"] / 3
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student")
    parser.add_argument("inputs", type=Path, help="JSONL, a row or {input: row} a line")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--fallback", action="store_true", help="with a slow teacher behind it")
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
    if options.fallback:
        missed = with_teacher(options, rows)
        print("\n".join(missed) or "no request failed, memory levelled off, all replies counted")
        sys.exit(1 if missed else 0)
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
