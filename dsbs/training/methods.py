"""The methods, as data: each is a set of views, and one weighted loss serves all.

Prefixes are the published code's (google-research/distilling-step-by-step): ``predict: `` and ``explain: `` where two tasks
share a student, none where there is one task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsbs.config import LabelSource, TrainSection, base_of
from dsbs.config.registry import METHODS, entry
from dsbs.students import Start, Target

BOTH = ("label", "rationale")  # the tasks of a method that keeps them apart


@dataclass(frozen=True, slots=True)
class View:
    """One task of a student: what it is to write, its weight in the loss, and how it is told: by prefix or decoder start."""

    target: Target
    prefix: str
    weight: float
    start: Start = "pad"
    taught: bool = True  # False: its weight is 0 from the first step to the last


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train: its views, and whose labels it learns (None: the recipe's ``train.labels``)."""

    views: Callable[[TrainSection], tuple[View, ...]]
    labels: tuple[LabelSource, ...] | None
    needs_rationales: bool


def _one_task(target: Target) -> Callable[[TrainSection], tuple[View, ...]]:
    def views(train: TrainSection) -> tuple[View, ...]:
        del train
        return (View(target, "", 1.0),)

    return views


def _step_by_step(train: TrainSection) -> tuple[View, ...]:
    """Paper, equation 3: L_label + λ·L_rationale, here divided by 1 + λ."""
    grows = train.rationale_schedule != "constant" and train.rationale_weight_end > 0
    taught = grows or train.rationale_weight > 0
    if train.task_token == "decoder":  # the input is the same for both and encoded once
        return View("label", "", 1.0), View(
            "rationale", "", train.rationale_weight, start="eos", taught=taught
        )
    return View("label", "predict: ", 1.0), View(
        "rationale", "explain: ", train.rationale_weight, taught=taught
    )


STEP_BY_STEP = Method(_step_by_step, labels=None, needs_rationales=True)
# standard fine-tuning
FINETUNE = Method(_one_task("label"), labels=("gold",), needs_rationales=False)
# standard task distillation
DISTILL = Method(_one_task("label"), labels=("teacher",), needs_rationales=False)
# both in one sequence: the paper's single-task ablation (section 4.4), in either order
RATIONALE_THEN_LABEL = Method(_one_task("rationale-then-label"), labels=None, needs_rationales=True)
LABEL_THEN_RATIONALE = Method(_one_task("label-then-rationale"), labels=None, needs_rationales=True)


def method_of(name: str) -> Method:
    """The method that a name stands for, whatever terms it adds: ``finetune+response`` is finetune with one more term."""
    method: Method = entry(METHODS, base_of(name))
    return method


@dataclass(frozen=True, slots=True)
class Cell:
    """One student to train: a method, whose labels, the share of the train rows, and a seed."""

    method: str
    labels: LabelSource
    seed: int
    subset: float = 1.0
    learns_votes: bool = False  # a term of its method has its targets from the annotations

    @property
    def identity(self) -> dict[str, Any]:
        """What of it decides the student."""
        return {
            "method": self.method,
            "labels": self.labels,
            "seed": self.seed,
            "subset": self.subset,
        }

    @property
    def system(self) -> str:
        """What the cells of all seeds are called together."""
        share = "" if self.subset == 1 else f"-n{self.subset:g}"
        return f"{self.method}-{self.labels}{share}"

    @property
    def name(self) -> str:
        return f"{self.system}-s{self.seed}"

    @property
    def needs_teacher(self) -> bool:
        return (
            self.labels == "teacher" or self.learns_votes or method_of(self.method).needs_rationales
        )


def grid(train: TrainSection) -> list[Cell]:
    """Every student that a recipe asks for: all methods of a seed and a share before the next."""
    return [
        Cell(name, labels, seed, subset, learns_votes=learns_votes(train, name))
        for seed in train.seeds
        for subset in sorted(train.subset, reverse=True)
        for name in train.methods
        for labels in method_of(name).labels or train.labels
    ]


def learns_votes(train: TrainSection, method: str) -> bool:
    return any(term.learns_votes for term in train.terms_of(method))
