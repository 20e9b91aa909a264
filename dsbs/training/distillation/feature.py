"""Feature term: the student's hidden states, linearly projected, against a local teacher's.

Sources: Romero et al. 2015, arXiv:1412.6550, equation 3 (hints); Jiao et al. 2020,
arXiv:1909.10351, section 3 (uniform layer maps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from dsbs.config.sections import as_tuple
from dsbs.errors import UserError
from dsbs.students.card import Head
from dsbs.training.distillation import EXAMPLES, Projection, Term, TermInputs, as_float
from dsbs.training.losses import IGNORED
from dsbs.training.methods import View

if TYPE_CHECKING:
    from torch import Tensor

    from dsbs.training.encode import PackedBatch

Layers = Literal["uniform", "last"] | dict[int, int]


class FeatureTerm(Term):
    """Bring the hidden states towards the local teachers', through learned projections."""

    layers: Layers = "uniform"
    """Which student layer is compared with which teacher layer, both counted from 1."""
    compare: Literal["values", "directions"] = "values"
    """values: the mean squared difference after a learned linear map. directions: 1 − the cosine,
    without a map, for a teacher of the student's width."""
    stacks: Annotated[
        tuple[Literal["encoder", "decoder"], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = ("encoder", "decoder")
    """Whose hidden states are compared. Of a decoder-only model, encoder means the input's tokens
    and decoder the target's. With a label head, the input's alone."""

    needs_hidden_states: ClassVar[bool] = True
    compares_tokens: ClassVar[bool] = False
    heads: ClassVar[tuple[Head, ...]] = ("text", "labels")
    description: ClassVar[str] = "It also learned the hidden states of a local teacher."
    citation: ClassVar[str] = "Romero et al., 2015, arXiv:1412.6550"

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def learns_projections(self) -> bool:
        return self.compare == "values"

    def projections(
        self,
        student_config: Any,
        teacher_configs: Sequence[Any],
        student_head: Head = "text",
        shares_tokens: Sequence[bool] = (),
    ) -> list[Projection]:
        """One for each pair of layers that the term compares. Raises UserError for a bad layer."""
        from dsbs.students.heads import hidden_size

        projections: list[Projection] = []
        for teacher, teacher_config in enumerate(teacher_configs):
            self._check_widths(hidden_size(student_config), hidden_size(teacher_config))
            of_means = bool(shares_tokens) and not shares_tokens[teacher]
            stacks = self.stacks
            if student_head == "labels" or of_means:
                stacks = ("encoder",)
            for stack in stacks:
                depths = [depth_of(config, stack) for config in (student_config, teacher_config)]
                try:
                    pairs = layer_map(self.layers, *depths)
                except ValueError as error:
                    raise UserError(
                        f"train.terms: {self.title}: the {stack}'s {error}",
                        hint="fix layers, or use uniform or last",
                    ) from None
                projections += [
                    Projection(
                        name=f"{self.title}-{teacher + 1}-{stack}-{student_layer}-{teacher_layer}",
                        teacher=teacher,
                        stack=stack,
                        student_layer=student_layer,
                        teacher_layer=teacher_layer,
                        student_width=hidden_size(student_config),
                        teacher_width=hidden_size(teacher_config),
                        share=1 / (len(pairs) * len(stacks)),
                        of_means=of_means,
                    )
                    for student_layer, teacher_layer in pairs
                ]
        return projections

    def _check_widths(self, student: int, teacher: int) -> None:
        if self.compare == "directions" and student != teacher:
            raise UserError(
                f"train.terms: {self.title}: compare: directions needs equal widths, and the "
                f"student's hidden states have {student} values, the teacher's {teacher}",
                hint="use compare: values",
            )

    def count(self, batch: Mapping[str, PackedBatch], views: Sequence[View]) -> int:
        """Input tokens that a supervised row reads, each input once."""
        from dsbs.training.packed import distinct_inputs

        inputs = distinct_inputs(batch, views)
        pairs = zip(inputs.lengths, inputs.is_supervised, strict=True)
        return sum(length for length, is_supervised in pairs if is_supervised)

    def loss(self, inputs: TermInputs) -> Tensor | float:
        """The mean over stacks of the mean over their layer pairs, each a mean over tokens, or
        over the examples of a teacher that reads other tokens.
        """
        source_mask, target_mask = _token_masks(inputs)
        masks = {"encoder": source_mask, "decoder": target_mask}
        # a micro-batch may lack a view, and with loss_mean: micro its counts do
        target_tokens = sum(inputs.step.counts.get(view.target, 0) for view in inputs.views)
        counts = {"encoder": inputs.step.counts[self.title], "decoder": target_tokens}
        shares = inputs.teacher_shares
        loss: Tensor | float = 0.0
        for projection, linear in inputs.projections[self.title]:
            stack = projection.stack
            outputs = (inputs.student, inputs.teachers[projection.teacher])
            layers = (projection.student_layer - 1, projection.teacher_layer - 1)
            if projection.of_means:
                if inputs.first_view is None:
                    continue
                count = inputs.step.counts[EXAMPLES]
                states = [
                    output.example_means(layer)
                    for output, layer in zip(outputs, layers, strict=True)
                ]
            else:
                count = counts[stack]
                states = [
                    output.states(stack)[layer][masks[stack]]
                    for output, layer in zip(outputs, layers, strict=True)
                ]
            share = shares[projection.teacher] * projection.share
            if self.compare == "directions":
                summed = direction_loss(*states)
            else:
                summed = feature_loss(linear(states[0]), states[1])
            loss = loss + summed * (share / max(1, count))
        return loss


def _token_masks(inputs: TermInputs) -> tuple[Tensor, Tensor]:
    """Which of the N input and M target tokens belong to supervised rows: (N,) and (M,)."""
    import torch

    from dsbs.training.packed import distinct_inputs

    distinct = distinct_inputs(inputs.batch, inputs.views)
    targets = torch.cat([packed.target for packed in inputs.batch.values()])
    lengths = torch.tensor(distinct.lengths, device=targets.device)
    supervised = torch.tensor(distinct.is_supervised, device=targets.device)
    return supervised.repeat_interleave(lengths), targets != IGNORED


def depth_of(config: Any, stack: str) -> int:
    """The number of layers of the encoder or the decoder; a single stack has both names."""
    names: tuple[str, ...] = ("num_layers", "num_hidden_layers")
    if stack == "decoder" and config.is_encoder_decoder:
        names = ("num_decoder_layers",)
    encoder = getattr(config, "encoder", None)
    for owner in (config, getattr(encoder, "text_config", None), encoder):
        for name in names:
            if isinstance(getattr(owner, name, None), int):
                return int(getattr(owner, name))
    raise AttributeError(f"{type(config).__name__} has no number of layers")


def layer_map(layers: Layers, student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer), from 1 and in the student's order; embeddings are none.

    uniform: layer m of M meets the teacher's layer ⌈m · N / M⌉ of N, so that the last meets the
    last. last: only these two. Raises ValueError for a layer that does not exist.
    """
    if layers == "uniform":
        return [
            (layer, -(-layer * teacher_depth // student_depth))
            for layer in range(1, student_depth + 1)
        ]
    if layers == "last":
        return [(student_depth, teacher_depth)]
    for student_layer, teacher_layer in layers.items():
        checks = [
            ("student", student_layer, student_depth),
            ("teacher", teacher_layer, teacher_depth),
        ]
        for model, layer, depth in checks:
            if not 1 <= layer <= depth:
                raise ValueError(
                    f"layers: {{{student_layer}: {teacher_layer}}}: the {model} has layers "
                    f"1 to {depth}, no layer {layer}"
                )
    return sorted(layers.items())


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """student (N, D), projected, and teacher (N, D) hidden states -> (): Σ_n mean_d (s − t)².

    Equation 3 has ½ ‖s − t‖²; with the mean over D, a weight means the same at any width. Unit: the
    hidden states', squared.
    """
    return (as_float(student) - as_float(teacher).detach()).square().mean(dim=-1).sum()


def direction_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """student (N, D) and teacher (N, D) hidden states -> (): Σ_n 1 − cos(s_n, t_n).

    Half the squared distance of the states divided by their lengths (Sun et al. 2019,
    arXiv:1908.09355, equation 7).
    """
    from torch.nn.functional import cosine_similarity

    cosines = cosine_similarity(as_float(student), as_float(teacher).detach(), dim=-1)
    return (1 - cosines).sum()
