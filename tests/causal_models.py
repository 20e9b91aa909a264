"""Tiny decoder-only models with tokenizers of their own, as a hub would give them: no weights that know anything."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from conftest import toy_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dsbs.config import DataSection, TaskSection
from dsbs.students import Student, StudentCard, Target
from dsbs.training.encode import collate
from dsbs.training.packed.decoder import summed_losses

CHAT = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|over|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
TEXTS = [
    row["text"] + " " + row["team"] + " The message is about a parcel, an invoice."
    for row in toy_rows(60)
]


def tokenizer(*, chat: bool = True, bos: bool = False, texts: Iterable[str] = TEXTS) -> Any:
    """A byte-level BPE without a padding token; ``bos``: texts begin with one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|turn|>", "<|over|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>", extra_special_tokens=["<|turn|>", "<|over|>"],
        chat_template=CHAT if chat else None,
    )  # fmt: skip


SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda size: LlamaConfig(vocab_size=size, tie_word_embeddings=True, **SHAPE),
    "qwen2": lambda size: Qwen2Config(vocab_size=size + 20, tie_word_embeddings=False, **SHAPE),
    "qwen3": lambda size: Qwen3Config(vocab_size=size, tie_word_embeddings=True, head_dim=16, **SHAPE),
    "gpt2": lambda size: GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=0, eos_token_id=1, attn_pdrop=0.0,
        embd_pdrop=0.0, resid_pdrop=0.0,
    ),
}  # fmt: skip


def model(kind: str = "llama", size: int = 340) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(CONFIGS[kind](size))


def save(folder: Path, kind: str = "llama", **of_tokenizer: Any) -> str:
    """Model and tokenizer in a folder, for ``student.model``."""
    made = tokenizer(**of_tokenizer)
    model(kind, len(made)).save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


LABELS = ("billing", "shipping", "a message about it")


def taught(
    template: Any = "chat", kind: str = "llama", prefixes: dict[Target, str] | None = None
) -> Student:
    """Taught a few short targets, so that its texts end by themselves and it is not sure of them."""
    made = tokenizer(bos=template == "plain")
    made.pad_token = made.eos_token
    task = TaskSection(name="classification", labels=LABELS, data=DataSection(train="x.csv"))
    card = StudentCard(
        name="s", method="finetune", labels="gold", seed=0, task=task, prefixes=prefixes or {"label": ""}, max_input_tokens=48,
        max_target_tokens=16, kind="causal", template=template,
    )  # fmt: skip
    student = Student.of(model(kind, len(made)), made, card)
    own: Any = student.engine
    sources, targets = (
        own.wording.read(TEXTS[:30], 48),
        own.wording.write([LABELS[i % 3] for i in range(30)]),
    )
    batch = collate([{"label": [pair]} for pair in zip(sources, targets, strict=True)])
    optimizer = torch.optim.AdamW(own.model.parameters(), lr=1e-2)
    for _ in range(25):
        (summed_losses(own.model, batch, without_padding=False)["label"] / 100).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student
