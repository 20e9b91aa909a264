"""What every request passes: the token, the length it states, the count of it. And how one that is refused is let go."""

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
_LINGER_S, _LINGER_BYTES = 1.0, 1 << 20


class Middleware:
    """An ASGI application around another one. ``token`` opens all paths but ``open_paths``; None: all are open.

    ``local``: only under the names of this machine, and to no web page of another one.
    """

    def __init__(
        self,
        app: App,
        settings: Settings,
        intake: BodyReader,
        metrics: Metrics,
        *,
        token: str | None,
        local: bool,
        paths: frozenset[str],
        open_paths: frozenset[str],
    ) -> None:
        self._app, self._intake, self._metrics, self._send_s = app, intake, metrics, settings.send_s
        self._token = None if token is None else token.encode()
        self._local, self._paths, self._open = local, paths, open_paths

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the application's own start and end
            await self._app(scope, receive, send)
            return
        began = asyncio.get_running_loop().time()
        exchange = _Exchange(scope, receive, send, self._send_s)
        try:
            self._admit(scope, exchange.headers)
            await self._app(scope, exchange.receive, exchange.send)
        except ApiError as refused:
            await exchange.refuse(refused)
        except asyncio.CancelledError:  # the time for stopping is over
            await exchange.refuse(stopping())
        except (
            TimeoutError
        ):  # the client does not take its answer; the server closes the connection
            logger.info("a client did not take its answer")
        except Exception as error:
            # the message may hold a request's text, which belongs in no log
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("a request failed: %s\n%s", type(error).__name__, frames)
            await exchange.refuse(
                ApiError(500, "a fault of the server's; its log says more", "internal_error")
            )
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.request(path, exchange.status, asyncio.get_running_loop().time() - began)

    def _admit(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        """Raises Refused (401, 403, 413)."""
        if self._local:
            _refuse_elsewhere(headers)
        if self._token is not None and scope["path"] not in self._open:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._token):
                said = (
                    "a bearer token is needed"
                    if not given
                    else "the bearer token is not this server's"
                )
                raise ApiError(401, said, "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        self._intake.refuse_length(headers.get(b"content-length"))


def _refuse_elsewhere(headers: dict[bytes, bytes]) -> None:
    """Raises Refused (403). A browser on this machine reaches the address for any page that it shows: a page whose name was
    made to point here afterwards says that name in Host, and one that posts a form from elsewhere says so in Origin.
    """
    host, origin = headers.get(b"host"), headers.get(b"origin")
    if not (host is None or _is_loopback(b"//" + host)) or not (
        origin is None or _is_loopback(origin)
    ):
        raise ApiError(
            403,
            "without a token this server answers as localhost or its address alone, and to no page of another host "
            "(--token-env NAME asks clients for a token instead)",
            "another_host",
        )


def _is_loopback(url: bytes) -> bool:
    try:
        name = urlsplit(url.decode("latin-1")).hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class _Exchange:
    """One request and its answer, as they go by."""

    def __init__(self, scope: Any, receive: Receive, send: Send, send_s: float) -> None:
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.status = 499  # until there is another: the client went away
        self._receive, self._send, self._send_s = receive, send, send_s
        self._read = (
            self.headers.get(b"content-length", b"0") == b"0"
            and b"transfer-encoding" not in self.headers
        )

    async def receive(self) -> Message:
        message = await self._receive()
        self._read = self._read or not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Raises TimeoutError where the client does not read."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if (
                not self._read
            ):  # else the server would read on to the body's end, for the sake of the connection
                message = {
                    **message,
                    "headers": [*message.get("headers", ()), (b"connection", b"close")],
                }
        ends = message["type"] == "http.response.body" and not message.get("more_body", False)
        async with asyncio.timeout(self._send_s):
            if ends and not self._read:
                await self._send({**message, "more_body": True})
                await self._linger()
                await self._send({"type": "http.response.body"})
            else:
                await self._send(message)

    async def _linger(self) -> None:
        """Read on a little: closing on a client that still sends would make its side forget the answer (RFC 9112, 9.6)."""
        left = _LINGER_BYTES
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while left > 0 and not self._read:
                    left -= len((await self.receive()).get("body", b"")) or 1

    async def refuse(self, refused: ApiError) -> None:
        """Answer with nothing but a status and why, unless an answer has begun already."""
        if self.status != 499:
            return
        body = json.dumps(refused.as_json(), ensure_ascii=False).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **refused.headers,
        }
        sent = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": refused.status, "headers": sent})
        await self.send({"type": "http.response.body", "body": body})
