"""``teacher`` and ``annotate``: who is asked, and how."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from dsbs.config.registry import TEACHERS
from dsbs.config.sections import Section, as_tuple, unknown


class PriceSection(Section):
    input: float = Field(ge=0)  # US dollars for a million prompt tokens
    output: float = Field(ge=0)  # US dollars for a million completion tokens
    cached_input: float | None = Field(
        None, ge=0
    )  # of prompt tokens from the provider's cache; None: as input


def _http_url(value: str) -> str:
    if "@" in value:  # before any message that would show it
        raise ValueError(
            "a URL must not carry a name or password; name an environment variable in teacher.api_key_env"
        )
    if "?" in value or "#" in value:
        raise ValueError(
            "a URL must not carry a query, which may hold a key; name an environment variable in teacher.api_key_env"
        )
    parts = urlsplit(value)
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or not all(parts.hostname.split("."))
    ):
        raise ValueError(f"{value!r} is not an http(s) URL such as http://127.0.0.1:8000/v1")
    return value.rstrip("/")


def _variable_name(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(
        r"[A-Za-z_][A-Za-z0-9_]*", value
    ):  # not shown: it may be the key itself
        raise ValueError(
            "what is given is no name of an environment variable; export the key and name the variable here"
        )
    return value


KeyVariable = Annotated[str | None, AfterValidator(_variable_name)]
_CREDENTIAL = re.compile(
    r"(^|[_-])(api[_-]?key|secret|password|authorization|auth|bearer|(access|auth|api)[_-]?token)$|^(key|token)$",
    re.IGNORECASE,
)
_KEY = re.compile(r"(Bearer\s|(sk|hf|gsk|xai|pk)[-_])\S{8,}")


def _credential(value: Any, name: str = "") -> str | None:
    """The name under which a mapping holds what looks like a key, at any depth; None: nowhere."""
    if isinstance(value, dict):
        inside = (
            (str(key) if _CREDENTIAL.search(str(key)) else _credential(one, str(key)))
            for key, one in value.items()
        )
    elif isinstance(value, list):
        inside = (_credential(one, name) for one in value)
    else:
        return name if isinstance(value, str) and _KEY.match(value) else None
    return next((one for one in inside if one is not None), None)


class EndpointSection(Section):
    """One of several endpoints that serve the same model. What is left out is the teacher's."""

    base_url: Annotated[str, AfterValidator(_http_url)]  # OpenAI-compatible, its /v1 included
    weight: float = Field(1.0, gt=0)  # its share of the requests, relative to the others'
    api_key_env: KeyVariable = None  # None: teacher.api_key_env
    rpm: float | None = Field(None, gt=0)  # None: teacher.rpm
    tpm: float | None = Field(None, gt=0)  # None: teacher.tpm


class MemberSection(Section):
    """One of an ensemble's annotators: a finished run over the same rows."""

    run: str = Field(min_length=1)  # its run folder, from here or beside the recipe
    weight: float = Field(
        1.0, gt=0
    )  # of its vote on each row, relative to the others', however many samples it has


class TeacherSection(Section):
    kind: str = (  # openai: any OpenAI-compatible
        "openai"  # endpoint; recorded: replies on disk; human: the rows' own rationales; ensemble: other runs' annotations vote
    )
    model: str | None = (
        None  # as the endpoint names it; llamacpp: a .gguf file or `smollm2-135m-instruct`; else a Hub id or folder
    )
    base_url: Annotated[str, AfterValidator(_http_url)] = (
        "https://api.openai.com/v1"  # OpenAI-compatible, its /v1 included
    )
    endpoints: tuple[
        EndpointSection, ...
    ] = ()  # in place of base_url: several that serve the same model, with failover
    api_key_env: KeyVariable = (
        "OPENAI_API_KEY"  # the environment variable that holds the key; null: no key
    )
    endpoint: Literal["chat", "completions"] = "chat"  # completions: the prompt as one text
    rpm: float | None = Field(
        None, gt=0
    )  # requests a minute to each endpoint, at most; None: no cap
    tpm: float | None = Field(
        None, gt=0
    )  # tokens a minute (prompt and completion) through each endpoint; None: no cap
    extra_body: dict[str, Any] = {}  # merged into every request body; a null removes the key
    timeout_s: float = Field(120.0, gt=0)  # seconds for one attempt
    max_attempts: int = Field(6, ge=1)  # of one request, the first included
    price: PriceSection | None = (
        None  # None: genai-prices' list for base_url and model; unknown where it has none
    )
    members: tuple[MemberSection, ...] = ()  # ensemble: the runs whose annotations vote
    completions: str | None = (
        None  # recorded: a .jsonl(.gz) of {id, completion}; None: the rows' own teacher.completion
    )
    context_tokens: int | None = Field(
        None, gt=0
    )  # of one request; None: 2048 for llamacpp, else not known and not checked
    threads: int | None = Field(None, gt=0)  # llamacpp: None takes the cores of this process
    batch_size: int = Field(16, gt=0)  # transformers: prompts decoded together

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        if value not in TEACHERS:
            raise ValueError(unknown("kind of teacher", value, TEACHERS))
        return value

    @field_validator("extra_body")
    @classmethod
    def _no_credentials(cls, value: dict[str, Any]) -> dict[str, Any]:
        name = _credential(value)
        if name is not None:
            raise ValueError(
                f"{name}: credentials do not belong into a recipe; name a variable in teacher.api_key_env"
            )
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
                raise ValueError(
                    "teacher.base_url and teacher.endpoints exclude each other; put the URL into endpoints"
                )
            urls = [one.base_url for one in self.endpoints]
            if len(set(urls)) < len(urls):
                raise ValueError("teacher.endpoints names a base_url twice")
        return self

    @model_validator(mode="after")
    def _members_are_the_ensemble_kind(self) -> TeacherSection:
        if self.kind != "ensemble":
            if self.members:
                raise ValueError(f"teacher.members belongs to kind ensemble, not {self.kind}")
            return self
        if len(self.members) < 2:
            raise ValueError(
                "teacher.members needs two or more runs, e.g. members: [{run: runs/gpt, weight: 2.0}, {run: runs/qwen}]"
            )
        if self.model or self.price:
            raise ValueError(
                "teacher.model and teacher.price do not belong to kind ensemble: each member's run has its own"
            )
        return self

    @property
    def is_prompted(self) -> bool:
        """Whether its text answers the recipe's prompt, and is read by it."""
        return self.kind not in ("human", "ensemble")

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
    shards: int = Field(
        8, ge=1
    )  # tasks that the rows are split over; the limits are split among them
    cpus_per_shard: float = Field(1.0, ge=0)  # that Ray sets aside for one task
    gpus_per_shard: float = Field(0.0, ge=0)  # the same, for a transformers teacher


class AnnotateSection(Section):
    prompt: str | None = (
        None  # a prompt file; None: prompts/<task>.yaml, or a zero-shot prompt for your own data
    )
    splits: Annotated[tuple[Literal["train", "valid", "test"], ...], BeforeValidator(as_tuple)] = (
        "train",
        "test",
    )  # what is annotated
    samples: int = Field(1, ge=1)  # replies per row; the majority label wins
    stop_early: bool = True  # no further samples of a row whose majority label can no longer change
    temperature: float = Field(0.0, ge=0)  # of sampling; 0: the likeliest reply
    logprobs: bool = False  # ask for log-probabilities and keep the label's
    hint: bool = False  # where the teacher's label is not the gold one, ask once more with the gold label as a hint (STaR)
    min_rationale_words: int = Field(2, ge=0)  # a shorter rationale is rejected as too-short
    rationale_from: Literal["visible", "reasoning"] = (
        "visible"  # reasoning: a reasoning model's own text, where it shows it
    )
    max_tokens: int = Field(256, gt=0)  # of one reply
    concurrency: int = Field(64, ge=1)  # requests in flight
    max_usd: float | None = Field(
        None, gt=0
    )  # stop (exit 3) before this run's replies, earlier ones included, cost more
    max_requests: int | None = Field(None, ge=0)  # stop (exit 3) once this command has sent so many
    batch: BatchSection = BatchSection()  # the batch lane
    engine: Literal["local", "ray"] = "local"  # ray: the shards run as tasks on a Ray cluster
    ray: RaySection = RaySection()  # the cluster, with engine: ray

    @model_validator(mode="after")
    def _samples_differ(self) -> AnnotateSection:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "annotate.samples > 1 at temperature 0 buys the same reply again; set temperature: 0.7"
            )
        return self
