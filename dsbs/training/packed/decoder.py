"""Decoder-only students: the logits and losses of target tokens only.

A row is its prompt followed by its target. Rows of similar length go through the model together.

Shapes: N prompt tokens and M target tokens of a packed batch, V vocabulary entries, B rows of a
group padded to L tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsbs.training.encode import PackedBatch
from dsbs.training.losses import IGNORED, summed_nll
from dsbs.training.packed.t5 import group_by_length, without_wrapper

Row = tuple[Tensor, Tensor]  # ids of prompt and target


def is_decoder_only(model: Any) -> bool:
    """Whether a model, or the one inside LoRA's wrapper, has no encoder."""
    return not model.config.is_encoder_decoder


def target_logits(model: Any, batch: PackedBatch, *, without_padding: bool) -> Tensor:
    """One view's N prompt and M target tokens -> logits (M, V), teacher-forced, in their order."""
    rows = _rows(batch)
    logits: list[Tensor] = [batch.target] * len(rows)
    for group in _groups(rows, without_padding):
        group_logits = _group_logits(model, [rows[i] for i in group])
        lengths = [len(rows[i][1]) for i in group]
        for i, row_logits in zip(group, torch.split(group_logits, lengths), strict=True):
            logits[i] = row_logits
    return torch.cat(logits)


def summed_losses(
    model: Any, batch: Mapping[str, PackedBatch], *, without_padding: bool
) -> dict[str, Tensor]:
    """By view, the summed cross-entropy () in nats of its target tokens, end tokens included.

    ``without_padding`` groups the rows of all views by length, which leaves almost no padding;
    otherwise each view is one padded batch.
    """
    rows = [(view, row) for view, packed in batch.items() for row in _rows(packed)]
    if without_padding:
        passes = [rows]
    else:
        passes = [[row for row in rows if row[0] == view] for view in batch]
    losses: dict[str, Tensor] = {}
    for pass_rows in passes:
        for group in _groups([row for _, row in pass_rows], without_padding):
            group_rows = [pass_rows[i] for i in group]
            logits = _group_logits(model, [row for _, row in group_rows])
            first = 0
            # a group keeps the order of its rows, so that those of one view are neighbours
            for view in dict.fromkeys(view for view, _ in group_rows):
                target = torch.cat([row[1] for row_view, row in group_rows if row_view == view])
                nll = summed_nll(logits[first : first + len(target)], target)
                losses[view] = losses[view] + nll if view in losses else nll
                first += len(target)
    return losses


def _rows(batch: PackedBatch) -> list[Row]:
    sources = torch.split(batch.source, batch.source_lengths.tolist())
    targets = torch.split(batch.target, batch.target_lengths.tolist())
    return list(zip(sources, targets, strict=True))


def _groups(rows: Sequence[Row], without_padding: bool) -> Iterator[list[int]]:
    """Indices of the rows that go through the model together, each group in ascending order."""
    if not without_padding:
        yield list(range(len(rows)))
        return
    lengths = [len(source) + len(target) for source, target in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for bound in group_by_length([lengths[i] for i in order]):
        yield sorted(order[bound])


def _group_logits(model: Any, rows: Sequence[Row]) -> Tensor:
    """Rows padded on the right -> logits (M, V) of their target tokens.

    No attention mask is needed: padding comes last, where no real token attends.
    """
    ids = pad_sequence(
        [torch.cat([source, target[:-1]]) for source, target in rows], batch_first=True
    )
    predicts_target = torch.zeros_like(ids, dtype=torch.bool)
    for row_mask, (source, target) in zip(predicts_target, rows, strict=True):
        row_mask[len(source) - 1 : len(source) + len(target) - 1] = True
    with _head_on(predicts_target, without_wrapper(model).get_output_embeddings()):
        logits: Tensor = model(input_ids=ids.masked_fill(ids == IGNORED, 0), use_cache=False).logits
    return logits


@contextmanager
def _head_on(selected: Tensor, head: Any) -> Iterator[None]:
    """Apply a model's head to the ``selected`` (B, L) hidden states of (B, L, D) only.

    The logits of prompts would take most of a step's memory, and nothing uses them.
    """
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][selected],))
    try:
        yield
    finally:
        hook.remove()
