"""Label heads in training: class and rationale losses of a batch from shared states.

Every distinct input is read once; label and rationale losses follow from the same states. Rows of
similar length go through the model together, so that little padding is computed.

Shapes: B rows of a group padded to S tokens, D hidden size, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsbs.students.heads import LabelHeadModel
from dsbs.training.encode import PackedBatch
from dsbs.training.losses import IGNORED, summed_nll
from dsbs.training.methods import View
from dsbs.training.packed import Batch, DistinctInputs, distinct_inputs
from dsbs.training.packed.t5 import group_by_length, without_wrapper


def has_label_head(model: Any) -> bool:
    """Whether a model, or the one inside LoRA's wrapper, chooses its label."""
    return isinstance(without_wrapper(model), LabelHeadModel)


class LabelHeadRunner:
    """Runs one model on batches of ``views`` and sums their losses."""

    def __init__(self, model: Any, views: Sequence[View], *, without_padding: bool) -> None:
        self._model: LabelHeadModel = without_wrapper(model)
        self._views = views
        self._without_padding = without_padding

    def summed_losses(self, batch: Batch) -> dict[str, Tensor]:
        """By view, the summed cross-entropy () in nats: of classes, or of target tokens."""
        inputs = distinct_inputs(batch, self._views)
        losses: dict[str, Tensor] = {}
        for group in self._groups(inputs):
            for view, loss in self._group_losses(batch, inputs, group).items():
                losses[view] = losses[view] + loss if view in losses else loss
        return losses

    def _groups(self, inputs: DistinctInputs) -> list[list[int]]:
        """Indices of the inputs that go through the model together."""
        lengths = inputs.lengths
        if not self._without_padding:
            return [list(range(len(lengths)))]
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        return [sorted(order[bound]) for bound in group_by_length([lengths[i] for i in order])]

    def _group_losses(
        self, batch: Batch, inputs: DistinctInputs, group: Sequence[int]
    ) -> dict[str, Tensor]:
        """By view, the loss of the rows that read the inputs of ``group``."""
        position = {index: place for place, index in enumerate(group)}
        rows: dict[str, list[int]] = {}
        for view, indices in inputs.indices.items():
            rows[view] = [row for row, index in enumerate(indices) if index in position]
        read_by = {
            view: [position[inputs.indices[view][row]] for row in view_rows]
            for view, view_rows in rows.items()
        }
        ids = [inputs.ids[index] for index in group]
        if self._model.architecture == "causal":
            return self._causal_losses(batch, ids, rows, read_by)
        padded, mask = _pad(ids)
        states = self._model.states(padded, mask)
        losses: dict[str, Tensor] = {}
        for view, view_rows in rows.items():
            if not view_rows:
                continue
            places = read_by[view]
            targets = _targets(batch[view], view_rows)
            if view == "label":
                logits = self._model.label_logits(states[places], mask[places])
                losses[view] = summed_nll(logits, torch.cat(targets))
            else:
                labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
                logits = self._model.rationale_logits(
                    states[places], mask[places], self._shifted(labels)
                )
                losses[view] = summed_nll(logits, labels)
        return losses

    def _shifted(self, labels: Tensor) -> Tensor:
        """Targets (B, T) -> the decoder's input (B, T): its start token, then all but the last."""
        shifted = labels.roll(1, dims=1).clamp(min=0)
        shifted[:, 0] = self._model.start
        return shifted

    def _causal_losses(
        self,
        batch: Batch,
        prompts: Sequence[Tensor],
        rows: Mapping[str, list[int]],
        read_by: Mapping[str, list[int]],
    ) -> dict[str, Tensor]:
        """A decoder's losses: a rationale follows its prompt, whose last state gives the label.

        No attention mask is needed: padding comes last, where no real token attends.
        """
        rationales: list[list[Tensor]] = [[] for _ in prompts]
        if "rationale" in rows:
            targets = _targets(batch["rationale"], rows["rationale"])
            for place, target in zip(read_by["rationale"], targets, strict=True):
                rationales[place].append(target)
        sequences: list[tuple[Tensor, Tensor]] = []
        first_of: list[int] = []  # the first sequence of each prompt
        for prompt, written in zip(prompts, rationales, strict=True):
            first_of.append(len(sequences))
            nothing = prompt.new_zeros(0)
            sequences += [(prompt, target) for target in written] or [(prompt, nothing)]
        padded, _ = _pad([torch.cat([prompt, target[:-1]]) for prompt, target in sequences])
        states = self._model.states(padded.clamp(min=0), torch.ones_like(padded))
        losses: dict[str, Tensor] = {}
        if rows.get("label"):
            places = read_by["label"]
            last = [len(prompts[place]) - 1 for place in places]
            pooled = states[[first_of[place] for place in places], last]
            classes = torch.cat(_targets(batch["label"], rows["label"]))
            losses["label"] = summed_nll(self._model.classify(pooled), classes)
        if rows.get("rationale"):
            predicts = torch.zeros_like(padded, dtype=torch.bool)
            for row_mask, (prompt, target) in zip(predicts, sequences, strict=True):
                row_mask[len(prompt) - 1 : len(prompt) + len(target) - 1] = len(target) > 0
            logits = self._model.body.get_output_embeddings()(states[predicts])
            losses["rationale"] = summed_nll(logits, torch.cat([target for _, target in sequences]))
        return losses


def patch_label_head(model: Any, views: Sequence[View], *, without_padding: bool) -> None:
    """Patch ``model.forward`` to accept a packed batch and return summed losses per view."""
    forward = model.forward
    runner = LabelHeadRunner(model, views, without_padding=without_padding)

    def packed_forward(*args: Any, batch: Batch | None = None, **kwargs: Any) -> Any:
        if batch is None:
            return forward(*args, **kwargs)
        return runner.summed_losses(batch)

    model.forward = packed_forward


def split_new_layers(optimizer: Any, model: Any, learning_rate: float) -> None:
    """Move the parameters of head and rationale decoder to groups with their own learning rate."""
    head: LabelHeadModel = without_wrapper(model)
    pretrained = {id(parameter) for parameter in head.body.parameters()}
    for group in list(optimizer.param_groups):
        new = [parameter for parameter in group["params"] if id(parameter) not in pretrained]
        if not new:
            continue
        group["params"] = [p for p in group["params"] if id(p) in pretrained]
        settings = {key: value for key, value in group.items() if key not in ("params", "lr")}
        optimizer.add_param_group({**settings, "params": new, "lr": learning_rate})


def _targets(packed: PackedBatch, rows: Sequence[int]) -> list[Tensor]:
    """The targets of some rows of a view."""
    targets = torch.split(packed.target, packed.target_lengths.tolist())
    return [targets[row] for row in rows]


def _pad(ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids, and a mask that is 0 at padding, (B, S) each."""
    padded = pad_sequence(list(ids), batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return padded, mask
