"""Response term: the student's token distributions against its local teachers'.

Sources: Hinton et al. 2015, arXiv:1503.02531, section 2 (temperature, T²); Agarwal et al. 2024,
arXiv:2306.13649, equation of D_JSD(β) (reverse and generalized Jensen-Shannon divergence).

Shapes: M target tokens, V vocabulary entries, K cached ones (see ``cached_logprobs``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dsbs.config.sections import as_tuple
from dsbs.students.card import Head
from dsbs.tasks import Task
from dsbs.training.distillation import Term, TermInputs, as_float, logprobs_at
from dsbs.training.encode import PackedBatch, supervised_rows
from dsbs.training.losses import IGNORED
from dsbs.training.methods import BOTH, View

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["kl", "reverse", "js"]


class ResponseTerm(Term):
    """Learn the local teachers' distributions over the next token; with a label head, over the
    labels.
    """

    divergence: Divergence = "kl"
    """kl: KL(teacher ‖ student); reverse: KL(student ‖ teacher); js: Jensen-Shannon."""
    share: float = Field(0.5, gt=0, lt=1)
    """js: the teacher's share β of the mixture that both are compared with."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits; its square multiplies the term."""
    targets: Annotated[
        tuple[Literal["label", "rationale"], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = ("label", "rationale")
    """Whose tokens are compared; for methods that write both in one text, all tokens. With a label
    head, the labels alone are."""
    top_k: int | None = Field(None, gt=0)
    """How many of the likeliest tokens are cached on disk. None: computed in every step."""

    heads: ClassVar[tuple[Head, ...]] = ("text", "labels")
    description: ClassVar[str] = "It also learned the probabilities of a local teacher."
    citation: ClassVar[str] = "Hinton et al., 2015, arXiv:1503.02531"

    @property
    def needs_teacher(self) -> bool:
        return True

    def compared_views(self, views: Sequence[View]) -> list[str]:
        """The views whose tokens are compared: those in ``targets``, and texts that hold both."""
        return [
            view.target
            for view in views
            if view.supervised and (view.target in self.targets or view.target not in BOTH)
        ]

    def problem(self, method: str, views: Sequence[View], task: Task, head: Head) -> str | None:
        if head == "labels" and "label" not in self.targets:
            return "compares distributions over the labels with a label head: add label to targets"
        if head == "labels" and task.has_several_labels and self.top_k is not None:
            return f"compares every label of a row of {task.name}: leave top_k out"
        if self.compared_views(views):
            return None
        return f"compares {' and '.join(self.targets)} tokens, which {method} does not learn"

    def teacher_views(self, views: Sequence[View]) -> list[str]:
        return self.compared_views(views)

    def count(self, batch: Mapping[str, PackedBatch], views: Sequence[View]) -> int:
        """Rows with a label, which a label head's term is a mean over."""
        packed = batch.get(views[0].target)
        return 0 if packed is None else int(supervised_rows(packed).sum())

    def loss(self, inputs: TermInputs) -> Tensor | float:
        """The mean over each view's tokens, the views weighted as their own losses are.

        With a label head, the mean over the rows of the divergence of class distributions.
        """
        if inputs.head == "labels":
            return self._over_classes(inputs) / max(1, inputs.step.counts[self.title])
        weights: dict[str, float] = {}
        for view in self.compared_views(inputs.views):
            weight = inputs.step.weights.get(view, 0)
            if weight > 0:
                weights[view] = weight
        total_weight = sum(weights.values())
        loss: Tensor | float = 0.0
        for view, weight in weights.items():
            if view in inputs.batch:
                share = weight / total_weight / inputs.step.counts[view]
                loss = loss + self._summed(inputs, view) * share
        return loss

    def _summed(self, inputs: TermInputs, view: str) -> Tensor:
        """The divergences of a view's tokens, summed."""
        teachers = [] if self.title in inputs.cached_vocabulary else inputs.teachers
        return self._divergence(
            inputs,
            inputs.batch[view],
            inputs.student.logits[view],
            [teacher.logits[view] for teacher in teachers],
            inputs.batch[view].target != IGNORED,
        )

    def _over_classes(self, inputs: TermInputs) -> Tensor | float:
        """The divergences of class distributions, summed over the rows.

        Of a row with several labels, the mean of their divergences, each over yes and no.
        """
        packed = inputs.first_view
        student = inputs.student.label_scores
        if packed is None or student is None:
            return 0.0
        scores = [teacher.label_scores for teacher in inputs.teachers]
        teachers = [row_scores for row_scores in scores if row_scores is not None]
        per_row = len(student) // len(packed.target)
        counted = (packed.target != IGNORED).repeat_interleave(per_row)
        return self._divergence(inputs, packed, student, teachers, counted) / per_row

    def _divergence(
        self,
        inputs: TermInputs,
        packed: PackedBatch,
        student: Tensor,
        teachers: Sequence[Tensor],
        counted: Tensor,
    ) -> Tensor:
        """student (M, V) and each teacher's (M, V) logits of the targets of ``packed`` -> ().

        ``counted`` (M,): False for those of empty rows.
        """
        all_counted = bool(counted.all())

        def select(rows: Tensor, vocabulary: int | None = None) -> Tensor:
            return (rows if all_counted else rows[counted])[:, :vocabulary]

        if self.title in inputs.cached_vocabulary:
            ids, logprobs = packed.teacher_top_k[self.title]
            return top_k_response_loss(
                select(student, inputs.cached_vocabulary[self.title]),
                select(ids),
                select(logprobs),
                temperature=self.temperature,
                divergence=self.divergence,
                share=self.share,
            )
        vocabulary = min(logits.shape[1] for logits in (student, *teachers))
        teacher = inputs.teacher_logprobs(
            [select(logits, vocabulary) for logits in teachers], self.temperature
        )
        return response_loss(
            select(student, vocabulary),
            teacher,
            temperature=self.temperature,
            divergence=self.divergence,
            share=self.share,
        )


def response_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, divergence: Divergence, share: float
) -> Tensor:
    """student (M, V) logits, teacher (M, V) log-probabilities at T -> (): T² · Σ_m D_m in nats.

    With p the teacher's and q = softmax(student / T), D is KL(p ‖ q) for kl, KL(q ‖ p) for reverse,
    and for js β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q, β = share. T² keeps the
    gradient's size as T grows (arXiv:1503.02531, section 2.1).
    """
    q = logprobs_at(student, temperature)
    return temperature**2 * _summed_divergence(as_float(teacher), q, divergence, share)


def top_k_response_loss(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    temperature: float,
    divergence: Divergence,
    share: float,
) -> Tensor:
    """``response_loss`` over K tokens and one bucket for all others: student (M, V) logits -> ().

    ``ids`` and ``logprobs`` (M, K) are the teacher's K tokens for each target token and their
    log-probabilities at T, normalized over all V. The bucket has the rest of 1 on each side:
    KL is at most the full one (data-processing inequality), and the student learns how much
    probability the other tokens have, but not which. K = V is the full term.
    """
    import torch

    q_all = logprobs_at(student, temperature)
    q = q_all.gather(-1, ids)
    p = as_float(logprobs)
    if ids.shape[-1] < q_all.shape[-1]:
        q_rest = q_all.scatter(-1, ids, -math.inf).logsumexp(dim=-1, keepdim=True)
        # rounding on disk may leave nothing, or less, for the rest; its logarithm must stay finite
        p_rest = -torch.expm1(p.logsumexp(dim=-1, keepdim=True))
        p = torch.cat([p, p_rest.clamp_min(torch.finfo(p.dtype).eps).log()], dim=-1)
        q = torch.cat([q, q_rest], dim=-1)
    return temperature**2 * _summed_divergence(p.log_softmax(dim=-1), q, divergence, share)


def _summed_divergence(p: Tensor, q: Tensor, divergence: Divergence, share: float) -> Tensor:
    """p, q (M, N) log-probabilities of teacher and student -> (): summed divergences in nats."""
    import torch

    p = p.detach().clamp_min(torch.finfo(p.dtype).min)  # 0 · log 0 is 0, not NaN
    if divergence == "kl":
        return _summed_kl(p, q)
    if divergence == "reverse":
        return _summed_kl(q, p)
    mixture = torch.logaddexp(p + math.log(share), q + math.log1p(-share))
    return share * _summed_kl(p, mixture) + (1 - share) * _summed_kl(q, mixture)


def _summed_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities, summed over all rows, in nats."""
    from torch.nn.functional import kl_div

    return kl_div(q, p, reduction="sum", log_target=True)
