"""Tiny decoder-only models with tokenizers of their own: random weights, or briefly trained."""

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
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from dsbs.config import DataSection, TaskSection
from dsbs.students.card import StudentCard, Target
from dsbs.students.student import Student
from dsbs.training.encode import collate
from dsbs.training.packed.decoder import summed_losses

CHAT = (
    "{% for m in messages %}"
    "{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|over|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
TEXTS = [
    row["text"] + " " + row["team"] + " The message is about a parcel, an invoice."
    for row in toy_rows(60)
]


def tokenizer(*, chat: bool = True, bos: bool = False, texts: Iterable[str] = TEXTS) -> Any:
    """A byte-level BPE without a padding token; with ``bos``, texts begin with <|begin|>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|begin|>", "<|end|>", "<|turn|>", "<|over|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        extra_special_tokens=["<|turn|>", "<|over|>"],
        chat_template=CHAT if chat else None,
    )


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def config(kind: str, size: int) -> Any:
    """The configuration of a model with ``size`` vocabulary entries."""
    if kind == "llama":
        return LlamaConfig(vocab_size=size, tie_word_embeddings=True, **SHAPE)
    if kind == "qwen2":
        return Qwen2Config(vocab_size=size + 20, tie_word_embeddings=False, **SHAPE)
    if kind == "qwen3":
        return Qwen3Config(vocab_size=size, tie_word_embeddings=True, head_dim=16, **SHAPE)
    if kind == "lfm2":  # convolutions beside attention
        kinds = ["conv", "full_attention"]
        return Lfm2Config(vocab_size=size, layer_types=kinds, block_multiple_of=16, **SHAPE)
    if kind == "mamba":  # no attention
        return MambaConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=2,
            state_size=8,
            bos_token_id=0,
            eos_token_id=1,
        )
    assert kind == "gpt2"
    return GPT2Config(
        vocab_size=size,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=256,
        bos_token_id=0,
        eos_token_id=1,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
    )


def model(kind: str = "llama", size: int = 340) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config(kind, size))


def save(folder: Path, kind: str = "llama", **tokenizer_settings: Any) -> str:
    """Save model and tokenizer for ``student.model``; returns the folder."""
    bpe = tokenizer(**tokenizer_settings)
    model(kind, len(bpe)).save_pretrained(folder)
    bpe.save_pretrained(folder)
    return str(folder)


LABELS = ("billing", "shipping", "a message about it")


def trained_student(
    template: Any = "chat", kind: str = "llama", prefixes: dict[Target, str] | None = None
) -> Student:
    """A student trained on a few short targets, so that its texts end and its labels vary."""
    bpe = tokenizer(bos=template == "plain")
    bpe.pad_token = bpe.eos_token
    card = StudentCard(
        name="s",
        method="finetune",
        labels="gold",
        seed=0,
        task=TaskSection(name="classification", labels=LABELS, data=DataSection(train="x.csv")),
        prefixes=prefixes or {"label": ""},
        max_input_tokens=48,
        max_target_tokens=16,
        kind="causal",
        template=template,
    )
    student = Student.of(model(kind, len(bpe)), bpe, card)
    engine: Any = student.backend
    sources = engine.input_format.read(TEXTS[:30], 48)
    targets = engine.input_format.write([LABELS[i % 3] for i in range(30)])
    batch = collate([{"label": [pair]} for pair in zip(sources, targets, strict=True)])
    optimizer = torch.optim.AdamW(engine.model.parameters(), lr=1e-2)
    for _ in range(25):
        loss = summed_losses(engine.model, batch, without_padding=False)["label"]
        (loss / 100).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student
