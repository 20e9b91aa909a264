"""``export.json``: what an export is, and how near it comes to the student that it was made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dsbs.students import Format

RECORD = "export.json"


class Equivalence(BaseModel):
    """The export against transformers on the rows of ``golden.jsonl``; shares are fractions in [0, 1]."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    rows: int
    source: Literal[
        "valid", "examples", "made"
    ]  # the run's rows, texts that were given, or texts made from the vocabulary
    greedy_agreement: float  # share of equal texts by greedy decoding
    beam_agreement: float | None = (
        None  # by a beam search of 4, ties by score included; None: the format has none
    )
    score_difference: float | None = (
        None  # nats, the largest one between log-probabilities of equal texts; None: no scores
    )


class Exported(BaseModel):
    """One export. Its folder is a student's folder as any other: ``Student.load`` reads it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["dsbs.export/1"] = Field("dsbs.export/1", alias="schema")
    path: Path = Field(exclude=True)  # where it lies now: a folder may be moved
    student: str  # the name on its card
    fingerprint: str  # of the student's files
    format: Format
    quantize: str  # float32: not quantised
    megabytes: float  # of 10^6 bytes, the weights' files
    student_megabytes: float  # the same of the student
    versions: dict[str, str]
    examples: str | None = None  # digest of the texts that were given to compare on
    equivalence: Equivalence

    @property
    def smaller(self) -> float:
        """How many times smaller the weights are than the student's."""
        return self.student_megabytes / self.megabytes


def read_exported(folder: Path) -> Exported | None:
    """The record of an export's folder; None where there is none that this version reads."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return Exported.model_validate(record | {"path": folder})
    except (OSError, ValueError, TypeError):
        return None
