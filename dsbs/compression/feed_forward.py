"""``prune-ff=SHARE``: feed-forward units, physically removed; the same number in each layer, which others in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsbs.compression.base import Examples, feed_forwards, kept_of, rebuilt, rewritten, share, take


class PruneFeedForward:
    heals, sparse, learns_from_rows = True, False, True

    def __init__(self, value: str) -> None:
        self.removed = share("prune-ff", value)
        self.value = f"{self.removed:g}"

    def make(self, source: Path, into: Path, examples: Examples) -> None:
        def change(model: Any, tokenizer: Any) -> Any:
            from dsbs.compression.importance import importance, largest

            left = kept_of("prune-ff", self.removed, model.config.d_ff, "units")
            gated = {name: (module.wo, model.config.d_ff) for name, module in feed_forwards(model)}
            worth = importance(model, gated, examples.batches(model, tokenizer))
            return without_units(
                model, {name: largest(values, left) for name, values in worth.items()}
            )

        rewritten(source, into, change)


def without_units(model: Any, kept: dict[str, Any]) -> Any:
    """A smaller model. ``kept`` are equally many indices (K,) of units for each feed-forward layer by name, in order."""
    weights = dict(model.state_dict())
    for name, units in kept.items():
        first = ("wi_0", "wi_1") if model.config.is_gated_act else ("wi",)
        for part in first:
            take(weights, f"{name}.{part}", units, "outputs")
        take(weights, f"{name}.wo", units, "inputs")
    return rebuilt(model, weights, d_ff=len(next(iter(kept.values()))))
