"""How one request becomes one reply: which endpoint it goes to and when, how often it is tried, and when to stop trying.

Each endpoint has its own adaptive limit of requests in flight (additive increase, multiplicative decrease: Chiu, Jain 1989),
its own pause after a Retry-After and its own caps. Nothing is limited that no one asked to limit.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

from dsbs.annotation.backends.base import Endpoint, RejectedError, Reply, Request, TransientError
from dsbs.errors import PartialError

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 600.0
THROTTLED_PER_ATTEMPT = 10
CUT = 0.75  # a burst of 429s leaves this much of an endpoint's limit
REST_AFTER = 4  # failures in a row after which an endpoint rests, if there is another


class ExhaustedError(Exception):
    """Every attempt of one request failed."""


class StoppedError(Exception):
    """The run is ending: this request was not sent, or not sent again."""


class StopSignal:
    """Says that a run is to end: nothing more is sent, waits are broken off, what is in flight may still arrive."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._told: list[Callable[[], None]] = []

    @property
    def called(self) -> bool:
        return self._event.is_set()

    def tell(self, listener: Callable[[], None]) -> None:
        self._told.append(listener)

    def call(self) -> None:
        self._event.set()
        for listener in self._told:
            listener()

    async def wait(self) -> None:
        await self._event.wait()

    async def sleep(self, seconds: float) -> None:
        """Sleep, unless the run ends. Raises HaltedError."""
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return
        raise StoppedError


class RateLimiter:
    """An even rate, ``per_minute`` units: the virtual scheduling form of the generic cell rate algorithm (ITU-T I.371).

    Of our own because what a request costs in tokens is known only afterwards and must be put right (``correct``).
    """

    def __init__(self, per_minute: float | None) -> None:
        self._each = 60.0 / per_minute if per_minute else 0.0  # seconds a unit
        self.ready_at = 0.0  # monotonic seconds

    def take(self, units: float, now: float) -> None:
        self.ready_at = max(self.ready_at, now) + units * self._each

    def correct(self, units: float) -> None:
        """A request taken before cost ``units`` more than was thought (or less: negative)."""
        self.ready_at += units * self._each


class EndpointState:
    """One endpoint's way in: how many requests may be in flight, from when on, and how it has fared."""

    def __init__(self, endpoint: Endpoint, most: int) -> None:
        self.endpoint = endpoint
        self.most = most
        self.limit = float(
            most
        )  # no lower start: an endpoint that has not complained is not spared
        self.in_flight = 0
        self.turn = 0.0  # virtual time of stride scheduling: each request moves it on by 1 / weight
        self.bursts = 0  # of 429s, each answered by one cut
        self.closed: PartialError | None = None  # why it answers nothing more in this run
        self._requests, self._tokens = RateLimiter(endpoint.rpm), RateLimiter(endpoint.tpm)
        self._paused_until = 0.0
        self._failures = self._throttles = 0  # in a row

    @property
    def has_room(self) -> bool:
        return self.closed is None and self.in_flight < max(1, int(self.limit))

    @property
    def ready_at(self) -> float:
        return max(self._paused_until, self._requests.ready_at, self._tokens.ready_at)

    @property
    def paused_until(self) -> float:
        return self._paused_until

    def take(self, tokens: int, now: float) -> None:
        self.in_flight += 1
        self.turn += 1.0 / self.endpoint.weight
        self._requests.take(1, now)
        self._tokens.take(tokens, now)

    def succeeded(self, reply: Reply, tokens: int) -> None:
        """Room for one more after each round of replies without a complaint."""
        self.answered()
        self._throttles = 0
        self.limit = min(float(self.most), self.limit + 1.0 / self.limit)
        if reply.prompt_tokens is not None and reply.completion_tokens is not None:
            self._tokens.correct(reply.prompt_tokens + reply.completion_tokens - tokens)

    def failed(self, failure: TransientError, bursts: int, *, alone: bool) -> None:
        """``bursts`` as it stood when the request was sent: what was in flight at a cut is no reason for another one."""
        wait = failure.retry_after
        if failure.throttled:
            if bursts == self.bursts:
                self.bursts += 1
                self._throttles += 1
                self.limit = max(1.0, self.limit * CUT)
            wait = backoff(self._throttles) if wait is None else wait
        else:
            self._failures += 1
            if wait is None and not alone and self._failures >= REST_AFTER:
                wait = backoff(self._failures - REST_AFTER + 1)
        if wait is not None:
            self._pause(wait)

    def answered(self) -> None:
        self._failures = 0

    def _pause(self, seconds: float) -> None:
        self._paused_until = max(self._paused_until, time.monotonic() + seconds)


def backoff(times: int) -> float:
    """Seconds to wait after so many failures in a row, with jitter."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** min(max(times, 1) - 1, 10)) * random.uniform(
        0.5, 1.0
    )


class EndpointPool:
    """The endpoints behind one teacher, and ``most`` requests in flight over all of them."""

    def __init__(
        self, endpoints: Sequence[Endpoint], most: int, halt: StopSignal, say: Callable[[str], None]
    ) -> None:
        self.gates = [EndpointState(endpoint, most) for endpoint in endpoints]
        self.most = most
        self.halt = halt
        self.wasted: Counter[str] = Counter()  # attempts that brought no reply, by kind
        self._say = say
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._time_is_kept = False
        halt.tell(lambda: self._wake(len(self._waiting)))

    async def deliver(
        self,
        request: Request,
        tokens: int,
        *,
        attempts: int,
        before: Callable[[], None] = lambda: None,
    ) -> tuple[EndpointState, Reply]:
        """Send until a reply comes, to whichever endpoint is next; ``tokens`` is what the request may cost.

        ``before`` is called before every attempt and may raise. Raises ExhaustedError after ``attempts``, HaltedError where the
        run ends first, PartialError where no endpoint will answer for long; RejectedError and DsbsError of the endpoint pass.
        """
        failed = throttled = 0
        last: EndpointState | None = None
        while True:
            gate = await self._enter(tokens, last)
            try:
                before()
                outcome = await self._send(gate, request, tokens)
            finally:
                self._leave(gate)
            if isinstance(outcome, Reply):
                return gate, outcome
            if isinstance(outcome, PartialError):
                self._close(gate, outcome)
                continue
            # being told to wait says nothing against the request, so it may be told so more often than it may fail
            failed, throttled = failed + (not outcome.throttled), throttled + outcome.throttled
            if failed >= attempts or throttled >= THROTTLED_PER_ATTEMPT * attempts:
                raise ExhaustedError(str(outcome))
            last = gate
            elsewhere = any(
                other is not gate and other.has_room and other.ready_at <= time.monotonic()
                for other in self.gates
            )
            if not outcome.throttled and not elsewhere:
                await self.halt.sleep(backoff(failed))

    async def _send(
        self, gate: EndpointState, request: Request, tokens: int
    ) -> Reply | TransientError | PartialError:
        """One attempt, and what it tells of the endpoint. RejectedError and other kinds of DsbsError pass."""
        bursts = gate.bursts
        try:
            reply = await gate.endpoint.complete(request)
        except TransientError as error:
            self.wasted[error.kind] += 1
            gate.failed(error, bursts, alone=len(self.gates) == 1)
            return error
        except PartialError as error:
            return error
        except RejectedError:
            gate.answered()
            raise
        gate.succeeded(reply, tokens)
        return reply

    def _close(self, gate: EndpointState, error: PartialError) -> None:
        """An endpoint without credit leaves the others to go on."""
        if gate.closed is None:
            gate.closed = error
            if any(other.closed is None for other in self.gates):
                self._say(f"{error.problem}; going on with the other endpoints")
        self._wake(len(self._waiting))  # what waited for this endpoint must look elsewhere

    async def _enter(self, tokens: int, last: EndpointState | None) -> EndpointState:
        """Wait for an endpoint's turn, another one than ``last`` where there is a choice."""
        while True:
            if self.halt.called:
                raise StoppedError
            closed = [gate.closed for gate in self.gates if gate.closed is not None]
            if len(closed) == len(self.gates):
                raise closed[0]
            now = time.monotonic()
            ready_at = None
            if sum(gate.in_flight for gate in self.gates) < self.most:
                free = [gate for gate in self.gates if gate.has_room]
                ready = [gate for gate in free if gate.ready_at <= now]
                ready = [gate for gate in ready if gate is not last] or ready
                if ready:
                    gate = min(ready, key=lambda gate: gate.turn)
                    gate.take(tokens, now)
                    # one that was away does not make up for it: that would be a flood
                    for other in self.gates:
                        other.turn = max(other.turn, gate.turn - 1.0 / gate.endpoint.weight)
                    self._wake(1)  # the next in line looks whether there is room for one more
                    return gate
                ready_at = min((gate.ready_at for gate in free), default=None)
            self._give_up_on_long_pauses(now)
            await self._wait(None if ready_at is None else ready_at - now)

    def _give_up_on_long_pauses(self, now: float) -> None:
        waits = [gate.paused_until - now for gate in self.gates if gate.closed is None]
        if waits and min(waits) > LONGEST_RETRY_AFTER_S:
            raise PartialError(
                f"the endpoint asks to come back in {min(waits):.0f} s",
                hint="run the same command then: what was bought is kept",
            )

    async def _wait(self, seconds: float | None) -> None:
        """Until a request comes back, for ``seconds`` or until the run ends, whichever is first."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        keeps_time = (
            seconds is not None and not self._time_is_kept
        )  # one is enough: whoever gets in wakes the next
        self._time_is_kept = self._time_is_kept or keeps_time
        try:
            await asyncio.wait({mine}, timeout=seconds if keeps_time else None)
        finally:
            mine.cancel()
            if keeps_time:
                self._time_is_kept = False

    def _leave(self, gate: EndpointState) -> None:
        gate.in_flight -= 1
        room = sum(
            max(0, int(one.limit) - one.in_flight) for one in self.gates if one.closed is None
        )
        self._wake(min(room, self.most - sum(one.in_flight for one in self.gates)))

    def _wake(self, count: int) -> None:
        while count > 0 and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                count -= 1
