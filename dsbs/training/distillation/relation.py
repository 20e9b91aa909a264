"""Relation terms: how a batch's examples lie to each other, in the student's space and in a local teacher's.

Source: Park et al. 2019, arXiv:1904.05068, equations 3 to 6. Neither scale nor rotation nor width of a space matters; no
projection is learned. Without units.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsbs.training.distillation import precise

if TYPE_CHECKING:
    from torch import Tensor


def distances(student: Tensor, teacher: Tensor) -> Tensor:
    """student (B, D), teacher (B, D') -> scalar: mean over pairs of Huber(ψ_s − ψ_t), δ = 1; 0 for fewer than 2 examples.

    ψ is a pair's Euclidean distance divided by the mean one of all pairs of the batch in the same space.
    """
    from torch.nn.functional import huber_loss

    if len(student) < 2:
        return student.sum() * 0
    return huber_loss(_relative_distances(student), _relative_distances(teacher.detach()))


def angles(student: Tensor, teacher: Tensor) -> Tensor:
    """student (B, D), teacher (B, D') -> scalar: mean over triples (i, j, k) of Huber(cos_s − cos_t), δ = 1.

    cos is that of the angle at j between i and k. A triple with no angle on either side, where i or k lies on j, is not
    counted; 0 where no triple is left. Takes memory of B² · D and B³ numbers.
    """
    import torch
    from torch.nn.functional import huber_loss

    own, own_there = _cosines(student)
    other, other_there = _cosines(teacher.detach())
    counted = (
        own_there & other_there & ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    )
    if not counted.any():
        return student.sum() * 0
    return huber_loss(own[counted], other[counted])


def _relative_distances(points: Tensor) -> Tensor:
    """(B, D) -> (B(B−1)/2,): the pairs' distances, 1 on average; all 0 where all examples are the same."""
    import torch
    from torch.nn.functional import pdist

    apart = pdist(precise(points))  # its gradient is 0, not NaN, where two examples are the same
    return apart / apart.mean().clamp_min(torch.finfo(apart.dtype).tiny)


def _cosines(points: Tensor) -> tuple[Tensor, Tensor]:
    """(B, D) -> cosines (B, B, B) at [j, i, k] of the angle at j, and whether there is one."""
    import torch

    points = precise(points)
    arms = points.unsqueeze(0) - points.unsqueeze(1)
    squares = arms.square().sum(dim=-1)
    there = squares > 0
    # A length of 0 never enters the root or the quotient, whose gradients would be NaN.
    unit = arms / torch.where(there, squares, 1).sqrt().unsqueeze(-1)
    with torch.autocast(points.device.type, enabled=False):  # which would multiply in 16 bits
        cosines = unit @ unit.transpose(1, 2)
    return cosines, there.unsqueeze(2) & there.unsqueeze(1)
