"""Matrices as products of two thin ones, and models that have them: what `dsbs compress --method low-rank` makes.

A model's ``config.low_rank`` maps a module's name to its rank; every other key is a plain T5's. Imported late, as torch is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

KEY = "low_rank"  # in config.json


class LowRank(nn.Module):
    """x (…, inputs) -> (…, outputs), through ``rank`` dimensions and without bias."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.up(self.down(x))
        return made

    @property
    def weight(self) -> Tensor:
        """T5's feed-forward layer asks its second matrix for its dtype."""
        return self.up.weight


def ranks_of(source: str) -> dict[str, int]:
    """Of the model in a local folder, by module; {} for a plain one, or a Hub id."""
    try:
        said = json.loads((Path(source) / "config.json").read_text(encoding="utf-8")).get(KEY)
    except (OSError, ValueError, AttributeError):
        return {}
    return {str(name): int(rank) for name, rank in said.items()} if isinstance(said, dict) else {}


def replace(model: Any, ranks: Mapping[str, int]) -> None:
    """Put a pair with weights yet to be loaded in the place of each named matrix."""
    for name, rank in ranks.items():
        parent, _, last = name.rpartition(".")
        there = model.get_submodule(name)
        pair = LowRank(there.in_features, there.out_features, rank).to(
            there.weight.device, there.weight.dtype
        )
        setattr(model.get_submodule(parent), last, pair)


def with_low_rank(base: type[Any]) -> type[Any]:
    """A model class that has the pairs its configuration names from the beginning, so that loading finds them.

    It bears its base's name, by which training knows a T5 and a saved configuration its class.
    """

    def init(self: Any, config: Any) -> None:
        base.__init__(self, config)
        replace(self, getattr(config, KEY, None) or {})

    return type(base.__name__, (base,), {"__init__": init, "__module__": base.__module__})
