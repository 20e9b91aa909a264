"""Server metrics in Prometheus' text format (exposition format 0.0.4)."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts of values up to each of ``bounds``, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str = "") -> Iterator[str]:
        cumulative = 0
        separator = "," if labels else ""
        for bound, count in zip((*self._bounds, "+Inf"), self._counts, strict=True):
            cumulative += count
            yield f'{name}_bucket{{{labels}{separator}le="{bound}"}} {cumulative}'
        braces = f"{{{labels}}}" if labels else ""
        yield f"{name}_sum{braces} {self.total:.9g}"
        yield f"{name}_count{braces} {cumulative}"


class Metrics:
    """Counts since the server started. All counting happens in the event loop's thread."""

    def __init__(self) -> None:
        self.dropped_rows = 0  # their client went away before the model got them
        self._requests: Counter[tuple[str, int]] = Counter()
        self._seconds: dict[str, Histogram] = {}
        self._batches = Histogram(_ROWS)

    def request(self, path: str, status: int, seconds: float) -> None:
        """``path`` is a route of the server or "other": clients must not create time series."""
        self._requests[path, status] += 1
        self._seconds.setdefault(path, Histogram(_SECONDS)).observe(seconds)

    def batch(self, rows: int) -> None:
        self._batches.observe(rows)

    def page(self, *, queued_rows: int, body_bytes: int, ready: bool) -> str:
        return "\n".join(self._lines(queued_rows, body_bytes, ready)) + "\n"

    def _lines(self, queued_rows: int, body_bytes: int, ready: bool) -> Iterator[str]:
        yield from _head(
            "dsbs_requests_total",
            "counter",
            "Requests by path and status; 499: the client went away.",
        )
        for (path, status), count in sorted(self._requests.items()):
            yield f'dsbs_requests_total{{path="{path}",status="{status}"}} {count}'
        yield from _head(
            "dsbs_request_seconds",
            "histogram",
            "Seconds from a request's headers to the end of its response.",
        )
        for path, seconds in sorted(self._seconds.items()):
            yield from seconds.lines("dsbs_request_seconds", f'path="{path}"')
        yield from _head(
            "dsbs_batch_rows",
            "histogram",
            "Rows that the model decoded together; the sum counts all rows.",
        )
        yield from self._batches.lines("dsbs_batch_rows")
        yield from _single(
            "dsbs_dropped_rows_total",
            "counter",
            "Rows whose client went away before the model got them.",
            self.dropped_rows,
        )
        yield from _single("dsbs_queue_rows", "gauge", "Rows that wait for the model.", queued_rows)
        yield from _single(
            "dsbs_body_bytes", "gauge", "Bytes of request bodies in memory.", body_bytes
        )
        yield from _single("dsbs_ready", "gauge", "1: ready, 0: shutting down.", int(ready))


def _single(name: str, kind: str, description: str, value: int) -> Iterator[str]:
    yield from _head(name, kind, description)
    yield f"{name} {value}"


def _head(name: str, kind: str, description: str) -> tuple[str, str]:
    return f"# HELP {name} {description}", f"# TYPE {name} {kind}"
