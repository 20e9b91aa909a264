"""T5 without padding: every layer but attention sees real tokens only, one after another; attention sees small padded groups.

The same modules and weights as transformers' T5 (Raffel et al., 2020), the same result for each example: relative positions are
counted within an example, cross-attention reaches its own encoder row alone. What is saved is the arithmetic on padding, which
is most of it where short labels and long rationales meet, and, on a CPU, most of the cost of drawing dropout masks.

Shapes: N tokens of all rows in a group's and a row's order, D = d_model, H heads, K = d_kv; a group has B rows of at most S tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_ROWS_OF_A_GROUP = 32  # rows of like length whose attention is computed together


@dataclass(frozen=True, slots=True)
class Layout:
    """Where rows of ``lengths`` lie among N tokens, and the padded groups that attention sees.

    ``order`` (B,) lists rows by length; the tokens of the rows follow one another in that order. For each group: ``places``
    (B, S) of each position's token (0 at padding), ``real`` (B, S), ``flat`` of the real positions within B·S.
    """

    order: list[int]
    groups: list[Group]
    tokens: int


@dataclass(frozen=True, slots=True)
class Group:
    rows: slice  # of the layout's order
    places: Tensor
    real: Tensor
    flat: Tensor


def lay_out(lengths: Sequence[int], order: Sequence[int], bounds: Sequence[slice]) -> Layout:
    """The layout of rows in the given order, cut into groups at ``bounds``."""
    groups, start = [], 0
    for rows in bounds:
        sizes = torch.tensor([lengths[i] for i in order[rows]])
        longest = int(sizes.max())
        steps = torch.arange(longest)
        real = steps < sizes[:, None]
        first = start + torch.cumsum(sizes, 0) - sizes
        places = torch.where(real, first[:, None] + steps, torch.zeros((), dtype=torch.long))
        groups.append(Group(rows, places, real, real.flatten().nonzero().squeeze(1)))
        start += int(sizes.sum())
    return Layout(list(order), groups, start)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of the same distribution as torch's, to 1/65536 of ``p``, at a fifth of its cost on a CPU.

    A CPU draws one 64-bit number for four elements instead of one for each; the survivors are scaled by the exact share.
    """
    if not training or p == 0:
        return x
    if x.is_cuda:
        return functional.dropout(x, p)
    cut = round(p * 65536)
    bits = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = (bits[: x.numel()] >= cut - 32768).view(x.shape)
    return x * keep * (65536 / (65536 - cut))


def forward(model: Any, sources: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Tensor, list[int], list[int]]:
    """Logits of every real target token of rows of ids without padding, teacher-forced.

    Returns logits (M, V) for the M target tokens, the order of the rows in them, and each of those rows' token count.
    """
    config, device = model.config, model.device
    source_lengths, target_lengths = [len(ids) for ids in sources], [len(ids) for ids in targets]
    # rows of like target length together: the decoder's attention is cut to their size, and the encoder follows that order
    order = sorted(range(len(sources)), key=lambda i: (target_lengths[i], source_lengths[i]))
    bounds = _bounds([target_lengths[i] for i in order])
    from_, to = lay_out(source_lengths, order, bounds), lay_out(target_lengths, order, bounds)
    start = torch.tensor([config.decoder_start_token_id])
    source = torch.cat([sources[i] for i in order]).to(device)
    shifted = torch.cat([part for i in order for part in (start, targets[i][:-1])]).to(device)
    groups = [(_to(a, device), _to(b, device)) for a, b in zip(from_.groups, to.groups, strict=True)]

    encoder, decoder = model.encoder, model.decoder
    hidden = _stack(encoder, source, [(one, one) for one, _ in groups], None, None)
    hidden = _stack(decoder, shifted, [(two, two) for _, two in groups], hidden, [(two, one) for one, two in groups])
    if getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
        hidden = hidden * (model.model_dim**-0.5)
    return model.lm_head(hidden), order, [target_lengths[i] for i in order]


def _bounds(lengths: Sequence[int]) -> list[slice]:
    """Groups of rows whose padded size is little more than their tokens."""
    bounds, begin = [], 0
    for i in range(1, len(lengths) + 1):
        full = i == len(lengths) or i - begin >= _ROWS_OF_A_GROUP and lengths[i] > 1.25 * lengths[begin] + 4
        if full:
            bounds.append(slice(begin, i))
            begin = i
    return bounds


def _to(group: Group, device: Any) -> Group:
    if device.type == "cpu":
        return group
    return Group(group.rows, group.places.to(device), group.real.to(device), group.flat.to(device))


Pairs = list[tuple[Group, Group]]  # queries' and keys' groups


def _stack(stack: Any, ids: Tensor, own: Pairs, memory: Tensor | None, across: Pairs | None) -> Tensor:
    """ids (N,) -> (N, D): a T5 encoder, or a decoder over ``memory`` (M, D)."""
    p, training = stack.config.dropout_rate, stack.training
    hidden = dropout(stack.embed_tokens(ids), p, training)
    biases = _biases(stack.block[0].layer[0].SelfAttention, own, causal=memory is not None)
    masks = None if across is None else [_mask(keys.real, hidden.dtype)[:, None, None] for _, keys in across]

    def block(layers: Any, hidden: Tensor) -> Tensor:
        layer = layers[0]
        made = _attention(layer.SelfAttention, layer.layer_norm(hidden), None, own, biases, p, training)
        hidden = hidden + dropout(made, p, training)
        if memory is not None and across is not None and masks is not None:
            layer = layers[1]
            made = _attention(layer.EncDecAttention, layer.layer_norm(hidden), memory, across, masks, p, training)
            hidden = hidden + dropout(made, p, training)
        layer = layers[-1]
        return hidden + dropout(_feed_forward(layer.DenseReluDense, layer.layer_norm(hidden), p, training), p, training)

    for one in stack.block:
        if training and stack.gradient_checkpointing:
            hidden = checkpoint(block, one.layer, hidden, use_reentrant=False)
        else:
            hidden = block(one.layer, hidden)
    return dropout(stack.final_layer_norm(hidden), p, training)


def _biases(attention: Any, own: Pairs, *, causal: bool) -> list[Tensor]:
    """For each group (B, H, S, S): relative position bias, and minus infinity where a position must not be seen."""
    longest = max(group.places.shape[1] for group, _ in own)
    whole = attention.compute_bias(longest, longest)  # (1, H, S, S)
    if causal:
        ahead = torch.ones(longest, longest, dtype=torch.bool, device=whole.device).triu(1)
        whole = whole.masked_fill(ahead, torch.finfo(whole.dtype).min)
    found = []
    for group, _ in own:
        size = group.places.shape[1]
        bias = whole[:, :, :size, :size]
        # in a causal row what is real sees only what is real: padding lies behind it
        found.append(bias if causal else bias + _mask(group.real, bias.dtype)[:, None, None])
    return found


def _mask(real: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) -> (B, S): 0 at real positions, the lowest number at padding."""
    return torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill(~real, torch.finfo(dtype).min)


def _attention(
    module: Any, x: Tensor, memory: Tensor | None, pairs: Pairs, biases: Sequence[Tensor], p: float, training: bool
) -> Tensor:
    """x (N, D), keys from ``memory`` (M, D) or x itself -> (N, D). T5 does not scale its scores."""
    heads, width = module.n_heads, module.key_value_proj_dim
    queries = module.q(x)
    over = x if memory is None else memory
    keys, values = module.k(over), module.v(over)

    def padded(flat: Tensor, group: Group) -> Tensor:
        rows, size = group.places.shape
        return flat[group.places.flatten()].view(rows, size, heads, width).transpose(1, 2)

    parts = []
    for (mine, theirs), bias in zip(pairs, biases, strict=True):
        scores = torch.matmul(padded(queries, mine), padded(keys, theirs).transpose(2, 3)) + bias
        weights = dropout(torch.softmax(scores, dim=-1), p, training)
        seen = torch.matmul(weights, padded(values, theirs)).transpose(1, 2)  # (B, S, H, K)
        parts.append(seen.reshape(-1, heads * width)[mine.flat])
    return module.o(torch.cat(parts))


def _feed_forward(module: Any, x: Tensor, p: float, training: bool) -> Tensor:
    """x (N, D) -> (N, D): T5's dense layer, gated in v1.1."""
    if hasattr(module, "wi_0"):
        inner = module.act(module.wi_0(x)) * module.wi_1(x)
    else:
        inner = module.act(module.wi(x))
    return module.wo(dropout(inner, p, training))
