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
import json
from pathlib import Path

from shapes_rows import read

from dsbs import annotate, evaluate, load_recipe, train
from dsbs.config import Recipe
from dsbs.files import write_jsonl
from dsbs.progress import make_progress
from dsbs.records.summary import results_markdown
from dsbs.run_folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "benchmarks" / "svamp-teachers.yaml"
PALM = "palm-540b"  # its completions are in a data set of their own, and end with an equation
TEACHERS = (
    PALM, "gpt-3.5-turbo", "gpt-4", "text-davinci-003", "text-davinci-002", "code-davinci-002",
    "code-davinci-001",
)  # fmt: skip
FINETUNE = "finetune"
FOLDS = range(5)


def write_rows(folder: Path) -> None:
    """Train and test rows of the five folds, in the order of the files."""
    for source in ("svamp", "svamp_teachers"):
        train_rows, test_rows = list(read(source, "train")), list(read(source, "test"))
        rows = train_rows + test_rows
        for number, part in enumerate([test_rows, *(train_rows[start::4] for start in range(4))]):
            others = [row for row in rows if row not in part]
            for split, chosen in (("train", others), ("test", part)):
                path = rows_file(folder, source, number, split)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_jsonl(path, (json.dumps(row, ensure_ascii=False) for row in chosen))


def rows_file(folder: Path, source: str, number: int, split: str) -> Path:
    return folder / source / f"{number}-{split}.jsonl"


def fold_recipe(rows: Path, number: int, system: str, overrides: list[str]) -> Recipe:
    """The recipe of one student: fine-tuning, or step-by-step with a teacher's rationales."""
    source = "svamp" if system == PALM else "svamp_teachers"
    changes = [
        f"task.data.{split}={rows_file(rows, source, number, split)}" for split in ("train", "test")
    ]
    if system == FINETUNE:
        changes.append("train.methods=finetune")
    else:
        changes += ["train.methods=step-by-step", f"teacher.model={system}"]
    if system == PALM:
        changes.append(f"annotate.prompt={ROOT / 'prompts' / 'svamp.yaml'}")
    return load_recipe(RECIPE, [*changes, "eval.latency_calls=0", *overrides])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folds", type=int, nargs="+", choices=FOLDS, default=list(FOLDS))
    parser.add_argument(
        "--teachers",
        nargs="+",
        choices=TEACHERS,
        default=TEACHERS[:3],
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
    tests = [rows_file(rows, "svamp", number, "test") for number in args.folds]
    test = rows / "joined.jsonl"
    write_jsonl(test, (line for path in tests for line in path.read_text("utf-8").splitlines()))
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
