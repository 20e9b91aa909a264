"""``compress/<student>/<chain>/compress.json``: what `dsbs compress` made of a student, and the report shows.

Shares and accuracies are fractions in [0, 1], sizes are megabytes of 10^6 bytes, times are milliseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsbs.errors import UserError
from dsbs.records.results import Latency

RECORD = "compress.json"


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True
    )


class Measurement(_Part):
    """A model's place on the frontier, found on the rows of valid."""

    accuracy: float
    megabytes: float  # of the weight files
    parameters: int | None = None  # None: the format does not tell
    latency: list[Latency]  # a line for each batch size

    def median_ms(self, batch_size: int) -> float | None:
        """Median time of a call with so many rows; None: not measured."""
        return next((one.p50_ms for one in self.latency if one.batch_size == batch_size), None)


class Compressed(_Part):
    """One compressed student. Its folder is a student's folder as any other."""

    schema_: Literal["dsbs.compress/1"] = Field("dsbs.compress/1", alias="schema")
    student: str  # the name of the student that the chain began with
    fingerprint: str  # of that student
    chain: tuple[
        str, ...
    ]  # the steps in their order, as the command line has them: prune-ff=0.5, quantize=int8
    n: int  # rows of valid
    original: Measurement
    compressed: Measurement
    agreement: float  # share of rows with the original's label
    before_healing: float | None = (
        None  # accuracy before the last step's healing; None: it healed nothing
    )
    healing_steps: int = 0  # optimizer steps of the last step's healing
    max_drop: float  # accuracy that might be lost against the original
    accepted: bool  # whether no more was lost
    seconds: float  # that the last step took, its healing included

    @property
    def name(self) -> str:
        return "+".join(self.chain)

    @property
    def recovered(self) -> float | None:
        """The share of the accuracy lost that the last step's healing brought back; None: it healed nothing, or nothing was
        lost.

        Lost is what the chain had cost against the original before that healing. Above 1 the student is better than the
        original, below 0 healing made it worse.
        """
        if self.before_healing is None or self.before_healing >= self.original.accuracy:
            return None
        return (self.compressed.accuracy - self.before_healing) / (
            self.original.accuracy - self.before_healing
        )


def read_compressed(run: Path) -> list[Compressed]:
    """Every compressed student of a run, by student and chain. Raises UserError for a record that cannot be read."""
    return [read_record(path.parent) for path in sorted((run / "compress").glob(f"*/*/{RECORD}"))]


def read_record(folder: Path) -> Compressed:
    """A compressed student's record. Raises UserError for one that cannot be read."""
    path = folder / RECORD
    try:
        return Compressed.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise UserError(
            f"{path} is no record of a compressed student", hint="compress that student again"
        ) from None
