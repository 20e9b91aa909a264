"""Losses: token cross-entropy, and the weighted sum over a student's views.

Shapes: B rows, T target tokens of a row, M of all rows, V vocabulary entries. Source: the paper's
equation 4, L = L_label + λ L_rationale, here divided by 1 + λ; L_v is the mean token cross-entropy
of a view over one whole optimizer step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dsbs.config import ResolvedTrainSection
from dsbs.training.methods import View

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # the target id of padding, which counts in no loss


def summed_nll(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """The summed cross-entropy () in nats.

    ``logits`` (M, V) or (B, T, V), ``labels`` (M,) or (B, T) with IGNORED at padding;
    ``class_weights`` (V,) multiply the loss of each label.
    """
    import torch

    wide = logits.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(
        wide,
        labels.flatten(),
        weight=None if class_weights is None else class_weights.to(wide.dtype),
        ignore_index=IGNORED,
        reduction="sum",
    )


def summed_binary_nll(
    logits: Tensor, targets: Tensor, positive_weights: Tensor | None = None
) -> Tensor:
    """The binary cross-entropies of L labels, averaged over them and summed over rows: () in nats.

        Σ_b 1/L Σ_l −w_l y_bl log σ(z_bl) − (1 − y_bl) log(1 − σ(z_bl))

    ``logits`` z (B, L); ``targets`` y (B, L), 1 or 0, and IGNORED in rows that do not count;
    ``positive_weights`` w (L,), as torch.nn.BCEWithLogitsLoss has them in ``pos_weight``.
    """
    import torch

    counted = targets[:, 0] != IGNORED
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))[counted]
    weights = None if positive_weights is None else positive_weights.to(wide.dtype)
    summed: Tensor = torch.nn.functional.binary_cross_entropy_with_logits(
        wide, targets[counted].to(wide.dtype), pos_weight=weights, reduction="sum"
    )
    return summed / logits.shape[1]


def weighted_loss(
    sums: Mapping[str, Tensor], counts: Mapping[str, float], weights: Mapping[str, float]
) -> Tensor:
    """Σ_v w_v · sums[v] / counts[v] / Σ_v w_v -> scalar in nats per token.

    ``sums`` are a micro-batch's summed cross-entropies, ``counts`` the whole step's target tokens,
    so that the losses of a step's micro-batches add up to the step's loss. A view without a target
    in the whole step contributes nothing; the divisor stays, so that the label's share does not
    jump with it.
    """
    total = sum(weights.values())
    shares = [
        weight / total / counts[name] * sums[name]
        for name, weight in weights.items()
        if name in sums
    ]
    loss = shares[0]
    for share in shares[1:]:
        loss = loss + share
    return loss


def view_weights(views: Sequence[View], train: ResolvedTrainSection, step: int) -> dict[str, float]:
    """Each view's weight at an optimizer step (from 0): the label's is 1, the rationale's is λ.

    λ goes from rationale_weight to rationale_weight_end at max_steps: in a line (linear) or along
    half a cosine (cosine).
    """
    progress = min(1.0, step / train.max_steps)
    shares = {
        "constant": 0.0,
        "linear": progress,
        "cosine": (1 - math.cos(math.pi * progress)) / 2,
    }
    share = shares[train.rationale_schedule]
    weights = {view.target: view.weight for view in views}
    if "rationale" in weights:
        change = train.rationale_weight_end - weights["rationale"]
        weights["rationale"] += change * share
    return {str(target): weight for target, weight in weights.items()}
