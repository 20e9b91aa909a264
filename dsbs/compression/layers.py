"""Layers to drop (``drop-layers=SHARE``): which ones matter least, and models without them.

Three measures of a layer's importance, on valid rows:

- the loss with the layer skipped, less the loss with it;
- block influence (Men et al., 2024, arXiv:2403.03853, section 3): 1 − the mean cosine between the
  hidden states before and after the layer; a layer that changes little is dropped;
- its position: evenly spaced layers stay (Shleifer and Rush, 2020, arXiv:2010.13002).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbs.compression import (
    Examples,
    WeightStep,
    body_of,
    decoders,
    encoders,
    is_label_head,
    left_after_rounds,
    rebuild,
    remaining,
)
from dsbs.compression.pruning import example_losses, largest
from dsbs.files import write_json
from dsbs.records.results import COMPRESSION_RECORD, read_compression_record

if TYPE_CHECKING:
    from torch import Tensor

LAYERS_FILE = "layers.json"  # beside a student whose layers were just dropped
Batch = Mapping[str, Any]  # see ``Examples``
_BLOCK = re.compile(r"^(encoder|decoder)\.block\.(\d+)\.(.*)$")


@dataclass(slots=True)
class LayerChoice:
    """By stack, how many layers there were, those that stay, and the scores; counted from 1."""

    totals: dict[str, int]
    layers: dict[str, list[int]]
    scores: dict[str, dict[int, float]] = field(default_factory=dict)


class DropLayers(WeightStep):
    """``drop-layers=SHARE``: drops the layers that matter least, of encoder and decoder alike.

    The first layer of a T5's stack and of an encoder stays. The result can also be named in
    ``train.init``.
    """

    name = "drop-layers"

    @property
    def settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"layers_by": self.layers_by}
        return settings if self._rounds == 1 else settings | {"rounds": self._rounds}

    @property
    def _rounds(self) -> int:
        """One for the position, which needs no second measurement."""
        return 1 if self.layers_by == "position" else self.rounds

    def change(self, model: Any, tokenizer: Any, examples: Examples) -> Any:
        counts = self._counts(model)
        batches = list(examples.batches(model, tokenizer, "valid"))
        totals = {name: len(layers) for name, layers in layer_stacks(model).items()}
        numbers = {name: list(range(1, total + 1)) for name, total in totals.items()}
        self._choice = LayerChoice(totals, numbers)
        for number in range(max(map(len, counts.values()))):
            left = {name: rounds[min(number, len(rounds) - 1)] for name, rounds in counts.items()}
            model = self._round(model, left, batches)
        return model

    def make(self, source: Path, target: Path, examples: Examples) -> None:
        super().make(source, target, examples)
        write_json(target / LAYERS_FILE, asdict(self._choice))

    def _counts(self, model: Any) -> dict[str, list[int]]:
        """By stack, how many layers stay after each round.

        A T5's decoder may keep all of its layers. Raises UserError where the first stack does.
        """
        counts: dict[str, list[int]] = {}
        for name, layers in layer_stacks(model).items():
            total = len(layers)
            left = max(1, total - round(self.share * total))
            if not counts:
                noun = "layers" if len(layer_stacks(model)) == 1 else f"{name} layers"
                left = remaining(self.name, self.share, total, noun)
            counts[name] = left_after_rounds(total, left, self._rounds) or [total]
        return counts

    def _round(self, model: Any, left: Mapping[str, int], batches: Sequence[Batch]) -> Any:
        """A model with so many layers; the choice and the scores are noted."""
        staying: dict[str, list[int]] = {}
        scores = layer_scores(model, self.layers_by, batches)
        for name, layers in layer_stacks(model).items():
            numbers = self._choice.layers[name]
            if name in scores:
                staying[name] = layers_to_keep(
                    scores[name], left[name], first_stays=not decoders.is_decoder(body_of(model))
                )
                of_stack = self._choice.scores.setdefault(name, {})
                of_stack |= dict(zip(numbers, scores[name], strict=True))
            else:
                staying[name] = evenly_spaced(len(layers), left[name])
            self._choice.layers[name] = [numbers[index] for index in staying[name]]
        body = keep_layers(body_of(model), staying)
        return model.with_body(body) if is_label_head(model) else body


def layer_stacks(model: Any) -> dict[str, Any]:
    """The layers of a model, or of the one below a label head, by stack: encoder and decoder.

    Raises UserError for a family that is not supported.
    """
    body = body_of(model)
    if decoders.is_decoder(body):
        return {"decoder": decoders.decoder_shape(body, DropLayers.name).all_layers(body)}
    if body.config.is_encoder_decoder:
        return {"encoder": body.encoder.block, "decoder": body.decoder.block}
    return {"encoder": encoders.shape_of(body, DropLayers.name).all_layers(body)}


def dropped_layers(source: Path, start: Path) -> dict[str, Any]:
    """The record's fields on the layers of the student in ``start``, by the original's numbers.

    ``source`` is the student that the step started from.
    """
    before: dict[str, list[int]] = {}
    is_known = True
    if (source / COMPRESSION_RECORD).is_file():
        record = read_compression_record(source)
        before = record.layers
        is_known = bool(before) or not any(text.startswith("drop-") for text in record.chain)
    if not (start / LAYERS_FILE).is_file() or not is_known:
        return {"layers": before}
    choice = json.loads((start / LAYERS_FILE).read_text(encoding="utf-8"))

    def original_number(stack: str, number: int) -> int:
        return before[stack][number - 1] if before else number

    layers: dict[str, list[int]] = {}
    dropped: dict[str, list[int]] = {}
    for stack, total in choice["totals"].items():
        staying = choice["layers"][stack]
        layers[stack] = [original_number(stack, number) for number in staying]
        dropped[stack] = [
            original_number(stack, number)
            for number in range(1, total + 1)
            if number not in staying
        ]
    scores = {
        stack: {original_number(stack, int(number)): score for number, score in by_layer.items()}
        for stack, by_layer in choice["scores"].items()
    }
    return {"layers": layers, "dropped_layers": dropped, "layer_scores": scores}


# --- importance


def layer_scores(model: Any, by: str, batches: Sequence[Batch]) -> dict[str, list[float]]:
    """By stack, the importance of each layer; {} where only the position counts."""
    if by == "influence":
        return block_influence(model, batches)
    if by == "loss":
        return loss_increase(model, batches)
    return {}


def block_influence(model: Any, batches: Iterable[Batch]) -> dict[str, list[float]]:
    """By stack, 1 − the mean cosine of each layer's input and output over all tokens.

    Of a T5's decoder the target tokens count, of a decoder those of prompt and target.
    """
    import torch

    stacks = layer_stacks(model)
    sums = {name: torch.zeros(len(layers), dtype=torch.float64) for name, layers in stacks.items()}
    counts = dict.fromkeys(stacks, 0)
    masks: dict[str, Tensor] = {}

    def add(name: str, index: int) -> Any:
        def hook(_layer: Any, inputs: Any, options: Any, output: Any) -> None:
            before = inputs[0] if inputs else options["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosines = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[name][index] += cosines[masks[name]].cpu().double().sum()

        return hook

    hooks = [
        layer.register_forward_hook(add(name, index), with_kwargs=True)
        for name, layers in stacks.items()
        for index, layer in enumerate(layers)
    ]
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                masks = _token_masks(stacks, batch)
                for name, mask in masks.items():
                    counts[name] += int(mask.sum())
                example_losses(model, batch)
    finally:
        for handle in hooks:
            handle.remove()
    return {name: (1 - total / counts[name]).tolist() for name, total in sums.items()}


def _token_masks(stacks: Iterable[str], batch: Batch) -> dict[str, Tensor]:
    """By stack, which tokens (B, S) or (B, T) are real."""
    masks = {name: batch["attention_mask"].bool() for name in stacks}
    if len(masks) > 1:
        masks["decoder"] = batch["labels"] != -100
    return masks


def loss_increase(model: Any, batches: Sequence[Batch]) -> dict[str, list[float]]:
    """By stack, how much the mean loss in nats grows where each layer is skipped."""
    with_all = _mean_loss(model, batches)
    increases: dict[str, list[float]] = {}
    for name, layers in layer_stacks(model).items():
        increases[name] = []
        for layer in layers:
            with _skipped(layer):
                increases[name].append(_mean_loss(model, batches) - with_all)
    return increases


@contextmanager
def _skipped(layer: Any) -> Iterator[None]:
    """Replace a layer's output by its input."""

    def pass_on(_layer: Any, inputs: Any, options: Any, output: Any) -> Any:
        before = inputs[0] if inputs else options["hidden_states"]
        return (before, *output[1:]) if isinstance(output, tuple) else before

    handle = layer.register_forward_hook(pass_on, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _mean_loss(model: Any, batches: Iterable[Batch]) -> float:
    """The mean over examples of their loss (see ``example_losses``)."""
    import torch

    total = 0.0
    examples = 0
    model.eval()
    with torch.no_grad():
        for batch in batches:
            losses = example_losses(model, batch)
            total += float(losses.cpu().double().sum())
            examples += len(losses)
    return total / examples


def layers_to_keep(scores: Sequence[float], count: int, *, first_stays: bool) -> list[int]:
    """Indices of the ``count`` layers with the largest scores, in order; of equals, the first."""
    import torch

    values = torch.tensor(scores, dtype=torch.float64)
    if first_stays:
        values[0] = torch.inf
    indices: list[int] = largest(values, count).tolist()
    return indices


def evenly_spaced(layers: int, count: int) -> list[int]:
    """``count`` layer indices from 0, with the first, and the last where there are two or more."""
    return [round(i * (layers - 1) / max(1, count - 1)) for i in range(count)]


# --- models with fewer layers


def keep_layers(body: Any, staying: Mapping[str, list[int]]) -> Any:
    """A model with these layers by stack, in order, counted from 0.

    The lists of T5's stacks start with 0: its first layer has the relative position bias. An
    encoder's does too, as some families treat the first layer apart.
    """
    if body.config.is_encoder_decoder:
        lists = {"num_layers": staying["encoder"], "num_decoder_layers": staying["decoder"]}
        return _rebuilt(body, _t5_name(staying), lists)
    if decoders.is_decoder(body):
        decoder = decoders.decoder_shape(body, DropLayers.name)
        prefix = decoder.layers
        count_key = decoder.layer_count
        (layers,) = staying.values()
    else:
        encoder = encoders.shape_of(body, DropLayers.name)
        prefix = encoder.layers
        count_key = encoder.layer_count
        (layers,) = staying.values()
    return _rebuilt(body, _prefixed_name(f"{prefix}.", layers), {count_key: layers})


_NewName = Callable[[str], "str | None"]  # the name in the new model; None for a dropped layer


def _t5_name(staying: Mapping[str, list[int]]) -> _NewName:
    def new_name(name: str) -> str | None:
        match = _BLOCK.match(name)
        if match is None:
            return name
        stack, layer, rest = match.groups()
        if int(layer) not in staying[stack]:
            return None
        return f"{stack}.block.{staying[stack].index(int(layer))}.{rest}"

    return new_name


def _prefixed_name(prefix: str, layers: list[int]) -> _NewName:
    def new_name(name: str) -> str | None:
        if not name.startswith(prefix):
            return name
        index, _, rest = name.removeprefix(prefix).partition(".")
        if int(index) not in layers:
            return None
        return f"{prefix}{layers.index(int(index))}.{rest}"

    return new_name


def _rebuilt(body: Any, new_name: _NewName, layers: Mapping[str, list[int]]) -> Any:
    """The model with renamed weights; ``layers`` are those that stay, by their number's key."""
    weights = {new: value for name, value in body.state_dict().items() if (new := new_name(name))}
    shape: dict[str, Any] = {key: len(staying) for key, staying in layers.items()}
    if ranks := getattr(body.config, "low_rank", None):
        shape["low_rank"] = {new: rank for name, rank in ranks.items() if (new := new_name(name))}
    if layer_types := getattr(body.config, "layer_types", None):
        (staying,) = layers.values()
        shape["layer_types"] = [layer_types[index] for index in staying]
    return rebuild(body, weights, **shape)
