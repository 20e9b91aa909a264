"""Student section: the small model, or several by their names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    field_serializer,
    model_validator,
)

from dsbs.config.sections import Section, folder_in
from dsbs.config.train import StudentTrainSection
from dsbs.files import expand_user


class RationaleDecoderSection(Section):
    """A small decoder over an encoder's states."""

    layers: int = Field(2, ge=1)
    """Number of layers."""


class StudentSection(Section):
    """The small model: a pretrained encoder (MiniLM, DeBERTa, ModernBERT), T5 or decoder-only model
    (Qwen, Llama, SmolLM), or a T5 with random weights.
    """

    model: str | None = None
    """A Hub id (google/t5-v1_1-base, Qwen/Qwen3-0.6B), a folder, a .gguf file,
    ``smollm2-135m-instruct`` or ``minilm-l6``. None: random weights."""
    head: Literal["auto", "text", "labels"] = "auto"
    """How it gives its label. text: it writes the label; labels: a linear layer chooses among the
    task's closed set of labels. auto: labels for encoders, text for all others."""
    rationale_decoder: RationaleDecoderSection = RationaleDecoderSection()
    """The decoder that writes an encoder's rationales; prediction of labels does not need it."""
    template: Literal["auto", "plain", "chat"] = "auto"
    """The input format of decoder-only models. auto: chat if the tokenizer has a chat template,
    else plain."""
    init: Literal["scratch"] | None = None
    """scratch: random weights and a vocabulary learned from the training text. None: the same if
    ``model`` is None."""
    size: Literal["nano", "mini", "small"] = "nano"
    """The size of a student from scratch: about 2, 11 or 40 million parameters."""
    vocab_size: int = Field(4000, ge=64, le=1_000_000)
    """Maximum number of entries in a scratch student's vocabulary."""
    max_input_tokens: int = Field(1024, gt=0)
    """Maximum tokens of an input; longer ones are truncated. Decoder-only models: the template
    included."""
    max_target_tokens: int = Field(256, gt=0)
    """Maximum tokens of a label or rationale; longer ones are truncated."""
    dropout: float | None = Field(None, ge=0, le=0.99)
    """Dropout rate; of attention alone in decoder-only models. None: the model's own (0.1 from
    scratch)."""

    _folder: Path | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._folder = folder_in(context)

    @model_validator(mode="after")
    def _one_start(self) -> StudentSection:
        if self.model and self.init:
            raise ValueError("student.model and student.init exclude each other")
        return self

    @property
    def source(self) -> str | None:
        """The ``model`` to load. A GGUF file is also found beside the recipe, like
        ``teacher.model``.
        """
        if self.model is None or self._folder is None or not self.model.lower().endswith(".gguf"):
            return self.model
        path = expand_user(self.model)
        file = self._folder / path
        if file.is_file() and not path.is_file():
            return str(file)
        return self.model

    @property
    def settings(self) -> dict[str, Any]:
        """The keys that decide a student. ``template: auto`` decides nothing by itself: the token
        ids tell its format.
        """
        exclude = {name for name in ("template", "head") if getattr(self, name) == "auto"}
        if self.rationale_decoder == RationaleDecoderSection():
            exclude.add("rationale_decoder")
        return self.model_dump(mode="json", exclude=exclude)

    @property
    def is_scratch(self) -> bool:
        """Whether the student starts from random weights."""
        return not self.model


class NamedStudentSection(StudentSection):
    """One of several students, with settings of its own.

    Its name begins the names of its systems: ``minilm-finetune-gold``.
    """

    train: StudentTrainSection = StudentTrainSection()
    """Its training settings, where they are not those of ``train``."""

    @field_serializer("train")
    def _given_settings(self, train: StudentTrainSection) -> dict[str, Any]:
        """Only the keys that are given replace those of ``train``."""
        return train.model_dump(mode="json", exclude_unset=True)

    @property
    def section(self) -> StudentSection:
        """The section of this student alone, without its name and training settings."""
        values = {name: getattr(self, name) for name in StudentSection.model_fields}
        section = StudentSection.model_construct(**values)
        section._folder = self._folder
        return section


# --- one student or several

ONE = "one"  # tags of the two forms, which pydantic puts into the paths of errors
SEVERAL = "several"
_SIMILAR = 0.8


def is_several(value: Any) -> bool:
    """Whether ``student`` of a recipe is a mapping of names to sections."""
    if not isinstance(value, Mapping) or _section_keys(value):
        return False
    return any(isinstance(section, Mapping | StudentSection) for section in value.values())


def _section_keys(value: Mapping[Any, Any]) -> list[str]:
    """The keys of a student's section, misspelled ones of nested sections included."""
    nested = ["rationale_decoder"]
    return [
        str(key)
        for key in value
        if key in NamedStudentSection.model_fields
        or difflib.get_close_matches(str(key), nested, n=1, cutoff=_SIMILAR)
    ]


def read_students(value: Any) -> Any:
    """The value of ``student`` with empty sections in place of null. Raises ValueError for names
    beside keys of a section.
    """
    if not isinstance(value, Mapping):
        return value
    keys = _section_keys(value)
    names = [str(name) for name in value if isinstance(value[name], Mapping) and name not in keys]
    if keys and names:
        raise ValueError(
            f"{', '.join(names)}: names of students beside keys of a single one "
            f"({', '.join(keys)}); give either one section, or a mapping of names to sections"
        )
    if not is_several(value):
        return value
    return {name: _without_null_train(section) for name, section in value.items()}


def _without_null_train(section: Any) -> Any:
    """A named student's section, of which YAML makes null where nothing is written."""
    if section is None:
        return {}
    if isinstance(section, Mapping) and section.get("train", section) is None:
        return {key: value for key, value in section.items() if key != "train"}
    return section


Students = Annotated[
    Annotated[StudentSection, Tag(ONE)] | Annotated[dict[str, NamedStudentSection], Tag(SEVERAL)],
    Discriminator(lambda value: SEVERAL if is_several(value) else ONE),
    BeforeValidator(read_students),
]
