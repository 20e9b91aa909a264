"""Tiny students of each kind, their local teachers and short training runs for tests of
distillation terms.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import label_heads
import numpy as np
import torch
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from dsbs.config import TrainSection
from dsbs.config.registry import METHODS, TERMS, entry
from dsbs.students.heads import LabelHeadModel
from dsbs.training.distillation import StepTotals, Term
from dsbs.training.distillation.local_teachers import LocalTeacher
from dsbs.training.distillation.objective import DistillationLoss
from dsbs.training.encode import Encoded, PackedBatch, collate
from dsbs.training.methods import View, views_of
from dsbs.training.trainer import StepTrainer

VIEWS: tuple[View, ...] = entry(METHODS, "step-by-step").views(TrainSection())
LABEL_IDS = [[5, 1], [6, 7, 1], [8, 1]]
ROWS: list[Encoded] = []
for i in range(8):
    row: Encoded = {"label": [([3 + i] * (2 + i % 3), LABEL_IDS[i % 3])]}
    if i not in (1, 4):
        row["rationale"] = [([4 + i] * (1 + i % 4), [10 + i] * (1 + 2 * i % 7) + [1])]
    ROWS.append(row)
# Students that write their labels, and students that choose them.
TEXT_KINDS = ("t5", "decoder")
KINDS = (*TEXT_KINDS, "encoder", "decoder-labels")
CLASS_ROWS = label_heads.rows()
SOFT_LABELS = {
    np.array(row["label"][0][0], np.int64).tobytes(): np.array([0.7, 0.2, 0.1], np.float32)
    for row in (*ROWS[:6], *CLASS_ROWS[:6])
}
ENTRIES: dict[str, dict[str, Any]] = {
    "response": {"kind": "response", "temperature": 2.0},
    "reverse": {
        "kind": "response",
        "name": "reverse",
        "divergence": "reverse",
        "targets": "rationale",
    },
    "labels": {"kind": "labels"},
    "from-teachers": {"kind": "labels", "name": "from-teachers", "source": "teachers"},
    "feature": {"kind": "feature"},
    "relation": {"kind": "relation"},
}


def term(title: str) -> Term:
    """A term by its title in ``ENTRIES``."""
    kind: type[Term] = entry(TERMS, ENTRIES[title]["kind"])
    return kind.model_validate(ENTRIES[title])


# Every term on every kind of student that can learn it.
CASES = [
    (kind, title)
    for kind in KINDS
    for title in ENTRIES
    if kind in TEXT_KINDS or title != "reverse"  # a label head has no rationale tokens to compare
]


def views_of_kind(kind: str) -> tuple[View, ...]:
    if kind in TEXT_KINDS:
        return VIEWS
    method = "finetune" if kind == "encoder" else "step-by-step"
    return views_of(method, TrainSection(), "labels")


def rows_of_kind(kind: str) -> list[Encoded]:
    """Eight rows; those of an encoder, which has no rationale decoder here, are labels alone."""
    if kind == "encoder":
        return [{"label": row["label"]} for row in CLASS_ROWS]
    return ROWS if kind in TEXT_KINDS else CLASS_ROWS


def tiny_model(kind: str, width: int = 16, layers: int = 2, seed: int = 0) -> Any:
    """A model with random weights and no dropout."""
    if kind == "t5":
        return tiny_t5(width, layers, seed)
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if kind == "encoder":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        bert = BertModel(BertConfig(**shape, **dropout), add_pooling_layer=False)
        bert.config.sep_token_id = label_heads.SEPARATOR
        return LabelHeadModel(bert, label_heads.LABELS, "encoder", dropout=0.0)
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, eos_token_id=1))
    if kind == "decoder":
        return llama
    return LabelHeadModel(llama, label_heads.LABELS, "causal", dropout=0.0)


def tiny_t5(width: int = 16, layers: int = 2, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=40,
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=layers,
        num_decoder_layers=layers - 1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def local_teacher(
    name: str = "first", weight: float = 1.0, seed: int = 7, kind: str = "t5"
) -> LocalTeacher:
    model = tiny_model(kind, width=24, layers=3, seed=seed).eval().requires_grad_(False)
    return LocalTeacher(name, Path(name), weight, name, model)


def distillation_loss(
    titles: list[str], section: TrainSection | None = None, kind: str = "t5", **changes: Any
) -> DistillationLoss:
    settings: dict[str, Any] = {
        "teachers": [local_teacher(kind=kind)],
        "label_ids": LABEL_IDS if kind in TEXT_KINDS else (),
        "head": "text" if kind in TEXT_KINDS else "labels",
        "soft_labels": SOFT_LABELS,
    }
    terms = [term(title) for title in titles]
    views = views_of_kind(kind)
    return DistillationLoss(terms, section or TrainSection(), views, **settings | changes)


def step_totals(terms: DistillationLoss, batch: dict[str, PackedBatch]) -> StepTotals:
    """The totals of a step that consists of one batch."""
    tokens = {view: float(len(packed.target)) for view, packed in batch.items()}
    return StepTotals(tokens | terms.counts(batch), dict.fromkeys(batch, 1.0))


def train_steps(
    folder: Path,
    terms: DistillationLoss | None,
    *,
    micro_batch: int = 8,
    steps: int = 3,
    processes: int = 1,
    model: Any = None,
    kind: str = "t5",
    **section: Any,
) -> tuple[Any, list[dict[str, Any]]]:
    """A student after a few steps of plain gradient descent, and its logged losses."""
    model = model or tiny_model(kind)
    if terms is not None:
        terms.attach_projections(model, seed=0)
    is_long = steps >= 10
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch // processes,
        max_steps=steps,
        learning_rate=5e-2 if is_long else 1e-2,
        max_grad_norm=1.0 if is_long else 0.0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        train_sampling_strategy="sequential",
        optim="sgd",
    )
    trainer = StepTrainer(
        model=model,
        args=arguments,
        train_dataset=rows_of_kind(kind),
        data_collator=terms.collate if terms else collate,
        views=views_of_kind(kind),
        section=TrainSection(
            max_steps=steps, head_learning_rate=arguments.learning_rate, **section
        ),
        validate=dict,
        terms=terms,
    )
    trainer.train()
    return model, [line for line in trainer.state.log_history if "loss" in line]


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def loss_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a student's metrics.jsonl that have losses of training."""
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if "loss" in line]
