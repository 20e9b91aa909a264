"""``drop-layers=SHARE``: evenly spaced layers of encoder and decoder are kept, as the start of a smaller student.

As a student is started in Shleifer and Rush, 2020, arXiv:2010.13002. What comes of it may also be named in ``train.init``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dsbs.compression.base import Examples, kept_of, rebuilt, rewritten, share

_BLOCK = re.compile(r"^(encoder|decoder)\.block\.(\d+)\.(.*)$")


class DropLayers:
    heals, sparse, learns_from_rows = True, False, False

    def __init__(self, value: str) -> None:
        self.removed = share("drop-layers", value)
        self.value = f"{self.removed:g}"

    def make(self, source: Path, into: Path, examples: Examples) -> None:
        del examples

        def change(model: Any, tokenizer: Any) -> Any:
            del tokenizer
            return without_layers(model, self.removed)

        rewritten(source, into, change)


def without_layers(model: Any, removed: float) -> Any:
    """A model of evenly spaced layers, one in each stack at least. Raises UserError where the encoder would lose none."""
    config = model.config
    left = kept_of("drop-layers", removed, config.num_layers, "encoder layers")
    of_decoder = max(1, config.num_decoder_layers - round(removed * config.num_decoder_layers))
    return only_layers(
        model, evenly(config.num_layers, left), evenly(config.num_decoder_layers, of_decoder)
    )


def evenly(layers: int, count: int) -> list[int]:
    """``count`` of so many layers, from 0; the first, and the last where there are two."""
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


def only_layers(model: Any, encoder: list[int], decoder: list[int]) -> Any:
    """A model of those layers in their order. The first of each is kept: it has the stack's relative position bias."""
    kept = {"encoder": encoder, "decoder": decoder}

    def renamed(name: str) -> str | None:
        """None: of a layer that goes."""
        match = _BLOCK.match(name)
        if match is None:
            return name
        stack, layer, rest = match.groups()
        return (
            f"{stack}.block.{kept[stack].index(int(layer))}.{rest}"
            if int(layer) in kept[stack]
            else None
        )

    weights = {new: value for name, value in model.state_dict().items() if (new := renamed(name))}
    shape: dict[str, Any] = {"num_layers": len(encoder), "num_decoder_layers": len(decoder)}
    if ranks := getattr(model.config, "low_rank", None):
        shape["low_rank"] = {new: rank for name, rank in ranks.items() if (new := renamed(name))}
    return rebuilt(model, weights, **shape)
