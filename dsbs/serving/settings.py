"""What a server may be told, and when it says no."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dsbs.errors import UserError

Reply = Literal["label", "step-by-step"]
LABEL_TOKENS = 64  # of a label, where a request does not say: as `dsbs predict`
ANCHOR = "Answer:"  # what a prompt file has that names no anchor of its own
ROW_VALUES = 64  # of JSON in a row, on the mean over a request's most rows


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes in kilobytes (1,024 bytes), rows or connections; times in seconds unless the name says otherwise."""

    batch_size: int = 64  # rows decoded together, at most
    max_wait_ms: float = 5.0  # that a row waits for others while the model is idle
    max_body_kb: int = 1024  # of one request
    max_rows: int = 256  # of one request
    queue: int = 2048  # rows that wait for the model, over all requests
    reply: Reply = "label"  # of the OpenAI endpoints
    anchor: str | None = (
        None  # before the label there; None: "Answer:" with step-by-step, nothing with label
    )
    drain_s: int = 30  # for what is in flight when the server is told to stop
    bodies_kb: int = 65_536  # of all requests together: what bounds the memory
    connections: int = 1000
    header_s: float = 10.0  # for a request's line and headers
    body_s: float = 30.0  # for its body
    send_s: float = 30.0  # for a client to take its answer
    idle_s: int = 30  # until a connection without a request is closed

    def __post_init__(self) -> None:
        if self.max_rows > self.queue:
            raise UserError(
                f"--max-rows {self.max_rows} is more than --queue {self.queue}: such a request could never be taken",
                hint="raise --queue, or lower --max-rows",
            )
        if self.max_body_kb > self.bodies_kb:
            raise UserError(
                f"--max-body-kb {self.max_body_kb}: all bodies together may take {self.bodies_kb} KB of memory",
                hint=f"give {self.bodies_kb} at most",
            )


def values_in(json: bytes) -> int:
    """At least as many as the JSON has, without parsing it: each stands after a comma or an opening bracket.

    Parsing a megabyte of empty lists takes a quarter of a second, in which nobody else is served; this, a hundredth of one.
    """
    outside = b"".join(
        json.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]
    )  # of texts, which have commas as well
    return outside.count(b",") + outside.count(b"[") + outside.count(b"{")


@dataclass(eq=False)
class ApiError(Exception):
    """A request that gets no answer but a status, and why."""

    status: int
    message: str
    code: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """OpenAI's shape of an error, on every path."""
        kind = (
            "server_error"
            if self.status >= 500
            else "rate_limit_error"
            if self.status == 429
            else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


def busy(what: str) -> ApiError:
    """429 rather than 503: clients, `dsbs annotate` among them, then send less and do not count it as a failure."""
    return ApiError(429, f"{what}; try again in a second", "busy", {"Retry-After": "1"})


def stopping() -> ApiError:
    return ApiError(503, "the server is being stopped", "stopping", {"Retry-After": "5"})


def gone() -> ApiError:
    """Nobody reads it; the status stands in the metrics, as nginx has it."""
    return ApiError(499, "the client went away", "client_gone")
