"""Feed-forward pruning (``prune-ff=SHARE``): removes equally many units from every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dsbs.compression.steps import Examples, WeightStep, feed_forwards, rebuild, remaining, select

if TYPE_CHECKING:
    from torch import Tensor


class PruneFeedForward(WeightStep):
    name = "prune-ff"
    learns_from_rows = True

    def change(self, model: Any, tokenizer: Any, examples: Examples) -> Any:
        from dsbs.compression.importance import importance, largest

        count = remaining(self.name, self.share, model.config.d_ff, "units")
        gated = {name: (module.wo, model.config.d_ff) for name, module in feed_forwards(model)}
        unit_importance = importance(model, gated, examples.batches(model, tokenizer))
        units = {name: largest(values, count) for name, values in unit_importance.items()}
        return keep_units(model, units)


def keep_units(model: Any, units: dict[str, Tensor]) -> Any:
    """A model with these units only. ``units``: equally many indices (K,) per layer, in order."""
    weights = dict(model.state_dict())
    inner = ("wi_0", "wi_1") if model.config.is_gated_act else ("wi",)
    for name, kept_units in units.items():
        for matrix in inner:
            select(weights, f"{name}.{matrix}", kept_units, "outputs")
        select(weights, f"{name}.wo", kept_units, "inputs")
    return rebuild(model, weights, d_ff=len(next(iter(units.values()))))
