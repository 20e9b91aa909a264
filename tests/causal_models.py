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
)

CHAT = (
    "{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '<|over|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
TEXTS = [row["text"] + " " + row["team"] + " The message is about a parcel, an invoice." for row in toy_rows(60)]


def tokenizer(*, chat: bool = True, bos: bool = False, texts: Iterable[str] = TEXTS) -> Any:
    """A byte-level BPE without a padding token; ``bos``: texts begin with one."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|end|>", "<|turn|>", "<|over|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
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
