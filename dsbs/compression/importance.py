"""What heads and feed-forward units are worth: the first-order estimate of what the loss would change without them.

Michel et al., 2019, arXiv:1905.10650, section 4.1: each unit gets a gate ξ = 1; its importance is the mean over examples of
|∂L(x)/∂ξ|, which is |a·∂L/∂a| of the unit's output a, the linear term of the loss's change where the output becomes 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def importance(
    model: Any, gated: Mapping[str, tuple[Any, int]], batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """For each name of ``gated`` (module, G): the importance (G,) of the G equal parts of the module's input, in nats.

    ``batches`` have input_ids and attention_mask (B, S), decoder_input_ids and labels (B, T); the loss of an example is its
    mean token cross-entropy. The gates are an example's own, so that a batch gives each example's derivative.
    """
    gates: dict[str, Tensor] = {}
    hooks = []

    def gate(name: str, parts: int) -> Any:
        def before(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,) = inputs  # (B, T, W)
            gates[name] = torch.ones(
                x.shape[0], 1, parts, 1, dtype=x.dtype, device=x.device, requires_grad=True
            )
            return ((x.unflatten(-1, (parts, -1)) * gates[name]).flatten(-2),)

        return before

    total = {name: torch.zeros(parts) for name, (_, parts) in gated.items()}
    rows = 0
    model.eval()
    try:
        hooks = [
            module.register_forward_pre_hook(gate(name, parts))
            for name, (module, parts) in gated.items()
        ]
        for batch in batches:
            loss = _losses(model, batch).sum()
            found = torch.autograd.grad(loss, [gates[name] for name in gated])
            for name, gradient in zip(gated, found, strict=True):
                total[name] += gradient.flatten(1).abs().sum(0).cpu().float()
            rows += len(batch["labels"])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value / rows for name, value in total.items()}


def _losses(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """(B,) mean token cross-entropies in nats."""
    inputs = {name: value.to(model.device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    logits = model(**inputs, use_cache=False).logits.float()
    told = labels != -100
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )
    means: Tensor = nll.sum(1) / told.sum(1)
    return means


def largest(values: Tensor, count: int) -> Tensor:
    """values (G,) -> the indices (count,) of the largest, in order of index; of equals the first."""
    return torch.sort(torch.sort(values, descending=True, stable=True).indices[:count]).values
