"""A batch through a model: what each view's targets come to, and what the terms of the loss need beside it.

Student and local teachers share their vocabulary, so that place m of one's tokens is place m of the other's, padded or not.
Shapes: N tokens of all inputs, each input once; M_v target tokens of view v, M of all views in the batch's order; V vocabulary
entries, D = d_model, B rows of the first view, L labels of the task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsbs.students import start_token
from dsbs.training.encode import PackedBatch, pad
from dsbs.training.losses import IGNORED
from dsbs.training.methods import View
from dsbs.training.packed.t5 import TargetBlock, logits_of

Batch = Mapping[str, PackedBatch]


@dataclass(frozen=True, slots=True)
class ForwardOutput:
    """What a model made of a batch. The hidden states are those after each layer, from the first; none: not asked for."""

    logits: dict[str, Tensor]  # of each view (M_v, V)
    encoder: list[Tensor]  # of each layer (N, D)
    decoder: list[Tensor]  # of each layer (M, D)
    labels: (
        Tensor | None
    )  # (B, L): log-probability of each label's text, in nats; None: not asked for, or no row has a label


@dataclass(frozen=True, slots=True)
class Inputs:
    """The inputs that a batch's rows read, each once: their ids, whether a row that teaches reads it, and who reads which."""

    ids: list[Tensor]
    taught: list[bool]
    places: dict[str, list[int]]  # of each view's rows among ``ids``

    @property
    def lengths(self) -> list[int]:
        return [len(one) for one in self.ids]


def unique_inputs(batch: Batch, prefixes: Mapping[str, str]) -> Inputs:
    """An example's rows that are told the same prefix read the same input."""
    found: dict[tuple[str, int], int] = {}
    ids: list[Tensor] = []
    taught: list[bool] = []
    places: dict[str, list[int]] = {}
    for name, flat in batch.items():
        places[name] = []
        sources = torch.split(flat.source, flat.source_lengths.tolist())
        for row, source, real in zip(
            flat.rows.tolist(), sources, supervised_rows(flat).tolist(), strict=True
        ):
            place = found.setdefault((prefixes[name], row), len(ids))
            if place == len(ids):
                ids.append(source)
                taught.append(False)
            taught[place] |= real
            places[name].append(place)
    return Inputs(ids, taught, places)


def supervised_rows(flat: PackedBatch) -> Tensor:
    """(B,) False for the empty rows that processes are evened with."""
    real: Tensor = flat.target[flat.target_lengths.cumsum(0) - 1] != IGNORED
    return real


class ForwardRunner:
    """One model's way to read batches of ``views``: in one go without padding, or view by view with it.

    ``labels`` are the texts' token ids whose log-probabilities are asked for, from the first view's inputs and start.
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
        self._model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._plain: Callable[..., Any] = model.forward  # before anybody teaches it more
        self._starts: dict[str, int] = {
            view.target: start_token(model.config, view.start) for view in views
        }
        self._prefixes: dict[str, str] = {view.target: view.prefix for view in views}
        self._first = views[0].target
        self._without_padding, self._hidden = without_padding, hidden_states
        self._labels = [torch.as_tensor(one, dtype=torch.long) for one in labels]

    def __call__(self, batch: Batch) -> ForwardOutput:
        inputs = unique_inputs(batch, self._prefixes)
        return (
            self._at_once(batch, inputs) if self._without_padding else self._padded(batch, inputs)
        )

    def _at_once(self, batch: Batch, inputs: Inputs) -> ForwardOutput:
        """Every view's rows through the model together; a row is encoded once for all that is written from the same prefix."""
        flats = list(batch.values())
        targets = [flat.target for flat in flats]
        writing = [n for flat in flats for n in flat.target_lengths.tolist()]
        parts = []
        for name, flat in batch.items():
            reads: list[int] = []
            before = -1
            for row, place in zip(flat.rows.tolist(), inputs.places[name], strict=True):
                if row <= before:  # the rows' second targets begin
                    parts.append(TargetBlock(reads, self._starts[name]))
                    reads = []
                before = row
                reads.append(place)
            parts.append(TargetBlock(reads, self._starts[name]))
        asking = inputs.places.get(self._first, []) if self._labels else []
        for label in self._labels if asking else ():
            targets.append(label.to(targets[0].device).repeat(len(asking)))
            writing += [len(label)] * len(asking)
            parts.append(TargetBlock(asking, self._starts[self._first]))
        states: tuple[list[Tensor], list[Tensor]] | None = ([], []) if self._hidden else None
        made = logits_of(
            self._model,
            torch.cat(inputs.ids),
            inputs.lengths,
            torch.cat(targets),
            writing,
            parts,
            states,
        )
        logits = torch.split(made, [len(target) for target in targets])
        inside, outside = states or ([], [])
        tokens = sum(len(flat.target) for flat in flats)
        return ForwardOutput(
            dict(zip(batch, logits, strict=False)),
            inside,
            [one[:tokens] for one in outside],
            self._scores(logits[len(flats) :], len(asking)) if asking else None,
        )

    def _padded(self, batch: Batch, inputs: Inputs) -> ForwardOutput:
        logits, inside, outside, labels = {}, [], [], None
        known = 0
        for name, flat in batch.items():
            padded = pad(flat, self._model.config.pad_token_id, self._starts[name])
            padded.pop("labels")
            made = (
                self._plain(**padded, output_hidden_states=True)
                if self._hidden
                else self._plain(**padded)
            )
            written = _real(flat.target_lengths)
            logits[name] = made.logits[written]
            if self._hidden:
                places = inputs.places[name]
                new = [
                    i
                    for i, place in enumerate(places)
                    if place >= known and place not in places[:i]
                ]
                read = _real(flat.source_lengths)[new]
                inside.append([layer[new][read] for layer in made.encoder_hidden_states[1:]])
                outside.append([layer[written] for layer in made.decoder_hidden_states[1:]])
                known = max(known, *(place + 1 for place in places))
            if name == self._first and self._labels:
                labels = self._padded_labels(
                    made.encoder_last_hidden_state, padded["attention_mask"]
                )
        return ForwardOutput(
            logits,
            [torch.cat(views) for views in zip(*inside, strict=True)],
            [torch.cat(views) for views in zip(*outside, strict=True)],
            labels,
        )

    def _padded_labels(self, memory: Tensor, mask: Tensor) -> Tensor:
        from transformers.modeling_outputs import BaseModelOutput

        rows, found = len(memory), []
        for label in self._labels:
            begins = torch.tensor(
                [self._starts[self._first], *label[:-1].tolist()], device=memory.device
            )
            made = self._plain(
                encoder_outputs=BaseModelOutput(last_hidden_state=memory),
                attention_mask=mask,
                decoder_input_ids=begins.expand(rows, -1),
                use_cache=False,
            )
            found.append(made.logits.flatten(0, 1))
        return self._scores(found, rows)

    def _scores(self, logits: Sequence[Tensor], rows: int) -> Tensor:
        """For each label its rows' logits (B · T, V) -> (B, L)."""
        scores = []
        for label, of in zip(self._labels, logits, strict=True):
            wanted = label.to(of.device).repeat(rows)
            scores.append(
                -torch.nn.functional.cross_entropy(of.float(), wanted, reduction="none")
                .view(rows, -1)
                .sum(1)
            )
        return torch.stack(scores, dim=1)


def _real(lengths: Tensor) -> Tensor:
    """lengths (B,) -> (B, S): True at what is no padding."""
    return torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]


def row_means(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """states (N, D), rows of ``lengths`` one after another -> (B, D): each row's mean over its tokens."""
    rows = pad_sequence(list(torch.split(states, list(lengths))), batch_first=True)
    return rows.sum(1) / torch.as_tensor(lengths, device=states.device)[:, None]
