"""``magnitude=SHARE``: the smallest weights become zero (Han et al., 2015, arXiv:1506.02626), over all matrices together.

Neither the file nor the time of a call is smaller for it: zeros are stored and multiplied as other numbers are. It tells how
much of a student is needed, and a file that is compressed on its way somewhere is smaller.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsbs.compression.base import Examples, attentions, feed_forwards, rewritten, share


class Magnitude:
    heals, sparse, learns_from_rows = True, True, False

    def __init__(self, value: str) -> None:
        self.zeroed = share("magnitude", value)
        self.value = f"{self.zeroed:g}"

    def make(self, source: Path, into: Path, examples: Examples) -> None:
        del examples

        def change(model: Any, tokenizer: Any) -> Any:
            del tokenizer
            zero_smallest(model, self.zeroed)
            return model

        rewritten(source, into, change)


def zero_smallest(model: Any, zeroed: float) -> None:
    """Zero that share of the weights of attention and feed-forward matrices; embeddings and norms stay as they are."""
    import torch

    matrices = [
        parameter
        for _, layer in (*attentions(model), *feed_forwards(model))
        for name, parameter in layer.named_parameters()
        if "relative_attention_bias" not in name
    ]
    with torch.no_grad():
        sizes = torch.cat([matrix.abs().flatten() for matrix in matrices])
        order = torch.sort(sizes, stable=True).indices[: round(zeroed * len(sizes))]
        keep = torch.ones(len(sizes), dtype=torch.bool)
        keep[order] = False
        for matrix, part in zip(
            matrices, torch.split(keep, [matrix.numel() for matrix in matrices]), strict=True
        ):
            matrix.mul_(part.view(matrix.shape))
