"""Convert the paper's rows, splits and PaLM-540B completions to files that a recipe reads.

    python tools/published_rows.py svamp|cqa|anli1|esnli datasets out

`datasets` is the folder of that name in datasets.zip of google-research/distilling-step-by-step
(Apache-2.0). Writes out/train.jsonl, valid.jsonl and test.jsonl, each row with its completion.
svamp and cqa have no validation file: like the published code, this holds out a tenth of train with
the `datasets` package and seed 0.
"""

from __future__ import annotations

import json
import sys
from itertools import count
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(folder: Path, name: str, split: str) -> list[Row]:
    """Read one split's rows with their completions, which the repository pairs by position."""
    with (folder / f"{name}_{split}.json").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts: list[str] = []
    for i in count():
        file_path = folder / "llm" / f"{split}_CoT_{i}.json"
        if not file_path.is_file():
            break
        texts += json.loads(file_path.read_text(encoding="utf-8"))
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
            f"{folder / name}_train.json does not exist; pass a task (svamp, cqa, anli1, esnli) "
            "and the unpacked datasets folder"
        )
    splits = {split: read(folder, name, split) for split in ("train", "test")}
    if (folder / f"{name}_valid.json").is_file():
        splits["valid"] = read(folder, name, "valid")
    else:
        from datasets import Dataset

        indices = Dataset.from_dict({"index": range(len(splits["train"]))})
        held_out = set(indices.train_test_split(test_size=0.1, seed=0)["test"]["index"])
        splits["valid"] = [row for i, row in enumerate(splits["train"]) if i in held_out]
        splits["train"] = [row for i, row in enumerate(splits["train"]) if i not in held_out]
    Path(out).mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        with Path(out, f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
