"""Rationale weight from gradients: λ that keeps the rationale's share of a step constant.

After GradNorm (Chen et al., ICML 2018, arXiv:1711.02257), which measures the norm of each task's
gradient on the weights that the tasks share. There the weights are learned towards equal training
rates; here λ is set so that

    λ · ‖∇ L_rationale‖ = share · ‖∇ L_label‖

at every measured step, over all of its micro-batches and processes, with the dropout of the step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dsbs.config import BalanceSection
from dsbs.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

_FILE = "rationale_weight.json"  # in a checkpoint
_TASKS = ("label", "rationale")


class RationaleBalance:
    """λ, measured anew every few steps."""

    def __init__(self, section: BalanceSection) -> None:
        self._section = section
        self.weight = 1.0
        """λ; 1 until a step with a rationale has been measured."""
        self.figures: dict[str, float] = {}
        """λ and both norms at the last measurement, for metrics.jsonl."""

    def is_due(self, step: int) -> bool:
        """Whether the optimizer step after ``step`` finished ones is to be measured."""
        return step % self._section.every == 0

    def measure(
        self,
        parameters: Sequence[Tensor],
        losses: Iterable[Mapping[str, Tensor]],
        sum_over_processes: Callable[[Tensor], Tensor],
    ) -> None:
        """Set λ from one optimizer step.

        ``losses`` has each micro-batch's share of the step's L_label and L_rationale. The weights
        that they share are the parameters in which both have a gradient. λ stays as it is where
        there is none.
        """
        import torch

        gradients = {task: [torch.zeros_like(weights) for weights in parameters] for task in _TASKS}
        for shares in losses:
            for task in _TASKS:
                if task not in shares:
                    continue
                task_gradients = torch.autograd.grad(
                    shares[task], parameters, retain_graph=task == "label", allow_unused=True
                )
                for total, gradient in zip(gradients[task], task_gradients, strict=True):
                    if gradient is not None:
                        total.add_(gradient)
        squares = {
            task: [
                float(sum_over_processes(total).cpu().double().square().sum()) for total in totals
            ]
            for task, totals in gradients.items()
        }
        pairs = zip(squares["label"], squares["rationale"], strict=True)
        shared = [(label, rationale) for label, rationale in pairs if label > 0 and rationale > 0]
        norms = {
            task: math.sqrt(math.fsum(pair[index] for pair in shared))
            for index, task in enumerate(_TASKS)
        }
        if all(math.isfinite(norm) and norm > 0 for norm in norms.values()):
            self.weight = self._section.share * norms["label"] / norms["rationale"]
            self.figures = {
                "rationale_weight": self.weight,
                "label_gradient": norms["label"],
                "rationale_gradient": norms["rationale"],
            }

    def save(self, checkpoint: Path) -> None:
        write_json(checkpoint / _FILE, {"weight": self.weight, "figures": self.figures})

    def load(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / _FILE).read_text(encoding="utf-8"))
        self.weight = state["weight"]
        self.figures = state["figures"]
