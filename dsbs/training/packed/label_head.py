"""Label heads in training: class and rationale losses of a batch from shared states.

Every distinct input is read once; label and rationale losses follow from the same states. Rows of
similar length go through the model together, so that little padding is computed.

Shapes: B rows of a group padded to S tokens, D hidden size, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsbs.students.heads import LabelHeadModel
from dsbs.training.encode import PackedBatch
from dsbs.training.losses import IGNORED, summed_binary_nll, summed_nll
from dsbs.training.methods import View
from dsbs.training.packed import (
    Batch,
    DistinctInputs,
    ForwardOutput,
    distinct_inputs,
    row_means,
)
from dsbs.training.packed.encoder import Rationales, encode_and_write, pack_encoder
from dsbs.training.packed.layout import first_windows, row_logits, similar_lengths
from dsbs.training.packed.t5 import without_wrapper

if TYPE_CHECKING:
    from dsbs.training.distillation import StepTotals
    from dsbs.training.distillation.objective import DistillationLoss


def has_label_head(model: Any) -> bool:
    """Whether a model, or the one inside LoRA's wrapper, chooses its label."""
    return isinstance(without_wrapper(model), LabelHeadModel)


class LabelHeadRunner:
    """Runs one model on batches of ``views``.

    ``class_weights`` (L,) multiply the rows' label losses; empty: 1. ``scores_choices``: the label
    view has a sequence for each choice of a row, with target 1 for the right one and 0 for others,
    and the label loss is that of a softmax over the row's choices. ``label_sets`` (K, L): the
    targets are the indices of these sets of labels, 1 for each that a row has; the label loss is
    that of a sigmoid for each label, and ``class_weights`` multiply the labels that a row has.
    None: a row has one label. ``reads_windows``: the label view has a sequence for each window of a
    row's text, with equal targets, and the label follows from all of them.
    """

    def __init__(
        self,
        model: Any,
        views: Sequence[View],
        *,
        without_padding: bool,
        hidden_states: bool = False,
        class_weights: Sequence[float] = (),
        scores_choices: bool = False,
        label_sets: Sequence[Sequence[int]] | None = None,
        reads_windows: bool = False,
    ) -> None:
        self._model: LabelHeadModel = without_wrapper(model)
        self._label_sets = None if label_sets is None else torch.tensor(label_sets)
        self._views = views
        self._without_padding = without_padding
        self._packs = without_padding and pack_encoder(self._model)
        self._hidden_states = hidden_states
        self._class_weights = (
            torch.tensor(class_weights, dtype=torch.float64) if class_weights else None
        )
        self._scores_choices = scores_choices
        self._reads_windows = reads_windows
        self._rationale_only: list[Tensor] = []
        pad_id = getattr(self._model.config, "pad_token_id", None)
        self._pad_id = 0 if pad_id is None else int(pad_id)

    def __call__(self, batch: Batch) -> ForwardOutput:
        """Label scores and states of a batch whose label view is ``batch["label"]``."""
        return self._read(batch, writes=False)[0]

    def run(self, batch: Batch) -> tuple[dict[str, Tensor], ForwardOutput]:
        """By view, the summed cross-entropy () in nats: of classes, or of target tokens.

        And the output that terms are computed from.
        """
        output, rationale_loss = self._read(batch, writes=True)
        losses: dict[str, Tensor] = {}
        if rationale_loss is not None:
            losses["rationale"] = rationale_loss
        label_loss = self._label_loss(output.logits["label"], batch["label"])
        if "rationale" not in losses:  # all processes have gradients of the same weights
            for parameter in self._rationale_only:
                label_loss = label_loss + parameter.flatten()[:0].sum()
        return {"label": label_loss} | losses, output

    def _read(self, batch: Batch, *, writes: bool) -> tuple[ForwardOutput, Tensor | None]:
        """The output of a batch, and the rationale loss () where ``writes`` and there is one."""
        inputs = self._inputs(batch)
        read = self._packed if self._packs else self._grouped
        label_logits, rationale_loss, states = read(batch, inputs, writes)
        if self._has_windows(batch):
            label_logits = row_logits(label_logits, batch["label"])
        scores = label_logits
        if self._label_sets is not None:
            scores = torch.stack([label_logits, torch.zeros_like(label_logits)], -1).flatten(0, 1)
        output = ForwardOutput(
            logits={"label": label_logits},
            encoder_states=states,
            decoder_states=[],
            label_scores=scores.log_softmax(-1),
            inputs=inputs,
            first_view="label",
        )
        return output, rationale_loss

    def _packed(
        self, batch: Batch, inputs: DistinctInputs, writes: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Label logits (B, L), rationale loss () or None, and states (N, D), where requested.

        Of one pass over all inputs.
        """
        rationales = None
        if writes and "rationale" in batch:
            packed = batch["rationale"]
            ids = torch.split(packed.target, packed.target_lengths.tolist())
            rationales = Rationales(ids, inputs.indices["rationale"])
        states, rationale_loss = encode_and_write(
            self._model, inputs.ids, rationales, hidden_states=self._hidden_states
        )
        pooled = row_means(states[-1], inputs.lengths)[inputs.indices["label"]]
        logits = self._model.classify(pooled)
        return logits, rationale_loss, states if self._hidden_states else []

    def _grouped(
        self, batch: Batch, inputs: DistinctInputs, writes: bool
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """The same, from a pass over each group of padded inputs."""
        rationale_loss: Tensor | None = None
        logits: list[Tensor] = []
        order: list[int] = []
        states: dict[int, list[Tensor]] = {}
        for group in self._groups(inputs):
            position = {index: slot for slot, index in enumerate(group)}
            rows = {
                view: [row for row, index in enumerate(indices) if index in position]
                for view, indices in inputs.indices.items()
                if writes or view == "label"
            }
            slots = {
                view: [position[inputs.indices[view][row]] for row in view_rows]
                for view, view_rows in rows.items()
            }
            ids = [inputs.ids[index] for index in group]
            group_logits, rationale, layers = self._group(batch, ids, rows, slots)
            if group_logits is not None:
                logits.append(group_logits)
                order += rows["label"]
            if rationale is not None:
                rationale_loss = rationale if rationale_loss is None else rationale_loss + rationale
            for slot, index in enumerate(group if layers else ()):
                states[index] = [layer[slot, : len(inputs.ids[index])] for layer in layers]
        label_logits = torch.cat(logits)[torch.tensor(order).argsort().to(logits[0].device)]
        layers = [torch.cat(layer) for layer in zip(*map(states.get, sorted(states)), strict=True)]
        return label_logits, rationale_loss, layers

    def _inputs(self, batch: Batch) -> DistinctInputs:
        """The inputs of a batch: label and rationale share an example's, unless it has choices or
        several windows.
        """
        if not self._scores_choices and not self._has_windows(batch):
            return distinct_inputs(batch, self._views)
        ids: list[Tensor] = []
        indices: dict[str, list[int]] = {}
        for view, packed in batch.items():
            sources = torch.split(packed.source, packed.source_lengths.tolist())
            indices[view] = list(range(len(ids), len(ids) + len(sources)))
            ids += sources
        return DistinctInputs(ids, [True] * len(ids), indices)

    def _has_windows(self, batch: Batch) -> bool:
        """Whether the label view has several windows of one row."""
        if not self._reads_windows or "label" not in batch:
            return False
        rows = batch["label"].rows
        return len(rows.unique()) < len(rows)

    def _classes(self, packed: PackedBatch) -> Tensor:
        """The class of each row of the label view (rows,)."""
        if not self._reads_windows:
            return packed.target
        return packed.target[first_windows(packed)]

    def _groups(self, inputs: DistinctInputs) -> list[list[int]]:
        """Indices of the inputs that go through the model together."""
        lengths = inputs.lengths
        if not self._without_padding:
            return [list(range(len(lengths)))]
        return similar_lengths(lengths)

    def _label_loss(self, logits: Tensor, packed: PackedBatch) -> Tensor:
        """logits (rows, L), or (B, 1) of choices -> ()."""
        if self._scores_choices:
            return choice_nll(logits[:, 0], packed)
        weights = self._class_weights
        if weights is not None:
            weights = weights.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
        classes = self._classes(packed)
        if self._label_sets is None:
            return summed_nll(logits, classes, weights)
        label_sets = self._label_sets.to(logits.device)[classes.clamp(min=0)]
        targets = label_sets.masked_fill((classes == IGNORED)[:, None], IGNORED)
        return summed_binary_nll(logits, targets, weights)

    def _group(
        self,
        batch: Batch,
        ids: Sequence[Tensor],
        rows: Mapping[str, list[int]],
        slots: Mapping[str, list[int]],
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """Label logits and rationale loss of the ``rows`` that read ``ids``, at ``slots`` in them.

        None where a view has no row. And the states (B, S, D) after each layer, where requested.
        """
        if self._model.architecture == "causal":
            return self._causal_group(batch, ids, rows, slots)
        padded, mask = _pad(ids, self._pad_id)
        layers: list[Tensor] = []
        if self._hidden_states:
            layers = self._model.layer_states(padded, mask)
        states = layers[-1] if layers else self._model.states(padded, mask)
        logits = None
        if rows.get("label"):
            read = slots["label"]
            logits = self._model.label_logits(states[read], mask[read])
        rationale = None
        if rows.get("rationale"):
            read = slots["rationale"]
            targets = _targets(batch["rationale"], rows["rationale"])
            labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
            written = self._model.rationale_logits(states[read], mask[read], self._shifted(labels))
            rationale = summed_nll(written, labels)
        return logits, rationale, layers

    def _shifted(self, labels: Tensor) -> Tensor:
        """Targets (B, T) -> the decoder's input (B, T): its start token, then all but the last."""
        shifted = labels.roll(1, dims=1).clamp(min=0)
        shifted[:, 0] = self._model.start
        return shifted

    def _causal_group(
        self,
        batch: Batch,
        prompts: Sequence[Tensor],
        rows: Mapping[str, list[int]],
        slots: Mapping[str, list[int]],
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
        """A decoder's part: a rationale follows its prompt, whose last state gives the label.

        No attention mask is needed: padding comes last, where no real token attends.
        """
        rationales: list[list[Tensor]] = [[] for _ in prompts]
        if rows.get("rationale"):
            targets = _targets(batch["rationale"], rows["rationale"])
            for slot, target in zip(slots["rationale"], targets, strict=True):
                rationales[slot].append(target)
        sequences: list[tuple[Tensor, Tensor]] = []
        first_of: list[int] = []  # the first sequence of each prompt
        for prompt, written in zip(prompts, rationales, strict=True):
            first_of.append(len(sequences))
            nothing = prompt.new_zeros(0)
            sequences += [(prompt, target) for target in written] or [(prompt, nothing)]
        padded, _ = _pad([torch.cat([prompt, target[:-1]]) for prompt, target in sequences])
        read_ids = padded.clamp(min=0)
        mask = torch.ones_like(padded)
        layers: list[Tensor] = []
        if self._hidden_states:
            layers = self._model.layer_states(read_ids, mask)
        states = layers[-1] if layers else self._model.states(read_ids, mask)
        logits = None
        if rows.get("label"):
            read = slots["label"]
            last = [len(prompts[slot]) - 1 for slot in read]
            logits = self._model.classify(states[[first_of[slot] for slot in read], last])
        rationale = None
        if rows.get("rationale"):
            predicts = torch.zeros_like(padded, dtype=torch.bool)
            for row_mask, (prompt, target) in zip(predicts, sequences, strict=True):
                row_mask[len(prompt) - 1 : len(prompt) + len(target) - 1] = len(target) > 0
            token_logits = self._model.body.get_output_embeddings()(states[predicts])
            rationale = summed_nll(token_logits, torch.cat([target for _, target in sequences]))
        return logits, rationale, [layer[first_of] for layer in layers]

    def label_count(self, packed: PackedBatch) -> float:
        """What the label loss of a batch is a mean over: its rows, or the sum of their weights.

        Weights of several labels change the loss of each label, not what a row counts.
        """
        if self._scores_choices:
            return int((packed.target == 1).sum())
        classes = self._classes(packed)
        classes = classes[classes != IGNORED]
        if self._class_weights is None or self._label_sets is not None:
            return len(classes)
        return float(self._class_weights[classes.cpu()].double().sum())

    def freeze_unused(self) -> None:
        """Freeze the weights that no view trains: BERT's pooler, or a T5's decoder that learns no
        rationales.

        Distributed training waits for a gradient of every trainable weight.
        """
        layers = (self._model.body, self._model.classifier, self._model.rationale_decoder)
        parameters = [
            parameter
            for layer in layers
            if layer is not None
            for parameter in layer.parameters()
            if parameter.requires_grad
        ]
        parameters = list({id(parameter): parameter for parameter in parameters}.values())
        with torch.random.fork_rng():
            losses, _ = self.run(self._smallest_batch())
        used = {
            view: [
                gradient is not None
                for gradient in torch.autograd.grad(
                    loss, parameters, retain_graph=True, allow_unused=True
                )
            ]
            for view, loss in losses.items()
        }
        for index, parameter in enumerate(parameters):
            if not any(is_used[index] for is_used in used.values()):
                parameter.requires_grad_(False)
            elif not used["label"][index]:
                self._rationale_only.append(parameter)

    def _smallest_batch(self) -> dict[str, PackedBatch]:
        """One example of every view that is trained."""
        ids = torch.ones(2, dtype=torch.long, device=self._model.device)
        length = ids[:1] + 1
        batch: dict[str, PackedBatch] = {}
        for view in self._views:
            if not view.supervised:
                continue
            target = ids
            if view.target == "label":  # of choices, the right one; else any class
                target = ids[:1] if self._scores_choices else ids[:1] - 1
            batch[view.target] = PackedBatch(
                rows=ids[:1] - 1,
                source=ids,
                source_lengths=length,
                target=target,
                target_lengths=torch.tensor([len(target)], device=ids.device),
            )
        return batch


def choice_nll(scores: Tensor, packed: PackedBatch) -> Tensor:
    """scores (B,) of the choices of all rows -> (): the summed cross-entropy of the right ones.

    Of a softmax over each row's choices. ``packed.target`` is 1 for a right choice, else 0; a row
    without a right choice is left out.
    """
    rows = packed.rows.tolist()
    targets = packed.target.tolist()
    column: list[int] = []
    counts: dict[int, int] = {}
    for row in rows:
        column.append(counts.get(row, 0))
        counts[row] = column[-1] + 1
    line = {row: index for index, row in enumerate(counts)}
    chosen = [IGNORED] * len(counts)
    for row, slot, target in zip(rows, column, targets, strict=True):
        if target == 1:
            chosen[line[row]] = slot
    table = scores.new_full((len(counts), max(counts.values())), -torch.inf)
    table = table.index_put(
        (
            torch.tensor([line[row] for row in rows], device=scores.device),
            torch.tensor(column, device=scores.device),
        ),
        scores,
    )
    return summed_nll(table, torch.tensor(chosen, device=scores.device))


def patch_label_head(
    model: Any,
    runner: LabelHeadRunner,
    terms: DistillationLoss | None = None,
) -> None:
    """Patch ``model.forward`` to accept a packed batch and return summed losses per view.

    With ``terms`` and ``step`` it adds each term's share of the step's mean, by its title.
    """
    forward = model.forward

    def packed_forward(
        *args: Any, batch: Batch | None = None, step: StepTotals | None = None, **kwargs: Any
    ) -> Any:
        if batch is None:
            return forward(*args, **kwargs)
        losses, output = runner.run(batch)
        return losses | (terms.losses(output, batch, step) if terms and step else {})

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


def _pad(ids: Sequence[Tensor], pad_id: int = 0) -> tuple[Tensor, Tensor]:
    """Ids, and a mask that is 0 at padding, (B, S) each."""
    padded = pad_sequence(list(ids), batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return padded, mask
