"""Asking: send what the rows lack, a bounded number at a time, and stop when no request can succeed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dsbs.annotation.annotator import Annotator, Answers
from dsbs.annotation.backends.base import RejectedError, Reply, Request, Teacher
from dsbs.annotation.deriving import spent_before
from dsbs.annotation.limits import EndpointPool, ExhaustedError, StoppedError, StopSignal
from dsbs.annotation.store import ReplyStore, budget, request_keys
from dsbs.annotation.summary import SplitSummary
from dsbs.annotation.vote import majority
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.files import canonical_json
from dsbs.progress import Progress, running
from dsbs.records.rows import Example, Reason

# Failures in a row, without a success between them, after which the teacher is taken to be down.
FAILURES_BEFORE_STOP = 16
# Refusals before any success, after which the requests' form is taken to be wrong rather than a row.
REFUSALS_BEFORE_STOP = 5


class Requester:
    """Sends what rows lack, a bounded number at a time, and stops when no request can succeed."""

    def __init__(
        self,
        work: Annotator,
        teacher: Teacher,
        store: ReplyStore,
        progress: Progress,
        *,
        retry_refused: bool = False,
    ) -> None:
        self.work, self.teacher, self.store, self.progress = work, teacher, store, progress
        self.halt = StopSignal()
        self.landed = asyncio.Event()  # set whenever a reply comes back
        self.halt.tell(self.landed.set)
        self.most = min(teacher.max_concurrency or 10**9, work.recipe.annotate.concurrency)
        self.pool = EndpointPool(teacher.endpoints, self.most, self.halt, progress.say)
        self.identities = [endpoint.identity for endpoint in teacher.endpoints]
        self.failure: Exception | None = None
        self.retry_refused = retry_refused
        # an endpoint that has answered before is not taken to be wrong because the few rows that are left fail
        self.answers = store.has_replies(self.identities, work.recipe.teacher.model)
        self.in_flight: dict[str, asyncio.Event] = {}
        self.refusals: dict[
            str, str
        ] = {}  # before the first success: not believed, and not kept, yet
        self.failures_in_a_row = 0
        self.last_failure = ""
        self.sent = self.flying = 0
        self.limited = work.recipe.annotate.max_usd is not None
        # US dollars for this recipe's replies, bought now or before (those before are met one by one where nothing is limited)
        self.spent = spent_before(work, store) if self.limited else 0.0
        self.reserved = 0.0  # at most, for what is in flight
        self.dearest = 1.0  # prompt tokens for a token that was reckoned with, at most so far

    async def rows(
        self, title: str, examples: Iterable[Example], total: int, summary: SplitSummary
    ) -> None:
        """Ask for all that the rows lack, counting in ``summary``. Raises DsbsError, or KeyboardInterrupt on Ctrl-C."""
        todo = iter(examples)
        started = time.monotonic()
        live = _Live(self.work)

        async def worker() -> None:
            for example in todo:  # one iterator for all: each row goes to one worker
                answers = Answers()
                try:
                    while wave := self.work.wanted(example, answers):
                        for request, (key, reply) in zip(
                            wave, await self._wave(wave, summary), strict=True
                        ):
                            self.work.add(example, answers, request, key, reply)
                except StoppedError:
                    return
                except (
                    Exception
                ) as error:  # a bug too: what is in flight is paid and must arrive first
                    self.failure = self.failure or error
                    self.halt.call()
                    return
                live.add(example, answers)
                self.progress.update(
                    live.done, live.note() + (f", {self.spent:.2f} dollars" if self.spent else "")
                )
                if self.halt.called:
                    return
                if live.done % 256 == 0:
                    await asyncio.sleep(
                        0
                    )  # replies from the store never wait, and others want their turn

        wasted = self.pool.wasted.copy()
        with running(self.progress, title, total), self._interruptible():
            await self._drain(
                [asyncio.create_task(worker()) for _ in range(min(self.most, max(1, total)))]
            )
        summary.wasted = self.pool.wasted - wasted
        summary.wall_s += time.monotonic() - started
        if self.failure is not None:
            raise self.failure
        if self.halt.called:
            raise KeyboardInterrupt
        if self.refusals:
            self._stop_if_all_refused(final=True)
        self._believe_refusals()

    async def _wave(
        self, wave: list[Request], summary: SplitSummary
    ) -> list[tuple[str, Reply | Reason]]:
        if len(wave) == 1:
            return [await self._one(wave[0], summary)]
        found = await asyncio.gather(
            *(self._one(request, summary) for request in wave), return_exceptions=True
        )
        for one in found:  # the others' replies are in the store by now
            if isinstance(one, BaseException):
                raise one
        return [one for one in found if not isinstance(one, BaseException)]

    async def _drain(self, tasks: list[asyncio.Task[None]]) -> None:
        """Wait for the workers; once the run is to end, only as long as replies in flight, which are paid, may take."""
        ended: asyncio.Task[Any] = asyncio.create_task(asyncio.wait(tasks))
        halted: asyncio.Task[Any] = asyncio.create_task(self.halt.wait())
        try:
            await asyncio.wait({ended, halted}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({ended}, timeout=self.work.recipe.teacher.timeout_s)
        finally:
            for task in (ended, halted, *tasks):
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
            self.progress.say("ending: waiting for replies in flight (Ctrl-C again drops them)")
            self.halt.call()

        try:
            loop.add_signal_handler(signal.SIGINT, interrupt)
        except (
            NotImplementedError,
            RuntimeError,
            ValueError,
        ):  # not the main thread: a notebook's kernel, a server
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
            if self.work.price is not None and not self.limited:
                self.spent += self.work.price.usd(kept[1])
            return kept
        first = keys[0]
        if first in self.refusals or (not self.retry_refused and self.store.is_refused(keys)):
            return first, "refused"
        if first in self.in_flight:  # another row asks the very same thing
            await self.in_flight[first].wait()
            if self.halt.called:
                raise StoppedError
            return await self._one(request, summary)
        self.in_flight[first] = asyncio.Event()
        try:
            return await self._buy(request, keys, tokens, summary)
        finally:
            self.in_flight.pop(first).set()

    async def _buy(
        self, request: Request, keys: list[str], tokens: int, summary: SplitSummary
    ) -> tuple[str, Reply | Reason]:
        """One reply from the teacher, committed before it is returned, or the reason why this request cannot have one."""

        def before() -> None:
            self._may_send()
            self.sent += 1
            summary.requests += 1

        section = self.work.recipe.teacher
        prompt_tokens = (
            len(canonical_json(request.body)) // 4
        )  # until the endpoint has counted: four characters a token
        reserved = await self._reserve(prompt_tokens, tokens)
        try:
            gate, reply = await self.pool.deliver(
                request, prompt_tokens + tokens, attempts=section.max_attempts, before=before
            )
        except RejectedError as error:
            self.last_failure = str(error)
            self._refused(keys[0], str(error))
            return keys[0], "refused"
        except ExhaustedError as error:
            self.last_failure = str(error)
            self.failures_in_a_row += 1
            if not self.answers:
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
            self.reserved -= reserved
            self.landed.set()
        key = keys[self.pool.gates.index(gate)]
        self.store.put(key, tokens, gate.endpoint.identity, section.model, request.sample, reply)
        self.failures_in_a_row = 0
        self.answers = True
        self._believe_refusals()
        self._charge(reply, prompt_tokens, reserved)
        return key, reply

    def _believe_refusals(self) -> None:
        """The endpoint does answer others: it meant those requests alone."""
        for refused, said in self.refusals.items():
            self.store.refuse(refused, said)
        self.refusals.clear()

    def _refused(self, key: str, said: str) -> None:
        if self.answers:
            self.store.refuse(key, said)
        else:
            self.refusals[key] = said
            self._stop_if_all_refused(final=False)

    def _charge(self, reply: Reply, prompt_tokens: int, at_most: float) -> None:
        if reply.prompt_tokens is not None and prompt_tokens:
            self.dearest = max(self.dearest, reply.prompt_tokens / prompt_tokens)
        if (
            self.work.price is not None
        ):  # where the endpoint does not count, the limit reckons with the most
            self.spent += (
                at_most
                if reply.prompt_tokens is None and self.limited
                else self.work.price.usd(reply)
            )

    def _may_send(self) -> None:
        """Raises PartialError where annotate.max_requests allows no further attempt."""
        most = self.work.recipe.annotate.max_requests
        if most is not None and self.sent >= most:
            raise PartialError(
                f"annotate.max_requests: {self.sent} requests were sent",
                hint="run the same command for as many more, or raise the limit: what was bought is kept",
            )

    async def _reserve(self, prompt_tokens: int, tokens: int) -> float:
        """Wait until the most that one more reply may cost fits annotate.max_usd; returns that.

        Raises PartialError where it never will, HaltedError at the end.
        """
        most, price = self.work.recipe.annotate.max_usd, self.work.price
        at_most = 0.0 if price is None else price.of(int(prompt_tokens * self.dearest) + 1, tokens)
        while most is not None and self.spent + self.reserved + at_most > most + 1e-9:
            if self.flying == 0:
                raise PartialError(
                    f"annotate.max_usd: replies for {self.spent:.4f} dollars; one more might pass the limit of {most:g}",
                    hint="raise the limit and run again: what was bought is kept",
                )
            self.landed.clear()
            await self.landed.wait()  # what is in flight may turn out cheaper
            if self.halt.called:
                raise StoppedError
        self.flying += 1
        self.reserved += at_most
        return at_most

    def _stop_if_all_refused(self, *, final: bool) -> None:
        """One bad row must not end a run; but an endpoint that refuses the first few rows refuses the request's form."""
        if not self.answers and (final or len(self.refusals) >= REFUSALS_BEFORE_STOP):
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
            self.counts["correct"] += vote.label is not None and self.work.task.correct(
                vote.label, example.label
            )

    def note(self) -> str:
        counts = self.counts
        accuracy = (
            f", label accuracy {100 * counts['correct'] / counts['gold']:.1f} %"
            if counts["gold"]
            else ""
        )
        return f"accepted {100 * counts['accepted'] / self.done:.1f} %{accuracy}"
