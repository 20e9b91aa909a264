"""Time of `dsbs eval --score-only` for 10,000 rows and nine systems, on one core.

The systems have rationales and probabilities.

python benchmarks/rescore.py                # exit status 1 beyond 20 s
python benchmarks/rescore.py --profile      # where the time goes
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAX_SECONDS = 20.0
LABELS = ("entailment", "neutral", "contradiction")
WORDS = (
    "a an the dog man woman child ball street park runs plays holds looks red blue two young "
    "outside because so not"
)


def write(folder: Path, rows: int, systems: int) -> list[str]:
    """A recipe, its rows and a prediction file for each system; the arguments of a command on them.

    The teacher, whose completions are in the rows, is one of the systems. The other systems'
    rationales are compared with its own.
    """
    draw, words = random.Random(0), WORDS.split()
    gold = []
    with (folder / "test.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            gold.append(draw.choice(LABELS))
            premise, hypothesis = (" ".join(draw.choices(words, k=k)) for k in (14, 8))
            row = {
                "id": f"row-{i}",
                "premise": premise,
                "hypothesis": hypothesis,
                "label": gold[-1],
            }
            row["teacher"] = {"completion": f"{premise}.\nAnswer: {draw.choice(LABELS)}"}
            file.write(json.dumps(row) + "\n")
    files = {}
    for system in range(systems - 1):
        path = folder / f"system-{system}.jsonl"
        with path.open("w", encoding="utf-8") as file:
            for i, label in enumerate(gold):
                said = label if draw.random() < 0.5 + 0.03 * system else draw.choice(LABELS)
                why = " ".join(draw.choices(words, k=18))
                line = {
                    "id": f"row-{i}",
                    "prediction": said,
                    "probability": draw.uniform(0.34, 1),
                    "rationale": why,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--systems", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        arguments = write(Path(name), options.rows, options.systems)
        subprocess.run(
            [sys.executable, "-m", "dsbs", "annotate", *arguments], capture_output=True, check=True
        )
        profiled = ["-m", "cProfile", "-s", "cumulative"] if options.profile else []
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *profiled, "-m", "dsbs", "eval", *arguments, "--score-only"],
            capture_output=True,
            text=True,
            check=False,
        )
        wall = time.perf_counter() - start
        if done.returncode:
            sys.exit(done.stderr)
        systems = [] if options.profile else json.loads(done.stdout)["systems"]
        assert options.profile or (
            "rouge_l" in systems[-1]["metrics"] and len(systems) == options.systems
        )
        if options.profile:
            print("\n".join(done.stdout.split("\n")[1:60]))
        print(
            f"{options.rows} rows, {options.systems} systems, one core: {wall:.1f} s, "
            "including the start of the command"
        )
        sys.exit(0 if wall < MAX_SECONDS else f"more than {MAX_SECONDS:.0f} s")


if __name__ == "__main__":
    main()
