"""uvicorn, with deadlines for headers and an end that the command line knows."""

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

_HEADERS_BYTES = 16 * 1024  # of a request's line and headers


def protocol_of(header_s: float, send_s: float) -> type[H11Protocol]:
    """HTTP/1.1 in which a request's line and headers must be there ``header_s`` after the connection or their first byte.

    A client that leaves what was sent to it untaken for ``send_s`` is dropped: closing would wait for it for ever.
    """

    class Prompt(H11Protocol):
        _deadline: asyncio.TimerHandle | None = None
        _untaken: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(
                0
            )  # else a few kilobytes that nobody takes are no reason to pause
            self._wait_for_headers()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._wait_for_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop_waiting()
            self._stop_dropping()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._untaken = self.loop.call_later(send_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_dropping()

        def _wait_for_headers(self) -> None:
            """An answered request leaves an idle connection to uvicorn's own keep-alive, until its next byte."""
            if self.conn.their_state is not h11.IDLE:
                self._stop_waiting()
            elif self._deadline is None and not self.transport.is_closing():
                self._deadline = self.loop.call_later(header_s, self.transport.close)

        def _stop_waiting(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

        def _stop_dropping(self) -> None:
            if self._untaken is not None:
                self._untaken.cancel()
                self._untaken = None

    return Prompt


class HttpServer(Server):
    """Stops on SIGTERM and SIGINT: no new connections, what is in flight is answered within ``settings.drain_s``."""

    def __init__(self, app: App, service: Service, ready: Callable[[], None]) -> None:
        settings = service.settings
        super().__init__(
            Config(
                app,
                http=protocol_of(settings.header_s, settings.send_s),
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=settings.connections,
                timeout_keep_alive=settings.idle_s,
                timeout_graceful_shutdown=settings.drain_s,
                h11_max_incomplete_event_size=_HEADERS_BYTES,
            )
        )
        self._service, self._ready = service, ready
        self.interrupted = False  # by SIGINT

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stops = True
        self.interrupted = self.interrupted or sig == signal.SIGINT
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own raises the signal again at the end, by which SIGTERM would kill the process: no exit code of ours."""
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
