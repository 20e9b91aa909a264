"""Published data of the paper, as JSONL: rows, splits and PaLM-540B completions.

    python tools/published_rows.py svamp|cqa|anli1|esnli datasets out

`datasets` is that folder of datasets.zip in google-research/distilling-step-by-step (Apache-2.0).
Writes out/train.jsonl, valid.jsonl and test.jsonl, each row with its completion. svamp and cqa have
no valid file: like the published code, this holds out a tenth of train with the `datasets` package
and seed 0.
"""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(folder: Path, name: str, split: str) -> list[Row]:
    """Rows of one split with their completions, which the repository pairs by position."""
    with (folder / f"{name}_{split}.json").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts: list[str] = []
    for i in count():
        path = folder / "llm" / f"{split}_CoT_{i}.json"
        if not path.is_file():
            break
        texts += json.loads(path.read_text(encoding="utf-8"))
    if len(rows) != len(texts):
        sys.exit(
            f"{folder}: {len(rows)} {split} rows but {len(texts)} completions; "
            "unpack datasets.zip again"
        )
    for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
        row["id"] = f"{name}-{split}-{i:05}"
        row["teacher"] = {"model": "palm-540b", "completion": text}
        if name == "svamp":
            row["body"], _, row["question"] = row.pop("input").rpartition("\n")
    return rows


def main(name: str, source: str, out: str) -> None:
    folder = Path(source, name)
    if not (folder / f"{name}_train.json").is_file():
        sys.exit(
            f"no {name}_train.json in {folder}; give a task (svamp, cqa, anli1, esnli) "
            "and the unpacked datasets folder"
        )
    rows_by_split = {split: read(folder, name, split) for split in ("train", "test")}
    if (folder / f"{name}_valid.json").is_file():
        rows_by_split["valid"] = read(folder, name, "valid")
    else:
        from datasets import Dataset

        split_rows = Dataset.from_dict(
            {"place": range(len(rows_by_split["train"]))}
        ).train_test_split(test_size=0.1, seed=0)
        held_out = set(split_rows["test"]["place"])
        rows_by_split["valid"] = [
            row for i, row in enumerate(rows_by_split["train"]) if i in held_out
        ]
        rows_by_split["train"] = [
            row for i, row in enumerate(rows_by_split["train"]) if i not in held_out
        ]
    Path(out).mkdir(parents=True, exist_ok=True)
    for split, rows in rows_by_split.items():
        with Path(out, f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
