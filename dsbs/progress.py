"""Progress on stderr: a bar on a terminal, occasional lines elsewhere, nothing for a program."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Protocol, Self

from rich import progress as rich_progress
from rich.console import Console

SECONDS_BETWEEN_LINES = 15.0


Worth = tuple[
    int, str
]  # what one unit of progress is worth in the rate that is shown: (64, "examples"); (1, ""): itself
_ITSELF: Worth = (1, "")


class Progress(Protocol):
    """What a stage tells of its progress."""

    def start(
        self, title: str, total: int | None, done: int = 0, worth: Worth = _ITSELF
    ) -> None: ...
    def update(self, done: int, note: str = "") -> None: ...
    def finish(self) -> None: ...
    def say(self, text: str) -> None: ...


class NoProgress:
    """No progress: for programs and tests."""

    def start(
        self, title: str, total: int | None, done: int = 0, worth: Worth = _ITSELF
    ) -> None: ...
    def update(self, done: int, note: str = "") -> None: ...
    def finish(self) -> None: ...
    def say(self, text: str) -> None: ...


class Bar:
    """A rich bar with rate and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress: rich_progress.Progress | None = None
        self._started, self._worth = (0.0, 0), _ITSELF

    def start(self, title: str, total: int | None, done: int = 0, worth: Worth = _ITSELF) -> None:
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
        self._started, self._worth = (time.monotonic(), done), worth
        self._progress.start()
        self._progress.add_task(title, total=total, completed=done, note="")

    def update(self, done: int, note: str = "") -> None:
        if self._progress is not None:
            note = f"{rate(done, self._started, self._worth)} {note}"
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
        self._title, self._started, self._last = "", (0.0, 0), 0.0
        self._worth = _ITSELF
        self._total: int | None = None

    def start(self, title: str, total: int | None, done: int = 0, worth: Worth = _ITSELF) -> None:
        self._title, self._total, self._worth = title, total, worth
        self._started = (time.monotonic(), done)
        self._last = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        elapsed, first = now - self._started[0], self._started[1]
        of = f"/{self._total}" if self._total else ""
        left = ""
        if self._total and done > first:
            left = f", about {(self._total - done) * elapsed / (done - first):.0f} s left"
        self.say(f"{self._title} {done}{of} {rate(done, self._started, self._worth)} {note}{left}")

    def finish(self) -> None: ...

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)


def rate(done: int, started: tuple[float, int], worth: Worth = _ITSELF) -> str:
    elapsed = time.monotonic() - started[0]
    each, unit = worth
    return (
        f"{each * (done - started[1]) / elapsed:.1f}{' ' * bool(unit)}{unit}/s"
        if elapsed > 0.5
        else ""
    )


def make_progress() -> Progress:
    """The meter that fits stderr."""
    console = Console(stderr=True)
    return Bar(console) if console.is_terminal else Lines()


class running:  # noqa: N801 - reads as a phrase: `with running(meter, "train", 100):`
    """Start a meter's title and finish it whatever happens."""

    def __init__(
        self,
        progress: Progress,
        title: str,
        total: int | None,
        done: int = 0,
        worth: Worth = _ITSELF,
    ) -> None:
        self._progress, self._begin = progress, (title, total, done, worth)

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
