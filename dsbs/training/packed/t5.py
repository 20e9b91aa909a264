"""T5's forward pass on packed batches: layers see real tokens only, attention small padded groups.

Runs the modules and weights of transformers' T5 (Raffel et al., 2020, arXiv:1910.10683) and gives
each row the logits that it would get in a padded batch: relative positions count within a row, and
cross-attention reaches only the row's own input. This saves the arithmetic on padding, which is
most of it where short labels meet long rationales, and, on a CPU, most of the cost of drawing
dropout masks.

Shapes: N tokens of all input rows, M tokens of all target rows, V vocabulary entries,
D = d_model, H heads, K = d_kv. Attention pads rows of similar length into groups of B rows by S
slots; P is the number of slots in all groups together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_MIN_GROUP_ROWS = 16  # fewer rows per group would mean many small matrix products
_MAX_LENGTH_RATIO = 1.2  # of a group's longest row to its shortest


@dataclass(frozen=True, slots=True)
class PaddedGroup:
    """B rows padded to S slots, which begin at slot ``first`` of the P."""

    first: int
    rows: int
    size: int
    real: Tensor
    """(B, S): False at padding."""


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """The groups of a set of rows, and the way from packed tokens to their slots."""

    tokens: Tensor
    """(N,) packed index of the token in each real slot, in the order of the slots."""
    slots: Tensor
    """(N,) index of those slots among the P."""
    size: int
    """P."""
    groups: list[PaddedGroup]

    def to(self, device: torch.device) -> GroupLayout:
        """This layout on ``device``."""
        if device.type == "cpu":
            return self
        groups = [
            PaddedGroup(group.first, group.rows, group.size, group.real.to(device))
            for group in self.groups
        ]
        return GroupLayout(self.tokens.to(device), self.slots.to(device), self.size, groups)


def layout_groups(
    lengths: Sequence[int], starts: Sequence[int], order: Sequence[int], bounds: Sequence[slice]
) -> GroupLayout:
    """Lay out rows of ``lengths`` that start at packed token ``starts``.

    ``bounds`` cut ``order``, the rows' indices, into groups.
    """
    groups: list[PaddedGroup] = []
    tokens: list[Tensor] = []
    slots: list[Tensor] = []
    first = 0
    for bound in bounds:
        rows = order[bound]
        row_lengths = torch.tensor([lengths[row] for row in rows])
        positions = torch.arange(int(row_lengths.max()))
        real = positions < row_lengths[:, None]
        tokens.append((torch.tensor([starts[row] for row in rows])[:, None] + positions)[real])
        slots.append(real.flatten().nonzero().squeeze(1) + first)
        groups.append(PaddedGroup(first, len(rows), len(positions), real))
        first += real.numel()
    return GroupLayout(torch.cat(tokens), torch.cat(slots), first, groups)


def group_by_length(lengths: Sequence[int]) -> list[slice]:
    """Cut ascending lengths into groups whose padded size is little more than their tokens."""
    bounds: list[slice] = []
    begin = 0
    for end in range(1, len(lengths) + 1):
        if end < len(lengths):
            is_small = end - begin < _MIN_GROUP_ROWS
            if is_small or lengths[end] <= _MAX_LENGTH_RATIO * lengths[begin] + 2:
                continue
        bounds.append(slice(begin, end))
        begin = end
    return bounds


class _Pad(torch.autograd.Function):
    """x (N, W) -> (P, W): packed tokens to their slots, zeros at padding.

    Each token has one slot, so that the backward pass copies and never accumulates.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(tokens, slots)
        ctx.rows = x.shape[0]
        return x.new_zeros(size, x.shape[1]).index_copy_(0, slots, x.index_select(0, tokens))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        tokens, slots = ctx.saved_tensors
        packed = grad.new_zeros(ctx.rows, grad.shape[1])
        packed.index_copy_(0, tokens, grad.index_select(0, slots))
        return packed, None, None, None


class _Unpad(torch.autograd.Function):
    """x (P, W) -> (N, W): the inverse of ``_Pad``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, slots)
        ctx.size = x.shape[0]
        return x.new_empty(len(tokens), x.shape[1]).index_copy_(0, tokens, x.index_select(0, slots))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        tokens, slots = ctx.saved_tensors
        padded = grad.new_zeros(ctx.size, grad.shape[1])
        padded.index_copy_(0, slots, grad.index_select(0, tokens))
        return padded, None, None


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: int, rectified: bool) -> Tensor:
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)
        keep = (bits[: x.numel()] >= threshold - 32768).view(x.shape)
        if rectified:
            keep &= x > 0
        ctx.save_for_backward(keep)
        ctx.scale = 65536 / (65536 - threshold)
        return x * keep.to(x.dtype).mul_(ctx.scale)  # multiplying by booleans takes twice as long

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0].to(grad.dtype).mul_(ctx.scale), None, None


def dropout(x: Tensor, p: float, training: bool, *, rectified: bool = False) -> Tensor:
    """Dropout at a fifth of torch's cost on a CPU; of relu(x) if ``rectified``.

    The distribution is torch's with ``p`` rounded to 1/65536. A CPU draws one 64-bit number for
    four elements instead of one for each, and the survivors are scaled by their exact share.
    """
    if not training or p == 0 or x.is_cuda:
        if rectified:
            x = functional.relu(x)
        return functional.dropout(x, p, training)
    dropped: Tensor = _Dropout.apply(x, round(p * 65536), rectified)
    return dropped


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
    source_starts = _starts(source_lengths)
    target_starts = _starts(target_lengths)
    by_length = sorted(range(len(source_lengths)), key=source_lengths.__getitem__)
    bounds = group_by_length([source_lengths[row] for row in by_length])
    encoder_layout = layout_groups(source_lengths, source_starts, by_length, bounds).to(device)

    input_rows = [row for block in blocks for row in block.inputs]
    start_tokens = [block.start for block in blocks for _ in block.inputs]
    input_lengths = [source_lengths[row] for row in input_rows]
    input_starts = [source_starts[row] for row in input_rows]
    order: list[int] = []
    bounds = []
    cross_layouts: list[GroupLayout] = []
    for block in blocks:
        first = len(order)
        rows = sorted(
            range(first, first + len(block.inputs)),
            key=lambda row: (target_lengths[row], input_lengths[row]),
        )
        block_bounds = group_by_length([target_lengths[row] for row in rows])
        layout = layout_groups(input_lengths, input_starts, rows, block_bounds)
        cross_layouts.append(layout.to(device))
        order += rows
        bounds += [slice(first + bound.start, first + bound.stop) for bound in block_bounds]
    decoder_layout = layout_groups(target_lengths, target_starts, order, bounds).to(device)

    decoder_input = target.roll(1)
    decoder_input[torch.tensor(target_starts, device=device)] = torch.tensor(
        start_tokens, device=device
    )
    encoder_states, decoder_states = hidden_states or (None, None)
    memory = _stack(model.encoder, source, encoder_layout, None, (), encoder_states)
    hidden = _stack(
        model.decoder, decoder_input, decoder_layout, memory, cross_layouts, decoder_states
    )
    if getattr(model.config, "scale_decoder_outputs", False):
        hidden = hidden * (model.model_dim**-0.5)
    logits: Tensor = model.lm_head(hidden)
    return logits


def _starts(lengths: Sequence[int]) -> list[int]:
    """The first packed token of each row."""
    starts: list[int] = []
    total = 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts


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
        _mask(group.real, hidden.dtype)[:, None, None]
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
            bias = bias + _mask(group.real, bias.dtype)[:, None, None]
        biases.append(bias)
    return biases


def _mask(real: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) -> (B, S): 0 at real slots, the lowest number at padding."""
    return torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill_(
        ~real, torch.finfo(dtype).min
    )


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
        padded = _Pad.apply(projected, layout.tokens, layout.slots, layout.size)
        chunks = torch.split(padded, [group.rows * group.size for group in layout.groups])
        shape = (projected.shape[1] // width, module.n_heads, module.key_value_proj_dim)
        return [
            chunk.view(group.rows, group.size, *shape).permute(2, 0, 3, 1, 4).unbind()
            for chunk, group in zip(chunks, layout.groups, strict=True)
        ]

    heads: list[Sequence[Tensor]]
    if memory is None:
        heads = split_heads(_projections((module.q, module.k, module.v), x), query_layout)
    else:
        projected = _projections((module.k, module.v), memory)
        keys_values = [pair for layout in key_layouts for pair in split_heads(projected, layout)]
        queries = split_heads(module.q(x), query_layout)
        heads = [(*query, *pair) for query, pair in zip(queries, keys_values, strict=True)]
    outputs: list[Tensor] = []
    for (query, key, value), bias in zip(heads, biases, strict=True):
        scores = torch.matmul(query, key.transpose(2, 3)) + bias
        weights = dropout(torch.softmax(scores, dim=-1), p, training)
        outputs.append(torch.matmul(weights, value).transpose(1, 2).reshape(-1, width))
    packed = _Unpad.apply(torch.cat(outputs), query_layout.tokens, query_layout.slots)
    attended: Tensor = module.o(packed)
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
