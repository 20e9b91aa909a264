"""OpenAI teacher: any OpenAI-compatible endpoint, through aiohttp.

A reply costs a third of the CPU time that the openai package takes for it. Nothing is retried here,
so that every failure reaches the endpoint pool's own limits.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from dsbs.annotation.backends import (
    Lane,
    Price,
    RejectedError,
    Reply,
    Request,
    Teacher,
    TransientError,
)
from dsbs.annotation.backends.adaptation import DEFAULT_REPLY_TOKENS, Adaptation
from dsbs.annotation.thoughts import read_message
from dsbs.config import EndpointSection, Recipe, TeacherSection
from dsbs.errors import PartialError, UserError

if TYPE_CHECKING:
    from aiohttp import ClientSession

_LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")
_CONNECT_S = 20.0


class OpenAITeacher(Teacher):
    """The endpoints of a recipe's teacher, all of them with the same model."""

    title = "OpenAI-compatible"
    takes_batches = True
    default_reply_tokens = DEFAULT_REPLY_TOKENS

    def __init__(self, recipe: Recipe) -> None:
        teacher = recipe.teacher
        self._endpoints = [
            OpenAIEndpoint(teacher, section, api_key(teacher, section), identity)
            for section, identity in zip(teacher.served_by, self.identities(recipe), strict=True)
        ]
        self.endpoints = self._endpoints

    async def close(self) -> None:
        for endpoint in self._endpoints:
            await endpoint.close()

    @classmethod
    def identities(cls, recipe: Recipe) -> list[str]:
        return [
            f"{section.base_url}#{recipe.teacher.endpoint}" for section in recipe.teacher.served_by
        ]

    @classmethod
    def list_price(cls, teacher: TeacherSection) -> Price | None:
        """The price in genai-prices' public list for the model at the first endpoint."""
        from genai_prices import Usage, calc_price

        def usd_per_million(**tokens: int) -> float:
            # the list has steps for long contexts; a small request has the base price
            price = calc_price(
                Usage(**tokens),
                model_ref=str(teacher.model),
                provider_api_url=teacher.served_by[0].base_url,
            )
            return 1000 * float(price.total_price)

        try:
            return Price(
                input=usd_per_million(input_tokens=1000),
                output=usd_per_million(output_tokens=1000),
                cached=usd_per_million(input_tokens=1000, cache_read_tokens=1000),
            )
        except LookupError:
            return None


class OpenAIEndpoint:
    """``POST {base_url}/chat/completions`` or ``/completions`` (OpenAI API reference)."""

    def __init__(
        self, teacher: TeacherSection, endpoint: EndpointSection, key: str | None, identity: str
    ) -> None:
        self.identity = identity
        self.adaptation = Adaptation()
        self.name = endpoint.base_url
        self.weight = endpoint.weight
        self.rpm = endpoint.rpm
        self.tpm = endpoint.tpm
        self._teacher = teacher
        self._secret = key
        self._key_variable = endpoint.api_key_env
        path = {"chat": "/chat/completions", "completions": "/completions"}[teacher.endpoint]
        self._url = endpoint.base_url + path
        self._proxy = _proxy(endpoint.base_url)
        self._session: ClientSession | None = None

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def complete(self, request: Request) -> Reply:
        """See ``Endpoint``."""
        timeout_s = self._teacher.timeout_s
        if self._session is None:
            self._session = _session(timeout_s, self._secret, self._url)
        while True:
            started = time.monotonic()
            sent = self.adaptation.apply(request.body)
            status, body, headers = await self._exchange(
                self._session.post,
                self._url,
                timeout_s,
                data=json.dumps(sent, ensure_ascii=False).encode(),
            )
            if not self.adaptation.learn(status, body, sent, request.body):
                break
        if status != 200:
            raise self.status_error(status, body, headers)
        try:
            text = body.decode()
            return read_reply(json.loads(text), text, seconds=time.monotonic() - started)
        except ValueError:
            raise TransientError("a reply that is not JSON", "unreadable") from None

    async def models(self, timeout_s: float) -> list[str] | None:
        """The models that the endpoint lists (``GET {base_url}/models``, free); None: no list.

        Raises what ``complete`` raises.
        """
        url = f"{self.name}/models"
        async with _session(timeout_s, self._secret, url) as session:
            status, body, headers = await self._exchange(session.get, url, timeout_s)
        if status in (404, 405, 501):
            return None
        if status != 200:
            raise self.status_error(status, body, headers)
        try:
            models = json.loads(body)
            if isinstance(models, dict):  # some providers send a bare list
                models = models["data"]
            return [str(model["id"]) for model in models]
        except (ValueError, KeyError, TypeError):
            raise TransientError(f"{url} is not a list of models", "unreadable") from None

    async def _exchange(
        self, send: Callable[..., Any], url: str, timeout_s: float, **body: bytes
    ) -> tuple[int, bytes, Mapping[str, str]]:
        """Status, body and headers of one request. Raises TransientError without a response."""
        import aiohttp

        try:
            async with send(url, proxy=self._proxy, allow_redirects=False, **body) as response:
                return response.status, await response.read(), response.headers
        except TimeoutError:
            raise TransientError(f"no answer within {timeout_s:g} s", "timeout") from None
        except (aiohttp.ClientError, OSError, UnicodeError) as error:
            raise self.connection_error(error) from None

    def connection_error(self, error: BaseException) -> TransientError:
        """The error for an exchange that brought no response."""
        reason = self.redact(str(error) or type(error).__name__)
        return TransientError(f"cannot reach {self.name} ({reason})", "connection")

    def status_error(self, status: int, body: bytes, headers: Mapping[str, str]) -> Exception:
        """The error for an HTTP status: a DsbsError, TransientError or RejectedError."""
        raw_message, code = error_message(body)
        message = self.redact(raw_message)
        model = self._teacher.model
        if status in (301, 302, 303, 307, 308):
            location = self.redact(headers.get("location", "another URL"))
            return UserError(
                f"{self.name} redirects to {location} (HTTP {status})",
                hint="set teacher.base_url to that URL",
            )
        if status == 401:
            hint = f"check the key in {self._key_variable}"
            if not self._secret:
                hint = f"put a key into {self._key_variable or 'teacher.api_key_env'}"
            return UserError(
                f"{self.name} does not accept the key (HTTP 401: {message})", hint=hint
            )
        if status == 403:
            return UserError(
                f"{self.name} refuses access (HTTP 403: {message})",
                hint=f"the key in {self._key_variable} may lack permission for model {model}",
            )
        if status == 404:
            return UserError(
                f"{self.name} has no such path or no model {model!r} (HTTP 404: {message})",
                hint="check teacher.model, and that teacher.base_url ends where /chat/completions "
                "begins (often /v1)",
            )
        if status == 402 or (status == 429 and code == "insufficient_quota"):
            return PartialError(
                f"{self.name}: the account has no credit left (HTTP {status}: {message})",
                hint="add credit, then run the same command: the replies so far are stored",
            )
        if status == 429:
            return TransientError(f"HTTP 429: {message}", "throttled", retry_after(headers))
        if status in (408, 409, 425) or status >= 500:
            return TransientError(f"HTTP {status}: {message}", "server error", retry_after(headers))
        if status == 400 and _names_model(raw_message, code, model):
            return UserError(
                f"{self.name} does not know model {model!r} (HTTP 400: {message})",
                hint="check teacher.model",
            )
        return RejectedError(f"HTTP {status}: {message}")

    def redact(self, text: str) -> str:
        """``text`` on one line, shortened, without the key or a proxy's credentials."""
        shown = " ".join(text.split()) or "no message"
        if self._secret:
            shown = shown.replace(self._secret, "[key]")
        return re.sub(r"//[^/@\s]+@", "//[credentials]@", shown)[:300]


def _session(timeout_s: float, key: str | None, url: str) -> ClientSession:
    """One pool of connections; how many are open is the caller's business."""
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
    """The proxy for a URL in the environment (HTTPS_PROXY, HTTP_PROXY, NO_PROXY)."""
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
        if not key.isascii() or any(character.isspace() for character in key):
            raise UserError(
                f"the key in {variable} contains a space or another invalid character",
                hint=f"export {variable}=<key> again, without quotes inside",
            )
        return key
    is_named = "api_key_env" in teacher.model_fields_set or variable != teacher.api_key_env
    if not is_named and urlsplit(endpoint.base_url).hostname in _LOOPBACK:
        return None  # a server on this machine seldom needs one
    raise UserError(
        f"no API key: the environment variable {variable} is not set",
        hint=f"export {variable}=<key>, or set teacher.api_key_env: null for an endpoint without "
        "keys",
    )


# --- reading responses


def read_reply(
    body: object, raw: str, *, seconds: float | None = None, lane: Lane = "online"
) -> Reply:
    """Read a completion body. Raises TransientError for anything else: the endpoint may recover."""
    try:
        assert isinstance(body, dict)
        choice = body["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        usage = body.get("usage") or {}
        text, reasoning = read_message(message)
        return Reply(
            text=text,
            finish_reason=_finish_reason(choice, message),
            prompt_tokens=_count(usage.get("prompt_tokens")),
            completion_tokens=_count(usage.get("completion_tokens")),
            reasoning=reasoning,
            cached_tokens=_cached_tokens(usage),
            lane=lane,
            seconds=seconds,
            raw=raw,
        )
    except (AssertionError, KeyError, IndexError, TypeError, AttributeError):
        raise TransientError("a reply without a choice in it", "unreadable") from None


def _finish_reason(choice: dict[str, Any], message: dict[str, Any]) -> str | None:
    if message.get("refusal"):
        return "content_filter"
    reason = choice.get("finish_reason")
    if isinstance(reason, str):
        return reason
    return None


def _cached_tokens(usage: Mapping[str, Any]) -> int | None:
    """Prompt tokens from the provider's cache: OpenAI's and vLLM's field, or DeepSeek's."""
    details = usage.get("prompt_tokens_details")
    if isinstance(details, dict):
        return _count(details.get("cached_tokens"))
    return _count(usage.get("prompt_cache_hit_tokens"))


def _count(value: object) -> int | None:
    if isinstance(value, int) and value >= 0:
        return value
    return None


def error_message(body: bytes | str) -> tuple[str, str]:
    """Message and code of an error's body, whatever form it has."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else body
    try:
        value = json.loads(text)
    except ValueError:
        return text, ""
    if isinstance(value, dict):
        value = value.get("error", value)
    if not isinstance(value, dict):
        return str(value), ""
    return str(value.get("message", value)), str(value.get("code") or "")


def _names_model(message: str, code: str, model: str | None) -> bool:
    """Whether an error is about the model's name."""
    if "model_not_found" in code:
        return True
    text = message.lower()
    phrases = ("not exist", "not found", "unknown", "invalid model")
    return bool(model) and str(model).lower() in text and any(words in text for words in phrases)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Retry-After (RFC 9110, 10.2.3), seconds or a date, or ``retry-after-ms``; in seconds."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" in headers:
            return max(0.0, float(headers["retry-after"]))
    except ValueError:
        return _seconds_until(headers.get("retry-after", ""))
    return None


def _seconds_until(date: str) -> float | None:
    try:
        return max(0.0, (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
