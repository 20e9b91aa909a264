"""Application: the server's routes over one student."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from dsbs.serving.batching import Batcher
from dsbs.serving.bodies import BodyReader, Receive
from dsbs.serving.chat_completions import (
    ChatForm,
    CompletionForm,
    chat_response,
    completions_response,
)
from dsbs.serving.metrics import CONTENT_TYPE, Metrics
from dsbs.serving.middleware import App, Middleware
from dsbs.serving.model import Completion, GenerationOptions, Item, Model, Outcome
from dsbs.serving.settings import ApiError, Settings, client_gone, stopping

OPEN_PATHS = frozenset({"/health"})  # health checks seldom have the token


class PredictForm(BaseModel, frozen=True, extra="forbid"):
    """The body of ``POST /predict``."""

    inputs: list[Any]  # texts, or rows of fields
    rationale: bool = False
    max_label_tokens: int | None = Field(None, ge=1)  # None: 64


class Service:
    """State that the routes share: the student, its queue and metrics, and the shutdown flag."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model = model
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
            outcomes = await self._outcomes(items, options, request.receive)
        is_causal = self.model.student.card.reasons_first
        predictions = [
            _prediction(outcome, with_rationale=options.rationale, is_causal=is_causal)
            for outcome in outcomes
        ]
        return JSONResponse({"predictions": predictions, "student": self.model.name})

    async def completions(self, request: Request) -> Response:
        async with self._body(request) as body:
            items, options, stops = self._parse_completions(body)
            completions = await self._completions(items, options, request.receive)
        return JSONResponse(completions_response(self.model.name, completions, stops))

    async def chat(self, request: Request) -> Response:
        async with self._body(request) as body:
            items, options, stops = self._parse_chat(body)
            completions = await self._completions(items, options, request.receive)
        return JSONResponse(chat_response(self.model.name, completions[0], stops))

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
        return JSONResponse({"status": "ready", "student": self.model.name})

    async def metrics_page(self) -> Response:
        page = self.metrics.page(
            queued_rows=self.batcher.depth,
            body_bytes=self.body_reader.bytes_in_flight,
            ready=not self.is_stopping,
        )
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
            rationale=form.rationale, max_label_tokens=form.max_label_tokens
        )
        return self._items(form.inputs, "inputs"), options

    def _parse_completions(self, body: bytes) -> tuple[list[Item], GenerationOptions, list[str]]:
        form = self.body_reader.parse(body, CompletionForm)
        form.check_supported()
        items = self._items(form.inputs, "prompt", form.max_tokens)
        return items, self.model.completion_options, form.stops

    def _parse_chat(self, body: bytes) -> tuple[list[Item], GenerationOptions, list[str]]:
        form = self.body_reader.parse(body, ChatForm)
        form.check_supported()
        max_tokens = form.max_completion_tokens or form.max_tokens
        items = self._items([form.input], "messages", max_tokens)
        return items, self.model.completion_options, form.stops

    def _items(
        self, inputs: Sequence[Any], field: str, max_tokens: int | None = None
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
            self.model.item(value, f"{field}.{index}", max_tokens)
            for index, value in enumerate(inputs)
        ]

    # --- answers

    async def _completions(
        self, items: list[Item], options: GenerationOptions, receive: Receive
    ) -> list[Completion]:
        outcomes = await self._outcomes(items, options, receive)
        return [outcome.completion for outcome in outcomes if outcome.completion is not None]

    async def _outcomes(
        self, items: list[Item], options: GenerationOptions, receive: Receive
    ) -> list[Outcome]:
        """The model's answers. Raises ApiError: 429, 500, or 499 where the client leaves first."""
        answers = asyncio.create_task(self.batcher.ask(items, options))
        disconnect = asyncio.create_task(_wait_for_disconnect(receive))
        try:
            await asyncio.wait({answers, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise client_gone()
            return answers.result()
        finally:
            answers.cancel()
            disconnect.cancel()


async def _wait_for_disconnect(receive: Receive) -> None:
    """Return once the client goes away; its body has been read already."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _prediction(outcome: Outcome, *, with_rationale: bool, is_causal: bool) -> dict[str, Any]:
    answer = outcome.answer
    prediction = {
        "label": answer.label,
        "raw": answer.raw,
        "probability": answer.probability,
        "truncated": answer.truncated,
    }
    if with_rationale:
        prediction |= {"rationale": answer.rationale, "rationale_is_causal": is_causal}
    return prediction


def make_app(service: Service, token: str | None, *, local: bool) -> App:
    """The whole application. ``token``: None asks for none. ``local``: see ``Middleware``."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        service.batcher.close()

    # No documentation pages: FastAPI's load their scripts from other hosts.
    app = FastAPI(
        lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
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
        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.as_json(), error.status, headers=dict(error.headers))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        if request.url.path in routes:
            message = f"{request.method} is not allowed on this path"
            code = "wrong_method"
        else:
            message = f"no such path; the paths are {', '.join(routes)}"
            code = "no_such_path"
        return await refuse(
            request, ApiError(error.status_code, message, code, error.headers or {})
        )

    return Middleware(
        app,
        service.settings,
        service.body_reader,
        service.metrics,
        token=token,
        local=local,
        paths=frozenset(routes),
        open_paths=OPEN_PATHS,
    )
