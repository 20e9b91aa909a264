"""A whole run against an endpoint that sends every documented fault, mixed at random.

Every row is delivered once or rejected with its true reason; what was the account's fault is not
kept as refused; the dollars are the server's own count.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from conftest import good_answer
from loopback import completion, read_rows

from dsbs import PartialError, annotate, load_recipe
from dsbs.annotation import endpoint_pool

PRICE = {"input": 3.0, "output": 11.0}
# what is sent before the answer, at most one of those that are billed: see _Server._passing
PASSING = ("429", "500", "529", "html", "cut json", "error", "error list", "zero")
BILLED = ("choice error", "null", "empty choices", "no message", "broken off", "cut stream")
# what is sent each time: the row's fault, or nobody's, with the reason and a part of the detail
LASTING = {
    "flagged 403": ("refused", "usage guidelines"),
    "flagged 400": ("refused", "content management policy"),
    "too long": ("refused", "maximum context length"),
    "firewall": ("refused", "Request blocked"),
    "flagged in 200": ("refused", "moderation"),
    "crash": ("no-reply", "CUDA out of memory"),
    "always broken off": ("no-reply", "insufficient_system_resource"),
    "always null": ("empty", None),
}
OUTAGES = (
    (400, "Your credit balance is too low to access the API.", "invalid_request_error"),
    (412, "Account acme is suspended, possibly due to reaching the limit", "PRECONDITION_FAILED"),
    (402, "Insufficient Balance", ""),
    (403, "Your team has used all available credits", "permission-denied"),
    (429, "Your account is not active", "billing_not_active"),
    (400, "Budget has been exceeded! Current cost: 1.2, Max budget: 1.0", "budget_exceeded"),
    (400, "The purse of order 17 holds nothing any more", "purse"),  # in no table
)


class _Server:
    """An endpoint with a plan for every row, its own bill, and times without credit."""

    def __init__(self, rows: int, seed: int) -> None:
        self.dice = random.Random(seed)
        self.plans: dict[int, list[str]] = {}
        self.lasting: dict[int, str] = {}
        for row in range(rows):
            if self.dice.random() < 0.06:
                self.lasting[row] = self.dice.choice(tuple(LASTING))
            elif self.dice.random() < 0.25:
                plan = [*self.dice.choices(PASSING, k=2), self.dice.choice(BILLED)]
                self.plans[row] = self.dice.sample(plan, k=self.dice.choice((1, 2)))
        self.outages = sorted(self.dice.sample(range(rows // 4, rows), 3), reverse=True)
        self.outage: tuple[int, str, str] | None = None
        self.received = 0
        self.usd = 0.0
        self.delivered: Counter[int] = Counter()

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json()
        match = re.search(r"number (\d+) ", body["messages"][-1]["content"])
        assert match is not None
        self.received += 1
        if self.outage is None and self.outages and self.received > self.outages[-1]:
            self.outages.pop()
            self.outage = self.dice.choice(OUTAGES)
        await asyncio.sleep(self.dice.random() * 0.003)
        if self.outage is not None:
            status, message, code = self.outage
            return _error(status, message, code)
        row = int(match.group(1))
        if row in self.lasting:
            return self._lasting(self.lasting[row], row, body)
        if self.plans.get(row):
            return self._passing(self.plans[row].pop(), row, body)
        self.delivered[row] += 1
        text = good_answer(body, 0)
        if self.dice.random() < 0.1:  # an event stream that nobody asked for
            return self._stream(text, is_whole=True)
        return self._ok(text, finish_reason=self.dice.choice(("stop", "STOP", "eos", "end_turn")))

    def _usage(self) -> dict[str, int]:
        usage = {"prompt_tokens": self.dice.randrange(20, 90), "completion_tokens": 0}
        usage["completion_tokens"] = self.dice.randrange(1, 60)
        self.usd += usage["prompt_tokens"] * PRICE["input"] / 1e6
        self.usd += usage["completion_tokens"] * PRICE["output"] / 1e6
        return usage | {"total_tokens": sum(usage.values())}

    def _ok(self, text: str | None, finish_reason: str = "stop", **choice: Any) -> web.Response:
        body = completion("", finish_reason=finish_reason)
        body["choices"][0]["message"]["content"] = text
        body["choices"][0] |= choice
        return web.json_response(body | {"usage": self._usage()})

    def _stream(self, text: str, *, is_whole: bool) -> web.Response:
        chunks = [{"choices": [{"delta": {"content": piece}}]} for piece in re.split("(?= )", text)]
        if is_whole:
            chunks.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        chunks.append({"choices": [], "usage": self._usage()})
        lines = [f"data: {json.dumps(chunk)}" for chunk in chunks]
        lines += ["data: [DONE]"] if is_whole else []
        return web.Response(
            text=": ping\n\n" + "\n\n".join(lines), content_type="text/event-stream"
        )

    def _passing(self, shape: str, row: int, body: dict[str, Any]) -> web.Response:
        text = good_answer(body, 0)
        if shape == "429":
            response = _error(429, "Rate limit reached", "rate_limit_exceeded")
            response.headers["Retry-After"] = "0"
            return response
        if shape in ("500", "529"):
            return _error(int(shape), "Overloaded", "overloaded_error")
        if shape == "html":
            return web.Response(text="<html><title>Bad gateway</title></html>")
        if shape == "cut json":
            return web.Response(text=json.dumps(completion(text))[:40])
        if shape == "error":
            return web.json_response({"error": {"message": "over capacity", "code": 502}})
        if shape == "error list":
            return web.json_response([{"error": {"message": "try later", "code": 503}}])
        if shape == "choice error":
            return self._ok(text[:20], "error", error={"message": "upstream died", "code": 502})
        if shape == "null":
            return self._ok(None)
        if shape == "zero":
            zero = completion("") | {"usage": {"prompt_tokens": 0, "completion_tokens": 0}}
            zero["choices"][0]["message"]["content"] = None
            return web.json_response(zero)
        if shape == "empty choices":
            return web.json_response({"choices": [], "usage": self._usage()})
        if shape == "no message":
            return web.json_response({"choices": [{"index": 0}], "usage": self._usage()})
        if shape == "cut stream":
            return self._stream(text[:-3], is_whole=False)
        return self._ok(text[:-3], self.dice.choice(("insufficient_system_resource", "abort")))

    def _lasting(self, shape: str, row: int, body: dict[str, Any]) -> web.Response:
        if shape == "flagged 403":
            return _error(403, "Content violates usage guidelines. Failed check: BIO", 403)
        if shape == "flagged 400":
            words = "The response was filtered due to Azure OpenAI's content management policy."
            return _error(400, words, "content_filter")
        if shape == "too long":
            return _error(400, f"This model's maximum context length is 8192, not {row}.", "")
        if shape == "firewall":
            page = "<!DOCTYPE html><html><style>a{}</style><h1>Request blocked</h1></html>"
            return web.Response(status=403, text=page, content_type="text/html")
        if shape == "flagged in 200":
            error = {"message": "Input failed moderation", "code": 403}
            return web.json_response({"error": error, "usage": self._usage()})
        if shape == "crash":
            return _error(500, "EngineDeadError: CUDA out of memory", "")
        if shape == "always null":
            return self._ok(None)
        return self._ok("The text is about\nAnswer: bil", "insufficient_system_resource")


def _error(status: int, message: str, code: str | int) -> web.Response:
    return web.json_response({"error": {"message": message, "code": code}}, status=status)


@contextmanager
def _running(server: _Server) -> Iterator[str]:
    """The server's URL while it runs on a loop of its own."""
    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", server.handle)
    runner = web.AppRunner(app, access_log=None)

    async def start() -> int:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return int(runner.addresses[0][1])

    port = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@pytest.mark.parametrize(
    ("rows", "seed"),
    [(300, 1), *(pytest.param(2000, seed, marks=pytest.mark.slow) for seed in range(20))],
)
def test_every_row_is_delivered_once_or_rejected_with_its_reason(
    toy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    seed: int,
) -> None:
    monkeypatch.setattr(endpoint_pool, "FIRST_WAIT_S", 0.002)
    monkeypatch.setattr(endpoint_pool, "LONGEST_WAIT_S", 0.02)
    path = toy(
        train=rows,
        teacher={"price": PRICE, "max_attempts": 5},
        annotate={"concurrency": 32, "splits": ["train"], "max_usd": 1000.0, "max_tokens": 60},
    )
    server = _Server(rows, seed)
    stops = 0
    with _running(server) as url:
        recipe = load_recipe(path, [f"teacher.base_url={url}"])
        while True:
            try:
                result = annotate(recipe, out=tmp_path / "run")
                break
            except PartialError as error:
                assert server.outage is not None, error
                assert server.outage[1] in str(error), "the provider's words"
                stops += 1
                for row in read_rows(tmp_path / "run"):
                    detail = row.get("reject_detail") or ""
                    assert server.outage[1] not in detail or row["reject_reason"] == "no-reply"
                server.outage = None  # paid
    summary = result.splits["train"]
    assert stops == 3
    assert summary.usd == pytest.approx(server.usd, abs=1e-9)
    for number, row in enumerate(read_rows(tmp_path / "run")):
        shape = server.lasting.get(number)
        if shape is None:
            assert row["accepted"] and row["label"] == row["gold"], (number, row)
            assert server.delivered[number] >= 1
            continue
        reason, words = LASTING[shape]
        assert row["reject_reason"] == reason, (shape, row)
        assert words is None or words in row["reject_detail"], (shape, row)
    # beyond a first delivery: the requests by which it is told whether all are refused
    assert sum(server.delivered.values()) - len(server.delivered) <= 8
