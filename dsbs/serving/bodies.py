"""Bodies: read while they fit, parsed where they are sound. What is not gets its status before it takes memory."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, MutableMapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dsbs.serving.settings import ROW_VALUES, ApiError, Settings, busy, gone, values_in

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Model = TypeVar("Model", bound=BaseModel)
_DEEPEST = 32  # levels of JSON; a row of fields is the third


class BodyReader:
    """Reads bodies; what all of them hold together stays below ``settings.bodies_kb``."""

    def __init__(self, settings: Settings) -> None:
        self._most, self._most_together, self._seconds = (
            1024 * settings.max_body_kb,
            1024 * settings.bodies_kb,
            settings.body_s,
        )
        self._values = ROW_VALUES * (settings.max_rows + 1)
        self.held = 0  # bytes of the requests in flight

    def refuse_length(self, length: bytes | None) -> None:
        """By the Content-Length alone, before anything is read. Raises Refused (413)."""
        if length is not None and int(length) > self._most:
            raise self._too_large()

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body has more than {self._most // 1024} KB", "body_too_large")

    @asynccontextmanager
    async def body(self, receive: Receive) -> AsyncIterator[bytes]:
        """A request's body, which counts as held until the request is done.

        Raises Refused: 408 where it is slow, 413 where it is too large, 429 where others take the room, 499.
        """
        parts: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(self._seconds):
                    more = True
                    while more:
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise gone()
                        part = message.get("body", b"")
                        more = message.get("more_body", False)
                        size += len(part)
                        self.held += len(part)
                        if size > self._most:
                            raise self._too_large()
                        if self.held > self._most_together:
                            raise busy("the requests in flight take all the room for bodies")
                        parts.append(part)
            except TimeoutError:
                raise ApiError(
                    408, f"the body did not come within {self._seconds:g} s", "body_too_slow"
                ) from None
            yield b"".join(parts)
        finally:
            self.held -= size

    def parse(self, body: bytes, form: type[Model]) -> Model:
        """A JSON object as ``form`` has it. Raises Refused (400, 413)."""
        if values_in(body) > self._values:
            raise ApiError(413, f"the body holds more than {self._values} values", "body_too_large")
        try:
            found = json.loads(body, parse_constant=_no_number)
        except RecursionError:
            raise _too_deep() from None
        except ValueError:  # no JSON, no UTF-8, a number of thousands of digits
            raise ApiError(400, "the body is not valid JSON", "invalid_json") from None
        if not isinstance(found, dict):
            raise ApiError(400, "the body is not a JSON object", "invalid_json")
        _refuse_deep(found)
        if b"\\ud" in body or b"\\uD" in body:
            _refuse_half_characters(found)
        try:
            return form.model_validate(found)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ApiError(
                400, f"{where}: {first['msg']}" if where else first["msg"], "invalid_value"
            ) from None


def _no_number(name: str) -> float:
    raise ValueError(name)  # NaN and Infinity, which Python reads and JSON has not


def _refuse_deep(found: dict[str, Any]) -> None:
    """Level by level, without recursion of its own."""
    level: list[Any] = [found]
    for _ in range(_DEEPEST):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return
    raise _too_deep()


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _too_deep() -> ApiError:
    return ApiError(400, f"the body is nested more than {_DEEPEST} levels deep", "invalid_json")


def _refuse_half_characters(found: dict[str, Any]) -> None:
    """Half of a surrogate pair is no character: tokenizers and answers in UTF-8 cannot hold it."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(
            400, "the body holds half of a surrogate pair (\\ud800 to \\udfff)", "invalid_json"
        ) from None
