"""Three rounds of learning from served rows: does the next student ask its teacher less?

    python benchmarks/rounds.py --out runs/rounds     # an hour on a busy core; resumable

Banking77 with an unknown class, labelled by Qwen3-30B-A3B (../shared/data/banking77_open). A server
of this script plays the teacher: it answers a text with the recorded completion. In each round

    dsbs annotate    the first 1,500 train rows, and from the second round on the served rows
    dsbs train       a student on them (distill), all with the same number of steps
    dsbs eval        a threshold, chosen on validation rows; coverage and agreement on the test rows
    dsbs serve       2,500 rows that no student has seen; the teacher answers what is deferred

Train and validation rows have no gold labels. Prints a Markdown table, with what novelty costs each
student: the share of test rows that it calls novel, and the coverage with and without it.
``rounds.json`` in the folder has the figures of the steps that are done: they are not repeated.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp

from dsbs.files import read_jsonl
from dsbs.formatting import markdown_table, percent
from dsbs.students.calibration import read_threshold

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "benchmarks" / "banking77-open.yaml"
DATA = ROOT.parent / "shared" / "data" / "banking77_open"
STUDENT = "distill-teacher-s0"
CLIENTS = 8


class LoopbackTeacher:
    """An OpenAI-compatible server whose reply to a text is ``answer(text)``."""

    def __init__(self, answer: Callable[[str], str], port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two packets

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                text = answer(key(prompt))
                message = {"role": "assistant", "content": text}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                tokens = len(prompt) // 4 + 1
                usage = {"prompt_tokens": tokens, "completion_tokens": 5}
                usage["total_tokens"] = tokens + 5
                payload = json.dumps({"choices": [choice], "usage": usage}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, daemon=True).start()


def key(text: str) -> str:
    """A text without differences in white space."""
    return " ".join(text.split())


def read_rows(split: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def completions() -> dict[str, str]:
    """The teacher's recorded completion of each text."""
    rows = [row for split in ("train", "valid", "test") for row in read_rows(split)]
    return {key(row["input"]["text"]): row["teacher"]["completion"] for row in rows}


def write_rows(path: Path, rows: Sequence[dict[str, Any]], *, gold: bool = False) -> Path:
    """Write rows without what the teacher said about them and, unless ``gold``, their labels."""
    fields = ("id", "input", "label") if gold else ("id", "input")
    lines = [json.dumps({name: row[name] for name in fields}) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def dsbs(command: str, *arguments: str) -> None:
    """Run a command; raises SystemExit where it fails."""
    line = [sys.executable, "-m", "dsbs", command, *arguments]
    if subprocess.run(line, cwd=ROOT, check=False).returncode:
        raise SystemExit(f"failed: dsbs {command} {' '.join(arguments)}")


@contextmanager
def served(student: Path, *options: str) -> Iterator[str]:
    """The URL of `dsbs serve`, which is stopped at the end."""
    line = [sys.executable, "-m", "dsbs", "serve", str(student), "--port", "0", "--json", *options]
    process = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        if not first:
            raise SystemExit("dsbs serve did not start")
        yield json.loads(first)["url"]
    finally:
        process.terminate()
        process.wait(60)


def fetch(url: str) -> str:
    with urllib.request.urlopen(url) as response:
        return str(response.read().decode())


def counted(url: str, name: str) -> int:
    """What a server has counted of ``deferred``, ``audited`` and so on."""
    page = fetch(f"{url}/metrics")
    return int(re.findall(rf"^dsbs_cascade_{name}_total (\d+)$", page, re.MULTILINE)[0])


def wait_for_audits(url: str) -> None:
    """Return once the server has counted no new audit for a while."""
    before = -1
    while (now := counted(url, "audited")) != before:
        before = now
        time.sleep(0.5)


def ask(url: str, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The server's predictions of rows, which a few clients send one by one."""
    answers: list[dict[str, Any]] = [{}] * len(rows)

    async def client(session: aiohttp.ClientSession, number: int) -> None:
        for index in range(number, len(rows), CLIENTS):
            body = {"inputs": [rows[index]["input"]]}
            async with session.post(f"{url}/predict", json=body) as response:
                response.raise_for_status()
                answers[index] = (await response.json())["predictions"][0]

    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            await asyncio.gather(*(client(session, number) for number in range(CLIENTS)))

    asyncio.run(main())
    return answers


@dataclass(frozen=True, slots=True)
class TestRow:
    """A test row, and the student's answer to it."""

    input: dict[str, Any]
    teacher: str
    agrees: bool
    confidence: float
    is_sure: bool
    is_novel: bool

    @property
    def is_answered(self) -> bool:
        """Whether the server lets the student answer."""
        return self.is_sure and not self.is_novel


def answered_rows(run: Path, folder: Path) -> list[TestRow]:
    """The test rows of a run, and a student's answers at its threshold."""
    from dsbs import Student

    student = Student.load(folder)
    threshold = read_threshold(folder)
    novelty = student.measure_novelty()
    assert threshold is not None
    assert novelty is not None
    rows = [row for _, row in read_jsonl(run / "annotate" / "test.jsonl") if row["own_label"]]
    answers = student.predict([row["input"] for row in rows], canonical=True)
    result = []
    for row, answer in zip(rows, answers, strict=True):
        confidence = student.confidence(answer, row["input"], threshold.confidence)
        result.append(
            TestRow(
                input=row["input"],
                teacher=row["own_label"],
                agrees=answer.label == row["own_label"],
                confidence=confidence or 0.0,
                is_sure=threshold.is_sure(confidence),
                is_novel=(answer.distance or 0.0) > novelty.limit,
            )
        )
    return result


def largest_coverage(rows: Sequence[TestRow], target: float) -> float:
    """The largest coverage at which the rows themselves keep the target: equal agreement."""
    coverage = differs = 0
    for number, row in enumerate(sorted(rows, key=lambda row: -row.confidence), 1):
        differs += not row.agrees
        if differs <= (1 - target) * len(rows):
            coverage = number
    return coverage / len(rows)


def test_figures(run: Path, folder: Path) -> dict[str, Any]:
    """What a student does with the test rows at its threshold, with and without novelty."""
    rows = answered_rows(run, folder)
    threshold = read_threshold(folder)
    assert threshold is not None
    assert threshold.target is not None

    def cascade(answered: list[bool]) -> dict[str, float]:
        differs = sum(
            is_answered and not row.agrees for is_answered, row in zip(answered, rows, strict=True)
        )
        return {"coverage": sum(answered) / len(rows), "agreement": 1 - differs / len(rows)}

    return {
        "test rows": len(rows),
        "threshold": threshold.threshold,
        "agreement of the student": sum(row.agrees for row in rows) / len(rows),
        "coverage at the target": largest_coverage(rows, threshold.target),
        "novel": sum(row.is_novel for row in rows) / len(rows),
        "without novelty": cascade([row.is_sure for row in rows]),
        "with novelty": cascade([row.is_answered for row in rows]),
    }


class Record:
    """``rounds.json``: the figures of the steps that are done, by round."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rounds: list[dict[str, Any]] = []
        if path.is_file():
            self.rounds = json.loads(path.read_text(encoding="utf-8"))

    def of(self, number: int) -> dict[str, Any]:
        if number == len(self.rounds):
            self.rounds.append({})
        return self.rounds[number]

    def save(self) -> None:
        self._path.write_text(json.dumps(self.rounds, indent=1), encoding="utf-8")


def settings(options: argparse.Namespace, out: Path, teacher: str) -> list[str]:
    """The recipe with its changes, as arguments of each command but serve."""
    train = read_rows("train")[: options.first]
    files = {
        "train": write_rows(out / "data" / "train.jsonl", train),
        "valid": write_rows(out / "data" / "valid.jsonl", read_rows("valid")[: options.limit]),
        "test": write_rows(
            out / "data" / "test.jsonl", read_rows("test")[: options.limit], gold=True
        ),
    }
    changes = [f"task.data.{split}={path}" for split, path in files.items()]
    changes += ["teacher.kind=openai", "teacher.model=qwen3-30b-a3b", f"teacher.base_url={teacher}"]
    changes += ["annotate.splits=[train, valid, test]", "train.methods=distill", "train.seeds=[0]"]
    changes += ["train.max_epochs=null", f"train.max_steps={options.steps}"]
    changes += ["train.valid_limit=300", "eval.floors=[]", "eval.latency_calls=0"]
    cascade = f"eval.cascade={{target: {options.target}, calibration: valid}}"
    return [argument for change in [*changes, cascade] for argument in ("--set", change)]


def play(options: argparse.Namespace, record: Record) -> None:
    out = options.out.resolve()
    labels = completions()
    teacher = LoopbackTeacher(labels.__getitem__, options.port)
    changes = settings(options, out, teacher.url)
    common = [str(RECIPE), "--out", str(out), *changes]
    run_rows = read_rows("train")[options.first :]
    for number in range(options.rounds):
        figures = record.of(number)
        if "threshold" not in figures:
            learned = common
            if number:
                dsbs("annotate", *common, "--from-serve")
                served_rows = out / "serve" / "rows.jsonl"
                learned = [*common, "--set", f"task.data.served={served_rows}"]
            else:
                dsbs("annotate", *common)
            dsbs("train", *learned)
            dsbs("eval", *learned)
            annotated = [row for _, row in read_jsonl(out / "annotate" / "train.jsonl")]
            figures["train rows"] = sum(row["accepted"] for row in annotated)
            figures |= test_figures(out, out / "train" / STUDENT)
            record.save()
        if "served" not in figures:
            begin = number * options.serve
            rows = run_rows[begin : begin + options.serve]
            fallback = ("--fallback", str(RECIPE), "--out", str(out), *changes)
            with served(out / "train" / STUDENT, *fallback) as url:
                answers = ask(url, rows)
                wait_for_audits(url)
                breach = json.loads(fetch(f"{url}/health")).get("breach")
            sources = Counter(answer["source"] for answer in answers)
            failed = sum("teacher_failure" in answer for answer in answers)
            same = sum(
                answer["label"] == labels[key(row["input"]["text"])]
                for answer, row in zip(answers, rows, strict=True)
            )
            figures["served"] = {
                "rows": len(rows),
                "deferred": sources["teacher"] / len(rows),
                "failed": failed,
                "agreement": same / len(rows),
                "breach": breach,
            }
            record.save()


def print_tables(rounds: Sequence[dict[str, Any]]) -> None:
    lines = []
    novelty = []
    for number, figures in enumerate(rounds, 1):
        bare, whole = figures["without novelty"], figures["with novelty"]
        served_rows = figures["served"]
        lines.append(
            [
                str(number),
                f"{figures['train rows']:,}",
                percent(figures["agreement of the student"]),
                percent(bare["coverage"]),
                percent(bare["agreement"]),
                percent(figures["coverage at the target"]),
                percent(served_rows["deferred"]),
                percent(served_rows["agreement"]),
            ]
        )
        shares = [figures["novel"], bare["coverage"], whole["coverage"]]
        agreements = [bare["agreement"], whole["agreement"]]
        novelty.append([str(number), *map(percent, shares + agreements)])
    headings = ["student", "rows trained on", "student agrees", "coverage", "cascade agrees"]
    headings += ["coverage at the target", "deferred while serving", "served answers agree"]
    print("\n".join(["", *markdown_table(headings, lines), ""]))
    headings = ["student", "novel test rows", "coverage without", "with", "agreement without"]
    print("\n".join(markdown_table([*headings, "with"], novelty)))
    for number, figures in enumerate(rounds, 1):
        if figures["served"]["breach"] or figures["served"]["failed"]:
            print(f"\nround {number}: {figures['served']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/rounds"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first", type=int, default=1500, help="train rows of the first student")
    parser.add_argument("--serve", type=int, default=2500, help="rows served in a round")
    parser.add_argument("--steps", type=int, default=300, help="of each student's training")
    parser.add_argument("--target", type=float, default=0.95, help="of agreement")
    parser.add_argument("--limit", type=int, help="of validation rows and of test rows")
    parser.add_argument("--port", type=int, default=8417, help="of the teacher; part of its name")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out / "rounds.json")
    play(options, record)
    print_tables(record.rounds)


if __name__ == "__main__":
    main()
