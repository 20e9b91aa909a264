"""Feature terms: the student's hidden states, through a learned projection, against a local teacher's.

Sources: Romero et al. 2015, arXiv:1412.6550, equation 3 (hints); Jiao et al. 2020, arXiv:1909.10351, section 3 (uniform maps).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from dsbs.training.distillation import precise

if TYPE_CHECKING:
    from torch import Tensor


def layer_map(
    layers: Literal["uniform", "last"] | Mapping[int, int], student_depth: int, teacher_depth: int
) -> list[tuple[int, int]]:
    """(student's layer, teacher's layer) pairs in the student's order, from 1; the embeddings are no layer.

    uniform: every layer m of M meets the teacher's ⌈m · N / M⌉ of N, so that the last meets the last. last: these two alone.
    Raises ValueError for a layer that is not there.
    """
    if layers == "uniform":
        return [
            (layer, -(-layer * teacher_depth // student_depth))
            for layer in range(1, student_depth + 1)
        ]
    if layers == "last":
        return [(student_depth, teacher_depth)]
    for own, other in layers.items():
        for whose, layer, depth in (
            ("student", own, student_depth),
            ("teacher", other, teacher_depth),
        ):
            if not 1 <= layer <= depth:
                raise ValueError(
                    f"layers: {{{own}: {other}}}: the {whose} has layers 1 to {depth}, no layer {layer}"
                )
    return sorted(layers.items())


def feature(student: Tensor, teacher: Tensor) -> Tensor:
    """student (N, D) hidden states projected to the teacher's width, teacher (N, D) -> scalar: Σ_n mean_d (s − t)².

    N are the tokens of all rows without padding. Equation 3 has ½ ‖s − t‖²; the mean over D makes a weight mean the same at any
    width. In the hidden states' units squared.
    """
    return (precise(student) - precise(teacher).detach()).square().mean(dim=-1).sum()
