"""Web application of the review page: access control, the page, and its routes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from dsbs.errors import DsbsError
from dsbs.files import digest
from dsbs.reporting.run import page_environment, source_hash, template_text
from dsbs.review.session import ORDERS, LabelForm, ReviewForm, ReviewSession
from dsbs.serving.middleware import App, BodyReader, Form, Metrics, Middleware, is_loopback
from dsbs.serving.settings import ApiError
from dsbs.tasks import Task

_HEADER = b"x-dsbs-review"
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_MAX_ROWS = 200  # of one answer
_PACKAGE = "dsbs.review"


# --- access control


@dataclass(frozen=True, slots=True)
class PageKey:
    """The secret token in a page's address, with the cookie name and CSRF token derived from it.

    ``port`` separates the cookies of several servers: browsers share cookies between ports.
    """

    token: str
    port: int

    @property
    def cookie(self) -> str:
        return f"dsbs-review-{self.port}"

    @property
    def csrf(self) -> str:
        """The value of the page's own header, which pages of other origins cannot send."""
        return hmac.new(self.token.encode(), b"csrf", hashlib.sha256).hexdigest()

    def check(self, scope: Any, headers: Mapping[bytes, bytes]) -> None:
        """Raises ApiError (403), with the same message for every cause.

        The page requires the token in a cookie or in its address; all other routes require the
        cookie and the header. Host reveals a page whose host name was pointed at this address (DNS
        rebinding); Origin reveals one of another host or port.
        """
        host = headers.get(b"host", b"")
        origin = headers.get(b"origin")
        is_page = scope["path"] == "/" and scope["method"] == "GET"
        is_allowed = is_loopback(b"//" + host) and origin in (None, b"http://" + host)
        if is_page:
            token = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
            is_allowed = is_allowed and (self._has_cookie(headers) or _equal(token, self.token))
        else:
            header = headers.get(_HEADER, b"").decode("latin-1")
            site = headers.get(b"sec-fetch-site", b"same-origin")
            is_allowed = is_allowed and site == b"same-origin"
            is_allowed = is_allowed and (origin is not None or scope["method"] == "GET")
            is_allowed = is_allowed and self._has_cookie(headers) and _equal(header, self.csrf)
        if not is_allowed:
            raise ApiError(403, "refused", "refused", _HEADERS)

    def _has_cookie(self, headers: Mapping[bytes, bytes]) -> bool:
        cookies = headers.get(b"cookie", b"").decode("latin-1").split(";")
        pairs = (cookie.strip().partition("=") for cookie in cookies)
        return any(name == self.cookie and _equal(value, self.token) for name, _, value in pairs)


def _equal(text: str, secret: str) -> bool:
    return hmac.compare_digest(text.encode(), secret.encode())


# --- the page and its routes


def make_app(session: ReviewSession, key: PageKey) -> App:
    """The application. All routes check the page's key; all but the page return JSON."""
    reader = BodyReader(session.settings)
    page, policy = _page(session, key)

    async def show(_: Request) -> Response:
        response = HTMLResponse(page, headers=_HEADERS | {"Content-Security-Policy": policy})
        response.set_cookie(key.cookie, key.token, httponly=True, samesite="strict")
        return response

    async def queue(request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(session.queue, dict(request.query_params))

    async def rows(request: Request) -> dict[str, Any]:
        numbers = _numbers(request.query_params.get("n", ""), len(session.rows))
        reviewer = request.query_params.get("reviewer", "")
        return await asyncio.to_thread(session.shown_rows, numbers, reviewer)

    async def summary(_: Request) -> dict[str, Any]:
        return await asyncio.to_thread(session.summary)

    async def label(request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(session.check_label, await read(request, LabelForm))

    async def reviews(request: Request) -> dict[str, Any]:
        return await asyncio.to_thread(session.save, await read(request, ReviewForm))

    async def read(request: Request, form: type[Form]) -> Form:
        async with reader.body(request.receive) as body:
            return reader.parse(body, form)

    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_api_route("/", show, methods=["GET"], response_model=None)
    routes: dict[str, tuple[str, Callable[[Request], Awaitable[dict[str, Any]]]]] = {
        "/queue": ("GET", queue),
        "/rows": ("GET", rows),
        "/summary": ("GET", summary),
        "/label": ("POST", label),
        "/reviews": ("POST", reviews),
    }
    for path, (method, endpoint) in routes.items():
        app.add_api_route(path, _as_json(endpoint), methods=[method], response_model=None)

    @app.exception_handler(ApiError)
    async def refuse(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.as_json(), error.status, headers=_HEADERS)

    @app.exception_handler(DsbsError)
    async def say(request: Request, error: DsbsError) -> Response:
        """A full disk or a damaged file: the page shows the message and tries again."""
        return await refuse(request, ApiError(503, error.problem, "unavailable"))

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        return await refuse(request, ApiError(error.status_code, "no such path", "no_such_path"))

    paths = frozenset({"/", *routes})
    return Middleware(app, session.settings, reader, Metrics(), check=key.check, paths=paths)


def _as_json(
    endpoint: Callable[[Request], Awaitable[dict[str, Any]]],
) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return JSONResponse(await endpoint(request), headers=_HEADERS)

    return respond


def _numbers(text: str, rows: int) -> list[int]:
    """The row numbers of a query. Raises ApiError (400)."""
    numbers = [int(n) for n in text.split(",") if n.isascii() and n.isdigit() and len(n) < 12]
    if not numbers or len(numbers) > _MAX_ROWS or max(numbers) >= rows:
        raise ApiError(400, f"give 1 to {_MAX_ROWS} row numbers", "no_rows")
    return numbers


def _page(session: ReviewSession, key: PageKey) -> tuple[str, str]:
    """The page's HTML and its Content-Security-Policy, which allows the page's own script and style
    and no other source.
    """
    from markupsafe import Markup

    style = template_text("base.css") + template_text("review.css", package=_PACKAGE)
    scripts = template_text("review.js", "dialogs.js", package=_PACKAGE)
    script = template_text("base.js") + scripts
    policy = (
        f"default-src 'none'; script-src {source_hash(script)}; style-src {source_hash(style)}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    boot = json.dumps(_boot(session, key)).replace("<", "\\u003c")  # no tag can end the element
    template = page_environment(_PACKAGE).get_template("review.html")
    page = template.render(
        title=f"{session.recipe.name}, {session.split}",
        style=Markup(style),
        script=Markup(script),
        boot=Markup(boot),
    )
    return page, policy


def _boot(session: ReviewSession, key: PageKey) -> dict[str, Any]:
    """What a page needs before it requests rows."""
    return {
        "key": digest(str(session.run.path.resolve()), session.split)[:12],
        "csrf": key.csrf,
        "reviewer": session.reviewer,
        "form": _label_form(session.task),
        "labels": list(session.task.head_labels),
        "orders": list(ORDERS.items()),
        "order": session.order,
        "reasons": session.reasons(),
        "has_gold": any(row.gold is not None for row in session.rows),
        "has_students": any(row.student is not None for row in session.rows),
    }


def _label_form(task: Task) -> dict[str, Any]:
    """The form in which a page lets a reviewer enter a label."""
    if task.has_choices:
        return {"kind": "choices"}
    if task.has_several_labels:
        return {"kind": "several", "labels": list(task.head_labels)}
    if task.labels is not None:
        return {"kind": "scale" if task.has_order else "labels", "labels": list(task.labels)}
    if task.part_names and task.section.fields:
        fields = [
            {
                "name": name,
                "type": section.type,
                "labels": list(section.labels or ()),
                "required": section.required,
            }
            for name, section in task.section.fields.items()
        ]
        return {"kind": "fields", "fields": fields}
    return {"kind": "text"}
