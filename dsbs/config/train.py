"""``train``: methods, their objective, and how they are trained."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, field_validator, model_validator

from dsbs.config.registry import METHODS
from dsbs.config.sections import LabelSource, Section, as_tuple, unknown
from dsbs.config.terms import LocalTeacherSection, TermEntry, base_of, names_of_terms
from dsbs.records.rows import Provenance

T = TypeVar("T")
Tried = Annotated[tuple[T, ...], BeforeValidator(as_tuple)]


class SelectSection(Section):
    """Which annotations are learned from; a row left out still teaches its gold label."""

    agree_gold: bool = False  # only where the teacher's label is the gold one
    min_vote: float | None = Field(
        None, ge=0, le=1
    )  # the majority's share of the readable samples, at least
    min_logprob: float | None = Field(
        None, le=0
    )  # of the label, in nats, at least; needs annotate.logprobs
    provenance: Annotated[tuple[Provenance, ...] | None, BeforeValidator(as_tuple)] = (
        None  # None: any
    )
    max_per_label: int | None = Field(
        None, gt=0
    )  # annotations of one teacher label, at most, chosen by id hash


class TuneSection(Section):
    """Settings that every student tries alike, in all combinations; the best on valid is taken."""

    learning_rate: Tried[Annotated[float, Field(gt=0)]] | None = (
        None  # values to try; None: the section's own
    )
    batch_size: Tried[Annotated[int, Field(gt=0)]] | None = (
        None  # values to try; None: the section's own
    )
    max_steps: Tried[Annotated[int, Field(gt=0)]] | None = (
        None  # values to try; None: the section's own
    )
    warmup_steps: Tried[Annotated[int, Field(ge=0)]] | None = (
        None  # values to try; None: the section's own
    )
    weight_decay: Tried[Annotated[float, Field(ge=0)]] | None = (
        None  # values to try; None: the section's own
    )

    @field_validator("*")
    @classmethod
    def _something_once(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("give at least one value, and each once")
        return value

    @model_validator(mode="after")
    def _tries_something(self) -> TuneSection:
        if all(values is None for _, values in self):
            raise ValueError(
                "train.tune names no setting; give it one, e.g. learning_rate: [0.0003, 0.001], or leave it out"
            )
        return self

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Every combination, in the order of the recipe's values."""
        tried = {name: values for name, values in self if values is not None}
        return [
            dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())
        ]


class LoraSection(Section):
    """Low-rank adapters in place of training all weights; merged into the finished student."""

    rank: int = Field(16, gt=0)  # columns of each adapter
    alpha: int = Field(32, gt=0)  # the adapters' part is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # of what goes into the adapters
    targets: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        "q",  # matrices of each block; q also means q_proj, as it is called in most decoder-only models
        "v",
    )

    @field_validator("targets")
    @classmethod
    def _targets_in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))  # whose order decides nothing


class TrainSection(Section):
    methods: Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        "step-by-step",
        "finetune",
        "distill",
    )  # trained side by side; the first is what the recipe is about; "+" adds terms by name: finetune+response
    labels: Annotated[tuple[LabelSource, ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        "gold",
    )  # of step-by-step
    subset: Annotated[
        tuple[Annotated[float, Field(gt=0, le=1)], ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
    ] = (
        1.0,  # shares of the train rows, each a part of the larger ones and the same for every method
    )
    select: SelectSection = SelectSection()  # which annotations are learned from
    rationales: Literal["chosen", "all", "drawn"] = (
        "chosen"  # of several samples: the annotation's, all, or one an epoch
    )
    rationale_weight: float = Field(1.0, ge=0)  # λ in (L_label + λ·L_rationale) / (1 + λ)
    rationale_schedule: Literal["constant", "linear", "cosine"] = (
        "constant"  # how λ goes to rationale_weight_end
    )
    rationale_weight_end: float = Field(
        0.0, ge=0
    )  # λ at max_steps, where rationale_schedule is not constant
    task_token: Literal["prefix", "decoder"] = (
        "prefix"  # step-by-step's tasks are told by prefixes, or by the decoder's start
    )
    loss_mean: Literal["global", "micro"] = (
        "global"  # token means over the step; micro: of micro-batches, as published
    )
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**32)], ...],
        BeforeValidator(as_tuple),
        Field(min_length=1),
    ] = (
        0,  # one student of each method for every seed
    )
    init: str | None = (
        None  # a folder of weights and tokenizer to start from, in place of student's own start
    )
    lora: LoraSection | None = None  # None: all weights learn; {}: LoRA as it is by default
    terms: tuple[TermEntry, ...] = ()  # further terms of the loss, for the methods that name them
    teachers: tuple[
        LocalTeacherSection, ...
    ] = ()  # local models that terms compare with; several are averaged
    ensemble: Literal["logprobs", "probabilities"] = (
        "logprobs"  # what is averaged over several teachers
    )
    optimizer: Literal["adamw", "adafactor"] = "adamw"  # adafactor: less memory
    learning_rate: float = Field(5.0e-5, gt=0)  # its peak; a scratch student's default is 1e-3
    schedule: Literal["linear", "cosine", "constant"] = (
        "linear"  # linear and cosine decay to 0 at max_steps
    )
    warmup_steps: int = Field(0, ge=0)  # steps in which the learning rate rises to its peak
    weight_decay: float = Field(
        0.0, ge=0
    )  # a step takes away so much of the weights, times the learning rate
    batch_size: int = Field(64, gt=0)  # examples of one optimizer step
    micro_batch_size: int | None = Field(
        None, gt=0
    )  # examples of one forward pass; None: the whole batch
    max_steps: int = Field(10_000, gt=0)  # optimizer steps; a scratch student's default is 1,000
    eval_every: int | None = Field(
        None, gt=0
    )  # steps between looks at valid; None: a twentieth of max_steps
    log_every: int = Field(10, gt=0)  # steps between lines of metrics.jsonl
    patience: int | None = Field(
        None, gt=0
    )  # looks at valid without a better one before a student stops; None: never
    shuffle: bool = True  # a new order of the rows in each epoch; false: the file's
    padding: Literal["none", "batch"] = (
        "none"  # none: real tokens alone (decoder-only: rows of like lengths); batch: padded
    )
    valid_limit: int = Field(
        1000, gt=0
    )  # validation rows at most, the same for every method, chosen by id hash
    tune: TuneSection | None = (
        None  # settings to choose among on valid, by the first seed; in place of the section's own
    )
    precision: Literal["auto", "fp32", "bf16"] = (
        "auto"  # auto: bf16 where a GPU has it, else fp32; fp16 overflows T5
    )
    gradient_checkpointing: bool = (
        False  # compute activations twice rather than keep them: slower, less memory
    )

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
    def _terms_and_methods_fit(self) -> TrainSection:
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
            if term.title not in used:
                raise ValueError(
                    f"train.terms: no method learns {term.title!r}; add its name to one, e.g. "
                    f"methods: [{self.methods[0]}, {base_of(self.methods[0])}+{term.title}]"
                )
            if term.needs_teacher and not self.teachers:
                raise ValueError(
                    f"train.terms: {term.title!r} compares with a local model; add one, e.g. teachers: [{{size: mini}}]"
                )
            if term.learns_projections and self.lora is not None:
                raise ValueError(
                    f"train.terms: {term.title!r} learns projections, which train.lora's adapters cannot hold; leave one out"
                )
        if self.teachers and not any(term.needs_teacher for term in self.terms):
            raise ValueError(
                "train.teachers: no term compares with them; add one, e.g. terms: [{kind: response}], or leave them out"
            )
        return self

    def check_method(self, method: str) -> None:
        """Raises ValueError where a method's name has no such base, or a term that is not in ``terms``, or one twice."""
        if base_of(method) not in METHODS:
            raise ValueError(unknown("method", base_of(method), METHODS))
        names, known = names_of_terms(method), [term.title for term in self.terms]
        for name in names:
            if name not in known:
                what = (
                    unknown("term", name, known)
                    if known
                    else f"there is no term {name!r}: train.terms is empty"
                )
                raise ValueError(f"train.methods: {method}: {what}")
            if names.count(name) > 1:
                raise ValueError(f"train.methods: {method} names the term {name!r} twice")

    def terms_of(self, method: str) -> tuple[Any, ...]:
        """The terms that a method names, in its order."""
        by_title = {term.title: term for term in self.terms}
        return tuple(by_title[name] for name in names_of_terms(method))

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> TrainSection:
        sizes = (self.tune and self.tune.batch_size) or (self.batch_size,)
        if self.micro_batch_size and any(size % self.micro_batch_size for size in sizes):
            raise ValueError("train.batch_size must be a multiple of train.micro_batch_size")
        return self

    def tuned(self, setting: Mapping[str, Any]) -> TrainSection:
        """The section with one of ``tune``'s settings in its place."""
        return self.model_copy(update={**setting, "tune": None})

    @property
    def eval_steps(self) -> int:
        return self.eval_every or max(1, self.max_steps // 20)
