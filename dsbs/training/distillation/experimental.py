"""Experimental terms: variants of step-by-step that compare a student's views with each other, not with a teacher.

Sources: Chen, Huang et al. 2024, arXiv:2403.03348 (mutual information of the two tasks); Chen, Wu et al. 2023, arXiv:2310.14747
(MCC-KD: consistent answers after different rationales). Each docstring says what differs from its paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsbs.training.distillation import precise

if TYPE_CHECKING:
    from torch import Tensor


def view_distributions(logits: Tensor, counted: Tensor) -> Tensor:
    """logits (B, T, V), counted (B, T) True at a target token -> (B, V): each vocabulary entry's largest probability, sum 1.

    The maximum is taken over a row's counted tokens, so that one distribution stands for the whole text. A row without any
    gets zeros.
    """
    import torch

    likely = (
        precise(logits)
        .softmax(dim=-1)
        .masked_fill(~counted.to(logits.device).unsqueeze(-1), 0)
        .amax(dim=1)
    )
    return likely / likely.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(likely.dtype).tiny)


def mutual_information(label: Tensor, rationale: Tensor) -> Tensor:
    """label, rationale (B, V): one example's views by view_distributions -> scalar: −Σ_b Σ_v label · log rationale in nats.

    This cross-entropy is at least H(label | rationale); lowering it raises a lower bound of the mutual information
    H(label) − H(label | rationale). ``label`` is a constant here, as in the authors' code: the term teaches the rationale
    view, whose weights the label view shares. A row of zeros in either counts nothing.

    What differs from the authors' code: padding is left out of the maximum; the maxima are normalised, where the code puts
    those of the rationale through a second softmax, which leaves them nearly uniform over a large vocabulary.
    """
    import torch

    label, rationale = precise(label).detach(), precise(rationale)
    there = (label.sum(dim=-1) > 0) & (rationale.sum(dim=-1) > 0)
    log_rationale = rationale[there].clamp_min(torch.finfo(rationale.dtype).tiny).log()
    return -(label[there] * log_rationale).sum()


def consistency(first: Tensor, second: Tensor) -> Tensor:
    """first, second (M, V): the logits of an answer's tokens after two rationales -> scalar in nats:
    ½ Σ_m (KL(p ‖ q) + KL(q ‖ p)).

    p = softmax(first), q = softmax(second); both take gradient. The answer's tokens are the same in both, so that position m
    of one is position m of the other.

    What differs from the authors' code: it takes the mean over an example's tokens first and then over the examples, where the
    caller divides this sum by the step's tokens. The paper also chooses rationales that differ by their n-grams.
    """
    from torch.nn.functional import kl_div

    p, q = precise(first).log_softmax(dim=-1), precise(second).log_softmax(dim=-1)
    return (
        kl_div(q, p, reduction="sum", log_target=True)
        + kl_div(p, q, reduction="sum", log_target=True)
    ) / 2
