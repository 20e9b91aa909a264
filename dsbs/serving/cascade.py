"""Cascade: the student answers the rows that it is sure of, and its teacher answers the rest.

A random share of the student's answers is audited: the teacher is asked as well, after the response
was sent. Where the audit shows that the target of threshold.json is missed, the teacher answers
everything.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dsbs.formatting import percent
from dsbs.serving.ledger import CascadeState, Ledger
from dsbs.serving.middleware import head, single
from dsbs.serving.model import Item, Outcome
from dsbs.serving.settings import ApiError
from dsbs.students.calibration import Threshold
from dsbs.students.student import Answer
from dsbs.tasks import Task

logger = logging.getLogger(__name__)
OnTeacherFailure = Literal["student", "error"]
OnBreach = Literal["fallback", "warn"]
Source = Literal["student", "teacher"]
FALSE_ALARMS = 0.05  # the chance that a student that keeps the target is ever found to miss it
AUDIT_QUEUE = 1000  # answers that wait for their audit
AUDITORS = 4  # audits in flight, so that deferred rows come first
_FLUSH_S = 1.0


@dataclass(frozen=True, slots=True)
class CascadeSettings:
    """How a cascade is served."""

    audit: float = 0.02
    """The share of the student's answers that the teacher is asked about too."""
    on_teacher_failure: OnTeacherFailure = "student"
    on_breach: OnBreach = "fallback"
    teacher_timeout_s: float = 30.0
    """How long a row waits for the teacher."""
    max_waiting: int = 2048
    """Rows that may wait for the teacher."""
    max_usd: float | None = None
    """US dollars a day for the teacher. None: the recipe's annotate.max_usd, else no limit."""
    asks_novel: bool = True
    """Whether the teacher answers inputs that are unlike the validation rows."""
    reset_audit: bool = False
    """Whether to forget a breach, and the audits that led to it."""


class TeacherError(Exception):
    """The teacher has no answer to a row.

    The message is for clients: it never has a text of the teacher or of its endpoint.
    """


@dataclass(frozen=True, slots=True)
class TeacherAnswer:
    label: str
    rationale: str | None


class TeacherClient(Protocol):
    """A teacher that answers rows in a thread of its own."""

    @property
    def requests(self) -> int:
        """The requests sent, with repeated ones."""
        ...

    def start(self) -> None: ...

    def ask(self, fields: Mapping[str, Any], wait_s: float | None = None) -> Future[TeacherAnswer]:
        """The answer to a row, from the store of replies or bought. Raises TeacherError.

        ``wait_s``: when nobody waits for it any more, so that no request is sent. None: never.
        """
        ...

    def close(self) -> None:
        """Wait for replies in flight and store them."""
        ...


@dataclass(frozen=True, slots=True)
class Routed:
    """An answer, and who gave it. ``cascade`` False: there is no teacher."""

    outcome: Outcome
    source: Source = "student"
    threshold: float | None = None
    teacher_failure: str | None = None
    """Why the student answers a row that it is not sure of."""
    cascade: bool = True

    def fields(self) -> dict[str, Any]:
        """What a response says about the answer, beside the answer."""
        if not self.cascade:
            return {}
        fields: dict[str, Any] = {
            "source": self.source,
            "confidence": self.outcome.confidence,
            "threshold": self.threshold,
        }
        if self.teacher_failure is not None:
            fields["teacher_failure"] = self.teacher_failure
        return fields


class Cascade:
    """Routes rows between a student and its teacher, and audits the student."""

    def __init__(
        self,
        threshold: Threshold,
        task: Task,
        teacher: TeacherClient,
        ledger: Ledger,
        settings: CascadeSettings,
    ) -> None:
        self.threshold = threshold
        self.ledger = ledger
        self._task = task
        self._teacher = teacher
        self.settings = settings
        self._waiting = 0
        self._audits: asyncio.Queue[tuple[Mapping[str, Any], str]] = asyncio.Queue(AUDIT_QUEUE)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._warning: str | None = None
        # The target is one of agreement, or the audit cannot measure it.
        self._risk = None
        if threshold.of == "agreement" and threshold.target is not None:
            self._risk = 1 - threshold.target

    def start(self) -> None:
        """Call this within the event loop of the server."""
        self._teacher.start()
        for _ in range(AUDITORS):
            self._in_background(self._audit())
        self._in_background(self._flush())

    async def close(self) -> None:
        """End the audits, and wait for replies in flight."""
        await asyncio.to_thread(self._teacher.close)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with self.ledger.survive_errors():
            self.ledger.flush()

    def _in_background(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _flush(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            with self.ledger.survive_errors():
                self.ledger.flush()

    # --- rows

    async def route(self, items: Sequence[Item], outcomes: Sequence[Outcome]) -> list[Routed]:
        """The answers of student and teacher. Raises ApiError (502) where the teacher fails, if
        that is what ``on_teacher_failure`` says.
        """
        requests: dict[int, asyncio.Task[TeacherAnswer | TeacherError]] = {}
        routed = []
        for index, (item, outcome) in enumerate(zip(items, outcomes, strict=True)):
            routed.append(Routed(outcome, threshold=self.threshold.threshold))
            is_sure = self._is_sure(outcome)
            if is_sure and self.ledger.breach is None:
                self.ledger.count("student")
                self._maybe_audit(item, outcome)
            else:
                requests[index] = self._in_background(self._ask(item.value, "deferred"))
        if requests:
            await asyncio.wait(requests.values(), timeout=self.settings.teacher_timeout_s)
        for index, task in requests.items():
            routed[index] = self._with_teacher(outcomes[index], task)
        return routed

    def _is_sure(self, outcome: Outcome) -> bool:
        is_sure = self.threshold.is_sure(outcome.confidence)
        kind = "sure" if is_sure else "unsure"
        if is_sure and outcome.is_novel:
            kind = "novel"
        self.ledger.count(kind)
        return kind == "sure"

    def _with_teacher(
        self, outcome: Outcome, task: asyncio.Task[TeacherAnswer | TeacherError]
    ) -> Routed:
        """The teacher's answer to a row, or the student's where it has none. Raises ApiError."""
        result: TeacherAnswer | TeacherError = TeacherError(
            f"no answer within {self.settings.teacher_timeout_s:g} s"
        )
        if task.done() and not task.cancelled():
            result = task.result()
        threshold = self.threshold.threshold
        if isinstance(result, TeacherAnswer):
            self.ledger.count("teacher")
            answer = Answer(
                raw=result.label,
                label=result.label,
                probability=None,
                truncated=False,
                rationale=result.rationale,
                rationale_truncated=None,
                latency_ms=0.0,
                value=self._task.value(result.label),
            )
            return Routed(Outcome(answer, None, outcome.confidence), "teacher", threshold)
        self.ledger.count("failed")
        if self.settings.on_teacher_failure == "error":
            raise ApiError(502, f"the teacher: {result}", "teacher_failed", {"Retry-After": "5"})
        return Routed(outcome, "student", threshold, str(result))

    async def _ask(
        self, fields: Any, purpose: Literal["deferred", "audits"]
    ) -> TeacherAnswer | TeacherError:
        """Ask the teacher. It is counted even if the client does not wait for it."""
        if self._waiting >= self.settings.max_waiting:
            return TeacherError("too many rows wait")
        self._waiting += 1
        try:
            wait_s = self.settings.teacher_timeout_s if purpose == "deferred" else None
            answer = await asyncio.wrap_future(self._teacher.ask(fields, wait_s))
        except TeacherError as error:
            return error
        finally:
            self._waiting -= 1
        with self.ledger.survive_errors():
            self.ledger.add_row(fields)
        if purpose == "deferred":
            self.ledger.count("deferred")
        return answer

    # --- audit

    def _maybe_audit(self, item: Item, outcome: Outcome) -> None:
        label = outcome.answer.label
        if label is None or random.random() >= self.settings.audit:
            return
        assert not isinstance(item.value, str)
        try:
            self._audits.put_nowait((item.value, label))
        except asyncio.QueueFull:
            self.ledger.count("audits_dropped")

    async def _audit(self) -> None:
        while True:
            fields, label = await self._audits.get()
            result = await self._ask(fields, "audits")
            if isinstance(result, TeacherError):
                self.ledger.count("audits_failed")
            else:
                agrees = self._task.correct(label, result.label)
                with self.ledger.survive_errors():
                    self._judge(self.ledger.add_audit(agrees=agrees))

    def _judge(self, state: CascadeState) -> None:
        """Close the student where the audit shows that it misses the target."""
        if self._risk is None or state.breach is not None:
            return
        differs = state.audited - state.agreed
        risk = self._risk / self._coverage(state)
        if log_evidence(differs, state.audited, risk) < math.log(1 / FALSE_ALARMS):
            self._warning = None
            return
        agreement = state.agreement
        assert agreement is not None
        low, high = (percent(bound) for bound in agreement.ci95)
        reason = (
            f"the teacher agrees with {percent(agreement.value)} of {state.audited} audited answers"
            f" (95% interval {low} to {high}); the target needs {percent(1 - risk)}"
        )
        if self.settings.on_breach == "fallback":
            logger.error("%s: the teacher answers everything from now on", reason)
            self.ledger.set_breach(reason)
        elif self._warning is None:
            self._warning = reason
            logger.error("%s: the student goes on (--on-breach warn)", reason)

    def _coverage(self, state: CascadeState) -> float:
        """The share of all rows that the student is sure of, with the calibration rows."""
        sure = state.counts.get("sure", 0)
        unsure = state.counts.get("unsure", 0) + state.counts.get("novel", 0)
        rows = self.threshold.rows + sure + unsure
        return max((self.threshold.coverage * self.threshold.rows + sure) / max(rows, 1), 1e-9)

    # --- state

    def health(self) -> dict[str, Any]:
        """The part of ``/health``."""
        mode = "cascade" if self.ledger.breach is None else "teacher only"
        return {"mode": mode, "breach": self.ledger.breach or self._warning}

    def metric_lines(self) -> Iterator[str]:
        """The part of ``/metrics``. Counts are those of the ledger: a restart keeps them."""
        state = self.ledger.state
        counts = Counter(state.counts)
        yield from head(
            "dsbs_cascade_rows_total",
            "counter",
            "Rows by whose answer was sent; failed: the teacher had none.",
        )
        for source in ("student", "teacher", "failed"):
            yield f'dsbs_cascade_rows_total{{source="{source}"}} {counts[source]}'
        totals = {
            "sure": "Rows that the student was sure of.",
            "unsure": "Rows below the threshold.",
            "novel": "Rows that the student was sure of and unlike its validation rows.",
            "deferred": "Rows that the teacher answered for a request.",
            "audited": "Answers of the student that the teacher was asked about.",
            "audits_dropped": "Audits left out because too many waited.",
            "audits_failed": "Audits to which the teacher had no answer.",
        }
        for name, description in totals.items():
            yield from single(f"dsbs_cascade_{name}_total", "counter", description, counts[name])
        gauges: dict[str, tuple[str, float | None]] = {
            "coverage": ("Share of the rows that the student was sure of.", state.coverage),
            "breach": (
                "1: the audit shows that the target is missed.",
                int((self.ledger.breach or self._warning) is not None),
            ),
            "teacher_waiting_rows": ("Rows that wait for the teacher.", self._waiting),
            "usd_today": ("US dollars for replies since midnight UTC.", self.ledger.usd_today()),
        }
        agreement = state.agreement
        if agreement is not None:
            low, high = agreement.ci95
            text = "of the teacher with the latest audited answers"
            gauges["audit_agreement"] = (f"Agreement {text}.", agreement.value)
            gauges["audit_agreement_low"] = (f"Agreement {text}: lower end, exact 95%.", low)
            gauges["audit_agreement_high"] = (f"Agreement {text}: upper end, exact 95%.", high)
        for name, (description, value) in gauges.items():
            if value is not None:
                yield from single(f"dsbs_cascade_{name}", "gauge", description, value)
        yield from single(
            "dsbs_cascade_usd_total", "counter", "US dollars for the teacher's replies.", state.usd
        )
        yield from single(
            "dsbs_teacher_requests_total",
            "counter",
            "Requests sent to the teacher since the start, with repeated ones.",
            self._teacher.requests,
        )


def log_evidence(events: int, n: int, risk: float) -> float:
    """The logarithm of the evidence that the rate of events exceeds ``risk``.

    Where it does not, the evidence after any number of rows ever reaches 1/a with a probability of
    at most a (Ville's inequality): one may look after every row. The evidence is the likelihood
    ratio to ``risk``, averaged over all higher rates with Jeffreys' prior.
    """
    from scipy.special import betaln
    from scipy.stats import beta

    if risk >= 1 or not n:
        return 0.0
    prior = beta(0.5, 0.5)
    posterior = beta(0.5 + events, 0.5 + n - events)
    scale = betaln(0.5 + events, 0.5 + n - events) - betaln(0.5, 0.5)
    tails = posterior.logsf(risk) - prior.logsf(risk)
    likelihood = events * math.log(risk) + (n - events) * math.log1p(-risk)
    return float(scale + tails - likelihood)
