"""The published code's training: two forward passes, α = 0.5, micro-batch means, AdamW."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import good_answer
from loopback import LoopbackServer
from transformers import T5Config, T5ForConditionalGeneration

from dsbs import annotate, load_recipe, train
from dsbs.students.tokenizer import learn_vocabulary, load_tokenizer

STEPS, BATCH, RATE = 30, 8, 2e-3


def start(folder: Path, texts: list[str]) -> Path:
    """Weights and tokenizer to begin with; the recipe removes their configuration's dropout."""
    tokenizer = learn_vocabulary(texts, 200)
    torch.manual_seed(3)
    shape = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "vocab_size": len(tokenizer),
    }
    T5ForConditionalGeneration(
        T5Config(**shape, dropout_rate=0.1, decoder_start_token_id=0)
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def published(folder: Path, rows: list[dict[str, Any]], micro: int) -> list[float]:
    """The loss of each step: rows in the file's order, padded, labels shifted by T5 itself."""
    tokenizer = load_tokenizer(str(folder))
    model = T5ForConditionalGeneration.from_pretrained(folder, dropout_rate=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (STEPS - step) / STEPS)

    def half(part: list[dict[str, Any]], prefix: str, target: str) -> torch.Tensor:
        batch = tokenizer([prefix + row["text"] for row in part], padding=True, return_tensors="pt")
        labels = tokenizer([row[target] for row in part], padding=True, return_tensors="pt")
        wanted = labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100)
        loss: torch.Tensor = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=wanted
        ).loss
        return loss

    micros: list[list[dict[str, Any]]] = []
    losses = []
    while len(losses) < STEPS:
        if not micros:  # the next epoch; its last batch may be a small one
            micros = [rows[i : i + micro] for i in range(0, len(rows), micro)]
        step, micros = micros[: BATCH // micro], micros[BATCH // micro :]
        total = 0.0
        for part in step:
            loss = (
                0.5 * half(part, "predict: ", "label") + 0.5 * half(part, "explain: ", "rationale")
            ) / len(step)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


@pytest.mark.parametrize("padding", ["none", "batch"])
@pytest.mark.parametrize("micro", [8, 4])
def test_thirty_steps_have_the_published_trainers_losses(
    toy: Callable[..., Path], tmp_path: Path, micro: int, padding: str
) -> None:
    with LoopbackServer(good_answer) as server:
        overrides = [
            f"teacher.base_url={server.url}",
            "student.init=null",
            "student.dropout=0",
            f"train.init={tmp_path / 'start'}",
            "train.methods=step-by-step",
            "train.shuffle=false",
            "train.loss_mean=micro",
            f"train.padding={padding}",
            f"train.max_steps={STEPS}",
            f"train.learning_rate={RATE}",
            f"train.batch_size={BATCH}",
            "train.log_every=1",
            f"train.micro_batch_size={micro}",
            "train.eval_every=30",
            "task.data.valid=train.csv",
        ]
        recipe = load_recipe(toy(train=27), overrides)
        annotate(recipe, out=tmp_path / "run")
    lines = (tmp_path / "run" / "annotate" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [
        {"text": row["input"]["text"], "label": row["gold"], "rationale": row["rationale"]}
        for row in map(json.loads, lines)
    ]
    folder = start(
        tmp_path / "start", [text for row in rows for text in ("predict: explain: ", *row.values())]
    )
    expected = published(folder, rows, micro)
    train(recipe, out=tmp_path / "run")
    metrics = (tmp_path / "run" / "train" / "step-by-step-gold-s0" / "metrics.jsonl").read_text(
        encoding="utf-8"
    )
    ours = [row["loss"] for row in map(json.loads, metrics.splitlines()) if "loss" in row]
    assert len(ours) == STEPS and expected[0] - expected[-1] > 0.5, "it learns"
    assert ours == pytest.approx(expected, abs=1e-4)
