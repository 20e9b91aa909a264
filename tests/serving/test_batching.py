"""Rows of many requests through one model."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine, Sequence
from typing import Any

import pytest

from dsbs.serving.batching import Batcher
from dsbs.serving.middleware import Metrics
from dsbs.serving.settings import ApiError


class Model:
    """Doubles numbers, fails on negative ones, and waits for ``free`` where it is told to."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], str]] = []
        self.free = threading.Event()
        self.free.set()
        self.started = threading.Event()

    def __call__(self, items: Sequence[int], how: str) -> list[int]:
        self.batches.append((list(items), how))
        self.started.set()
        assert self.free.wait(10)
        if min(items) < 0:
            raise ValueError(f"cannot read {items}")
        return [2 * item for item in items]


def batched(model: Model, work: Any, **options: Any) -> Any:
    """Run ``work(batcher)`` over the model."""
    chosen = {"batch_size": 4, "max_wait_s": 0.02, "max_queue": 100} | options

    async def main() -> Any:
        batcher: Batcher[int, str, int] = Batcher(model, Metrics(), **chosen)
        batcher.start()
        try:
            return await asyncio.wait_for(work(batcher), 20)
        finally:
            batcher.close()

    return asyncio.run(main())


def test_rows_of_many_requests_share_batches_and_every_request_gets_its_own_answers_in_order() -> (
    None
):
    model = Model()

    async def work(batcher: Any) -> list[list[int]]:
        return await asyncio.gather(
            *(batcher.ask([10 * i + j for j in range(1 + i % 3)], "a") for i in range(12))
        )

    answers = batched(model, work)
    assert answers == [[2 * (10 * i + j) for j in range(1 + i % 3)] for i in range(12)]
    assert [len(items) for items, _ in model.batches] == [4] * 6


def test_a_request_larger_than_a_batch_is_answered_whole() -> None:
    model = Model()
    assert batched(model, lambda batcher: batcher.ask(list(range(11)), "a")) == [
        2 * i for i in range(11)
    ]
    assert [len(items) for items, _ in model.batches] == [4, 4, 3]


def test_rows_that_are_asked_in_another_way_make_a_batch_of_their_own() -> None:
    model = Model()

    async def work(batcher: Any) -> list[list[int]]:
        return await asyncio.gather(*(batcher.ask([i], "ab"[i % 2]) for i in range(6)))

    assert batched(model, work) == [[2 * i] for i in range(6)]
    assert sorted(model.batches) == [([0, 2, 4], "a"), ([1, 3, 5], "b")]


def test_a_batch_of_one_waits_for_nobody() -> None:
    model = Model()
    assert batched(
        model, lambda batcher: batcher.ask([1, 2], "a"), batch_size=1, max_wait_s=0.0
    ) == [2, 4]
    assert [items for items, _ in model.batches] == [[1], [2]]


def test_while_the_model_is_busy_rows_gather_and_those_of_a_client_that_left_are_taken_out() -> (
    None
):
    model = Model()
    model.free.clear()

    async def work(batcher: Any) -> list[int]:
        first = asyncio.create_task(batcher.ask([1], "a"))
        await asyncio.to_thread(model.started.wait, 10)
        left = asyncio.create_task(batcher.ask([2, 3], "a"))
        stayed = asyncio.create_task(batcher.ask([4], "a"))
        await asyncio.sleep(0.01)
        depth = batcher.depth
        left.cancel()
        await asyncio.wait({left})
        depths = [depth, batcher.depth]
        model.free.set()
        assert await first == [2] and await stayed == [8]
        return depths

    assert batched(model, work) == [3, 1]
    assert [items for items, _ in model.batches] == [[1], [4]]


def test_no_more_rows_wait_than_are_allowed_and_the_rest_is_refused_at_once() -> None:
    model = Model()
    model.free.clear()

    async def work(batcher: Any) -> Any:
        first = asyncio.create_task(batcher.ask([1], "a"))
        await asyncio.to_thread(model.started.wait, 10)
        second = asyncio.create_task(batcher.ask([2, 3], "a"))
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError) as refused:
            await batcher.ask([4, 5], "a")
        third = asyncio.create_task(batcher.ask([6], "a"))
        await asyncio.sleep(0.01)
        model.free.set()
        return refused.value, await first + await second + await third

    refused, answers = batched(model, work, max_queue=3)
    assert refused.status == 429 and refused.headers["Retry-After"] == "1"
    assert answers == [2, 4, 6, 12]


def test_a_row_that_the_model_fails_on_fails_alone_and_no_text_reaches_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()

    async def work(batcher: Any) -> list[Any]:
        asked: list[Coroutine[Any, Any, list[int]]] = [
            batcher.ask([i], "a") for i in (1, -7654321, 3, 4)
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    with caplog.at_level(logging.DEBUG):
        one, failed, three, four = batched(model, work)
    assert (one, three, four) == ([2], [6], [8])
    assert isinstance(failed, ApiError) and failed.status == 500
    assert "ValueError" in caplog.text and "7654321" not in caplog.text
