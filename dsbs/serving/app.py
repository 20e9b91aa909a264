"""The paths of a server, over one student."""

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
from dsbs.serving.chat_completions import ChatForm, CompletionForm, chat_body, completions_body
from dsbs.serving.metrics import CONTENT_TYPE, Metrics
from dsbs.serving.middleware import App, Middleware
from dsbs.serving.model import Completion, GenerationOptions, Item, Model, Outcome
from dsbs.serving.settings import ApiError, Settings, gone, stopping

OPEN_PATHS = frozenset(
    {"/health"}
)  # without the token: what looks whether a server lives seldom has it


class PredictForm(BaseModel, frozen=True, extra="forbid"):
    """The body of ``POST /predict``."""

    inputs: list[Any]  # texts, or rows of fields
    rationale: bool = False
    max_label_tokens: int | None = Field(None, ge=1)  # None: 64


class Service:
    """What the paths share: the student, its queue, the counts, and whether the server is being stopped."""

    def __init__(self, model: Model, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.metrics, self.intake = Metrics(), BodyReader(settings)
        self.batcher: Batcher[Item, GenerationOptions, Outcome] = Batcher(
            model.answer,
            self.metrics,
            batch_size=settings.batch_size,
            max_wait_s=settings.max_wait_ms / 1000,
            most=settings.queue,
        )
        self.stops = False
        self._since = int(time.time())

    # --- paths

    async def predict(self, request: Request) -> Response:
        async with self._body(request) as body:
            items, how = self._predictable(body)
            outcomes = await self._outcomes(items, how, request.receive)
        causal = self.model.student.card.reasons_first
        predictions = [_prediction(outcome, how.rationale, causal) for outcome in outcomes]
        return JSONResponse({"predictions": predictions, "student": self.model.name})

    async def completions(self, request: Request) -> Response:
        async with self._body(request) as body:
            items, how, marks = self._completable(body)
            made = await self._completions(items, how, request.receive)
        return JSONResponse(completions_body(self.model.name, made, marks))

    async def chat(self, request: Request) -> Response:
        async with self._body(request) as body:
            items, how, marks = self._chattable(body)
            made = await self._completions(items, how, request.receive)
        return JSONResponse(chat_body(self.model.name, made[0], marks))

    async def models(self) -> Response:
        listed = {
            "id": self.model.name,
            "object": "model",
            "created": self._since,
            "owned_by": "dsbs",
        }
        return JSONResponse({"object": "list", "data": [listed]})

    async def health(self) -> Response:
        if self.stops:
            raise stopping()
        return JSONResponse({"status": "ready", "student": self.model.name})

    async def page_of_metrics(self) -> Response:
        page = self.metrics.page(
            queue=self.batcher.depth, bodies=self.intake.held, ready=not self.stops
        )
        return Response(page, headers={"content-type": CONTENT_TYPE})

    def _body(self, request: Request) -> AbstractAsyncContextManager[bytes]:
        """Whoever had sent the headers when the stop came is answered: only here is it asked for. Raises Refused (503)."""
        if self.stops:
            raise stopping()
        return self.intake.body(request.receive)

    # --- what they read. A parsed body goes with the call that parsed it: it may take twenty times its bytes, and what of it
    # the student does not read would else stay for as long as its rows wait

    def _predictable(self, body: bytes) -> tuple[list[Item], GenerationOptions]:
        form = self.intake.parse(body, PredictForm)
        how = self.model.how(rationale=form.rationale, tokens=form.max_label_tokens)
        return self._items(form.inputs, "inputs"), how

    def _completable(self, body: bytes) -> tuple[list[Item], GenerationOptions, list[str]]:
        form = self.intake.parse(body, CompletionForm)
        form.refuse()
        return (
            self._items(form.inputs, "prompt", form.max_tokens),
            self.model.how_completed,
            form.marks,
        )

    def _chattable(self, body: bytes) -> tuple[list[Item], GenerationOptions, list[str]]:
        form = self.intake.parse(body, ChatForm)
        form.refuse()
        tokens = form.max_completion_tokens or form.max_tokens
        return self._items([form.input], "messages", tokens), self.model.how_completed, form.marks

    def _items(
        self, given: Sequence[Any], where: str, most_tokens: int | None = None
    ) -> list[Item]:
        """Raises Refused: 400, 413."""
        if not given:
            raise ApiError(400, f"{where} is empty", "invalid_value")
        if len(given) > self.settings.max_rows:
            raise ApiError(
                413,
                f"{where} has {len(given)} rows; {self.settings.max_rows} at most",
                "too_many_rows",
            )
        return [
            self.model.item(one, f"{where}.{place}", most_tokens) for place, one in enumerate(given)
        ]

    # --- what they do

    async def _completions(
        self, items: list[Item], how: GenerationOptions, receive: Receive
    ) -> list[Completion]:
        outcomes = await self._outcomes(items, how, receive)
        return [outcome.completion for outcome in outcomes if outcome.completion is not None]

    async def _outcomes(
        self, items: list[Item], how: GenerationOptions, receive: Receive
    ) -> list[Outcome]:
        """The model's answers. Raises Refused: 429, 500, and 499 where the client goes away before."""
        answers = asyncio.create_task(self.batcher.ask(items, how))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({answers, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not answers.done():
                raise gone()
            return answers.result()
        finally:
            answers.cancel()
            leaving.cancel()


async def _left(receive: Receive) -> None:
    """Until the client goes away; its body has been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _prediction(outcome: Outcome, rationale: bool, causal: bool) -> dict[str, Any]:
    answer = outcome.answer
    row = {
        "label": answer.label,
        "raw": answer.raw,
        "probability": answer.probability,
        "truncated": answer.truncated,
    }
    return row | (
        {"rationale": answer.rationale, "rationale_is_causal": causal} if rationale else {}
    )


def make_app(service: Service, token: str | None, *, local: bool) -> App:
    """The whole application; ``token`` is what clients must bear, None: nothing; ``local``: see ``Middleware``."""

    @asynccontextmanager
    async def alive(_: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        service.batcher.close()

    # no pages about itself: FastAPI's fetch their scripts from elsewhere
    app = FastAPI(
        lifespan=alive, docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False
    )
    routes: dict[str, tuple[str, Callable[..., Awaitable[Response]]]] = {
        "/predict": ("POST", service.predict),
        "/v1/completions": ("POST", service.completions),
        "/v1/chat/completions": ("POST", service.chat),
        "/v1/models": ("GET", service.models),
        "/health": ("GET", service.health),
        "/metrics": ("GET", service.page_of_metrics),
    }
    for path, (method, answer) in routes.items():
        app.add_api_route(path, answer, methods=[method], response_model=None)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, refused: ApiError) -> Response:
        return JSONResponse(refused.as_json(), refused.status, headers=dict(refused.headers))

    @app.exception_handler(HTTPException)
    async def no_such(request: Request, error: HTTPException) -> Response:
        known = routes.get(request.url.path)
        said = (
            f"{request.method} is not for this path"
            if known
            else f"there is no such path; there are {', '.join(routes)}"
        )
        refused = ApiError(
            error.status_code,
            said,
            "wrong_method" if known else "no_such_path",
            error.headers or {},
        )
        return await refuse(request, refused)

    return Middleware(
        app, service.settings, service.intake, service.metrics,
        token=token, local=local, paths=frozenset(routes), open_paths=OPEN_PATHS,
    )  # fmt: skip
