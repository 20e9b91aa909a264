"""ASGI middleware: authentication, body-size limit, request metrics, clean connection close."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import traceback
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlsplit

from dsbs.serving.bodies import BodyReader, Message, Receive
from dsbs.serving.metrics import Metrics
from dsbs.serving.settings import ApiError, Settings, stopping

logger = logging.getLogger(__name__)
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]
_LINGER_S = 1.0
_LINGER_BYTES = 1 << 20
_NO_RESPONSE = 499  # the client went away before there was a response


class Middleware:
    """Wraps the application. Every path but ``open_paths`` asks for ``token``; None: no path does.

    ``local`` refuses requests that name another host, and requests from web pages of other hosts.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        body_reader: BodyReader,
        metrics: Metrics,
        *,
        token: str | None,
        local: bool,
        paths: frozenset[str],
        open_paths: frozenset[str],
    ) -> None:
        self._app = app
        self._body_reader = body_reader
        self._metrics = metrics
        self._send_timeout_s = settings.send_s
        self._token = None if token is None else token.encode()
        self._local = local
        self._paths = paths
        self._open_paths = open_paths

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan events of the application
            await self._app(scope, receive, send)
            return
        started = asyncio.get_running_loop().time()
        exchange = _Exchange(scope, receive, send, self._send_timeout_s)
        try:
            self._check(scope, exchange.headers)
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

    def _check(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError (401, 403, 413)."""
        if self._local:
            _check_host(headers)
        if self._token is not None and scope["path"] not in self._open_paths:
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(token.strip(), self._token):
                message = "a bearer token is required"
                if token:
                    message = "the bearer token is wrong"
                raise ApiError(401, message, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        self._body_reader.check_length(headers.get(b"content-length"))


def _check_host(headers: dict[bytes, bytes]) -> None:
    """Refuse requests through other host names and from other hosts' pages. Raises ApiError (403).

    A browser on this machine sends requests here for any page that it shows. A page whose host name
    was pointed at this address (DNS rebinding) has that name in Host; a page of another host that
    posts a form has its own in Origin.
    """
    host = headers.get(b"host")
    origin = headers.get(b"origin")
    host_is_local = host is None or _is_loopback(b"//" + host)
    origin_is_local = origin is None or _is_loopback(origin)
    if not (host_is_local and origin_is_local):
        raise ApiError(
            403,
            "without a token this server answers only requests to localhost or its own address, "
            "and none from web pages of other hosts (--token-env NAME makes it ask for a token)",
            "another_host",
        )


def _is_loopback(url: bytes) -> bool:
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
