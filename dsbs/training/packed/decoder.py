"""Decoder-only models on packed batches: losses of target tokens, logits, hidden states, label
scores.

A row is its prompt followed by its target, and rows of similar length go through the model
together. Padding comes last, where no real token attends, so no attention mask is needed.

Shapes: B rows padded to S tokens, N tokens of all distinct prompts, M_v target tokens of view v, M
of all views in the batch's order, V vocabulary entries, D hidden size, L labels of the task.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from dsbs.training.distillation import as_float
from dsbs.training.encode import PackedBatch
from dsbs.training.losses import IGNORED, summed_nll
from dsbs.training.methods import View
from dsbs.training.packed import Batch, DistinctInputs, ForwardOutput, distinct_inputs
from dsbs.training.packed.layout import similar_lengths
from dsbs.training.packed.t5 import without_wrapper

Row = tuple[Tensor, Tensor]  # ids of prompt and target


class DecoderRunner:
    """Runs one decoder-only model on batches of ``views``.

    ``labels`` are the token ids of the label texts to score, each after the first view's prompts.
    """

    def __init__(
        self,
        model: Any,
        views: Sequence[View],
        *,
        without_padding: bool,
        hidden_states: bool = False,
        labels: Sequence[Sequence[int]] = (),
    ) -> None:
        self._model = model
        self._views = views
        self._first = views[0].target
        self._without_padding = without_padding
        self._hidden_states = hidden_states
        self._labels = [torch.as_tensor(ids, dtype=torch.long) for ids in labels]

    def __call__(self, batch: Batch) -> ForwardOutput:
        """The logits and states that predict each target token; a prompt's states are those of its
        own tokens.
        """
        inputs = distinct_inputs(batch, self._views)
        rows = [row for packed in batch.values() for row in _rows(packed)]
        groups = list(_groups(batch, self._without_padding))
        logits: list[Tensor] = []
        prompt_states: list[list[Tensor]] = []
        target_states: list[list[Tensor]] = []
        prompts = _prompt_lengths(batch, inputs)
        for group in groups:
            group_logits, layers = _group_output(
                self._model, [rows[i] for i in group], hidden_states=self._hidden_states
            )
            logits.append(group_logits)
            if layers:
                reads = torch.tensor([prompts[i] for i in group], device=layers[0].device)
                is_prompt = torch.arange(layers[0].shape[1], device=reads.device) < reads[:, None]
                predicts = _predicts_target([rows[i] for i in group], layers[0])
                prompt_states.append([layer[is_prompt] for layer in layers])
                target_states.append([layer[predicts] for layer in layers])
        targets = [len(target) for _, target in rows]
        all_logits = _in_order(groups, logits, targets)
        view_tokens = [len(packed.target) for packed in batch.values()]
        return ForwardOutput(
            logits=dict(zip(batch, torch.split(all_logits, view_tokens), strict=True)),
            encoder_states=[
                _in_order(groups, layer, prompts) for layer in zip(*prompt_states, strict=True)
            ],
            decoder_states=[
                _in_order(groups, layer, targets) for layer in zip(*target_states, strict=True)
            ],
            label_scores=self._label_scores(batch.get(self._first)),
            inputs=inputs,
            first_view=self._first,
        )

    def _label_scores(self, packed: PackedBatch | None) -> Tensor | None:
        """(B, L) log-probabilities of the label texts after each prompt of the first view."""
        if packed is None or not self._labels:
            return None
        labels = [label.to(packed.target.device) for label in self._labels]
        rows = [(prompt, label) for prompt, _ in _rows(packed) for label in labels]
        groups = [list(range(len(rows)))]
        if self._without_padding:
            groups = similar_lengths(_lengths(rows))
        scores: list[Tensor] = []
        for group in groups:
            logits, _ = _group_output(self._model, [rows[i] for i in group])
            targets = [rows[i][1] for i in group]
            nll = cross_entropy(as_float(logits), torch.cat(targets), reduction="none")
            lengths = torch.tensor([len(target) for target in targets], device=nll.device)
            row_of = torch.arange(len(group), device=nll.device).repeat_interleave(lengths)
            scores.append(-nll.new_zeros(len(group)).index_add(0, row_of, nll))
        flat = _in_order(groups, scores, [1] * len(rows))
        return flat.view(-1, len(labels))


def summed_losses(
    model: Any, batch: Mapping[str, PackedBatch], *, without_padding: bool
) -> dict[str, Tensor]:
    """By view, the summed cross-entropy () in nats of its target tokens, end tokens included.

    ``without_padding`` groups the rows of all views by length, which leaves almost no padding;
    otherwise each view is one padded batch.
    """
    rows = [(view, row) for view, packed in batch.items() for row in _rows(packed)]
    losses: dict[str, Tensor] = {}
    for group in _groups(batch, without_padding):
        group_rows = [rows[i] for i in group]
        logits, _ = _group_output(model, [row for _, row in group_rows])
        first = 0
        # a group keeps the order of its rows, so that those of one view are neighbors
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


def _prompt_lengths(batch: Batch, inputs: DistinctInputs) -> list[int]:
    """Of each row its prompt's tokens, and 0 for the rows whose prompt an earlier row has read."""
    lengths: list[int] = []
    already_read: set[int] = set()
    for view in batch:
        for index in inputs.indices[view]:
            lengths.append(0 if index in already_read else inputs.lengths[index])
            already_read.add(index)
    return lengths


def _groups(batch: Batch, without_padding: bool) -> Iterator[list[int]]:
    """Indices of the rows that go through the model together, each group in ascending order."""
    if without_padding:
        rows = [row for packed in batch.values() for row in _rows(packed)]
        yield from similar_lengths(_lengths(rows))
        return
    first = 0
    for packed in batch.values():
        yield list(range(first, first + len(packed.rows)))
        first += len(packed.rows)


def _lengths(rows: Sequence[Row]) -> list[int]:
    return [len(source) + len(target) for source, target in rows]


def _in_order(
    groups: Sequence[list[int]], outputs: Sequence[Tensor], lengths: Sequence[int]
) -> Tensor:
    """The outputs of all groups in the order of their rows, each of which has its ``lengths``."""
    if len(groups) == 1:
        return outputs[0]
    pieces: dict[int, Tensor] = {}
    for group, output in zip(groups, outputs, strict=True):
        pieces |= zip(group, torch.split(output, [lengths[i] for i in group]), strict=True)
    return torch.cat([pieces[i] for i in range(len(lengths))])


def _group_output(
    model: Any, rows: Sequence[Row], *, hidden_states: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """Rows padded on the right -> logits (M, V) of their target tokens, and states (B, S, D) after
    each layer, where requested.
    """
    ids = pad_sequence(
        [torch.cat([source, target[:-1]]) for source, target in rows], batch_first=True
    )
    options = {"output_hidden_states": True} if hidden_states else {}
    with _head_on(_predicts_target(rows, ids), without_wrapper(model).get_output_embeddings()):
        output = model(input_ids=ids.masked_fill(ids == IGNORED, 0), use_cache=False, **options)
    return output.logits, list(output.hidden_states[1:]) if hidden_states else []


def _predicts_target(rows: Sequence[Row], padded: Tensor) -> Tensor:
    """padded (B, S, ...) -> (B, S): the positions whose next token is a target's."""
    predicts = torch.zeros(padded.shape[:2], dtype=torch.bool, device=padded.device)
    for row_mask, (source, target) in zip(predicts, rows, strict=True):
        row_mask[len(source) - 1 : len(source) + len(target) - 1] = True
    return predicts


@contextmanager
def _head_on(selected: Tensor, head: Any) -> Iterator[None]:
    """Apply a model's head to the ``selected`` (B, S) hidden states of (B, S, D) only.

    The logits of prompts would take most of a step's memory, and nothing uses them.
    """
    hook = head.register_forward_pre_hook(lambda _module, inputs: (inputs[0][selected],))
    try:
        yield
    finally:
        hook.remove()
