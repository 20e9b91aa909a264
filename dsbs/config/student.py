"""``student``: the small model before it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from dsbs.config.sections import Section


class StudentSection(Section):
    """A pretrained T5 or decoder-only model (Qwen, Llama, SmolLM), or a T5 made from scratch in a named size."""

    model: str | None = (
        None  # hub id (google/t5-v1_1-base, Qwen/Qwen3-0.6B), folder, .gguf file or `smollm2-135m-instruct`
    )
    template: Literal["auto", "plain", "chat"] = (
        "auto"  # of decoder-only ones; auto: chat if the tokenizer has a template
    )
    init: Literal["scratch"] | None = (
        None  # scratch: random weights, vocabulary learned from the training text
    )
    size: Literal["nano", "mini", "small"] = (
        "nano"  # of a scratch student: about 2, 11 and 40 million parameters
    )
    vocab_size: int = Field(4000, ge=64, le=1_000_000)  # pieces of a scratch vocabulary, at most
    max_input_tokens: int = Field(
        1024, gt=0
    )  # longer inputs are cut; decoder-only: with its template
    max_target_tokens: int = Field(256, gt=0)  # longer labels and rationales are cut
    dropout: float | None = Field(
        None, ge=0, le=0.99
    )  # None: the model's own (scratch: 0.1); decoder-only: of attention

    _folder: Path | None = PrivateAttr(None)  # of the recipe's file

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSection:
        if self.model and self.init:
            raise ValueError("student.model and student.init exclude each other")
        return self

    @property
    def source(self) -> str | None:
        """``model`` as it is opened: a GGUF file is looked for beside the recipe, too, as ``teacher.model`` is."""
        if self.model is None or self._folder is None or not self.model.lower().endswith(".gguf"):
            return self.model
        beside = self._folder / Path(self.model).expanduser()
        return (
            self.model
            if Path(self.model).expanduser().is_file() or not beside.is_file()
            else str(beside)
        )

    @property
    def settings(self) -> dict[str, Any]:
        """What decides a student; ``template: auto``, which came later than the first ones, is told by the ids of its rows."""
        return self.model_dump(
            mode="json", exclude={"template"} if self.template == "auto" else None
        )

    @property
    def is_scratch(self) -> bool:
        return self.model is None
