"""The methods, as data: each is a set of views, and one weighted loss serves all.

Prefixes are the published code's (google-research/distilling-step-by-step): ``predict: `` and ``explain: `` where two tasks
share a student, none where there is one task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from dsbs.recipe import LabelSource, TrainSection

Target = Literal["label", "rationale"]


@dataclass(frozen=True, slots=True)
class View:
    """One task of a student: the prefix of its inputs, what it is to write, and its weight in the loss."""

    target: Target
    prefix: str
    weight: float


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train: its views, and whose labels it learns (None: the recipe's ``train.labels``)."""

    views: Callable[[TrainSection], tuple[View, ...]]
    labels: tuple[LabelSource, ...] | None
    needs_rationales: bool


def _label_only(train: TrainSection) -> tuple[View, ...]:
    del train
    return (View("label", "", 1.0),)


def _step_by_step(train: TrainSection) -> tuple[View, ...]:
    """Paper, equation 4: L_label + λ·L_rationale, here divided by 1 + λ."""
    return View("label", "predict: ", 1.0), View("rationale", "explain: ", train.rationale_weight)


METHODS = {
    "step-by-step": Method(_step_by_step, labels=None, needs_rationales=True),
    "finetune": Method(_label_only, labels=("gold",), needs_rationales=False),  # standard fine-tuning
    "distill": Method(_label_only, labels=("teacher",), needs_rationales=False),  # standard task distillation
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One student to train: a method, whose labels, and a seed."""

    method: str
    labels: LabelSource
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.labels}-s{self.seed}"

    @property
    def needs_teacher(self) -> bool:
        return self.labels == "teacher" or METHODS[self.method].needs_rationales


def grid(train: TrainSection) -> list[Cell]:
    """Every student that a recipe asks for, all methods of one seed before the next seed."""
    return [
        Cell(name, labels, seed)
        for seed in train.seeds
        for name in train.methods
        for labels in METHODS[name].labels or train.labels
    ]
