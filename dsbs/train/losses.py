"""The objective: L = (L_label + λ·L_rationale) / (1 + λ), each term a mean over all target tokens of an optimizer step.

arXiv:2305.02301, equation 4, divided by 1 + λ so that λ = 1 equals the published code's α = 0.5. The means run over the whole
step, not over micro-batches or processes: averaging micro-batch means weighs a token by how short its neighbours are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from dsbs.train.methods import View

IGNORED = -100  # a label that counts for nothing: padding


def summed_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """logits (B, T, V), labels (B, T) with IGNORED at padding -> scalar: summed token cross-entropy in nats."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def target_tokens(labels: Tensor) -> int:
    """labels (B, T) -> number of positions that count."""
    return int((labels != IGNORED).sum())


def weighted_loss(sums: Mapping[str, Tensor], counts: Mapping[str, int], views: Sequence[View]) -> Tensor:
    """Σ_v w_v · sums[v] / counts[v] / Σ_v w_v -> scalar in nats per token.

    ``sums`` are a micro-batch's summed cross-entropies, ``counts`` the whole step's target tokens, so that the losses of a
    step's micro-batches add up to the step's loss. A view without a target in the whole step contributes nothing; the
    divisor stays, so that the label's share does not jump with it.
    """
    total = sum(view.weight for view in views)
    parts = [view.weight / total / counts[view.target] * sums[view.target] for view in views if view.target in sums]
    loss = parts[0]
    for part in parts[1:]:
        loss = loss + part
    return loss
