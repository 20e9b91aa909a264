"""Tiny T5 models without dropout, and encoded rows of very different lengths for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import T5Config, T5ForConditionalGeneration

from dsbs.training.encode import Encoded

SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
ROWS: list[Encoded] = [
    {"label": [([3] * 2, [5])], "rationale": [([4, 9] * 9, [6, 7, 8] * 11), ([4, 9] * 9, [5])]},
    {"label": [(list(range(3, 40)), [7, 1])]},
    {"label": [([9], [8, 1, 1])], "rationale": [([9, 3, 9], [2])]},
    *(
        {
            "label": [([5 + i, 6], [4 + i, 1])],
            "rationale": [([5 + i] * (i + 1), [4 + i] * (2 * i + 1))],
        }
        for i in range(20)
    ),
]


def t5(**changes: Any) -> Any:
    torch.manual_seed(1)
    return T5ForConditionalGeneration(T5Config(**SHAPE | changes)).double().train()
