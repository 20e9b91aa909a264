"""Trainer: Seq2SeqTrainer with the exact objective, validation by accuracy and separate losses.

The stock trainer mis-scales T5 under gradient accumulation: T5's forward takes ``**kwargs``, so the
trainer believes that the loss is already normalized. Here each view's summed cross-entropy is
divided by its target tokens in the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

from dsbs.config import ResolvedTrainSection
from dsbs.errors import UserError
from dsbs.students.heads import LabelHeadModel
from dsbs.students.weights import device, supports_bf16
from dsbs.training.balance import RationaleBalance
from dsbs.training.distillation import StepTotals
from dsbs.training.distillation.objective import PROJECTIONS, DistillationLoss
from dsbs.training.distributed import save_sharded_model, shard_model, world_size
from dsbs.training.encode import (
    PackedBatch,
    PaddedDataset,
    count_examples,
    count_inputs,
    count_targets,
)
from dsbs.training.grid import DivergedError
from dsbs.training.losses import summed_nll, view_weights, weighted_loss
from dsbs.training.methods import View
from dsbs.training.packed import ForwardRunner, is_decoder_only
from dsbs.training.packed.decoder import DecoderRunner, summed_losses
from dsbs.training.packed.label_head import (
    LabelHeadRunner,
    has_label_head,
    patch_label_head,
    split_new_layers,
)
from dsbs.training.packed.t5 import is_t5

Batch = Mapping[str, PackedBatch]


def training_arguments(
    section: ResolvedTrainSection,
    folder: Path,
    seed: int,
    *,
    batch_size: int,
    eval_steps: int,
    tracking: Mapping[str, Any] | None = None,
) -> Seq2SeqTrainingArguments:
    """The stock trainer's arguments; ``batch_size`` is of one process's forward pass.

    ``tracking`` names the trackers (``report_to``), project and run. None: no tracker.
    """
    schedule: str = section.schedule
    if schedule == "constant":
        schedule = "constant_with_warmup"  # the plain constant one ignores warm-up
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=section.batch_size // (batch_size * world_size()),
        max_steps=section.max_steps,
        learning_rate=section.learning_rate,
        lr_scheduler_type=schedule,
        optim="adafactor" if section.optimizer == "adafactor" else "adamw_torch_fused",
        train_sampling_strategy="random" if section.shuffle else "sequential",
        logging_nan_inf_filter=False,  # it would log 0 in place of a loss that is not finite
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        logging_steps=section.log_every,
        eval_strategy="steps",
        eval_steps=eval_steps,
        save_strategy="steps",
        save_steps=eval_steps,
        save_total_limit=1,
        metric_for_best_model="selection",
        greater_is_better=True,
        remove_unused_columns=False,
        bf16=section.precision != "fp32" and supports_bf16(),
        seed=seed,
        data_seed=seed,
        **({"report_to": []} if tracking is None else tracking),
        disable_tqdm=True,
        use_cpu=device() == "cpu",
    )
    # The stock trainer would multiply the batch by the number of visible GPUs.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class StepTrainer(Seq2SeqTrainer):
    """Trains on packed batches; ``views`` is the student's method.

    ``terms`` are the loss terms beside the views' (None: none); the losses of the views in
    ``without_targets`` are logged and not learned. ``validate`` returns its figures, "accuracy"
    among them. What follows belongs to label heads (see ``LabelHeadRunner``).
    """

    def __init__(
        self,
        *,
        views: Sequence[View],
        section: ResolvedTrainSection,
        validate: Callable[[], dict[str, float]],
        terms: DistillationLoss | None = None,
        without_targets: Sequence[str] = (),
        class_weights: Sequence[float] = (),
        scores_choices: bool = False,
        label_sets: Sequence[Sequence[int]] | None = None,
        reads_windows: bool = False,
        **kwargs: Any,
    ) -> None:
        dataset = PaddedDataset(kwargs.pop("train_dataset"), views[0].target)
        super().__init__(train_dataset=dataset, **kwargs)
        self.loss_is_scaled_for_ga = True
        self._views = views
        self._section = section
        self._terms = terms
        self._without_targets = without_targets
        self._validate = validate
        self._counts: dict[str, float] = {}
        names: list[str] = [view.target for view in views if view.supervised]
        names += [term.title for term in terms.terms] if terms else []
        # This process's share of each loss, summed over the steps since the last line.
        self._logged = dict.fromkeys(names, 0.0)
        self._last_logged_step: int | None = None
        self._totals = {"tokens": 0, "examples": 0}  # of all processes and interrupted runs
        self._balance: RationaleBalance | None = None
        if section.balance is not None and "rationale" in names:
            self._balance = RationaleBalance(section.balance)
        packs = has_label_head(self.model) or is_t5(self.model) or is_decoder_only(self.model)
        without_padding = section.padding == "none" and packs
        if self.is_fsdp_enabled:
            self._check_fsdp()
            # All views in one call: processes whose rows have different views would otherwise wait
            # for one another's calls for ever.
            without_padding = True
            shard_model(self.model, self.accelerator)
        self._label_head: LabelHeadRunner | None = None
        if has_label_head(self.model):
            self._label_head = LabelHeadRunner(
                self.model,
                views,
                without_padding=without_padding,
                hidden_states=terms is not None and terms.hidden_states,
                class_weights=class_weights,
                scores_choices=scores_choices,
                label_sets=label_sets,
                reads_windows=reads_windows,
            )
            self._label_head.freeze_unused()
            patch_label_head(self.model, self._label_head, terms)
        else:
            patch_forward(self.model, views, without_padding=without_padding, terms=terms)

    def _check_fsdp(self) -> None:
        """Raises UserError for what a sharded model cannot compute."""
        hint = "start without FSDP settings"
        if self._terms is not None:
            raise UserError(
                "loss terms are not supported with FSDP: every process would hold its local "
                "teachers whole, which FSDP is there to avoid",
                hint=f"{hint}; train.lora and train.gradient_checkpointing save memory as well",
            )
        if self._balance is not None:
            raise UserError(
                "train.rationale_weight: balanced is not supported with FSDP",
                hint=f"{hint}, or give rationale_weight as a number",
            )
        if has_label_head(self.model):
            raise UserError("student.head: labels is not supported with FSDP", hint=hint)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """One optimizer step's micro-batches; counts target tokens over them and all processes."""
        if self._last_logged_step is None:  # a resumed run's first line covers its own steps alone
            self._last_logged_step = self.state.global_step
            for row in self.state.log_history:
                self._totals |= {name: int(row[name]) for name in self._totals if name in row}
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        names = [view.target for view in self._views]
        targets = {
            name: sum(self._count(name, batch[name]) for batch in batches if name in batch)
            for name in names
        }
        target_tokens = sum(count_targets(packed) for batch in batches for packed in batch.values())
        terms: dict[str, float] = {}
        for batch in batches:
            for name, number in self._terms.counts(batch).items() if self._terms else ():
                terms[name] = terms.get(name, 0) + number
        totals = {
            "tokens": sum(count_inputs(batch) for batch in batches) + target_tokens,
            "examples": sum(count_examples(batch) for batch in batches),
        }
        values = [*targets.values(), *terms.values(), *totals.values()]
        reduced = self._sum_over_processes(values, device)
        self._counts = dict(zip([*targets, *terms], reduced[: -len(totals)], strict=True))
        for name, total in zip(totals, reduced[-len(totals) :], strict=True):
            self._totals[name] += int(total)
        if self._balance and batches and self._balance.is_due(self.state.global_step):
            self._measure_balance(self._balance, batches)
        return batches, None

    def _count(self, view: str, packed: PackedBatch) -> float:
        """A batch's share of what a view's loss is a mean over: rows or target tokens."""
        if view == "label" and self._label_head is not None:
            return self._label_head.label_count(packed)
        return count_targets(packed)

    def _measure_balance(self, balance: RationaleBalance, batches: Sequence[Batch]) -> None:
        """Measure the gradients of the step that ``batches`` are the micro-batches of."""
        if not self._counts.get("rationale"):
            return
        model: Any = self.model

        def losses() -> Iterator[dict[str, torch.Tensor]]:
            for inputs in batches:
                counts = self._counts
                if self._section.loss_mean == "micro":
                    counts = {name: self._count(name, inputs[name]) or 1 for name in inputs}
                with self.compute_loss_context_manager():
                    sums = model(batch=self._prepare_inputs(dict(inputs)))
                yield {name: sums[name] / counts[name] for name in inputs}

        def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
            if self.args.world_size == 1:
                return tensor
            summed: torch.Tensor = self.accelerator.reduce(tensor, reduction="sum")
            return summed

        model.train()
        parameters = [weights for weights in model.parameters() if weights.requires_grad]
        with torch.random.fork_rng():  # the step itself draws the same dropout
            balance.measure(parameters, losses(), sum_over_processes)

    def _sum_over_processes(self, values: Sequence[float], device: Any) -> list[float]:
        if self.args.world_size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64, device=device)
        summed: list[float] = self.accelerator.reduce(numbers, reduction="sum").tolist()
        return summed

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, PackedBatch):  # the stock trainer moves tensors in mappings only
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of rows; with several processes padded by empty rows to equal batches.

        accelerate would pad with the epoch's first rows, which would be learned twice.
        """
        sampler = super()._get_train_sampler(train_dataset)
        if self.args.world_size == 1 or sampler is None:
            return sampler
        return PaddedSampler(sampler, self.args.train_batch_size * self.args.world_size)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the step's loss (see ``weighted_loss``)."""
        weights = view_weights(self._views, self._section, self.state.global_step)
        if self._balance is not None:
            weights["rationale"] = self._balance.weight
        of_micro_batch = self._section.loss_mean == "micro"
        counts = self._micro_counts(inputs) if of_micro_batch else self._counts
        step = {"step": StepTotals(counts, weights)} if self._terms else {}
        losses: dict[str, torch.Tensor] = model(batch=inputs, **step)
        sums = {name: losses[name] for name in inputs}
        # 0, but part of the graph, for views that terms alone train
        learned = {name: sums[name] * (name not in self._without_targets) for name in sums}
        loss = weighted_loss(learned, counts, weights)
        for term in self._terms.terms if self._terms else ():
            loss = loss + term.weight * losses[term.title]
        # Distributed training averages gradients over processes; the counts are summed over them,
        # those of a micro-batch are the process's own.
        if not of_micro_batch:
            loss = loss * self.args.world_size
        for name, value in losses.items():
            mean = float(value.detach())
            if name in sums:
                mean /= counts[name]
            self._logged[name] += mean
        return loss

    def _micro_counts(self, batch: Batch) -> dict[str, float]:
        """Counts for the published code's objective: means of micro-batches, averaged."""
        counts = {name: self._count(name, packed) for name, packed in batch.items()}
        counts |= self._terms.counts(batch) if self._terms else {}
        batches = self.current_gradient_accumulation_steps
        return {name: (count or 1) * batches for name, count in counts.items()}

    def create_optimizer(self, model: Any = None) -> Any:
        """The stock optimizer, with ``train.head_learning_rate`` for a label head's new layers."""
        optimizer = super().create_optimizer(model)
        if has_label_head(self.model):
            split_new_layers(optimizer, self.model, self._section.head_learning_rate)
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not isinstance(self.model, LabelHeadModel):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        self.model.save_pretrained(folder)
        projections = getattr(self.model, PROJECTIONS, None)
        if projections is not None:
            torch.save(projections.state_dict(), folder / f"{PROJECTIONS}.pt")
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, checkpoint: str, model: Any = None) -> None:
        if not isinstance(self.model, LabelHeadModel):
            super()._load_from_checkpoint(checkpoint, model)
            return
        self.model.load_weights(Path(checkpoint))
        projections = getattr(self.model, PROJECTIONS, None)
        if projections is not None:
            file = Path(checkpoint) / f"{PROJECTIONS}.pt"
            projections.load_state_dict(torch.load(file, weights_only=True))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self._balance is not None and self.args.should_save:
            self._balance.save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._balance is not None and checkpoint is not None:
            self._balance.load(Path(checkpoint))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.is_fsdp_enabled:  # the stock one gathers in one process what all must gather
            save_sharded_model(self.model, str(output_dir))
        else:
            super().save_model(output_dir, _internal_call)

    def floating_point_ops(self, _inputs: Any) -> int:
        return 0  # the stock estimate looks for input_ids at the top of the batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise self._diverged(logs["loss"])
            logs |= self._mean_losses() | (self._balance.figures if self._balance else {})
        if "loss" in logs or "eval_accuracy" in logs:
            logs |= self._totals  # in the checkpoint as well, from which a resumed run counts on
        super().log(logs, start_time)

    def _mean_losses(self) -> dict[str, float]:
        """Each view's and term's loss, averaged over the steps since the last line."""
        steps = max(1, self.state.global_step - (self._last_logged_step or 0))
        sums = self._sum_over_processes(list(self._logged.values()), self.args.device)
        if self._section.loss_mean == "micro":  # means of each process's own micro-batches
            steps *= self.args.world_size
        means = {
            f"{name}_loss": total / steps for name, total in zip(self._logged, sums, strict=True)
        }
        self._logged = dict.fromkeys(self._logged, 0.0)
        self._last_logged_step = self.state.global_step
        return means

    def _diverged(self, loss: float) -> DivergedError:
        return DivergedError(
            f"{self.args.run_name}: the loss is {loss} at step {self.state.global_step}",
            hint="lower train.learning_rate or raise train.warmup_steps, and train again",
        )

    def evaluate(self, *_args: Any, **_kwargs: Any) -> dict[str, float]:
        """Validate, log and return the figures. The test split is not involved."""
        figures = self._validate()
        if not math.isfinite(figures.get("label_loss", 0.0)):
            raise self._diverged(figures["label_loss"])
        metrics = {f"eval_{name}": value for name, value in figures.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class PaddedSampler(Sampler[int]):
    """The indices of ``order``, then indices past its end up to a multiple of ``multiple``."""

    def __init__(self, order: Sampler[int], multiple: int) -> None:
        # accelerate gives a random order its seed, but does not look into a sampler of ours.
        if isinstance(order, RandomSampler):
            order = SeedableRandomSampler(order.data_source)
        self._order = order
        self._multiple = multiple

    def __len__(self) -> int:
        return math.ceil(len(self._order) / self._multiple) * self._multiple  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        yield from self._order
        yield from range(len(self._order), len(self))  # type: ignore[arg-type]

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self._order, SeedableRandomSampler):
            self._order.set_epoch(epoch)


def patch_forward(
    model: Any,
    views: Sequence[View],
    *,
    without_padding: bool,
    terms: DistillationLoss | None = None,
) -> None:
    """Patch ``model.forward`` to accept a packed batch and return summed losses per view.

    With ``terms`` it takes ``step`` as well and adds each term's share of the step's mean, by its
    title. It is patched, not called around, because distributed training hooks gradients into
    forward. Without ``batch`` it computes what it did before.
    """
    forward = model.forward
    runner_class = DecoderRunner if is_decoder_only(model) else ForwardRunner
    runner = runner_class(
        model,
        views,
        without_padding=without_padding,
        hidden_states=terms is not None and terms.hidden_states,
        labels=terms.label_ids if terms else (),
    )
    only_losses = is_decoder_only(model) and terms is None

    def packed_forward(
        *args: Any,
        batch: dict[str, PackedBatch] | None = None,
        step: StepTotals | None = None,
        **kwargs: Any,
    ) -> Any:
        if batch is None:
            return forward(*args, **kwargs)
        if only_losses:
            return summed_losses(model, batch, without_padding=without_padding)
        output = runner(batch)
        sums = {name: summed_nll(output.logits[name], rows.target) for name, rows in batch.items()}
        return sums | (terms.losses(output, batch, step) if terms and step else {})

    model.forward = packed_forward
