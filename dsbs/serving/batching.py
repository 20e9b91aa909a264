"""Rows of many requests in batches through one model: what waits, who is answered, and who went away."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dsbs.serving.metrics import Metrics
from dsbs.serving.settings import ApiError, busy

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
GenerationOptions = TypeVar("GenerationOptions", bound=Hashable)
Out = TypeVar("Out")


@dataclass(slots=True, eq=False)
class _Job(Generic[Out]):
    """A request: its answers so far, and how many are missing."""

    answers: list[Out | None]
    missing: int
    future: asyncio.Future[list[Any]]


@dataclass(slots=True, eq=False)
class _Row(Generic[Item, Out]):
    item: Item
    job: _Job[Out]
    place: int  # in its job
    arrived: float  # by the loop's clock


class Batcher(Generic[Item, GenerationOptions, Out]):
    """``answer`` takes at most ``batch_size`` items that are asked in the same way, in a thread of its own, one call at a time.

    A batch starts when it is full, or when its oldest row has waited ``max_wait_s``: while the model is busy rows gather by
    themselves, so that only an idle model ever waits. At most ``most`` rows wait; more are refused.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Item], GenerationOptions], Sequence[Out]],
        metrics: Metrics,
        *,
        batch_size: int,
        max_wait_s: float,
        most: int,
    ) -> None:
        self._answer, self._metrics = answer, metrics
        self._batch_size, self._max_wait, self._most = batch_size, max_wait_s, most
        self._waiting: dict[
            GenerationOptions, deque[_Row[Item, Out]]
        ] = {}  # those of one batch are asked in the same way
        self._arrived = asyncio.Event()
        self._to_model: queue.SimpleQueue[
            tuple[list[Item], GenerationOptions, asyncio.Future[list[Out | None]]] | None
        ] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runner: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Rows that wait."""
        return sum(map(len, self._waiting.values()))

    def start(self) -> None:
        """Within the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        # a daemon: a batch that outlives the time for stopping must not hold up the end of the process
        threading.Thread(target=self._work, name="model", daemon=True).start()
        self._runner = self._loop.create_task(self._run())

    def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
        self._to_model.put(None)

    async def ask(self, items: Sequence[Item], how: GenerationOptions) -> list[Out]:
        """The answers to ``items``, in their order. Cancelled, its rows that wait are taken out.

        Raises Refused where too many wait (429), or where the model fails on a row (500).
        """
        assert self._loop is not None
        if self.depth + len(items) > self._most:
            raise busy(f"{self.depth} rows wait for the model")
        job: _Job[Out] = _Job([None] * len(items), len(items), self._loop.create_future())
        rows = self._waiting.setdefault(how, deque())
        now = self._loop.time()
        rows.extend(_Row(item, job, place, now) for place, item in enumerate(items))
        self._arrived.set()
        try:
            return await job.future
        finally:
            if job.missing:
                self._drop(job, how)

    def _drop(self, job: _Job[Out], how: GenerationOptions) -> None:
        rows = self._waiting.get(how, deque())
        kept = [row for row in rows if row.job is not job]
        self._metrics.dropped += len(rows) - len(kept)
        rows.clear()
        rows.extend(kept)
        if not rows:
            self._waiting.pop(how, None)

    async def _run(self) -> None:
        assert self._loop is not None
        while True:
            how, batch = await self._gather()
            done: asyncio.Future[list[Out | None]] = self._loop.create_future()
            self._metrics.batch(len(batch))
            self._to_model.put(([row.item for row in batch], how, done))
            for row, answer in zip(batch, await done, strict=True):
                self._settle(row, answer)

    async def _gather(self) -> tuple[GenerationOptions, list[_Row[Item, Out]]]:
        """The next batch: of the way of asking whose first row has waited longest."""
        while True:
            while not self._waiting:
                await self._arrival()
            how, rows = min(self._waiting.items(), key=lambda one: one[1][0].arrived)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(rows[0].arrived + self._max_wait):
                    while 0 < len(rows) < self._batch_size:
                        await self._arrival()
            batch = [rows.popleft() for _ in range(min(len(rows), self._batch_size))]
            if not rows and self._waiting.get(how) is rows:
                del self._waiting[how]
            if batch:  # its clients may all have left meanwhile
                return how, batch

    async def _arrival(self) -> None:
        self._arrived.clear()
        await self._arrived.wait()

    def _settle(self, row: _Row[Item, Out], answer: Out | None) -> None:
        job = row.job
        if job.future.done():
            return
        if answer is None:
            job.future.set_exception(
                ApiError(500, f"the model failed on row {row.place}", "model_failed")
            )
            return
        job.answers[row.place] = answer
        job.missing -= 1
        if not job.missing:
            job.future.set_result(list(job.answers))

    # --- in the model's thread

    def _work(self) -> None:
        while (batch := self._to_model.get()) is not None:
            items, how, done = batch
            answers = self._answers(items, how)
            assert self._loop is not None
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits for it
                self._loop.call_soon_threadsafe(_deliver, done, answers)

    def _answers(self, items: list[Item], how: GenerationOptions) -> list[Out | None]:
        """An answer for each; None where the model fails on it. A batch that fails is halved, so that one row fails alone."""
        try:
            return list(self._answer(items, how))
        except Exception as error:
            if len(items) > 1:
                half = len(items) // 2
                return self._answers(items[:half], how) + self._answers(items[half:], how)
            # the message may hold the row's text, which belongs in no log
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("the model failed on a row: %s\n%s", type(error).__name__, frames)
            return [None]


def _deliver(done: asyncio.Future[Any], answers: list[Any]) -> None:
    if not done.done():
        done.set_result(answers)
