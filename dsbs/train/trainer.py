"""Seq2SeqTrainer with the exact objective, validation by accuracy, and losses logged apart.

The stock trainer mis-scales T5 under gradient accumulation: T5's forward takes ``**kwargs``, so the trainer believes that the
loss is already normalised. Here each view's summed cross-entropy is divided by its target tokens in the whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import Seq2SeqTrainer

from dsbs.errors import DsbsError
from dsbs.train.losses import summed_nll, target_tokens, weighted_loss
from dsbs.train.methods import View


class StepTrainer(Seq2SeqTrainer):
    """``views`` is the student's method; ``validate`` returns the figures of a look at valid, "accuracy" among them."""

    def __init__(self, *, views: Sequence[View], validate: Callable[[], dict[str, float]], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss_is_scaled_for_ga = True
        self._views = views
        self._validate = validate
        self._counts: dict[str, int] = {}
        self._logged: dict[str, list[float]] = {}

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], None]:
        """One optimizer step's micro-batches; their target tokens are counted over all of them and all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        names = [view.target for view in self._views]
        counts = torch.tensor(
            [sum(target_tokens(batch[name]["labels"]) for batch in samples if name in batch) for name in names],
            device=device,
        )
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self._counts = dict(zip(names, counts.tolist(), strict=True))
        return samples, None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """The micro-batch's share of the step's loss (see ``weighted_loss``)."""
        del return_outputs, num_items_in_batch
        sums = {}
        for name, view in inputs.items():
            outputs = model(input_ids=view["input_ids"], attention_mask=view["attention_mask"], labels=view["labels"])
            sums[name] = summed_nll(outputs.logits, view["labels"])
            self._logged.setdefault(name, []).append(float(sums[name].detach()) / self._counts[name])
        # distributed training averages gradients over processes, and the counts are already the sum over them
        return weighted_loss(sums, self._counts, self._views) * self.args.world_size

    def floating_point_ops(self, inputs: Any) -> int:
        del inputs  # the stock estimate looks for input_ids at the top of the batch
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise DsbsError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}",
                    hint="lower train.learning_rate or add train.warmup_steps; the last checkpoint is kept",
                )
            steps = max(1, self.state.global_step - self._last_logged_step)
            for name, values in self._logged.items():
                logs[f"{name}_loss"] = sum(values) / steps * self.args.world_size
            self._logged = {}
            self._last_logged_step = self.state.global_step
        super().log(logs, start_time)

    _last_logged_step = 0

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Accuracy on valid by short generation. The test split is nowhere near."""
        del args, kwargs
        metrics = {f"eval_{name}": value for name, value in self._validate().items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
