"""Teacher and annotate sections: the model that annotates, and how it is called."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from dsbs.config.registry import TEACHERS
from dsbs.config.sections import Section, as_tuple, unknown


class PriceSection(Section):
    """Prices of the teacher's tokens."""

    input: float = Field(ge=0)
    """US dollars per million prompt tokens."""
    output: float = Field(ge=0)
    """US dollars per million completion tokens."""
    cached_input: float | None = Field(None, ge=0)
    """US dollars per million prompt tokens from the provider's cache. None: as ``input``."""


def _http_url(value: str) -> str:
    # Credentials first: the last message shows the value.
    if "@" in value:
        raise ValueError(
            "a URL must not contain a user name or password; name an environment variable in "
            "teacher.api_key_env"
        )
    if "?" in value or "#" in value:
        raise ValueError(
            "a URL must not contain a query, which may hold a key; name an environment variable in "
            "teacher.api_key_env"
        )
    parts = urlsplit(value)
    host_parts = (parts.hostname or "").split(".")
    if parts.scheme not in ("http", "https") or not all(host_parts):
        raise ValueError(f"{value!r} is not an http(s) URL such as http://127.0.0.1:8000/v1")
    return value.rstrip("/")


def _variable_name(value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        # The value is not shown: it may be the key itself.
        raise ValueError(
            "not a valid environment variable name; export the key and name the variable here"
        )
    return value


KeyVariable = Annotated[str | None, AfterValidator(_variable_name)]
_CREDENTIAL_NAME = re.compile(
    r"(^|[_-])(api[_-]?key|secret|password|authorization|auth|bearer|(access|auth|api)[_-]?token)$"
    r"|^(key|token)$",
    re.IGNORECASE,
)
_CREDENTIAL_VALUE = re.compile(r"(Bearer\s|(sk|hf|gsk|xai|pk)[-_])\S{8,}")


def _credential_names(value: Any, name: str = "") -> Iterator[str]:
    """The names under which a JSON value holds something like a key, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if _CREDENTIAL_NAME.search(str(key)):
                yield str(key)
            else:
                yield from _credential_names(inner, str(key))
    elif isinstance(value, list):
        for inner in value:
            yield from _credential_names(inner, name)
    elif isinstance(value, str) and _CREDENTIAL_VALUE.match(value):
        yield name


class EndpointSection(Section):
    """One of several endpoints that serve the same model. Keys left out are the teacher's."""

    base_url: Annotated[str, AfterValidator(_http_url)]
    """The URL of an OpenAI-compatible API, including /v1."""
    weight: float = Field(1.0, gt=0)
    """Its share of the requests, relative to the other endpoints."""
    api_key_env: KeyVariable = None
    """The environment variable that holds the key. None: teacher.api_key_env."""
    rpm: float | None = Field(None, gt=0)
    """Maximum requests per minute. None: teacher.rpm."""
    tpm: float | None = Field(None, gt=0)
    """Maximum tokens per minute. None: teacher.tpm."""


class MemberSection(Section):
    """One of an ensemble's annotators: a finished run over the same rows."""

    run: str = Field(min_length=1)
    """Its run folder, relative to the working directory or to the recipe."""
    weight: float = Field(1.0, gt=0)
    """The weight of its vote on each row, whatever its number of samples."""


class TeacherSection(Section):
    """The large model that annotates."""

    kind: str = "openai"
    """openai: any OpenAI-compatible endpoint; llamacpp, transformers: a model on this machine;
    recorded: replies on disk; human: the rows' own rationales; ensemble: other runs' annotations
    vote."""
    model: str | None = None
    """openai: the model's name at the endpoint; llamacpp: a .gguf file or
    ``smollm2-135m-instruct``; transformers: a Hub id or folder; recorded: the model
    whose completion is read where rows have several, in a list ``teachers`` of {model, completion}.
    None: not needed, but for the first three.
    """
    base_url: Annotated[str, AfterValidator(_http_url)] = "https://api.openai.com/v1"
    """The URL of an OpenAI-compatible API, including /v1."""
    endpoints: tuple[EndpointSection, ...] = ()
    """Several endpoints that serve the same model, with failover; replaces ``base_url``."""
    api_key_env: KeyVariable = "OPENAI_API_KEY"
    """The environment variable that holds the key. None: no key."""
    endpoint: Literal["chat", "completions"] = "chat"
    """The API to use. completions: the prompt is one text."""
    rpm: float | None = Field(None, gt=0)
    """Maximum requests per minute to each endpoint. None: no maximum."""
    tpm: float | None = Field(None, gt=0)
    """Maximum tokens per minute (prompt and completion) at each endpoint. None: no maximum."""
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = (
        None
    )
    """How much a reasoning model thinks, in the form that the provider of ``base_url`` takes; which
    levels a model has is in its documentation; for chat endpoints of kind openai or llamacpp. None:
    the model's default."""
    extra_body: dict[str, Any] = {}
    """Merged into every request body; a null removes the key."""
    timeout_s: float = Field(120.0, gt=0)
    """Seconds until an attempt times out."""
    max_attempts: int = Field(6, ge=1)
    """Maximum attempts per request, including the first."""
    price: PriceSection | None = None
    """Prices of its tokens. None: the price list of genai-prices for ``base_url`` and ``model``;
    unknown where it has none."""
    members: tuple[MemberSection, ...] = ()
    """ensemble: the runs whose annotations vote."""
    completions: str | None = None
    """recorded: a .jsonl or .jsonl.gz file of {id, completion}. None: the rows' own
    teacher.completion."""
    context_tokens: int | None = Field(None, gt=0)
    """Maximum tokens of a request and its reply. None: 2048 for llamacpp; unknown and unchecked for
    other kinds."""
    threads: int | None = Field(None, gt=0)
    """llamacpp: CPU threads. None: all cores available to the process."""
    batch_size: int = Field(16, gt=0)
    """transformers: prompts decoded together."""

    @field_validator("kind")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        if value not in TEACHERS:
            raise ValueError(unknown("kind of teacher", value, TEACHERS))
        return value

    @field_validator("extra_body")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("a value is not JSON; put dates and the like in quotes") from None
        return value

    @field_validator("extra_body")
    @classmethod
    def _no_credentials(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in _credential_names(value):
            raise ValueError(
                f"{name}: credentials do not belong in a recipe; name an environment variable in "
                "teacher.api_key_env"
            )
        return value

    @model_validator(mode="after")
    def _model_is_named(self) -> TeacherSection:
        if self.kind in ("openai", "llamacpp", "transformers") and not self.model:
            raise ValueError(f"teacher.model is needed for kind {self.kind}, e.g. gpt-6-luna")
        return self

    @model_validator(mode="after")
    def _reasons(self) -> TeacherSection:
        if self.reasoning_effort is not None and (
            self.kind not in ("openai", "llamacpp") or self.endpoint != "chat"
        ):
            raise ValueError(
                "teacher.reasoning_effort belongs to a chat endpoint of kind openai or llamacpp"
            )
        return self

    @model_validator(mode="after")
    def _endpoints_fit(self) -> TeacherSection:
        if not self.endpoints:
            return self
        if self.kind != "openai":
            raise ValueError(f"teacher.endpoints belongs to kind openai, not {self.kind}")
        if "base_url" in self.model_fields_set:
            raise ValueError(
                "teacher.base_url and teacher.endpoints exclude each other; use endpoints alone"
            )
        urls = [endpoint.base_url for endpoint in self.endpoints]
        if len(set(urls)) < len(urls):
            raise ValueError("teacher.endpoints names a base_url twice")
        return self

    @model_validator(mode="after")
    def _members_fit(self) -> TeacherSection:
        if self.kind != "ensemble":
            if self.members:
                raise ValueError(f"teacher.members belongs to kind ensemble, not {self.kind}")
            return self
        if len(self.members) < 2:
            raise ValueError(
                "teacher.members needs two or more runs, e.g. "
                "members: [{run: runs/gpt, weight: 2.0}, {run: runs/qwen}]"
            )
        if self.model or self.price:
            raise ValueError(
                "teacher.model and teacher.price do not belong to kind ensemble: "
                "each member's run has its own"
            )
        return self

    @property
    def is_prompted(self) -> bool:
        """Whether the teacher's text answers the recipe's prompt."""
        return self.kind not in ("human", "ensemble")

    @property
    def served_by(self) -> tuple[EndpointSection, ...]:
        """The endpoints with every key filled in; ``base_url`` is one if there are no others."""
        endpoints = self.endpoints or (EndpointSection(base_url=self.base_url),)
        return tuple(
            endpoint.model_copy(
                update={
                    "api_key_env": endpoint.api_key_env or self.api_key_env,
                    "rpm": endpoint.rpm or self.rpm,
                    "tpm": endpoint.tpm or self.tpm,
                }
            )
            for endpoint in endpoints
        )


class BatchSection(Section):
    """The provider's batch API, ``dsbs annotate --batch``."""

    max_requests: int = Field(50_000, gt=0)
    """Maximum requests per batch file; more make several batches."""
    completion_window: str = "24h"
    """The completion window requested from the provider."""
    poll_s: float = Field(30.0, gt=0)
    """Seconds between status requests."""
    price_factor: float = Field(0.5, ge=0)
    """The price of a batch reply, relative to a normal one."""


class RaySection(Section):
    """The Ray cluster that annotates in shards."""

    address: str | None = None
    """The address of the cluster's head, e.g. ray://head:10001. None: RAY_ADDRESS, else a cluster
    on this machine."""
    shards: int = Field(8, ge=1)
    """Tasks that the rows and the limits are divided among."""
    cpus_per_shard: float = Field(1.0, ge=0)
    """CPUs reserved for each task."""
    gpus_per_shard: float = Field(0.0, ge=0)
    """GPUs reserved for each task, for a transformers teacher."""


class NextSection(Section):
    """Which rows ``dsbs annotate --next N`` chooses."""

    by: Literal["both", "uncertainty", "diversity", "random"] = "both"
    """uncertainty: the rows whose label a student is least sure of. diversity: rows that differ
    from each other. both: uncertain rows that differ from each other. Before there is a student:
    diversity."""
    random_share: float = Field(0.2, gt=0, le=1)
    """Share of the rows that is chosen at random, for unbiased estimates."""
    seed: int = 0
    """Seed of the random choice."""
    student: str | None = None
    """Name of the student whose uncertainty and states are used, e.g. distill-teacher-s0. None: the
    run's newest."""


ScoreVote = Literal["median", "mean"]


class AnnotateSection(Section):
    """How the teacher is called."""

    prompt: str | None = None
    """A prompt file. None: prompts/<task>.yaml, or a zero-shot prompt for your own data."""
    splits: Annotated[tuple[Literal["train", "valid", "test"], ...], BeforeValidator(as_tuple)] = (
        "train",
        "test",
    )
    """The splits to annotate."""
    use_recorded: bool = False
    """Use a row's recorded completion (``teacher.completion``) as its first reply, so that requests
    are sent only for rows without a readable one."""
    samples: int = Field(1, ge=1)
    """Replies per row; the majority label wins, or the majority of each label and field."""
    score_vote: ScoreVote = "median"
    """score: the vote of several samples is their median, or the point nearest to their mean."""
    stop_early: bool = True
    """Request no further samples for a row once its vote cannot change."""
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Sampling temperature. 0: greedy decoding, for one sample alone."""
    logprobs: bool = False
    """Request log-probabilities and store the label's."""
    hint: bool = False
    """If the teacher's label is not the gold label, ask again with the gold label as a hint (STaR).
    """
    min_rationale_words: int = Field(2, ge=0)
    """Minimum words of a rationale; shorter ones are rejected as too-short."""
    format: Literal["text", "json"] = "text"
    """The form of the replies. json: an object with rationale and label, constrained by a JSON
    schema where the endpoint takes one."""
    order: Literal["rationale-first", "label-first"] | None = None
    """Which of the two a reply gives first. None: the prompt file's ``order``, rationale-first
    where it names none."""
    rationale_from: Literal["visible", "reasoning"] = "visible"
    """Where the rationale is read. reasoning: the reasoning text that some models return beside the
    reply."""
    max_tokens: int | None = Field(None, gt=0)
    """Maximum tokens of a reply, reasoning included. None: a limit that reasoning does not use up:
    16,384 for a chat endpoint (left to the endpoint where it allows fewer), 1,024 for transformers,
    256 for ``endpoint: completions``; at most a quarter of a known context, and at most what a
    tenth of ``max_usd`` pays for."""
    concurrency: int = Field(64, ge=1)
    """Maximum requests in flight."""
    max_usd: float | None = Field(None, gt=0)
    """Stop (exit code 3) before the run's replies, earlier ones included, cost more. None: no
    maximum."""
    max_requests: int | None = Field(None, ge=0)
    """Stop (exit code 3) after this many requests of one command. None: no maximum."""
    next: NextSection = NextSection()
    """How ``dsbs annotate --next`` chooses rows."""
    batch: BatchSection = BatchSection()
    """The provider's batch API."""
    engine: Literal["local", "ray"] = "local"
    """ray: annotate in shards on a Ray cluster."""
    ray: RaySection = RaySection()
    """The Ray cluster, with ``engine: ray``."""

    @model_validator(mode="after")
    def _samples_differ(self) -> AnnotateSection:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                "annotate.samples > 1 at temperature 0 requests the same reply again; "
                "set temperature: 0.7"
            )
        return self
