"""Student card: ``student.json``, which describes a student and is read without its model."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from dsbs.config import TaskSection
from dsbs.errors import UserError

CARD = "student.json"
Architecture = Literal["seq2seq", "causal"]  # encoder-decoder (T5), or decoder-only (Llama, Qwen)
Template = Literal["plain", "chat"]  # text and line break, or the tokenizer's chat template
Format = Literal["transformers", "ct2", "onnx", "torch", "gguf"]
Target = Literal["label", "rationale", "rationale-then-label", "label-then-rationale"]
# The decoder's first token: T5's padding token, or its end token, which every vocabulary has and no
# other input starts with.
Start = Literal["pad", "eos"]


class StudentCard(BaseModel):
    """What a student needs to know about itself in order to predict."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    schema_version: str = "dsbs.student/1"
    name: str
    method: str
    labels: str
    """Source of the labels that it learned: gold or teacher."""
    seed: int
    task: TaskSection
    prefixes: dict[Target, str] = Field(min_length=1)
    """Input prefix of each target that it learned. The first target contains the label."""
    starts: dict[Target, Start] = {}
    """First token of the decoder, by target; pad where there is no entry."""
    max_input_tokens: int = Field(gt=0)
    max_target_tokens: int = Field(gt=0)
    kind: Architecture = "seq2seq"
    format: Format = "transformers"
    """Format of the weights in the folder: transformers' own, or an export's."""
    template: Template | None = None
    """How the prompts of a decoder-only student are written. None: it is not decoder-only."""

    @property
    def explains(self) -> bool:
        """Whether it learned rationales."""
        return set(self.prefixes) != {"label"}

    @property
    def reasons_first(self) -> bool:
        """Whether it writes the label after its rationale, in one sequence."""
        return "rationale-then-label" in self.prefixes


def read_card(path: str | Path) -> StudentCard:
    """Read the card in a student's folder. Raises UserError where there is none."""
    file = Path(path) / CARD
    try:
        return StudentCard.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{path} does not contain a student (no {CARD})",
            hint="give a folder such as runs/demo/train/step-by-step-gold-s0",
        ) from None
    except ValueError as error:
        raise UserError(
            f"{file} is not a student card ({error})", hint="train the student again"
        ) from None
