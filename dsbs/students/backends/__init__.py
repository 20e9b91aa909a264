"""What decodes: transformers' own model, or what an export made of it. A registry, so that a student loads what it has."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from dsbs.config.registry import BACKENDS, entry
from dsbs.errors import UserError
from dsbs.students.card import StudentCard
from dsbs.students.targets import Start


class GeneratedText(NamedTuple):
    """What a model wrote to one input."""

    text: str
    truncated: bool  # the token budget ended it, not its end token
    probability: (
        float | None
    )  # of its tokens together, the end token included, in [0, 1]; None: not asked for


class Engine(Protocol):
    """A model that writes, and its tokenizer."""

    model: Any  # transformers', or the runtime's own
    tokenizer: Any

    def write(
        self, texts: Sequence[str], most: int, start: Start = "pad", *, probabilities: bool = False
    ) -> list[GeneratedText]:
        """Greedy decoding of one batch of inputs, prefixes included: at most ``most`` tokens each, in the inputs' order."""
        ...

    def save(self, folder: Path) -> None:
        """Put model and tokenizer into a folder."""
        ...

    @property
    def parameters(self) -> int | None:
        """None where the format does not tell."""
        ...


@runtime_checkable
class Searcher(Protocol):
    """An engine that has a beam search too."""

    def search(
        self, texts: Sequence[str], most: int, start: Start, beams: int
    ) -> list[GeneratedText]:
        """The likeliest text that a beam search without length penalty finds for each input, with its probability."""
        ...


def load_engine(path: Path, card: StudentCard) -> Engine:
    """The engine of a student folder. Raises UserError for a format that nothing here reads."""
    engine: Engine = _class(card).load(path, card)
    return engine


def make_engine(model: Any, tokenizer: Any, card: StudentCard) -> Engine:
    """The engine of a transformers' model in memory."""
    engine: Engine = _class(card)(model, tokenizer, card)
    return engine


def threads() -> int:
    """OMP_NUM_THREADS, for a runtime that does not read it itself; of a list (``4,2``) the outermost level. 0: not said."""
    said = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(said) if said.isdecimal() else 0


def _class(card: StudentCard) -> Any:
    if (card.kind, card.format) not in BACKENDS:
        raise UserError(
            f"{card.name} is a {card.kind} model in the format {card.format}, which dsbs does not load",
            hint="use the student that it was exported from",
        )
    return entry(BACKENDS, (card.kind, card.format))
