"""Response terms: the student's token distributions against a local teacher's.

Sources: Hinton et al. 2015, arXiv:1503.02531, section 2 (temperature, T²); Agarwal et al. 2024, arXiv:2306.13649, equation of
D_JSD(β) (reverse and generalised Jensen-Shannon divergence).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from dsbs.training.distillation import precise

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["kl", "reverse", "js"]


def response(
    student: Tensor, teacher: Tensor, *, temperature: float, divergence: Divergence, share: float
) -> Tensor:
    """student (M, V) logits, teacher (M, V) log-probabilities at this temperature -> scalar: T² · Σ_m D_m in nats.

    With p the teacher's and q = softmax(student / T), D is KL(p ‖ q) for kl, KL(q ‖ p) for reverse, and for js
    β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q, β = share. T² keeps the gradient's size as T grows
    (arXiv:1503.02531, section 2.1).
    """
    q = (precise(student) / temperature).log_softmax(dim=-1)
    return temperature**2 * _divergence(precise(teacher), q, divergence, share)


def response_top_k(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    temperature: float,
    divergence: Divergence,
    share: float,
) -> Tensor:
    """``response`` over K kept tokens and one bucket for all others: student (M, V), ids and logprobs (M, K) -> scalar.

    ``logprobs`` are the teacher's at this temperature, normalised over all V; a row's ids differ. The bucket holds what is left
    of 1 on each side, so that KL is at most the full one's (data-processing inequality) and the student is told how much lies
    outside, but not where. K = V is the full term.
    """
    import torch

    q = (precise(student) / temperature).log_softmax(dim=-1)
    p = precise(logprobs)
    kept = q.gather(-1, ids)
    if ids.shape[-1] < q.shape[-1]:
        others = q.scatter(-1, ids, -math.inf).logsumexp(dim=-1, keepdim=True)
        # Rounding on disk may leave nothing, or less, for the others; their logarithm must stay finite.
        left = -torch.expm1(p.logsumexp(dim=-1, keepdim=True))
        p = torch.cat([p, left.clamp_min(torch.finfo(p.dtype).eps).log()], dim=-1)
        kept = torch.cat([kept, others], dim=-1)
    return temperature**2 * _divergence(p.log_softmax(dim=-1), kept, divergence, share)


def ensemble(
    logits: Sequence[Tensor],
    weights: Sequence[float],
    *,
    temperature: float,
    kind: Literal["logprobs", "probabilities"],
) -> Tensor:
    """Several teachers' logits, each (M, V), and their relative weights -> (M, V) normalised log-probabilities at T.

    logprobs: the weighted mean of log-probabilities, renormalised (a geometric mean: a token needs all teachers' consent).
    probabilities: the logarithm of the weighted mean of probabilities (one teacher suffices).
    """
    import torch

    total = sum(weights)
    parts = [(precise(one) / temperature).log_softmax(dim=-1) for one in logits]
    if kind == "logprobs":
        mean = torch.stack(
            [part * (weight / total) for part, weight in zip(parts, weights, strict=True)]
        ).sum(dim=0)
        return mean.log_softmax(dim=-1)
    return torch.stack(
        [part + math.log(weight / total) for part, weight in zip(parts, weights, strict=True)]
    ).logsumexp(dim=0)


def _divergence(p: Tensor, q: Tensor, divergence: Divergence, share: float) -> Tensor:
    """p, q (M, N) log-probabilities of teacher and student -> scalar: the rows' divergences added up, in nats."""
    import torch

    p = p.detach().clamp_min(torch.finfo(p.dtype).min)  # 0 · log 0 is 0, not NaN
    if divergence == "kl":
        return _kl(p, q)
    if divergence == "reverse":
        return _kl(q, p)
    mixture = torch.logaddexp(p + math.log(share), q + math.log1p(-share))
    return share * _kl(p, mixture) + (1 - share) * _kl(q, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities, summed over all rows, in nats."""
    from torch.nn.functional import kl_div

    return kl_div(q, p, reduction="sum", log_target=True)
