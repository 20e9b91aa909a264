"""Pruning steps: remove attention heads or feed-forward units, or zero small weights.

Heads and units are removed by importance (Michel et al., 2019, arXiv:1905.10650, section 4.1).
Each unit gets a gate ξ = 1. Its importance is the mean over examples of |∂L(x)/∂ξ|. That equals
|a·∂L/∂a| for the unit's output a: the linear term of the change of the loss when the output
becomes 0.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from dsbs.compression import (
    Examples,
    WeightStep,
    attentions,
    body_of,
    check_family,
    decoders,
    encoders,
    feed_forwards,
    is_label_head,
    left_after_rounds,
    matrices,
    rebuild,
    remaining,
    select,
)

if TYPE_CHECKING:
    from torch import Tensor

Gated = Mapping[str, tuple[Any, int]]  # by layer, the matrix that reads its parts; their number
_Keep = Callable[[Any, "dict[str, Tensor]"], Any]


class _ByImportance(WeightStep):
    """A step that removes the least important heads or units, in one round or several."""

    learns_from_rows = True

    @property
    def settings(self) -> dict[str, Any]:
        return {} if self.rounds == 1 else {"rounds": self.rounds}

    @abstractmethod
    def noun(self, model: Any) -> str:
        """What the parts are called, in the plural."""

    @abstractmethod
    def parts(self, model: Any) -> tuple[Gated, _Keep]:
        """The parts that can be removed, and a function that keeps those with some indices.

        The function takes the model's body and, by layer, equally many indices (K,) in order.
        """

    def most_important(
        self, model: Any, gated: Gated, count: int, batches: Iterable[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        """By layer, the indices (count,) to keep."""
        values = importance(model, gated, batches)
        return {name: largest(layer_values, count) for name, layer_values in values.items()}

    def change(self, model: Any, tokenizer: Any, examples: Examples) -> Any:
        parts = self.parts(model)
        total = next(iter(parts[0].values()))[1]
        left = remaining(self.name, self.share, total, self.noun(model))
        for number, count in enumerate(left_after_rounds(total, left, self.rounds)):
            gated, keep = self.parts(model) if number else parts
            batches = examples.batches(model, tokenizer)
            indices = self.most_important(model, gated, count, batches)
            body = keep(body_of(model), indices)
            model = model.with_body(body) if is_label_head(model) else body
        return model


# --- heads


class PruneHeads(_ByImportance):
    """``prune-heads=SHARE``: removes attention heads.

    A T5 configuration has one number of heads for all attention layers, and the layers of a stack
    share one relative position bias with a column for each head. Each layer therefore loses the
    same number of heads. A self-attention head is removed from all layers of its stack, by its
    importance summed over them. Cross-attention has no bias and loses different heads per layer,
    and so does each layer of an encoder. A decoder loses whole groups of heads that share a key.
    """

    name = "prune-heads"

    def noun(self, model: Any) -> str:
        if decoders.is_decoder(body_of(model)):
            return "groups of heads with one key"
        return "heads"

    def parts(self, model: Any) -> tuple[Gated, _Keep]:
        body = body_of(model)
        if decoders.is_decoder(body):
            decoder = decoders.decoder_shape(body, self.name)
            gated = decoders.gated_groups(body, decoder)
            return gated, lambda body, groups: decoders.keep_groups(body, decoder, groups)
        if is_label_head(model):
            shape = encoders.shape_of(body, self.name)
            gated = encoders.gated_heads(body, shape)
            return gated, lambda body, heads: encoders.keep_encoder_heads(body, shape, heads)
        return {name: (module.o, module.n_heads) for name, module in attentions(body)}, keep_heads

    def most_important(
        self, model: Any, gated: Gated, count: int, batches: Iterable[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        if not is_label_head(model) and model.config.is_encoder_decoder:
            return most_important_heads(model, count, batches)
        return super().most_important(model, gated, count, batches)


def most_important_heads(
    model: Any, count: int, batches: Iterable[Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Indices (count,) of the heads to keep, by attention layer.

    The self-attention layers of a stack keep the same heads.
    """
    import torch

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


# --- feed-forward units


class PruneFeedForward(_ByImportance):
    """``prune-ff=SHARE``: removes equally many feed-forward units from every layer."""

    name = "prune-ff"

    def noun(self, model: Any) -> str:
        return "units"

    def parts(self, model: Any) -> tuple[Gated, _Keep]:
        body = body_of(model)
        if decoders.is_decoder(body):
            decoder = decoders.decoder_shape(body, self.name)
            gated = decoders.gated_decoder_units(body, decoder)
            return gated, lambda body, units: decoders.keep_decoder_units(body, decoder, units)
        if is_label_head(model):
            shape = encoders.shape_of(body, self.name)
            gated = encoders.gated_units(body, shape)
            return gated, lambda body, units: encoders.keep_encoder_units(body, shape, units)
        units = body.config.d_ff
        return {name: (module.wo, units) for name, module in feed_forwards(body)}, keep_units


def keep_units(model: Any, units: dict[str, Tensor]) -> Any:
    """A model with these units only. ``units``: equally many indices (K,) per layer, in order."""
    weights = dict(model.state_dict())
    inner = ("wi_0", "wi_1") if model.config.is_gated_act else ("wi",)
    for name, kept_units in units.items():
        for matrix in inner:
            select(weights, f"{name}.{matrix}", kept_units, "outputs")
        select(weights, f"{name}.wo", kept_units, "inputs")
    return rebuild(model, weights, d_ff=len(next(iter(units.values()))))


# --- weights


class Magnitude(WeightStep):
    """``magnitude=SHARE``: sets the smallest weights to zero (Han et al., 2015, arXiv:1506.02626).

    Attention and feed-forward matrices are ranked together. Neither the file nor the latency
    shrinks, as zeros are stored and multiplied like other numbers. The step shows how much of a
    student is needed, and the file compresses better.
    """

    name = "magnitude"
    sparse = True

    def change(self, model: Any, _tokenizer: Any, _examples: Examples) -> Any:
        body = body_of(model)
        check_family(body, self.name)
        zero_smallest(body, self.share)
        return model


def zero_smallest(model: Any, share: float) -> None:
    """Zero a share of the attention and feed-forward weights, over all matrices together."""
    import torch

    ranked = [
        parameter
        for _, matrix in matrices(model)
        for name, parameter in matrix.named_parameters()
        if name.endswith("weight")
    ]
    with torch.no_grad():
        magnitudes = torch.cat([matrix.abs().flatten() for matrix in ranked])
        smallest = torch.sort(magnitudes, stable=True).indices[: round(share * len(magnitudes))]
        keep = torch.ones(len(magnitudes), dtype=torch.bool)
        keep[smallest] = False
        masks = torch.split(keep, [matrix.numel() for matrix in ranked])
        for matrix, mask in zip(ranked, masks, strict=True):
            matrix.mul_(mask.view(matrix.shape))


# --- importance


def importance(model: Any, gated: Gated, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Importance (G,) in nats of the G equal parts of each module's input.

    ``gated`` maps a name to (module, G). ``batches`` have input_ids and attention_mask (B, S),
    decoder_input_ids and labels (B, T), or the labels of a decoder or a label head (see
    ``Examples``). The loss of an example is its mean token cross-entropy, or that of its class.
    Every example has gates of its own, so that one batch gives the derivative of each example.
    """
    import torch

    gates: dict[str, Tensor] = {}
    hooks = []

    def gate(name: str, count: int) -> Any:
        def multiply(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (x,) = inputs  # (B, T, W)
            gates[name] = torch.ones(
                x.shape[0], 1, count, 1, dtype=x.dtype, device=x.device, requires_grad=True
            )
            return ((x.unflatten(-1, (count, -1)) * gates[name]).flatten(-2),)

        return multiply

    totals = {name: torch.zeros(count) for name, (_, count) in gated.items()}
    rows = 0
    model.eval()
    try:
        hooks = [
            module.register_forward_pre_hook(gate(name, count))
            for name, (module, count) in gated.items()
        ]
        for batch in batches:
            loss = example_losses(model, batch).sum()
            gradients = torch.autograd.grad(loss, [gates[name] for name in gated])
            for name, gradient in zip(gated, gradients, strict=True):
                totals[name] += gradient.flatten(1).abs().sum(0).cpu().float()
            rows += len(batch["labels"])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / rows for name, total in totals.items()}


def example_losses(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy (B,) of each example, in nats: of its class, or the mean over its tokens.

    Of several labels, the mean of their binary cross-entropies.
    """
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits

    inputs = {name: value.to(model.device) for name, value in batch.items()}
    labels = inputs.pop("labels")
    if is_label_head(model):
        logits = model(**inputs).float()
        if labels.ndim == 2:
            each = binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
            return each.mean(dim=1)
        losses: Tensor = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        return losses
    logits = model(**inputs, use_cache=False).logits.float()
    is_target = labels != -100
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )
    means: Tensor = nll.sum(1) / is_target.sum(1)
    return means


def largest(values: Tensor, count: int) -> Tensor:
    """Indices (count,) of the largest of ``values`` (G,), ascending; the first of equal values."""
    import torch

    return torch.sort(torch.sort(values, descending=True, stable=True).indices[:count]).values
