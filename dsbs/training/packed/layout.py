"""Groups of rows of similar length: the way from packed tokens to small padded batches and back.

Layers that see each token alone run on packed tokens; attention runs on the groups, padded to their
longest row. This saves the arithmetic on padding and, on a CPU, most of the cost of drawing dropout
masks.

Shapes: N tokens of all rows, W width, H heads, K width of a head. Attention pads rows of similar
length into groups of B rows by S slots; P is the number of slots in all groups together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from dsbs.training.encode import PackedBatch

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

    def pad(self, x: Tensor) -> tuple[Tensor, ...]:
        """x (N, W) -> by group (B, S, W), zeros at padding."""
        padded = _Pad.apply(x, self.tokens, self.slots, self.size)
        chunks = torch.split(padded, [group.rows * group.size for group in self.groups])
        return tuple(
            chunk.view(group.rows, group.size, -1)
            for chunk, group in zip(chunks, self.groups, strict=True)
        )

    def unpad(self, groups: Sequence[Tensor]) -> Tensor:
        """The inverse of ``pad``: by group (B · S, W) -> (N, W)."""
        packed: Tensor = _Unpad.apply(torch.cat(list(groups)), self.tokens, self.slots)
        return packed

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


def row_starts(lengths: Sequence[int]) -> list[int]:
    """The first packed token of each row."""
    starts: list[int] = []
    total = 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts


def layout_by_length(lengths: Sequence[int], device: torch.device) -> GroupLayout:
    """Rows of ``lengths`` in groups of similar length."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    bounds = group_by_length([lengths[row] for row in order])
    return layout_groups(lengths, row_starts(lengths), order, bounds).to(device)


def decoder_layouts(
    input_lengths: Sequence[int],
    target_lengths: Sequence[int],
    input_rows: Sequence[int],
    blocks: Sequence[Sequence[int]],
    device: torch.device,
) -> tuple[GroupLayout, list[GroupLayout]]:
    """The target rows in groups, and the inputs that they read in the order of these groups.

    ``input_rows`` are the input rows that the target rows read. ``blocks`` hold the target rows; no
    two of a block read the same input, so that each layout of inputs has a token once.
    """
    input_starts = row_starts(input_lengths)
    read_lengths = [input_lengths[row] for row in input_rows]
    read_starts = [input_starts[row] for row in input_rows]
    order: list[int] = []
    bounds: list[slice] = []
    read_layouts: list[GroupLayout] = []
    for block in blocks:
        first = len(order)
        rows = sorted(block, key=lambda row: (target_lengths[row], read_lengths[row]))
        block_bounds = group_by_length([target_lengths[row] for row in rows])
        layout = layout_groups(read_lengths, read_starts, rows, block_bounds)
        read_layouts.append(layout.to(device))
        order += rows
        bounds += [slice(first + bound.start, first + bound.stop) for bound in block_bounds]
    targets = layout_groups(target_lengths, row_starts(target_lengths), order, bounds)
    return targets.to(device), read_layouts


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows in groups of similar length, each group in ascending order."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [sorted(order[bound]) for bound in group_by_length([lengths[i] for i in order])]


def distinct_blocks(inputs: Sequence[int]) -> list[list[int]]:
    """Indices of target rows in blocks in which no two share one of ``inputs``."""
    blocks: list[list[int]] = []
    counts: dict[int, int] = {}
    for row, index in enumerate(inputs):
        block = counts.get(index, 0)
        counts[index] = block + 1
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(row)
    return blocks


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


def additive_mask(real: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, S) -> (B, S): 0 at real slots, the lowest number at padding."""
    return torch.zeros(real.shape, dtype=dtype, device=real.device).masked_fill_(
        ~real, torch.finfo(dtype).min
    )


def attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, p: float, training: bool
) -> Tensor:
    """query (B, H, S, K), key and value (B, H, T, K) of one group -> (B · S, H · K).

    ``bias`` is added to the scores, which are not scaled.
    """
    scores = torch.matmul(query, key.transpose(2, 3))
    if bias is not None:
        scores = scores + bias
    weights = dropout(torch.softmax(scores, dim=-1), p, training)
    attended = torch.matmul(weights, value).transpose(1, 2)
    return attended.reshape(-1, query.shape[1] * query.shape[3])


# --- windows of long texts


def first_windows(packed: PackedBatch) -> Tensor:
    """The index of each row's first sequence, in the order of the rows' first ones."""
    first: dict[int, int] = {}
    for index, row in enumerate(packed.rows.tolist()):
        first.setdefault(row, index)
    return torch.tensor(list(first.values()), device=packed.target.device)


def row_logits(logits: Tensor, packed: PackedBatch) -> Tensor:
    """Of a row's windows, the mean of their logits by tokens: (windows, L) -> (rows, L).

    The classifier is linear, so that this is the classifier of the tokens' mean state.
    """
    rows = packed.rows.tolist()
    slot_of = {row: slot for slot, row in enumerate(dict.fromkeys(rows))}
    slots = torch.tensor([slot_of[row] for row in rows], device=logits.device)
    lengths = packed.source_lengths.to(logits)[:, None]
    total = logits.new_zeros(len(slot_of), logits.shape[1]).index_add(0, slots, logits * lengths)
    return total / logits.new_zeros(len(slot_of), 1).index_add(0, slots, lengths)
