"""Low-rank factorization (``low-rank=SHARE``, ``low-rank=energy:SHARE``) of weight matrices.

Truncated singular value decomposition gives the best approximation of a rank (Eckart and Young,
1936). A matrix W (m, n) of rank r becomes the product (m, r)·(r, n), which has fewer weights only
if r·(m + n) < m·n. Other matrices, embeddings and norms stay unchanged.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from dsbs.compression import (
    Examples,
    WeightStep,
    body_of,
    check_family,
    decoders,
    make_model,
    matrices,
    parse_share,
)
from dsbs.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_ENERGY = "energy:"


class LowRankStep(WeightStep):
    """``share`` is the share of the rank to keep; with ``energy:``, the share of the sum of σ²."""

    name = "low-rank"

    def __init__(self, value: str) -> None:
        self.by_energy = value.startswith(_ENERGY)
        self.share = parse_share(self.name, value.removeprefix(_ENERGY))
        self.value = f"{self.share:g}"
        if self.by_energy:
            self.value = f"{_ENERGY}{self.value}"

    def rank(self, singular_values: Tensor) -> int:
        """The rank to keep, from ``singular_values`` (R,) in descending order."""
        if not self.by_energy:
            return max(1, round(self.share * len(singular_values)))
        energy = singular_values.square()
        cumulative_share = energy.cumsum(0) / energy.sum()
        return int((cumulative_share < self.share).sum().item()) + 1

    def change(self, model: Any, _tokenizer: Any, _examples: Examples) -> Any:
        body = body_of(model)
        check_family(body, self.name)
        if getattr(decoders.DECODERS.get(body.config.model_type), "transposed", False):
            raise UserError(
                f"low-rank does not support {body.config.model_type}, whose matrices are no linear "
                "layers",
                hint="use prune-ff or drop-layers",
            )
        changed = factorize(body, self)
        if changed is None:
            raise UserError(
                f"low-rank={self.value} makes no matrix smaller: at that rank two factors have "
                "more weights than the matrix",
                hint="use a smaller share; a square matrix needs less than 0.5 of its rank",
            )
        return changed


def factors(decomposition: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The two factors of the best approximation of a rank.

    ``decomposition`` is U (m, R), σ (R,), V (R, n); returns down (r, n) and up (m, r), whose
    product up·down approximates U·σ·V. Each factor gets √σ, so that both learn at the same pace.
    """
    left, singular_values, right = decomposition
    root = singular_values[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def factorize(model: Any, step: LowRankStep) -> Any | None:
    """The model with low-rank pairs where they are smaller; None where none would be."""
    import torch

    from dsbs.students.low_rank import KEY, LowRank

    weights = dict(model.state_dict())
    ranks: dict[str, int] = dict(getattr(model.config, KEY, None) or {})
    is_changed = False
    for name, child in matrices(model):
        if isinstance(child, LowRank):
            bias = child.up.bias
            matrix = (child.up.weight @ child.down.weight).detach()
        else:
            bias = child.bias
            matrix = child.weight.detach()
        decomposition = torch.linalg.svd(matrix.cpu().double(), full_matrices=False)
        rank = step.rank(decomposition[1])
        current_size = sum(
            parameter.numel() for parameter in child.parameters() if parameter.ndim == 2
        )
        if rank * sum(matrix.shape) >= current_size:
            continue
        for key in [key for key in weights if key.startswith(f"{name}.")]:
            del weights[key]
        down, up = factors(decomposition, rank)
        weights[f"{name}.down.weight"] = down.to(matrix.dtype)
        weights[f"{name}.up.weight"] = up.to(matrix.dtype)
        if bias is not None:
            weights[f"{name}.up.bias"] = bias.detach()
        ranks[name] = rank
        is_changed = True
    if not is_changed:
        return None
    config = copy.deepcopy(model.config)
    setattr(config, KEY, ranks)
    return make_model(model, config, weights)
