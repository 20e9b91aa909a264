"""Compression of decoders: whole groups of attention heads, feed-forward units and layers.

The result is a plain transformers model: its configuration has the new numbers. Where several
query heads share a key and a value (grouped-query attention), a whole group is removed, so that all
groups stay equally large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dsbs.compression import rebuild, select, supported_shape
from dsbs.errors import UserError


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Names of a family's modules, each relative to a layer, and of its configuration's keys."""

    layers: str
    layer_count: str
    unit_count: str
    queries: str
    keys_and_values: tuple[str, ...]
    attention_output: str
    inner: tuple[str, ...]
    outer: str
    transposed: bool = False
    """Whether outputs are columns of a matrix; queries, keys and values then share one, and the
    configuration ties the size of a head to the model's width."""

    def all_layers(self, body: Any) -> Any:
        return body.get_submodule(self.layers)

    def named_layers(self, body: Any) -> Iterator[tuple[str, Any]]:
        """Every layer with its name."""
        for index, layer in enumerate(self.all_layers(body)):
            yield f"{self.layers}.{index}", layer

    def matrices(self, body: Any) -> Iterator[tuple[str, Any]]:
        """Every attention and feed-forward matrix with its name."""
        names = (self.queries, *self.keys_and_values, self.attention_output, *self.inner)
        for layer_name, layer in self.named_layers(body):
            for name in (*names, self.outer):
                yield f"{layer_name}.{name}", layer.get_submodule(name)


_LLAMA = DecoderShape(
    layers="model.layers",
    layer_count="num_hidden_layers",
    unit_count="intermediate_size",
    queries="self_attn.q_proj",
    keys_and_values=("self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.o_proj",
    inner=("mlp.gate_proj", "mlp.up_proj"),
    outer="mlp.down_proj",
)
_GPT2 = DecoderShape(
    layers="transformer.h",
    layer_count="n_layer",
    unit_count="n_inner",
    queries="attn.c_attn",
    keys_and_values=(),
    attention_output="attn.c_proj",
    inner=("mlp.c_fc",),
    outer="mlp.c_proj",
    transposed=True,
)
DECODERS = {"gpt2": _GPT2, "llama": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA}


def is_decoder(body: Any) -> bool:
    """Whether a model has one stack of layers that reads and writes, in the table or not."""
    return hasattr(body, "lm_head") and not body.config.is_encoder_decoder


def decoder_shape(body: Any, step: str) -> DecoderShape:
    """The names of a decoder's modules. Raises UserError for one that is not supported."""
    return supported_shape(body, DECODERS, f"{step} does not support decoders")


def units_of(body: Any, shape: DecoderShape) -> int:
    """The feed-forward units of a layer; GPT-2 has four for each hidden value unless it says so."""
    units = getattr(body.config, shape.unit_count)
    return int(4 * body.config.hidden_size if units is None else units)


def gated_groups(body: Any, shape: DecoderShape) -> dict[str, tuple[Any, int]]:
    """By layer, the matrix that reads its heads, and the number of groups of heads.

    Raises UserError for a family whose heads cannot be removed.
    """
    if shape.transposed:
        raise UserError(
            f"prune-heads does not support {body.config.model_type}: its configuration ties the "
            "size of a head to the model's width",
            hint="use prune-ff or drop-layers",
        )
    groups = int(body.config.num_key_value_heads)
    return {
        name: (layer.get_submodule(shape.attention_output), groups)
        for name, layer in shape.named_layers(body)
    }


def gated_decoder_units(body: Any, shape: DecoderShape) -> dict[str, tuple[Any, int]]:
    """By layer, the matrix that reads its feed-forward units, and their number."""
    units = units_of(body, shape)
    return {
        name: (layer.get_submodule(shape.outer), units) for name, layer in shape.named_layers(body)
    }


def keep_groups(body: Any, shape: DecoderShape, groups: Mapping[str, Any]) -> Any:
    """A decoder with these groups of heads only: equally many indices (K,) by layer, in order."""
    import torch

    config = body.config
    weights = dict(body.state_dict())
    per_group = int(config.num_attention_heads) // int(config.num_key_value_heads)
    attention = next(iter(shape.all_layers(body))).get_submodule(shape.queries.partition(".")[0])
    size = int(attention.head_dim)
    for name, indices in groups.items():
        width = per_group * size
        of_queries = (indices[:, None] * width + torch.arange(width)).flatten()
        of_keys = (indices[:, None] * size + torch.arange(size)).flatten()
        select(weights, f"{name}.{shape.queries}", of_queries, "outputs")
        for projection in shape.keys_and_values:
            select(weights, f"{name}.{projection}", of_keys, "outputs")
        select(weights, f"{name}.{shape.attention_output}", of_queries, "inputs")
    count = len(next(iter(groups.values())))
    return rebuild(
        body,
        weights,
        num_attention_heads=count * per_group,
        num_key_value_heads=count,
        head_dim=size,
    )


def keep_decoder_units(body: Any, shape: DecoderShape, units: Mapping[str, Any]) -> Any:
    """A decoder with these feed-forward units only: equally many indices (K,) by layer."""
    weights = dict(body.state_dict())
    for name, indices in units.items():
        for matrix in shape.inner:
            select(weights, f"{name}.{matrix}", indices, "outputs", transposed=shape.transposed)
        select(weights, f"{name}.{shape.outer}", indices, "inputs", transposed=shape.transposed)
    return rebuild(body, weights, **{shape.unit_count: len(next(iter(units.values())))})
