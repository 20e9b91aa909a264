"""What the engine asks of a teacher, and what a teacher may answer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from dsbs.records import Example


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the body as it is sent, and which of a row's samples it asks for (from 0)."""

    body: dict[str, Any]
    sample: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply: the visible text, a reasoning model's own ``reasoning``, and all that the endpoint said (``raw``)."""

    text: str
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    reasoning: str | None = None
    raw: dict[str, Any] = field(default_factory=dict)


class TransientError(Exception):
    """This attempt failed and another may succeed. ``retry_after`` is the endpoint's own wish, in seconds."""

    def __init__(self, what: str, retry_after: float | None = None, *, throttled: bool = False) -> None:
        super().__init__(what)
        self.retry_after = retry_after
        self.throttled = throttled


class RejectedError(Exception):
    """The endpoint will never answer this one request; the other rows may be fine."""


class Teacher(Protocol):
    """A teacher that is asked, and whose replies are bought once and kept.

    ``identity`` names the endpoint in the replies' keys; ``max_concurrency`` bounds requests in flight (None: the recipe's).
    ``complete`` raises TransientError, RejectedError, or DsbsError when no request can succeed.
    """

    identity: str
    max_concurrency: int | None

    async def complete(self, request: Request) -> Reply: ...

    async def close(self) -> None: ...


class Archive(Protocol):
    """A teacher whose replies already lie on disk."""

    def recall(self, example: Example) -> Reply | None: ...
