"""Compression record: ``compress/<student>/<chain>/compress.json``, which the report reads.

Shares and accuracies are fractions in [0, 1], sizes megabytes of 10^6 bytes, times milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsbs.errors import UserError
from dsbs.records.results import Latency

RECORD = "compress.json"


class _Record(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        populate_by_name=True,
        use_attribute_docstrings=True,
    )


class Measurement(_Record):
    """Accuracy, size and latency of one student on the valid rows."""

    accuracy: float
    megabytes: float
    """Size of the weight files."""
    parameters: int | None = None
    """None: unknown for the student's format."""
    latency: list[Latency]
    """One entry per batch size."""

    def median_ms(self, batch_size: int) -> float | None:
        """Median time of a call with ``batch_size`` rows; None: not measured."""
        for latency in self.latency:
            if latency.batch_size == batch_size:
                return latency.p50_ms
        return None


class Compressed(_Record):
    """One compressed student. Its folder is a student's folder like any other."""

    schema_: Literal["dsbs.compress/1"] = Field("dsbs.compress/1", alias="schema")
    student: str
    """Name of the student that the chain started from."""
    fingerprint: str
    """Fingerprint of that student."""
    chain: tuple[str, ...]
    """The steps in order, as on the command line: prune-ff=0.5, quantize=int8."""
    n: int
    """Number of valid rows."""
    original: Measurement
    compressed: Measurement
    agreement: float
    """Share of rows with the same label as the original."""
    before_healing: float | None = None
    """Accuracy before the last step's healing; None: it had none."""
    healing_steps: int = 0
    """Optimizer steps of the last step's healing."""
    max_drop: float
    """Largest acceptable loss of accuracy."""
    accepted: bool
    """Whether the loss is within ``max_drop``."""
    seconds: float
    """Duration of the last step, with its healing."""

    @property
    def name(self) -> str:
        return "+".join(self.chain)

    @property
    def recovered(self) -> float | None:
        """The share of the lost accuracy that the last step's healing recovered.

        The loss is that of the whole chain against the original, before the healing. Above 1 the
        student is better than the original; below 0 healing made it worse. None: no healing, or no
        loss.
        """
        if self.before_healing is None or self.before_healing >= self.original.accuracy:
            return None
        loss = self.original.accuracy - self.before_healing
        return (self.compressed.accuracy - self.before_healing) / loss


def read_record(folder: Path) -> Compressed:
    """A compressed student's record. Raises UserError where it cannot be read."""
    path = folder / RECORD
    try:
        return Compressed.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise UserError(
            f"{path} is not a record of a compressed student", hint="compress that student again"
        ) from None
