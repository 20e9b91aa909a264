"""Progress on stderr: a bar on a terminal, a line every few seconds elsewhere, or nothing."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich import progress as rich_progress
from rich.console import Console

SECONDS_BETWEEN_LINES = 15.0

RateUnit = tuple[int, str]
"""What a step counts for in the displayed rate: (64, "examples") shows examples per second."""
_STEPS: RateUnit = (1, "")


class Progress(Protocol):
    """The interface through which a stage reports its progress."""

    def start(
        self, title: str, total: int | None, done: int = 0, rate_unit: RateUnit = _STEPS
    ) -> None: ...
    def update(self, done: int, note: str = "") -> None: ...
    def finish(self) -> None: ...
    def say(self, text: str) -> None: ...


class NoProgress:
    """No progress: for programs and tests."""

    def start(
        self, title: str, total: int | None, done: int = 0, rate_unit: RateUnit = _STEPS
    ) -> None: ...
    def update(self, done: int, note: str = "") -> None: ...
    def finish(self) -> None: ...
    def say(self, text: str) -> None: ...


class Bar:
    """A rich bar with rate and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: rich_progress.Progress | None = None
        self._started = (0.0, 0)
        self._rate_unit = _STEPS

    def start(
        self, title: str, total: int | None, done: int = 0, rate_unit: RateUnit = _STEPS
    ) -> None:
        self.finish()
        self._progress = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}"),
            rich_progress.BarColumn(bar_width=24),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TextColumn("{task.fields[note]}"),
            rich_progress.TimeElapsedColumn(),
            rich_progress.TextColumn("left"),
            rich_progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._started = (time.monotonic(), done)
        self._rate_unit = rate_unit
        self._progress.start()
        self._progress.add_task(title, total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        if self._progress is not None:
            note = f"{rate(done, self._started, self._rate_unit)} {note}"
            self._progress.update(self._progress.task_ids[0], completed=done, note=note)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


class Lines:
    """A line every few seconds, for logs and pipes."""

    def __init__(self) -> None:
        self._title = ""
        self._started = (0.0, 0)
        self._last = 0.0
        self._rate_unit = _STEPS
        self._total: int | None = None

    def start(
        self, title: str, total: int | None, done: int = 0, rate_unit: RateUnit = _STEPS
    ) -> None:
        self._title = title
        self._total = total
        self._rate_unit = rate_unit
        self._started = (time.monotonic(), done)
        self._last = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        start_time, first = self._started
        elapsed = now - start_time
        of = f"/{self._total}" if self._total else ""
        left = ""
        if self._total and done > first:
            left = f", about {(self._total - done) * elapsed / (done - first):.0f} s left"
        self.say(
            f"{self._title} {done}{of} {rate(done, self._started, self._rate_unit)} {note}{left}"
        )

    def finish(self) -> None: ...

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def rate(done: int, started: tuple[float, int], rate_unit: RateUnit = _STEPS) -> str:
    """Units per second since ``started`` (time, steps); empty in the first half second."""
    start_time, first = started
    elapsed = time.monotonic() - start_time
    if elapsed <= 0.5:
        return ""
    size, unit = rate_unit
    separator = " " if unit else ""
    return f"{size * (done - first) / elapsed:.1f}{separator}{unit}/s"


def make_progress() -> Progress:
    """A bar if stderr is a terminal, else lines."""
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines()


class running:  # noqa: N801 - reads as a phrase: `with running(progress, "train", 100):`
    """Start a title and finish it even after an error."""

    def __init__(
        self,
        progress: Progress,
        title: str,
        total: int | None,
        done: int = 0,
        rate_unit: RateUnit = _STEPS,
    ) -> None:
        self._progress = progress
        self._begin = (title, total, done, rate_unit)

    def __enter__(self) -> Self:
        self._progress.start(*self._begin)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._progress.finish()
