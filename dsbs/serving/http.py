"""HTTP server: uvicorn with deadlines for headers and responses, and a graceful shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import h11
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsbs.serving.app import Service
from dsbs.serving.middleware import App

_MAX_HEADER_BYTES = 16 * 1024


def deadline_protocol(header_timeout_s: float, send_timeout_s: float) -> type[H11Protocol]:
    """HTTP/1.1 with two deadlines.

    A request's line and headers must arrive within ``header_timeout_s`` of the connection or of
    their first byte. A client that leaves its response unread for ``send_timeout_s`` is dropped:
    a normal close would wait for it forever.
    """

    class DeadlineProtocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _send_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # By default a few unread kilobytes do not pause writing, and the timer never starts.
            transport.set_write_buffer_limits(0)
            self._update_header_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._update_header_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._cancel_header_timer()
            self._cancel_send_timer()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._send_timer = self.loop.call_later(send_timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel_send_timer()

        def _update_header_timer(self) -> None:
            """Between requests, uvicorn's keep-alive timeout applies until the next byte."""
            if self.conn.their_state is not h11.IDLE:
                self._cancel_header_timer()
            elif self._header_timer is None and not self.transport.is_closing():
                self._header_timer = self.loop.call_later(header_timeout_s, self.transport.close)

        def _cancel_header_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _cancel_send_timer(self) -> None:
            if self._send_timer is not None:
                self._send_timer.cancel()
                self._send_timer = None

    return DeadlineProtocol


class HttpServer(Server):
    """Stops on SIGTERM and SIGINT: accepts no connections and drains for ``settings.drain_s``."""

    def __init__(self, app: App, service: Service, on_ready: Callable[[], None]) -> None:
        settings = service.settings
        super().__init__(
            Config(
                app,
                http=deadline_protocol(settings.header_s, settings.send_s),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=settings.connections,
                timeout_keep_alive=settings.idle_s,
                timeout_graceful_shutdown=settings.drain_s,
                h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
            )
        )
        self._service = service
        self._on_ready = on_ready
        self.interrupted = False  # by SIGINT

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.is_stopping = True
        self.interrupted = self.interrupted or sig == signal.SIGINT
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replace uvicorn's version, which raises the signal again when the server has stopped.

        SIGTERM would then kill the process before it could return its own exit code.
        """
        previous = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
