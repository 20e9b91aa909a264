"""SVAMP in five folds: a student of each of its 1,000 rows, by the teacher of its rationales.

    python benchmarks/svamp_folds.py --out runs/svamp-folds
    python benchmarks/svamp_folds.py --out runs/svamp-folds --folds 0 1 --teachers gpt-4
    python benchmarks/svamp_folds.py train.max_steps=2 --out FOLDER --folds 0 --teachers gpt-4

Each fold tests 200 rows: the first the test split, the other four a quarter of the train rows. The
other 800 rows are its train rows. A fold has a student by fine-tuning, and one by step-by-step for
each teacher. Their answers to all folds are joined, so that they are compared on 1,000 rows in
OUT/joined (or on the rows of the folds so far). The command resumes where it was interrupted.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from dsbs import annotate, evaluate, load_recipe, train
from dsbs.config import Recipe
from dsbs.files import write_jsonl
from dsbs.progress import make_progress
from dsbs.records.summary import results_markdown
from dsbs.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT.parent / "shared" / "data"
RECIPE = ROOT / "benchmarks" / "svamp-teachers.yaml"
TEACHERS = {
    "palm-540b": [f"annotate.prompt={ROOT / 'prompts' / 'svamp.yaml'}"],
    "gpt-3.5-turbo": [],
    "gpt-4": [],
    "text-davinci-003": [],
    "text-davinci-002": [],
    "code-davinci-002": [],
    "code-davinci-001": [],
}
FINETUNE = "finetune"

Row = dict[str, Any]


def read(folder: str, split: str) -> list[Row]:
    with gzip.open(DATA / folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def folds(folder: str) -> list[tuple[list[Row], list[Row]]]:
    """Train and test rows of the five folds, in the order of the files."""
    train_rows, test_rows = read(folder, "train"), read(folder, "test")
    rows = train_rows + test_rows
    parts = [test_rows, *(train_rows[part::4] for part in range(4))]
    return [([row for row in rows if row not in part], part) for part in parts]


def write_rows(folder: Path) -> None:
    """The rows of all folds: PaLM's completions are in a data set of their own."""
    for source in ("svamp", "svamp_teachers"):
        for number, (train_rows, test_rows) in enumerate(folds(source)):
            for split, rows in (("train", train_rows), ("test", test_rows)):
                path = folder / source / f"{number}-{split}.jsonl"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def fold_recipe(rows: Path, number: int, system: str, overrides: list[str]) -> Recipe:
    """The recipe of one student. Fine-tuning needs no teacher, but its rows are the same."""
    teacher = "gpt-4" if system == FINETUNE else system
    data = rows / ("svamp" if teacher == "palm-540b" else "svamp_teachers")
    method = FINETUNE if system == FINETUNE else "step-by-step"
    changes = [
        f"task.data.train={data / f'{number}-train.jsonl'}",
        f"task.data.test={data / f'{number}-test.jsonl'}",
        f"teacher.model={teacher}",
        f"train.methods={method}",
        "eval.latency_calls=0",
        *TEACHERS[teacher],
    ]
    return load_recipe(RECIPE, changes + overrides)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--teachers",
        nargs="+",
        choices=TEACHERS,
        default=["palm-540b", "gpt-3.5-turbo", "gpt-4"],
        metavar="TEACHER",
        help=f"of {', '.join(TEACHERS)} (default: the first three)",
    )
    args = parser.parse_intermixed_args()
    out: Path = args.out.resolve()
    rows = out / "rows"
    write_rows(rows)
    systems = [FINETUNE, *args.teachers]
    joined: dict[str, list[str]] = {system: [] for system in systems}
    for number in args.folds:
        for system in systems:
            run = out / f"fold-{number}" / system
            recipe = fold_recipe(rows, number, system, args.overrides)
            annotate(recipe, out=run, progress=make_progress())
            train(recipe, out=run, progress=make_progress())
            results = evaluate(recipe, out=run, progress=make_progress())
            (student,) = (system for system in results.systems if system.kind == "student")
            print(f"fold {number}, {system}: {student.accuracy:.1%}", flush=True)
            predictions = RunFolder(run).predictions(f"{student.name}-s0")
            joined[system] += predictions.read_text(encoding="utf-8").splitlines()
    test = rows / "joined.jsonl"
    tested = {row["id"]: row for number in args.folds for row in folds("svamp")[number][1]}
    write_jsonl(test, (json.dumps(row, ensure_ascii=False) for row in tested.values()))
    files = {}
    for system, lines in joined.items():
        name = system.replace(".", "-")  # as eval.predictions wants it
        files[name] = str(rows / f"{name}.jsonl")
        write_jsonl(rows / f"{name}.jsonl", lines)
    joint = load_recipe(
        RECIPE,
        [
            f"task.data.train={test}",
            f"task.data.test={test}",
            f"eval.predictions={json.dumps(files)}",
            f"eval.baseline={FINETUNE}",
            "eval.floors=[]",
            *args.overrides,
        ],
    )
    print(results_markdown(evaluate(joint, out=out / "joined", progress=make_progress())))


if __name__ == "__main__":
    main()
