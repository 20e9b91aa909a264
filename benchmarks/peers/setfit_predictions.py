"""SetFit's answers for a test split, as external predictions for `dsbs eval`.

    python -m venv setfit && setfit/bin/pip install setfit
    setfit/bin/python benchmarks/peers/setfit_predictions.py --model <folder> --per-label 5 \\
        --train banking77/train.jsonl.gz --test banking77/test.jsonl.gz --out setfit-5.jsonl

Contrastive training of the sentence encoder on pairs of rows, then logistic regression on its
embeddings: SetFit's own recipe (Tunstall et al., 2022). ``--iterations`` is its
``num_iterations``: pairs of equal and of different labels for each row. With ``--ids``, a file with
one id a line, it learns those rows; with ``--per-label`` random ones.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import time
from pathlib import Path
from typing import Any

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--model", required=True)
parser.add_argument("--train", type=Path, required=True)
parser.add_argument("--test", type=Path, required=True)
parser.add_argument("--out", type=Path, required=True)
parser.add_argument("--ids", type=Path)
parser.add_argument("--per-label", type=int)
parser.add_argument("--iterations", type=int, default=5)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--threads", type=int, default=2)
args = parser.parse_args()
os.environ["OMP_NUM_THREADS"] = str(args.threads)
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402 - after the number of threads is set
from datasets import Dataset  # noqa: E402
from setfit import SetFitModel, Trainer, TrainingArguments  # noqa: E402

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def chosen_rows(rows: list[Row]) -> list[Row]:
    if args.ids:
        ids = set(args.ids.read_text(encoding="utf-8").split())
        return [row for row in rows if row["id"] in ids]
    if not args.per_label:
        return rows
    random.Random(args.seed).shuffle(rows)
    chosen: dict[str, list[Row]] = {}
    for row in rows:
        of_label = chosen.setdefault(row["label"], [])
        if len(of_label) < args.per_label:
            of_label.append(row)
    return [row for of_label in chosen.values() for row in of_label]


def main() -> None:
    torch.set_num_threads(args.threads)
    rows = chosen_rows(read_rows(args.train))
    labels = sorted({row["label"] for row in rows})
    model = SetFitModel.from_pretrained(args.model, labels=labels, device="cpu")
    data = Dataset.from_dict(
        {
            "text": [row["input"]["text"] for row in rows],
            "label": [labels.index(row["label"]) for row in rows],
        }
    )
    settings = TrainingArguments(
        output_dir=str(args.out.with_suffix("")),
        batch_size=32,
        num_iterations=args.iterations,
        num_epochs=1,
        seed=args.seed,
        save_strategy="no",
        report_to=[],
        show_progress_bar=False,
    )
    began = time.perf_counter()
    Trainer(model=model, args=settings, train_dataset=data).train()
    seconds = time.perf_counter() - began
    test = read_rows(args.test)
    answers = [str(label) for label in model.predict([row["input"]["text"] for row in test])]
    with args.out.open("w", encoding="utf-8") as file:
        for row, answer in zip(test, answers, strict=True):
            file.write(json.dumps({"id": row["id"], "prediction": answer}) + "\n")
    right = sum(row["label"] == answer for row, answer in zip(test, answers, strict=True))
    print(json.dumps({"rows": len(rows), "accuracy": right / len(test), "train_s": seconds}))


if __name__ == "__main__":
    main()
