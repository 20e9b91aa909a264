"""Distillation terms: their base class and what their losses are computed from.

A kind of term is one file with one subclass of ``Term``, registered in ``dsbs.config.registry``:
its recipe keys, its facts (needs, description, citation) and its loss. A student learns

    L = L_student + Σ weight · term

where every term is a mean over the whole optimizer step. Losses return a micro-batch's share of
that mean: sums over its rows or tokens, divided by the step's count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dsbs.config import TrainSection
from dsbs.config.terms import TermSettings
from dsbs.errors import UserError
from dsbs.students.card import Head
from dsbs.tasks import Task
from dsbs.training.grid import StudentSpec
from dsbs.training.methods import View, views_of

if TYPE_CHECKING:
    from torch import Tensor

    from dsbs.training.encode import PackedBatch
    from dsbs.training.packed import ForwardOutput

Ensemble = Literal["logprobs", "probabilities"]
EXAMPLES = "(examples)"  # among a step's counts: the examples of the first view, each once


@dataclass(frozen=True, slots=True)
class StepTotals:
    """The optimizer step of a micro-batch: the counts over all of it, and the views' weights."""

    counts: Mapping[str, float]
    """Target tokens by view, ``Term.count`` by term and the EXAMPLES, over all micro-batches and
    processes."""
    weights: Mapping[str, float]
    """By view."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map from a student layer's hidden states to the width of a teacher layer's."""

    name: str
    teacher: int
    """The teacher's index."""
    stack: Literal["encoder", "decoder"]
    student_layer: int
    """From 1, like ``teacher_layer``."""
    teacher_layer: int
    student_width: int
    teacher_width: int
    share: float
    """Of this pair of layers in the teacher's loss: the mean over stacks of each one's mean."""
    of_means: bool = False
    """Whether means over an example's input are compared: the teacher reads other tokens."""


@dataclass(frozen=True, slots=True)
class TermInputs:
    """What a term's loss is computed from: the forward passes of one micro-batch and its step."""

    batch: Mapping[str, PackedBatch]
    views: Sequence[View]
    step: StepTotals
    student: ForwardOutput
    teachers: Sequence[ForwardOutput]
    """One per local teacher; empty if no term of the student needs them. One that reads other
    tokens than the student has no logits."""
    teacher_weights: Sequence[float]
    ensemble: Ensemble
    projections: Mapping[str, Sequence[tuple[Projection, Any]]]
    """By term, its projections and their ``torch.nn.Linear``."""
    cached_vocabulary: Mapping[str, int]
    """By term with cached teacher log-probabilities, how many vocabulary entries they cover."""
    head: Head = "text"
    """The student's."""

    @property
    def first_view(self) -> PackedBatch | None:
        """The batch of the first view; None if no row of the micro-batch has it."""
        return self.batch.get(self.views[0].target)

    @property
    def teacher_shares(self) -> list[float]:
        """The teachers' weights, normalized to sum 1."""
        total = sum(self.teacher_weights)
        return [weight / total for weight in self.teacher_weights]

    def teacher_logprobs(self, logits: Sequence[Tensor], temperature: float) -> Tensor:
        """The teachers' logits, each (M, V) -> (M, V) log-probabilities of their ensemble."""
        return ensemble_logprobs(
            logits, self.teacher_weights, temperature=temperature, ensemble=self.ensemble
        )


class Term(TermSettings):
    """A kind of term: the keys of its entries in ``train.terms``, its facts and its loss."""

    needs_hidden_states: ClassVar[bool] = False
    """Whether it compares the hidden states of student and teachers."""
    needs_label_scores: ClassVar[bool] = False
    """Whether it compares the probabilities of the task's label texts."""
    compares_tokens: ClassVar[bool] = True
    """Whether a text student's teacher must read and write the student's tokens."""

    heads: ClassVar[tuple[Head, ...]] = ("text",)
    """The heads of students that can learn it."""

    def problem(self, method: str, views: Sequence[View], task: Task, head: Head) -> str | None:
        """Why a student of ``method`` cannot learn the term, e.g. "needs a fixed set of labels".

        None if it can. ``views`` are the method's, without those whose weight stays 0.
        """
        return None

    def teacher_views(self, views: Sequence[View]) -> list[str]:
        """The views that a local teacher must have learned."""
        return [view.target for view in views]

    def count(self, batch: Mapping[str, PackedBatch], views: Sequence[View]) -> int:
        """A batch's share of what the term is a mean over, if that is not the target tokens."""
        return 0

    def projections(
        self,
        student_config: Any,
        teacher_configs: Sequence[Any],
        student_head: Head = "text",
        shares_tokens: Sequence[bool] = (),
    ) -> list[Projection]:
        """The projections that the term trains beside the student.

        ``shares_tokens``: whether each teacher reads the student's tokens; empty: all do.
        """
        return []

    def loss(self, inputs: TermInputs) -> Tensor | float:
        """The micro-batch's share of the term's mean over the step, without its weight."""
        raise NotImplementedError


def terms_of(section: TrainSection, method: str) -> tuple[Term, ...]:
    """The terms that a method's name adds, in its order."""
    terms: list[Term] = []
    for term in section.terms_of(method):
        assert isinstance(term, Term), f"{type(term)} is registered as a term and has no loss"
        terms.append(term)
    return tuple(terms)


def check_terms(
    section: TrainSection, task: Task, specs: Sequence[StudentSpec], head: Head
) -> None:
    """Raise UserError for a term that a head, a method or a task has nothing to learn from."""
    for spec in specs:
        views = [view for view in views_of(spec.method, section, head) if view.supervised]
        for term in terms_of(section, spec.method):
            if head not in term.heads:
                raise UserError(
                    f"train.terms: {term.title} compares written tokens, and student.head is "
                    "labels",
                    hint="use kind: response or labels, which compare distributions over the "
                    "labels, or student.head: text",
                )
            problem = term.problem(spec.method, views, task, head)
            if problem:
                raise UserError(
                    f"train.terms: {term.title} {problem}",
                    hint="add the term to another method, or leave it out",
                )


def as_float(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is wider."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def logprobs_at(logits: Tensor, temperature: float) -> Tensor:
    """logits (M, V) -> (M, V) log-probabilities of softmax(logits / T)."""
    wide = as_float(logits)
    if temperature != 1:
        wide = wide / temperature
    return wide.log_softmax(dim=-1)


def ensemble_logprobs(
    logits: Sequence[Tensor],
    weights: Sequence[float],
    *,
    temperature: float,
    ensemble: Ensemble,
) -> Tensor:
    """Several teachers' logits (M, V) and relative weights -> (M, V) log-probabilities at T.

    logprobs: the weighted mean of log-probabilities, renormalized. It is a geometric mean, so that
    a token needs all teachers' consent. probabilities: the logarithm of the weighted mean of
    probabilities, for which one teacher suffices.
    """
    import torch

    total = sum(weights)
    logprobs = [logprobs_at(teacher, temperature) for teacher in logits]
    if len(logprobs) == 1:
        return logprobs[0]
    pairs = list(zip(logprobs, weights, strict=True))
    if ensemble == "logprobs":
        mean = torch.stack([teacher * (weight / total) for teacher, weight in pairs]).sum(dim=0)
        return mean.log_softmax(dim=-1)
    weighted = [teacher + math.log(weight / total) for teacher, weight in pairs]
    return torch.stack(weighted).logsumexp(dim=0)
