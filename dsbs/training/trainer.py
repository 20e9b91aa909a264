"""Seq2SeqTrainer with the exact objective, validation by accuracy, and losses logged apart.

The stock trainer mis-scales T5 under gradient accumulation: T5's forward takes ``**kwargs``, so the trainer believes that the
loss is already normalised. Here each view's summed cross-entropy is divided by its target tokens in the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler
from transformers import Seq2SeqTrainer

from dsbs.config import TrainSection
from dsbs.errors import DsbsError, UserError
from dsbs.training.distillation.base import StepTotals
from dsbs.training.distillation.objective import DistillationLoss
from dsbs.training.encode import PackedBatch, PaddedDataset
from dsbs.training.fsdp import save_whole, shard
from dsbs.training.losses import IGNORED, summed_nll, view_weights, weighted_loss
from dsbs.training.methods import View
from dsbs.training.packed import decoder as causal
from dsbs.training.packed.forward import ForwardRunner
from dsbs.training.packed.t5 import is_t5


class StepTrainer(Seq2SeqTrainer):
    """``views`` is the student's method, ``terms`` what its loss has beside them (None: nothing); ``validate`` returns the
    figures of a look at valid, "accuracy" among them.
    """

    def __init__(
        self,
        *,
        views: Sequence[View],
        section: TrainSection,
        validate: Callable[[], dict[str, float]],
        terms: DistillationLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            **kwargs | {"train_dataset": PaddedDataset(kwargs["train_dataset"], views[0].target)}
        )
        self.loss_is_scaled_for_ga = True
        self._views, self._section, self._terms = views, section, terms
        self._validate = validate
        self._counts: dict[str, float] = {}
        self._logged: dict[str, list[float]] = {}
        self._last_logged_step: int | None = None
        self._seen = {
            "tokens": 0,
            "examples": 0,
        }  # in all steps and processes, an interrupted run's included
        unpadded = section.padding == "none" and (
            is_t5(self.model) or causal.is_decoder_only(self.model)
        )
        if self.is_fsdp_enabled:
            if terms is not None:
                raise UserError(
                    "terms of the loss are not learned by a divided model",
                    hint="start without FSDP settings",
                )
            # all views in one call: processes whose rows teach different views would wait for one another's calls for ever
            unpadded = True
            shard(self.model, self.accelerator)
        patch_forward(self.model, views, without_padding=unpadded, terms=terms)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """One optimizer step's micro-batches; their target tokens are counted over all of them and all processes."""
        if self._last_logged_step is None:  # a resumed run's first line covers its own steps alone
            self._last_logged_step = self.state.global_step
            self._seen |= {
                name: int(row[name])
                for row in self.state.log_history
                for name in self._seen
                if name in row
            }
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        names = [view.target for view in self._views]
        targets = [sum(taught(batch[name]) for batch in samples if name in batch) for name in names]
        sources = sum(len(flat.source) for batch in samples for flat in batch.values())
        examples = sum(
            1 + max(int(flat.rows.max()) for flat in batch.values()) for batch in samples
        )
        tallies = [self._terms.counts(batch) for batch in samples] if self._terms else []
        others = {
            name: sum(tally[name] for tally in tallies) for name in (tallies[0] if tallies else ())
        }
        counts = torch.tensor(
            [*targets, *others.values(), sources + sum(targets), examples], device=device
        )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        *step_targets, step_tokens, step_examples = counts.tolist()
        self._counts = dict(zip([*names, *others], step_targets, strict=True))
        self._seen["tokens"] += step_tokens
        self._seen["examples"] += step_examples
        return samples, None

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, PackedBatch):  # the stock trainer moves tensors in mappings only
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """One process's order of the rows; for several with empty rows at its end, so that all have equally many batches.

        accelerate would fill up with the epoch's first rows, which would be learned twice.
        """
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.world_size == 1 or sampler is None:
            return sampler
        return PaddedSampler(sampler, self.args.train_batch_size * self.args.world_size)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the step's loss (see ``weighted_loss``)."""
        del return_outputs, num_items_in_batch
        weights = view_weights(self._views, self._section, self.state.global_step)
        counts = self._counts
        if (
            self._section.loss_mean == "micro"
        ):  # the published code's: means of micro-batches, averaged
            own = {name: taught(flat) for name, flat in inputs.items()} | (
                self._terms.counts(inputs) if self._terms else {}
            )
            counts = {
                name: max(1, count) * self.current_gradient_accumulation_steps
                for name, count in own.items()
            }
        step = {"step": StepTotals(counts, weights)} if self._terms else {}
        found: dict[str, torch.Tensor] = model(batch=inputs, **step)
        sums = {name: found[name] for name in inputs}
        for name, value in found.items():
            self._logged.setdefault(name, []).append(
                float(value.detach()) / (self._counts[name] if name in sums else 1)
            )
        loss = weighted_loss(sums, counts, weights)
        for term in self._terms.terms if self._terms else ():
            loss = loss + term.weight * found[term.title]
        # distributed training averages gradients over processes, and the counts are already the sum over them
        return loss if self._section.loss_mean == "micro" else loss * self.args.world_size

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:  # the stock one gathers in one process what all must
            save_whole(self.model, str(output_dir))
        else:
            super().save_model(output_dir, _internal_call)

    def floating_point_ops(self, inputs: Any) -> int:
        del inputs  # the stock estimate looks for input_ids at the top of the batch
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise self._lost(logs["loss"])
            steps = max(1, self.state.global_step - (self._last_logged_step or 0))
            for name, values in self._logged.items():
                logs[f"{name}_loss"] = sum(values) / steps * self.args.world_size
            self._logged = {}
            self._last_logged_step = self.state.global_step
        if "loss" in logs or "eval_accuracy" in logs:
            logs |= self._seen  # into the checkpoint as well, from which a resumed run counts on
        super().log(logs, start_time)

    def _lost(self, loss: float) -> DsbsError:
        return DsbsError(
            f"the loss is {loss} at step {self.state.global_step}",
            hint="lower train.learning_rate or add train.warmup_steps; the last checkpoint is kept",
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Accuracy on valid by short generation. The test split is nowhere near."""
        del args, kwargs
        found = self._validate()
        if not math.isfinite(found.get("label_loss", 0.0)):
            raise self._lost(found["label_loss"])
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class PaddedSampler(Sampler[int]):
    """``order``'s places, then places past its end until their number is a multiple of ``multiple``."""

    def __init__(self, order: Sampler[int], multiple: int) -> None:
        # accelerate would give a random order this seed for one process, and does not look into a sampler of ours
        self._order = (
            SeedableRandomSampler(order.data_source) if isinstance(order, RandomSampler) else order
        )
        self._multiple = multiple

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._multiple) * self._multiple  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from range(len(self._order), len(self))  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self._order, SeedableRandomSampler):
            self._order.set_epoch(epoch)


def taught(flat: PackedBatch) -> int:
    """Target tokens of a batch, without those of empty rows."""
    return int((flat.target != IGNORED).sum())


def patch_forward(
    model: Any,
    views: Sequence[View],
    *,
    without_padding: bool,
    terms: DistillationLoss | None = None,
) -> None:
    """Teach a model's forward to take ``batch``, rows of ``views``, and to return each view's summed cross-entropy.

    With ``terms`` it takes the ``step`` as well and returns each term's share of the step's mean beside them, by its name.
    Through forward, because that is where distributed training hooks gradients in. Anything else it answers as before.
    """
    plain = model.forward
    if causal.is_decoder_only(model):
        if terms is not None:
            raise UserError(
                "terms of the loss are learned by T5 students alone",
                hint="leave the terms out of train.methods",
            )
        read = None
    else:
        read = ForwardRunner(
            model,
            views,
            without_padding=without_padding,
            hidden_states=terms is not None and terms.hidden_states,
            labels=terms.label_ids if terms else (),
        )

    def forward(
        *args: Any,
        batch: dict[str, PackedBatch] | None = None,
        step: StepTotals | None = None,
        **kwargs: Any,
    ) -> Any:
        if batch is None:
            return plain(*args, **kwargs)
        if read is None:
            return causal.summed_losses(model, batch, without_padding=without_padding)
        own = read(batch)
        sums = {name: summed_nll(own.logits[name], flat.target) for name, flat in batch.items()}
        return sums | (terms.losses(own, batch, step) if terms and step else {})

    model.forward = forward
