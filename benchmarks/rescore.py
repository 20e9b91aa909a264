"""Time of `dsbs eval --score-only` for 10,000 rows and nine systems, on one core.

    python benchmarks/rescore.py                # exit code 1 above 20 s
    python benchmarks/rescore.py --profile      # show where the time goes

The systems have rationales and probabilities. Printed are the median and the range of all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MAX_SECONDS = 20.0
LABELS = ("entailment", "neutral", "contradiction")
WORDS = (
    "a an the dog man woman child ball street park runs plays holds looks red blue two young "
    "outside because so not"
)


def write_inputs(folder: Path, rows: int, systems: int) -> list[str]:
    """Write a recipe, its rows and a prediction file per system; return a command's arguments.

    The teacher is one of the systems: its completions are in the rows, and the other systems'
    rationales are compared with its rationales.
    """
    generator = random.Random(0)
    words = WORDS.split()
    gold = []
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            gold.append(generator.choice(LABELS))
            premise = " ".join(generator.choices(words, k=14))
            hypothesis = " ".join(generator.choices(words, k=8))
            row: dict[str, Any] = {
                "id": f"row-{i}",
                "premise": premise,
                "hypothesis": hypothesis,
                "label": gold[-1],
            }
            row["teacher"] = {"completion": f"{premise}.\nAnswer: {generator.choice(LABELS)}"}
            file.write(json.dumps(row) + "\n")
    files = {}
    for system in range(systems - 1):
        path = folder / f"system-{system}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for i, label in enumerate(gold):
                prediction = label
                if generator.random() >= 0.5 + 0.03 * system:
                    prediction = generator.choice(LABELS)
                rationale = " ".join(generator.choices(words, k=18))
                line = {
                    "id": f"row-{i}",
                    "prediction": prediction,
                    "probability": generator.uniform(0.34, 1),
                    "rationale": rationale,
                }
                file.write(json.dumps(line) + "\n")
        files[f"system-{system}"] = str(path)
    data = str(folder / "test.jsonl")
    recipe = {
        "name": "rescore",
        "task": {"name": "esnli", "data": {"train": data, "test": data}},
        "teacher": {"kind": "recorded"},
        "annotate": {"splits": ["test"]},
        "eval": {"baseline": ["system-0", "system-1"], "predictions": files},
    }
    (folder / "rescore.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return [str(folder / "rescore.yaml"), "--out", str(folder / "run"), "--json"]


def score(arguments: list[str], systems: int, *, profile: bool) -> float:
    """Run the command once and return its seconds, including the start of Python."""
    profiler = ["-m", "cProfile", "-s", "cumulative"] if profile else []
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *profiler, "-m", "dsbs", "eval", *arguments, "--score-only"],
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - began
    if done.returncode:
        sys.exit(done.stderr)
    if profile:
        print("\n".join(done.stdout.split("\n")[1:60]))
    else:
        results = json.loads(done.stdout)["systems"]
        assert len(results) == systems
        assert "rouge_l" in results[-1]["metrics"]
    return wall


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--systems", type=int, default=9)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="one run under cProfile")
    options = parser.parse_args()
    runs = 1 if options.profile else options.runs
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        arguments = write_inputs(Path(name), options.rows, options.systems)
        annotate = [sys.executable, "-m", "dsbs", "annotate", *arguments]
        subprocess.run(annotate, capture_output=True, check=True)
        times = [score(arguments, options.systems, profile=options.profile) for _ in range(runs)]
    median = statistics.median(times)
    print(
        f"{options.rows} rows, {options.systems} systems, one core, {runs} runs: "
        f"{median:.1f} s ({min(times):.1f}–{max(times):.1f}), including the start of the command"
    )
    sys.exit(0 if median < MAX_SECONDS else f"more than {MAX_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
