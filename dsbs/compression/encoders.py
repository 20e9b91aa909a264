"""Compression of encoders with a label head: heads, feed-forward units, layers, and matrices.

The layers of an encoder share no position bias, so each layer loses the heads and the units that
matter least in it. Importance is that for the label's loss alone: the rationale is dropped at
inference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dsbs.compression import rebuild, select, supported_shape
from dsbs.students.encoder_shapes import HEADS, SHAPES, EncoderShape, head_size, heads_of


def shape_of(body: Any, step: str) -> EncoderShape:
    """The names of an encoder's modules. Raises UserError for one that is not supported."""
    return supported_shape(body, SHAPES, f"{step} does not support encoders")


def layer_names(body: Any, shape: EncoderShape) -> Iterator[tuple[str, Any]]:
    """Every layer with its name."""
    for index, layer in enumerate(shape.all_layers(body)):
        yield f"{shape.layers}.{index}", layer


def gated_heads(body: Any, shape: EncoderShape) -> dict[str, tuple[Any, int]]:
    """By layer, the matrix that reads its heads, and their number."""
    count = heads_of(body.config)
    return {
        name: (layer.get_submodule(shape.attention_output), count)
        for name, layer in layer_names(body, shape)
    }


def gated_units(body: Any, shape: EncoderShape) -> dict[str, tuple[Any, int]]:
    """By layer, the matrix that reads its feed-forward units, and their number."""
    count = int(getattr(body.config, shape.unit_count))
    return {
        name: (layer.get_submodule(shape.outer), count) for name, layer in layer_names(body, shape)
    }


def keep_encoder_heads(body: Any, shape: EncoderShape, heads: Mapping[str, Any]) -> Any:
    """An encoder with these heads only: equally many indices (K,) by layer, in order."""
    import torch

    weights = dict(body.state_dict())
    size = head_size(body.config)
    all_columns = heads_of(body.config) * size
    for name, layer in layer_names(body, shape):
        columns = (heads[name][:, None] * size + torch.arange(size)).flatten()
        rows = _in_parts(columns, all_columns, shape.projection_parts)
        for projection in shape.projections_of(layer):
            select(weights, f"{name}.{projection}", rows, "outputs")
        select(weights, f"{name}.{shape.attention_output}", columns, "inputs")
    return rebuild(body, weights, **{HEADS: len(next(iter(heads.values())))})


def keep_encoder_units(body: Any, shape: EncoderShape, units: Mapping[str, Any]) -> Any:
    """An encoder with these feed-forward units only: equally many indices (K,) by layer."""
    weights = dict(body.state_dict())
    count = int(getattr(body.config, shape.unit_count))
    for name, indices in units.items():
        rows = _in_parts(indices, count, shape.inner_parts)
        select(weights, f"{name}.{shape.inner}", rows, "outputs")
        select(weights, f"{name}.{shape.outer}", indices, "inputs")
    return rebuild(body, weights, **{shape.unit_count: len(next(iter(units.values())))})


def _in_parts(indices: Any, count: int, parts: int) -> Any:
    """``indices`` in each of ``parts`` blocks of ``count`` rows."""
    import torch

    return torch.cat([indices + part * count for part in range(parts)])
