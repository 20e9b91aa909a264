"""``student.json``: a student's card, read without its model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.students.targets import Start, Target

CARD = "student.json"
Kind = Literal[
    "seq2seq", "causal"
]  # an encoder-decoder (T5), or a decoder alone (Llama, Qwen, SmolLM)
Template = Literal[
    "plain", "chat"
]  # a causal student's prompt: text and line break, or the tokenizer's chat template
# Of the weights in the folder: transformers' own, or what `dsbs export` made of them.
Format = Literal["transformers", "ct2", "onnx", "torch", "gguf"]


class StudentCard(BaseModel):
    """``student.json``: what a student needs to know about itself to predict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: str = "dsbs.student/1"
    name: str
    method: str
    labels: str  # whose labels it learned: gold or teacher
    seed: int
    task: TaskSection
    prefixes: dict[Target, str] = Field(
        min_length=1
    )  # of each task it learned; the first one holds the label
    starts: dict[Target, Start] = {}  # what the decoder begins each with; none given: pad
    max_input_tokens: int = Field(gt=0)
    max_target_tokens: int = Field(gt=0)
    kind: Kind = "seq2seq"
    format: Format = "transformers"
    template: Template | None = None  # how a causal one's prompts are written; None: it is none

    @property
    def explains(self) -> bool:
        """Whether it learned rationales."""
        return set(self.prefixes) != {"label"}

    @property
    def reasons_first(self) -> bool:
        """Whether it writes the label after its rationale, and with it in view."""
        return "rationale-then-label" in self.prefixes


def read_card(path: str | Path) -> StudentCard:
    """A student folder's card, without its model. Raises UserError where there is none."""
    file = Path(path) / CARD
    try:
        return StudentCard.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path} holds no student (no {CARD})",
            hint="give a folder such as runs/demo/train/step-by-step-gold-s0",
        ) from None
    except ValueError as error:
        raise UserError(
            f"{file} is not a student card ({error})", hint="train the student again"
        ) from None
