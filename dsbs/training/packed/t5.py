"""T5's forward pass on packed batches: layers see real tokens only, attention small padded groups.

Runs the modules and weights of transformers' T5 (Raffel et al., 2020, arXiv:1910.10683) and gives
each row the logits that it would get in a padded batch: relative positions count within a row, and
cross-attention reaches only the row's own input. Where short labels meet long rationales, most of
a padded batch would be padding.

Shapes: N tokens of all input rows, M tokens of all target rows, V vocabulary entries,
D = d_model, H heads, K = d_kv; attention works on groups of B rows by S slots (see ``layout``).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from dsbs.training.packed.layout import (
    GroupLayout,
    additive_mask,
    attend,
    decoder_layouts,
    dropout,
    layout_by_length,
    row_starts,
)


def without_wrapper(model: Any) -> Any:
    """The model inside LoRA's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_t5(model: Any) -> bool:
    """Whether a model has T5's architecture, in LoRA's wrapper or FSDP's too."""
    return type(without_wrapper(model)).__name__.removeprefix("FSDP") in (
        "T5ForConditionalGeneration",
        "MT5ForConditionalGeneration",
    )


@dataclass(frozen=True, slots=True)
class TargetBlock:
    """Consecutive target rows, each with an input row of its own and all with one start token."""

    inputs: Sequence[int]
    """The input row of each target row; no two are the same."""
    start: int
    """The token that the decoder starts with."""


def packed_logits(
    model: Any,
    source: Tensor,
    source_lengths: Sequence[int],
    target: Tensor,
    target_lengths: Sequence[int],
    blocks: Sequence[TargetBlock],
    hidden_states: tuple[list[Tensor], list[Tensor]] | None = None,
) -> Tensor:
    """source (N,), target (M,) packed ids -> logits (M, V), teacher-forced.

    ``blocks`` hold the target rows in their order. Rows of different blocks may share an input row,
    which is encoded once. ``hidden_states``, if given, are two lists to which each layer's output
    is appended: the encoder's (N, D) and the decoder's (M, D). As in transformers, a stack's last
    entry is taken after its final norm.
    """
    device = source.device
    source_layout = layout_by_length(source_lengths, device)
    input_rows = [row for block in blocks for row in block.inputs]
    start_tokens = [block.start for block in blocks for _ in block.inputs]
    ends = list(itertools.accumulate(len(block.inputs) for block in blocks))
    decoder_layout, cross_layouts = decoder_layouts(
        source_lengths,
        target_lengths,
        input_rows,
        [range(end - len(block.inputs), end) for block, end in zip(blocks, ends, strict=True)],
        device,
    )
    decoder_input = target.roll(1)
    decoder_input[torch.tensor(row_starts(target_lengths), device=device)] = torch.tensor(
        start_tokens, device=device
    )
    encoder_states, decoder_states = hidden_states or (None, None)
    memory = _stack(model.encoder, source, source_layout, None, (), encoder_states)
    hidden = _stack(
        model.decoder, decoder_input, decoder_layout, memory, cross_layouts, decoder_states
    )
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * (model.model_dim**-0.5)
    logits: Tensor = model.lm_head(hidden)
    return logits


def _stack(
    stack: Any,
    ids: Tensor,
    layout: GroupLayout,
    memory: Tensor | None,
    cross_layouts: Sequence[GroupLayout],
    states: list[Tensor] | None,
) -> Tensor:
    """ids (N,) -> (N, D): the encoder, or the decoder over ``memory``, the encoder's output.

    ``cross_layouts`` lay ``memory`` out in the order of the decoder's groups. Each layer's output
    is appended to ``states``.
    """
    p = stack.config.dropout_rate
    training = stack.training
    hidden = dropout(stack.embed_tokens(ids), p, training)
    biases = _position_biases(
        stack.block[0].layer[0].SelfAttention, layout, causal=memory is not None
    )
    masks = [
        additive_mask(group.real, hidden.dtype)[:, None, None]
        for cross_layout in cross_layouts
        for group in cross_layout.groups
    ]

    def run_layers(layers: Any, hidden: Tensor, memory: Tensor | None) -> Tensor:
        normed = layers[0].layer_norm(hidden)
        attended = _attention(
            layers[0].SelfAttention, normed, None, layout, (), biases, p, training
        )
        hidden = hidden + dropout(attended, p, training)
        if memory is not None:
            normed = layers[1].layer_norm(hidden)
            attended = _attention(
                layers[1].EncDecAttention, normed, memory, layout, cross_layouts, masks, p, training
            )
            hidden = hidden + dropout(attended, p, training)
        normed = layers[-1].layer_norm(hidden)
        update = _feed_forward(layers[-1].DenseReluDense, normed, p, training)
        return hidden + dropout(update, p, training)

    def run_checkpointed(layers: Any, hidden: Tensor, memory: Tensor | None) -> Tensor:
        if training and stack.gradient_checkpointing:
            output: Tensor = checkpoint(run_layers, layers, hidden, memory, use_reentrant=False)
            return output
        return run_layers(layers, hidden, memory)

    for block in stack.block:
        if hasattr(block, "unshard"):
            # FSDP gathers a block's weights when the block itself is called (see ``fsdp``)
            hidden = block(hidden, memory, work=run_checkpointed)
        else:
            hidden = run_checkpointed(block.layer, hidden, memory)
        if states is not None:
            states.append(hidden)
    hidden = dropout(stack.final_layer_norm(hidden), p, training)
    if states is not None:
        states[-1] = hidden
    return hidden


def _position_biases(attention: Any, layout: GroupLayout, *, causal: bool) -> list[Tensor]:
    """By group, the relative position bias (1 or B, H, S, S), the lowest number where masked."""
    longest = max(group.size for group in layout.groups)
    full_bias = attention.compute_bias(longest, longest)  # (1, H, S, S)
    if causal:
        future = torch.ones(longest, longest, dtype=torch.bool, device=full_bias.device).triu(1)
        full_bias = full_bias.masked_fill(future, torch.finfo(full_bias.dtype).min)
    biases: list[Tensor] = []
    for group in layout.groups:
        bias = full_bias[:, :, : group.size, : group.size]
        if not causal:  # in a causal row padding comes last, where no real token attends
            bias = bias + additive_mask(group.real, bias.dtype)[:, None, None]
        biases.append(bias)
    return biases


def _attention(
    module: Any,
    x: Tensor,
    memory: Tensor | None,
    query_layout: GroupLayout,
    key_layouts: Sequence[GroupLayout],
    biases: Sequence[Tensor],
    p: float,
    training: bool,
) -> Tensor:
    """x (N, D) -> (N, D): attention to ``memory`` in ``key_layouts``, or to x itself.

    T5 does not scale its attention scores.
    """
    width = module.n_heads * module.key_value_proj_dim

    def split_heads(projected: Tensor, layout: GroupLayout) -> list[Sequence[Tensor]]:
        """projected (N, n·H·K), n projections side by side -> by group, n tensors (B, H, S, K).

        ``split`` and ``unbind`` put their gradients together in one tensor; with slices each would
        fill a tensor of the full size with zeros.
        """
        shape = (projected.shape[1] // width, module.n_heads, module.key_value_proj_dim)
        return [
            chunk.view(group.rows, group.size, *shape).permute(2, 0, 3, 1, 4).unbind()
            for chunk, group in zip(layout.pad(projected), layout.groups, strict=True)
        ]

    heads: list[Sequence[Tensor]]
    if memory is None:
        heads = split_heads(_projections((module.q, module.k, module.v), x), query_layout)
    else:
        projected = _projections((module.k, module.v), memory)
        keys_values = [pair for layout in key_layouts for pair in split_heads(projected, layout)]
        queries = split_heads(module.q(x), query_layout)
        heads = [(*query, *pair) for query, pair in zip(queries, keys_values, strict=True)]
    outputs = [
        attend(query, key, value, bias, p, training)
        for (query, key, value), bias in zip(heads, biases, strict=True)
    ]
    attended: Tensor = module.o(query_layout.unpad(outputs))
    return attended


def _projections(modules: Sequence[Any], x: Tensor) -> Tensor:
    """Several projections of x side by side: one product for plain linear layers, else one each."""
    if all(type(module) is torch.nn.Linear for module in modules):  # LoRA's are not
        return functional.linear(x, torch.cat([module.weight for module in modules]))
    return torch.cat([module(x) for module in modules], dim=-1)


def _feed_forward(module: Any, x: Tensor, p: float, training: bool) -> Tensor:
    """x (N, D) -> (N, D): T5's feed-forward layer, gated in v1.1."""
    if hasattr(module, "wi_0"):
        inner = dropout(module.act(module.wi_0(x)) * module.wi_1(x), p, training)
    elif isinstance(module.act, torch.nn.ReLU):
        inner = dropout(module.wi(x), p, training, rectified=True)  # one mask for relu and dropout
    else:
        inner = dropout(module.act(module.wi(x)), p, training)
    output: Tensor = module.wo(inner)
    return output
