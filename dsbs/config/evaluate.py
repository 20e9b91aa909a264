"""``eval`` and ``report``: what is compared, and what is shown."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dsbs.config.sections import Section, as_tuple


class EvalSection(Section):
    split: Literal["valid", "test"] = "test"  # whose rows the systems are compared on
    batch_size: int = Field(64, gt=0)  # rows decoded together
    max_label_tokens: int = Field(64, gt=0)  # generated for a label, at most
    baseline: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = (
        "finetune",
        "distill",
    )  # methods, or names in predictions: all systems are compared with their students of the same share of the rows
    cluster: str | None = (
        None  # an input field: rows that are equal in it belong together and are resampled together
    )
    rationales: bool = (
        False  # decode and measure the rationales of the students that learned them, too
    )
    latency_calls: int = Field(
        50, ge=0
    )  # timed at batch 1 and at batch 64 for each system's first student; 0: none
    predictions: dict[
        str, str
    ] = {}  # systems from outside: name -> a .jsonl(.gz) file of {id, prediction}

    @field_validator("predictions")
    @classmethod
    def _names_are_file_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"{name!r}: a name is of letters, digits, '.', '_' and '-'")
            if name == "teacher":
                raise ValueError("teacher: that name is the recipe's own teacher's")
        return value


class ReportSection(Section):
    tensorboard: bool = False  # also write TensorBoard event files beside every student
    tensorboard_samples: int = Field(
        4, ge=0
    )  # rows of valid whose answers they show at each look; 0: none
    tensorboard_graph: bool = False  # they also show the graph of the student's model

    @model_validator(mode="after")
    def _a_graph_is_drawn_somewhere(self) -> ReportSection:
        if self.tensorboard_graph and not self.tensorboard:
            raise ValueError(
                "report.tensorboard_graph is for TensorBoard; set report.tensorboard: true as well"
            )
        return self
