"""Live teacher: the teacher of a recipe behind a served student (`dsbs serve --fallback`).

It asks with the client, prompt, limits and store of `dsbs annotate`, in a thread of its own, so
that the student's requests never wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import traceback
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from dsbs.annotation.annotator import Annotator
from dsbs.annotation.backends import Price, Reply, Teacher, make_teacher, teacher_class
from dsbs.annotation.endpoint_pool import (
    Budget,
    EndpointPool,
    EndpointState,
    StoppedError,
    StopSignal,
)
from dsbs.annotation.requester import Requester
from dsbs.annotation.store import ReplyStore, open_store
from dsbs.annotation.summary import RowsToRequest, SplitSummary
from dsbs.config import Recipe
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.progress import NoProgress, Progress
from dsbs.records import Example
from dsbs.run_folder import TRAINING_RECORD, RunFolder, read_student
from dsbs.serving.cascade import Cascade, CascadeSettings, TeacherAnswer, TeacherError
from dsbs.serving.ledger import Ledger, today
from dsbs.students.calibration import Threshold, read_calibration, read_threshold
from dsbs.students.card import StudentCard, read_card
from dsbs.tasks import make_task

logger = logging.getLogger(__name__)
_REOPEN_S = 60.0  # after which an endpoint that wanted no more requests is asked again
_DRAIN_S = 30.0  # for replies in flight at the end
# When the client of the row that a task asks about goes, in its loop's seconds. None: never.
_leaves_at: ContextVar[float | None] = ContextVar("_leaves_at", default=None)
_REASONS = {
    "refused": "it refuses the row",
    "no-reply": "no reply",
    "truncated": "its reply was cut",
}


class _DailyBudget(Budget):
    """The dollars of a day (UTC), which a restart does not forget."""

    def __init__(
        self, price: Price | None, limit: float | None, ledger: Ledger, stop_signal: StopSignal
    ) -> None:
        super().__init__(price, limit, ledger.usd_today(), stop_signal)
        self._ledger = ledger
        self._day = today()

    async def reserve(self, prompt_tokens: int, tokens: int) -> float:
        if today() != self._day:
            self.spent = self._ledger.usd_today()
            self._day = today()
        try:
            return await super().reserve(prompt_tokens, tokens)
        except PartialError:
            raise TeacherError("the limit of dollars for today is reached") from None

    def count_bought(self, reply: Reply, prompt_tokens: int, reserved: float) -> float:
        usd = super().count_bought(reply, prompt_tokens, reserved)
        if usd > 0:
            with self._ledger.survive_errors():
                self._ledger.add_usd(usd)
        return usd


class _ServedPool(EndpointPool):
    """A pool whose requests leave the line when nobody waits for them any more.

    Otherwise they would be sent before those of rows that still wait: once a teacher was slow or
    dead for a while, no reply would come in time again.
    """

    async def _enter(self, tokens: int, last: EndpointState | None, ticket: int) -> EndpointState:
        try:
            async with asyncio.timeout_at(_leaves_at.get()):
                return await super()._enter(tokens, last, ticket)
        except TimeoutError:
            self._wake(1)  # this one was perhaps about to get in
            raise TeacherError("no answer in time: too many rows wait for it") from None


class _ServedAnnotator(Annotator):
    """A recipe's annotator for rows that come from clients."""

    def usd_spent(self, store: ReplyStore) -> float:
        """The budget counts a day's replies, not those of the recipe's rows."""
        return 0.0


class LiveTeacher:
    """A recipe's teacher for single rows. See ``TeacherClient``."""

    def __init__(self, recipe: Recipe, teacher: Teacher, store: ReplyStore, ledger: Ledger) -> None:
        self._annotator = _ServedAnnotator(recipe)
        self._teacher = teacher
        # Its messages may quote the endpoint, which may quote a row.
        self._requester = Requester(self._annotator, teacher, store, NoProgress())
        self._requester.pool = _ServedPool(
            teacher.endpoints,
            self._requester.max_in_flight,
            self._requester.stop_signal,
            NoProgress().say,
        )
        self._requester.rows = RowsToRequest("served rows", tuple, 0, SplitSummary())
        self._requester.budget = _DailyBudget(
            self._annotator.price, recipe.annotate.max_usd, ledger, self._requester.stop_signal
        )
        self._store = store
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher", daemon=True)

    @property
    def requests(self) -> int:
        return self._requester.sent

    def start(self) -> None:
        self._thread.start()

    def ask(self, fields: Mapping[str, Any], wait_s: float | None = None) -> Future[TeacherAnswer]:
        """See ``TeacherClient``."""
        return asyncio.run_coroutine_threadsafe(self._ask(fields, wait_s), self._loop)

    def close(self) -> None:
        """See ``TeacherClient``."""
        if self._loop.is_closed():
            return
        if not self._thread.is_alive():
            self._loop.run_until_complete(self._teacher.close())
            self._loop.close()
            return
        timeout_s = min(_DRAIN_S, self._annotator.recipe.teacher.timeout_s)
        asyncio.run_coroutine_threadsafe(self._close(timeout_s), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _close(self, timeout_s: float) -> None:
        self._requester.stop_signal.stop()
        here = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not here]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._teacher.close()

    async def _ask(self, fields: Mapping[str, Any], wait_s: float | None) -> TeacherAnswer:
        _leaves_at.set(None if wait_s is None else self._loop.time() + wait_s)
        try:
            return await self._answer(Example(id="served", input=dict(fields)))
        except TeacherError:
            raise
        except StoppedError:
            raise TeacherError("the server is shutting down") from None
        except asyncio.CancelledError:
            raise TeacherError("the server is shutting down") from None
        except DsbsError as error:
            # The problem may quote the endpoint, which may quote the row.
            logger.warning(
                "the teacher does not answer (%s): check its endpoint, key and account with "
                "`dsbs doctor RECIPE`",
                type(error).__name__,
            )
            self._reopen_later()
            raise TeacherError("it does not answer") from None
        except Exception as error:
            # The message may hold the row's text, which belongs in no log.
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("the teacher failed on a row: %s\n%s", type(error).__name__, frames)
            raise TeacherError("it does not answer") from None

    async def _answer(self, example: Example) -> TeacherAnswer:
        if not self._store.holds_reserve:  # a paid reply must find space on the disk
            self._store.hold_reserve(self._requester.max_in_flight)
        replies = await self._requester.request_row(example, self._requester.rows.summary)
        annotation = self._annotator.annotation(example, replies)
        if annotation.own_label is None:
            reason = str(annotation.reject_reason)
            raise TeacherError(_REASONS.get(reason, "its reply has no label"))
        rationale = annotation.rationale
        return TeacherAnswer(annotation.own_label, rationale)

    def _reopen_later(self) -> None:
        """Ask closed endpoints again after a while: a server outlives an empty account."""

        def reopen() -> None:
            for state in self._requester.pool.states:
                state.closed = None

        if any(state.closed is not None for state in self._requester.pool.states):
            self._loop.call_later(_REOPEN_S, reopen)


@contextmanager
def open_cascade(
    path: str,
    recipe: Recipe,
    settings: CascadeSettings,
    progress: Progress,
    *,
    out: str | None = None,
) -> Iterator[Cascade]:
    """A student in ``path`` before the teacher of ``recipe``.

    Its run has the replies and the ledger. Raises UserError where the student has no threshold that
    is its own, or the recipe has another task or a teacher that cannot be asked.
    """
    card = read_card(path)
    threshold = _threshold(path, card)
    _check_recipe(recipe, card)
    if settings.max_usd is not None:
        annotate = recipe.annotate.model_copy(update={"max_usd": settings.max_usd})
        recipe = recipe.model_copy(update={"annotate": annotate})
    run = RunFolder.of(recipe, out)
    teacher = make_teacher(recipe)  # before any file is written: a missing key leaves no trace
    with run.lock("serve"), open_store(run) as store:
        ledger = Ledger(run.ledger, card.name, threshold)
        if settings.reset_audit:
            ledger.reset_audit()
        if ledger.breach is not None:
            progress.say(
                f"warning: {ledger.breach}. The teacher answers everything; --reset-audit lets the "
                "student answer again"
            )
        if threshold.threshold is None:
            progress.say(
                "warning: threshold.json has no threshold that holds: the teacher answers "
                "everything"
            )
        if threshold.of != "agreement":
            progress.say(
                "warning: threshold.json is of accuracy, which an audit cannot measure: it reports "
                "agreement and never closes the student"
            )
        live = LiveTeacher(recipe, teacher, store, ledger)
        try:
            yield Cascade(threshold, make_task(card.task), live, ledger, settings)
        finally:
            live.close()
            ledger.close()


def _threshold(path: str, card: StudentCard) -> Threshold:
    threshold = read_threshold(path)
    command = "dsbs eval RECIPE eval.cascade.target=0.98"
    if threshold is None:
        raise UserError(
            f"{path} has no threshold.json, which says when the student is sure",
            hint=f"run `{command}` with the student's recipe",
        )
    calibration = read_calibration(path)
    temperature = 1.0 if calibration is None else calibration.temperature
    folder = Path(path)
    label_thresholds = None if calibration is None else calibration.label_thresholds
    is_same = temperature == threshold.temperature
    is_same = is_same and label_thresholds == threshold.label_thresholds
    if (folder / TRAINING_RECORD).is_file():
        is_same = is_same and read_student(folder).fingerprint == threshold.student
    if not is_same:
        raise UserError(
            f"{path}: threshold.json was chosen for another training of {card.name}",
            hint=f"run `{command}` with the student's recipe",
        )
    if threshold.confidence == "views" and not card.explains:
        raise UserError(
            f"{path}: the threshold needs rationales, which {card.name} does not write",
            hint="serve the student that it was exported from",
        )
    return threshold


def _check_recipe(recipe: Recipe, card: StudentCard) -> None:
    kind = teacher_class(recipe.teacher.kind)
    if not kind.is_asked:
        raise UserError(
            f"--fallback: a teacher of kind {recipe.teacher.kind} cannot be asked",
            hint="give a recipe whose teacher answers requests, e.g. teacher.kind: openai",
        )
    is_same = recipe.task.name == card.task.name and recipe.task.input == card.task.input
    labels = set(make_task(recipe.task).head_labels)
    is_same = is_same and labels == set(make_task(card.task).head_labels)
    if not is_same or recipe.task.fields != card.task.fields:
        raise UserError(
            f"--fallback: the recipe's task is not the one of {card.name}",
            hint="give the recipe that the student was trained with",
        )
