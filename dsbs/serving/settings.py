"""Server settings, and the errors that the API returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dsbs.errors import UserError

ReplyStyle = Literal["label", "step-by-step"]
DEFAULT_ANCHOR = "Answer:"  # the anchor of a prompt file that names none


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits of the server. A kilobyte is 1,024 bytes."""

    batch_size: int = 64
    """Rows decoded together, at most."""
    max_wait_ms: float = 5.0
    """How long a row waits for others while the model is idle."""
    max_body_kb: int = 1024
    """Size of one request's body, at most."""
    max_rows: int = 256
    """Rows of one request, at most."""
    queue: int = 2048
    """Rows of all requests that may wait for the model."""
    reply: ReplyStyle = "label"
    """What the OpenAI endpoints write."""
    anchor: str | None = None
    """Text before the label there. None: "Answer:" for step-by-step replies, nothing for labels."""
    drain_s: int = 30
    """Time for requests in flight once the server is told to stop."""
    bodies_kb: int = 65_536
    """Bodies of all requests in memory together, at most."""
    connections: int = 1000
    """Open connections, at most."""
    header_s: float = 10.0
    """Time for a request's line and headers."""
    body_s: float = 30.0
    """Time for a request's body."""
    send_s: float = 30.0
    """Time for a client to read its response."""
    idle_s: int = 30
    """Time until an idle connection is closed."""

    def __post_init__(self) -> None:
        if self.max_rows > self.queue:
            raise UserError(
                f"--max-rows {self.max_rows} is more than --queue {self.queue}: "
                "a request of that size could never be accepted",
                hint="raise --queue, or lower --max-rows",
            )
        if self.max_body_kb > self.bodies_kb:
            raise UserError(
                f"--max-body-kb {self.max_body_kb} is more than the {self.bodies_kb} KB of memory "
                "that all bodies share",
                hint=f"give {self.bodies_kb} at most",
            )


@dataclass(eq=False)
class ApiError(Exception):
    """A request is refused with an HTTP status and a reason."""

    status: int
    message: str
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """The error in OpenAI's shape, which every path uses."""
        kind = "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


def busy(reason: str) -> ApiError:
    """429, not 503: clients such as `dsbs annotate` then slow down and count no failure."""
    return ApiError(429, f"{reason}; try again in a second", "busy", {"Retry-After": "1"})


def stopping() -> ApiError:
    return ApiError(503, "the server is shutting down", "stopping", {"Retry-After": "5"})


def client_gone() -> ApiError:
    """Nobody reads this response; the metrics count its status, as nginx does."""
    return ApiError(499, "the client went away", "client_gone")
