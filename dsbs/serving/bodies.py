"""Request bodies: size, time and nesting limits, and strict JSON parsing."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dsbs.serving.settings import ApiError, Settings, busy, client_gone

MAX_ROW_VALUES = 64  # JSON values in a row; for a whole request, on average over its rows
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Form = TypeVar("Form", bound=BaseModel)
_MAX_DEPTH = 32  # levels of JSON; a row of fields is the third


class BodyReader:
    """Reads request bodies within the limits of ``settings``."""

    def __init__(self, settings: Settings) -> None:
        self._max_bytes = 1024 * settings.max_body_kb
        self._max_bytes_in_flight = 1024 * settings.bodies_kb
        self._timeout_s = settings.body_s
        self._max_values = MAX_ROW_VALUES * (settings.max_rows + 1)
        self.bytes_in_flight = 0

    def check_length(self, content_length: bytes | None) -> None:
        """Refuse by Content-Length, before anything is read. Raises ApiError (413)."""
        if content_length is not None and int(content_length) > self._max_bytes:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        limit_kb = self._max_bytes // 1024
        return ApiError(413, f"the body is larger than {limit_kb} KB", "body_too_large")

    @asynccontextmanager
    async def body(self, receive: Receive) -> AsyncIterator[bytes]:
        """A request's body; its bytes count as in flight until the request is done.

        Raises ApiError: 408 (too slow), 413 (too large), 429 (no memory left for bodies), 499 (the
        client went away).
        """
        chunks: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self._timeout_s):
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise client_gone()
                        chunk = message.get("body", b"")
                        more = message.get("more_body", False)
                        size += len(chunk)
                        self.bytes_in_flight += len(chunk)
                        if size > self._max_bytes:
                            raise self._too_large()
                        if self.bytes_in_flight > self._max_bytes_in_flight:
                            raise busy("the requests in flight use all the memory for bodies")
                        chunks.append(chunk)
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not arrive within {self._timeout_s:g} s", "body_too_slow"
                ) from None
            yield b"".join(chunks)
        finally:
            self.bytes_in_flight -= size

    def parse(self, body: bytes, form: type[Form]) -> Form:
        """Parse and validate a JSON object. Raises ApiError (400, 413)."""
        if count_values(body) > self._max_values:
            raise ApiError(
                413, f"the body contains more than {self._max_values} values", "body_too_large"
            )
        try:
            content = json.loads(body, parse_constant=_reject_constant)
        except RecursionError:
            raise _too_deep() from None
        except ValueError:  # not JSON, not UTF-8, or a number of thousands of digits
            raise ApiError(400, "the body is not valid JSON", "invalid_json") from None
        if not isinstance(content, dict):
            raise ApiError(400, "the body is not a JSON object", "invalid_json")
        _check_depth(content)
        if b"\\ud" in body or b"\\uD" in body:
            _check_surrogates(content)
        try:
            return form.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            field = ".".join(str(key) for key in first["loc"])
            message = f"{field}: {first['msg']}" if field else first["msg"]
            raise ApiError(400, message, "invalid_value") from None


def count_values(text: bytes) -> int:
    """An upper bound of the number of values in JSON text, without parsing it.

    Every value follows a comma or an opening bracket. Parsing a megabyte of empty lists takes a
    quarter of a second during which nobody else is served; this takes a hundredth of one.
    """
    without_escapes = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside_strings = b"".join(without_escapes.split(b'"')[::2])  # strings hold commas as well
    return outside_strings.count(b",") + outside_strings.count(b"[") + outside_strings.count(b"{")


def _reject_constant(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity: Python reads them, JSON does not have them


def _check_depth(content: dict[str, Any]) -> None:
    """Refuse deep nesting, level by level and without recursion."""
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise _too_deep()


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested more than {_MAX_DEPTH} levels deep", "invalid_json")


def _check_surrogates(content: dict[str, Any]) -> None:
    """Refuse half a surrogate pair: neither tokenizers nor UTF-8 responses can hold it."""
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, "the body contains half of a surrogate pair (\\ud800 to \\udfff)", "invalid_json"
        ) from None
