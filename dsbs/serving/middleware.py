"""ASGI middleware: authentication, body-size limit, request metrics, clean connection close.

``BodyReader`` reads and checks request bodies; ``Metrics`` is the page for Prometheus (text
exposition format 0.0.4).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import traceback
from bisect import bisect_left
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    MutableMapping,
    Sequence,
)
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ValidationError

from dsbs.serving.settings import ApiError, Settings, busy, client_gone, stopping

logger = logging.getLogger(__name__)
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]
Check = Callable[[Any, dict[bytes, bytes]], None]  # of a request's scope and headers
_LINGER_S = 1.0
_LINGER_BYTES = 1 << 20
_NO_RESPONSE = 499  # the client went away before there was a response


class Middleware:
    """Wraps the application. ``check`` raises ApiError for a request that is refused."""

    def __init__(
        self,
        app: App,
        settings: Settings,
        body_reader: BodyReader,
        metrics: Metrics,
        *,
        check: Check,
        paths: frozenset[str],
    ) -> None:
        self._app = app
        self._body_reader = body_reader
        self._metrics = metrics
        self._send_timeout_s = settings.send_s
        self._check = check
        self._paths = paths

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan events of the application
            await self._app(scope, receive, send)
            return
        started = asyncio.get_running_loop().time()
        exchange = _Exchange(scope, receive, send, self._send_timeout_s)
        try:
            self._check(scope, exchange.headers)
            self._body_reader.check_length(exchange.headers.get(b"content-length"))
            await self._app(scope, exchange.receive, exchange.send)
        except ApiError as error:
            await exchange.refuse(error)
        except asyncio.CancelledError:  # the time to drain is over
            await exchange.refuse(stopping())
        except TimeoutError:
            # The client does not read its response; the server closes the connection.
            logger.info("a client did not read its response")
        except Exception as error:
            # The message may hold a request's text, which belongs in no log.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed: %s\n%s", type(error).__name__, frames)
            await exchange.refuse(
                ApiError(500, "internal server error; see the server's log", "internal_error")
            )
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            elapsed = asyncio.get_running_loop().time() - started
            self._metrics.request(path, exchange.status, elapsed)


class BearerCheck:
    """Every path but ``open_paths`` asks for ``token``; None: no path does.

    ``local`` refuses requests that name another host, and requests from web pages of other hosts.
    """

    def __init__(self, token: str | None, *, local: bool, open_paths: frozenset[str]) -> None:
        self._token = None if token is None else token.encode()
        self._local = local
        self._open_paths = open_paths

    def __call__(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError (401, 403)."""
        if self._local:
            _check_host(headers)
        if self._token is not None and scope["path"] not in self._open_paths:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
                message = "a bearer token is required"
                if token:
                    message = "the bearer token is wrong"
                raise ApiError(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})


def _check_host(headers: dict[bytes, bytes]) -> None:
    """Refuse requests through other host names and from other hosts' pages. Raises ApiError (403).

    A browser on this machine sends requests here for any page that it shows. A page whose host name
    was pointed at this address (DNS rebinding) has that name in Host; a page of another host that
    posts a form has its own in Origin.
    """
    host = headers.get(b"host")
    origin = headers.get(b"origin")
    host_is_local = host is None or is_loopback(b"//" + host)
    origin_is_local = origin is None or is_loopback(origin)
    if not (host_is_local and origin_is_local):
        raise ApiError(
            403,
            "without a token this server answers only requests to localhost or its own address, "
            "and none from web pages of other hosts (--token-env NAME makes it ask for a token)",
            "another_host",
        )


def is_loopback(url: bytes) -> bool:
    """Whether a URL, or ``//`` and a Host header, names this machine's loopback address."""
    try:
        name = urlsplit(url.decode("latin-1")).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class _Exchange:
    """One request and its response while they pass through."""

    def __init__(self, scope: Any, receive: Receive, send: Send, send_timeout_s: float) -> None:
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.status = _NO_RESPONSE
        self._receive = receive
        self._send = send
        self._send_timeout_s = send_timeout_s
        has_length = self.headers.get(b"content-length", b"0") != b"0"
        self._body_is_read = not has_length and b"transfer-encoding" not in self.headers

    async def receive(self) -> Message:
        message = await self._receive()
        self._body_is_read = self._body_is_read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Raises TimeoutError where the client does not read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if not self._body_is_read:
                # Otherwise the server would read the rest of the body to keep the connection.
                headers = [*message.get("headers", ()), (b"connection", b"close")]
                message = {**message, "headers": headers}
        is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
        async with asyncio.timeout(self._send_timeout_s):
            if is_last and not self._body_is_read:
                await self._send({**message, "more_body": True})
                await self._linger()
                await self._send({"type": "http.response.body"})
            else:
                await self._send(message)

    async def _linger(self) -> None:
        """Read on for a moment before closing.

        A client that is still sending would otherwise lose the response (RFC 9112, section 9.6).
        """
        remaining = _LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while remaining > 0 and not self._body_is_read:
                    remaining -= len((await self.receive()).get("body", b"")) or 1

    async def refuse(self, error: ApiError) -> None:
        """Respond with ``error``, unless a response has begun already."""
        if self.status != _NO_RESPONSE:
            return
        body = json.dumps(error.as_json(), ensure_ascii=False).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **error.headers,
        }
        encoded = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": encoded})
        await self.send({"type": "http.response.body", "body": body})


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts of values up to each of ``bounds``, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str = "") -> Iterator[str]:
        cumulative = 0
        separator = "," if labels else ""
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            cumulative += count
            yield f'{name}_bucket{{{labels}{separator}le="{bound}"}} {cumulative}'
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {self.total:.9g}"
        yield f"{name}_count{braces} {cumulative}"


class Metrics:
    """Counts since the server started. All counting happens in the event loop's thread."""

    def __init__(self) -> None:
        self.dropped_rows = 0  # their client went away before the model got them
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._batches = Histogram(_ROWS)

    def request(self, path: str, status: int, seconds: float) -> None:
        """``path`` is a route of the server or "other": clients must not create time series."""
        self._requests[path, status] += 1
        self._seconds.setdefault(path, Histogram(_SECONDS)).observe(seconds)

    def batch(self, rows: int) -> None:
        self._batches.observe(rows)

    def page(self, *, queued_rows: int, body_bytes: int, ready: bool) -> str:
        return "\n".join(self._lines(queued_rows, body_bytes, ready)) + "\n"

    def _lines(self, queued_rows: int, body_bytes: int, ready: bool) -> Iterator[str]:
        yield from head(
            "dsbs_requests_total",
            "counter",
            "Requests by path and status; 499: the client went away.",
        )
        for (path, status), count in sorted(self._requests.items()):
            yield f'dsbs_requests_total{{path="{path}",status="{status}"}} {count}'
        yield from head(
            "dsbs_request_seconds",
            "histogram",
            "Seconds from a request's headers to the end of its response.",
        )
        for path, seconds in sorted(self._seconds.items()):
            yield from seconds.lines("dsbs_request_seconds", f'path="{path}"')
        yield from head(
            "dsbs_batch_rows",
            "histogram",
            "Rows that the model decoded together; the sum counts all rows.",
        )
        yield from self._batches.lines("dsbs_batch_rows")
        yield from single(
            "dsbs_dropped_rows_total",
            "counter",
            "Rows whose client went away before the model got them.",
            self.dropped_rows,
        )
        yield from single("dsbs_queue_rows", "gauge", "Rows that wait for the model.", queued_rows)
        yield from single(
            "dsbs_body_bytes", "gauge", "Bytes of request bodies in memory.", body_bytes
        )
        yield from single("dsbs_ready", "gauge", "1: ready, 0: shutting down.", int(ready))


def single(name: str, kind: str, description: str, value: float) -> Iterator[str]:
    yield from head(name, kind, description)
    yield f"{name} {value}"


def head(name: str, kind: str, description: str) -> tuple[str, str]:
    return f"# HELP {name} {description}", f"# TYPE {name} {kind}"


MAX_ROW_VALUES = 64  # JSON values in a row; for a whole request, on average over its rows
Form = TypeVar("Form", bound=BaseModel)
_MAX_DEPTH = 32  # levels of JSON; a row of fields is the third


class BodyReader:
    """Reads request bodies within the limits of ``settings``."""

    def __init__(self, settings: Settings) -> None:
        self._max_bytes = 1024 * settings.max_body_kb
        self._max_bytes_in_flight = 1024 * settings.bodies_kb
        self._timeout_s = settings.body_s
        self._max_values = MAX_ROW_VALUES * (settings.max_rows + 1)
        self.bytes_in_flight = 0

    def check_length(self, content_length: bytes | None) -> None:
        """Refuse by Content-Length, before anything is read. Raises ApiError (413)."""
        if content_length is not None and int(content_length) > self._max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        limit_kb = self._max_bytes // 1024
        return ApiError(413, f"the body is larger than {limit_kb} KB", "body_too_large")

    @asynccontextmanager
    async def body(self, receive: Receive) -> AsyncIterator[bytes]:
        """A request's body; its bytes count as in flight until the request is done.

        Raises ApiError: 408 (too slow), 413 (too large), 429 (no memory left for bodies), 499 (the
        client went away).
        """
        chunks: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise client_gone()
                        chunk = message.get("body", b"")
                        more = message.get("more_body", False)
                        size += len(chunk)
                        self.bytes_in_flight += len(chunk)
                        if size > self._max_bytes:
                            raise self._too_large()
                        if self.bytes_in_flight > self._max_bytes_in_flight:
                            raise busy("the requests in flight use all the memory for bodies")
                        chunks.append(chunk)
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {self._timeout_s:g} s", "body_too_slow"
                ) from None
            yield b"".join(chunks)
        finally:
            self.bytes_in_flight -= size

    def parse(self, body: bytes, form: type[Form]) -> Form:
        """Parse and validate a JSON object. Raises ApiError (400, 413)."""
        if count_values(body) > self._max_values:
            raise ApiError(
                413, f"the body contains more than {self._max_values} values", "body_too_large"
            )
        try:
            content = json.loads(body.decode("utf-8-sig"), parse_constant=_reject_constant)
        except RecursionError:
            raise _too_deep() from None
        except ValueError:  # not JSON, not UTF-8, or a number of thousands of digits
            raise ApiError(400, "the body is not valid JSON", "invalid_json") from None
        if not isinstance(content, dict):
            raise ApiError(400, "the body is not a JSON object", "invalid_json")
        _check_depth(content)
        if b"\\ud" in body or b"\\uD" in body:
            _check_surrogates(content)
        try:
            return form.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(str(key) for key in first["loc"])
            message = f"{field}: {first['msg']}" if field else first["msg"]
            raise ApiError(400, message, "invalid_value") from None


def count_values(text: bytes) -> int:
    """An upper bound of the number of values in JSON text, without parsing it.

    Every value follows a comma or an opening bracket. Parsing a megabyte of empty lists takes a
    quarter of a second during which nobody else is served; this takes a hundredth of one.
    """
    without_escapes = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside_strings = b"".join(without_escapes.split(b'"')[::2])  # strings hold commas as well
    return outside_strings.count(b",") + outside_strings.count(b"[") + outside_strings.count(b"{")


def _reject_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity: Python reads them, JSON does not have them


def _check_depth(content: dict[str, Any]) -> None:
    """Refuse deep nesting, level by level and without recursion."""
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise _too_deep()


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested more than {_MAX_DEPTH} levels deep", "invalid_json")


def _check_surrogates(content: dict[str, Any]) -> None:
    """Refuse half a surrogate pair: neither tokenizers nor UTF-8 responses can hold it."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, "the body contains half of a surrogate pair (\\ud800 to \\udfff)", "invalid_json"
        ) from None
