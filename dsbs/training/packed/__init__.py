"""Packed batches: per-view logits, losses, hidden states and label scores, with little or no
padding.

Student and local teachers share a vocabulary, so that token m is the same token in every model's
output, with padding or without.

Shapes: N tokens of all distinct inputs, M_v target tokens of view v, M of all views in the batch's
order, V vocabulary entries, D = d_model, B rows of the first view, L labels of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from dsbs.students.formats import start_token
from dsbs.training.distillation import as_float
from dsbs.training.encode import PackedBatch, pad, supervised_rows
from dsbs.training.methods import View
from dsbs.training.packed.layout import distinct_blocks
from dsbs.training.packed.t5 import TargetBlock, packed_logits, without_wrapper

Batch = Mapping[str, PackedBatch]  # by view


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """A model's output for one batch."""

    logits: dict[str, Tensor]
    """By view, (M_v, V)."""
    encoder_states: list[Tensor]
    """(N, D) of the input tokens after each layer, in order; empty unless requested."""
    decoder_states: list[Tensor]
    """(M, D) of the target tokens after each layer, in order; empty unless requested."""
    label_scores: Tensor | None
    """(B, L) log-probability of each label's text in nats; None unless requested, and without a row
    of the first view. Of a head for several labels a row (B * L, 2): of yes and of no, for each
    label of each row."""
    inputs: DistinctInputs
    """The inputs of ``encoder_states``."""
    first_view: str

    def example_means(self, layer: int) -> Tensor:
        """(E, D): the mean over its input's tokens of each example of the first view, once."""
        means = row_means(self.encoder_states[layer], self.inputs.lengths)
        return means[self.inputs.examples(self.first_view)]

    def states(self, stack: Literal["encoder", "decoder"]) -> list[Tensor]:
        return self.encoder_states if stack == "encoder" else self.decoder_states


@dataclass(frozen=True, slots=True)
class DistinctInputs:
    """The inputs of a batch, each once, although several target rows may read one."""

    ids: list[Tensor]
    is_supervised: list[bool]
    """Whether a row that is not a filler reads the input."""
    indices: dict[str, list[int]]
    """By view, the index among ``ids`` of each row's input."""

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def examples(self, view: str) -> list[int]:
        """The indices of the inputs that a view's rows read, without fillers, each once."""
        indices = dict.fromkeys(self.indices.get(view, ()))
        return [index for index in indices if self.is_supervised[index]]


def distinct_inputs(batch: Batch, views: Sequence[View]) -> DistinctInputs:
    """The distinct inputs of a batch: rows of one example with the same prefix share theirs."""
    prefixes: dict[str, str] = {view.target: view.prefix for view in views}
    index_of: dict[tuple[str, int], int] = {}
    ids: list[Tensor] = []
    is_supervised: list[bool] = []
    indices: dict[str, list[int]] = {}
    for view, packed in batch.items():
        indices[view] = []
        sources = torch.split(packed.source, packed.source_lengths.tolist())
        supervised = supervised_rows(packed).tolist()
        rows = zip(packed.rows.tolist(), sources, supervised, strict=True)
        for row, source, row_is_supervised in rows:
            index = index_of.setdefault((prefixes[view], row), len(ids))
            if index == len(ids):
                ids.append(source)
                is_supervised.append(False)
            is_supervised[index] |= row_is_supervised
            indices[view].append(index)
    return DistinctInputs(ids, is_supervised, indices)


class ForwardRunner:
    """Runs one model on batches of ``views``: packed in one pass, or padded view by view.

    ``labels`` are the token ids of the label texts to score, after the first view's inputs and
    decoder start.
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
        self._model = without_wrapper(model)
        self._forward: Callable[..., Any] = model.forward  # before the trainer replaces it
        self._starts: dict[str, int] = {
            view.target: start_token(model.config, view.start) for view in views
        }
        self._views = views
        self._first = views[0].target
        self._without_padding = without_padding
        self._hidden_states = hidden_states
        self._labels = [torch.as_tensor(ids, dtype=torch.long) for ids in labels]

    def __call__(self, batch: Batch) -> ForwardOutput:
        inputs = distinct_inputs(batch, self._views)
        if self._without_padding:
            return self._packed(batch, inputs)
        return self._padded(batch, inputs)

    # --- packed

    def _packed(self, batch: Batch, inputs: DistinctInputs) -> ForwardOutput:
        """All views in one pass; an input is encoded once for all targets that read it."""
        targets = [packed.target for packed in batch.values()]
        tokens = sum(len(target) for target in targets)
        lengths = [n for packed in batch.values() for n in packed.target_lengths.tolist()]
        blocks: list[TargetBlock] = []
        for view in batch:
            indices = inputs.indices[view]
            for block in distinct_blocks(indices):  # the rows' second targets follow all first ones
                block_inputs = [indices[row] for row in block]
                blocks.append(TargetBlock(block_inputs, self._starts[view]))
        scored_inputs = inputs.indices.get(self._first, []) if self._labels else []
        if scored_inputs:
            for label in self._labels:
                targets.append(label.to(targets[0].device).repeat(len(scored_inputs)))
                lengths += [len(label)] * len(scored_inputs)
                blocks.append(TargetBlock(scored_inputs, self._starts[self._first]))
        encoder_states: list[Tensor] = []
        decoder_states: list[Tensor] = []
        all_logits = packed_logits(
            self._model,
            torch.cat(inputs.ids),
            inputs.lengths,
            torch.cat(targets),
            lengths,
            blocks,
            (encoder_states, decoder_states) if self._hidden_states else None,
        )
        logits = torch.split(all_logits, [len(target) for target in targets])
        label_scores = None
        if scored_inputs:
            label_scores = self._label_scores(logits[len(batch) :], len(scored_inputs))
        return ForwardOutput(
            dict(zip(batch, logits, strict=False)),
            encoder_states,
            [layer[:tokens] for layer in decoder_states],
            label_scores,
            inputs,
            self._first,
        )

    # --- padded

    def _padded(self, batch: Batch, inputs: DistinctInputs) -> ForwardOutput:
        logits: dict[str, Tensor] = {}
        encoder_states: list[list[Tensor]] = []
        decoder_states: list[list[Tensor]] = []
        label_scores = None
        seen_inputs = 0
        for view, packed in batch.items():
            padded = pad(packed, self._model.config.pad_token_id, self._starts[view])
            padded.pop("labels")
            extra = {"output_hidden_states": True} if self._hidden_states else {}
            output = self._forward(**padded, **extra)
            target_mask = _length_mask(packed.target_lengths)
            logits[view] = output.logits[target_mask]
            if self._hidden_states:
                indices = inputs.indices[view]
                new_rows = [
                    row
                    for row, index in enumerate(indices)
                    if index >= seen_inputs and index not in indices[:row]
                ]
                source_mask = _length_mask(packed.source_lengths)[new_rows]
                encoder_states.append(
                    [layer[new_rows][source_mask] for layer in output.encoder_hidden_states[1:]]
                )
                decoder_states.append(
                    [layer[target_mask] for layer in output.decoder_hidden_states[1:]]
                )
                seen_inputs = max(seen_inputs, *(index + 1 for index in indices))
            if view == self._first and self._labels:
                label_scores = self._padded_label_scores(
                    output.encoder_last_hidden_state, padded["attention_mask"]
                )
        return ForwardOutput(
            logits,
            [torch.cat(layers) for layers in zip(*encoder_states, strict=True)],
            [torch.cat(layers) for layers in zip(*decoder_states, strict=True)],
            label_scores,
            inputs,
            self._first,
        )

    def _padded_label_scores(self, memory: Tensor, mask: Tensor) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        rows = len(memory)
        logits: list[Tensor] = []
        for label in self._labels:
            start = self._starts[self._first]
            decoder_input = torch.tensor([start, *label[:-1].tolist()], device=memory.device)
            output = self._forward(
                encoder_outputs=BaseModelOutput(last_hidden_state=memory),
                attention_mask=mask,
                decoder_input_ids=decoder_input.expand(rows, -1),
                use_cache=False,
            )
            logits.append(output.logits.flatten(0, 1))
        return self._label_scores(logits, rows)

    def _label_scores(self, logits: Sequence[Tensor], rows: int) -> Tensor:
        """By label, the logits (B · T, V) of its T tokens after each row -> (B, L)."""
        scores: list[Tensor] = []
        for label, label_logits in zip(self._labels, logits, strict=True):
            target = label.to(label_logits.device).repeat(rows)
            nll = cross_entropy(as_float(label_logits), target, reduction="none")
            scores.append(-nll.view(rows, -1).sum(1))
        return torch.stack(scores, dim=1)


def _length_mask(lengths: Tensor) -> Tensor:
    """lengths (B,) -> (B, S): False at padding."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def row_means(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """states (N, D) of packed rows of ``lengths`` -> (B, D): each row's mean over its tokens."""
    rows = pad_sequence(list(torch.split(states, list(lengths))), batch_first=True)
    return rows.sum(1) / torch.as_tensor(lengths, device=states.device)[:, None]


def is_decoder_only(model: Any) -> bool:
    """Whether a model, or the one inside LoRA's wrapper, has no encoder."""
    return not model.config.is_encoder_decoder
