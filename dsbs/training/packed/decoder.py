"""Decoder-only students: a row is its prompt and its target after it, and only what the target's tokens cost is learned from.

Shapes: N tokens of a batch's prompts, M of its targets, V vocabulary entries, D hidden size.
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
from dsbs.training.packed.t5 import cut

Row = tuple[Tensor, Tensor]  # ids of prompt and target


def is_decoder_only(model: Any) -> bool:
    """Whether a model is a decoder alone; LoRA around one is."""
    return not model.config.is_encoder_decoder


def logits_of(model: Any, flat: PackedBatch, *, without_padding: bool) -> Tensor:
    """A view's batch, source (N,) and target (M,) -> logits (M, V) of its target tokens, teacher-forced, in their order."""
    rows = _rows(flat)
    found: list[Tensor] = [flat.target] * len(rows)
    for group in _groups(rows, without_padding):
        logits = _logits(model, [rows[i] for i in group])
        for i, part in zip(
            group, torch.split(logits, [len(rows[i][1]) for i in group]), strict=True
        ):
            found[i] = part
    return torch.cat(found)


def summed_losses(
    model: Any, batch: Mapping[str, PackedBatch], *, without_padding: bool
) -> dict[str, Tensor]:
    """Each view's summed cross-entropy () in nats over its target tokens, the end tokens among them.

    ``without_padding`` puts all views' rows of like lengths together, which leaves next to none; else each view is one
    padded batch.
    """
    found: dict[str, Tensor] = {}
    together: list[tuple[str, Row]] = [
        (name, row) for name, flat in batch.items() for row in _rows(flat)
    ]
    named = (
        [together]
        if without_padding
        else [[one for one in together if one[0] == name] for name in batch]
    )
    for some in named:
        for group in _groups([row for _, row in some], without_padding):
            rows = [some[i] for i in group]
            logits = _logits(model, [row for _, row in rows])
            at = 0
            for name in dict.fromkeys(
                name for name, _ in rows
            ):  # a group keeps its rows' order: a view's are neighbours
                target = torch.cat([row[1] for of, row in rows if of == name])
                nll = summed_nll(logits[at : at + len(target)], target)
                found[name] = found[name] + nll if name in found else nll
                at += len(target)
    return found


def _rows(flat: PackedBatch) -> list[Row]:
    sources = torch.split(flat.source, flat.source_lengths.tolist())
    targets = torch.split(flat.target, flat.target_lengths.tolist())
    return list(zip(sources, targets, strict=True))


def _groups(rows: Sequence[Row], without_padding: bool) -> Iterator[list[int]]:
    """Places of the rows that go through the model together, each group in the rows' order."""
    if not without_padding:
        yield list(range(len(rows)))
        return
    lengths = [len(source) + len(target) for source, target in rows]
    order = sorted(range(len(rows)), key=lengths.__getitem__)
    for part in cut([lengths[i] for i in order]):
        yield sorted(order[part])


def _logits(model: Any, rows: Sequence[Row]) -> Tensor:
    """Rows padded on the right -> logits (M, V) of their target tokens.

    No mask is needed: what is real sees only what is before it, and padding lies behind.
    """
    ids = pad_sequence(
        [torch.cat([source, target[:-1]]) for source, target in rows], batch_first=True
    )
    says = torch.zeros_like(ids, dtype=torch.bool)  # where the next token is a target's
    for place, (source, target) in zip(says, rows, strict=True):
        place[len(source) - 1 : len(source) + len(target) - 1] = True
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    with _only(inner.get_output_embeddings(), says):
        logits: Tensor = model(input_ids=ids.masked_fill(ids == IGNORED, 0), use_cache=False).logits
    return logits


@contextmanager
def _only(head: Any, places: Tensor) -> Iterator[None]:
    """Let a model's head see the ``places`` (B, L) of its hidden states (B, L, D) alone: prompts have no use for their logits,
    which are the most of what a step would keep in memory.
    """
    hook = head.register_forward_pre_hook(lambda _, given: (given[0][places],))
    try:
        yield
    finally:
        hook.remove()
