"""``prune-heads=SHARE``: attention heads, physically removed.

A T5's configuration has one number of heads for every attention, and the layers of a stack share one relative position bias
with a column for each head. So each attention loses the same number, and a self-attention head goes from all layers of its
stack at once, by its importance summed over them; cross-attention, which has no bias, loses other heads in each layer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbs.compression.base import Examples, attentions, kept_of, rebuilt, rewritten, share, take

if TYPE_CHECKING:
    from torch import Tensor


class PruneHeads:
    heals, sparse, learns_from_rows = True, False, True

    def __init__(self, value: str) -> None:
        self.removed = share("prune-heads", value)
        self.value = f"{self.removed:g}"

    def make(self, source: Path, into: Path, examples: Examples) -> None:
        def change(model: Any, tokenizer: Any) -> Any:
            left = kept_of("prune-heads", self.removed, model.config.num_heads, "heads")
            return without_heads(model, kept_heads(model, left, examples.batches(model, tokenizer)))

        rewritten(source, into, change)


def kept_heads(model: Any, count: int, batches: Any) -> dict[str, Tensor]:
    """For each attention by name the indices (count,) of the heads that it keeps: in a stack's self-attention the same ones."""
    import torch

    from dsbs.compression.importance import importance, largest

    gated = {name: (module.o, module.n_heads) for name, module in attentions(model)}
    worth = importance(model, gated, batches)
    kept = {}
    for name in gated:
        stack = name.partition(".")[0]
        alike = [
            one for one in gated if one.startswith(f"{stack}.") and one.endswith("SelfAttention")
        ]
        bound = alike if name in alike else [name]
        kept[name] = largest(torch.stack([worth[one] for one in bound]).sum(0), count)
    return kept


def without_heads(model: Any, kept: dict[str, Tensor]) -> Any:
    """A smaller model. ``kept`` are equally many indices (K,) for each attention by name, in order."""
    import torch

    weights = dict(model.state_dict())
    width = model.config.d_kv
    for name, heads in kept.items():
        places = (heads[:, None] * width + torch.arange(width)).flatten()
        for part in ("q", "k", "v"):
            take(weights, f"{name}.{part}", places, "outputs")
        take(weights, f"{name}.o", places, "inputs")
        if f"{name}.relative_attention_bias.weight" in weights:
            take(weights, f"{name}.relative_attention_bias", heads, "inputs")
    return rebuilt(model, weights, num_heads=len(next(iter(kept.values()))))
