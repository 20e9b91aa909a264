"""Backends: the runtimes that decode with a student's weights, by architecture and format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from dsbs.config.registry import BACKENDS, entry
from dsbs.errors import DsbsError, UserError
from dsbs.students.card import Start, StudentCard


class GeneratedText(NamedTuple):
    """A model's output for one input."""

    text: str
    truncated: bool  # whether the token limit ended it, not its end token
    # of all its tokens with the end token, in [0, 1]; None: not asked for
    probability: float | None
    latency_ms: float = 0.0  # wall time of its batch divided by the rows; backends leave it at 0
    # of the student's classes, in their order; None: the label was written
    distribution: tuple[float, ...] | None = None
    # of the input from the validation rows, by `Novelty`; None: it is not measured
    distance: float | None = None
    # the text's token ids with their log-probabilities in nats, the end token included; empty: no
    # probability was asked for, or the runtime gives only that of the whole text
    tokens: tuple[tuple[int, float], ...] = ()


class Backend(Protocol):
    """A model that generates text, and its tokenizer."""

    model: Any  # transformers' own, or the runtime's
    tokenizer: Any

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """Greedy decoding of one batch of inputs, prefixes included, in order.

        ``start`` is the decoder's first token; decoder-only models ignore it.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write model and tokenizer into a folder."""
        ...

    @property
    def parameters(self) -> int | None:
        """Number of parameters that a label needs; None: unknown for this format."""
        ...


@runtime_checkable
class BeamSearchBackend(Protocol):
    """A backend with beam search."""

    def beam_search(
        self, texts: Sequence[str], max_new_tokens: int, start: Start, beams: int
    ) -> list[GeneratedText]:
        """The likeliest text of a beam search without length penalty, with its probability."""
        ...


@runtime_checkable
class ScoringBackend(Protocol):
    """A backend that scores texts instead of writing them."""

    def score(self, texts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """Log-probabilities (texts, answers), in nats, that each input is answered by each text.

        That of all its tokens with the end token.
        """
        ...


@runtime_checkable
class StatesBackend(Protocol):
    """A backend whose model's states can be read."""

    def pooled_states(self, texts: Sequence[str]) -> Any:
        """The model's last states, one vector for each text: a tensor (texts, D)."""
        ...


def load_backend(path: Path, card: StudentCard) -> Backend:
    """Load the backend of a student's folder. Raises UserError for an unsupported format."""
    backend: Backend = _backend_class(card).load(path, card)
    return backend


def make_backend(model: Any, tokenizer: Any, card: StudentCard) -> Backend:
    """The backend of a transformers model in memory."""
    backend: Backend = _backend_class(card)(model, tokenizer, card)
    return backend


def export_error(path: Path, error: Exception) -> DsbsError:
    return DsbsError(f"cannot load the export in {path} ({error})", hint="export the student again")


def omp_threads() -> int:
    """OMP_NUM_THREADS, for a runtime that does not read it itself; 0: not set.

    Of a list such as ``4,2``, the outermost level counts.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdecimal() else 0


def _backend_class(card: StudentCard) -> Any:
    if (card.runtime, card.format) not in BACKENDS:
        raise UserError(
            f"{card.name} is a {card.kind} model in {card.format} format, which dsbs cannot load",
            hint="use the student that it was exported from",
        )
    return entry(BACKENDS, (card.runtime, card.format))
