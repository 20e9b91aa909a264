"""What one student learns beside its targets: its terms, the local teachers that some compare with, and what they come to.

L = L_student + Σ weight · term. Every term is a mean over the whole optimizer step, whatever micro-batches and processes it is
cut into; ``relation`` alone is of the examples of one forward pass, averaged over a step's passes by their examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsbs.config import TermSection, TrainSection
from dsbs.errors import UserError
from dsbs.training.encode import Encoded, PackedBatch, collate, rows_of
from dsbs.training.losses import IGNORED
from dsbs.training.methods import View, term_views

if TYPE_CHECKING:
    from torch import Tensor

    from dsbs.training.distillation.local_teachers import LocalTeacher
    from dsbs.training.distillation.logprobs import TeacherLogprobs
    from dsbs.training.packed.forward import ForwardOutput, ForwardRunner

PROJECTIONS = "projections"  # of the student while it learns: what its hidden states go through before they are compared
_HIDDEN = ("feature", "relation")  # need what the layers make


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What a micro-batch must know of its optimizer step: how much is taught in all of it, and the views' weights."""

    counts: Mapping[str, float]
    weights: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TermInputs:
    """All that a term may look at."""

    own: ForwardOutput
    told: Sequence[ForwardOutput]  # by each local teacher; empty where none had to be asked
    batch: dict[str, PackedBatch]
    step: StepTotals


class DistillationLoss:
    """The terms of one student. ``soft`` are its inputs' distributions over the task's labels, by the inputs' ids."""

    def __init__(
        self,
        terms: Sequence[TermSection],
        section: TrainSection,
        views: Sequence[View],
        *,
        teachers: Sequence[LocalTeacher] = (),
        labels: Sequence[Sequence[int]] = (),
        soft: Mapping[bytes, NDArray[np.float32]] | None = None,
        kept: Mapping[str, TeacherLogprobs] | None = None,
    ) -> None:
        self.terms, self._section, self._views = terms, section, views
        self._teachers = teachers
        self._soft = soft or {}
        self._kept = kept or {}
        kinds = {term.kind for term in terms}
        self.labels = (
            labels if "labels" in kinds else ()
        )  # token ids of the label texts that a pass is to score
        self.hidden_states = bool(kinds & set(_HIDDEN))
        self._votes = any(term.kind == "labels" and not term.needs_teacher for term in terms)
        self._asks = any(term.needs_teacher and term.title not in self._kept for term in terms)
        self._readers: list[ForwardRunner] | None = None
        self._maps: dict[str, list[_Pair]] = {}
        self._projections: Any = None

    # --- before training

    def attach(self, model: Any, seed: int) -> None:
        """Give the student the projections that learn with it. Checkpoints hold them, a finished student does not.

        They are drawn from ``seed`` without touching the generators that dropout is drawn from.
        """
        import torch

        made: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for term in self.terms:
                if term.kind == "feature":
                    self._maps[term.title] = list(self._pairs(term, model))
                    for pair in self._maps[term.title]:
                        made[pair.name] = torch.nn.Linear(pair.width, pair.to)
        if made:
            setattr(model, PROJECTIONS, torch.nn.ModuleDict(made))
            self._projections = getattr(model, PROJECTIONS)

    def _pairs(self, term: TermSection, model: Any) -> list[_Pair]:
        from dsbs.training.distillation.feature import layer_map

        found = []
        for number, teacher in enumerate(self._teachers):
            other = teacher.model().config
            for stack in term.stacks:
                depths = [_depth(config, stack) for config in (model.config, other)]
                try:
                    layers = layer_map(term.layers, *depths)
                except ValueError as error:
                    raise UserError(
                        f"train.terms: {term.title}: the {stack}'s {error}",
                        hint="mend layers, or take uniform or last",
                    ) from None
                for own, its in layers:
                    name = f"{term.title}-{number + 1}-{stack}-{own}-{its}"
                    found.append(
                        _Pair(
                            name,
                            number,
                            stack,
                            own,
                            its,
                            model.config.d_model,
                            other.d_model,
                            len(layers),
                        )
                    )
        return found

    # --- batches

    def collate(self, rows: Sequence[Encoded]) -> dict[str, PackedBatch]:
        """A batch with what the terms have on disk: ``soft`` (B, L), zeros where nothing is known, and teachers' log-probs."""
        import torch

        batch = collate(rows)
        first = batch.get(self._views[0].target)
        if first is not None and self._votes:
            nothing = np.zeros(len(self.labels), np.float32)
            inputs = zip(*rows_of(first), strict=True)
            soft = [
                nothing if target[-1] == IGNORED else self._soft.get(ids.tobytes(), nothing)
                for ids, target in inputs
            ]
            first.soft_labels = torch.from_numpy(np.stack(soft))
        for term in self.terms:
            if term.title in self._kept:
                for view in self._views:
                    if view.target in term_views(term, self._views) and view.target in batch:
                        flat = batch[view.target]
                        flat.teacher_top_k[term.title] = self._kept[term.title].of(flat, view)
        return batch

    def tally(self, batch: Mapping[str, PackedBatch]) -> dict[str, int]:
        """What of a batch each term is a mean over, the views' target tokens aside."""
        from dsbs.training.packed.forward import supervised_rows, unique_inputs

        inputs = unique_inputs(batch, {view.target: view.prefix for view in self._views})
        first = batch.get(self._views[0].target)
        soft = None if first is None else first.soft_labels
        taught = [row for row, real in _marked(first, supervised_rows) if real] if first else []
        return {
            "inputs": sum(
                length for length, real in zip(inputs.lengths, inputs.taught, strict=True) if real
            ),
            "targets": len(taught),  # several of a row where it is taught several rationales
            "examples": len(set(taught)),
            "soft": 0 if soft is None else int((soft.sum(1) > 0).sum()),
        }

    # --- one forward pass

    def losses(
        self, own: ForwardOutput, batch: dict[str, PackedBatch], step: StepTotals
    ) -> dict[str, Tensor]:
        """Each term's share of its mean over the step, without its weight; by the terms' names."""
        scene = TermInputs(own, self._ask(own, batch) if self._asks else (), batch, step)
        nothing = next(iter(own.logits.values()))[:0].sum()  # 0 and part of the graph
        for projection in self._projections.values() if self._projections is not None else ():
            nothing = nothing + projection.weight[:0].sum() + projection.bias[:0].sum()
        ways: dict[str, Callable[[TermSection, TermInputs], Tensor | float]] = {
            "response": self._response,
            "labels": self._label_distribution,
            "feature": self._feature,
            "relation": self._relation,
        }
        return {term.title: nothing + ways[term.kind](term, scene) for term in self.terms}

    def _ask(self, own: ForwardOutput, batch: dict[str, PackedBatch]) -> list[ForwardOutput]:
        import torch

        with torch.no_grad():
            return [
                reader(batch) for reader in self.readers(next(iter(own.logits.values())).device)
            ]

    def readers(self, device: Any) -> list[ForwardRunner]:
        """The teachers, which do not learn and drop nothing out."""
        from dsbs.training.packed.forward import ForwardRunner
        from dsbs.training.packed.t5 import is_t5

        if self._readers is None:
            models = [teacher.model().to(device) for teacher in self._teachers]
            self._readers = [
                ForwardRunner(
                    model,
                    self._views,
                    without_padding=self._section.padding == "none" and is_t5(model),
                    hidden_states=self.hidden_states,
                    labels=self.labels,
                )
                for model in models
            ]
        return self._readers

    def _response(self, term: TermSection, scene: TermInputs) -> Tensor | float:
        """Of each view's tokens the mean, weighted as the views' own losses are."""
        from dsbs.training.distillation.response import ensemble, response, response_top_k

        views = [
            name for name in term_views(term, self._views) if scene.step.weights.get(name, 0) > 0
        ]
        total = sum(scene.step.weights[name] for name in views)
        found: Tensor | float = 0.0
        for name in views:
            flat = scene.batch.get(name)
            if flat is None:
                continue
            real = flat.target != IGNORED
            how: dict[str, Any] = {
                "temperature": term.temperature,
                "divergence": term.divergence,
                "share": term.share,
            }
            if term.title in self._kept:
                ids, logprobs = (tensor[real] for tensor in flat.teacher_top_k[term.title])
                width = self._kept[term.title].width
                summed = response_top_k(
                    scene.own.logits[name][real][:, :width], ids, logprobs, **how
                )
            else:
                width = min(one.logits[name].shape[1] for one in (scene.own, *scene.told))
                said = [one.logits[name][real][:, :width] for one in scene.told]
                mean = ensemble(
                    said, self._shares, temperature=term.temperature, kind=self._section.ensemble
                )
                summed = response(scene.own.logits[name][real][:, :width], mean, **how)
            found = found + summed * (scene.step.weights[name] / total / scene.step.counts[name])
        return found

    def _label_distribution(self, term: TermSection, scene: TermInputs) -> Tensor | float:
        import torch

        from dsbs.training.distillation.labels import label_distribution
        from dsbs.training.distillation.response import ensemble
        from dsbs.training.packed.forward import supervised_rows

        if scene.own.labels is None:
            return 0.0
        first = scene.batch[self._views[0].target]
        if term.source == "annotations":
            assert first.soft_labels is not None
            target, count = first.soft_labels, scene.step.counts["soft"]
        else:
            scores = [one.labels for one in scene.told if one.labels is not None]
            target = ensemble(
                scores, self._shares, temperature=1.0, kind=self._section.ensemble
            ).exp()
            target = torch.where(supervised_rows(first)[:, None], target, 0.0)
            count = scene.step.counts["targets"]
        return label_distribution(scene.own.labels, target, temperature=term.temperature) / max(
            1, count
        )

    def _feature(self, term: TermSection, scene: TermInputs) -> Tensor | float:
        """The mean over stacks of the mean over their pairs of layers, each a mean over tokens; teachers by their weights."""
        import torch

        from dsbs.training.distillation.feature import feature
        from dsbs.training.packed.forward import unique_inputs

        inputs = unique_inputs(scene.batch, {view.target: view.prefix for view in self._views})
        target = torch.cat([flat.target for flat in scene.batch.values()]) != IGNORED
        lengths = torch.tensor(inputs.lengths, device=target.device)
        source = torch.tensor(inputs.taught, device=target.device).repeat_interleave(lengths)
        tokens = sum(
            scene.step.counts.get(view.target, 0) for view in self._views
        )  # a micro-batch may lack a view
        found: Tensor | float = 0.0
        for pair in self._maps[term.title]:
            real, count = (
                (source, scene.step.counts["inputs"])
                if pair.stack == "encoder"
                else (target, tokens)
            )
            own, its = getattr(scene.own, pair.stack), getattr(scene.told[pair.teacher], pair.stack)
            summed = feature(
                self._projections[pair.name](own[pair.own - 1][real]), its[pair.its - 1][real]
            )
            share = self._shares[pair.teacher] / sum(self._shares) / len(term.stacks) / pair.of
            found = found + summed * (share / max(1, count))
        return found

    def _relation(self, term: TermSection, scene: TermInputs) -> Tensor | float:
        """Examples are the means over their tokens of the encoder's last layer, of the first view's inputs.

        Of the examples of one forward pass: a step's passes are averaged by their examples.
        """
        from dsbs.training.distillation.relation import angles, distances
        from dsbs.training.packed.forward import row_means, supervised_rows, unique_inputs

        name = self._views[0].target
        if name not in scene.batch:
            return 0.0
        inputs = unique_inputs(scene.batch, {view.target: view.prefix for view in self._views})
        real = supervised_rows(scene.batch[name]).tolist()
        places = list(
            dict.fromkeys(
                place for place, there in zip(inputs.places[name], real, strict=True) if there
            )
        )
        points = row_means(scene.own.encoder[-1], inputs.lengths)[places]
        found: Tensor | float = 0.0
        for one, weight in zip(scene.told, self._shares, strict=True):
            its = row_means(one.encoder[-1], inputs.lengths)[places]
            part = term.distance * distances(points, its) if term.distance else 0.0
            part = part + (term.angle * angles(points, its) if term.angle else 0.0)
            found = found + part * (weight / sum(self._shares))
        return found * (len(places) / max(1, scene.step.counts["examples"]))

    @property
    def _shares(self) -> list[float]:
        return [teacher.weight for teacher in self._teachers]


@dataclass(frozen=True, slots=True)
class _Pair:
    """A layer of the student and one of a teacher that are compared; the projection between them bears ``name``."""

    name: str
    teacher: int
    stack: str
    own: int
    its: int
    width: int  # D of the student
    to: int  # D of the teacher
    of: int  # pairs of this stack and teacher


def _depth(config: Any, stack: str) -> int:
    return int(config.num_layers if stack == "encoder" else config.num_decoder_layers)


def _marked(flat: PackedBatch, mark: Callable[[PackedBatch], Tensor]) -> list[tuple[int, bool]]:
    return list(zip(flat.rows.tolist(), mark(flat).tolist(), strict=True))
