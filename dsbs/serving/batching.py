"""Dynamic batching: rows of many requests are decoded together by one model thread."""

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

from dsbs.serving.middleware import Metrics
from dsbs.serving.settings import ApiError, busy

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Options = TypeVar("Options", bound=Hashable)
Answer = TypeVar("Answer")


@dataclass(slots=True, eq=False)
class _PendingRequest(Generic[Answer]):
    """A request: its answers so far, and how many are missing."""

    answers: list[Answer | None]
    missing: int
    future: asyncio.Future[list[Any]]


@dataclass(slots=True, eq=False)
class _Row(Generic[Item, Answer]):
    item: Item
    request: _PendingRequest[Answer]
    index: int  # in its request
    arrived: float  # by the loop's clock


class Batcher(Generic[Item, Options, Answer]):
    """Calls ``answer`` in a thread of its own with up to ``batch_size`` items of equal options.

    A batch starts when it is full, or when its oldest row has waited ``max_wait_s``. Rows collect
    by themselves while the model is busy, so only an idle model waits. At most ``max_queue`` rows
    wait; more are refused.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Item], Options], Sequence[Answer]],
        metrics: Metrics,
        *,
        batch_size: int,
        max_wait_s: float,
        max_queue: int,
    ) -> None:
        self._answer = answer
        self._metrics = metrics
        self._batch_size = batch_size
        self._max_wait_s = max_wait_s
        self._max_queue = max_queue
        self._waiting: dict[Options, deque[_Row[Item, Answer]]] = {}  # a batch has equal options
        self._arrival = asyncio.Event()
        self._to_model: queue.SimpleQueue[
            tuple[list[Item], Options, asyncio.Future[list[Answer | None]]] | None
        ] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._runner: asyncio.Task[None] | None = None

    @property
    def depth(self) -> int:
        """Number of rows that wait."""
        return sum(map(len, self._waiting.values()))

    def start(self) -> None:
        """Start the model's thread; call this within the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        # A daemon: a batch that outlasts the drain time must not keep the process alive.
        threading.Thread(target=self._work, name="model", daemon=True).start()
        self._runner = self._loop.create_task(self._run())

    def close(self) -> None:
        if self._runner is not None:
            self._runner.cancel()
        self._to_model.put(None)

    async def ask(self, items: Sequence[Item], options: Options) -> list[Answer]:
        """The answers to ``items``, in order. Canceling takes the rows that wait out of the queue.

        Raises ApiError where too many rows wait (429) or the model fails on a row (500).
        """
        assert self._loop is not None
        if self.depth + len(items) > self._max_queue:
            raise busy(f"{self.depth} rows wait for the model")
        request: _PendingRequest[Answer] = _PendingRequest(
            [None] * len(items), len(items), self._loop.create_future()
        )
        rows = self._waiting.setdefault(options, deque())
        now = self._loop.time()
        rows.extend(_Row(item, request, index, now) for index, item in enumerate(items))
        self._arrival.set()
        try:
            return await request.future
        finally:
            if request.missing:
                self._drop(request, options)

    def _drop(self, request: _PendingRequest[Answer], options: Options) -> None:
        rows = self._waiting.get(options, deque())
        remaining = [row for row in rows if row.request is not request]
        self._metrics.dropped_rows += len(rows) - len(remaining)
        rows.clear()
        rows.extend(remaining)
        if not rows:
            self._waiting.pop(options, None)

    async def _run(self) -> None:
        assert self._loop is not None
        while True:
            options, batch = await self._next_batch()
            done: asyncio.Future[list[Answer | None]] = self._loop.create_future()
            self._metrics.batch(len(batch))
            self._to_model.put(([row.item for row in batch], options, done))
            for row, answer in zip(batch, await done, strict=True):
                self._settle(row, answer)

    async def _next_batch(self) -> tuple[Options, list[_Row[Item, Answer]]]:
        """The next batch: of the options whose first row has waited longest."""
        while True:
            while not self._waiting:
                await self._wait_for_arrival()
            options, rows = min(self._waiting.items(), key=lambda entry: entry[1][0].arrived)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(rows[0].arrived + self._max_wait_s):
                    while 0 < len(rows) < self._batch_size:
                        await self._wait_for_arrival()
            batch = [rows.popleft() for _ in range(min(len(rows), self._batch_size))]
            if not rows and self._waiting.get(options) is rows:
                del self._waiting[options]
            if batch:  # empty where every client left in the meantime
                return options, batch

    async def _wait_for_arrival(self) -> None:
        self._arrival.clear()
        await self._arrival.wait()

    def _settle(self, row: _Row[Item, Answer], answer: Answer | None) -> None:
        request = row.request
        if request.future.done():
            return
        if answer is None:
            request.future.set_exception(
                ApiError(500, f"the model failed on row {row.index}", "model_failed")
            )
            return
        request.answers[row.index] = answer
        request.missing -= 1
        if not request.missing:
            request.future.set_result(list(request.answers))

    # --- in the model's thread

    def _work(self) -> None:
        while (batch := self._to_model.get()) is not None:
            items, options, done = batch
            answers = self._answers(items, options)
            assert self._loop is not None
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                self._loop.call_soon_threadsafe(_deliver, done, answers)

    def _answers(self, items: list[Item], options: Options) -> list[Answer | None]:
        """One answer per item; None where the model fails.

        A batch that fails is split in halves until the row that causes it fails alone.
        """
        try:
            return list(self._answer(items, options))
        except Exception as error:
            if len(items) > 1:
                middle = len(items) // 2
                return [
                    *self._answers(items[:middle], options),
                    *self._answers(items[middle:], options),
                ]
            # The message may hold the row's text, which belongs in no log.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("the model failed on a row: %s\n%s", type(error).__name__, frames)
            return [None]


def _deliver(done: asyncio.Future[Any], answers: list[Any]) -> None:
    if not done.done():
        done.set_result(answers)
