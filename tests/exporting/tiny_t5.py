"""Tiny students of both T5 layouts, with sharp random weights, which no rounding can change."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from conftest import TEAMS, toy_rows
from transformers import T5Config, T5ForConditionalGeneration

from dsbs.config import TaskSection
from dsbs.students.card import Start, StudentCard, Target
from dsbs.students.student import Student
from dsbs.students.tokenizer import learn_vocabulary

_WORDS = " ".join(row["text"] for row in toy_rows(40)).split()


def texts(count: int, seed: int = 0) -> list[str]:
    """Inputs that differ in more than a number."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(_WORDS, k=chance.randint(1, 9))) for _ in range(count)]


V1_0: dict[str, Any] = {}
V1_1: dict[str, Any] = {
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}  # whose outputs are not scaled
SHALLOW: dict[str, Any] = {"num_layers": 1, "num_decoder_layers": 1}


def make_student(
    folder: Path,
    shape: dict[str, Any] = V1_0,
    prefixes: dict[Target, str] | None = None,
    starts: dict[Target, Start] | None = None,
) -> Path:
    """A student in ``folder/student``."""
    tokenizer = learn_vocabulary((row["text"] for row in toy_rows(80)), 120)
    torch.manual_seed(3)
    depth = {"num_layers": 2, "num_decoder_layers": 2}
    config = T5Config(
        vocab_size=len(tokenizer) + 8,
        d_model=32,
        d_kv=8,
        num_heads=4,
        d_ff=64,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        **(depth | shape),
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.25)
    card = StudentCard(
        name="tiny",
        method="made",
        labels="gold",
        seed=0,
        task=TaskSection.model_validate(
            {"name": "classification", "labels": list(TEAMS), "data": {"train": "none.csv"}}
        ),
        prefixes=prefixes or {"label": "predict: ", "rationale": "explain: "},
        starts=starts or {},
        max_input_tokens=24,
        max_target_tokens=12,
    )
    Student.of(model, tokenizer, card).save(folder / "student")
    return folder / "student"
