"""Label term: the student's distribution over the task's labels against a teacher's.

The target is the votes or probabilities of the annotations, or the label scores of local teachers.
Source: Hinton et al. 2015, arXiv:1503.02531, with a task's labels as the classes: a teacher behind
an API shows no more than these.

Shapes: B rows, L labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from dsbs.students.card import Head
from dsbs.tasks import Task
from dsbs.training.distillation import Term, TermInputs, as_float
from dsbs.training.methods import View

if TYPE_CHECKING:
    from torch import Tensor

    from dsbs.training.encode import PackedBatch


class LabelsTerm(Term):
    """Learn a distribution over the task's labels."""

    source: Literal["annotations", "teachers"] = "annotations"
    """Whose distribution: the annotations' votes, or the local teachers'."""
    temperature: float = Field(1.0, gt=0)
    """Divides the log-probabilities; its square multiplies the term."""

    needs_label_scores: ClassVar[bool] = True
    compares_tokens: ClassVar[bool] = False
    heads: ClassVar[tuple[Head, ...]] = ("text", "labels")
    description: ClassVar[str] = "It also learned a distribution over the labels."
    citation: ClassVar[str] = "Hinton et al., 2015, arXiv:1503.02531"

    @property
    def needs_teacher(self) -> bool:
        return self.source == "teachers"

    @property
    def learns_votes(self) -> bool:
        return self.source == "annotations"

    def problem(self, method: str, views: Sequence[View], task: Task, head: Head) -> str | None:
        if head == "labels" and task.has_several_labels:
            return (
                f"compares one distribution over all labels, and a row of {task.name} has several "
                "labels: use kind: response, which compares the probability of each label"
            )
        if task.has_several_labels:
            return f"needs one label for each row, and {task.name} has several"
        if task.labels is None:
            return f"needs a fixed set of labels, and {task.name} has none"
        if views[0].target != "label":
            return f"scores labels by themselves, and {method} writes them beside a rationale"
        return None

    def teacher_views(self, views: Sequence[View]) -> list[str]:
        return [views[0].target]

    def count(self, batch: Mapping[str, PackedBatch], views: Sequence[View]) -> int:
        """Rows with a target distribution."""
        from dsbs.training.encode import supervised_rows

        packed = batch.get(views[0].target)
        if packed is None:
            return 0
        if self.source == "teachers":
            return int(supervised_rows(packed).sum())
        assert packed.soft_labels is not None
        return int((packed.soft_labels.sum(1) > 0).sum())

    def loss(self, inputs: TermInputs) -> Tensor | float:
        import torch

        from dsbs.training.encode import supervised_rows

        packed = inputs.first_view
        student = inputs.student.label_scores
        if packed is None or student is None:
            return 0.0
        if self.source == "annotations":
            assert packed.soft_labels is not None
            target = packed.soft_labels
        else:
            scores = [
                teacher.label_scores
                for teacher in inputs.teachers
                if teacher.label_scores is not None
            ]
            target = inputs.teacher_logprobs(scores, temperature=1.0).exp()
            target = torch.where(supervised_rows(packed)[:, None], target, 0.0)
        summed = label_distribution_loss(student, target, temperature=self.temperature)
        return summed / max(1, inputs.step.counts[self.title])


def label_distribution_loss(scores: Tensor, target: Tensor, *, temperature: float) -> Tensor:
    """scores (B, L), target (B, L) probabilities -> (): T² · Σ_b KL(p_b ‖ softmax(scores_b / T)).

    In nats. ``scores`` are the log-probabilities that the student gives each label's text. p is the
    target softened alike: target^(1/T), normalized; what is 0 stays 0. A row of zeros has no target
    and adds nothing.
    """
    from torch.nn.functional import kl_div

    target = as_float(target).detach()
    has_target = target.sum(dim=-1) > 0
    p = (target[has_target].log() / temperature).softmax(dim=-1)
    q = (as_float(scores)[has_target] / temperature).log_softmax(dim=-1)
    return temperature**2 * kl_div(q, p, reduction="sum")
