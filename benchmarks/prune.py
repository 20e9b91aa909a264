"""Share of the lost accuracy that healing recovers: by rows, by the original, and by both.

    python benchmarks/prune.py benchmarks/prune-minilm.yaml --out runs/prune-minilm
    python benchmarks/prune.py benchmarks/prune-smollm2.yaml --out runs/prune-smollm2 \\
        --method drop-layers=0.333
    python benchmarks/prune.py RECIPE --out FOLDER --heal-steps 2 --rows 20 train.max_steps=2

Trains the recipe's students (one for each seed), cuts each by --method and heals it in each way of
--heal-from, equally long. Accuracy is measured on --rows rows of the test split, of which nothing
was chosen: of the student as trained, cut, and healed. Recovered: (healed − cut) / (trained − cut),
of the means over the seeds; in brackets the seeds' own. Sizes and times are those of compress.json:
the copy takes turns with its original. The command resumes where it was interrupted.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads would take the cores of others

import argparse
import statistics
from pathlib import Path
from typing import Any, get_args

from dsbs import Student, compress, load_recipe, train
from dsbs.compression import LayersBy
from dsbs.formatting import markdown_table, percent_number
from dsbs.progress import make_progress
from dsbs.records import Example
from dsbs.records.results import Compressed, HealFrom
from dsbs.tasks import make_task
from dsbs.tasks.data import load

HEADINGS = (
    "healed by", "trained, %", "cut, %", "healed, %", "recovered, %", "seeds", "MB", "of original",
    "ms, batch 1", "of original", "ms, batch 64", "of original",
)  # fmt: skip


def accuracy(folder: str | Path, rows: list[Example], batch_size: int, tokens: int) -> float:
    """The share of ``rows`` whose label a student gets right."""
    student = Student.load(folder)
    inputs = [row.input for row in rows]
    answers = student.predict(inputs, batch_size=batch_size, max_label_tokens=tokens)
    correct = student.task.correct
    right = [
        answer.label is not None and correct(answer.label, str(row.label))
        for answer, row in zip(answers, rows, strict=True)
    ]
    return sum(right) / len(rows)


def line(healer: str, accuracies: list[tuple[float, ...]], records: list[Compressed]) -> list[str]:
    """A row of the table; ``accuracies`` of each seed are those as trained, cut and healed."""
    trained, cut, healed = (statistics.mean(values) for values in zip(*accuracies, strict=True))
    seeds = ", ".join(recovered(*values) for values in accuracies)
    cells = [healer, *map(percent_number, (trained, cut, healed)), recovered(trained, cut, healed)]
    after = statistics.mean(record.compressed.megabytes for record in records)
    before = statistics.mean(record.original.megabytes for record in records)
    cells += [seeds, f"{after:.1f}", f"{after / before:.2f}"]
    for size in (1, 64):
        pairs = [
            (record.compressed.median_ms(size), record.original.median_ms(size))
            for record in records
        ]
        times = [(copy_ms or 0.0, original_ms or 1.0) for copy_ms, original_ms in pairs]
        cells.append(f"{statistics.median(copy_ms for copy_ms, _ in times):.1f}")
        ratios = [copy_ms / original_ms for copy_ms, original_ms in times]
        cells.append(f"{statistics.median(ratios):.2f}")
    return cells


def recovered(trained: float, cut: float, healed: float) -> str:
    return f"{100 * (healed - cut) / (trained - cut):.0f}" if trained > cut else "nothing lost"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--method", default="drop-layers=0.5")
    parser.add_argument("--heal-from", nargs="+", default=["rows", "original", "both"])
    parser.add_argument("--heal-steps", type=int, help="default: a tenth of the training's")
    parser.add_argument("--heal-learning-rate", type=float)
    parser.add_argument("--layers-by", choices=get_args(LayersBy), default="loss")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2000, help="of the test split (default: 2000)")
    args = parser.parse_intermixed_args()
    healers: list[HealFrom] = args.heal_from
    recipe = load_recipe(args.recipe, args.overrides)
    rows = load(recipe, make_task(recipe.task), "test")[: args.rows]
    students = train(recipe, out=args.out, progress=make_progress()).students
    batch_size = recipe.eval.batch_size
    tokens = recipe.eval.max_label_tokens
    options: dict[str, Any] = {
        "max_drop": 1.0,
        "heal_learning_rate": args.heal_learning_rate,
        "rounds": args.rounds,
        "layers_by": args.layers_by,
        "progress": make_progress(),
    }
    accuracies: dict[HealFrom, list[tuple[float, ...]]] = {healer: [] for healer in healers}
    records: dict[HealFrom, list[Compressed]] = {healer: [] for healer in healers}
    for student in students:
        trained = accuracy(student.path, rows, batch_size, tokens)
        # First without healing: the cut alone. Healed copies have other names or are set aside.
        (cut_folder,) = compress(student.path, [args.method], heal_steps=0, **options).folders
        cut = accuracy(cut_folder, rows, batch_size, tokens)
        for healer in healers:
            result = compress(
                student.path,
                [args.method],
                heal_from=healer,
                heal_steps=args.heal_steps,
                **options,
            )
            healed = accuracy(result.folders[0], rows, batch_size, tokens)
            accuracies[healer].append((trained, cut, healed))
            records[healer].append(result.steps[0])
            note = f"{student.name}, {healer}: {trained:.4f} trained, {cut:.4f} cut, {healed:.4f}"
            print(f"{note} healed; layers left {result.steps[0].layers}", flush=True)
    steps = records[healers[0]][0].healing_steps
    print(f"\n{args.method}, {steps} steps of healing, {len(rows):,} test rows\n")
    table = [line(healer, accuracies[healer], records[healer]) for healer in healers]
    print("\n".join(markdown_table(HEADINGS, table)))


if __name__ == "__main__":
    main()
