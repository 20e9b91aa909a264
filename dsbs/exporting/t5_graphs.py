"""T5 as plain modules for ONNX export: the encoder, and one decoder step.

The exporter does not support caches, so keys and values are plain tensors here. The arithmetic is
that of T5 in transformers (Raffel et al., 2020, arXiv:1910.10683); the golden rows check it. B
rows, S input tokens, T tokens so far, H heads, D values per head, V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor


class CrossStates(torch.nn.Module):
    """token_ids (B, S), mask (B, S) -> keys and values (B, H, S, D) of each cross-attention."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder: Any = model.encoder
        self.layers: Any = torch.nn.ModuleList(
            block.layer[1].EncDecAttention for block in model.decoder.block
        )

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        hidden = self.encoder.embed_tokens(ids)
        length = ids.shape[1]
        first = self.encoder.block[0].layer[0].SelfAttention
        position = torch.arange(length)
        relative = position[None, :] - position[:, None]
        bias = _position_bias(first, relative, bidirectional=True) + _mask_bias(mask)
        for block in self.encoder.block:
            attention = block.layer[0].SelfAttention
            normed = block.layer[0].layer_norm(hidden)
            keys = _split_heads(attention.k(normed), attention)
            values = _split_heads(attention.v(normed), attention)
            hidden = hidden + _attend(attention, normed, keys, values, bias)
            hidden = block.layer[-1](hidden)
        hidden = self.encoder.final_layer_norm(hidden)
        return tuple(
            _split_heads(matrix(hidden), attention)
            for attention in self.layers
            for matrix in (attention.k, attention.v)
        )


class DecoderStep(torch.nn.Module):
    """One step: token (B, 1), mask (B, S), cross-attention states, cached keys and values.

    The cache is (B, H, T, D) per layer. Returns scores (B, V) and the cache with T + 1 tokens.
    """

    def __init__(self, model: Any, *, untied: bool) -> None:
        super().__init__()
        self.decoder: Any = model.decoder
        self.lm_head: Any = deepcopy(model.lm_head) if untied else model.lm_head
        self.scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0

    def forward(
        self, token: Tensor, mask: Tensor, cross: list[Tensor], past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        hidden = self.decoder.embed_tokens(token)
        past_length = past[0].shape[2]
        first = self.decoder.block[0].layer[0].SelfAttention
        relative = torch.arange(past_length + 1)[None, :] - past_length
        bias = _position_bias(first, relative, bidirectional=False)
        cross_bias = _mask_bias(mask)
        cache: list[Tensor] = []
        for layer, block in enumerate(self.decoder.block):
            attention = block.layer[0].SelfAttention
            normed = block.layer[0].layer_norm(hidden)
            new_keys = _split_heads(attention.k(normed), attention)
            new_values = _split_heads(attention.v(normed), attention)
            keys = torch.cat([past[2 * layer], new_keys], 2)
            values = torch.cat([past[2 * layer + 1], new_values], 2)
            cache += [keys, values]
            hidden = hidden + _attend(attention, normed, keys, values, bias)
            cross_attention = block.layer[1].EncDecAttention
            normed = block.layer[1].layer_norm(hidden)
            hidden = hidden + _attend(
                cross_attention, normed, cross[2 * layer], cross[2 * layer + 1], cross_bias
            )
            hidden = block.layer[-1](hidden)
        return self.lm_head(self.decoder.final_layer_norm(hidden)[:, -1] * self.scale), *cache


def _split_heads(states: Tensor, attention: Any) -> Tensor:
    """(B, T, H·D) -> (B, H, T, D)."""
    return states.view(
        states.shape[0], states.shape[1], -1, attention.key_value_proj_dim
    ).transpose(1, 2)


def _attend(attention: Any, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """normed (B, Q, d), keys and values (B, H, T, D) -> (B, Q, d).

    ``bias`` is broadcast to (B, H, Q, T). T5 does not scale the products.
    """
    queries = _split_heads(attention.q(normed), attention)
    weights = torch.softmax(queries @ keys.transpose(2, 3) + bias, -1)
    context = (weights @ values).transpose(1, 2)
    output: Tensor = attention.o(context.reshape(normed.shape[0], normed.shape[1], -1))
    return output


def _position_bias(attention: Any, relative: Tensor, *, bidirectional: bool) -> Tensor:
    """Relative positions (Q, T), key minus query -> (1, H, Q, T)."""
    buckets = attention._relative_position_bucket(
        relative,
        bidirectional,
        attention.relative_attention_num_buckets,
        attention.relative_attention_max_distance,
    )
    bias: Tensor = attention.relative_attention_bias(buckets).permute(2, 0, 1)[None]
    return bias


def _mask_bias(mask: Tensor) -> Tensor:
    """mask (B, S), 1 where there is a token -> (B, 1, 1, S), added to the scores."""
    return (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
