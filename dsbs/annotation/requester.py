"""Requester: requests the replies that rows still need, a bounded number at a time.

It stops when no request can succeed, when a limit of the recipe is reached, and on Ctrl-C.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dsbs.annotation.annotator import Annotator, RowReplies
from dsbs.annotation.backends import RejectedError, Reply, Request, Teacher
from dsbs.annotation.endpoint_pool import (
    EndpointPool,
    ExhaustedError,
    StoppedError,
    StopSignal,
)
from dsbs.annotation.store import ReplyStore, RequestKeys, token_budget
from dsbs.annotation.summary import SplitSummary
from dsbs.annotation.vote import majority
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.files import canonical_json
from dsbs.formatting import count, dollars, percent
from dsbs.progress import Progress, running
from dsbs.records import Example, Reason

# Failures in a row after which the teacher is considered down.
FAILURES_BEFORE_STOP = 16
# Refusals before any success after which the requests' form is considered wrong, not the row.
REFUSALS_BEFORE_STOP = 5
CHARACTERS_PER_TOKEN = 4  # until the endpoint has counted
_ROWS_PER_YIELD = 256


@dataclass(frozen=True, slots=True)
class RowsToRequest:
    """Rows whose replies are to be bought, their number, and the summary to count in."""

    title: str
    examples: Iterable[Example]
    total: int
    summary: SplitSummary


def buy_online(
    annotator: Annotator,
    teacher: Teacher,
    store: ReplyStore,
    rows: Sequence[RowsToRequest],
    progress: Progress,
    *,
    retry_refused: bool = False,
) -> PartialError | None:
    """Buy what the rows need, and close the teacher.

    Returns the error where a limit or the endpoint ended it early. Raises other kinds of DsbsError.
    """

    async def buy() -> PartialError | None:
        try:
            requester = Requester(annotator, teacher, store, progress, retry_refused=retry_refused)
            store.hold_reserve(requester.max_in_flight)
            for split in rows:
                await requester.request_rows(split)
        except PartialError as error:
            return error
        finally:
            await teacher.close()
        return None

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(buy())
    with ThreadPoolExecutor(max_workers=1) as thread:  # a notebook's thread has a loop already
        return thread.submit(asyncio.run, buy()).result()


class Requester:
    """Requests what rows need from a teacher and commits every reply to the store."""

    def __init__(
        self,
        annotator: Annotator,
        teacher: Teacher,
        store: ReplyStore,
        progress: Progress,
        *,
        retry_refused: bool = False,
    ) -> None:
        recipe = annotator.recipe
        self.annotator = annotator
        self.teacher = teacher
        self.store = store
        self.progress = progress
        self.retry_refused = retry_refused
        self.max_in_flight = min(teacher.max_in_flight(recipe), recipe.annotate.concurrency)
        self.identities = [endpoint.identity for endpoint in teacher.endpoints]
        for endpoint in teacher.endpoints:
            store.adapt(endpoint, recipe.teacher.model, progress.say)
        self.stop_signal = StopSignal()
        self.pool = EndpointPool(
            teacher.endpoints, self.max_in_flight, self.stop_signal, progress.say
        )
        self.failure: Exception | None = None
        self.failures_in_a_row = 0
        # an endpoint that has answered before is not wrong because the few rows left fail
        self.has_answered = store.has_replies(self.identities, recipe.teacher.model)
        self.last_failure = ""
        self.pending_keys: dict[str, asyncio.Event] = {}
        # refusals before the first success, by key: they may be about the requests' form
        self.unconfirmed_refusals: dict[str, str] = {}
        self.sent = 0
        self.budget = _Budget(annotator, store, self.stop_signal)

    async def request_rows(self, rows: RowsToRequest) -> None:
        """Buy what the rows need. Raises DsbsError, or KeyboardInterrupt on Ctrl-C."""
        summary = rows.summary
        started = time.monotonic()
        wasted_before = self.pool.wasted.copy()
        figures = _ProgressFigures(self.annotator)
        examples = iter(rows.examples)  # shared: each row goes to one worker
        with running(self.progress, f"annotate {rows.title}", rows.total), self._interruptible():
            workers = [
                asyncio.create_task(self._work(examples, figures, summary))
                for _ in range(min(self.max_in_flight, max(1, rows.total)))
            ]
            await self._drain(workers)
        summary.wasted = self.pool.wasted - wasted_before
        summary.wall_s += time.monotonic() - started
        if self.failure is not None:
            raise self.failure
        if self.stop_signal.is_set:
            raise KeyboardInterrupt
        if self.unconfirmed_refusals:
            self._stop_if_all_refused(final=True)
        self._confirm_refusals()

    async def _work(
        self, examples: Iterator[Example], figures: _ProgressFigures, summary: SplitSummary
    ) -> None:
        for example in examples:
            try:
                replies = await self._request_row(example, summary)
            except StoppedError:
                return
            except Exception as error:  # bugs too: replies in flight are paid and must be stored
                self.failure = self.failure or error
                self.stop_signal.stop()
                return
            figures.add(example, replies)
            self.progress.update(figures.rows, figures.note(self.budget.spent))
            if self.stop_signal.is_set:
                return
            if figures.rows % _ROWS_PER_YIELD == 0:
                await asyncio.sleep(0)  # stored replies never wait; let other tasks run

    async def _request_row(self, example: Example, summary: SplitSummary) -> RowReplies:
        replies = RowReplies()
        while requests := self.annotator.next_requests(example, replies):
            outcomes = await self._request_all(requests, summary)
            for request, (key, reply) in zip(requests, outcomes, strict=True):
                self.annotator.add_reply(example, replies, request, key, reply)
        return replies

    async def _request_all(
        self, requests: list[Request], summary: SplitSummary
    ) -> list[tuple[str, Reply | Reason]]:
        if len(requests) == 1:
            return [await self._request(requests[0], summary)]
        results = await asyncio.gather(
            *(self._request(request, summary) for request in requests), return_exceptions=True
        )
        outcomes = []
        for result in results:
            if isinstance(result, BaseException):  # the other replies are in the store by now
                raise result
            outcomes.append(result)
        return outcomes

    async def _drain(self, workers: list[asyncio.Task[None]]) -> None:
        """Wait for the workers; after a stop, only as long as replies in flight may take."""
        finished: asyncio.Task[Any] = asyncio.create_task(asyncio.wait(workers))
        stopped: asyncio.Task[Any] = asyncio.create_task(self.stop_signal.wait())
        try:
            await asyncio.wait({finished, stopped}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({finished}, timeout=self.annotator.recipe.teacher.timeout_s)
        finally:
            for task in (finished, stopped, *workers):
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C waits for replies in flight; the second one drops them."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def interrupt() -> None:
            if self.stop_signal.is_set and task is not None:
                task.cancel()
                return
            self.progress.say("stopping: waiting for replies in flight (Ctrl-C again drops them)")
            self.stop_signal.stop()

        try:
            previous = signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(interrupt))
        except ValueError:
            yield  # not the main thread: a notebook's kernel, a server
            return
        try:
            yield
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGINT, previous or signal.SIG_DFL)

    async def _request(self, request: Request, summary: SplitSummary) -> tuple[str, Reply | Reason]:
        """A request's key with its reply, stored or bought, or the reason why there is none."""
        keys = self.store.keys(request, self.identities)
        tokens = token_budget(request.body)
        stored = self.store.find(keys.all, tokens, raw=self.annotator.recipe.annotate.logprobs)
        if stored is not None:
            summary.cached += 1
            self.budget.count_stored(stored[1])
            return stored
        first_key = keys.now[0]
        if first_key in self.unconfirmed_refusals or (
            not self.retry_refused and self.store.is_refused(keys.now)
        ):
            return first_key, "refused"
        if first_key in self.pending_keys:  # another row makes the very same request
            await self.pending_keys[first_key].wait()
            if self.stop_signal.is_set:
                raise StoppedError
            return await self._request(request, summary)
        self.pending_keys[first_key] = asyncio.Event()
        try:
            return await self._buy(request, keys, tokens, summary)
        finally:
            self.pending_keys.pop(first_key).set()

    async def _buy(
        self, request: Request, keys: RequestKeys, tokens: int, summary: SplitSummary
    ) -> tuple[str, Reply | Reason]:
        """Buy one reply and commit it, or return the reason why there is none."""

        def count_attempt() -> None:
            self._check_max_requests()
            self.sent += 1
            summary.requests += 1

        teacher = self.annotator.recipe.teacher
        prompt_tokens = estimated_tokens(request.body)
        reserved = await self.budget.reserve(prompt_tokens, tokens)
        try:
            state, reply = await self.pool.deliver(
                request,
                prompt_tokens + tokens,
                attempts=teacher.max_attempts,
                before_attempt=count_attempt,
            )
        except RejectedError as error:
            self.last_failure = str(error)
            self._record_refusal(keys.now[0], str(error))
            return keys.now[0], "refused"
        except ExhaustedError as error:
            self.last_failure = str(error)
            self.failures_in_a_row += 1
            self._stop_if_down(error)
            return keys.now[0], "no-reply"
        finally:
            self.budget.release(reserved)
        keys = self.store.keys(request, self.identities)  # its form may have been adapted
        key = keys.now[self.pool.states.index(state)]
        self.store.put(key, tokens, state.endpoint.identity, teacher.model, request.sample, reply)
        self.failures_in_a_row = 0
        self.has_answered = True
        self._confirm_refusals()
        self.budget.count_bought(reply, prompt_tokens, reserved)
        return key, reply

    def _stop_if_down(self, error: ExhaustedError) -> None:
        if not self.has_answered:
            names = ", ".join(endpoint.name for endpoint in self.teacher.endpoints)
            raise DsbsError(
                f"the teacher at {names} does not answer: {error}",
                hint="check teacher.base_url and that the server runs; nothing was bought or lost",
            ) from None
        if self.failures_in_a_row >= FAILURES_BEFORE_STOP:
            raise PartialError(
                f"the teacher stopped answering: {error}",
                hint="run the same command when it is back: the replies so far are stored",
            ) from None

    def _confirm_refusals(self) -> None:
        """Store refusals: the endpoint answers other requests, so they concern single rows."""
        for key, message in self.unconfirmed_refusals.items():
            self.store.refuse(key, message)
        self.unconfirmed_refusals.clear()

    def _record_refusal(self, key: str, message: str) -> None:
        if self.has_answered:
            self.store.refuse(key, message)
        else:
            self.unconfirmed_refusals[key] = message
            self._stop_if_all_refused(final=False)

    def _stop_if_all_refused(self, *, final: bool) -> None:
        """One bad row must not end a run; but if the first few are refused, the form is wrong."""
        if self.has_answered:
            return
        if final or len(self.unconfirmed_refusals) >= REFUSALS_BEFORE_STOP:
            raise UserError(
                f"the teacher refuses every request: {self.last_failure}",
                hint="check teacher.model and annotate.max_tokens; teacher.extra_body adds, "
                "changes or (null) drops fields",
            )

    def _check_max_requests(self) -> None:
        """Raises PartialError where annotate.max_requests allows no further attempt."""
        limit = self.annotator.recipe.annotate.max_requests
        if limit is not None and self.sent >= limit:
            raise max_requests_reached(self.sent)


def estimated_tokens(body: dict[str, Any]) -> int:
    """A rough count of a request's prompt tokens."""
    return len(canonical_json(body)) // CHARACTERS_PER_TOKEN


def max_requests_reached(sent: int) -> PartialError:
    """The error for a run that annotate.max_requests ends."""
    return PartialError(
        f"annotate.max_requests: the limit of {count(sent, 'request')} is reached",
        hint="run the same command for as many more, or raise the limit: the replies so far are "
        "stored",
    )


class _Budget:
    """US dollars for this recipe's replies, held below annotate.max_usd.

    Without that limit ``spent`` counts replies, stored ones too, as the rows come by.
    """

    def __init__(self, annotator: Annotator, store: ReplyStore, stop_signal: StopSignal) -> None:
        self._price = annotator.price
        self._limit = annotator.recipe.annotate.max_usd
        self.spent = 0.0
        if self._limit is not None:
            self.spent = annotator.usd_spent(store)
        self._reserved = 0.0  # at most, for requests in flight
        self._in_flight = 0
        self._prompt_token_ratio = 1.0  # highest ratio of counted to estimated prompt tokens
        self._stop_signal = stop_signal
        self._released = asyncio.Event()
        stop_signal.on_stop(self._released.set)

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
                    hint="raise the limit and run again: the replies so far are stored",
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

    def count_stored(self, reply: Reply) -> None:
        if self._price is not None and self._limit is None:
            self.spent += self._price.usd(reply)

    def count_bought(self, reply: Reply, prompt_tokens: int, reserved: float) -> None:
        if reply.prompt_tokens is not None and prompt_tokens:
            ratio = reply.prompt_tokens / prompt_tokens
            self._prompt_token_ratio = max(self._prompt_token_ratio, ratio)
        if self._price is None:
            return
        if reply.prompt_tokens is None and self._limit is not None:
            self.spent += reserved  # not counted by the endpoint: assume the most
        else:
            self.spent += self._price.usd(reply)


class _ProgressFigures:
    """Figures for the progress line."""

    def __init__(self, annotator: Annotator) -> None:
        self._task = annotator.task
        self.rows = 0
        self._counts: Counter[str] = Counter()

    def add(self, example: Example, replies: RowReplies) -> None:
        self.rows += 1
        vote = majority(replies.unhinted, self._task)
        self._counts["accepted"] += vote.reason is None
        if example.label is not None:
            self._counts["gold"] += 1
            self._counts["correct"] += vote.label is not None and self._task.correct(
                vote.label, example.label
            )

    def note(self, usd: float) -> str:
        counts = self._counts
        note = f"accepted {percent(counts['accepted'] / self.rows)}"
        if counts["gold"]:
            note += f", label accuracy {percent(counts['correct'] / counts['gold'])}"
        if usd:
            note += f", {dollars(usd)}"
        return note
