"""Distillation loss: the terms of one student and the local teachers that they compare it with.

L = L_student + Σ weight · term. Every term is a mean over the whole optimizer step, whatever
micro-batches and processes it is split into, unless it ``is_of_one_pass``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsbs.config import TrainSection
from dsbs.students.card import Head
from dsbs.training.distillation import EXAMPLES, Projection, StepTotals, Term, TermInputs
from dsbs.training.distillation.local_teachers import (
    LocalTeacher,
    add_own_inputs,
    teacher_runners,
)
from dsbs.training.encode import Encoded, PackedBatch, collate, count_examples, rows_of
from dsbs.training.losses import IGNORED
from dsbs.training.methods import View

if TYPE_CHECKING:
    from torch import Tensor

    from dsbs.training.distillation.cached_logprobs import TeacherLogprobs
    from dsbs.training.distillation.local_teachers import TeacherRunner
    from dsbs.training.packed import ForwardOutput

PROJECTIONS = "projections"  # the student's attribute with the projections, while it trains


class DistillationLoss:
    """The terms of one student.

    ``label_ids`` are the token ids of the task's label texts, ``soft_labels`` the annotations'
    distributions over them (L,) by the bytes of an input's ids (int64), and ``cached`` the
    teachers' log-probabilities by term.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        section: TrainSection,
        views: Sequence[View],
        *,
        teachers: Sequence[LocalTeacher] = (),
        label_ids: Sequence[Sequence[int]] = (),
        head: Head = "text",
        soft_labels: Mapping[bytes, NDArray[np.float32]] | None = None,
        cached: Mapping[str, TeacherLogprobs] | None = None,
    ) -> None:
        self.terms = terms
        self.hidden_states = any(term.needs_hidden_states for term in terms)
        self.label_ids: Sequence[Sequence[int]] = ()
        if any(term.needs_label_scores for term in terms):
            self.label_ids = label_ids
        self._head = head
        self._section = section
        self._views = views
        self._teachers = teachers
        self._soft_labels = soft_labels or {}
        self._cached = cached or {}
        self._needs_votes = any(term.learns_votes for term in terms)
        self.needs_teachers = any(
            term.needs_teacher and term.title not in self._cached for term in terms
        )
        self._runners: list[TeacherRunner] | None = None
        self._projections: dict[str, list[tuple[Projection, Any]]] = {}

    def attach_projections(self, model: Any, seed: int) -> None:
        """Give the student the projections that train with it, initialized from ``seed``.

        Checkpoints hold them, a finished student does not. torch's global generator, from which
        dropout is drawn, stays as it was. Raises UserError for a layer that a model does not have.
        """
        import torch

        modules: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for term in self.terms:
                if not term.needs_hidden_states:
                    continue
                configs = [teacher.model().config for teacher in self._teachers]
                self._projections[term.title] = []
                shares_tokens = [teacher.own_inputs is None for teacher in self._teachers]
                projections = term.projections(model.config, configs, self._head, shares_tokens)
                for projection in projections:
                    linear: Any = torch.nn.Identity()
                    if term.learns_projections:
                        linear = torch.nn.Linear(projection.student_width, projection.teacher_width)
                        modules[projection.name] = linear
                    self._projections[term.title].append((projection, linear))
        if modules:
            setattr(model, PROJECTIONS, torch.nn.ModuleDict(modules))

    def collate(self, rows: Sequence[Encoded]) -> dict[str, PackedBatch]:
        """A batch with what the terms need: soft labels, cached teacher log-probabilities, and the
        inputs of teachers that do not read the student's.
        """
        batch = collate(rows)
        first = batch.get(self._views[0].target)
        if self.needs_teachers:
            add_own_inputs(self._teachers, first)
        if first is not None and self._needs_votes:
            first.soft_labels = self._soft_labels_of(first)
        for term, cached in self._cached.items():
            for view in cached.views:
                if view.target in batch:
                    packed = batch[view.target]
                    packed.teacher_top_k[term] = cached.lookup(packed, view)
        return batch

    def _soft_labels_of(self, packed: PackedBatch) -> Tensor:
        """(B, L), zeros for a row without a distribution and for an empty one."""
        import torch

        nothing = np.zeros(len(next(iter(self._soft_labels.values()), ())), np.float32)
        rows: list[NDArray[np.float32]] = []
        for source, target in zip(*rows_of(packed), strict=True):
            if target[-1] == IGNORED:
                rows.append(nothing)
            else:
                rows.append(self._soft_labels.get(source.tobytes(), nothing))
        return torch.from_numpy(np.stack(rows))

    def counts(self, batch: Mapping[str, PackedBatch]) -> dict[str, int]:
        """By term, a batch's share of what the term is a mean over (see ``Term.count``); and its
        EXAMPLES.
        """
        counts = {term.title: term.count(batch, self._views) for term in self.terms}
        return counts | {EXAMPLES: count_examples(batch, self._views[0].target)}

    def losses(
        self, student: ForwardOutput, batch: Mapping[str, PackedBatch], step: StepTotals
    ) -> dict[str, Tensor]:
        """By term, the micro-batch's share of its mean over the step, without its weight."""
        any_logits = next(iter(student.logits.values()))
        inputs = TermInputs(
            batch=batch,
            views=self._views,
            step=step,
            student=student,
            teachers=self._teacher_outputs(batch, any_logits.device),
            teacher_weights=[teacher.weight for teacher in self._teachers],
            ensemble=self._section.ensemble,
            projections=self._projections,
            cached_vocabulary={term: cached.vocabulary for term, cached in self._cached.items()},
            head=self._head,
        )
        # 0, but part of the graph: distributed training waits for a gradient of every parameter
        zero = any_logits[:0].sum()
        for projections in self._projections.values():
            for _, linear in projections:
                for parameter in linear.parameters():
                    zero = zero + parameter[:0].sum()
        return {term.title: zero + term.loss(inputs) for term in self.terms}

    def _teacher_outputs(
        self, batch: Mapping[str, PackedBatch], device: Any
    ) -> list[ForwardOutput]:
        """One per local teacher; none if no term needs them."""
        import torch

        if not self.needs_teachers:
            return []
        if self._runners is None:
            self._runners = teacher_runners(
                self._teachers,
                self._views,
                self._section,
                device,
                hidden_states=self.hidden_states,
                label_ids=self.label_ids,
                scores_labels=self._head == "labels" or bool(self.label_ids),
            )
        with torch.no_grad():
            return [runner(batch) for runner in self._runners]
