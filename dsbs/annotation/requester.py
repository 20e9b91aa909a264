"""Requester: requests the replies that rows still need, a bounded number at a time.

It stops when no request can succeed, when a limit of the recipe is reached, and on Ctrl-C.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dsbs.annotation.annotator import (
    Annotator,
    Outcome,
    RowReplies,
    estimated_tokens,
    expected_tokens,
    max_requests_reached,
)
from dsbs.annotation.backends import RejectedError, Reply, Request, Teacher, TransientError
from dsbs.annotation.endpoint_pool import (
    Budget,
    EndpointPool,
    EndpointState,
    ExhaustedError,
    StoppedError,
    StopSignal,
    backoff,
)
from dsbs.annotation.store import ReplyStore, Stored, token_budget
from dsbs.annotation.summary import ProgressFigures, Refusals, RowsToRequest, SplitSummary
from dsbs.errors import DsbsError, PartialError
from dsbs.progress import Progress, running
from dsbs.records import Example

# Failures or equal refusals in a row after which the teacher is considered down.
FAILURES_BEFORE_STOP = 16
FAILURES_BEFORE_FIRST_ANSWER = 3  # of different rows
# Refusals before any answer after which rows from elsewhere in the file are asked.
REFUSALS_BEFORE_STOP = 5
FLAGGED_BEFORE_STOP = 100  # of rows that a content filter flagged
ROWS_ELSEWHERE = 3
BILLED_TRIES = 2  # of a request whose replies cost and hold no answer
_ROWS_PER_YIELD = 256


def send_requests(
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
                await requester.request_rows(split, is_last=split is rows[-1])
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
        self.pending_keys: dict[str, asyncio.Event] = {}
        self.refusals = Refusals(store)
        self.answered: Request | None = None  # one of this run that the endpoint has answered
        self.last_failure = ""
        self.is_probing = False
        self.probed_keys: set[str] = set()
        self.go_on = asyncio.Event()  # cleared while the endpoint is probed
        self.go_on.set()
        self.sent = 0
        limit = recipe.annotate.max_usd
        spent = 0.0 if limit is None else annotator.usd_spent(store)
        self.budget = Budget(annotator.price, limit, spent, self.stop_signal)
        self.rows: RowsToRequest

    async def request_rows(self, rows: RowsToRequest, *, is_last: bool = True) -> None:
        """Buy what the rows need. Raises DsbsError, or KeyboardInterrupt on Ctrl-C."""
        self.rows = rows
        summary = rows.summary
        started = time.monotonic()
        wasted_before = self.pool.wasted.copy()
        figures = ProgressFigures(self.annotator.task, self.annotator.vote)
        examples = iter(rows.examples())  # shared: each row goes to one worker
        with running(self.progress, f"annotate {rows.title}", rows.total), self._interruptible():
            workers = [
                asyncio.create_task(self._work(examples, figures, summary))
                for _ in range(min(self.max_in_flight, max(1, rows.total)))
            ]
            await self._drain(workers)
            if self.failure is None and not self.stop_signal.is_set:
                await self._settle_refusals(is_last=is_last)
        summary.wasted = self.pool.wasted - wasted_before
        summary.wall_s += time.monotonic() - started
        if self.failure is not None:
            raise self.failure
        if self.stop_signal.is_set:
            raise KeyboardInterrupt

    async def _work(
        self, examples: Iterator[Example], figures: ProgressFigures, summary: SplitSummary
    ) -> None:
        for example in examples:
            try:
                await self.go_on.wait()
                replies = await self.request_row(example, summary)
            except StoppedError:
                return
            except Exception as error:  # bugs too: replies in flight are paid and must be stored
                self.failure = self.failure or error
                self.stop_signal.stop()
                return
            figures.add(example, replies.unhinted)
            if warning := self.annotator.context_check.warning():
                self.progress.say(f"warning: {warning}")
            self.progress.update(figures.rows, figures.note(self.budget.spent))
            if self.stop_signal.is_set:
                return
            if figures.rows % _ROWS_PER_YIELD == 0:
                await asyncio.sleep(0)  # stored replies never wait; let other tasks run

    async def request_row(self, example: Example, summary: SplitSummary) -> RowReplies:
        replies = self.annotator.first_replies(example)
        while requests := self.annotator.next_requests(example, replies):
            outcomes = await self._request_all(requests, summary)
            for request, outcome in zip(requests, outcomes, strict=True):
                self.annotator.add_reply(example, replies, request, outcome)
        return replies

    async def _request_all(self, requests: list[Request], summary: SplitSummary) -> list[Outcome]:
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
        """The first Ctrl-C or SIGTERM waits for replies in flight; the second one drops them."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()

        def interrupt() -> None:
            if self.stop_signal.is_set and task is not None:
                task.cancel()
                return
            self.progress.say("stopping: waiting for replies in flight (Ctrl-C again drops them)")
            self.stop_signal.stop()

        try:
            previous = {
                number: signal.signal(number, lambda *_: loop.call_soon_threadsafe(interrupt))
                for number in (signal.SIGINT, signal.SIGTERM)  # schedulers send SIGTERM
            }
        except ValueError:
            yield  # not the main thread: a notebook's kernel, a server
            return
        try:
            yield
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler or signal.SIG_DFL)

    async def _request(self, request: Request, summary: SplitSummary) -> Outcome:
        """A request's reply, stored or bought, or the reason why there is none."""
        keys = self.store.keys(request, self.identities)
        stored = self.store.look_up(keys, token_budget(request.body), raw=self.annotator.reads_raw)
        if stored.reply is not None:
            self.answered = self.answered or request
            if stored.key in self.probed_keys:
                self.probed_keys.discard(stored.key)
            else:
                summary.cached += 1
                self.budget.count_stored([stored.reply, *stored.wasted])
            return self.annotator.outcome(stored)
        key = stored.key
        if key in self.refusals.messages:
            return Outcome(key, None, "refused", self.refusals.messages[key])
        if stored.refusal is not None and not self.retry_refused:
            return self.annotator.outcome(stored)
        if key in self.pending_keys:  # another row makes the very same request
            await self.pending_keys[key].wait()
            if self.stop_signal.is_set:
                raise StoppedError
            return await self._request(request, summary)
        self.pending_keys[key] = asyncio.Event()
        try:
            return await self._buy(request, stored)
        finally:
            self.pending_keys.pop(key).set()

    async def _buy(self, request: Request, stored: Stored) -> Outcome:
        """Buy one reply and commit it, or return the reason why there is none.

        A reply that is billed and holds no answer is requested once more. The second one without a
        text is the answer: an empty one.
        """
        wasted: list[Reply] = []
        while True:
            try:
                state, started, reply = await self._deliver(request)
            except RejectedError as error:
                return await self._refuse(stored.key, error, wasted)
            except ExhaustedError as error:
                return self._fail(stored.key, error, wasted)
            key = self._key(request, state)
            failure = reply.failure
            is_empty = isinstance(failure, TransientError) and failure.kind == "empty"
            if failure is None or (is_empty and (wasted or stored.wasted)):
                reply = replace(reply, failure=None)
                self._keep(request, state, reply, started, is_empty=is_empty)
                return Outcome(key, reply, wasted=tuple(wasted))
            self.store.waste(key, str(failure), reply)
            wasted.append(reply)
            if isinstance(failure, RejectedError):
                return await self._refuse(stored.key, failure, wasted)
            if isinstance(failure, DsbsError) and not isinstance(failure, PartialError):
                raise failure
            if isinstance(failure, TransientError) and len(wasted) >= BILLED_TRIES:
                return self._fail(stored.key, ExhaustedError(str(failure), failure.kind), wasted)
            if not is_empty:
                await self.stop_signal.sleep(backoff(len(wasted)))

    async def _deliver(self, request: Request) -> tuple[EndpointState, int, Reply]:
        """Send a request within the limits: the endpoint, the last attempt's number, the reply."""
        started = 0
        max_requests = self.annotator.recipe.annotate.max_requests

        def count_attempt() -> None:
            nonlocal started
            if max_requests is not None and self.sent >= max_requests:
                raise max_requests_reached(self.sent)
            self.sent += 1
            started = self.sent
            self.rows.summary.requests += 1

        prompt_tokens = estimated_tokens(request.body)
        reserved = await self.budget.reserve(prompt_tokens, token_budget(request.body))
        try:
            state, reply = await self.pool.deliver(
                request,
                expected_tokens(request, self.annotator.recipe),
                attempts=self.annotator.recipe.teacher.max_attempts,
                before_attempt=count_attempt,
            )
        finally:
            self.budget.release(reserved)
        self.budget.count_bought(reply, prompt_tokens, reserved)
        return state, started, reply

    def _key(self, request: Request, state: EndpointState) -> str:
        """The key of the reply that an endpoint has sent: by now it may take another form."""
        return self.store.keys(request, [state.endpoint.identity]).now[0]

    def _keep(
        self, request: Request, state: EndpointState, reply: Reply, started: int, *, is_empty: bool
    ) -> None:
        """Commit an answer. Raises PartialError where one answer after the other is empty."""
        self.store.put(
            self._key(request, state),
            token_budget(request.body),
            state.endpoint.identity,
            self.annotator.recipe.teacher.model,
            request.sample,
            reply,
        )
        self.has_answered = True
        self.answered = request
        self.refusals.confirm(started)
        self.failures_in_a_row = self.failures_in_a_row + 1 if is_empty else 0
        if self.failures_in_a_row >= FAILURES_BEFORE_STOP:
            raise PartialError(
                f"the last {self.failures_in_a_row} replies were empty, and they were billed",
                hint="look at their finish reasons and tokens in annotate/replies.sqlite; for a "
                "model that reasons, raise annotate.max_tokens",
            )

    # --- requests without a reply

    def _fail(self, key: str, error: ExhaustedError, wasted: list[Reply]) -> Outcome:
        """Record a request whose attempts failed. Raises DsbsError where the teacher is down."""
        self.last_failure = str(error)
        self.failures_in_a_row += 1
        if not self.has_answered:
            is_reached = error.kind not in ("connection", "timeout")
            if not is_reached or self.failures_in_a_row >= FAILURES_BEFORE_FIRST_ANSWER:
                raise self._down()
        self.store.fail(key, str(error))
        if self.has_answered and self.failures_in_a_row >= FAILURES_BEFORE_STOP:
            raise PartialError(
                f"the teacher stopped answering: {error}",
                hint="run the same command when it is back: the replies so far are stored",
            )
        return Outcome(key, None, "no-reply", str(error), tuple(wasted))

    def _down(self) -> DsbsError:
        names = ", ".join(endpoint.name for endpoint in self.teacher.endpoints)
        return DsbsError(
            f"the teacher at {names} does not answer: {self.last_failure}",
            hint="start its server, or fix teacher.base_url (and the proxy, if there is one); "
            f"`dsbs doctor RECIPE` checks it without a paid request; {self.budget.balance}",
        )

    async def _refuse(self, key: str, error: RejectedError, wasted: list[Reply]) -> Outcome:
        """Record a refusal. Raises DsbsError where it is not about the row."""
        if error.stop is not None and not self.has_answered:
            raise error.stop
        self.refusals.add(key, error, self.sent)
        if not self.is_probing:
            await self._check_refusals()
        return Outcome(key, None, "refused", str(error), tuple(wasted))

    async def _check_refusals(self) -> None:
        """Find out whether rows are refused or everything is. Raises DsbsError for the latter."""
        refusals = self.refusals
        if self.has_answered:
            if refusals.in_a_row < refusals.limit:
                return
            if not await self._is_served():
                raise refusals.error(self.answered is not None)
            refusals.confirm_all()
            refusals.limit *= 2
            return
        are_many = (
            refusals.number >= REFUSALS_BEFORE_STOP or refusals.flagged >= FLAGGED_BEFORE_STOP
        )
        if are_many and not await self._is_served():
            raise refusals.error(self.answered is not None)

    async def _settle_refusals(self, *, is_last: bool) -> None:
        """Confirm what is left when every row has been requested. Raises DsbsError."""
        refusals = self.refusals
        if not self.has_answered and refusals.number:
            raise refusals.error(self.answered is not None)
        if not self.has_answered and self.failures_in_a_row:
            raise self._down()
        if is_last and refusals.pending:
            if not await self._is_served():
                raise refusals.error(self.answered is not None)
            refusals.confirm_all()

    async def _is_served(self) -> bool:
        """Whether the endpoint answers a request that is known to be good.

        It is one that was answered before; where there is none, rows from elsewhere in the file.
        """
        self.is_probing = True
        self.go_on.clear()
        try:
            if self.answered is None:
                return await self._is_served_elsewhere()
            request = self.answered
            try:
                state, _, reply = await self._deliver(request)
            except (RejectedError, ExhaustedError):
                return False
            key = self._key(request, state)
            self.store.waste(key, "asked again, to learn whether rows or all are refused", reply)
            return reply.failure is None
        finally:
            self.is_probing = False
            self.go_on.set()

    async def _is_served_elsewhere(self) -> bool:
        step = max(1, self.rows.total // (ROWS_ELSEWHERE + 1))
        for example in itertools.islice(self.rows.examples(), step, None, step):
            replies = self.annotator.first_replies(example)
            for request in self.annotator.next_requests(example, replies)[:1]:
                key = self.store.keys(request, self.identities).now[0]
                if key in self.refusals.messages or key in self.pending_keys:
                    continue
                outcome = await self._request(request, self.rows.summary)
                if outcome.reply is not None:
                    self.probed_keys.add(outcome.key)
                    return True
        return self.answered is not None
