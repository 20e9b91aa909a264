"""Asking: send what a split lacks, a bounded number at a time, and stop when no request can succeed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from dsbs.annotate.limits import ExhaustedError, Halt, HaltedError, Pause, attempt
from dsbs.annotate.parse import parse_reply
from dsbs.annotate.prices import Price
from dsbs.annotate.store import ReplyStore, budget, request_key
from dsbs.annotate.summary import SplitSummary
from dsbs.annotate.teachers.base import RejectedError, Reply, Request, Teacher
from dsbs.artefacts import canonical
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.progress import Meter, running
from dsbs.prompts import Prompt
from dsbs.recipe import Recipe
from dsbs.records import Example
from dsbs.tasks.base import Task
from dsbs.tasks.load import stream

# Failures in a row, without a success between them, after which the endpoint is taken to be down.
FAILURES_BEFORE_STOP = 16
# Refusals before any success, after which the requests' form is taken to be wrong rather than a row.
REFUSALS_BEFORE_STOP = 5
# Seconds that replies in flight are waited for once a run is to end.
DRAIN_S = 30.0


class Work(Protocol):
    """What asking needs of a recipe's annotation."""

    recipe: Recipe
    task: Task
    prompt: Prompt | None
    price: Price | None

    def requests(self, example: Example) -> Iterator[Request]: ...


class Asking:
    """Sends what a split lacks, a bounded number at a time, and stops when no request can succeed."""

    def __init__(self, work: Work, teacher: Teacher, store: ReplyStore, meter: Meter) -> None:
        self.work, self.teacher, self.store, self.meter = work, teacher, store, meter
        self.pause, self.halt = Pause(), Halt()
        self.failure: DsbsError | None = None
        self.in_flight: dict[str, asyncio.Event] = {}
        self.refused: set[str] = set()  # keys that the endpoint answered with a final no
        self.successes = 0
        self.failures_in_a_row = 0
        self.last_failure = ""
        self.price = work.price
        self.sent = self.flying = 0
        self.spent = 0.0  # US dollars for this recipe's replies, bought now or before
        self.replies = 0

    async def split(self, split: str, total: int, summary: SplitSummary) -> None:
        """Ask for all that the split lacks, counting in ``summary``. Raises DsbsError, or KeyboardInterrupt on Ctrl-C."""
        examples = stream(self.work.recipe, self.work.task, split)
        todo = ((example, request) for example in examples for request in self.work.requests(example))
        workers = min(self.teacher.max_concurrency or 10**9, self.work.recipe.annotate.concurrency)
        started = time.monotonic()
        live = _Live(self.work.task)

        async def worker() -> None:
            for example, request in todo:  # one iterator for all: each pair goes to one worker
                try:
                    reply = await self._one(request, summary)
                except HaltedError:
                    return
                except DsbsError as error:
                    self.failure = self.failure or error
                    self.halt.call()
                    return
                live.add(self.work, example, reply)
                self.meter.update(live.done, live.note() + (f", {self.spent:.2f} dollars" if self.spent else ""))
                if self.halt.called:
                    return
                if live.done % 256 == 0:
                    await asyncio.sleep(0)  # replies from the store never wait, and others want their turn

        with running(self.meter, f"annotate {split}", total), self._interruptible():
            await self._drain([asyncio.create_task(worker()) for _ in range(workers)])
        if self.failure is not None:
            raise self.failure
        if self.halt.called:
            raise KeyboardInterrupt
        if self.refused and not self.successes and not summary.cached:
            self._stop_if_all_refused(final=True)
        summary.wall_s = time.monotonic() - started

    async def _drain(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for the workers; once the run is to end, only as long as replies in flight, which are paid, may take."""
        workers: asyncio.Future[Any] = asyncio.gather(*tasks)
        halted: asyncio.Future[Any] = asyncio.ensure_future(self.halt.wait())
        try:
            await asyncio.wait({workers, halted}, return_when=asyncio.FIRST_COMPLETED)
            if not workers.done():
                await asyncio.wait({workers}, timeout=DRAIN_S)
            if workers.done():
                workers.result()  # a worker's bug is raised here
        finally:
            halted.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C lets replies in flight arrive; the second one drops them."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def interrupt() -> None:
            if self.halt.called and task is not None:
                task.cancel()
                return
            self.meter.say("ending: waiting for replies in flight (Ctrl-C again drops them)")
            self.halt.call()

        try:
            loop.add_signal_handler(signal.SIGINT, interrupt)
        except (NotImplementedError, RuntimeError, ValueError):  # not the main thread: a notebook's kernel, a server
            yield
            return
        try:
            yield
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    async def _one(self, request: Request, summary: SplitSummary) -> Reply | None:
        key, tokens = request_key(request, self.teacher.identity), budget(request.body)
        if key in self.refused:
            return None
        kept = self.store.get(key, tokens)
        if kept is not None:
            summary.cached += 1
            self._count(kept)
            return kept
        if key in self.in_flight:  # another row asks the very same thing
            await self.in_flight[key].wait()
            return await self._one(request, summary)
        self.in_flight[key] = asyncio.Event()
        try:
            return await self._buy(request, key, tokens, summary)
        finally:
            self.in_flight.pop(key).set()

    async def _buy(self, request: Request, key: str, tokens: int, summary: SplitSummary) -> Reply | None:
        """One reply from the teacher, committed before it is returned; None where this request cannot have one."""

        async def send() -> Reply:
            await self._reserve(request, tokens)
            summary.requests += 1
            try:
                return await self.teacher.complete(request)
            finally:
                self.flying -= 1

        section = self.work.recipe.teacher
        try:
            reply = await attempt(send, attempts=section.max_attempts, pause=self.pause, halt=self.halt)
        except RejectedError as error:
            self.refused.add(key)
            self.last_failure = str(error)
            self._stop_if_all_refused(final=False)
            return None
        except ExhaustedError as error:
            self.last_failure = str(error)
            self.failures_in_a_row += 1
            if not self.successes:
                raise DsbsError(
                    f"the teacher at {section.base_url if section.kind == 'openai' else section.kind} does not answer: {error}",
                    hint="check teacher.base_url and that the server runs; nothing was bought or lost",
                ) from None
            if self.failures_in_a_row >= FAILURES_BEFORE_STOP:
                raise PartialError(
                    f"the teacher stopped answering: {error}",
                    hint="run the same command when it is back: what was bought is kept",
                ) from None
            return None
        self.store.put(key, tokens, self.teacher.identity, section.model, request.sample, reply)
        self.successes += 1
        self.failures_in_a_row = 0
        self._count(reply)
        return reply

    def _count(self, reply: Reply) -> None:
        self.replies += 1
        if self.price is not None:
            self.spent += self.price.usd(reply.prompt_tokens, reply.completion_tokens)

    async def _reserve(self, request: Request, tokens: int) -> None:
        """Wait until one more request fits the limits. Raises PartialError where it never will, HaltedError at the end."""
        limits = self.work.recipe.annotate
        if limits.max_requests is not None and self.sent >= limits.max_requests:
            raise PartialError(
                f"annotate.max_requests: {self.sent} requests were sent",
                hint="run the same command for as many more, or raise the limit: what was bought is kept",
            )
        while limits.max_usd is not None and self.price is not None:
            at_most = self.price.usd(len(canonical(request.body)) // 4, tokens)  # while no reply has told better
            each = self.spent / self.replies if self.replies else at_most
            if self.spent + (self.flying + 1) * each <= limits.max_usd + 1e-9:
                break
            if self.flying == 0:
                raise PartialError(
                    f"annotate.max_usd: this run's replies cost {self.spent:.4f} dollars, and {limits.max_usd:g} is the limit",
                    hint="raise the limit and run again: what was bought is kept",
                )
            await self.halt.sleep(0.02)  # what is in flight may turn out cheaper
        self.sent += 1
        self.flying += 1

    def _stop_if_all_refused(self, *, final: bool) -> None:
        """One bad row must not end a run; but an endpoint that refuses the first few rows refuses the request's form."""
        if not self.successes and (final or len(self.refused) >= REFUSALS_BEFORE_STOP):
            raise UserError(
                f"the teacher refuses every request: {self.last_failure}",
                hint="check teacher.model and annotate.max_tokens; teacher.extra_body adds, changes or (null) drops fields",
            )


class _Live:
    """Running figures for the progress line."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.done = self.accepted = self.correct = self.with_gold = 0

    def add(self, work: Work, example: Example, reply: Reply | None) -> None:
        assert work.prompt is not None
        self.done += 1
        label = None
        if reply is not None:
            label = parse_reply(reply.text, work.prompt, self.task, example.input, reply.finish_reason).label
        self.accepted += label is not None
        if example.label is not None:
            self.with_gold += 1
            self.correct += label is not None and self.task.correct(label, example.label)

    def note(self) -> str:
        accuracy = f", label accuracy {100 * self.correct / self.with_gold:.1f} %" if self.with_gold else ""
        return f"accepted {100 * self.accepted / self.done:.1f} %{accuracy}"
