"""``train.terms`` and ``train.teachers``: what a student learns beside its targets, and from which local models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, model_validator

from dsbs.config.registry import TERMS, entry
from dsbs.config.sections import Section, as_tuple, unknown

_REMOVED = ("mutual-information", "consistency")
# The keys that belong to some kinds of term alone.
_OF = {
    "divergence": ("response",),
    "share": ("response",),
    "temperature": ("response", "labels"),
    "targets": ("response",),
    "top_k": ("response",),
    "source": ("labels",),
    "layers": ("feature",),
    "stacks": ("feature",),
    "distance": ("relation",),
    "angle": ("relation",),
}
# Those that compare a student with a local teacher; `labels` does where its source says so.
_NEED_TEACHER = ("response", "feature", "relation")
# What metrics.jsonl calls the losses of a method's own targets, and the trainer those of a whole training and a look at valid.
_TAKEN = ("label", "rationale", "rationale-then-label", "label-then-rationale", "train", "eval")


def base_of(method: str) -> str:
    """The method that a name with terms builds on: of ``finetune+response``, finetune."""
    return method.partition("+")[0]


def names_of_terms(method: str) -> list[str]:
    """The terms that a method's name adds to its base, in their order."""
    return method.split("+")[1:]


class TermSettings(Section):
    """The keys of every entry of ``train.terms``; a kind of term is a subclass with the keys of that kind."""

    learns_projections: ClassVar[bool] = False
    """Whether the term trains weights of its own, which LoRA's adapters cannot hold."""

    kind: str  # a registered kind of term
    name: str | None = Field(
        None, pattern=r"^[a-z][a-z0-9-]*$"
    )  # as methods name it; None: its kind
    weight: float = Field(1.0, gt=0)  # the term, times this, is added to the student's own loss

    @property
    def title(self) -> str:
        return self.name or self.kind

    @property
    def is_of_one_pass(self) -> bool:
        """Whether it is of the examples of one forward pass, so that smaller micro-batches make it another term."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with ``train.teachers``."""
        return False

    @model_validator(mode="after")
    def _title_is_free(self) -> TermSettings:
        if self.title in _TAKEN:
            raise ValueError(
                f"{self.title} is the name of a loss that every training has by itself; take another name"
            )
        return self


class TermSection(TermSettings):
    """One more term of the loss. A method learns it where its name is added: methods: [step-by-step+response]."""

    divergence: Literal["kl", "reverse", "js"] = (
        "kl"  # response: KL(teacher ‖ student), KL(student ‖ teacher), or between
    )
    share: float = Field(
        0.5, gt=0, lt=1
    )  # response, js: the teacher's share β of the mixture that both are held against
    temperature: float = Field(
        1.0, gt=0
    )  # response, labels: divides the logits; its square multiplies the term
    targets: Annotated[
        tuple[Literal["label", "rationale"], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = (
        "label",
        "rationale",
    )  # response: whose tokens; of methods that write both in one text, all tokens
    top_k: int | None = Field(
        None, gt=0
    )  # response: so many likeliest tokens are kept on disk; None: computed each time
    source: Literal["annotations", "teachers"] = (
        "annotations"  # labels: whose distribution over the task's labels
    )
    layers: Literal["uniform", "last"] | dict[int, int] = (
        "uniform"  # feature: student's layer -> teacher's, from 1
    )
    stacks: Annotated[
        tuple[Literal["encoder", "decoder"], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = (
        "encoder",
        "decoder",
    )  # feature: whose hidden states
    distance: float = Field(1.0, ge=0)  # relation: weight of distances between examples
    angle: float = Field(2.0, ge=0)  # relation: weight of angles between examples

    @model_validator(mode="after")
    def _keys_are_the_kinds_own(self) -> TermSection:
        for key, kinds in _OF.items():
            if key in self.changed and self.kind not in kinds:
                raise ValueError(f"{key} belongs to {' and '.join(kinds)}, not to {self.kind}")
        if self.kind == "relation" and not (self.distance or self.angle):
            raise ValueError("relation needs a weight above 0: distance or angle")
        return self

    @property
    def changed(self) -> dict[str, Any]:
        """The keys that are not at their defaults: a recipe that was written out in full has every key."""
        fields = type(self).model_fields
        return {key: value for key, value in self if value != fields[key].default}

    @property
    def learns_projections(self) -> bool:  # type: ignore[override]
        return self.kind == "feature"

    @property
    def is_of_one_pass(self) -> bool:
        """Whether it is of the examples of one forward pass, so that smaller micro-batches make it another term."""
        return self.kind == "relation"

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares with ``train.teachers``."""
        return self.kind in _NEED_TEACHER or (self.kind == "labels" and self.source == "teachers")


def _settings_of(value: Any) -> Any:
    """An entry of ``train.terms`` by the settings class of its kind. Raises ValueError for an unknown kind."""
    if not isinstance(value, Mapping) or "kind" not in value:
        return value  # the base class reports what is wrong
    kind = value["kind"]
    if kind in _REMOVED:
        raise ValueError(
            f"the experimental term {kind} was removed; leave it out, or use response or labels"
        )
    if kind not in TERMS:
        raise ValueError(unknown("kind of term", str(kind), TERMS))
    settings: type[TermSettings] = entry(TERMS, kind)
    return settings.model_validate(value)


TermEntry = Annotated[SerializeAsAny[TermSettings], BeforeValidator(_settings_of)]


class LocalTeacherSection(Section):
    """A larger model on this machine, of the student's vocabulary, whose outputs the terms compare with."""

    model: str | None = (
        None  # a trained student's folder; None: one is trained first, by this recipe, as size or start say
    )
    start: str | None = (
        None  # the pretrained model (Hub id or folder) that its training starts from; None: random weights
    )
    size: Literal["nano", "mini", "small"] = "mini"  # of one from random weights
    weight: float = Field(1.0, gt=0)  # its part among several, relative to the others'
    learning_rate: float | None = Field(
        None, gt=0
    )  # of its training; None: train's, if set, or its own start's default
    max_steps: int | None = Field(
        None, gt=0
    )  # of its training; None: train's, if set, or its own start's default
    seed: int | None = Field(
        None, ge=0, lt=2**32
    )  # of its training; None: the first of train.seeds

    @model_validator(mode="after")
    def _one_origin(self) -> LocalTeacherSection:
        given = (self.start, self.learning_rate, self.max_steps, self.seed)
        if self.model and (self.size != "mini" or any(one is not None for one in given)):
            raise ValueError(
                "model names a trained teacher; start, size, learning_rate, max_steps and seed are for one to be trained"
            )
        return self
