"""Encoder shapes: where the layers, attention heads and feed-forward units of an encoder are, and
encoders with fewer heads than their hidden size has room for.

A model's ``config.kept_heads`` is the number of heads in each layer, where `dsbs compress` has
removed some; transformers has no key for it. This module imports torch, so it is imported where it
is used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

HEADS = "kept_heads"  # in config.json


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Names of a family's modules, each relative to a layer, and of its configuration's keys.

    ``parts``: a matrix stacks so many blocks of rows, each with a row for every head or unit.
    """

    layers: str
    layer_count: str
    head_count: str
    unit_count: str
    attention: str
    """Module with the projections and with the attribute ``heads_attribute``, where it has one."""
    heads_attribute: str | None
    projections: tuple[str, ...]
    projection_parts: int
    attention_output: str
    inner: str
    inner_parts: int
    outer: str

    def all_layers(self, body: Any) -> Any:
        return body.get_submodule(self.layers)

    def projections_of(self, layer: Any) -> list[str]:
        """The names of the projections that a layer has, relative to it."""
        attention = layer.get_submodule(self.attention)
        return [f"{self.attention}.{name}" for name in self.projections if hasattr(attention, name)]

    def matrices_of(self, layer: Any) -> list[str]:
        """The names of all matrices of a layer, relative to it."""
        return [*self.projections_of(layer), self.attention_output, self.inner, self.outer]


_BERT = EncoderShape(
    layers="encoder.layer",
    layer_count="num_hidden_layers",
    head_count="num_attention_heads",
    unit_count="intermediate_size",
    attention="attention.self",
    heads_attribute="num_attention_heads",
    projections=("query", "key", "value"),
    projection_parts=1,
    attention_output="attention.output.dense",
    inner="intermediate.dense",
    inner_parts=1,
    outer="output.dense",
)
_DEBERTA = replace(
    _BERT, projections=("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj")
)
_DISTILBERT = EncoderShape(
    layers="transformer.layer",
    layer_count="n_layers",
    head_count="n_heads",
    unit_count="hidden_dim",
    attention="attention",
    heads_attribute="n_heads",
    projections=("q_lin", "k_lin", "v_lin"),
    projection_parts=1,
    attention_output="attention.out_lin",
    inner="ffn.lin1",
    inner_parts=1,
    outer="ffn.lin2",
)
_MODERNBERT = EncoderShape(
    layers="layers",
    layer_count="num_hidden_layers",
    head_count="num_attention_heads",
    unit_count="intermediate_size",
    attention="attn",
    heads_attribute=None,
    projections=("Wqkv",),
    projection_parts=3,
    attention_output="attn.Wo",
    inner="mlp.Wi",
    inner_parts=2,
    outer="mlp.Wo",
)
SHAPES = {
    "bert": _BERT,
    "camembert": _BERT,
    "deberta-v2": _DEBERTA,
    "distilbert": _DISTILBERT,
    "electra": _BERT,
    "modernbert": _MODERNBERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
}


def head_size(config: Any) -> int:
    """The values of one head."""
    shape = SHAPES[config.model_type]
    return int(config.hidden_size) // int(getattr(config, shape.head_count))


def heads_of(config: Any) -> int:
    """The number of heads in each layer."""
    shape = SHAPES[config.model_type]
    return int(getattr(config, HEADS, None) or getattr(config, shape.head_count))


def narrow_heads(body: Any) -> None:
    """Give every layer the number of heads that the configuration keeps; weights come later."""
    config = body.config
    if not getattr(config, HEADS, None):
        return
    heads = heads_of(config)
    shape = SHAPES[config.model_type]
    width = heads * head_size(config)
    for layer in shape.all_layers(body):
        attention = layer.get_submodule(shape.attention)
        for name in shape.projections_of(layer):
            old = layer.get_submodule(name)
            _replace(layer, name, nn.Linear(old.in_features, shape.projection_parts * width))
        old = layer.get_submodule(shape.attention_output)
        new = nn.Linear(width, old.out_features, bias=old.bias is not None)
        _replace(layer, shape.attention_output, new)
        if shape.heads_attribute:
            setattr(attention, shape.heads_attribute, heads)
        if hasattr(attention, "all_head_size"):
            attention.all_head_size = width


def _replace(layer: Any, name: str, matrix: Any) -> None:
    parent, _, attribute = name.rpartition(".")
    old = layer.get_submodule(name)
    if old.bias is None:
        matrix.bias = None
    setattr(layer.get_submodule(parent), attribute, matrix.to(old.weight.device, old.weight.dtype))
