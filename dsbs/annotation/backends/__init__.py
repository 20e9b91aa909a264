"""Teachers: the interface of every kind, its requests, replies and prices.

A kind of teacher is one class in one file of this package, with its facts as class attributes, and
one line in ``dsbs.config.registry.TEACHERS``. ``is_asked`` separates two families:

- A teacher that is asked has ``endpoints``; each answers one request at a time (``complete``). Its
  replies are paid for, so they are stored before they are used.
- A teacher on disk has ``annotations``: nothing is sent and nothing is stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

from dsbs.annotation.backends.adaptation import Adaptation
from dsbs.annotation.backends.faults import Blame, plain_ending
from dsbs.annotation.thoughts import read_message
from dsbs.config import Recipe, TeacherSection
from dsbs.config.registry import TEACHERS, entry
from dsbs.errors import DsbsError, UserError
from dsbs.records import Annotation, Example, Provenance, Usage

Lane = Literal["online", "batch"]
COMPLETION_TOKENS = 256  # of a model that continues a text: it does not think
Failure = Literal[
    "throttled",
    "server error",
    "connection",
    "timeout",
    "unreadable",
    "broken off",  # a reply that ended in the middle
    "empty",  # a reply without a choice, or without a text
]


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the body as sent, the index of the row's sample, whether it contains the label.

    ``sample`` counts from 0. ``hinted``: the prompt contains the gold label.
    """

    body: dict[str, Any]
    sample: int
    hinted: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply: the visible text and the tokens as the endpoint counted them.

    ``reasoning`` is a reasoning model's separate text. ``raw`` is the reply as received, JSON text.
    ``seconds`` runs from sending to receiving (None: from a batch or from disk). ``failure`` is why
    a reply that is billed holds no answer: its tokens count, its text does not.
    """

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning: str | None = None
    cached_tokens: int | None = None
    lane: Lane = "online"
    seconds: float | None = None
    raw: str = "{}"
    failure: Exception | None = None

    @property
    def is_billed(self) -> bool:
        """Whether the endpoint counted any token."""
        return bool(self.prompt_tokens or self.completion_tokens)


class TransientError(Exception):
    """An attempt failed and another may succeed. ``retry_after``: seconds the endpoint asks for."""

    def __init__(self, message: str, kind: Failure, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after

    @property
    def throttled(self) -> bool:
        return self.kind == "throttled"


class RejectedError(Exception):
    """The endpoint will never answer this request; other rows may be fine.

    ``blame`` is "row" or "content" where it is certainly about the row, "parameter" where it names
    one of the request's parameters (``parameter``, if it is known). ``stop`` is the error that
    ends the run instead, if the endpoint has never answered anything.
    """

    def __init__(
        self,
        message: str,
        blame: Blame = "unclear",
        *,
        parameter: str | None = None,
        stop: DsbsError | None = None,
    ) -> None:
        super().__init__(message)
        self.blame = blame
        self.parameter = parameter
        self.stop = stop


class Endpoint(Protocol):
    """One address that answers requests.

    ``identity`` identifies it in the replies' keys, ``name`` in messages. ``weight`` is its share
    of the requests. ``rpm`` and ``tpm`` cap requests and tokens per minute (None: no cap).
    ``adaptation`` is the form of the requests that it accepts, as far as it is known.
    """

    identity: str
    name: str
    weight: float
    rpm: float | None
    tpm: float | None
    adaptation: Adaptation

    async def complete(self, request: Request) -> Reply:
        """Answer one request. A reply that is billed and holds no answer has a ``failure``.

        Raises TransientError, RejectedError, PartialError where this endpoint will answer nothing
        more today, or another DsbsError where no request can succeed.
        """
        ...


class Teacher(Protocol):
    """A kind of teacher.

    The class attributes and class methods are facts that need no connection and no model.
    """

    title: ClassVar[str]  # for people
    extra: ClassVar[str | None] = None  # the optional dependencies: pip install 'dsbs[extra]'
    is_asked: ClassVar[bool] = True  # False: its annotations are read from disk
    provenance: ClassVar[Provenance] = "own"  # of its rationales
    default_context_tokens: ClassVar[int | None] = None  # of one request; None: not known
    default_reply_tokens: ClassVar[int] = 256  # of a chat reply, where the recipe does not say
    takes_batches: ClassVar[bool] = False  # whether its endpoint may have the OpenAI Batch API

    endpoints: Sequence[Endpoint] = ()

    def __init__(self, recipe: Recipe) -> None: ...

    # --- a teacher that is asked

    @classmethod
    def identities(cls, recipe: Recipe) -> list[str]:
        """The endpoints' identities, in the order of ``endpoints``."""
        teacher = recipe.teacher
        return [f"{teacher.kind}:{teacher.model}#{teacher.endpoint}"]

    @classmethod
    def max_in_flight(cls, recipe: Recipe) -> int:
        """The maximum number of requests that the teacher answers in parallel."""
        return recipe.annotate.concurrency

    @classmethod
    def list_price(cls, _teacher: TeacherSection) -> Price | None:
        """The public price. None: not known. A teacher on this machine is free."""
        return Price(0.0, 0.0, 0.0) if cls.is_asked else None

    async def close(self) -> None:
        """Release connections and models."""

    # --- a teacher on disk

    def annotations(self, examples: Iterable[Example], split: str) -> Iterator[Annotation]:
        """One annotation per example. Raises UserError where the files do not fit the rows."""
        raise NotImplementedError

    def check_run_folder(self, run: Path) -> None:
        """Raises UserError where annotating into ``run`` would overwrite what the teacher reads."""

    def manifest_entries(self) -> dict[str, Any]:
        """What the run's manifest records about this teacher."""
        return {}

    def warnings(self, _split: str, _rows: int) -> list[str]:
        """Warnings about a split, once ``annotations`` has gone through its rows."""
        return []

    def no_annotations(self) -> UserError:
        """The error for a run in which no row has a reply."""
        return UserError(
            f"the {self.title} teacher has no reply to any row",
            hint="check teacher.kind and task.columns",
        )


class LocalTeacher(Teacher):
    """A teacher in this process: it is its own only endpoint. Subclasses write ``complete``."""

    weight: float = 1.0
    rpm: float | None = None
    tpm: float | None = None

    def __init__(self, recipe: Recipe) -> None:
        self.identity = self.identities(recipe)[0]
        self.name = str(recipe.teacher.model)
        self.adaptation = Adaptation()
        self.endpoints = (self,)

    async def complete(self, request: Request) -> Reply:
        raise NotImplementedError


def teacher_class(kind: str) -> type[Teacher]:
    """The class of a kind of teacher. Raises KeyError for an unknown kind."""
    return cast(type[Teacher], entry(TEACHERS, kind))


def make_teacher(recipe: Recipe) -> Teacher:
    """The recipe's teacher, ready to be asked or read. Raises UserError."""
    return teacher_class(recipe.teacher.kind)(recipe)


_MOST_TOKENS = 1 << 53  # in one request; a larger number is none
_SHARE_OF_BUDGET = 0.1  # of annotate.max_usd, for one reply


def reply_tokens(recipe: Recipe, price: Price | None = None) -> int:
    """``annotate.max_tokens``, else a limit that reasoning does not use up.

    It is 256 where the model continues a text (``endpoint: completions``); at most a quarter of the
    context where that is known, and at most what a tenth of ``annotate.max_usd`` pays for.
    """
    if recipe.annotate.max_tokens is not None:
        return recipe.annotate.max_tokens
    teacher = recipe.teacher
    kind = teacher_class(teacher.kind)
    context = teacher.context_tokens or kind.default_context_tokens
    limit = kind.default_reply_tokens
    if teacher.endpoint == "completions":
        limit = COMPLETION_TOKENS
    if context is not None:
        limit = min(limit, max(1, context // 4))
    max_usd = recipe.annotate.max_usd
    if max_usd is not None and price is not None and price.output > 0:
        # A reply reserves the most that it may cost: a larger limit would allow no request at all.
        limit = min(limit, max(1, int(_SHARE_OF_BUDGET * max_usd / price.output * 1e6)))
    return limit


# --- completions in the OpenAI API's format


def parsed_body(text: str) -> object:
    """The JSON of a body; that of an event stream, which nobody asked for, is put together.

    Raises ValueError.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("too deeply nested") from None
    except ValueError:
        lines = (line.strip() for line in text.splitlines())
        events = [line.removeprefix("data:").strip() for line in lines if line.startswith("data:")]
        if not events:
            raise
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    return _assembled(chunks, is_complete="[DONE]" in events)


def _assembled(chunks: list[Any], *, is_complete: bool) -> object:
    """The body that a stream's chunks make (OpenAI API reference, chat streaming)."""
    message: dict[str, str] = {}
    body: dict[str, Any] = {"choices": []}
    finish_reason = None
    for chunk in filter(lambda chunk: isinstance(chunk, dict), chunks):
        if chunk.get("error"):
            body["error"] = chunk["error"]
        body["usage"] = chunk.get("usage") or body.get("usage")
        for choice in filter(None, map(_object, (chunk.get("choices") or [])[:1])):
            delta = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
            for name, piece in _object(delta).items():
                if isinstance(piece, str) and name != "role":
                    message[name] = message.get(name, "") + piece
            finish_reason = choice.get("finish_reason") or finish_reason
            body["choices"] = [{"message": message}]
    if finish_reason is None and not is_complete:
        finish_reason = "abort"  # the stream ended in the middle
    for choice in body["choices"]:
        choice["finish_reason"] = finish_reason
    return body


def completion(
    value: object, raw: str, seconds: float | None = None, lane: Lane = "online"
) -> Reply:
    """The reply in a body of the OpenAI API, as far as there is one.

    Its tokens count even without a text.
    """
    body = _object(value)
    choices = body.get("choices")
    choice = _object(choices[0]) if isinstance(choices, list) and choices else {}
    message = _object(choice.get("message")) or {"content": choice.get("text")}
    usage = _object(body.get("usage"))
    text, reasoning = read_message(message)
    return Reply(
        text=text,
        finish_reason=_finish_reason(choice, message),
        prompt_tokens=_count(usage.get("prompt_tokens", usage.get("input_tokens"))),
        completion_tokens=_completion_tokens(usage),
        reasoning=reasoning,
        cached_tokens=_cached_tokens(usage),
        lane=lane,
        seconds=seconds,
        raw=raw,
    )


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _finish_reason(choice: dict[str, Any], message: dict[str, Any]) -> str | None:
    """The finish reason: "length" for all that were cut, "content_filter" for all filtered ones."""
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or not reason:
        reason = None
    if message.get("refusal"):
        return "content_filter"
    return plain_ending(reason)


def _completion_tokens(usage: Mapping[str, Any]) -> int | None:
    """Billed completion tokens. Some providers count those of reasoning beside the others."""
    counted = _count(usage.get("completion_tokens", usage.get("output_tokens")))
    details = _object(usage.get("completion_tokens_details"))
    reasoning = _count(details.get("reasoning_tokens"))
    prompt = _count(usage.get("prompt_tokens"))
    if counted is None or prompt is None or not reasoning:
        return counted
    if usage.get("total_tokens") == prompt + counted + reasoning:
        return counted + reasoning
    return counted


def _cached_tokens(usage: Mapping[str, Any]) -> int | None:
    """Prompt tokens from the provider's cache: OpenAI's and vLLM's field, or DeepSeek's."""
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        return _count(details.get("cached_tokens"))
    return _count(usage.get("prompt_cache_hit_tokens"))


def _count(value: object) -> int | None:
    if isinstance(value, int | float) and 0 <= value < _MOST_TOKENS:
        return int(value)
    return None


# --- prices


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million prompt, completion and cached prompt tokens.

    ``batch`` is the share of these prices that a reply from the Batch API costs.
    """

    input: float
    output: float
    cached: float
    batch: float = 1.0

    @property
    def is_free(self) -> bool:
        return not (self.input or self.output or self.cached)

    def usd(self, reply: Reply) -> float | None:
        """Cost of one reply. None: the endpoint did not count its tokens."""
        if self.is_free:
            return 0.0
        if reply.prompt_tokens is None or reply.completion_tokens is None:
            return None
        return self.of(
            reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens or 0, reply.lane
        )

    def of(
        self,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        lane: Lane = "online",
    ) -> float:
        """Cost of a number of tokens.

        The cached tokens are among the prompt's. Where they are more, the server counts them beside
        the prompt's.
        """
        fresh = prompt_tokens
        if cached_tokens <= prompt_tokens:
            fresh -= cached_tokens
        usd = (
            fresh * self.input + cached_tokens * self.cached + completion_tokens * self.output
        ) / 1e6
        if lane == "batch":
            usd *= self.batch
        return usd


def price_of(teacher: TeacherSection, batch: float) -> Price | None:
    """The recipe's price, else the teacher's list price. None: not known, which is not free."""
    section = teacher.price
    if section is None:
        listed = teacher_class(teacher.kind).list_price(teacher)
        if listed is None:
            return None
        return Price(listed.input, listed.output, listed.cached, batch)
    cached = section.cached_input
    if cached is None:
        cached = section.input
    return Price(section.input, section.output, cached, batch)


def total_usage(usages: Sequence[Reply | Usage]) -> Usage:
    """The tokens of several replies or rows; None where none of them was counted."""
    return Usage(
        prompt_tokens=_total(usage.prompt_tokens for usage in usages),
        completion_tokens=_total(usage.completion_tokens for usage in usages),
        cached_tokens=_total(usage.cached_tokens for usage in usages),
    )


def _total(counts: Iterable[int | None]) -> int | None:
    counted = [count for count in counts if count is not None]
    if not counted:
        return None
    return sum(counted)
