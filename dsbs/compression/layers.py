"""Layer dropping (``drop-layers=SHARE``): keeps evenly spaced layers of encoder and decoder.

Shleifer and Rush, 2020, arXiv:2010.13002, initialise students in this way. The result can also be
named in ``train.init``.
"""

from __future__ import annotations

import re
from typing import Any

from dsbs.compression.steps import Examples, WeightStep, rebuild, remaining

_BLOCK = re.compile(r"^(encoder|decoder)\.block\.(\d+)\.(.*)$")


class DropLayers(WeightStep):
    name = "drop-layers"

    def change(self, model: Any, _tokenizer: Any, _examples: Examples) -> Any:
        return drop_layers(model, self.share)


def drop_layers(model: Any, removed_share: float) -> Any:
    """A model with fewer layers, at least one per stack.

    Raises UserError where the encoder would lose none.
    """
    encoder_layers = model.config.num_layers
    decoder_layers = model.config.num_decoder_layers
    encoder_count = remaining(DropLayers.name, removed_share, encoder_layers, "encoder layers")
    decoder_count = max(1, decoder_layers - round(removed_share * decoder_layers))
    return keep_layers(
        model,
        evenly_spaced(encoder_layers, encoder_count),
        evenly_spaced(decoder_layers, decoder_count),
    )


def evenly_spaced(layers: int, count: int) -> list[int]:
    """``count`` layer indices from 0, with the first, and the last where there are two or more."""
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


def keep_layers(model: Any, encoder: list[int], decoder: list[int]) -> Any:
    """A model with these layers, in order.

    Each list starts with 0: the first layer of a stack has the relative position bias.
    """
    layers = {"encoder": encoder, "decoder": decoder}

    def new_name(name: str) -> str | None:
        """The name in the new model; None for a layer that is dropped."""
        match = _BLOCK.match(name)
        if match is None:
            return name
        stack, layer, rest = match.groups()
        if int(layer) not in layers[stack]:
            return None
        return f"{stack}.block.{layers[stack].index(int(layer))}.{rest}"

    weights = {new: value for name, value in model.state_dict().items() if (new := new_name(name))}
    shape: dict[str, Any] = {"num_layers": len(encoder), "num_decoder_layers": len(decoder)}
    if ranks := getattr(model.config, "low_rank", None):
        shape["low_rank"] = {new: rank for name, rank in ranks.items() if (new := new_name(name))}
    return rebuild(model, weights, **shape)
