"""How one request becomes one reply: attempts, waits between them, and a pause that all requests share."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from dsbs.annotate.teachers.base import Reply, TransientError
from dsbs.errors import PartialError

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 600.0
THROTTLED_PER_ATTEMPT = 10


class ExhaustedError(Exception):
    """Every attempt of one request failed."""


class HaltedError(Exception):
    """The run is ending: this request was not sent, or not sent again."""


class Halt:
    """Says that a run is to end: nothing more is sent, waits are broken off, what is in flight may still arrive."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    @property
    def called(self) -> bool:
        return self._event.is_set()

    def call(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        await self._event.wait()

    async def sleep(self, seconds: float) -> None:
        """Sleep, unless the run ends. Raises HaltedError."""
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return
        raise HaltedError


class Pause:
    """A moment before which no request of this endpoint is sent: set by Retry-After, shared by all."""

    def __init__(self) -> None:
        self._until = 0.0

    def extend(self, seconds: float) -> None:
        self._until = max(self._until, time.monotonic() + seconds)

    async def over(self, halt: Halt) -> None:
        while (left := self._until - time.monotonic()) > 0:
            await halt.sleep(left + random.uniform(0.0, 0.1))  # not all in the same instant


async def attempt(send: Callable[[], Awaitable[Reply]], *, attempts: int, pause: Pause, halt: Halt) -> Reply:
    """Send until a reply comes.

    Raises ExhaustedError after ``attempts`` and HaltedError where the run ends first; anything but TransientError passes.
    """
    failed = throttled = 0
    while True:
        await pause.over(halt)
        if halt.called:
            raise HaltedError
        try:
            return await send()
        except TransientError as error:
            failure = error
        wished = failure.retry_after
        if wished is not None and wished > LONGEST_RETRY_AFTER_S:
            raise PartialError(
                f"the endpoint asks to come back in {wished:.0f} s ({failure})",
                hint="run the same command then: what was bought is kept",
            )
        # being told to wait says nothing against the request, so it may be told so more often than it may fail
        failed, throttled = failed + (not failure.throttled), throttled + failure.throttled
        if failed >= attempts or throttled >= THROTTLED_PER_ATTEMPT * attempts:
            raise ExhaustedError(str(failure))
        backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** min(failed + throttled - 1, 10)) * random.uniform(0.5, 1.0)
        if failure.throttled:
            pause.extend(backoff if wished is None else wished)
        else:
            await halt.sleep(max(backoff, wished or 0.0))
