"""Train section: the methods, their loss, and how students are trained."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dsbs.config.registry import METHODS
from dsbs.config.sections import LabelSource, Section, as_tuple, unknown
from dsbs.config.terms import (
    BalanceSection,
    ClassWeights,
    LocalTeacherSection,
    RationaleWeight,
    RationaleWeights,
    TermEntry,
    TermSettings,
    base_of,
    names_of_terms,
    read_weight,
)
from dsbs.records import Provenance
from dsbs.records.subsets import PER_LABEL, rows_per_label

T = TypeVar("T")
Tried = Annotated[tuple[T, ...], BeforeValidator(as_tuple)]

PRETRAINED_LEARNING_RATE = 5.0e-5
SCRATCH_LEARNING_RATE = 1.0e-3
PRETRAINED_MAX_STEPS = 10_000
SCRATCH_MAX_STEPS = 1000
RESOLVED = ("learning_rate", "head_learning_rate", "max_steps")
"""The keys whose defaults depend on the student."""


def _read_subset(value: Any) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            if rows_per_label(value) is not None:
                return value
        else:
            is_number = True
    if not is_number or not 0 < value <= 1:
        raise ValueError(
            "must be a share of the train rows, above 0 and at most 1, such as 0.25, or a number "
            f"of rows of each label, such as 5-per-label (given: {value!r})"
        )
    return value


SubsetEntry = Annotated[
    Annotated[float, Field(gt=0, le=1)] | Annotated[str, Field(pattern=f"^{PER_LABEL}$")],
    BeforeValidator(_read_subset),
]


class SelectSection(Section):
    """The annotations to learn from. A row left out still teaches its gold label."""

    agree_gold: bool = False
    """Only where the teacher's label is the gold label."""
    min_vote: float | None = Field(None, ge=0, le=1)
    """Minimum share of the readable samples that the majority label has; of several labels or
    fields, that the least sure one has. None: any share."""
    min_logprob: float | None = Field(None, le=0)
    """Minimum log-probability of the label, in nats; needs annotate.logprobs. None: any."""
    provenance: Annotated[tuple[Provenance, ...] | None, BeforeValidator(as_tuple)] = None
    """Where the rationale may come from. None: anywhere."""
    max_per_label: int | None = Field(None, gt=0)
    """Maximum annotations per teacher label that a student learns from, chosen by a hash of the
    ids: the first so many of each, where rows have several labels. None: no maximum."""


class TuneSection(Section):
    """Values to choose from: every student tries all combinations and keeps the best on the
    validation rows.
    """

    learning_rate: Tried[Annotated[float, Field(gt=0)]] | None = None
    """Values to try. None: train.learning_rate."""
    batch_size: Tried[Annotated[int, Field(gt=0)]] | None = None
    """Values to try. None: train.batch_size."""
    max_steps: Tried[Annotated[int, Field(gt=0)]] | None = None
    """Values to try. None: train.max_steps."""
    max_epochs: Tried[Annotated[float, Field(gt=0)]] | None = None
    """Values to try. None: train.max_epochs."""
    rationale_weight: RationaleWeights | None = None
    """Values of λ to try, ``balanced`` among them; methods without rationales try none. None:
    train.rationale_weight."""
    warmup_steps: Tried[Annotated[int, Field(ge=0)]] | None = None
    """Values to try. None: train.warmup_steps."""
    weight_decay: Tried[Annotated[float, Field(ge=0)]] | None = None
    """Values to try. None: train.weight_decay."""

    @field_validator("*")
    @classmethod
    def _distinct_values(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("give at least one value, and each value once")
        return value

    @model_validator(mode="after")
    def _names_a_setting(self) -> TuneSection:
        if self.max_steps and self.max_epochs:
            raise ValueError("train.tune: max_steps and max_epochs exclude each other")
        if all(values is None for _, values in self):
            raise ValueError(
                "train.tune names no setting; add one, e.g. learning_rate: [0.0003, 0.001], or "
                "leave train.tune out"
            )
        return self

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Every combination as JSON values, in the order of the recipe's values."""
        dumped = self.model_dump(mode="json")
        values = {name: tried for name, tried in dumped.items() if tried is not None}
        combinations = itertools.product(*values.values())
        return [dict(zip(values, combination, strict=True)) for combination in combinations]


class LoraSection(Section):
    """Low-rank adapters, trained in place of all weights and merged into the finished student."""

    rank: int = Field(16, gt=0)
    """The rank of each adapter."""
    alpha: int = Field(32, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout rate of the adapters' inputs."""
    targets: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)] = ("q", "v")
    """The matrices to adapt in each block; q also means q_proj, its name in most decoder-only
    models."""

    @field_validator("targets")
    @classmethod
    def _order_does_not_matter(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))


class _SharedTrainSection(Section):
    """The train settings that all students of a run share, so that their comparison is fair."""

    methods: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        "step-by-step",
        "finetune",
        "distill",
    )
    """Methods to train and compare; the first is the recipe's subject. "+" adds loss terms by name:
    finetune+response."""
    labels: Annotated[tuple[LabelSource, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        "gold",
    )
    """The labels that methods with rationales learn; finetune learns gold labels, distill the
    teacher's."""
    subset: Annotated[tuple[SubsetEntry, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        1.0,
    )
    """Parts of the train rows to train on: shares, such as 0.25, or rows of each label, such as
    5-per-label (by gold labels, or the teacher's where no row has one). Smaller ones are contained
    in larger ones and equal for all methods."""
    select: SelectSection = SelectSection()
    """The annotations to learn from."""
    rationales: Literal["chosen", "all", "drawn"] = "chosen"
    """Which of several sampled rationales to learn: the annotation's own, all of them, or a random
    one per epoch."""
    class_weights: ClassWeights | None = None
    """Weights of the labels in a label head's loss, Σ weight·loss / Σ weight over the step's rows:
    a mapping of labels to weights (a label that is not named has weight 1), or balanced: rows /
    (labels · rows of the label), from the student's own train rows. Validation is not weighted.
    None: all rows count alike. multilabel: the weight of a label where a row has it; balanced: rows
    without the label / rows with it."""
    loss_mean: Literal["global", "micro"] = "global"
    """Token means over the optimizer step. micro: over each micro-batch, as in the published code.
    """
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**32)], ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
    ] = (0,)
    """Random seeds; each method trains one student per seed."""
    terms: tuple[TermEntry, ...] = ()
    """Additional loss terms, for the methods that name them."""
    teachers: tuple[LocalTeacherSection, ...] = ()
    """Local models that loss terms compare the student with; several are averaged."""
    ensemble: Literal["logprobs", "probabilities"] = "logprobs"
    """What is averaged over several local teachers."""
    log_every: int = Field(10, gt=0)
    """Steps between lines of metrics.jsonl."""
    shuffle: bool = True
    """Whether each epoch has a new order of the rows. false: the file's order."""
    valid_limit: int = Field(1000, gt=0)
    """Maximum validation rows, equal for all methods, chosen by a hash of the ids."""


class StudentTrainSection(Section):
    """Settings of this student alone, in place of those of ``train``. A key that is left out is
    ``train``'s; ``max_steps`` replaces ``max_epochs``, and the other way round.
    """

    rationale_weight: RationaleWeight = 1.0
    """λ in (L_label + λ·L_rationale) / (1 + λ). ``balanced``: λ follows from the two gradients, as
    set by ``share`` and ``every``."""
    rationale_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How λ changes to ``rationale_weight_end``."""
    rationale_weight_end: float = Field(0.0, ge=0)
    """λ at the last step, unless ``rationale_schedule`` is constant."""
    task_token: Literal["prefix", "decoder"] = "prefix"
    """How step-by-step marks its two tasks: by a prefix of the input, or by the decoder's start
    token."""
    init: str | None = None
    """A folder with weights and tokenizer to start from. None: the student section's start."""
    lora: LoraSection | None = None
    """Low-rank adapters. None: train all weights; {}: LoRA with its defaults."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """The optimizer; adafactor needs less memory."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate. None: 5e-5 for a pretrained student, 1e-3 for one from scratch."""
    head_learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of a label head's new layers, the rationale decoder included. None: ten
    times ``learning_rate``."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate decays after warm-up; linear and cosine end at 0 at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps in which the learning rate rises to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay: the share of the weights subtracted per step, times the learning
    rate."""
    batch_size: int = Field(64, gt=0)
    """Examples per optimizer step."""
    micro_batch_size: int | None = Field(None, gt=0)
    """Examples per forward pass. None: the whole batch."""
    max_steps: int | None = Field(None, gt=0)
    """Optimizer steps. None: 10,000 for a pretrained student, 1,000 for one from scratch."""
    max_epochs: float | None = Field(None, gt=0)
    """Passes over the student's train rows, in place of ``max_steps``; a smaller subset takes fewer
    steps. None: train by steps."""
    eval_every: int | None = Field(None, gt=0)
    """Steps between validations. None: a twentieth of ``max_steps``, or more where validation would
    take over a fifth of the time."""
    patience: int | None = Field(None, gt=0)
    """Validations without improvement before training stops early. None: never."""
    padding: Literal["none", "batch"] = "none"
    """none: no padding tokens are computed (decoder-only models, DeBERTa: rows of similar length
    together); batch: pad every batch."""
    tune: TuneSection | None = None
    """Settings to choose by validation accuracy with the first seed. None: no tuning."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format. auto: bf16 on NVIDIA GPUs that support it, else fp32; fp16 is missing
    because T5 overflows in it."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of storing them: slower, less memory."""


class TrainSection(StudentTrainSection, _SharedTrainSection):
    """The methods, their loss, and the training settings."""

    @field_validator("seeds", "methods", "labels", "subset")
    @classmethod
    def _no_repeats(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(value)) != len(value):
            raise ValueError("an entry is given twice")
        return value

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if base_of(name) not in METHODS:
                raise ValueError(unknown("method", base_of(name), METHODS))
        return value

    @model_validator(mode="after")
    def _terms_and_methods_fit(self) -> Self:
        titles = [term.title for term in self.terms]
        for title in titles:
            if titles.count(title) > 1:
                raise ValueError(
                    f"train.terms: two terms are called {title!r}; give one of them another name"
                )
        for method in self.methods:
            self.check_method(method)
        used = {name for method in self.methods for name in names_of_terms(method)}
        for term in self.terms:
            self._check_term(term, used)
        if self.teachers and not any(term.needs_teacher for term in self.terms):
            raise ValueError(
                "train.teachers: no term compares with them; add one, e.g. "
                "terms: [{kind: response}], or leave them out"
            )
        return self

    def _check_term(self, term: TermSettings, used: set[str]) -> None:
        if term.title not in used:
            first = self.methods[0]
            raise ValueError(
                f"train.terms: no method learns {term.title!r}; add its name to one, e.g. "
                f"methods: [{first}, {base_of(first)}+{term.title}]"
            )
        if term.needs_teacher and not self.teachers:
            raise ValueError(
                f"train.terms: {term.title!r} compares with a local model; add one, e.g. "
                "teachers: [{size: mini}]"
            )
        if term.learns_projections and self.lora is not None:
            raise ValueError(
                f"train.terms: {term.title!r} learns projections, which train.lora's adapters "
                "cannot hold; leave one of them out"
            )

    def check_method(self, method: str) -> None:
        """Raises ValueError where a method's base is unknown, or a term in its name is unknown or
        given twice.
        """
        if base_of(method) not in METHODS:
            raise ValueError(unknown("method", base_of(method), METHODS))
        names = names_of_terms(method)
        titles = [term.title for term in self.terms]
        for name in names:
            if not titles:
                raise ValueError(
                    f"train.methods: {method}: there is no term {name!r}: train.terms is empty"
                )
            if name not in titles:
                raise ValueError(f"train.methods: {method}: {unknown('term', name, titles)}")
            if names.count(name) > 1:
                raise ValueError(f"train.methods: {method} names the term {name!r} twice")

    def terms_of(self, method: str) -> tuple[Any, ...]:
        """The terms that a method names, in its order."""
        by_title = {term.title: term for term in self.terms}
        return tuple(by_title[name] for name in names_of_terms(method))

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> Self:
        sizes = (self.tune and self.tune.batch_size) or (self.batch_size,)
        if self.micro_batch_size and any(size % self.micro_batch_size for size in sizes):
            raise ValueError("train.batch_size must be a multiple of train.micro_batch_size")
        return self

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        tune = self.tune
        by_steps = self.max_steps is not None or bool(tune and tune.max_steps)
        if by_steps and self.counts_epochs:
            raise ValueError(
                "train.max_steps and train.max_epochs exclude each other; a student is trained "
                "either by steps or by epochs: set the other one to null"
            )
        return self

    @model_validator(mode="after")
    def _weight_has_one_rule(self) -> Self:
        tried = (self.tune and self.tune.rationale_weight) or (self.rationale_weight,)
        if self.rationale_schedule != "constant" and any(
            isinstance(weight, BalanceSection) for weight in tried
        ):
            raise ValueError(
                "train.rationale_weight: balanced measures λ, and train.rationale_schedule changes "
                "it by the step; leave one of them out"
            )
        return self

    def with_settings_of(self, student: StudentTrainSection) -> Self:
        """The section of a student with settings of its own."""
        changes = {name: getattr(student, name) for name in student.model_fields_set}
        if "max_epochs" in changes:
            changes.setdefault("max_steps", None)
        elif "max_steps" in changes:
            changes["max_epochs"] = None
        return self.model_copy(update=changes)

    @property
    def balance(self) -> BalanceSection | None:
        """How λ is measured. None: it is a number."""
        weight = self.rationale_weight
        return weight if isinstance(weight, BalanceSection) else None

    @property
    def counts_epochs(self) -> bool:
        """Whether students train by epochs, so that their rows decide their steps."""
        return self.max_epochs is not None or bool(self.tune and self.tune.max_epochs)

    def tuned(self, setting: Mapping[str, Any]) -> Self:
        """The section with one of ``tune``'s combinations."""
        values = dict(setting)
        if "rationale_weight" in values:
            values["rationale_weight"] = read_weight(values["rationale_weight"])
        return self.model_copy(update={**values, "tune": None})

    def steps(self, rows: int, *, is_scratch: bool) -> int:
        """Optimizer steps of a student with ``rows`` train rows."""
        if self.max_epochs is not None:
            return max(1, round(self.max_epochs * math.ceil(rows / self.batch_size)))
        return self.max_steps or (SCRATCH_MAX_STEPS if is_scratch else PRETRAINED_MAX_STEPS)

    def in_steps(self, rows: int) -> Self:
        """The section of a student with ``rows`` train rows, its epochs counted in steps."""
        if self.max_epochs is None:
            return self
        steps = self.steps(rows, is_scratch=False)
        return self.model_copy(update={"max_steps": steps, "max_epochs": None})

    def resolved(self, *, is_scratch: bool) -> ResolvedTrainSection:
        """The section for a student from scratch (``is_scratch``) or a pretrained one.

        With ``max_epochs``, ``in_steps`` comes first: ``max_steps`` is the default's otherwise.
        """
        defaults = {
            "learning_rate": SCRATCH_LEARNING_RATE if is_scratch else PRETRAINED_LEARNING_RATE,
            "max_steps": SCRATCH_MAX_STEPS if is_scratch else PRETRAINED_MAX_STEPS,
        }
        values = dict(self)
        values |= {key: value for key, value in defaults.items() if values[key] is None}
        if values["head_learning_rate"] is None:
            values["head_learning_rate"] = 10 * values["learning_rate"]
        return ResolvedTrainSection.model_construct(**values)


class ResolvedTrainSection(TrainSection):
    """The train section with the defaults that depend on the student filled in."""

    learning_rate: float = Field(PRETRAINED_LEARNING_RATE, gt=0)
    """Peak learning rate."""
    head_learning_rate: float = Field(10 * PRETRAINED_LEARNING_RATE, gt=0)
    """Peak learning rate of a label head's new layers."""
    max_steps: int = Field(PRETRAINED_MAX_STEPS, gt=0)
    """Optimizer steps."""
