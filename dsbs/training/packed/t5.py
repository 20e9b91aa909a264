"""T5 without padding: every layer but attention sees real tokens only, one after another; attention sees small padded groups.

The same modules and weights as transformers' T5 (Raffel et al., 2020), the same result for each example: relative positions are
counted within an example, cross-attention reaches its own encoder row alone. What is saved is the arithmetic on padding, which
is most of it where short labels and long rationales meet, and, on a CPU, most of the cost of drawing dropout masks.

Shapes: N tokens, D = d_model, H heads, K = d_kv; P places of all padded groups together, of which a group has B rows of S.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_FEW = 16  # rows that a group has at least, so that there are not too many groups
_SLACK = 1.2  # how much longer than its shortest row a group's longest may be


@dataclass(frozen=True, slots=True)
class Group:
    """B rows of at most S tokens: where they begin among the P places, and which places are real (B, S)."""

    first: int
    rows: int
    size: int
    real: Tensor


@dataclass(frozen=True, slots=True)
class Layout:
    """Where rows lie: tokens (N,) of each real place in the flat order, ``inside`` (N,) its index among the P places."""

    tokens: Tensor
    inside: Tensor
    places: int
    groups: list[Group]


def layout_groups(
    lengths: Sequence[int], starts: Sequence[int], order: Sequence[int], bounds: Sequence[slice]
) -> Layout:
    """Rows of ``lengths`` whose tokens begin at ``starts``, in groups: ``order`` cut at ``bounds``."""
    groups, tokens, inside, first = [], [], [], 0
    for part in bounds:
        rows = order[part]
        sizes = torch.tensor([lengths[i] for i in rows])
        steps = torch.arange(int(sizes.max()))
        real = steps < sizes[:, None]
        tokens.append((torch.tensor([starts[i] for i in rows])[:, None] + steps)[real])
        inside.append(real.flatten().nonzero().squeeze(1) + first)
        groups.append(Group(first, len(rows), len(steps), real))
        first += real.numel()
    return Layout(torch.cat(tokens), torch.cat(inside), first, groups)


def cut(lengths: Sequence[int]) -> list[slice]:
    """Groups of ascending lengths whose padded size is little more than their tokens."""
    bounds, begin = [], 0
    for i in range(1, len(lengths) + 1):
        if i == len(lengths) or (i - begin >= _FEW and lengths[i] > _SLACK * lengths[begin] + 2):
            bounds.append(slice(begin, i))
            begin = i
    return bounds


class _Pad(torch.autograd.Function):
    """x (N, W) -> (P, W): tokens to their places, zeros elsewhere. Each token has one place, so nothing is accumulated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, inside: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(tokens, inside)
        ctx.rows = x.shape[0]
        return x.new_zeros(places, x.shape[1]).index_copy_(0, inside, x.index_select(0, tokens))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        tokens, inside = ctx.saved_tensors
        back = grad.new_zeros(ctx.rows, grad.shape[1]).index_copy_(
            0, tokens, grad.index_select(0, inside)
        )
        return back, None, None, None


class _Unpad(torch.autograd.Function):
    """x (P, W) -> (N, W): the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(tokens, inside)
        ctx.places = x.shape[0]
        return x.new_empty(len(tokens), x.shape[1]).index_copy_(
            0, tokens, x.index_select(0, inside)
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        tokens, inside = ctx.saved_tensors
        return (
            grad.new_zeros(ctx.places, grad.shape[1]).index_copy_(
                0, inside, grad.index_select(0, tokens)
            ),
            None,
            None,
        )


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cut_at: int, rectified: bool) -> Tensor:
        bits = (
            torch.empty((x.numel() + 3) // 4, dtype=torch.int64)
            .random_(-(2**63), None)
            .view(torch.int16)
        )
        keep = (bits[: x.numel()] >= cut_at - 32768).view(x.shape)
        if rectified:
            keep &= x > 0
        ctx.save_for_backward(keep)
        ctx.scale = 65536 / (65536 - cut_at)
        return x * keep.to(x.dtype).mul_(ctx.scale)  # a product with truth values is twice as slow

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0].to(grad.dtype).mul_(ctx.scale), None, None


def dropout(x: Tensor, p: float, training: bool, *, rectified: bool = False) -> Tensor:
    """Dropout of torch's distribution, to 1/65536 of ``p``, at a fifth of its cost on a CPU; of relu(x) if ``rectified``.

    A CPU draws one 64-bit number for four elements instead of one for each; the survivors are scaled by the exact share.
    """
    if not training or p == 0 or x.is_cuda:
        return functional.dropout(functional.relu(x) if rectified else x, p, training)
    made: Tensor = _Dropout.apply(x, round(p * 65536), rectified)
    return made


def is_t5(model: Any) -> bool:
    """Whether a model is of T5's architecture; LoRA around one is."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(inner).__name__.removeprefix("FSDP") in (
        "T5ForConditionalGeneration",
        "MT5ForConditionalGeneration",
    )


@dataclass(frozen=True, slots=True)
class TargetBlock:
    """Target rows that follow one another: the source row that each reads (no two the same), and the token they start with."""

    reads: Sequence[int]
    start: int


def logits_of(
    model: Any,
    source: Tensor,
    reading: Sequence[int],
    target: Tensor,
    writing: Sequence[int],
    parts: Sequence[TargetBlock],
    hidden_states: tuple[list[Tensor], list[Tensor]] | None = None,
) -> Tensor:
    """source (N,) and target (M,) ids, rows of the given lengths one after another -> logits (M, V), teacher-forced.

    ``parts`` are the target rows in their order; rows of different parts may read the same source row, encoded once.
    ``hidden_states`` are filled with what each layer makes, as transformers' models tell it: the encoder's layers (N, D), the
    decoder's (M, D), the last one's after its stack's norm.
    """
    config, device = model.config, source.device
    read_at, write_at = _starts(reading), _starts(writing)
    by_reading = sorted(range(len(reading)), key=reading.__getitem__)
    inner = _move(
        layout_groups(reading, read_at, by_reading, cut([reading[i] for i in by_reading])), device
    )
    reads = [row for part in parts for row in part.reads]
    begins = [part.start for part in parts for _ in part.reads]
    lengths, places = [reading[row] for row in reads], [read_at[row] for row in reads]
    order: list[int] = []
    bounds: list[slice] = []
    across = []
    for part in parts:
        first = len(order)
        rows = sorted(range(first, first + len(part.reads)), key=lambda i: (writing[i], lengths[i]))
        own = cut([writing[i] for i in rows])
        across.append(_move(layout_groups(lengths, places, rows, own), device))
        order += rows
        bounds += [slice(first + one.start, first + one.stop) for one in own]
    outer = _move(layout_groups(writing, write_at, order, bounds), device)
    shifted = target.roll(1)
    shifted[torch.tensor(write_at, device=device)] = torch.tensor(begins, device=device)

    made_inside, made_outside = hidden_states or (None, None)
    memory = _stack(model.encoder, source, inner, None, (), made_inside)
    hidden = _stack(model.decoder, shifted, outer, memory, across, made_outside)
    if getattr(config, "scale_decoder_outputs", False):
        hidden = hidden * (model.model_dim**-0.5)
    logits: Tensor = model.lm_head(hidden)
    return logits


def _starts(lengths: Sequence[int]) -> list[int]:
    starts, at = [], 0
    for length in lengths:
        starts.append(at)
        at += length
    return starts


def _move(layout: Layout, device: Any) -> Layout:
    if device.type == "cpu":
        return layout
    groups = [Group(one.first, one.rows, one.size, one.real.to(device)) for one in layout.groups]
    return Layout(layout.tokens.to(device), layout.inside.to(device), layout.places, groups)


def _stack(
    stack: Any,
    ids: Tensor,
    own: Layout,
    memory: Tensor | None,
    across: Sequence[Layout],
    made: list[Tensor] | None,
) -> Tensor:
    """ids (N,) -> (N, D): a T5 encoder, or a decoder over ``memory`` (M, D), whose layouts ``across`` are in own's order.

    ``made`` takes what each layer makes; None: nobody asks.
    """
    p, training = stack.config.dropout_rate, stack.training
    hidden = dropout(stack.embed_tokens(ids), p, training)
    biases = _biases(stack.block[0].layer[0].SelfAttention, own, causal=memory is not None)
    masks = [
        _mask(keys.real, hidden.dtype)[:, None, None] for layout in across for keys in layout.groups
    ]

    def block(layers: Any, hidden: Tensor, memory: Tensor | None) -> Tensor:
        seen = _attention(
            layers[0].SelfAttention,
            layers[0].layer_norm(hidden),
            None,
            own,
            (),
            biases,
            p,
            training,
        )
        hidden = hidden + dropout(seen, p, training)
        if memory is not None:
            asked = layers[1].layer_norm(hidden)
            seen = _attention(
                layers[1].EncDecAttention, asked, memory, own, across, masks, p, training
            )
            hidden = hidden + dropout(seen, p, training)
        fed = _feed_forward(layers[-1].DenseReluDense, layers[-1].layer_norm(hidden), p, training)
        return hidden + dropout(fed, p, training)

    def work(layers: Any, hidden: Tensor, memory: Tensor | None) -> Tensor:
        if training and stack.gradient_checkpointing:
            kept: Tensor = checkpoint(block, layers, hidden, memory, use_reentrant=False)
            return kept
        return block(layers, hidden, memory)

    for one in stack.block:
        # a divided block gathers its weights when it is called, for what it is given to do (see ``sharding``)
        hidden = (
            one(hidden, memory, work=work)
            if hasattr(one, "unshard")
            else work(one.layer, hidden, memory)
        )
        if made is not None:
            made.append(hidden)
    hidden = dropout(stack.final_layer_norm(hidden), p, training)
    if made is not None:
        made[-1] = hidden
    return hidden


def _biases(attention: Any, own: Layout, *, causal: bool) -> list[Tensor]:
    """For each group (1 or B, H, S, S): relative position bias, and the lowest number where a place must not be seen."""
    longest = max(group.size for group in own.groups)
    whole = attention.compute_bias(longest, longest)  # (1, H, S, S)
    if causal:
        ahead = torch.ones(longest, longest, dtype=torch.bool, device=whole.device).triu(1)
        whole = whole.masked_fill(ahead, torch.finfo(whole.dtype).min)
    found = []
    for group in own.groups:
        bias = whole[:, :, : group.size, : group.size]
        # in a causal row what is real sees only what is real: padding lies behind it
        found.append(bias if causal else bias + _mask(group.real, bias.dtype)[:, None, None])
    return found


def _mask(real: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) -> (B, S): 0 at real places, the lowest number at padding."""
    return torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill_(
        ~real, torch.finfo(dtype).min
    )


def _attention(
    module: Any,
    x: Tensor,
    memory: Tensor | None,
    queries: Layout,
    keys: Sequence[Layout],
    biases: Sequence[Tensor],
    p: float,
    training: bool,
) -> Tensor:
    """x (N, D), seeing ``memory`` (M, D), laid out as ``keys``, or x itself -> (N, D). T5 does not scale its scores."""
    width = module.n_heads * module.key_value_proj_dim

    def heads(projected: Tensor, layout: Layout) -> list[Sequence[Tensor]]:
        """projected (M, n·width), n projections side by side -> for each group all n, each (B, H, S, K).

        Cut by split and unbind, whose gradients are put together in one piece; slices would each fill a whole one with zeros.
        """
        padded = _Pad.apply(projected, layout.tokens, layout.inside, layout.places)
        parts = torch.split(padded, [group.rows * group.size for group in layout.groups])
        shape = (projected.shape[1] // width, module.n_heads, module.key_value_proj_dim)
        return [
            part.view(group.rows, group.size, *shape).permute(2, 0, 3, 1, 4).unbind()
            for part, group in zip(parts, layout.groups, strict=True)
        ]

    if memory is None:
        sides = heads(_linear((module.q, module.k, module.v), x), queries)
    else:
        known = _linear((module.k, module.v), memory)
        told = [pair for layout in keys for pair in heads(known, layout)]
        sides = [
            (*query, *pair) for query, pair in zip(heads(module.q(x), queries), told, strict=True)
        ]
    parts = []
    for (query, key, value), bias in zip(sides, biases, strict=True):
        weights = dropout(
            torch.softmax(torch.matmul(query, key.transpose(2, 3)) + bias, dim=-1), p, training
        )
        parts.append(torch.matmul(weights, value).transpose(1, 2).reshape(-1, width))
    seen: Tensor = module.o(_Unpad.apply(torch.cat(parts), queries.tokens, queries.inside))
    return seen


def _linear(modules: Sequence[Any], x: Tensor) -> Tensor:
    """Several projections of x side by side: one product where they are plain matrices, else one after another (LoRA)."""
    if all(type(module) is torch.nn.Linear for module in modules):
        return functional.linear(x, torch.cat([module.weight for module in modules]))
    return torch.cat([module(x) for module in modules], dim=-1)


def _feed_forward(module: Any, x: Tensor, p: float, training: bool) -> Tensor:
    """x (N, D) -> (N, D): T5's dense layer, gated in v1.1."""
    if hasattr(module, "wi_0"):
        inner = dropout(module.act(module.wi_0(x)) * module.wi_1(x), p, training)
    elif isinstance(module.act, torch.nn.ReLU):
        inner = dropout(module.wi(x), p, training, rectified=True)  # one mask for both
    else:
        inner = dropout(module.act(module.wi(x)), p, training)
    made: Tensor = module.wo(inner)
    return made
