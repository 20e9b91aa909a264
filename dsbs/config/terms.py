"""Loss of a training: weights of rationales and labels, additional terms, local teachers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from dsbs.config.registry import TERMS, entry
from dsbs.config.sections import Section, unknown


class BalanceSection(Section):
    """λ from the gradients: the rationale's share of a step is kept constant.

    Source: GradNorm (Chen et al., ICML 2018, arXiv:1711.02257), which measures the norms of the
    tasks' gradients on the weights that they share.
    """

    share: float = Field(0.5, gt=0, allow_inf_nan=False)
    """λ · ‖gradient of L_rationale‖ / ‖gradient of L_label‖ on the weights that both train."""
    every: int = Field(20, gt=0)
    """Optimizer steps between measurements; each takes about as long as two steps."""


def _number(value: Any) -> float | None:
    """A finite number; None for anything else."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_weight(value: Any) -> float | BalanceSection:
    """λ as a recipe or a record has it. Raises ValueError."""
    if isinstance(value, BalanceSection):
        return value
    if value == "balanced":
        return BalanceSection()
    if isinstance(value, Mapping):
        for key in value:
            if key not in BalanceSection.model_fields:
                raise ValueError(unknown("key", str(key), BalanceSection.model_fields))
        try:
            return BalanceSection.model_validate(value)
        except ValidationError as error:
            problems = (f"{issue['loc'][0]}: {issue['msg']}" for issue in error.errors())
            raise ValueError("; ".join(problems)) from None
    weight = _number(value)
    if weight is None or weight < 0:
        raise ValueError(
            f"{value!r}: give a number of at least 0, balanced, or a mapping such as {{share: 0.3}}"
        )
    return weight


def _read_weights(value: Any) -> tuple[float | BalanceSection, ...] | None:
    if value is None:
        return None
    return tuple(map(read_weight, value if isinstance(value, list | tuple) else [value]))


def _read_class_weights(value: Any) -> Literal["balanced"] | dict[str, float] | None:
    if value is None:
        return None
    if value == "balanced":
        return "balanced"
    if not isinstance(value, Mapping) or not value:
        raise ValueError("give balanced, or a mapping such as {spam: 5}")
    weights: dict[str, float] = {}
    for label, written in value.items():
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise ValueError(f'the label {label!r} is not text: quote it, as in {{"yes": 2}}')
        weight = _number(written)
        if weight is None or weight <= 0:
            raise ValueError(f"{label}: {written!r} is not a number above 0")
        weights[str(label)] = weight
    return weights


_WrittenWeight = Annotated[float, Field(ge=0)] | Literal["balanced"] | BalanceSection
RationaleWeight = Annotated[
    float | BalanceSection, BeforeValidator(read_weight, json_schema_input_type=_WrittenWeight)
]
RationaleWeights = Annotated[
    tuple[float | BalanceSection, ...],
    BeforeValidator(
        _read_weights,
        json_schema_input_type=list[_WrittenWeight] | _WrittenWeight,
    ),
]
_WrittenClasses = Literal["balanced"] | dict[str, Annotated[float, Field(gt=0)]]
ClassWeights = Annotated[
    Literal["balanced"] | dict[str, float],
    BeforeValidator(_read_class_weights, json_schema_input_type=_WrittenClasses),
]

_REMOVED = ("mutual-information", "consistency")
# Names of other losses: of a method's own targets in metrics.jsonl, and of the trainer.
_TAKEN = ("label", "rationale", "rationale-then-label", "label-then-rationale", "train", "eval")


def base_of(method: str) -> str:
    """The method in a name with terms: finetune in ``finetune+response``."""
    return method.partition("+")[0]


def names_of_terms(method: str) -> list[str]:
    """The terms in a method's name, in order."""
    return method.split("+")[1:]


# A kind of term is a subclass of this class with its own keys, facts and loss.
class TermSettings(Section):
    """An additional loss term; a method learns it if its name is added: [step-by-step+response]."""

    kind: str
    """A registered kind of term."""
    name: str | None = Field(None, pattern=r"^[a-z][a-z0-9-]*$")
    """The term's name in methods. None: its kind."""
    weight: float = Field(1.0, gt=0)
    """Multiplies the term, which is added to the student's own loss."""

    description: ClassVar[str] = "It also learned an additional loss term."
    """One sentence for the model card."""
    citation: ClassVar[str] = ""
    """Its source, e.g. "Hinton et al., 2015, arXiv:1503.02531"."""
    is_of_one_pass: ClassVar[bool] = False
    """Whether it relates the rows of one forward pass, so that it depends on the micro-batch."""

    @property
    def title(self) -> str:
        return self.name or self.kind

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares the student with ``train.teachers``."""
        return False

    @property
    def learns_projections(self) -> bool:
        """Whether it trains weights of its own, which LoRA's adapters cannot hold."""
        return False

    @property
    def learns_votes(self) -> bool:
        """Whether its targets are the annotations' distributions over the task's labels."""
        return False

    @model_validator(mode="after")
    def _title_is_free(self) -> TermSettings:
        if self.title in _TAKEN:
            raise ValueError(f"every training logs a loss called {self.title}; use another name")
        return self


def _settings_of(value: Any) -> Any:
    """An entry of ``train.terms`` as its kind's class. Raises ValueError for an unknown key."""
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
    for key in value:
        if key in settings.model_fields:
            continue
        kinds = [other for other in TERMS if key in entry(TERMS, other).model_fields]
        if kinds:
            raise ValueError(f"{key} belongs to {' and '.join(kinds)}, not to {kind}")
        raise ValueError(unknown("key", str(key), settings.model_fields))
    return settings.model_validate(value)


TermEntry = Annotated[SerializeAsAny[TermSettings], BeforeValidator(_settings_of)]


class LocalTeacherSection(Section):
    """A larger model on this machine, for loss terms. response on written tokens needs one with the
    student's vocabulary.
    """

    model: str | None = None
    """A trained student's folder. None: this recipe trains the teacher first (see size, start)."""
    start: str | None = None
    """The pretrained model (Hub id or folder) that it starts from. None: random weights."""
    size: Literal["nano", "mini", "small"] = "mini"
    """The size of a teacher with random weights."""
    weight: float = Field(1.0, gt=0)
    """Its weight in the average over several teachers."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of its training. None: train.learning_rate, or its start's default."""
    max_steps: int | None = Field(None, gt=0)
    """Optimizer steps of its training. None: train.max_steps, or its start's default."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Random seed of its training. None: the first of train.seeds."""

    @model_validator(mode="after")
    def _one_start(self) -> LocalTeacherSection:
        training = (self.start, self.learning_rate, self.max_steps, self.seed)
        is_trained_here = self.size != "mini" or any(value is not None for value in training)
        if self.model and is_trained_here:
            raise ValueError(
                "model names a trained teacher; start, size, learning_rate, max_steps and seed "
                "are for a teacher to train"
            )
        return self
