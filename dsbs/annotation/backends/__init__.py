"""Teachers: the interface of every kind, its requests, replies and prices.

A kind of teacher is one class in one file of this package, with its facts as class attributes, and
one line in ``dsbs.config.registry.TEACHERS``. ``is_asked`` separates two families:

- A teacher that is asked has ``endpoints``; each answers one request at a time (``complete``). Its
  replies are paid for, so they are stored before they are used.
- A teacher on disk has ``annotations``: nothing is sent and nothing is stored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, cast

from dsbs.annotation.backends.adaptation import Adaptation
from dsbs.config import Recipe, TeacherSection
from dsbs.config.registry import TEACHERS, entry
from dsbs.errors import UserError
from dsbs.records import Annotation, Example, Provenance

Lane = Literal["online", "batch"]
COMPLETION_TOKENS = 256  # of a model that continues a text: it does not think
Failure = Literal["throttled", "server error", "connection", "timeout", "unreadable"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the body as sent, the index of the row's sample, whether it contains the label.

    ``sample`` counts from 0. ``hinted``: the prompt gives the gold label away.
    """

    body: dict[str, Any]
    sample: int
    hinted: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply: the visible text and the tokens as the endpoint counted them.

    ``reasoning`` is a reasoning model's separate text. ``raw`` is the reply as received, JSON text.
    ``seconds`` runs from sending to receiving (None: from a batch or from disk).
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
    """The endpoint will never answer this request; other rows may be fine."""


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
        """Answer one request.

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
        """How many requests the teacher answers side by side at most."""
        return recipe.annotate.concurrency

    @classmethod
    def list_price(cls, _teacher: TeacherSection) -> Price | None:
        """The public price; None: not known. A teacher on this machine or on disk is free."""
        return Price(0.0, 0.0, 0.0)

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


def reply_tokens(recipe: Recipe) -> int:
    """``annotate.max_tokens``, else a limit that reasoning does not use up.

    It is 256 where the model continues a text (``endpoint: completions``), and at most a quarter of
    the context where that is known.
    """
    if recipe.annotate.max_tokens is not None:
        return recipe.annotate.max_tokens
    teacher = recipe.teacher
    kind = teacher_class(teacher.kind)
    if teacher.endpoint == "completions":
        return COMPLETION_TOKENS
    context = teacher.context_tokens or kind.default_context_tokens
    if context is None:
        return kind.default_reply_tokens
    return min(kind.default_reply_tokens, max(1, context // 4))


# --- prices


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million prompt, completion and cached prompt tokens.

    ``batch`` is the share of these prices that a reply of the batch lane costs.
    """

    input: float
    output: float
    cached: float
    batch: float = 1.0

    def usd(self, reply: Reply) -> float:
        """Cost of one reply; tokens that the endpoint did not count cost nothing here."""
        return self.of(
            reply.prompt_tokens or 0,
            reply.completion_tokens or 0,
            reply.cached_tokens or 0,
            reply.lane,
        )

    def of(
        self,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        lane: Lane = "online",
    ) -> float:
        """Cost of a number of tokens; the cached tokens are among the prompt's."""
        fresh = max(0, prompt_tokens - cached_tokens)
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
