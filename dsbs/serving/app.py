"""Application: the routes over one student, and its HTTP server with deadlines and a graceful
shutdown.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, Protocol

import h11
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsbs.serving.batching import Batcher
from dsbs.serving.cascade import Cascade, Routed
from dsbs.serving.chat_completions import (
    ChatForm,
    CompletionForm,
    PredictForm,
    chat_response,
    completions_response,
)
from dsbs.serving.middleware import (
    CONTENT_TYPE,
    App,
    BearerCheck,
    BodyReader,
    Metrics,
    Middleware,
    Receive,
)
from dsbs.serving.model import GenerationOptions, Item, Model, Outcome
from dsbs.serving.openapi import PAGES, add_documentation, described
from dsbs.serving.settings import ApiError, Settings, client_gone, stopping

# Health checks seldom have the token, and a browser that shows the documentation cannot send it.
OPEN_PATHS = frozenset({"/health", *PAGES})


# Rows, their options, texts that end an answer, and how many log-probabilities (None: none).
_ParsedCompletion = tuple[list[Item], GenerationOptions, list[str], int | None]


class Service:
    """State that the routes share: the student, its queue and metrics, and the shutdown flag.

    ``cascade``: the teacher behind the student. None: there is none.
    """

    def __init__(self, model: Model, settings: Settings, cascade: Cascade | None = None) -> None:
        self.model = model
        self.cascade = cascade
        self.settings = settings
        self.metrics = Metrics()
        self.body_reader = BodyReader(settings)
        self.batcher: Batcher[Item, GenerationOptions, Outcome] = Batcher(
            model.answer,
            self.metrics,
            batch_size=settings.batch_size,
            max_wait_s=settings.max_wait_ms / 1000,
            max_queue=settings.queue,
        )
        self.is_stopping = False
        self._started_at = int(time.time())

    # --- routes

    async def predict(self, request: Request) -> Response:
        async with self._body(request) as body:
            items, options = self._parse_predict(body)
            answers = await self._answers(items, options, request.receive)
        is_causal = self.model.student.card.reasons_first
        predictions = [
            _prediction(answer, with_rationale=options.rationale, is_causal=is_causal)
            for answer in answers
        ]
        return JSONResponse({"predictions": predictions, "student": self.model.name})

    async def completions(self, request: Request) -> Response:
        async with self._body(request) as body:
            items, options, stops, top = self._parse_completions(body)
            answers = await self._answers(items, options, request.receive)
        return JSONResponse(completions_response(self.model.name, answers, stops, top))

    async def chat(self, request: Request) -> Response:
        async with self._body(request) as body:
            items, options, stops, top = self._parse_chat(body)
            answers = await self._answers(items, options, request.receive)
        return JSONResponse(chat_response(self.model.name, answers[0], stops, top))

    async def models(self) -> Response:
        model = {
            "id": self.model.name,
            "object": "model",
            "created": self._started_at,
            "owned_by": "dsbs",
        }
        return JSONResponse({"object": "list", "data": [model]})

    async def health(self) -> Response:
        if self.is_stopping:
            raise stopping()
        health = {"status": "ready", "student": self.model.name}
        if self.cascade is not None:
            health |= self.cascade.health()
        return JSONResponse(health)

    async def metrics_page(self) -> Response:
        page = self.metrics.page(
            queued_rows=self.batcher.depth,
            body_bytes=self.body_reader.bytes_in_flight,
            ready=not self.is_stopping,
        )
        if self.cascade is not None:
            page += "\n".join(self.cascade.metric_lines()) + "\n"
        return Response(page, headers={"content-type": CONTENT_TYPE})

    def _body(self, request: Request) -> AbstractAsyncContextManager[bytes]:
        """The request's body. Raises ApiError (503) while stopping.

        A client whose headers arrived before the stop is answered: only its body is checked here.
        """
        if self.is_stopping:
            raise stopping()
        return self.body_reader.body(request.receive)

    # --- parsing. Each parsed form lives only as long as these calls: it may take twenty times the
    # memory of its body, and would otherwise stay while its rows wait.

    def _parse_predict(self, body: bytes) -> tuple[list[Item], GenerationOptions]:
        form = self.body_reader.parse(body, PredictForm)
        options = self.model.predict_options(
            rationale=form.rationale,
            max_label_tokens=form.max_label_tokens,
            distribution=form.distribution,
        )
        return self._items(form.inputs, "inputs"), options

    def _parse_completions(self, body: bytes) -> _ParsedCompletion:
        form = self.body_reader.parse(body, CompletionForm)
        json_names = self._checked(form)
        items = self._items(form.inputs, "prompt", form.max_tokens, json_names)
        return items, self.model.completion_options(form.top), form.stops, form.top

    def _parse_chat(self, body: bytes) -> _ParsedCompletion:
        form = self.body_reader.parse(body, ChatForm)
        json_names = self._checked(form)
        max_tokens = form.max_completion_tokens or form.max_tokens
        items = self._items([form.input], "messages", max_tokens, json_names)
        return items, self.model.completion_options(form.top), form.stops, form.top

    def _checked(self, form: CompletionForm | ChatForm) -> tuple[str, ...] | None:
        """The form's ``json_names``. Raises ApiError (400) for what the student cannot do."""
        explains = self.model.replies_with_rationale
        json_names = form.json_names(self.model.student.task, explains=explains)
        # a label in an object is not the text's one token
        form.check_supported(has_distribution=self.model.has_distribution and not json_names)
        return json_names

    def _items(
        self,
        inputs: Sequence[Any],
        field: str,
        max_tokens: int | None = None,
        json_names: tuple[str, ...] | None = None,
    ) -> list[Item]:
        """Raises ApiError (400, 413)."""
        if not inputs:
            raise ApiError(400, f"{field} is empty", "invalid_value")
        max_rows = self.settings.max_rows
        if len(inputs) > max_rows:
            raise ApiError(
                413, f"{field} has {len(inputs)} rows; the limit is {max_rows}", "too_many_rows"
            )
        return [
            self.model.item(value, f"{field}.{index}", max_tokens, json_names)
            for index, value in enumerate(inputs)
        ]

    # --- answers

    async def _answers(
        self, items: list[Item], options: GenerationOptions, receive: Receive
    ) -> list[Routed]:
        """The answers. Raises ApiError: 429, 500, 502, or 499 where the client leaves first."""
        answers = asyncio.create_task(self._routed(items, options))
        disconnect = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({answers, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise client_gone()
            return answers.result()
        finally:
            answers.cancel()
            disconnect.cancel()

    async def _routed(self, items: list[Item], options: GenerationOptions) -> list[Routed]:
        outcomes = await self.batcher.ask(items, options)
        if self.cascade is None:
            return [Routed(outcome, cascade=False) for outcome in outcomes]
        routed = await self.cascade.route(items, outcomes)
        by_teacher = [index for index, answer in enumerate(routed) if answer.source == "teacher"]
        if options.completes and by_teacher:
            # The tokens of the teacher's texts are counted in the model's thread.
            items = [replace(items[i], answer=routed[i].outcome.answer) for i in by_teacher]
            texts = await self.batcher.ask(items, replace(options, predicts=False))
            for i, text in zip(by_teacher, texts, strict=True):
                outcome = replace(routed[i].outcome, completion=text.completion)
                routed[i] = replace(routed[i], outcome=outcome)
        return routed


async def _wait_for_disconnect(receive: Receive) -> None:
    """Return once the client goes away; its body has been read already."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _prediction(routed: Routed, *, with_rationale: bool, is_causal: bool) -> dict[str, Any]:
    answer = routed.outcome.answer
    prediction: dict[str, Any] = {
        "label": answer.value,
        "raw": answer.raw,
        "probability": answer.probability,
        "truncated": answer.truncated,
    }
    if answer.distribution is not None:
        prediction["distribution"] = answer.distribution
    if answer.expected_number is not None:
        prediction["expected_number"] = answer.expected_number
    if answer.field_probabilities is not None:
        prediction["field_probabilities"] = answer.field_probabilities
    if with_rationale:
        by_student = routed.source == "student"
        prediction["rationale"] = answer.rationale
        prediction["rationale_is_causal"] = is_causal if by_student else None
    return prediction | routed.fields()


def make_app(service: Service, token: str | None, *, local: bool) -> App:
    """The whole application. ``token``: None asks for none. ``local``: see ``Middleware``."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        if service.cascade is not None:
            service.cascade.start()
        yield
        if service.cascade is not None:
            await service.cascade.close()
        service.batcher.close()

    app = FastAPI(
        title=f"dsbs serve: {service.model.name}",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,
    )
    routes: dict[str, tuple[str, Callable[..., Awaitable[Response]]]] = {
        "/predict": ("POST", service.predict),
        "/v1/completions": ("POST", service.completions),
        "/v1/chat/completions": ("POST", service.chat),
        "/v1/models": ("GET", service.models),
        "/health": ("GET", service.health),
        "/metrics": ("GET", service.metrics_page),
    }
    for path, (method, endpoint) in routes.items():
        app.add_api_route(path, endpoint, methods=[method], response_model=None, **described(path))
    add_documentation(app, has_token=token is not None)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.as_json(), error.status, headers=dict(error.headers))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        if request.url.path in routes or request.url.path in PAGES:
            message = f"{request.method} is not allowed on this path"
            code = "wrong_method"
        else:
            message = f"no such path; the paths are {', '.join([*routes, *PAGES])}"
            code = "no_such_path"
        return await refuse(
            request, ApiError(error.status_code, message, code, error.headers or {})
        )

    return Middleware(
        app,
        service.settings,
        service.body_reader,
        service.metrics,
        check=BearerCheck(token, local=local, open_paths=OPEN_PATHS),
        paths=frozenset(routes) | PAGES,
    )


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


class Stoppable(Protocol):
    """What a server needs to know of its application: limits, and whom to tell that it stops."""

    settings: Settings
    is_stopping: bool


class HttpServer(Server):
    """Stops on SIGTERM and SIGINT: accepts no connections and drains for ``settings.drain_s``."""

    def __init__(self, app: App, service: Stoppable, on_ready: Callable[[], None]) -> None:
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
