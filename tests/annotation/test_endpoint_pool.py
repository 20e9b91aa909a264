"""The endpoint pool: shares, requests in flight, pauses and limits."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from dsbs import PartialError
from dsbs.annotation.backends import RejectedError, Reply, Request, TransientError
from dsbs.annotation.endpoint_pool import (
    EndpointPool,
    EndpointState,
    ExhaustedError,
    RateLimiter,
    StoppedError,
    StopSignal,
)

REQUEST = Request({"model": "m"}, 0)
REPLY = Reply("fine", prompt_tokens=5, completion_tokens=5)


class Scripted:
    """An endpoint that answers as `answer` says, and counts."""

    def __init__(
        self, answer: Callable[[int], Awaitable[Reply]] | None = None, **limits: Any
    ) -> None:
        self.identity = self.name = limits.pop("name", "one")
        self.weight = limits.pop("weight", 1.0)
        self.rpm, self.tpm = limits.pop("rpm", None), limits.pop("tpm", None)
        self.calls = self.in_flight = self.peak_in_flight = 0
        self._answer = answer

    async def complete(self, request: Request) -> Reply:
        self.calls += 1
        self.in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self.in_flight)
        try:
            return REPLY if self._answer is None else await self._answer(self.calls)
        finally:
            self.in_flight -= 1


async def soon(_: int) -> Reply:
    await asyncio.sleep(0.002)
    return REPLY


def run(
    endpoints: list[Scripted], count: int, max_in_flight: int, **options: Any
) -> tuple[EndpointPool, list[Any]]:
    """Deliver `count` requests through one pool."""

    async def main() -> tuple[EndpointPool, list[Any]]:
        pool = EndpointPool(endpoints, max_in_flight, StopSignal(), lambda text: None)
        work = (
            pool.deliver(REQUEST, 10, attempts=options.get("attempts", 3)) for _ in range(count)
        )
        return pool, await asyncio.gather(*work, return_exceptions=True)

    return asyncio.run(main())


def test_no_more_than_the_limit_are_in_flight_and_no_less_are_sent() -> None:
    endpoint = Scripted(soon)
    _, replies = run([endpoint], 60, 7)
    assert endpoint.peak_in_flight == 7 and endpoint.calls == 60
    assert all(reply[1] is REPLY for reply in replies)


def test_requests_are_shared_by_weight() -> None:
    heavy, light = Scripted(soon, weight=3.0), Scripted(soon, weight=1.0)
    for max_in_flight in (1, 16):
        heavy.calls = light.calls = 0
        run([heavy, light], 80, max_in_flight)
        assert (heavy.calls, light.calls) == (60, 20)


def test_a_burst_of_429s_cuts_the_limit_once_and_successes_raise_it_again() -> None:
    state = EndpointState(Scripted(), 100)
    error = TransientError("slow down", "throttled", 0.0)
    sent_at = state.bursts
    for _ in range(30):  # all of them were in flight when the first was told
        state.record_failure(error, sent_at, alone=True)
    assert state.limit == pytest.approx(75)
    state.record_failure(error, state.bursts, alone=True)
    assert state.limit == pytest.approx(56.25)
    for _ in range(57):  # a round without a complaint: room for one more
        state.record_reply(REPLY, 10)
    assert 57 < state.limit < 58
    for _ in range(20_000):
        state.record_reply(REPLY, 10)
    assert state.limit == 100


def test_retry_after_holds_every_request_to_that_endpoint_and_no_other() -> None:
    async def once(call: int) -> Reply:
        if call == 1:
            raise TransientError("wait", "throttled", 0.3)
        return await soon(call)

    slow, free = Scripted(once, name="slow"), Scripted(soon, name="free")
    started = time.monotonic()
    run([slow, free], 20, 1)
    assert time.monotonic() - started < 0.25 and slow.calls == 1 and free.calls == 20
    slow.calls = 0
    started = time.monotonic()
    pool, _ = run([slow], 5, 5)
    assert time.monotonic() - started >= 0.3 and pool.wasted == Counter({"throttled": 1})


def test_a_dead_endpoint_is_abandoned_for_the_living_one() -> None:
    async def dead(_: int) -> Reply:
        raise TransientError("refused", "connection")

    gone, living = Scripted(dead, name="gone"), Scripted(soon, name="living")
    pool, replies = run([gone, living], 200, 8)
    assert all(state.endpoint is living for state, _ in replies)
    assert gone.calls < 30, "after a few failures it rests"
    assert pool.wasted == {"connection": gone.calls}


def test_an_endpoint_without_credit_is_closed_and_the_others_continue() -> None:
    async def broke(_: int) -> Reply:
        raise PartialError("no credit", hint="pay")

    empty, living = Scripted(broke), Scripted(soon)
    _, replies = run([empty, living], 50, 4)
    assert all(reply[1] is REPLY for reply in replies) and empty.calls <= 4
    _, replies = run([Scripted(broke)], 3, 4)
    assert all(isinstance(reply, PartialError) for reply in replies)


def test_attempts_are_counted_and_a_refusal_is_final() -> None:
    async def broken(_: int) -> Reply:
        raise TransientError("oops", "server error")

    async def no(_: int) -> Reply:
        raise RejectedError("unsafe")

    endpoint = Scripted(broken)
    _, replies = run([endpoint], 1, 1, attempts=2)
    assert isinstance(replies[0], ExhaustedError) and endpoint.calls == 2
    _, replies = run([Scripted(no)], 1, 1)
    assert isinstance(replies[0], RejectedError)


def test_a_wait_of_ten_minutes_ends_the_run_instead() -> None:
    async def tomorrow(_: int) -> Reply:
        raise TransientError("come back", "throttled", 86_400)

    _, replies = run([Scripted(tomorrow)], 2, 2)
    assert any(isinstance(reply, PartialError) and "86400 s" in reply.problem for reply in replies)


def test_a_cap_on_requests_spaces_them_evenly() -> None:
    endpoint = Scripted(soon, rpm=1200)  # one every 50 ms
    started = time.monotonic()
    run([endpoint], 9, 9)
    assert 0.4 <= time.monotonic() - started < 2.0 and endpoint.peak_in_flight == 1


def test_a_cap_on_tokens_is_corrected_by_the_reply() -> None:
    limiter = RateLimiter(600)  # ten a second
    limiter.take(20, 100.0)
    assert limiter.ready_at == pytest.approx(102.0)
    limiter.correct(-15)
    assert limiter.ready_at == pytest.approx(100.5)
    endpoint = Scripted(soon, tpm=60_000)  # a request is thought to cost 10 and costs 10: 10 ms
    started = time.monotonic()
    run([endpoint], 21, 21)
    assert time.monotonic() - started >= 0.2


def test_a_stop_wakes_waiting_requests() -> None:
    async def main() -> None:
        stop_signal = StopSignal()
        pool = EndpointPool(
            [Scripted(lambda call: asyncio.sleep(0.05, REPLY))], 1, stop_signal, lambda text: None
        )
        work = [asyncio.create_task(pool.deliver(REQUEST, 1, attempts=1)) for _ in range(3)]
        await asyncio.sleep(0.01)
        stop_signal.stop()
        done = await asyncio.gather(*work, return_exceptions=True)
        assert sum(isinstance(result, StoppedError) for result in done) == 2, (
            "what was in flight still arrives"
        )

    asyncio.run(main())


def test_requests_get_in_by_their_turn_and_a_failed_one_keeps_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dsbs.annotation.endpoint_pool.FIRST_WAIT_S", 0.0)
    sent: list[str] = []

    class Gate(Scripted):
        async def complete(self, request: Request) -> Reply:
            name = str(request.body["model"])
            sent.append(name)
            await asyncio.sleep(0)
            if name == "fails" and sent.count(name) == 1:
                raise TransientError("dead", "connection")
            return REPLY

    async def main() -> None:
        pool = EndpointPool([Gate()], 1, StopSignal(), lambda text: None)

        async def client(*names: str) -> None:
            for name in names:
                await pool.deliver(Request({"model": name}, 0), 1, attempts=3)

        await asyncio.gather(client("fails", "late"), client("b", "later"), client("c"))

    asyncio.run(main())
    assert sent == ["fails", "b", "fails", "c", "later", "late"], "new ones overtake nobody"


def test_the_line_moves_on_when_its_first_request_is_given_up() -> None:
    async def main() -> list[Any]:
        pool = EndpointPool([Scripted(soon)], 1, StopSignal(), lambda text: None)
        work = [asyncio.create_task(pool.deliver(REQUEST, 1, attempts=1)) for _ in range(4)]
        await asyncio.sleep(0)
        work[1].cancel()
        return await asyncio.gather(*work, return_exceptions=True)

    _, cancelled, *others = asyncio.run(main())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert [reply for _, reply in others] == [REPLY, REPLY]
