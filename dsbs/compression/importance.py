"""Importance of attention heads and feed-forward units: first-order estimate of the loss change.

Michel et al., 2019, arXiv:1905.10650, section 4.1: each unit gets a gate ξ = 1. Its importance is
the mean over examples of |∂L(x)/∂ξ|. That equals |a·∂L/∂a| for the unit's output a: the linear term
of the change of the loss when the output becomes 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def importance(
    model: Any, gated: Mapping[str, tuple[Any, int]], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Importance (G,) in nats of the G equal parts of each module's input.

    ``gated`` maps a name to (module, G). ``batches`` have input_ids and attention_mask (B, S),
    decoder_input_ids and labels (B, T). The loss of an example is its mean token cross-entropy.
    Every example has gates of its own, so that one batch gives the derivative of each example.
    """
    gates: dict[str, Tensor] = {}
    hooks = []

    def gate(name: str, count: int) -> Any:
        def multiply(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,) = inputs  # (B, T, W)
            gates[name] = torch.ones(
                x.shape[0], 1, count, 1, dtype=x.dtype, device=x.device, requires_grad=True
            )
            return ((x.unflatten(-1, (count, -1)) * gates[name]).flatten(-2),)

        return multiply

    totals = {name: torch.zeros(count) for name, (_, count) in gated.items()}
    rows = 0
    model.eval()
    try:
        hooks = [
            module.register_forward_pre_hook(gate(name, count))
            for name, (module, count) in gated.items()
        ]
        for batch in batches:
            loss = _example_losses(model, batch).sum()
            gradients = torch.autograd.grad(loss, [gates[name] for name in gated])
            for name, gradient in zip(gated, gradients, strict=True):
                totals[name] += gradient.flatten(1).abs().sum(0).cpu().float()
            rows += len(batch["labels"])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / rows for name, total in totals.items()}


def _example_losses(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Mean token cross-entropy (B,) of each example, in nats."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits.float()
    is_target = labels != -100
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )
    means: Tensor = nll.sum(1) / is_target.sum(1)
    return means


def largest(values: Tensor, count: int) -> Tensor:
    """Indices (count,) of the largest of ``values`` (G,), ascending; the first of equal values."""
    return torch.sort(torch.sort(values, descending=True, stable=True).indices[:count]).values
