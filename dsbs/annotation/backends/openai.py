"""Any OpenAI-compatible endpoint over aiohttp: a reply costs a third of the CPU time that the openai package takes for it.

Nothing is retried here, so that every failure reaches the engine's own limits.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from dsbs.annotation.backends.base import (
    Failure,
    Lane,
    RejectedError,
    Reply,
    Request,
    TransientError,
)
from dsbs.config import EndpointSection, Recipe, TeacherSection
from dsbs.errors import PartialError, UserError

if TYPE_CHECKING:
    from aiohttp import ClientSession

_LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
_CONNECT_S = 20.0


class OpenAITeacher:
    """The endpoints of a recipe's teacher, all of them with the same model."""

    max_concurrency: int | None = None

    def __init__(self, recipe: Recipe) -> None:
        teacher = recipe.teacher
        self.endpoints = [
            OpenAIEndpoint(teacher, one, api_key(teacher, one), identity)
            for one, identity in zip(teacher.served_by, identities(recipe), strict=True)
        ]

    async def close(self) -> None:
        for endpoint in self.endpoints:
            await endpoint.close()


def in_flight(recipe: Recipe) -> int:
    return recipe.annotate.concurrency


def identities(recipe: Recipe) -> list[str]:
    """What the endpoints are called in the keys of their replies."""
    return [f"{one.base_url}#{recipe.teacher.endpoint}" for one in recipe.teacher.served_by]


class OpenAIEndpoint:
    """``POST {base_url}/chat/completions`` or ``/completions`` (OpenAI API reference, "Chat" and "Completions")."""

    def __init__(
        self, teacher: TeacherSection, endpoint: EndpointSection, key: str | None, identity: str
    ) -> None:
        self.identity = identity
        self.name = endpoint.base_url
        self.weight, self.rpm, self.tpm = endpoint.weight, endpoint.rpm, endpoint.tpm
        self._teacher = teacher
        self._secret = key
        self._key_from = endpoint.api_key_env
        self._url = endpoint.base_url + (
            "/chat/completions" if teacher.endpoint == "chat" else "/completions"
        )
        self._proxy = _proxy(endpoint.base_url)
        self._session: ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def complete(self, request: Request) -> Reply:
        session = self._session = self._session or _session(
            self._teacher.timeout_s, self._secret, self._url
        )
        began = time.monotonic()
        status, said, headers = await self._exchange(
            session.post,
            self._url,
            self._teacher.timeout_s,
            data=json.dumps(request.body, ensure_ascii=False).encode(),
        )
        if status != 200:
            raise self._status(status, said, headers)
        try:
            text = said.decode()
            return read_reply(json.loads(text), text, seconds=time.monotonic() - began)
        except ValueError:
            raise TransientError("a reply that is not JSON", "unreadable") from None

    async def models(self, timeout_s: float) -> list[str] | None:
        """What the endpoint says that it serves, by ``GET {base_url}/models``, which costs nothing; None: it has no such list.

        Raises what ``complete`` raises.
        """
        url = f"{self.name}/models"
        async with _session(timeout_s, self._secret, url) as session:
            status, said, headers = await self._exchange(session.get, url, timeout_s)
        if status in (404, 405, 501):
            return None
        if status != 200:
            raise self._status(status, said, headers)
        try:
            found = json.loads(said)
            listed = (
                found["data"] if isinstance(found, dict) else found
            )  # a bare list at some providers
            return [str(one["id"]) for one in listed]
        except (ValueError, KeyError, TypeError):
            raise TransientError(f"{url} is no list of models", "unreadable") from None

    async def _exchange(
        self, send: Callable[..., Any], url: str, timeout_s: float, **body: bytes
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Status, body and headers of one request. Raises TransientError where none came."""
        import aiohttp

        try:
            async with send(url, proxy=self._proxy, allow_redirects=False, **body) as response:
                return response.status, await response.read(), response.headers
        except TimeoutError:
            raise TransientError(f"no answer within {timeout_s:g} s", "timeout") from None
        except (aiohttp.ClientError, OSError, UnicodeError) as error:
            raise TransientError(
                f"cannot reach {self.name} ({self._clean(error or type(error).__name__)})",
                "connection",
            ) from None

    def _status(self, status: int, body: bytes, headers: Mapping[str, str]) -> Exception:
        """What an HTTP status means for this request and for all others."""
        message, code = error_of(body)
        said, model = self._clean(message), self._teacher.model
        if status in (301, 302, 303, 307, 308):
            return UserError(
                f"{self.name} redirects to {self._clean(headers.get('location', 'elsewhere'))} (HTTP {status})",
                hint="put the URL that it redirects to into teacher.base_url",
            )
        if status == 401:
            hint = (
                f"check the key in {self._key_from}"
                if self._secret
                else f"put a key into {self._key_from or 'teacher.api_key_env'}"
            )
            return UserError(f"{self.name} does not accept the key (HTTP 401: {said})", hint=hint)
        if status == 403:
            return UserError(
                f"{self.name} refuses access (HTTP 403: {said})",
                hint=f"the key in {self._key_from} may lack rights for model {model}",
            )
        if status == 404:
            return UserError(
                f"{self.name} has no such path or no model {model!r} (HTTP 404: {said})",
                hint="check teacher.model, and that teacher.base_url ends where /chat/completions begins (often /v1)",
            )
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            return PartialError(
                f"{self.name}: the account has no credit left (HTTP {status}: {said})",
                hint="add credit, then run the same command: what was bought is kept",
            )
        if status in (408, 409, 425, 429) or status >= 500:
            kind: Failure = "throttled" if status == 429 else "server error"
            return TransientError(f"HTTP {status}: {said}", kind, retry_after(headers))
        if status == 400 and _names_model(message, code, model):
            return UserError(
                f"{self.name} does not know model {model!r} (HTTP 400: {said})",
                hint="check teacher.model",
            )
        return RejectedError(f"HTTP {status}: {said}")

    def _clean(self, text: object) -> str:
        shown = " ".join(str(text).split()) or "no message"
        shown = shown.replace(self._secret, "[key]") if self._secret else shown
        return re.sub(r"//[^/@\s]+@", "//[credentials]@", shown)[:300]  # a proxy's, for one


def _session(timeout_s: float, key: str | None, url: str) -> ClientSession:
    """One pool of connections; how many are open is the engine's business."""
    import aiohttp

    tls: Any = True
    if url.startswith("https"):
        import ssl

        import certifi

        tls = ssl.create_default_context()
        tls.load_verify_locations(certifi.where())  # a slim image has no certificates of its own
    headers = {"Content-Type": "application/json", "User-Agent": "dsbs"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ssl=tls),
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, _CONNECT_S)),
        headers=headers,
    )


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for a URL (HTTPS_PROXY, HTTP_PROXY, NO_PROXY)."""
    parts = urlsplit(url)
    if not parts.hostname or parts.hostname in _LOOPBACK or proxy_bypass(parts.hostname):
        return None
    return getproxies().get(parts.scheme)


def api_key(teacher: TeacherSection, endpoint: EndpointSection) -> str | None:
    """An endpoint's key from the environment. Raises UserError where one is needed and missing."""
    variable = endpoint.api_key_env
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if key:
        if not key.isascii() or any(c.isspace() for c in key):
            raise UserError(
                f"the key in {variable} has a space or a character no key has",
                hint=f"export {variable}=<key> again, without quotes inside",
            )
        return key
    named = "api_key_env" in teacher.model_fields_set or variable != teacher.api_key_env
    if not named and urlsplit(endpoint.base_url).hostname in _LOOPBACK:
        return None  # a server on this machine seldom wants one
    raise UserError(
        f"no API key: the environment variable {variable} is not set",
        hint=f"export {variable}=<key>, or set teacher.api_key_env: null for an endpoint without keys",
    )


def read_reply(
    body: object, raw: str, *, seconds: float | None = None, lane: Lane = "online"
) -> Reply:
    """Read a completion body; anything but one is a fault of the endpoint that may heal (TransientError)."""
    try:
        assert isinstance(body, dict)
        choice = body["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        text = message.get("content")
        usage = body.get("usage") or {}
        if text is None:
            text = message.get("refusal") or ""
        if not isinstance(text, str):  # a list of content parts
            text = "".join(part.get("text", "") for part in text)
        ended = choice.get("finish_reason")
        return Reply(
            text=_whole(text),
            finish_reason="content_filter"
            if message.get("refusal")
            else ended
            if isinstance(ended, str)
            else None,
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
            reasoning=_reasoning(message),
            cached_tokens=_cached(usage),
            lane=lane,
            seconds=seconds,
            raw=raw,
        )
    except (AssertionError, KeyError, IndexError, TypeError, AttributeError):
        raise TransientError("a reply without a choice in it", "unreadable") from None


def _cached(usage: Mapping[str, Any]) -> int | None:
    """Prompt tokens out of the provider's cache: OpenAI's and vLLM's field, or DeepSeek's."""
    details = usage.get("prompt_tokens_details")
    return _count(
        details.get("cached_tokens")
        if isinstance(details, dict)
        else usage.get("prompt_cache_hit_tokens")
    )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None


def _reasoning(message: dict[str, Any]) -> str | None:
    """A reasoning model's text beside the answer: `reasoning_content` (DeepSeek, vLLM, llama.cpp) or `reasoning`."""
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str) and message[name].strip():
            return _whole(message[name])
    return None


def _whole(text: str) -> str:
    """Half of a surrogate pair, which a token budget may leave, is no character, and no file can hold it."""
    return text.encode("utf-8", "replace").decode()


def error_of(body: bytes | str) -> tuple[str, str]:
    """Message and code of an error's body, whatever form it has."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        said = json.loads(text)
    except ValueError:
        return text, ""
    inner = said.get("error", said) if isinstance(said, dict) else said
    if not isinstance(inner, dict):
        return str(inner), ""
    return str(inner.get("message", inner)), str(inner.get("code") or "")


def _names_model(message: str, code: str, model: str | None) -> bool:
    text = message.lower()
    return "model_not_found" in code or (
        bool(model)
        and str(model).lower() in text
        and any(w in text for w in ("not exist", "not found", "unknown", "invalid model"))
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Retry-After (RFC 9110, 10.2.3) in seconds or as a date; ``retry-after-ms`` where an endpoint sends it."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" in headers:
            return max(0.0, float(headers["retry-after"]))
    except ValueError:
        from datetime import UTC, datetime
        from email.utils import parsedate_to_datetime

        try:
            return max(
                0.0,
                (
                    parsedate_to_datetime(headers.get("retry-after", "")) - datetime.now(UTC)
                ).total_seconds(),
            )
        except (ValueError, TypeError):
            return None
    return None
