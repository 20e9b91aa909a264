"""A T5's encoder and one step of its decoder as modules of plain tensors, for an exporter that knows no caches.

The arithmetic is that of transformers' T5 (Raffel et al., 2020, arXiv:1910.10683); the golden rows hold it to that.
B rows, S input tokens, T tokens so far, H heads, D numbers a head, V vocabulary.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor


class CrossStates(torch.nn.Module):
    """ids (B, S), mask (B, S) -> for each decoder layer the keys and values of its cross-attention, (B, H, S, D) each."""

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
        place = torch.arange(length)
        bias = _bias(first, place[None, :] - place[:, None], bidirectional=True) + _masked(mask)
        for block in self.encoder.block:
            attention = block.layer[0].SelfAttention
            normed = block.layer[0].layer_norm(hidden)
            keys, values = (
                _heads(attention.k(normed), attention),
                _heads(attention.v(normed), attention),
            )
            hidden = hidden + _attend(attention, normed, keys, values, bias)
            hidden = block.layer[-1](hidden)
        hidden = self.encoder.final_layer_norm(hidden)
        return tuple(
            _heads(matrix(hidden), one) for one in self.layers for matrix in (one.k, one.v)
        )


class Step(torch.nn.Module):
    """token (B, 1), mask (B, S), cross states, past keys and values (B, H, T, D) -> scores (B, V), those with T + 1 tokens."""

    def __init__(self, model: Any, *, untied: bool) -> None:
        super().__init__()
        self.decoder: Any = model.decoder
        self.lm_head: Any = deepcopy(model.lm_head) if untied else model.lm_head
        self.scale = model.config.d_model**-0.5 if model.config.scale_decoder_outputs else 1.0

    def forward(
        self, token: Tensor, mask: Tensor, cross: list[Tensor], past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        hidden = self.decoder.embed_tokens(token)
        before = past[0].shape[2]
        first = self.decoder.block[0].layer[0].SelfAttention
        bias = _bias(first, torch.arange(before + 1)[None, :] - before, bidirectional=False)
        seen, kept = _masked(mask), []
        for number, block in enumerate(self.decoder.block):
            attention = block.layer[0].SelfAttention
            normed = block.layer[0].layer_norm(hidden)
            keys = torch.cat([past[2 * number], _heads(attention.k(normed), attention)], 2)
            values = torch.cat([past[2 * number + 1], _heads(attention.v(normed), attention)], 2)
            kept += [keys, values]
            hidden = hidden + _attend(attention, normed, keys, values, bias)
            over = block.layer[1].EncDecAttention
            normed = block.layer[1].layer_norm(hidden)
            hidden = hidden + _attend(over, normed, cross[2 * number], cross[2 * number + 1], seen)
            hidden = block.layer[-1](hidden)
        return self.lm_head(self.decoder.final_layer_norm(hidden)[:, -1] * self.scale), *kept


def _heads(states: Tensor, attention: Any) -> Tensor:
    """(B, T, H·D) -> (B, H, T, D)."""
    return states.view(
        states.shape[0], states.shape[1], -1, attention.key_value_proj_dim
    ).transpose(1, 2)


def _attend(attention: Any, normed: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """normed (B, Q, d), keys and values (B, H, T, D), bias broadcast to (B, H, Q, T) -> (B, Q, d). T5 scales no products."""
    weights = torch.softmax(
        _heads(attention.q(normed), attention) @ keys.transpose(2, 3) + bias, -1
    )
    found: Tensor = attention.o(
        (weights @ values).transpose(1, 2).reshape(normed.shape[0], normed.shape[1], -1)
    )
    return found


def _bias(attention: Any, relative: Tensor, *, bidirectional: bool) -> Tensor:
    """relative (Q, T), the key's place less the query's -> (1, H, Q, T)."""
    buckets = attention._relative_position_bucket(
        relative,
        bidirectional,
        attention.relative_attention_num_buckets,
        attention.relative_attention_max_distance,
    )
    found: Tensor = attention.relative_attention_bias(buckets).permute(2, 0, 1)[None]
    return found


def _masked(mask: Tensor) -> Tensor:
    """mask (B, S), 1 where a token is -> (B, 1, 1, S), to be added to scores."""
    return (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
