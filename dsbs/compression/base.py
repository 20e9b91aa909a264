"""A step of compression: what it is called, and the student's folder that it makes of another one's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from dsbs.config import unknown
from dsbs.config.registry import COMPRESSION_STEPS, entry
from dsbs.errors import UserError
from dsbs.files import write_json
from dsbs.students import CARD, load_model, load_tokenizer, read_card


class Examples(Protocol):
    """Rows for a step that looks at what the student does with them."""

    def batches(self, model: Any, tokenizer: Any) -> Iterator[Mapping[str, Any]]:
        """Some hundred train rows, padded, one target at a time: input_ids and attention_mask (B, S), decoder_input_ids and
        labels (B, T).
        """
        ...

    def inputs(self) -> list[str]:
        """A few of valid's rows as texts without prefix."""
        ...


class Step(Protocol):
    """One entry of the chain."""

    value: str  # what follows the name, in one spelling
    heals: bool  # whether what it makes can learn on
    sparse: bool  # whether its zeros are to stay zero from now on
    learns_from_rows: bool  # whether it looks at train rows

    def make(self, source: Path, into: Path, examples: Examples) -> None:
        """Write a student into the empty folder ``into``. Raises UserError where ``source`` cannot be made smaller so."""
        ...


def read_step(text: str) -> Step:
    """``prune-ff=0.5`` -> the step. Raises UserError for what is none."""
    name, equals, value = text.partition("=")
    if name not in COMPRESSION_STEPS:
        raise UserError(
            f"--method {text}: {unknown('step', name, COMPRESSION_STEPS)}",
            hint="e.g. --method prune-ff=0.5",
        )
    if not equals or not value:
        example = "int8" if name == "quantize" else "0.5"
        raise UserError(f"--method {text} lacks its value", hint=f"e.g. --method {name}={example}")
    step: Step = entry(COMPRESSION_STEPS, name)(value)
    return step


def share(name: str, value: str) -> float:
    """A share above 0 and below 1. Raises UserError."""
    try:
        found = float(value)
    except ValueError:
        found = 0.0
    if not 0 < found < 1:
        raise UserError(
            f"--method {name}={value}: not a share above 0 and below 1",
            hint=f"e.g. --method {name}=0.5",
        )
    return found


def kept_of(name: str, removed: float, count: int, what: str) -> int:
    """How many of ``count`` are left, at least one. Raises UserError where none would go."""
    left = max(1, count - round(removed * count))
    if left == count:
        raise UserError(
            f"{name}={removed:g} removes none of {count} {what}",
            hint=f"a larger share: {name}={1 / count:.2g} removes one",
        )
    return left


def rewritten(source: Path, into: Path, change: Callable[[Any, Any], Any]) -> None:
    """Load a student, let ``change`` make another model of its model and tokenizer, and save that as a student.

    Raises UserError where it is no T5 of transformers' own format.
    """
    card = read_card(source)
    if card.format != "transformers" or card.kind != "seq2seq":
        what = (
            f"of format {card.format}"
            if card.format != "transformers"
            else f"a {card.kind} student"
        )
        raise UserError(
            f"{source} is {what}; this step changes the weights of a T5",
            hint="quantize comes last in a chain",
        )
    tokenizer = load_tokenizer(str(source))
    model = load_model(str(source))
    if model.config.model_type not in ("t5", "mt5"):
        raise UserError(
            f"{source} is a {model.config.model_type}, and this step knows T5's layers",
            hint="use quantize",
        )
    model = change(model, tokenizer)
    model.save_pretrained(into)
    tokenizer.save_pretrained(into)
    write_json(into / CARD, json.loads(card.model_dump_json()))


def rebuilt(model: Any, weights: Mapping[str, Any], **shape: Any) -> Any:
    """A model of the same class with another shape and these weights, by transformers' names of them."""
    import copy

    config = copy.deepcopy(model.config)
    for name, value in shape.items():
        setattr(config, name, value)
    made = type(model)(config).to(model.dtype)
    made.load_state_dict(weights, strict=True)
    made.generation_config = model.generation_config
    return made.eval()


def take(weights: dict[str, Any], module: str, kept: Any, side: str) -> None:
    """Keep those of a matrix's outputs (its rows) or inputs (its columns); of a low-rank pair the outer factor's.

    ``weights`` are changed; ``kept`` are indices (K,) in order.
    """
    plain = f"{module}.weight"
    if side == "outputs":
        name = plain if plain in weights else f"{module}.up.weight"
        weights[name] = weights[name][kept]
    else:
        name = plain if plain in weights else f"{module}.down.weight"
        weights[name] = weights[name][:, kept]


def attentions(model: Any) -> Iterator[tuple[str, Any]]:
    """Every attention with its name."""
    yield from _named(model, ".SelfAttention", ".EncDecAttention")


def feed_forwards(model: Any) -> Iterator[tuple[str, Any]]:
    """Every feed-forward layer with its name."""
    yield from _named(model, ".DenseReluDense")


def _named(model: Any, *ends: str) -> Iterator[tuple[str, Any]]:
    yield from ((name, module) for name, module in model.named_modules() if name.endswith(ends))
