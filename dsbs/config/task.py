"""``task``: what is to be learned, and where its rows are."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from dsbs.config.registry import TASKS
from dsbs.config.sections import Section, scalar_text, unknown


class DataSection(Section):
    """Where the rows are: a path (.jsonl, .jsonl.gz, .csv, .parquet) or ``hub://<repository>[:<config>]/<split>``."""

    train: str  # the rows that students learn from, and their own valid and test parts where those are not given
    valid: str | None = None  # None: held out of train by id hash
    test: str | None = None  # None: held out of train by id hash
    valid_fraction: float = Field(0.1, gt=0, lt=0.5)  # of the train rows, used when valid is None
    test_fraction: float = Field(
        0.2, gt=0, lt=0.9
    )  # of the train file's rows, used when test is None


class TaskSection(Section):
    name: str  # a registered task, or `classification` / `generation` for your own data
    data: DataSection  # where the rows are
    limit: int | None = Field(
        None, gt=0
    )  # rows of each split; None: all. A limited run is not reportable
    labels: tuple[str, ...] | None = None  # classification: the closed set, two or more
    input: str | None = None  # jinja template over the row's fields; None: the only text column
    columns: dict[
        str, str
    ] = {}  # our name (id, label, rationale or an input field) -> the file's column
    description: str | None = (
        None  # one sentence for the default prompt: what is to be decided or answered
    )
    numeric: bool = (
        False  # generation: compare answers as numbers (tolerance 1e-4) when both are numbers
    )

    @field_validator("name")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(unknown("task", value, TASKS))
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        booleans = [i for i, label in enumerate(value) if isinstance(label, bool)]
        if booleans:
            raise ValueError(
                f"entry {booleans[0] + 1} reads as the YAML boolean {str(value[booleans[0]]).lower()}: yes, no, on, "
                'off, true and false are booleans in YAML; quote them, as in labels: ["yes", "no"]'
            )
        return [scalar_text(label) for label in value]

    @field_validator("labels")
    @classmethod
    def _labels_are_distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None:
            if len(value) < 2:
                raise ValueError("at least two labels are needed")
            folded = [label.strip().casefold() for label in value]
            if "" in folded:
                raise ValueError("an empty label cannot be told from a missing one")
            twice = sorted({label for label in value if folded.count(label.strip().casefold()) > 1})
            if twice:
                raise ValueError(
                    f"labels differ in more than case and space; these do not: {', '.join(twice)}"
                )
        return value
