"""Magnitude pruning (``magnitude=SHARE``): sets the smallest weights to zero.

Han et al., 2015, arXiv:1506.02626, over all attention and feed-forward matrices together. Neither
the file nor the latency shrinks, as zeros are stored and multiplied like other numbers. The step
shows how much of a student is needed, and the file compresses better.
"""

from __future__ import annotations

from typing import Any

from dsbs.compression.steps import Examples, WeightStep, attentions, feed_forwards


class Magnitude(WeightStep):
    name = "magnitude"
    sparse = True

    def change(self, model: Any, _tokenizer: Any, _examples: Examples) -> Any:
        zero_smallest(model, self.share)
        return model


def zero_smallest(model: Any, share: float) -> None:
    """Zero a share of the attention and feed-forward weights, over all matrices together."""
    import torch

    matrices = [
        parameter
        for _, layer in (*attentions(model), *feed_forwards(model))
        for name, parameter in layer.named_parameters()
        if "relative_attention_bias" not in name
    ]
    with torch.no_grad():
        magnitudes = torch.cat([matrix.abs().flatten() for matrix in matrices])
        smallest = torch.sort(magnitudes, stable=True).indices[: round(share * len(magnitudes))]
        keep = torch.ones(len(magnitudes), dtype=torch.bool)
        keep[smallest] = False
        masks = torch.split(keep, [matrix.numel() for matrix in matrices])
        for matrix, mask in zip(matrices, masks, strict=True):
            matrix.mul_(mask.view(matrix.shape))
