"""Any OpenAI-compatible endpoint, through the openai package. Retries are left to the engine, so that 429s reach it."""

from __future__ import annotations

import json
import os
from typing import Any
from urllib.parse import urlsplit

from dsbs.annotate.teachers.base import RejectedError, Reply, Request, TransientError
from dsbs.errors import PartialError, UserError
from dsbs.recipe import Recipe

_LOOPBACK = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


class OpenAITeacher:
    """``POST {base_url}/chat/completions`` or ``/completions`` (OpenAI API reference, "Chat" and "Completions")."""

    max_concurrency: int | None = None

    def __init__(self, recipe: Recipe) -> None:
        key = _key(recipe)
        self._connect(recipe, recipe.teacher.base_url, key)
        self.identity = f"{recipe.teacher.base_url}#{recipe.teacher.endpoint}"

    def _connect(self, recipe: Recipe, base_url: str, key: str | None) -> None:
        import openai

        teacher = recipe.teacher
        self._secret = key
        self._section = teacher
        self._url = base_url
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key or "none",
            max_retries=0,
            timeout=openai.Timeout(teacher.timeout_s, connect=min(teacher.timeout_s, 20.0)),
        )

    async def close(self) -> None:
        await self._client.close()

    async def complete(self, request: Request) -> Reply:
        import openai

        path = "/chat/completions" if self._section.endpoint == "chat" else "/completions"
        try:
            raw = await self._client.post(path, body=request.body, cast_to=object)
        except openai.APITimeoutError:
            raise TransientError(f"no answer within {self._section.timeout_s:g} s") from None
        except openai.APIConnectionError as error:
            raise TransientError(f"cannot reach {self._url} ({self._clean(error.__cause__ or error)})") from None
        except openai.APIStatusError as error:
            raise self._status(error) from None
        except (openai.APIResponseValidationError, json.JSONDecodeError, UnicodeDecodeError, ValueError):
            raise TransientError("a reply that is not JSON") from None
        return _reply(raw)

    def _status(self, error: Any) -> Exception:
        """What an HTTP status means for this request and for all others."""
        status: int = error.status_code
        said = self._clean(_message(error))
        variable = self._section.api_key_env
        if status == 401:
            hint = f"check the key in {variable}" if self._secret else f"put a key into {variable or 'teacher.api_key_env'}"
            return UserError(f"{self._url} does not accept the key (HTTP 401: {said})", hint=hint)
        if status == 403:
            return UserError(
                f"{self._url} refuses access (HTTP 403: {said})",
                hint=f"the key in {variable} may lack rights for model {self._section.model}",
            )
        if status == 404:
            return UserError(
                f"{self._url} has no such path or no model {self._section.model!r} (HTTP 404: {said})",
                hint="check teacher.model, and that teacher.base_url ends where /chat/completions begins (often /v1)",
            )
        if status == 402 or (status == 429 and getattr(error, "code", None) == "insufficient_quota"):
            return PartialError(
                f"{self._url}: the account has no credit left (HTTP {status}: {said})",
                hint="add credit, then run the same command: what was bought is kept",
            )
        if status in (408, 409, 425, 429) or status >= 500:
            return TransientError(f"HTTP {status}: {said}", _retry_after(error), throttled=status == 429)
        if status == 400 and _names_model(error, self._section.model):
            return UserError(
                f"{self._url} does not know model {self._section.model!r} (HTTP 400: {said})",
                hint="check teacher.model",
            )
        return RejectedError(f"HTTP {status}: {said}")

    def _clean(self, text: object) -> str:
        shown = " ".join(str(text).split())[:300] or "no message"
        return shown.replace(self._secret, "[key]") if self._secret else shown


def _key(recipe: Recipe) -> str | None:
    """The API key from the environment. Raises UserError where one is needed and missing."""
    teacher = recipe.teacher
    if teacher.api_key_env is None:
        return None
    key = os.environ.get(teacher.api_key_env, "").strip()
    if key:
        if not key.isascii() or any(c.isspace() for c in key):
            raise UserError(
                f"the key in {teacher.api_key_env} has a space or a character no key has",
                hint=f"export {teacher.api_key_env}=<key> again, without quotes inside",
            )
        return key
    named = "api_key_env" in teacher.model_fields_set
    if not named and urlsplit(teacher.base_url).hostname in _LOOPBACK:
        return None  # a server on this machine seldom wants one
    raise UserError(
        f"no API key: the environment variable {teacher.api_key_env} is not set",
        hint=f"export {teacher.api_key_env}=<key>, or set teacher.api_key_env: null for an endpoint without keys",
    )


def _reply(raw: object) -> Reply:
    """Read a completion body; anything but one is a fault of the endpoint that may heal."""
    try:
        assert isinstance(raw, dict)
        choice = raw["choices"][0]
        message = choice["message"] if "message" in choice else {"content": choice["text"]}
        text = message.get("content")
        usage = raw.get("usage") or {}
        if text is None:
            text = message.get("refusal") or ""
        if not isinstance(text, str):  # a list of content parts
            text = "".join(part.get("text", "") for part in text)
        return Reply(
            text=text,
            finish_reason="content_filter" if message.get("refusal") else choice.get("finish_reason"),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
            reasoning=_reasoning(message),
            raw=raw,
        )
    except (AssertionError, KeyError, IndexError, TypeError, AttributeError):
        raise TransientError("a reply without a choice in it") from None


def _reasoning(message: dict[str, Any]) -> str | None:
    """A reasoning model's text beside the answer: `reasoning_content` (DeepSeek, vLLM, llama.cpp) or `reasoning`."""
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str) and message[name].strip():
            return str(message[name])
    return None


def _message(error: Any) -> str:
    body = error.body
    if isinstance(body, dict):
        inner = body.get("error", body)
        return str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    return str(body or error.message)


def _names_model(error: Any, model: str | None) -> bool:
    code = str(getattr(error, "code", "") or "")
    text = _message(error).lower()
    return "model_not_found" in code or (
        bool(model)
        and str(model).lower() in text
        and any(w in text for w in ("not exist", "not found", "unknown", "invalid model"))
    )


def _retry_after(error: Any) -> float | None:
    """Retry-After (RFC 9110, 10.2.3) in seconds or as a date; ``retry-after-ms`` where an endpoint sends it."""
    headers = error.response.headers
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" in headers:
            return max(0.0, float(headers["retry-after"]))
    except ValueError:
        from datetime import UTC, datetime
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, (parsedate_to_datetime(headers["retry-after"]) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            return None
    return None
