"""Asking: send what the rows lack, a bounded number at a time, and stop when no request can succeed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dsbs.annotate.annotator import Annotator, Answers
from dsbs.annotate.limits import ExhaustedError, Halt, HaltedError, Pool
from dsbs.annotate.store import ReplyStore, budget, request_keys
from dsbs.annotate.summary import SplitSummary
from dsbs.annotate.teachers.base import RejectedError, Reply, Request, Teacher
from dsbs.annotate.vote import majority
from dsbs.artefacts import canonical
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.progress import Meter, running
from dsbs.records import Example, Reason

# Failures in a row, without a success between them, after which the teacher is taken to be down.
FAILURES_BEFORE_STOP = 16
# Refusals before any success, after which the requests' form is taken to be wrong rather than a row.
REFUSALS_BEFORE_STOP = 5
# Seconds that replies in flight are waited for once a run is to end.
DRAIN_S = 30.0


class Asking:
    """Sends what rows lack, a bounded number at a time, and stops when no request can succeed."""

    def __init__(self, work: Annotator, teacher: Teacher, store: ReplyStore, meter: Meter) -> None:
        self.work, self.teacher, self.store, self.meter = work, teacher, store, meter
        self.halt = Halt()
        self.most = min(teacher.max_concurrency or 10**9, work.recipe.annotate.concurrency)
        self.pool = Pool(teacher.endpoints, self.most, self.halt, meter.say)
        self.identities = [endpoint.identity for endpoint in teacher.endpoints]
        self.failure: DsbsError | None = None
        self.in_flight: dict[str, asyncio.Event] = {}
        self.refusals: dict[str, str] = {}  # before the first success: not believed, and not kept, yet
        self.successes = 0
        self.failures_in_a_row = 0
        self.last_failure = ""
        self.sent = self.flying = 0
        self.spent = 0.0  # US dollars for this recipe's replies, bought now or before
        self.replies = 0

    async def rows(self, title: str, examples: Iterable[Example], total: int, summary: SplitSummary) -> None:
        """Ask for all that the rows lack, counting in ``summary``. Raises DsbsError, or KeyboardInterrupt on Ctrl-C."""
        todo = iter(examples)
        started = time.monotonic()
        live = _Live(self.work)

        async def worker() -> None:
            for example in todo:  # one iterator for all: each row goes to one worker
                answers = Answers()
                try:
                    while wave := self.work.wanted(example, answers):
                        for request, (key, reply) in zip(wave, await self._wave(wave, summary), strict=True):
                            self.work.add(example, answers, request, key, reply)
                except HaltedError:
                    return
                except DsbsError as error:
                    self.failure = self.failure or error
                    self.halt.call()
                    return
                live.add(example, answers)
                self.meter.update(live.done, live.note() + (f", {self.spent:.2f} dollars" if self.spent else ""))
                if self.halt.called:
                    return
                if live.done % 256 == 0:
                    await asyncio.sleep(0)  # replies from the store never wait, and others want their turn

        wasted = self.pool.wasted.copy()
        with running(self.meter, title, total), self._interruptible():
            await self._drain([asyncio.create_task(worker()) for _ in range(min(self.most, max(1, total)))])
        summary.wasted = self.pool.wasted - wasted
        summary.wall_s += time.monotonic() - started
        if self.failure is not None:
            raise self.failure
        if self.halt.called:
            raise KeyboardInterrupt
        if self.refusals and not summary.cached:
            self._stop_if_all_refused(final=True)
        self._believe_refusals()

    async def _wave(self, wave: list[Request], summary: SplitSummary) -> list[tuple[str, Reply | Reason]]:
        if len(wave) == 1:
            return [await self._one(wave[0], summary)]
        found = await asyncio.gather(*(self._one(request, summary) for request in wave), return_exceptions=True)
        for one in found:  # the others' replies are in the store by now
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if not isinstance(one, BaseException)]

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

    async def _one(self, request: Request, summary: SplitSummary) -> tuple[str, Reply | Reason]:
        keys, tokens = request_keys(request, self.identities), budget(request.body)
        kept = self.store.find(keys, tokens, raw=self.work.recipe.annotate.logprobs)
        if kept is not None:
            summary.cached += 1
            self._count(kept[1])
            return kept
        first = keys[0]
        if first in self.refusals or self.store.is_refused(keys):
            return first, "refused"
        if first in self.in_flight:  # another row asks the very same thing
            await self.in_flight[first].wait()
            if self.halt.called:
                raise HaltedError
            return await self._one(request, summary)
        self.in_flight[first] = asyncio.Event()
        try:
            return await self._buy(request, keys, tokens, summary)
        finally:
            self.in_flight.pop(first).set()

    async def _buy(self, request: Request, keys: list[str], tokens: int, summary: SplitSummary) -> tuple[str, Reply | Reason]:
        """One reply from the teacher, committed before it is returned, or the reason why this request cannot have one."""

        def before() -> None:
            self._may_send()
            self.sent += 1
            summary.requests += 1

        section = self.work.recipe.teacher
        prompt_tokens = len(canonical(request.body)) // 4  # until the endpoint has counted: four characters a token
        await self._reserve(prompt_tokens, tokens)
        try:
            gate, reply = await self.pool.deliver(request, prompt_tokens + tokens, attempts=section.max_attempts, before=before)
        except RejectedError as error:
            self.last_failure = str(error)
            self._refused(keys[0], str(error))
            return keys[0], "refused"
        except ExhaustedError as error:
            self.last_failure = str(error)
            self.failures_in_a_row += 1
            if not self.successes:
                where = ", ".join(endpoint.name for endpoint in self.teacher.endpoints)
                raise DsbsError(
                    f"the teacher at {where} does not answer: {error}",
                    hint="check teacher.base_url and that the server runs; nothing was bought or lost",
                ) from None
            if self.failures_in_a_row >= FAILURES_BEFORE_STOP:
                raise PartialError(
                    f"the teacher stopped answering: {error}",
                    hint="run the same command when it is back: what was bought is kept",
                ) from None
            return keys[0], "no-reply"
        finally:
            self.flying -= 1
        key = keys[self.pool.gates.index(gate)]
        self.store.put(key, tokens, gate.endpoint.identity, section.model, request.sample, reply)
        self.failures_in_a_row = 0
        self.successes += 1
        self._believe_refusals()
        self._count(reply)
        return key, reply

    def _believe_refusals(self) -> None:
        """The endpoint does answer others: it meant those requests alone."""
        for refused, said in self.refusals.items():
            self.store.refuse(refused, said)
        self.refusals.clear()

    def _refused(self, key: str, said: str) -> None:
        if self.successes:
            self.store.refuse(key, said)
        else:
            self.refusals[key] = said
            self._stop_if_all_refused(final=False)

    def _count(self, reply: Reply) -> None:
        self.replies += 1
        if self.work.price is not None:
            self.spent += self.work.price.usd(reply)

    def _may_send(self) -> None:
        """Raises PartialError where annotate.max_requests allows no further attempt."""
        most = self.work.recipe.annotate.max_requests
        if most is not None and self.sent >= most:
            raise PartialError(
                f"annotate.max_requests: {self.sent} requests were sent",
                hint="run the same command for as many more, or raise the limit: what was bought is kept",
            )

    async def _reserve(self, prompt_tokens: int, tokens: int) -> None:
        """Wait until one more reply fits annotate.max_usd. Raises PartialError where it never will, HaltedError at the end."""
        most, price = self.work.recipe.annotate.max_usd, self.work.price
        while most is not None and price is not None:
            at_most = price.of(prompt_tokens, tokens)  # while no reply has told better
            each = self.spent / self.replies if self.replies else at_most
            if self.spent + (self.flying + 1) * each <= most + 1e-9:
                break
            if self.flying == 0:
                raise PartialError(
                    f"annotate.max_usd: this run's replies cost {self.spent:.4f} dollars, and {most:g} is the limit",
                    hint="raise the limit and run again: what was bought is kept",
                )
            await self.halt.sleep(0.02)  # what is in flight may turn out cheaper
        self.flying += 1

    def _stop_if_all_refused(self, *, final: bool) -> None:
        """One bad row must not end a run; but an endpoint that refuses the first few rows refuses the request's form."""
        if not self.successes and (final or len(self.refusals) >= REFUSALS_BEFORE_STOP):
            raise UserError(
                f"the teacher refuses every request: {self.last_failure}",
                hint="check teacher.model and annotate.max_tokens; teacher.extra_body adds, changes or (null) drops fields",
            )


class _Live:
    """Running figures for the progress line."""

    def __init__(self, work: Annotator) -> None:
        self.work = work
        self.done = 0
        self.counts: Counter[str] = Counter()

    def add(self, example: Example, answers: Answers) -> None:
        self.done += 1
        vote = majority(answers.own, self.work.task)
        self.counts["accepted"] += vote.reason is None
        if example.label is not None:
            self.counts["gold"] += 1
            self.counts["correct"] += vote.label is not None and self.work.task.correct(vote.label, example.label)

    def note(self) -> str:
        counts = self.counts
        accuracy = f", label accuracy {100 * counts['correct'] / counts['gold']:.1f} %" if counts["gold"] else ""
        return f"accepted {100 * counts['accepted'] / self.done:.1f} %{accuracy}"
