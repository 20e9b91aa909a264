"""Annotating a million rows with the recorded teacher: rows per second and peak memory.

    python benchmarks/scale.py                  # 1,000,000 synthetic rows
    python benchmarks/scale.py --rows 10000 100000 1000000 --file
    python benchmarks/scale.py --rows 10000 --labels 1000

Peak memory must not grow with the number of rows. Exit code 1 if it exceeds 700 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAX_MB = 700


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument(
        "--file", action="store_true", help="completions in a separate file, joined by id"
    )
    parser.add_argument("--labels", type=int, default=4, help="number of labels")
    options = parser.parse_args()
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
