"""What the engine asks of a teacher, and what a teacher may answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dsbs.records.rows import Example

Lane = Literal["online", "batch"]


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the body as it is sent, which of a row's samples it is (from 0), and whether it gives the answer away."""

    body: dict[str, Any]
    sample: int
    hinted: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply: the visible text, a reasoning model's own ``reasoning``, tokens as the endpoint counted them.

    ``raw`` is the reply as it came, JSON text; ``seconds`` from sending to receiving (None: by the batch lane or from disk).
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


Failure = Literal["throttled", "server error", "connection", "timeout", "unreadable"]


class TransientError(Exception):
    """This attempt failed and another may succeed. ``retry_after`` is the endpoint's own wish, in seconds."""

    def __init__(self, what: str, kind: Failure, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.kind = kind
        self.retry_after = retry_after

    @property
    def throttled(self) -> bool:
        return self.kind == "throttled"


class RejectedError(Exception):
    """The endpoint will never answer this one request; the other rows may be fine."""


class Endpoint(Protocol):
    """One place that answers requests.

    ``identity`` names it in the replies' keys, ``name`` in messages; ``weight`` is its share of the requests; ``rpm`` and
    ``tpm`` cap requests and tokens a minute (None: no cap). ``complete`` raises TransientError, RejectedError, PartialError
    where this endpoint will answer nothing more today, or another DsbsError where no request can succeed.
    """

    identity: str
    name: str
    weight: float
    rpm: float | None
    tpm: float | None

    async def complete(self, request: Request) -> Reply: ...


class Teacher(Protocol):
    """A teacher that is asked, and whose replies are bought once and kept.

    ``max_concurrency`` bounds requests in flight (None: the recipe's).
    """

    endpoints: Sequence[Endpoint]
    max_concurrency: int | None

    async def close(self) -> None: ...


class Archive(Protocol):
    """A teacher whose replies already lie on disk."""

    def recall(self, example: Example) -> Reply | None: ...
