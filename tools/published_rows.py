"""Rows, splits and PaLM-540B completions of the paper's repository, as files that a recipe reads.

    python tools/published_rows.py svamp|cqa|anli1|esnli datasets out

`datasets` is the folder of that name in datasets.zip of google-research/distilling-step-by-step (Apache-2.0). Writes
out/train.jsonl, valid.jsonl and test.jsonl, each row with its completion. svamp and cqa have no valid file: the published code
holds a tenth of train out with the `datasets` package, seed 0, and so does this.
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
        part = folder / "llm" / f"{split}_CoT_{i}.json"
        if not part.is_file():
            break
        texts += json.loads(part.read_text(encoding="utf-8"))
    if len(rows) != len(texts):
        sys.exit(
            f"{folder}: {len(rows)} {split} rows and {len(texts)} completions; unpack datasets.zip anew"
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
            f"no {name}_train.json in {folder}; name a task (svamp, cqa, anli1, esnli) and the unpacked datasets folder"
        )
    parts = {split: read(folder, name, split) for split in ("train", "test")}
    if (folder / f"{name}_valid.json").is_file():
        parts["valid"] = read(folder, name, "valid")
    else:
        from datasets import Dataset

        places = Dataset.from_dict({"place": range(len(parts["train"]))}).train_test_split(
            test_size=0.1, seed=0
        )
        held_out = set(places["test"]["place"])
        parts["valid"] = [row for i, row in enumerate(parts["train"]) if i in held_out]
        parts["train"] = [row for i, row in enumerate(parts["train"]) if i not in held_out]
    Path(out).mkdir(parents=True, exist_ok=True)
    for split, rows in parts.items():
        with Path(out, f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
