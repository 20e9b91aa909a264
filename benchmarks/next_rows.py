"""Which rows next? Accuracy of students on rows that `dsbs annotate --next` chose, against random.

    python benchmarks/next_rows.py --out runs/next-rows     # resumable

Banking77 (Casanueva et al., 2020; gold labels stand for the teacher's) and e-SNLI (PaLM-540B's
recorded labels), MiniLM with a label head. From a pool of train rows, each seed annotates its first
rows at random and trains a student. Each way of choosing then goes on from that student: rows
chosen, annotated, a new student trained on all rows so far, with the same number of steps; a fifth
of the rows is random in each round. "cold" are first rows that are chosen by diversity, before
there is a student. Accuracy is that on the test rows, by their gold labels.

``next-rows.json`` in the folder has the figures of the steps that are done: they are not repeated.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads would take the cores of others

import argparse
import gzip
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from dsbs import Student, annotate, load_recipe, train
from dsbs.annotation.next_rows import choose
from dsbs.config import Recipe
from dsbs.files import write_json
from dsbs.formatting import markdown_table
from dsbs.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
WAYS = ("random", "uncertainty", "diversity", "both")
STUDENT = "distill-teacher-s{seed}"
VALID_ROWS = 50
DATASETS = {
    "banking77": ("recipes/banking77.yaml", "banking77/train.jsonl.gz", "banking77/test.jsonl.gz"),
    "esnli": ("benchmarks/esnli-minilm.yaml", "esnli/valid.jsonl.gz", "esnli/test.jsonl.gz"),
}
LABEL_ALONE = ROOT / "benchmarks" / "banking77-open-prompt.yaml"


def sample(source: str, number: int) -> list[dict[str, Any]]:
    """``number`` rows of a file, the same in each run."""
    with gzip.open(DATA / source, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return random.Random(0).sample(rows, min(number, len(rows)))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


class DatasetRuns:
    """The runs of one dataset, and their figures: seed -> way -> rows -> accuracy."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self._name = name
        self._options = options
        self._folder = options.out / name
        self._record = options.out / "next-rows.json"
        recipe, train_file, test_file = DATASETS[name]
        rows = sample(train_file, options.pool + VALID_ROWS)
        for row in rows:
            row.setdefault("teacher", {"model": "gold", "completion": row["label"]})
        self._test = sample(test_file, options.test)
        files = {
            "train": write_rows(self._folder / "train.jsonl", rows[VALID_ROWS:]),
            "valid": write_rows(self._folder / "valid.jsonl", rows[:VALID_ROWS]),
            "test": write_rows(self._folder / "test.jsonl", self._test),
        }
        self._settings = [f"task.data.{split}={path.absolute()}" for split, path in files.items()]
        self._settings += ["teacher={kind: recorded}", "annotate.splits=train"]
        if name == "banking77":
            self._settings.append(f"annotate.prompt={LABEL_ALONE}")
        self._settings += [
            "student={model: minilm-l6, max_input_tokens: 128}",
            "train={methods: distill, labels: teacher, learning_rate: 5.0e-4, "
            f"batch_size: {options.batch_size}, max_steps: {options.steps}, "
            f"eval_every: {options.steps}, log_every: {options.steps}}}",
        ]
        self._recipe_file = ROOT / recipe

    def recipe(self, seed: int, way: str) -> Recipe:
        choice = f"annotate.next={{by: {way}, seed: {seed}}}"
        return load_recipe(str(self._recipe_file), [*self._settings, f"train.seeds={seed}", choice])

    def play(self, figures: dict[str, Any]) -> Iterator[None]:
        """Go through all seeds and ways; yields after each new figure."""
        first, *later = self._options.sizes
        for seed in self._options.seeds:
            of_seed = figures.setdefault(self._name, {}).setdefault(str(seed), {})
            start = self._folder / f"s{seed}" / "start"
            for way, folder in (("random", start), ("diversity", start.with_name("cold"))):
                name = "first" if way == "random" else "cold"
                if name not in of_seed:
                    of_seed[name] = {str(first): self._accuracy(seed, way, first, folder)}
                    yield
            for way in WAYS:
                done = of_seed.setdefault(way, {})
                folder = start.with_name(way)
                if not folder.is_dir():
                    shutil.copytree(start, folder.with_name(f"{way}.new"), dirs_exist_ok=True)
                    folder.with_name(f"{way}.new").rename(folder)
                for size in later:
                    if str(size) not in done:
                        done[str(size)] = self._accuracy(seed, way, size, folder)
                        yield

    def _accuracy(self, seed: int, way: str, size: int, folder: Path) -> float:
        """Annotate up to ``size`` rows, train on them, and answer the test rows."""
        recipe = self.recipe(seed, way)
        run = RunFolder(folder)
        missing = size - len(run.next_rounds().chosen)
        if missing > 0:
            choose(recipe, missing, out=folder)
        annotate(recipe, out=folder)
        train(recipe, out=folder)
        student = Student.load(run.student(STUDENT.format(seed=seed)))
        answers = student.predict([row["input"] for row in self._test])
        right = [
            answer.label is not None and student.task.correct(answer.label, row["label"])
            for answer, row in zip(answers, self._test, strict=True)
        ]
        accuracy = fmean(right)
        print(f"{self._name} seed {seed} {way} {size} rows: {accuracy:.3f}", flush=True)
        return accuracy


def tables(figures: dict[str, Any], sizes: Sequence[int]) -> list[str]:
    """A Markdown table for each dataset: the mean over seeds, and each seed's figure."""
    first, *later = map(str, sizes)
    lines: list[str] = []
    for name, seeds in figures.items():
        rows = [
            ["random", first, *_cells(seeds, "first", first, "first")],
            ["cold", first, *_cells(seeds, "cold", first, "first")],
        ]
        for size in later:
            rows += [[way, size, *_cells(seeds, way, size, "random")] for way in WAYS]
        headings = ["chosen by", "rows", "accuracy, %", "minus random", "each seed", "minus random"]
        lines += ["", f"{name}:", "", *markdown_table(headings, rows)]
    return lines


def _cells(seeds: dict[str, Any], way: str, size: str, baseline: str) -> list[str]:
    pairs = [
        (100 * of_seed[way][size], 100 * of_seed[baseline][size])
        for of_seed in seeds.values()
        if size in of_seed.get(way, {}) and size in of_seed.get(baseline, {})
    ]
    if not pairs:
        return ["–"] * 4
    differences = [value - other for value, other in pairs]
    return [
        f"{fmean(value for value, _ in pairs):.1f}",
        f"{fmean(differences):+.1f}",
        ", ".join(f"{value:.1f}" for value, _ in pairs),
        ", ".join(f"{difference:+.1f}" for difference in differences),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/next-rows"))
    parser.add_argument("--datasets", nargs="+", choices=list(DATASETS), default=list(DATASETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", type=int, default=[100, 200, 400])
    parser.add_argument("--pool", type=int, default=1500, help="train rows to choose from")
    parser.add_argument("--test", type=int, default=400, help="test rows")
    parser.add_argument("--steps", type=int, default=40, help="of each student's training")
    parser.add_argument("--batch-size", type=int, default=32)
    options = parser.parse_args()
    record = options.out / "next-rows.json"
    figures: dict[str, Any] = {}
    if record.is_file():
        figures = json.loads(record.read_text(encoding="utf-8"))
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.datasets:
        for _ in DatasetRuns(name, options).play(figures):
            write_json(record, figures)
    print("\n".join(tables(figures, options.sizes)))


if __name__ == "__main__":
    main()
