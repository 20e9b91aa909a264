"""Which endpoint a request goes to, how many are in flight, and what complaints change."""

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
        self.calls = self.in_flight = self.most_in_flight = 0
        self._answer = answer

    async def complete(self, request: Request) -> Reply:
        self.calls += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return REPLY if self._answer is None else await self._answer(self.calls)
        finally:
            self.in_flight -= 1


async def soon(_: int) -> Reply:
    await asyncio.sleep(0.002)
    return REPLY


def run(
    endpoints: list[Scripted], count: int, most: int, **how: Any
) -> tuple[EndpointPool, list[Any]]:
    """Deliver `count` requests through one pool."""

    async def main() -> tuple[EndpointPool, list[Any]]:
        pool = EndpointPool(endpoints, most, StopSignal(), lambda text: None)
        work = (pool.deliver(REQUEST, 10, attempts=how.get("attempts", 3)) for _ in range(count))
        return pool, await asyncio.gather(*work, return_exceptions=True)

    return asyncio.run(main())


def test_no_more_than_the_limit_are_in_flight_and_no_less_are_sent() -> None:
    endpoint = Scripted(soon)
    _, replies = run([endpoint], 60, 7)
    assert endpoint.most_in_flight == 7 and endpoint.calls == 60
    assert all(reply[1] is REPLY for reply in replies)


def test_requests_are_shared_by_weight() -> None:
    heavy, light = Scripted(soon, weight=3.0), Scripted(soon, weight=1.0)
    for most in (1, 16):
        heavy.calls = light.calls = 0
        run([heavy, light], 80, most)
        assert (heavy.calls, light.calls) == (60, 20)


def test_a_burst_of_429s_cuts_the_limit_once_and_successes_raise_it_again() -> None:
    gate = EndpointState(Scripted(), 100)
    told = TransientError("slow down", "throttled", 0.0)
    sent_at = gate.bursts
    for _ in range(30):  # all of them were in flight when the first was told
        gate.record_failure(told, sent_at, alone=True)
    assert gate.limit == pytest.approx(75)
    gate.record_failure(told, gate.bursts, alone=True)
    assert gate.limit == pytest.approx(56.25)
    for _ in range(57):  # a round without a complaint: room for one more
        gate.record_reply(REPLY, 10)
    assert 57 < gate.limit < 58
    for _ in range(20_000):
        gate.record_reply(REPLY, 10)
    assert gate.limit == 100


def test_retry_after_holds_every_request_to_that_endpoint_and_no_other() -> None:
    async def once(call: int) -> Reply:
        if call == 1:
            raise TransientError("wait", "throttled", 0.3)
        return await soon(call)

    slow, free = Scripted(once, name="slow"), Scripted(soon, name="free")
    began = time.monotonic()
    run([slow, free], 20, 1)
    assert time.monotonic() - began < 0.25 and slow.calls == 1 and free.calls == 20
    slow.calls = 0
    began = time.monotonic()
    pool, _ = run([slow], 5, 5)
    assert time.monotonic() - began >= 0.3 and pool.wasted == Counter({"throttled": 1})


def test_a_dead_endpoint_is_left_for_the_living_one() -> None:
    async def dead(_: int) -> Reply:
        raise TransientError("refused", "connection")

    gone, living = Scripted(dead, name="gone"), Scripted(soon, name="living")
    pool, replies = run([gone, living], 200, 8)
    assert all(gate.endpoint is living for gate, _ in replies)
    assert gone.calls < 30, "after a few failures it rests"
    assert pool.wasted == {"connection": gone.calls}


def test_an_endpoint_without_credit_is_closed_and_the_others_go_on() -> None:
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
    began = time.monotonic()
    run([endpoint], 9, 9)
    assert 0.4 <= time.monotonic() - began < 2.0 and endpoint.most_in_flight == 1


def test_a_cap_on_tokens_is_put_right_by_what_a_reply_really_took() -> None:
    pacer = RateLimiter(600)  # ten a second
    pacer.take(20, 100.0)
    assert pacer.ready_at == pytest.approx(102.0)
    pacer.correct(-15)
    assert pacer.ready_at == pytest.approx(100.5)
    endpoint = Scripted(soon, tpm=60_000)  # a request is thought to cost 10 and costs 10: 10 ms
    began = time.monotonic()
    run([endpoint], 21, 21)
    assert time.monotonic() - began >= 0.2


def test_a_halt_wakes_whoever_waits() -> None:
    async def main() -> None:
        halt = StopSignal()
        pool = EndpointPool(
            [Scripted(lambda call: asyncio.sleep(0.05, REPLY))], 1, halt, lambda text: None
        )
        work = [asyncio.create_task(pool.deliver(REQUEST, 1, attempts=1)) for _ in range(3)]
        await asyncio.sleep(0.01)
        halt.stop()
        done = await asyncio.gather(*work, return_exceptions=True)
        assert sum(isinstance(one, StoppedError) for one in done) == 2, (
            "what was in flight still arrives"
        )

    asyncio.run(main())
