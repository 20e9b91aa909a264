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
from dataclasses import replace
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
    completion,
    parsed_body,
)
from dsbs.annotation.backends.adaptation import DEFAULT_REPLY_TOKENS, Adaptation
from dsbs.annotation.backends.faults import (
    ErrorBody,
    classify,
    ending,
    error_body,
    error_inside,
)
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
            seconds = time.monotonic() - started
            try:
                if not 200 <= status < 300:
                    raise self.status_error(status, body, headers)
                return self.read_reply(body, headers, seconds=seconds)
            except Exception as error:
                refused = status
                if 200 <= status < 300 and isinstance(error, RejectedError):
                    refused = 400  # an error inside a 200
                if not self.adaptation.learn(refused, body, sent, request.body):
                    raise

    def read_reply(
        self,
        body: bytes | str,
        headers: Mapping[str, str],
        *,
        seconds: float | None = None,
        lane: Lane = "online",
    ) -> Reply:
        """Read the body of a 200, which may hold an error. Raises what ``complete`` raises."""
        try:
            text = body if isinstance(body, str) else body.decode()
            value = parsed_body(text)
        except ValueError:
            shown = self.redact(error_body(body).message)
            raise TransientError(f"a reply that is not JSON: {shown}", "unreadable") from None
        reply = completion(value, text, seconds, lane)
        failure = self._failure(value, reply, headers)
        if failure is None:
            return reply
        is_uncounted = reply.completion_tokens is None and _is_empty(failure)
        if reply.is_billed or is_uncounted:
            return replace(reply, failure=failure)
        raise failure

    def _failure(self, value: object, reply: Reply, headers: Mapping[str, str]) -> Exception | None:
        """Why the body of a 200 holds no answer; None: it does."""
        error = error_inside(value)
        if error is not None:
            return self.error(error.status, error, headers)
        if not isinstance(value, dict) or not isinstance(value.get("choices"), list):
            return TransientError("a reply without choices", "unreadable")
        if not value["choices"]:
            return TransientError("a reply whose list of choices is empty", "empty")
        how = ending(reply.finish_reason)
        if how == "broken off":
            message = f"the reply broke off (finish_reason {reply.finish_reason})"
            return TransientError(message, "broken off")
        if reply.text or how in ("cut", "filtered") or (reply.is_billed and _has_text(value)):
            return None
        return TransientError("a reply without a text", "empty")

    async def models(self, timeout_s: float) -> list[dict[str, Any]] | None:
        """The models that the endpoint lists (``GET {base_url}/models``, free); None: no list.

        Each has an ``id``; other fields differ between providers.

        Raises what ``complete`` raises.
        """
        url = f"{self.name}/models"
        async with _session(timeout_s, self._secret, url) as session:
            status, body, headers = await self._exchange(session.get, url, timeout_s)
        if status in (404, 405, 501):
            return None
        if status != 200:
            error = self.status_error(status, body, headers)
            raise getattr(error, "stop", None) or error
        try:
            models = json.loads(body)
            if isinstance(models, dict):  # some providers send a bare list
                models = models["data"]
            return [{**model, "id": str(model["id"])} for model in models]
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

    def status_error(self, status: int, body: bytes | str, headers: Mapping[str, str]) -> Exception:
        """The error for an HTTP status: a DsbsError, TransientError or RejectedError."""
        return self.error(status, error_body(body), headers)

    def error(self, status: int | None, error: ErrorBody, headers: Mapping[str, str]) -> Exception:
        """The error for what an endpoint says; ``status`` None: it names none, inside a 200."""
        blame = classify(status, error)
        if blame in ("unclear", "parameter") and _names_model(error.message, self._teacher.model):
            blame = "recipe"
        shown = f"HTTP {status or 200}: {self.redact(error.message)}"
        if blame == "throttled":
            return TransientError(shown, "throttled", retry_after(headers))
        if blame == "endpoint":
            return TransientError(shown, "server error", retry_after(headers))
        if blame == "account":
            return self._account_error(shown, error)
        if blame == "recipe":
            stop = self._recipe_error(status, shown, headers)
            if status == 403:  # a filter that is not in the table, or the key
                return RejectedError(shown, "unclear", stop=stop)
            return stop
        return RejectedError(shown, blame, parameter=error.parameter)

    def _account_error(self, shown: str, error: ErrorBody) -> PartialError:
        if "enqueued" in shown.lower() or "token_limit_exceeded" in error.codes:
            return PartialError(
                f"{self.name}: the queue of batches is full ({shown})",
                hint="run the same command again when some of them have completed: what was "
                "submitted is not submitted twice",
            )
        return PartialError(
            f"{self.name}: the account has no credit left, or is blocked ({shown})",
            hint="add credit or raise its limit, then run the same command: the replies so far are "
            "stored",
        )

    def _recipe_error(
        self, status: int | None, shown: str, headers: Mapping[str, str]
    ) -> UserError:
        model = self._teacher.model
        if status is not None and 300 <= status < 400:
            location = self.redact(headers.get("location", "another URL"))
            return UserError(
                f"{self.name} redirects to {location} (HTTP {status})",
                hint="set teacher.base_url to that URL",
            )
        if status == 401 or "api key" in shown.lower():
            hint = f"check the key in {self._key_variable}"
            if not self._secret:
                hint = f"put a key into {self._key_variable or 'teacher.api_key_env'}"
            return UserError(f"{self.name} does not accept the key ({shown})", hint=hint)
        if status == 403:
            return UserError(
                f"{self.name} refuses access ({shown})",
                hint=f"the key in {self._key_variable} may lack permission for model {model}",
            )
        if status in (404, 405):
            return UserError(
                f"{self.name} has no such path or no model {model!r} ({shown})",
                hint="check teacher.model, and that teacher.base_url ends where /chat/completions "
                "begins (often /v1)",
            )
        return UserError(
            f"{self.name} does not serve model {model!r} this way ({shown})",
            hint="check teacher.model and teacher.base_url",
        )

    def redact(self, text: str) -> str:
        """``text`` on one line, shortened, without the key or a proxy's credentials."""
        shown = " ".join(text.split()) or "no message"
        if self._secret:
            shown = shown.replace(self._secret, "[key]")
        credentials = (self._proxy or "").rpartition("@")[0].rpartition("//")[2]
        if credentials:
            shown = shown.replace(credentials, "[credentials]")
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


def _has_text(body: dict[str, Any]) -> bool:
    """Whether the first choice has a text, if only an empty one: null is none."""
    choice = body["choices"][0]
    if not isinstance(choice, dict):
        return False
    message = choice.get("message") or {"content": choice.get("text")}
    return isinstance(message, dict) and isinstance(message.get("content"), str)


def _is_empty(failure: Exception) -> bool:
    return isinstance(failure, TransientError) and failure.kind == "empty"


def _names_model(message: str, model: str | None) -> bool:
    """Whether an error is about the model's name."""
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
