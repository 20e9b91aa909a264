"""Endpoint pool: how one request becomes one reply.

It decides which endpoint a request goes to and when, how often it is tried, and when to give up.
Each endpoint has its own adaptive limit of requests in flight (additive increase, multiplicative
decrease: Chiu and Jain 1989), its own pause after a Retry-After, and its own rate caps.
"""

from __future__ import annotations

import asyncio
import bisect
import itertools
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

from dsbs.annotation.backends import (
    Endpoint,
    Failure,
    Price,
    RejectedError,
    Reply,
    Request,
    TransientError,
)
from dsbs.errors import PartialError
from dsbs.formatting import dollars, duration

FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 30.0
LONGEST_RETRY_AFTER_S = 600.0
THROTTLED_PER_ATTEMPT = 10
LIMIT_CUT = 0.75  # a burst of 429s leaves this share of an endpoint's limit
PAUSE_AFTER_FAILURES = 4  # in a row, where another endpoint can take over
NOTICE_AFTER_S = 30.0  # with nothing but 429s
NOTICE_AGAIN_AFTER_S = 600.0


class ExhaustedError(Exception):
    """Every attempt of one request failed; ``kind`` is that of the last failure."""

    def __init__(self, message: str, kind: Failure) -> None:
        super().__init__(message)
        self.kind = kind


class StoppedError(Exception):
    """The run is ending: this request was not sent, or not sent again."""


class StopSignal:
    """Ends a run: nothing more is sent and waits end; replies in flight may still arrive."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    def on_stop(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` when the run ends."""
        self._listeners.append(listener)

    def stop(self) -> None:
        self._event.set()
        for listener in self._listeners:
            listener()

    async def wait(self) -> None:
        await self._event.wait()

    async def sleep(self, seconds: float) -> None:
        """Sleep, unless the run ends. Raises StoppedError."""
        try:
            await asyncio.wait_for(self._event.wait(), seconds)
        except TimeoutError:
            return
        raise StoppedError


class RateLimiter:
    """An even rate of ``per_minute`` units (None: no limit).

    It is the virtual scheduling form of the generic cell rate algorithm (ITU-T I.371). Not a
    library's, because the tokens of a request are known only afterwards (``correct``).
    """

    def __init__(self, per_minute: float | None) -> None:
        self._seconds_per_unit = 60.0 / per_minute if per_minute else 0.0
        self.ready_at = 0.0  # monotonic seconds

    def take(self, units: float, now: float) -> None:
        self.ready_at = max(self.ready_at, now) + units * self._seconds_per_unit

    def correct(self, units: float) -> None:
        """Charge ``units`` more for a request taken before (less: negative)."""
        self.ready_at += units * self._seconds_per_unit


class EndpointState:
    """One endpoint's requests in flight, its limits and pauses, and its failures."""

    def __init__(self, endpoint: Endpoint, max_in_flight: int) -> None:
        self.endpoint = endpoint
        self.max_in_flight = max_in_flight
        # no slow start: an endpoint that has not complained is not spared
        self.limit = float(max_in_flight)
        self.in_flight = 0
        self.turn = 0.0  # virtual time of stride scheduling: a request advances it by 1 / weight
        self.bursts = 0  # of 429s, each answered by one cut of the limit
        self.closed: PartialError | None = None  # why it answers nothing more in this run
        self.paused_until = 0.0  # monotonic seconds
        self._requests = RateLimiter(endpoint.rpm)
        self._tokens = RateLimiter(endpoint.tpm)
        self._failures = 0  # in a row
        self._throttles = 0  # in a row

    @property
    def has_capacity(self) -> bool:
        return self.closed is None and self.in_flight < max(1, int(self.limit))

    @property
    def ready_at(self) -> float:
        return max(self.paused_until, self._requests.ready_at, self._tokens.ready_at)

    def start_request(self, tokens: int, now: float) -> None:
        self.in_flight += 1
        self.turn += 1.0 / self.endpoint.weight
        self._requests.take(1, now)
        self._tokens.take(tokens, now)

    def record_reply(self, reply: Reply, tokens: int) -> None:
        """Raise the limit, by one after each round of replies without a complaint."""
        self.record_answer()
        self._throttles = 0
        self.limit = min(float(self.max_in_flight), self.limit + 1.0 / self.limit)
        if reply.prompt_tokens is not None and reply.completion_tokens is not None:
            self._tokens.correct(reply.prompt_tokens + reply.completion_tokens - tokens)

    def record_failure(self, failure: TransientError, bursts: int, *, alone: bool) -> None:
        """Lower the limit or pause.

        ``bursts`` is the count when the request was sent: requests that were in flight at a cut
        belong to the same burst. ``alone``: no other endpoint can take over.
        """
        wait = failure.retry_after
        if failure.throttled:
            if bursts == self.bursts:
                self.bursts += 1
                self._throttles += 1
                self.limit = max(1.0, self.limit * LIMIT_CUT)
            # 0 or a date in the past must not switch the backoff off
            wait = max(wait or 0.0, backoff(self._throttles))
        else:
            self._failures += 1
            if wait is None and not alone and self._failures >= PAUSE_AFTER_FAILURES:
                wait = backoff(self._failures - PAUSE_AFTER_FAILURES + 1)
        if wait is not None:
            self.paused_until = max(self.paused_until, time.monotonic() + wait)

    def record_answer(self) -> None:
        self._failures = 0


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row, with jitter."""
    doublings = min(max(failures, 1) - 1, 10)
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0**doublings) * random.uniform(0.5, 1.0)


class EndpointPool:
    """The endpoints of a teacher, with at most ``max_in_flight`` requests over all of them."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        max_in_flight: int,
        stop_signal: StopSignal,
        say: Callable[[str], None],
    ) -> None:
        self.states = [EndpointState(endpoint, max_in_flight) for endpoint in endpoints]
        self.max_in_flight = max_in_flight
        self.stop_signal = stop_signal
        self.wasted: Counter[str] = Counter()  # attempts that brought no reply, by kind
        self._say = say
        self._throttled_since: float | None = None  # without a reply in between
        self._notice_at = 0.0
        self._tickets = itertools.count()
        self._waiters: list[tuple[int, asyncio.Future[None]]] = []  # the line, by ticket
        self._has_timer = False
        stop_signal.on_stop(lambda: self._wake(len(self._waiters)))

    async def deliver(
        self,
        request: Request,
        tokens: int,
        *,
        attempts: int,
        before_attempt: Callable[[], None] = lambda: None,
    ) -> tuple[EndpointState, Reply]:
        """Send a request until a reply comes, to whichever endpoint is next.

        The reply may be billed and hold no answer (``Reply.failure``). ``tokens`` is the most that
        the request may use; ``before_attempt`` may raise.

        Raises ExhaustedError after ``attempts`` failures, StoppedError where the run ends first,
        PartialError where no endpoint will answer for long, and the endpoint's RejectedError or
        DsbsError.
        """
        failures = throttles = 0
        ticket = next(self._tickets)  # a request that failed keeps its place in the line
        last: EndpointState | None = None
        while True:
            state = await self._enter(tokens, last, ticket)
            try:
                before_attempt()
                outcome = await self._send(state, request, tokens)
            finally:
                self._leave(state)
            if isinstance(outcome, Reply):
                return state, outcome
            if isinstance(outcome, PartialError):
                self._close(state, outcome)
                continue
            # a 429 says nothing against the request: it may be throttled more often than it fails
            if outcome.throttled:
                throttles += 1
            else:
                failures += 1
            if failures >= attempts or throttles >= THROTTLED_PER_ATTEMPT * attempts:
                raise ExhaustedError(str(outcome), outcome.kind)
            last = state
            if not outcome.throttled and not self._can_go_elsewhere(state):
                await self.stop_signal.sleep(backoff(failures))

    def _can_go_elsewhere(self, state: EndpointState) -> bool:
        now = time.monotonic()
        return any(
            other is not state and other.has_capacity and other.ready_at <= now
            for other in self.states
        )

    async def _send(
        self, state: EndpointState, request: Request, tokens: int
    ) -> Reply | TransientError | PartialError:
        """One attempt. RejectedError and other kinds of DsbsError are raised."""
        bursts = state.bursts
        try:
            reply = await state.endpoint.complete(request)
        except TransientError as error:
            self._record_failure(state, error, bursts)
            return error
        except PartialError as error:
            return error
        except RejectedError:
            state.record_answer()
            raise
        if isinstance(reply.failure, TransientError):
            self._record_failure(state, reply.failure, bursts)
        else:
            state.record_reply(reply, tokens)
            self._throttled_since = None
        if isinstance(reply.failure, PartialError):
            self._close(state, reply.failure)
        return reply

    def _record_failure(self, state: EndpointState, error: TransientError, bursts: int) -> None:
        self.wasted[error.kind] += 1
        state.record_failure(error, bursts, alone=len(self.states) == 1)
        if not error.throttled:
            self._throttled_since = None
            return
        now = time.monotonic()
        if self._throttled_since is None:
            self._throttled_since = now
            self._notice_at = now + NOTICE_AFTER_S
        if now >= self._notice_at:
            self._notice_at = now + NOTICE_AGAIN_AFTER_S
            self._say(
                f"waiting for {state.endpoint.name}: nothing but refusals to serve for "
                f"{duration(now - self._throttled_since)} ({error}); Ctrl-C stops, and the replies "
                "so far are stored"
            )

    def _close(self, state: EndpointState, error: PartialError) -> None:
        """Take an endpoint without credit out of the pool; the others continue."""
        if state.closed is None:
            state.closed = error
            if any(other.closed is None for other in self.states):
                self._say(f"{error.problem}; continuing with the other endpoints")
        self._wake(len(self._waiters))  # those that waited for this endpoint need another one

    async def _enter(self, tokens: int, last: EndpointState | None, ticket: int) -> EndpointState:
        """Wait in line, by ticket, for an endpoint; not for ``last`` where there is a choice."""
        while True:
            if self.stop_signal.is_set:
                raise StoppedError
            errors = [state.closed for state in self.states if state.closed is not None]
            if len(errors) == len(self.states):
                raise errors[0]
            now = time.monotonic()
            ready_at = None
            if self._waiters and self._waiters[0][0] < ticket:
                self._wake(1)  # the timer may be this one's, and the first waits for it
            elif sum(state.in_flight for state in self.states) < self.max_in_flight:
                free = [state for state in self.states if state.has_capacity]
                state = self._next_state(free, last, now)
                if state is not None:
                    self._start(state, tokens, now)
                    return state
                ready_at = min((state.ready_at for state in free), default=None)
            self._give_up_on_long_pauses(now)
            await self._wait(ticket, None if ready_at is None else ready_at - now)

    def _next_state(
        self, free: Sequence[EndpointState], last: EndpointState | None, now: float
    ) -> EndpointState | None:
        """The free endpoint whose turn is first; None: each of them must wait."""
        ready = [state for state in free if state.ready_at <= now]
        alternatives = [state for state in ready if state is not last]
        return min(alternatives or ready, key=lambda state: state.turn, default=None)

    def _start(self, state: EndpointState, tokens: int, now: float) -> None:
        state.start_request(tokens, now)
        # an endpoint that was paused does not catch up: that would flood it
        for other in self.states:
            other.turn = max(other.turn, state.turn - 1.0 / state.endpoint.weight)
        self._wake(1)  # the next in line checks whether there is capacity for one more

    def _give_up_on_long_pauses(self, now: float) -> None:
        waits = [state.paused_until - now for state in self.states if state.closed is None]
        if waits and min(waits) > LONGEST_RETRY_AFTER_S:
            self._wake(1)  # the next in line gives up as well
            raise PartialError(
                f"the endpoint asks to come back in {min(waits):.0f} s",
                hint="run the same command then: the replies so far are stored",
            )

    async def _wait(self, ticket: int, seconds: float | None) -> None:
        """Wait until a request comes back, ``seconds`` have passed or the run ends."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        bisect.insort(self._waiters, (ticket, waiter))
        timeout = None
        if seconds is not None and not self._has_timer:
            timeout = seconds  # one timer is enough: the waiter that gets in wakes the next
            self._has_timer = True
        try:
            await asyncio.wait({waiter}, timeout=timeout)
        finally:
            waiter.cancel()
            self._waiters.remove((ticket, waiter))
            if timeout is not None:
                self._has_timer = False

    def _leave(self, state: EndpointState) -> None:
        state.in_flight -= 1
        capacity = sum(
            max(0, int(other.limit) - other.in_flight)
            for other in self.states
            if other.closed is None
        )
        in_flight = sum(other.in_flight for other in self.states)
        self._wake(min(capacity, self.max_in_flight - in_flight))

    def _wake(self, count: int) -> None:
        for _, waiter in self._waiters:
            if count <= 0:
                return
            if not waiter.done():
                waiter.set_result(None)
                count -= 1


class Budget:
    """US dollars for a recipe's replies, held below ``limit`` (annotate.max_usd).

    ``spent`` is the cost of the stored replies; without a limit, of those whose rows came by.
    """

    def __init__(
        self, price: Price | None, limit: float | None, spent: float, stop_signal: StopSignal
    ) -> None:
        self._price = price
        self._limit = limit
        self.spent = spent
        self.has_bought = False
        self._reserved = 0.0  # at most, for requests in flight
        self._in_flight = 0
        self._prompt_token_ratio = 1.0  # highest ratio of counted to estimated prompt tokens
        self._stop_signal = stop_signal
        self._released = asyncio.Event()
        stop_signal.on_stop(self._released.set)

    @property
    def balance(self) -> str:
        """A hint for an error: whether anything was billed."""
        if self.has_bought:
            return "what was billed is stored and counted"
        return "nothing was billed, and no reply was lost"

    async def reserve(self, prompt_tokens: int, tokens: int) -> float:
        """Wait until the most that one more reply may cost fits the limit; returns that cost.

        Raises PartialError where it never will, StoppedError at the end of the run.
        """
        cost = 0.0
        if self._price is not None:
            cost = self._price.of(int(prompt_tokens * self._prompt_token_ratio) + 1, tokens)
        limit = self._limit
        while limit is not None and self.spent + self._reserved + cost > limit + 1e-9:
            if self._in_flight == 0:
                raise PartialError(
                    f"annotate.max_usd: {dollars(self.spent)} spent on replies; one more might "
                    f"pass the limit of {dollars(limit)}",
                    hint="raise the limit, or lower annotate.max_tokens (what a reply may cost), "
                    "and run again: the replies so far are stored",
                )
            self._released.clear()
            await self._released.wait()  # replies in flight may turn out cheaper
            if self._stop_signal.is_set:
                raise StoppedError
        self._in_flight += 1
        self._reserved += cost
        return cost

    def release(self, reserved: float) -> None:
        self._in_flight -= 1
        self._reserved -= reserved
        self._released.set()

    def count_stored(self, replies: Sequence[Reply]) -> None:
        if self._price is not None and self._limit is None:
            self.spent += sum(self._price.usd(reply) or 0.0 for reply in replies)

    def count_bought(self, reply: Reply, prompt_tokens: int, reserved: float) -> float:
        """Count a reply, whether it holds an answer or not. Returns its cost in US dollars."""
        self.has_bought = True
        if reply.prompt_tokens is not None and prompt_tokens:
            ratio = reply.prompt_tokens / prompt_tokens
            self._prompt_token_ratio = max(self._prompt_token_ratio, ratio)
        if self._price is None:
            return 0.0
        usd = self._price.usd(reply)
        if usd is None:  # not counted by the endpoint: assume the most where there is a limit
            usd = 0.0 if self._limit is None else reserved
        self.spent += usd
        return usd
