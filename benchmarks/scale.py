"""A million rows, annotated by the recorded teacher or predicted: rows per second, peak memory.

    python benchmarks/scale.py                  # annotate 1,000,000 synthetic rows
    python benchmarks/scale.py --rows 10000 100000 1000000 --file
    python benchmarks/scale.py --rows 10000 --labels 1000
    python benchmarks/scale.py --predict --workers 2 --rows 20000 200000

--predict runs `dsbs predict` with an int8 ONNX export of minilm-l6, whose label head is untrained:
that changes no time. --student names another student or export. The rate of predictions is without
the start of the command, which a run of 64 rows measures; memory is that of all processes together.

Peak memory must not grow with the number of rows. Exit code 1 if annotating exceeds 700 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

MAX_MB = 700
MESSAGE = "where is my parcel I paid the invoice twice and nobody answers please help me"


def write_inputs(folder: Path, rows: int, *, labels: int, separate: bool) -> Path:
    """Write the rows and a recipe, with the completions in the rows or in a separate file.

    Half of the completions name their label within a sentence.
    """
    teams = [f"team {number:04d} of the shop" for number in range(labels)]
    with (
        (folder / "rows.jsonl").open("w", encoding="utf-8") as file,
        (folder / "completions.jsonl").open("w", encoding="utf-8") as completions,
    ):
        for i in range(rows):
            team = teams[i % labels]
            order = i * 7919 % 1_000_003
            text = f"Customer {i} writes that something is wrong with order {order}: it is {team}."
            completion = f"The message is about order {i} and {team}.\nAnswer: "
            completion += team if i % 2 else f"It is {team}, I think."
            row: dict[str, Any] = {"id": f"row-{i:07d}-of-a-long-name", "text": text, "label": team}
            if separate:
                completions.write(json.dumps({"id": row["id"], "completion": completion}) + "\n")
            else:
                row["teacher"] = {"model": "synthetic", "completion": completion}
            file.write(json.dumps(row) + "\n")
    data = str(folder / "rows.jsonl")
    teacher = {"kind": "recorded"}
    if separate:
        teacher["completions"] = str(folder / "completions.jsonl")
    recipe = {
        "name": "scale",
        "task": {
            "name": "classification",
            "labels": teams,
            "data": {"train": data, "test": data},
        },
        "teacher": teacher,
        "annotate": {"splits": ["train"]},
    }
    (folder / "scale.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder / "scale.yaml"


# --- predictions


def export_student(folder: Path, labels: int) -> Path:
    """An int8 ONNX export of MiniLM with an untrained label head."""
    from dsbs import Student, export
    from dsbs.config import StudentSection, TaskSection
    from dsbs.students.card import StudentCard
    from dsbs.students.tokenizer import load_tokenizer
    from dsbs.students.weights import new_model

    section = StudentSection(model="minilm-l6", max_input_tokens=128)
    tokenizer = load_tokenizer("minilm-l6")
    names = tuple(f"team {number:04d}" for number in range(labels))
    card = StudentCard(
        name="minilm",
        method="finetune",
        labels="gold",
        seed=0,
        task=TaskSection.model_validate(
            {"name": "classification", "labels": names, "data": {"train": "rows.csv"}}
        ),
        prefixes={"label": ""},
        max_input_tokens=128,
        max_target_tokens=8,
        kind="encoder",
        head="labels",
        classes=names,
    )
    model = new_model(section, tokenizer, 0, labels=labels, classes=names)
    Student.of(model, tokenizer, card).save(folder / "student")
    rows = [text_of(i) for i in range(50)]
    return export(folder / "student", "onnx", quantize="int8", examples=rows).path


def text_of(number: int) -> str:
    """A short message: 8 to 18 words."""
    words = MESSAGE.split()
    return f"order {number * 7919 % 1_000_003}: {' '.join(words[: 6 + number % 11])}"


def predict_rows(student: Path, folder: Path, rows: int, workers: int) -> tuple[float, float]:
    """Seconds and peak megabytes of `dsbs predict` on ``rows`` rows."""
    source = folder / f"rows-{rows}.jsonl"
    with source.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": str(i), "text": text_of(i)}) + "\n" for i in range(rows))
    out = folder / f"predictions-{rows}.jsonl"
    command = [sys.executable, "-m", "dsbs", "predict", str(student), str(source)]
    command += ["--out", str(out), "--workers", str(workers)]
    began = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    peaks = [0.0]
    watcher = threading.Thread(target=watch_memory, args=(process, peaks))
    watcher.start()
    if process.wait():
        sys.exit("dsbs predict failed")
    wall = time.monotonic() - began
    watcher.join()
    with out.open("rb") as file:
        assert sum(1 for _ in file) == rows
    return wall, peaks[0]


def watch_memory(process: subprocess.Popen[bytes], peaks: list[float]) -> None:
    """Keep the largest memory of a process and its children together, in megabytes."""
    import psutil

    while process.poll() is None:
        total = 0
        try:
            root = psutil.Process(process.pid)
            for member in [root, *root.children(recursive=True)]:
                total += member.memory_info().rss
        except psutil.NoSuchProcess:
            pass
        peaks[0] = max(peaks[0], total / 2**20)
        time.sleep(0.2)


def measure_predictions(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        student = options.student or export_student(folder, options.labels)
        start, _ = predict_rows(student, folder, 64, options.workers)
        for rows in options.rows:
            wall, peak = predict_rows(student, folder, rows, options.workers)
            rate = rows / (wall - start)
            print(
                f"{rows:,} rows: {rate:,.0f} rows/s with {options.workers} workers, {wall:.1f} s "
                f"of which {start:.1f} s start; a million in {1e6 / rate / 60:.0f} minutes; "
                f"peak {peak:.0f} MB",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument(
        "--file", action="store_true", help="completions in a separate file, joined by id"
    )
    parser.add_argument("--labels", type=int, default=4, help="number of labels")
    parser.add_argument("--predict", action="store_true", help="dsbs predict, not annotate")
    parser.add_argument("--student", type=Path, help="with --predict: a student or an export")
    parser.add_argument("--workers", type=int, default=2, help="with --predict")
    options = parser.parse_args()
    if options.predict:
        measure_predictions(options)
        return
    highest = 0.0
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            recipe = write_inputs(folder, rows, labels=options.labels, separate=options.file)
            command = [
                sys.executable,
                "-m",
                "dsbs",
                "annotate",
                str(recipe),
                "--out",
                str(folder / "run"),
                "--json",
            ]
            began = time.monotonic()
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.monotonic() - began
            peak = usage.ru_maxrss / 1024
            if os.waitstatus_to_exitcode(status):
                sys.exit("dsbs annotate failed")
            assert json.loads(output)["splits"]["train"]["accepted"] == rows
            print(
                f"{rows:,} rows: {rows / wall:,.0f} rows/s with {options.labels:,} labels, "
                f"{wall:.1f} s, peak {peak:.0f} MB",
                flush=True,
            )
            highest = max(highest, peak)
    sys.exit(1 if highest > MAX_MB else 0)


if __name__ == "__main__":
    main()
