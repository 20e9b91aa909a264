"""The recipe: one YAML file is one experiment, and every command reads its own sections of the same file.

Precedence: defaults < recipe < ``key=value`` overrides. A recipe is closed (unknown keys are mistakes) and frozen.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from dsbs.artefacts import canonical, digest
from dsbs.records import Provenance

LabelSource = Literal["gold", "teacher"]


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float) else value


def _scalar_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), validate_default=True)


class DataSection(Section):
    """Where the rows are: a path (.jsonl, .jsonl.gz, .csv, .parquet) or ``hub://<repository>[:<config>]/<split>``."""

    train: str
    valid: str | None = None  # None: held out of train by id hash
    test: str | None = None  # None: held out of train by id hash
    valid_fraction: float = Field(0.1, gt=0, lt=0.5)  # of the train rows, used when valid is None
    test_fraction: float = Field(0.2, gt=0, lt=0.9)  # of the train file's rows, used when test is None


class TaskSection(Section):
    name: str  # a registered task, or `classification` / `generation` for your own data
    data: DataSection
    limit: int | None = Field(None, gt=0)  # rows of each split; None: all. A limited run is not reportable
    labels: tuple[str, ...] | None = None  # classification: the closed set, two or more
    input: str | None = None  # jinja template over the row's fields; None: the only text column
    columns: dict[str, str] = {}  # our name (id, label, rationale or an input field) -> the file's column
    description: str | None = None  # one sentence for the default prompt: what is to be decided or answered
    numeric: bool = False  # generation: compare answers as numbers (tolerance 1e-4) when both are numbers

    @field_validator("name")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASK_NAMES:
            raise ValueError(unknown("task", value, TASK_NAMES))
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _labels_are_text(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple):
            return value
        booleans = [i for i, label in enumerate(value) if isinstance(label, bool)]
        if booleans:
            raise ValueError(
                f"entry {booleans[0] + 1} reads as the YAML boolean {str(value[booleans[0]]).lower()}: yes, no, on, "
                'off, true and false are booleans in YAML; quote them, as in labels: ["yes", "no"]'
            )
        return [_scalar_text(label) for label in value]

    @field_validator("labels")
    @classmethod
    def _labels_are_distinct(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if value is not None:
            if len(value) < 2:
                raise ValueError("at least two labels are needed")
            folded = [label.strip().casefold() for label in value]
            if "" in folded:
                raise ValueError("an empty label cannot be told from a missing one")
            twice = sorted({label for label in value if folded.count(label.strip().casefold()) > 1})
            if twice:
                raise ValueError(f"labels differ in more than case and space; these do not: {', '.join(twice)}")
        return value


class PriceSection(Section):
    input: float = Field(ge=0)  # US dollars for a million prompt tokens
    output: float = Field(ge=0)  # US dollars for a million completion tokens
    cached_input: float | None = Field(None, ge=0)  # of prompt tokens from the provider's cache; None: as input


def _http_url(value: str) -> str:
    if "@" in value:  # before any message that would show it
        raise ValueError("a URL must not carry a name or password; name an environment variable in teacher.api_key_env")
    if "?" in value or "#" in value:
        raise ValueError(
            "a URL must not carry a query, which may hold a key; name an environment variable in teacher.api_key_env"
        )
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname or not all(parts.hostname.split(".")):
        raise ValueError(f"{value!r} is not an http(s) URL such as http://127.0.0.1:8000/v1")
    return value.rstrip("/")


def _variable_name(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):  # not shown: it may be the key itself
        raise ValueError("what is given is no name of an environment variable; export the key and name the variable here")
    return value


KeyVariable = Annotated[str | None, AfterValidator(_variable_name)]
_CREDENTIAL = re.compile(r"(^|[_-])(api[_-]?key|secret|password|authorization|bearer|access[_-]?token)$", re.IGNORECASE)


class EndpointSection(Section):
    """One of several endpoints that serve the same model. What is left out is the teacher's."""

    base_url: Annotated[str, AfterValidator(_http_url)]
    weight: float = Field(1.0, gt=0)  # its share of the requests, relative to the others'
    api_key_env: KeyVariable = None  # None: teacher.api_key_env
    rpm: float | None = Field(None, gt=0)  # None: teacher.rpm
    tpm: float | None = Field(None, gt=0)  # None: teacher.tpm


class TeacherSection(Section):
    kind: Literal["openai", "llamacpp", "transformers", "recorded", "human"] = "openai"
    model: str | None = (
        None  # as the endpoint names it; llamacpp: a .gguf file or `smollm2-135m-instruct`; else a Hub id or folder
    )
    base_url: Annotated[str, AfterValidator(_http_url)] = "https://api.openai.com/v1"  # OpenAI-compatible, its /v1 included
    endpoints: tuple[EndpointSection, ...] = ()  # in place of base_url: several that serve the same model, with failover
    api_key_env: KeyVariable = "OPENAI_API_KEY"  # the environment variable that holds the key; null: no key
    endpoint: Literal["chat", "completions"] = "chat"
    rpm: float | None = Field(None, gt=0)  # requests a minute to each endpoint, at most; None: no cap
    tpm: float | None = Field(None, gt=0)  # tokens a minute (prompt and completion) through each endpoint; None: no cap
    extra_body: dict[str, Any] = {}  # merged into every request body; a null removes the key
    timeout_s: float = Field(120.0, gt=0)  # seconds for one attempt
    max_attempts: int = Field(6, ge=1)  # of one request, the first included
    price: PriceSection | None = None  # None: genai-prices' list for base_url and model; unknown where it has none
    completions: str | None = None  # recorded: a .jsonl(.gz) of {id, completion}; None: the rows' own teacher.completion
    context_tokens: int | None = Field(None, gt=0)  # of one request; None: 2048 for llamacpp, else not known and not checked
    threads: int | None = Field(None, gt=0)  # llamacpp: None takes the cores of this process
    batch_size: int = Field(16, gt=0)  # transformers: prompts decoded together

    @field_validator("extra_body")
    @classmethod
    def _no_credentials(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if _CREDENTIAL.search(str(name)):
                raise ValueError(f"{name}: credentials do not belong into a recipe; name a variable in teacher.api_key_env")
        return value

    @model_validator(mode="after")
    def _model_is_named(self) -> TeacherSection:
        if self.kind in ("openai", "llamacpp", "transformers") and not self.model:
            raise ValueError(f"teacher.model is needed for kind {self.kind}, e.g. gpt-4.1-mini")
        return self

    @model_validator(mode="after")
    def _endpoints_are_the_openai_kind(self) -> TeacherSection:
        if self.endpoints:
            if self.kind != "openai":
                raise ValueError(f"teacher.endpoints belongs to kind openai, not {self.kind}")
            if "base_url" in self.model_fields_set:
                raise ValueError("teacher.base_url and teacher.endpoints exclude each other; put the URL into endpoints")
            urls = [one.base_url for one in self.endpoints]
            if len(set(urls)) < len(urls):
                raise ValueError("teacher.endpoints names a base_url twice")
        return self

    @property
    def served_by(self) -> tuple[EndpointSection, ...]:
        """The endpoints with nothing left out: ``endpoints``, or ``base_url`` as the only one."""
        return tuple(
            one.model_copy(
                update={
                    "api_key_env": one.api_key_env or self.api_key_env,
                    "rpm": one.rpm or self.rpm,
                    "tpm": one.tpm or self.tpm,
                }
            )
            for one in self.endpoints or (EndpointSection(base_url=self.base_url),)
        )


class BatchSection(Section):
    """The batch lane, ``dsbs annotate --batch``."""

    max_requests: int = Field(50_000, gt=0)  # in one batch file; more make several batches
    completion_window: str = "24h"  # as the endpoint names it
    poll_s: float = Field(30.0, gt=0)  # seconds between looks at a batch
    price_factor: float = Field(0.5, ge=0)  # a batch reply costs this much of an online one


class RaySection(Section):
    address: str | None = (
        None  # of the cluster's head, e.g. ray://head:10001; None: RAY_ADDRESS, else a cluster on this machine
    )
    shards: int = Field(8, ge=1)  # tasks that the rows are split over; the limits are split among them
    cpus_per_shard: float = Field(1.0, ge=0)  # that Ray sets aside for one task
    gpus_per_shard: float = Field(0.0, ge=0)  # the same, for a transformers teacher


class AnnotateSection(Section):
    prompt: str | None = None  # a prompt file; None: prompts/<task>.yaml, or a zero-shot prompt for your own data
    splits: Annotated[tuple[Literal["train", "valid", "test"], ...], BeforeValidator(_as_tuple)] = ("train", "test")
    samples: int = Field(1, ge=1)  # replies per row; the majority label wins
    stop_early: bool = True  # no further samples of a row whose majority label can no longer change
    temperature: float = Field(0.0, ge=0)
    logprobs: bool = False  # ask for log-probabilities and keep the label's
    hint: bool = False  # where the teacher's label is not the gold one, ask once more with the gold label as a hint (STaR)
    min_rationale_words: int = Field(2, ge=0)  # a shorter rationale is rejected as too-short
    rationale_from: Literal["visible", "reasoning"] = "visible"  # reasoning: a reasoning model's own text, where it shows it
    max_tokens: int = Field(256, gt=0)  # of one reply
    concurrency: int = Field(64, ge=1)  # requests in flight
    max_usd: float | None = Field(None, gt=0)  # stop (exit 3) before this run's replies, earlier ones included, cost more
    max_requests: int | None = Field(None, ge=0)  # stop (exit 3) once this command has sent so many
    batch: BatchSection = BatchSection()
    engine: Literal["local", "ray"] = "local"  # ray: the shards run as tasks on a Ray cluster
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def _samples_differ(self) -> AnnotateSection:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("annotate.samples > 1 at temperature 0 buys the same reply again; set temperature: 0.7")
        return self


class StudentSection(Section):
    """A T5: a Hub id or local folder, or one made from scratch in a named size."""

    model: str | None = None  # hub id (google/t5-v1_1-base) or local folder
    init: Literal["scratch"] | None = None  # scratch: random weights, vocabulary learned from the training text
    size: Literal["nano", "mini", "small"] = "nano"  # of a scratch student: about 2, 11 and 40 million parameters
    vocab_size: int = Field(4000, ge=64, le=1_000_000)  # pieces of a scratch vocabulary, at most
    max_input_tokens: int = Field(1024, gt=0)  # longer inputs are cut
    max_target_tokens: int = Field(256, gt=0)  # longer labels and rationales are cut
    dropout: float | None = Field(None, ge=0, le=0.99)  # None: the model's own (0.1 for a scratch student)

    @model_validator(mode="after")
    def _one_origin(self) -> StudentSection:
        if self.model and self.init:
            raise ValueError("student.model and student.init exclude each other")
        return self

    @property
    def is_scratch(self) -> bool:
        return self.model is None


class SelectSection(Section):
    """Which annotations are learned from; a row left out still teaches its gold label."""

    agree_gold: bool = False  # only where the teacher's label is the gold one
    min_vote: float | None = Field(None, ge=0, le=1)  # the majority's share of the readable samples, at least
    min_logprob: float | None = Field(None, le=0)  # of the label, in nats, at least; needs annotate.logprobs
    provenance: Annotated[tuple[Provenance, ...] | None, BeforeValidator(_as_tuple)] = None  # None: any
    max_per_label: int | None = Field(None, gt=0)  # annotations of one teacher label, at most, chosen by id hash


class TuneSection(Section):
    """Settings that every student tries alike, in all combinations; the best on valid is taken."""

    learning_rate: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_as_tuple)] | None = None
    batch_size: Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_as_tuple)] | None = None
    max_steps: Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_as_tuple)] | None = None
    warmup_steps: Annotated[tuple[Annotated[int, Field(ge=0)], ...], BeforeValidator(_as_tuple)] | None = None
    weight_decay: Annotated[tuple[Annotated[float, Field(ge=0)], ...], BeforeValidator(_as_tuple)] | None = None

    @field_validator("*")
    @classmethod
    def _something_once(cls, value: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if value is not None and (not value or len(set(value)) < len(value)):
            raise ValueError("give at least one value, and each once")
        return value

    @model_validator(mode="after")
    def _tries_something(self) -> TuneSection:
        if all(values is None for _, values in self):
            raise ValueError("train.tune names no setting; give it one, e.g. learning_rate: [0.0003, 0.001], or leave it out")
        return self

    @property
    def settings(self) -> list[dict[str, Any]]:
        """Every combination, in the order of the recipe's values."""
        tried = {name: values for name, values in self if values is not None}
        return [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]


class LoraSection(Section):
    """Low-rank adapters in place of training all weights; merged into the finished student."""

    rank: int = Field(16, gt=0)
    alpha: int = Field(32, gt=0)  # the adapters' part is scaled by alpha / rank
    dropout: float = Field(0.0, ge=0, lt=1)  # of what goes into the adapters
    targets: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ("q", "v")  # matrices of each block

    @field_validator("targets")
    @classmethod
    def _targets_in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(set(value)))  # whose order decides nothing


class TrainSection(Section):
    methods: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        "step-by-step",
        "finetune",
        "distill",
    )
    labels: Annotated[tuple[LabelSource, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ("gold",)  # of step-by-step
    subset: Annotated[tuple[Annotated[float, Field(gt=0, le=1)], ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (
        1.0,  # shares of the train rows, each a part of the larger ones and the same for every method
    )
    select: SelectSection = SelectSection()
    rationales: Literal["chosen", "all", "drawn"] = "chosen"  # of several samples: the annotation's, all, or one an epoch
    rationale_weight: float = Field(1.0, ge=0)  # λ in (L_label + λ·L_rationale) / (1 + λ)
    rationale_schedule: Literal["constant", "linear", "cosine"] = "constant"  # how λ goes to rationale_weight_end
    rationale_weight_end: float = Field(0.0, ge=0)  # λ at max_steps, where rationale_schedule is not constant
    task_token: Literal["prefix", "decoder"] = "prefix"  # step-by-step's tasks are told by prefixes, or by the decoder's start
    loss_mean: Literal["global", "micro"] = "global"  # token means over the step; micro: of micro-batches, as published
    seeds: Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], BeforeValidator(_as_tuple), Field(min_length=1)] = (0,)
    init: str | None = None  # a folder of weights and tokenizer to start from, in place of student's own start
    lora: LoraSection | None = None  # None: all weights learn; {}: LoRA as it is by default
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    learning_rate: float = Field(5.0e-5, gt=0)  # its peak; a scratch student's default is 1e-3
    schedule: Literal["linear", "cosine", "constant"] = "linear"  # linear and cosine decay to 0 at max_steps
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(64, gt=0)  # examples of one optimizer step
    micro_batch_size: int | None = Field(None, gt=0)  # examples of one forward pass; None: the whole batch
    max_steps: int = Field(10_000, gt=0)  # optimizer steps; a scratch student's default is 1,000
    eval_every: int | None = Field(None, gt=0)  # steps between looks at valid; None: a twentieth of max_steps
    log_every: int = Field(10, gt=0)  # steps between lines of metrics.jsonl
    patience: int | None = Field(None, gt=0)  # looks at valid without a better one before a student stops; None: never
    shuffle: bool = True  # a new order of the rows in each epoch; false: the file's
    padding: Literal["none", "batch"] = "none"  # none: only real tokens are computed (T5, mT5); batch: padded rows
    valid_limit: int = Field(1000, gt=0)  # validation rows at most, the same for every method, chosen by id hash
    tune: TuneSection | None = None  # settings to choose among on valid, by the first seed; in place of the section's own
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where a GPU has it, else fp32; fp16 overflows T5
    gradient_checkpointing: bool = False

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
            if name not in METHOD_NAMES:
                raise ValueError(unknown("method", name, METHOD_NAMES))
        return value

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


class EvalSection(Section):
    split: Literal["valid", "test"] = "test"
    batch_size: int = Field(64, gt=0)
    max_label_tokens: int = Field(64, gt=0)  # generated for a label, at most
    baseline: str = "finetune"  # every system is compared with this method's students

    @field_validator("baseline")
    @classmethod
    def _known_baseline(cls, value: str) -> str:
        if value not in METHOD_NAMES:
            raise ValueError(unknown("method", value, METHOD_NAMES))
        return value


class ReportSection(Section):
    tensorboard: bool = False  # also write TensorBoard event files beside every student


# Where the student starts from random weights; the section's own defaults are the paper's, for pretrained ones.
SCRATCH_DEFAULTS = {"learning_rate": 1.0e-3, "max_steps": 1000}

# Names only, so that a recipe is checked without importing what they name; a test holds them to their registries.
METHOD_NAMES = ("step-by-step", "finetune", "distill", "rationale-then-label", "label-then-rationale")
TASK_NAMES = ("classification", "generation", "svamp", "cqa", "anli", "esnli")


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")  # of the run folder; default: the file's name
    task: TaskSection
    teacher: TeacherSection
    annotate: AnnotateSection = AnnotateSection()
    student: StudentSection = StudentSection()
    train: TrainSection = TrainSection()
    eval: EvalSection = EvalSection()
    report: ReportSection = ReportSection()

    _folder: Path | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Sections left empty are defaults; a student without pretraining learns faster and for less long."""
        if not isinstance(data, dict):
            return data
        data = {name: value for name, value in data.items() if value is not None or name in ("name", "task", "teacher")}
        student, train = data.get("student", {}), data.get("train", {})
        model = student.get("model") if isinstance(student, dict) else getattr(student, "model", None)
        if not model and isinstance(train, dict):
            data["train"] = SCRATCH_DEFAULTS | train
        elif not model and isinstance(train, TrainSection):
            unset = {key: value for key, value in SCRATCH_DEFAULTS.items() if key not in train.model_fields_set}
            data["train"] = train.model_copy(update=unset)
        return data

    @model_validator(mode="after")
    def _adapters_have_something_to_adapt(self) -> Recipe:
        if self.train.lora and self.student.is_scratch and not self.train.init:
            raise ValueError(
                "train.lora adapts weights that know something, and a student from scratch has random ones; "
                "name a student.model or train.init, or leave train.lora out"
            )
        return self

    @property
    def training(self) -> str:
        """Hash of all that decides a student apart from its data, its method and its seed."""
        apart = {
            "methods",
            "labels",
            "seeds",
            "subset",
            "log_every",
            "select",
            "micro_batch_size",
            "gradient_checkpointing",
            "padding",
        }
        # what tuning decides is not the recipe's own any more
        apart |= {"tune"} if self.train.tune is None else {name for name, values in self.train.tune if values is not None}
        if self.train.loss_mean == "micro":  # elsewhere the objective is the same however a step is cut
            apart.discard("micro_batch_size")
        return digest(
            canonical(self.train.model_dump(mode="json", exclude=apart)),
            canonical(self.student.model_dump(mode="json")),
            str(self.eval.max_label_tokens),  # of the looks at valid that choose the best step
        )

    @property
    def folder(self) -> Path | None:
        """The folder of the recipe's file: its relative paths are looked for there too. None for a recipe made in code."""
        return self._folder

    @model_validator(mode="after")
    def _task_is_complete(self) -> Recipe:
        task = self.task
        if task.name == "classification" and task.labels is None:
            raise ValueError("task.labels is needed for classification, e.g. labels: [billing, shipping]")
        if task.name != "classification" and task.labels is not None:
            raise ValueError(f"task.labels belongs to classification; the labels of {task.name} are fixed or free")
        if task.name not in ("classification", "generation") and task.input is not None:
            raise ValueError(f"task.input belongs to classification and generation; {task.name} has its own input")
        if task.numeric and task.name != "generation":
            raise ValueError("task.numeric belongs to generation")
        return self


def unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """Sentence for a name that is not there: the nearest one, and all there are."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    guess = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{guess} (there are: {', '.join(known)})"
