"""How often a training validates, and what a validation measures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsbs import load_recipe, train
from dsbs.config import TrainSection
from dsbs.students.tokenizer import learn_vocabulary
from dsbs.training.encode import EncodedRows, Encoder
from dsbs.training.methods import STEP_BY_STEP
from dsbs.training.rows import Row
from dsbs.training.tokens import Tokens
from dsbs.training.validation import validation_interval

INPUT = "My parcel number 7 is wrong and nobody has answered my message about it."
RATIONALE = "The message is about a parcel."
VIEWS = STEP_BY_STEP.views(TrainSection())


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    tokenizer: Any = learn_vocabulary([INPUT, RATIONALE, "billing", "shipping"] * 9, 90)
    return Encoder(Tokens(tokenizer), 64, 64)


def encode(encoder: Encoder, count: int, *, valid: bool) -> EncodedRows:
    rows = [Row(f"r{i}", INPUT, "billing", None, (RATIONALE,)) for i in range(count)]
    return encoder.rows(rows, VIEWS[:1] if valid else VIEWS, "gold")


def interval(encoder: Encoder, valid_rows: int, max_new_tokens: int = 64, **section: Any) -> int:
    return validation_interval(
        TrainSection(**section),
        encode(encoder, 100, valid=False),
        encode(encoder, valid_rows, valid=True),
        max_new_tokens,
    )


def test_a_long_training_has_twenty_validations(encoder: Encoder) -> None:
    assert interval(encoder, 100, max_steps=10_000) == 500
    assert interval(encoder, 100, max_steps=1000) == 50


def test_a_short_training_has_fewer_and_always_one_at_its_last_step(encoder: Encoder) -> None:
    counts = [math.ceil(20 / interval(encoder, rows, max_steps=20)) for rows in (1, 30, 70, 5000)]
    assert counts[0] == 20
    assert counts == sorted(counts, reverse=True)
    assert 1 < counts[2] < 20
    assert counts[3] == 1


def test_longer_labels_take_more_time(encoder: Encoder) -> None:
    short, long = (interval(encoder, 200, n, max_steps=40) for n in (1, 64))
    assert short < long


def test_eval_every_is_taken_as_it_is(encoder: Encoder) -> None:
    assert interval(encoder, 5000, max_steps=20, eval_every=1) == 1


def test_the_interval_is_recorded(toy: Callable[..., Path], tmp_path: Path) -> None:
    import json

    recipe = load_recipe(toy(), ["train.methods=finetune", "train.eval_every=null"])
    (student,) = train(recipe, out=tmp_path / "run").students
    record = json.loads((Path(student.path) / "train.json").read_text(encoding="utf-8"))
    lines = (Path(student.path) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [row["step"] for row in map(json.loads, lines) if "eval_accuracy" in row]
    every = record["eval_every"]
    assert steps == sorted({*range(every, 7, every), 6})
