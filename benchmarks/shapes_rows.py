"""Rows with several labels, fields and scores, made from real data sets.

    python benchmarks/shapes_rows.py --out runs/shapes-rows

Writes train, valid and test files of three tasks from ../shared/data:

- multilabel: questions to a bank (Banking77, 20 intents), alone or two in one message, with the
  intents of both; a fixed shuffle pairs them;
- extraction: SVAMP's word problems with one operation, with the operation and its two numbers;
- score: Financial PhraseBank, with negative, neutral and positive as -1, 0 and 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
INTENTS = (
    "activate_my_card", "age_limit", "apple_pay_or_google_pay", "atm_support", "automatic_top_up",
    "beneficiary_not_allowed", "card_about_to_expire", "card_arrival", "card_swallowed",
    "change_pin", "country_support", "edit_personal_details", "exchange_rate",
    "lost_or_stolen_card", "passcode_forgotten", "pending_transfer", "request_refund",
    "terminate_account", "top_up_limits", "verify_my_identity",
)  # fmt: skip
OPERATIONS = {"+": "addition", "-": "subtraction", "*": "multiplication", "/": "division"}
SCORES = {"negative": -1, "neutral": 0, "positive": 1}
_EQUATION = re.compile(r"\( (\d+(?:\.\d+)?) ([-+*/]) (\d+(?:\.\d+)?) \)")


def read(name: str, split: str) -> Iterator[dict[str, Any]]:
    with gzip.open(DATA / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def multilabel(split: str) -> Iterator[dict[str, Any]]:
    rows = [row for row in read("banking77", split) if row["label"] in INTENTS]
    random.Random(0).shuffle(rows)
    while rows:
        message = [rows.pop() for _ in range(min(len(rows), 1 + (len(rows) % 3 > 0)))]
        yield {
            "id": "-".join(row["id"] for row in message),
            "text": " ".join(text_of(row) for row in message),
            "label": sorted({row["label"] for row in message}),
        }


def extraction(split: str) -> Iterator[dict[str, Any]]:
    for row in read("svamp", split):
        match = _EQUATION.fullmatch(row["label"])
        if match is None:
            continue
        first, sign, second = match.groups()
        yield {
            "id": row["id"],
            "text": text_of(row),
            "label": {
                "operation": OPERATIONS[sign], "first": float(first), "second": float(second)
            },
        }  # fmt: skip


def score(split: str) -> Iterator[dict[str, Any]]:
    for row in read("fpb", split):
        yield {"id": row["id"], "text": text_of(row), "label": SCORES[row["label"]]}


def text_of(row: dict[str, Any]) -> str:
    """The input's fields in one text."""
    parts = [str(value).strip() for value in row["input"].values()]
    return " ".join(part if part[-1:] in ".!?" else f"{part}." for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    folder: Path = parser.parse_args().out
    for make in (multilabel, extraction, score):
        splits = {split: list(make(split)) for split in ("train", "test")}
        for split, rows in splits.items():
            path = folder / make.__name__ / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            path.write_text("".join(lines), encoding="utf-8")
            print(f"{path}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
