"""Training methods: one record each, with views, needs, description and color.

Every method is a set of views trained with one weighted loss. The prefixes are those of the
published code (google-research/distilling-step-by-step): ``predict: `` and ``explain: `` where two
tasks share a student, none where there is one task.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsbs.config import BalanceSection, LabelSource, TrainSection, base_of
from dsbs.config.registry import METHODS, entry
from dsbs.students.card import Head, Start, Target

BOTH = ("label", "rationale")  # the targets of a method that trains them as separate tasks
PAPER = "Distilling Step-by-Step (Hsieh et al., 2023, arXiv:2305.02301)"


@dataclass(frozen=True, slots=True)
class View:
    """One task of a student: its target, its weight in the loss, its prefix and decoder start."""

    target: Target
    prefix: str
    weight: float
    start: Start = "pad"
    supervised: bool = True
    """False where the view's weight is 0 from the first step to the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A training method, and how cards, tables and figures describe it."""

    name: str
    title: str
    """Its name in running text and legends."""
    views: Callable[[TrainSection], tuple[View, ...]]
    labels: tuple[LabelSource, ...] | None = None
    """Whose labels it learns. None: the recipe's ``train.labels``."""
    needs_rationales: bool = False
    description: str
    """One sentence for the model card."""
    limitation: str | None = None
    """One sentence for the model card on how to read its rationales. None: it writes none."""
    citation: str = PAPER
    color: str
    """Of its series in figures (Okabe and Ito, 2008: distinct for color-blind readers)."""


def _single_view(target: Target) -> Callable[[TrainSection], tuple[View, ...]]:
    return lambda _train: (View(target, "", 1.0),)


def _step_by_step(train: TrainSection) -> tuple[View, ...]:
    """Paper, equation 3: L_label + λ·L_rationale, here divided by 1 + λ."""
    rises = train.rationale_schedule != "constant" and train.rationale_weight_end > 0
    weight = train.rationale_weight
    if isinstance(weight, BalanceSection):  # measured: the view's own weight is never used
        weight = 1.0
    supervised = rises or weight > 0
    if train.task_token == "decoder":  # both views share one input, which is encoded once
        label = View("label", "", 1.0)
        rationale = View("rationale", "", weight, start="eos", supervised=supervised)
    else:
        label = View("label", "predict: ", 1.0)
        rationale = View("rationale", "explain: ", weight, supervised=supervised)
    return label, rationale


STEP_BY_STEP = Method(
    name="step-by-step",
    title="step-by-step",
    views=_step_by_step,
    needs_rationales=True,
    description=(
        "It learned labels and rationales as two tasks, told apart by a prefix or the decoder's "
        f"start: {PAPER}."
    ),
    limitation=(
        "Label and rationale are decoded separately: the rationale is not the reason for the "
        "label, however it reads."
    ),
    color="#D55E00",
)
FINETUNE = Method(
    name="finetune",
    title="fine-tuning",
    views=_single_view("label"),
    labels=("gold",),
    description=f"It learned labels alone: standard fine-tuning, a baseline of {PAPER}.",
    color="#0072B2",
)
DISTILL = Method(
    name="distill",
    title="standard distillation",
    views=_single_view("label"),
    labels=("teacher",),
    description=(
        f"It learned the teacher's labels alone: standard distillation, a baseline of {PAPER}."
    ),
    color="#009E73",
)
# Label and rationale in one sequence: the paper's single-task ablation (section 4.4), both orders.
RATIONALE_THEN_LABEL = Method(
    name="rationale-then-label",
    title="rationale then label",
    views=_single_view("rationale-then-label"),
    needs_rationales=True,
    description=(
        "It writes a rationale and then the label in one sequence: the single-task ablation of "
        f"{PAPER}."
    ),
    limitation=(
        "The label is written after the rationale and depends on it; that does not make the "
        "rationale its cause."
    ),
    color="#CC79A7",
)
LABEL_THEN_RATIONALE = Method(
    name="label-then-rationale",
    title="label then rationale",
    views=_single_view("label-then-rationale"),
    needs_rationales=True,
    description=(
        "It writes the label and then a rationale in one sequence: the single-task ablation of "
        f"{PAPER}."
    ),
    limitation="The rationale is written after the label, which did not depend on it.",
    color="#E69F00",
)


def views_of(name: str, train: TrainSection, head: Head) -> tuple[View, ...]:
    """The views of a method, for a student with ``head``.

    A label head and a rationale share one input without a prefix.
    """
    if head == "labels":
        train = train.model_copy(update={"task_token": "decoder"})
    return method_of(name).views(train)


def method_of(name: str) -> Method:
    """The method of a name without its terms: ``finetune+response`` is fine-tuning with a term.

    Raises KeyError for an unknown method.
    """
    method: Method = entry(METHODS, base_of(name))
    return method
