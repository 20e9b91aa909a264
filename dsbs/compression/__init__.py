"""Compression steps: their protocol, and what the steps that change T5 weights share."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from dsbs.config import unknown
from dsbs.config.registry import COMPRESSION_STEPS, entry
from dsbs.errors import UserError
from dsbs.files import write_json
from dsbs.students.card import CARD, read_card
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import load_model


class Examples(Protocol):
    """Rows for the steps that look at what a student does with them."""

    def batches(self, model: Any, tokenizer: Any) -> Iterator[Mapping[str, Any]]:
        """A few hundred train rows, padded, one target at a time.

        Each batch has input_ids and attention_mask (B, S), decoder_input_ids and labels (B, T).
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

    def make(self, source: Path, target: Path, examples: Examples) -> None:
        """Write a smaller student into the empty folder ``target``. Raises UserError."""
        ...


class WeightStep(ABC):
    """A step that makes a T5 student of another one by changing its weights."""

    name: ClassVar[str]
    heals = True
    sparse = False
    learns_from_rows = False

    def __init__(self, value: str) -> None:
        self.share = parse_share(self.name, value)
        self.value = f"{self.share:g}"

    @abstractmethod
    def change(self, model: Any, tokenizer: Any, examples: Examples) -> Any:
        """The smaller model. Raises UserError where this step makes ``model`` no smaller."""

    def make(self, source: Path, target: Path, examples: Examples) -> None:
        """Raises UserError where ``source`` is not a T5 in transformers' own format."""
        card = read_card(source)
        if card.format != "transformers" or card.kind != "seq2seq":
            kind = f"a {card.kind} student"
            if card.format != "transformers":
                kind = f"in {card.format} format"
            raise UserError(
                f"{source} is {kind}; {self.name} changes the weights of a T5",
                hint="make quantize the last step of a chain",
            )
        tokenizer = load_tokenizer(str(source))
        model = load_model(str(source))
        if model.config.model_type not in ("t5", "mt5"):
            raise UserError(
                f"{source} is a {model.config.model_type} model; {self.name} supports T5 only",
                hint="use quantize",
            )
        model = self.change(model, tokenizer, examples)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        write_json(target / CARD, json.loads(card.model_dump_json()))


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


def rebuild(model: Any, weights: Mapping[str, Any], **shape: Any) -> Any:
    """A model of the same class with another shape, and ``weights`` by transformers' names."""
    config = copy.deepcopy(model.config)
    for name, value in shape.items():
        setattr(config, name, value)
    rebuilt = type(model)(config).to(model.dtype)
    rebuilt.load_state_dict(weights, strict=True)
    rebuilt.generation_config = model.generation_config
    return rebuilt.eval()


def select(
    weights: dict[str, Any], module: str, indices: Any, side: Literal["inputs", "outputs"]
) -> None:
    """Keep only some outputs (rows) or inputs (columns) of a matrix, by ``indices`` (K,) in order.

    Changes ``weights``. Of a low-rank pair, the outer factor is changed.
    """
    dense = f"{module}.weight"
    if side == "outputs":
        name = dense if dense in weights else f"{module}.up.weight"
        weights[name] = weights[name][indices]
    else:
        name = dense if dense in weights else f"{module}.down.weight"
        weights[name] = weights[name][:, indices]


def attentions(model: Any) -> Iterator[tuple[str, Any]]:
    """Every attention layer with its name."""
    yield from _named_modules(model, ".SelfAttention", ".EncDecAttention")


def feed_forwards(model: Any) -> Iterator[tuple[str, Any]]:
    """Every feed-forward layer with its name."""
    yield from _named_modules(model, ".DenseReluDense")


def _named_modules(model: Any, *suffixes: str) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if name.endswith(suffixes):
            yield name, module
