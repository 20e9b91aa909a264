"""Head pruning (``prune-heads=SHARE``): removes attention heads.

A T5 configuration has one number of heads for all attention layers, and the layers of a stack share
one relative position bias with a column for each head. Each layer therefore loses the same number
of heads. A self-attention head is removed from all layers of its stack, by its importance summed
over them. Cross-attention has no bias and loses different heads in each layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dsbs.compression.steps import Examples, WeightStep, attentions, rebuild, remaining, select

if TYPE_CHECKING:
    from torch import Tensor


class PruneHeads(WeightStep):
    name = "prune-heads"
    learns_from_rows = True

    def change(self, model: Any, tokenizer: Any, examples: Examples) -> Any:
        count = remaining(self.name, self.share, model.config.num_heads, "heads")
        heads = most_important_heads(model, count, examples.batches(model, tokenizer))
        return keep_heads(model, heads)


def most_important_heads(
    model: Any, count: int, batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Indices (count,) of the heads to keep, by attention layer.

    The self-attention layers of a stack keep the same heads.
    """
    import torch

    from dsbs.compression.importance import importance, largest

    gated = {name: (module.o, module.n_heads) for name, module in attentions(model)}
    head_importance = importance(model, gated, batches)
    heads = {}
    for name in gated:
        stack = name.partition(".")[0]
        layers = [name]
        if name.endswith("SelfAttention"):
            layers = [
                layer
                for layer in gated
                if layer.startswith(f"{stack}.") and layer.endswith("SelfAttention")
            ]
        total = torch.stack([head_importance[layer] for layer in layers]).sum(0)
        heads[name] = largest(total, count)
    return heads


def keep_heads(model: Any, heads: dict[str, Tensor]) -> Any:
    """A model with these heads only. ``heads``: equally many indices (K,) per layer, in order."""
    import torch

    weights = dict(model.state_dict())
    width = model.config.d_kv
    for name, kept_heads in heads.items():
        columns = (kept_heads[:, None] * width + torch.arange(width)).flatten()
        for projection in ("q", "k", "v"):
            select(weights, f"{name}.{projection}", columns, "outputs")
        select(weights, f"{name}.o", columns, "inputs")
        if f"{name}.relative_attention_bias.weight" in weights:
            select(weights, f"{name}.relative_attention_bias", kept_heads, "inputs")
    return rebuild(model, weights, num_heads=len(next(iter(heads.values()))))
