"""Train section: the methods, their loss, and how students are trained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator, model_validator

from dsbs.config.registry import METHODS, TERMS, entry
from dsbs.config.sections import LabelSource, Section, as_tuple, unknown
from dsbs.records import Provenance

T = TypeVar("T")
Tried = Annotated[tuple[T, ...], BeforeValidator(as_tuple)]

PRETRAINED_LEARNING_RATE = 5.0e-5
SCRATCH_LEARNING_RATE = 1.0e-3
PRETRAINED_MAX_STEPS = 10_000
SCRATCH_MAX_STEPS = 1000


class SelectSection(Section):
    """The annotations to learn from. A row left out still teaches its gold label."""

    agree_gold: bool = False
    """Only where the teacher's label is the gold label."""
    min_vote: float | None = Field(None, ge=0, le=1)
    """Minimum share of the readable samples that the majority label has. None: any share."""
    min_logprob: float | None = Field(None, le=0)
    """Minimum log-probability of the label, in nats; needs annotate.logprobs. None: any."""
    provenance: Annotated[tuple[Provenance, ...] | None, BeforeValidator(as_tuple)] = None
    """Where the rationale may come from. None: anywhere."""
    max_per_label: int | None = Field(None, gt=0)
    """Maximum annotations per teacher label that a student learns from, chosen by a hash of the
    ids. None: no maximum."""


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
        if all(values is None for _, values in self):
            raise ValueError(
                "train.tune names no setting; add one, e.g. learning_rate: [0.0003, 0.001], or "
                "leave train.tune out"
            )
        return self

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Every combination, in the order of the recipe's values."""
        values = {name: tried for name, tried in self if tried is not None}
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


class TrainSection(Section):
    """The methods, their loss, and the training settings."""

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
    subset: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
    ] = (1.0,)
    """Shares of the train rows to train on. Smaller ones are contained in larger ones and equal for
    all methods."""
    select: SelectSection = SelectSection()
    """The annotations to learn from."""
    rationales: Literal["chosen", "all", "drawn"] = "chosen"
    """Which of several sampled rationales to learn: the annotation's own, all of them, or a random
    one per epoch."""
    rationale_weight: float = Field(1.0, ge=0)
    """λ in (L_label + λ·L_rationale) / (1 + λ)."""
    rationale_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How λ changes to ``rationale_weight_end``."""
    rationale_weight_end: float = Field(0.0, ge=0)
    """λ at the last step, unless ``rationale_schedule`` is constant."""
    task_token: Literal["prefix", "decoder"] = "prefix"
    """How step-by-step marks its two tasks: by a prefix of the input, or by the decoder's start
    token."""
    loss_mean: Literal["global", "micro"] = "global"
    """Token means over the optimizer step. micro: over each micro-batch, as in the published code.
    """
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**32)], ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
    ] = (0,)
    """Random seeds; each method trains one student per seed."""
    init: str | None = None
    """A folder with weights and tokenizer to start from. None: the student section's start."""
    lora: LoraSection | None = None
    """Low-rank adapters. None: train all weights; {}: LoRA with its defaults."""
    terms: tuple[TermEntry, ...] = ()
    """Additional loss terms, for the methods that name them."""
    teachers: tuple[LocalTeacherSection, ...] = ()
    """Local models that loss terms compare the student with; several are averaged."""
    ensemble: Literal["logprobs", "probabilities"] = "logprobs"
    """What is averaged over several local teachers."""
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
    eval_every: int | None = Field(None, gt=0)
    """Steps between validations. None: a twentieth of ``max_steps``, or more where validation would
    take over a fifth of the time."""
    log_every: int = Field(10, gt=0)
    """Steps between lines of metrics.jsonl."""
    patience: int | None = Field(None, gt=0)
    """Validations without improvement before training stops early. None: never."""
    shuffle: bool = True
    """Whether each epoch has a new order of the rows. false: the file's order."""
    padding: Literal["none", "batch"] = "none"
    """none: no padding tokens are computed (decoder-only models: rows of similar length together);
    batch: pad every batch."""
    valid_limit: int = Field(1000, gt=0)
    """Maximum validation rows, equal for all methods, chosen by a hash of the ids."""
    tune: TuneSection | None = None
    """Settings to choose by validation accuracy with the first seed. None: no tuning."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format. auto: bf16 on NVIDIA GPUs that support it, else fp32; fp16 is missing
    because T5 overflows in it."""
    gradient_checkpointing: bool = False
    """Recompute activations instead of storing them: slower, less memory."""

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

    def tuned(self, setting: Mapping[str, Any]) -> Self:
        """The section with one of ``tune``'s combinations."""
        return self.model_copy(update={**setting, "tune": None})

    def resolved(self, *, is_scratch: bool) -> ResolvedTrainSection:
        """The section for a student from scratch (``is_scratch``) or a pretrained one."""
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
    learns_projections: ClassVar[bool] = False
    """Whether it trains weights of its own, which LoRA's adapters cannot hold."""

    @property
    def title(self) -> str:
        return self.name or self.kind

    @property
    def needs_teacher(self) -> bool:
        """Whether it compares the student with ``train.teachers``."""
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
    """A larger model on this machine, with the student's vocabulary, for loss terms."""

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
