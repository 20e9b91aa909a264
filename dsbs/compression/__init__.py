"""Compression steps: their protocol, and what the steps that change weights share."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from dsbs.config import unknown
from dsbs.config.registry import COMPRESSION_STEPS, entry
from dsbs.errors import UserError
from dsbs.files import write_json
from dsbs.students.card import CARD, read_card
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import load_model

Shape = TypeVar("Shape")


class Examples(Protocol):
    """Rows for the steps that look at what a student does with them."""

    def batches(
        self, model: Any, tokenizer: Any, split: Literal["train", "valid"] = "train"
    ) -> Iterator[Mapping[str, Any]]:
        """A few hundred rows, padded, one target at a time; of valid, the label alone.

        Each batch has input_ids and attention_mask (B, S), and for T5 decoder_input_ids and labels
        (B, T), for a decoder labels (B, S), for a label head labels (B,).
        """
        ...

    def inputs(self) -> list[str]:
        """The texts of a few valid rows, without a prefix."""
        ...


class Step(Protocol):
    """One step of a chain."""

    value: str  # the text after the name, normalized
    heals: bool  # whether the result can be fine-tuned
    sparse: bool  # whether weights that are zero must stay zero from now on
    learns_from_rows: bool  # whether the step uses train rows

    @property
    def settings(self) -> dict[str, Any]:
        """What else decides the result, where it is not the default."""
        ...

    def make(self, source: Path, target: Path, examples: Examples) -> None:
        """Write a smaller student into the empty folder ``target``. Raises UserError."""
        ...


LayersBy = Literal["influence", "loss", "position"]


class WeightStep(ABC):
    """A step that changes weights: of a T5 that writes its label, a decoder, or an encoder with a
    label head.
    """

    name: ClassVar[str]
    heals = True
    sparse = False
    learns_from_rows = False
    rounds = 1
    """In how many parts the share is removed; importance is measured before each."""
    layers_by: LayersBy = "loss"
    """What the importance of a layer is."""

    def __init__(self, value: str) -> None:
        self.share = parse_share(self.name, value)
        self.value = f"{self.share:g}"

    @property
    def settings(self) -> dict[str, Any]:
        """See ``Step``."""
        return {}

    @abstractmethod
    def change(self, model: Any, tokenizer: Any, examples: Examples) -> Any:
        """The smaller model, or the smaller body of a label head's ``model``.

        Raises UserError where this step makes ``model`` no smaller.
        """

    def make(self, source: Path, target: Path, examples: Examples) -> None:
        """Raises UserError where ``source`` is none of them in transformers' own format."""
        card = read_card(source)
        if card.scores_choices:
            raise UserError(
                f"{source} scores the choices of each row, and {self.name} cannot change such a "
                "student",
                hint="train a smaller student.model",
            )
        if card.reads_windows:
            raise UserError(
                f"{source} reads long texts in windows, and {self.name} cannot change it",
                hint="train it with task.max_input: {strategy: head+tail}",
            )
        is_supported = card.kind == "causal" or (card.kind, card.head) in (
            ("seq2seq", "text"),
            ("encoder", "labels"),
        )
        if card.format != "transformers" or not is_supported:
            kind = f"a {card.kind} student with head {card.head}"
            if card.format != "transformers":
                kind = f"in {card.format} format"
            raise UserError(
                f"{source} is {kind}; {self.name} changes the weights of a T5 that writes its "
                "label, of a decoder, or of an encoder",
                hint="make quantize the last step of a chain",
            )
        tokenizer = load_tokenizer(str(source))
        model = load_model(str(source), labels=len(card.classes))
        if card.kind == "seq2seq" and model.config.model_type not in ("t5", "mt5"):
            raise UserError(
                f"{source} is a {model.config.model_type} model; of encoder-decoders, {self.name} "
                "supports T5 only",
                hint="use quantize",
            )
        changed = self.change(model, tokenizer, examples)
        if is_label_head(model) and not is_label_head(changed):
            changed = model.with_body(changed)
        changed.save_pretrained(target)
        tokenizer.save_pretrained(target)
        write_json(target / CARD, json.loads(card.model_dump_json()))


def is_label_head(model: Any) -> bool:
    """Whether a model chooses its label; its encoder or decoder is then ``model.body``."""
    return hasattr(model, "label_logits")


def body_of(model: Any) -> Any:
    """The pretrained model below a label head, or the model itself."""
    return model.body if is_label_head(model) else model


def check_family(body: Any, step: str) -> None:
    """Raises UserError for an encoder or a decoder whose modules a step does not know."""
    from dsbs.compression.decoders import decoder_shape, is_decoder
    from dsbs.compression.encoders import shape_of

    if is_decoder(body):
        decoder_shape(body, step)
    elif not body.config.is_encoder_decoder:
        shape_of(body, step)


def read_step(text: str) -> Step:
    """Parse a step such as ``prune-ff=0.5``. Raises UserError."""
    name, equals, value = text.partition("=")
    if name not in COMPRESSION_STEPS:
        raise UserError(
            f"--method {text}: {unknown('step', name, COMPRESSION_STEPS)}",
            hint="e.g. --method prune-ff=0.5",
        )
    if not equals or not value:
        example = "int8" if name == "quantize" else "0.5"
        raise UserError(f"--method {text} needs a value", hint=f"e.g. --method {name}={example}")
    step: Step = entry(COMPRESSION_STEPS, name)(value)
    return step


def parse_share(name: str, value: str) -> float:
    """A share above 0 and below 1. Raises UserError."""
    try:
        share = float(value)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(
            f"--method {name}={value}: not a share above 0 and below 1",
            hint=f"e.g. --method {name}=0.5",
        )
    return share


def remaining(name: str, removed_share: float, count: int, noun: str) -> int:
    """How many of ``count`` stay, at least one. Raises UserError where none is removed."""
    left = max(1, count - round(removed_share * count))
    if left == count:
        raise UserError(
            f"{name}={removed_share:g} removes none of {count} {noun}",
            hint=f"use a larger share: {name}={1 / count:.2g} removes one",
        )
    return left


def left_after_rounds(total: int, left: int, rounds: int) -> list[int]:
    """How many of ``total`` stay after each round, each fewer than the round before; at last
    ``left``.
    """
    counts = [total - round((total - left) * number / rounds) for number in range(1, rounds + 1)]
    return sorted(set(counts) - {total}, reverse=True)


def rebuild(model: Any, weights: Mapping[str, Any], **shape: Any) -> Any:
    """A model of the same class with another shape, and ``weights`` by transformers' names."""
    config = copy.deepcopy(model.config)
    for name, value in shape.items():
        setattr(config, name, value)
    return make_model(model, config, weights)


def make_model(model: Any, config: Any, weights: Mapping[str, Any]) -> Any:
    """A model of the same class with the shape of ``config``."""
    from dsbs.students.encoder_shapes import HEADS
    from dsbs.students.low_rank import KEY, with_low_rank

    model_class = type(model)
    if getattr(config, KEY, None) or getattr(config, HEADS, None):
        model_class = with_low_rank(model_class)
    rebuilt = model_class(config).to(model.dtype)
    rebuilt.load_state_dict(weights, strict=True)
    if hasattr(model, "generation_config"):
        rebuilt.generation_config = model.generation_config
    return rebuilt.eval()


def supported_shape(body: Any, shapes: Mapping[str, Shape], problem: str) -> Shape:
    """The names of a model's modules, by its type. Raises UserError for one without an entry."""
    model_type = body.config.model_type
    if model_type not in shapes:
        raise UserError(
            f"{problem} of type {model_type}",
            hint=f"it supports {', '.join(shapes)}; quantize=int8 supports all",
        )
    return shapes[model_type]


def select(
    weights: dict[str, Any],
    module: str,
    indices: Any,
    side: Literal["inputs", "outputs"],
    *,
    transposed: bool = False,
) -> None:
    """Keep only some outputs (rows) or inputs (columns) of a matrix, by ``indices`` (K,) in order.

    Changes ``weights``. Of a low-rank pair, the outer factor is changed. ``transposed``: outputs
    are columns, as in GPT-2.
    """
    dense = f"{module}.weight"
    if side == "outputs":
        name = dense if dense in weights else f"{module}.up.weight"
        weights[name] = weights[name][:, indices] if transposed else weights[name][indices]
        bias = f"{name.removesuffix('.weight')}.bias"
        if bias in weights:
            weights[bias] = weights[bias][indices]
    else:
        name = dense if dense in weights else f"{module}.down.weight"
        weights[name] = weights[name][indices] if transposed else weights[name][:, indices]


def matrices(model: Any) -> Iterator[tuple[str, Any]]:
    """Every attention and feed-forward matrix, or low-rank pair, with its name."""
    import torch

    from dsbs.compression.decoders import DECODERS
    from dsbs.students.encoder_shapes import SHAPES
    from dsbs.students.low_rank import LowRank

    model_type = model.config.model_type
    if model_type in DECODERS:
        yield from DECODERS[model_type].matrices(model)
        return
    if model_type in SHAPES:
        shape = SHAPES[model_type]
        for index, layer in enumerate(shape.all_layers(model)):
            for name in shape.matrices_of(layer):
                yield f"{shape.layers}.{index}.{name}", layer.get_submodule(name)
        return
    for layer_name, layer in (*attentions(model), *feed_forwards(model)):
        for name, child in layer.named_children():
            if isinstance(child, torch.nn.Linear | LowRank):
                yield f"{layer_name}.{name}", child


def attentions(model: Any) -> Iterator[tuple[str, Any]]:
    """Every attention layer of a T5 with its name."""
    yield from _named_modules(model, ".SelfAttention", ".EncDecAttention")


def feed_forwards(model: Any) -> Iterator[tuple[str, Any]]:
    """Every feed-forward layer of a T5 with its name."""
    yield from _named_modules(model, ".DenseReluDense")


def _named_modules(model: Any, *suffixes: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if name.endswith(suffixes):
            yield name, module
