"""Low-rank layers: matrices as products of two thin ones, from `dsbs compress`.

A model's ``config.low_rank`` maps a module's name to its rank; every other key is a plain model's.
This module imports torch, so it is imported where it is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dsbs.students.encoder_shapes import HEADS, narrow_heads

KEY = "low_rank"  # in config.json


class LowRank(nn.Module):
    """x (…, inputs) -> (…, outputs), through ``rank`` dimensions."""

    def __init__(self, inputs: int, outputs: int, rank: int, *, bias: bool = False) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.up(self.down(x))
        return y

    @property
    def weight(self) -> Tensor:
        """T5's feed-forward layer reads the dtype of its second matrix from here."""
        return self.up.weight


def ranks_of(source: str) -> dict[str, int]:
    """Ranks of the model in a local folder, by module; {} for a plain model or a Hub id."""
    ranks = _configuration(source).get(KEY)
    if not isinstance(ranks, dict):
        return {}
    return {str(name): int(rank) for name, rank in ranks.items()}


def is_changed(source: str) -> bool:
    """Whether the model in a local folder has low-rank pairs or removed heads."""
    return bool(ranks_of(source) or _configuration(source).get(HEADS))


def _configuration(source: str) -> dict[str, Any]:
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def replace(model: Any, ranks: Mapping[str, int]) -> None:
    """Replace each named matrix by a pair whose weights are loaded later."""
    for name, rank in ranks.items():
        parent, _, attribute = name.rpartition(".")
        matrix = model.get_submodule(name)
        has_bias = matrix.bias is not None
        pair = LowRank(matrix.in_features, matrix.out_features, rank, bias=has_bias)
        pair = pair.to(matrix.weight.device, matrix.weight.dtype)
        setattr(model.get_submodule(parent), attribute, pair)


def with_low_rank(base: type[Any]) -> type[Any]:
    """A subclass whose models have their configuration's low-rank pairs and removed heads from the
    start.

    Loading then finds them. The class keeps its base's name, by which training recognizes a T5, and
    a saved configuration its class.
    """

    def init(self: Any, config: Any) -> None:
        base.__init__(self, config)
        narrow_heads(self)
        replace(self, getattr(config, KEY, None) or {})

    if getattr(base, "has_changes", False):
        return base
    members = {"__init__": init, "__module__": base.__module__, "has_changes": True}
    return type(base.__name__, (base,), members)
