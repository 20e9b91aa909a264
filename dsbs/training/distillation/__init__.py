"""The distillation terms as pure functions of tensors; ``dsbs.config.terms`` has their settings.

Shapes: B examples, M tokens of all rows without padding, V vocabulary entries, K kept of them, L labels, D and D' dimensions.
Values are in nats where a function does not say otherwise. What is summed over rows or tokens is divided by the whole optimizer
step's count by the caller, as ``dsbs.training.losses`` has it. Teachers' tensors are constants: they take no gradient here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def precise(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type where that is wider."""
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
