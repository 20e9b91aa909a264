"""Novelty of an input: its distance from the validation rows, kept in ``novelty.npz``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dsbs.errors import UserError
from dsbs.files import atomic_write

NOVELTY = "novelty.npz"
Floats = NDArray[np.float64]
_QUANTILE = 0.99
_FEWEST_ROWS = 20  # fewer are no measure
_MAX_ROWS = 1000  # more are not needed
_SHORTEST = 1e-12  # a length that a vector is divided by


@dataclass(frozen=True, slots=True)
class Novelty:
    """``novelty.npz``: when an input is unlike the validation rows.

    The distance is that to the nearest of them (Sun et al., 2022): 1 minus the cosine of the pooled
    states that the label head reads.
    """

    rows: NDArray[np.float16]
    """Their pooled states, of length 1: (rows, D)."""
    limit: float
    """99% of them are within this distance of the nearest other one."""

    def distances(self, states: Floats) -> list[float]:
        """(inputs, D) -> a distance an input."""
        similarities = _unit(states) @ self.rows.astype(np.float64).T
        distances: list[float] = (1 - similarities.max(axis=1)).tolist()
        return distances


def fit_novelty(states: Floats) -> Novelty | None:
    """Fit the limit on the validation rows' pooled states (rows, D). None: too few rows."""
    if len(states) < _FEWEST_ROWS:
        return None
    rows = _unit(states[:_MAX_ROWS]).astype(np.float16)
    similarities = rows.astype(np.float64) @ rows.astype(np.float64).T
    np.fill_diagonal(similarities, -1)
    distances = 1 - similarities.max(axis=1)
    return Novelty(rows, float(np.quantile(distances, _QUANTILE, method="higher")))


def _unit(states: Floats) -> Floats:
    lengths = np.linalg.norm(states, axis=1, keepdims=True)
    return np.asarray(states / np.maximum(lengths, _SHORTEST))


def write_novelty(folder: Path, novelty: Novelty) -> None:
    with atomic_write(folder / NOVELTY, binary=True) as file:
        np.savez_compressed(file, rows=novelty.rows, limit=novelty.limit)


def read_novelty(folder: Path) -> Novelty | None:
    """The novelty of a student; None: it has none. Raises UserError for another content."""
    try:
        with np.load(folder / NOVELTY, allow_pickle=False) as file:
            return Novelty(np.asarray(file["rows"], np.float16), float(file["limit"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, BadZipFile):
        raise UserError(
            f"{folder / NOVELTY} cannot be read",
            hint="remove it: unusual inputs are then not noticed",
        ) from None
