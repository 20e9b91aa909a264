"""A million rows through the recorded teacher: rows a second and peak memory, which must stay flat.

python benchmarks/scale.py                  # 1,000,000 synthetic rows; exit status 1 above 700 MB
python benchmarks/scale.py --rows 10000 100000 1000000 --file
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

MOST_MB = 700


def write(folder: Path, rows: int, *, apart: bool) -> Path:
    """A recipe and its rows, with the completions in the rows or in a file apart."""
    teams = ("billing", "shipping", "technical", "account")
    with (
        (folder / "rows.jsonl").open("w", encoding="utf-8") as file,
        (folder / "said.jsonl").open("w", encoding="utf-8") as said,
    ):
        for i in range(rows):
            team = teams[i % 4]
            text = f"Customer {i} writes about order {i * 7919 % 1_000_003}: something with it is wrong, and it is about {team}."
            completion = f"The message speaks of order {i} and of {team}, so that team should look at it.\nAnswer: {team}"
            row = {"id": f"row-{i:07d}-of-a-long-name", "text": text, "label": team}
            if apart:
                said.write(json.dumps({"id": row["id"], "completion": completion}) + "\n")
            else:
                row["teacher"] = {"model": "synthetic", "completion": completion}
            file.write(json.dumps(row) + "\n")
    recipe = {
        "name": "scale",
        "task": {"name": "classification", "labels": list(teams),
                 "data": {"train": str(folder / "rows.jsonl"), "test": str(folder / "rows.jsonl")}},
        "teacher": {"kind": "recorded"} | ({"completions": str(folder / "said.jsonl")} if apart else {}),
        "annotate": {"splits": ["train"]},
    }  # fmt: skip
    (folder / "scale.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return folder / "scale.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument(
        "--file", action="store_true", help="completions in a file apart, joined by id"
    )
    options = parser.parse_args()
    highest = 0.0
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            recipe = write(folder, rows, apart=options.file)
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
            said = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            wall, peak = time.monotonic() - began, used.ru_maxrss / 1024
            if os.waitstatus_to_exitcode(status):
                sys.exit("dsbs annotate failed")
            assert json.loads(said)["splits"]["train"]["accepted"] == rows
            print(
                f"{rows:,} rows: {rows / wall:,.0f} rows/s, {wall:.1f} s, peak {peak:.0f} MB",
                flush=True,
            )
            highest = max(highest, peak)
    sys.exit(1 if highest > MOST_MB else 0)


if __name__ == "__main__":
    main()
