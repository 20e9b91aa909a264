"""Money and endings: limits that hold whatever replies cost, and endings that lose no reply."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer
from loopback import LoopbackServer, completion, question

from dsbs import PartialError, annotate, load_recipe
from dsbs.annotation.planning import pilot

PRICE = "teacher.price={input: 0, output: 10000}"  # a completion token is a cent


def reply(body: dict[str, Any], tokens: int | None) -> Any:
    reply = completion(good_answer(body, 0))
    reply["usage"] = {} if tokens is None else {"prompt_tokens": 1, "completion_tokens": tokens}
    return 200, {}, json.dumps(reply).encode()


def spent(run: Path) -> float:
    files = [run / "annotate" / f"{split}.jsonl" for split in ("train", "test")]
    return sum(
        json.loads(line)["usd"]
        for file in files
        if file.is_file()
        for line in file.open(encoding="utf-8")
    )


def test_expensive_replies_after_cheap_ones_do_not_pass_the_limit(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def dearer(body: dict[str, Any], number: int) -> Any:
        return reply(body, 1 if number <= 20 else 40)

    changes = [PRICE, "annotate.max_tokens=40", "annotate.max_usd=3", "annotate.concurrency=16"]
    with (
        LoopbackServer(dearer, latency_s=0.01) as server,
        pytest.raises(PartialError, match="max_usd"),
    ):
        annotate(
            load_recipe(toy(train=60), [f"teacher.base_url={server.url}", *changes]),
            out=tmp_path / "run",
        )
    assert 2.5 < spent(tmp_path / "run") <= 3


def test_the_cost_of_a_pilot_counts_from_the_start(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=40, test=4)
    with LoopbackServer(lambda body, n: reply(body, 10)) as server:
        base = [f"teacher.base_url={server.url}", PRICE, "annotate.max_tokens=10"]
        pilot(load_recipe(path, base), 20, out=tmp_path / "run")
        with pytest.raises(PartialError, match="max_usd"):
            annotate(
                load_recipe(path, [*base, "annotate.max_usd=2.55", "annotate.concurrency=1"]),
                out=tmp_path / "run",
            )
        assert server.requests == 25


def test_an_endpoint_that_does_not_count_is_charged_the_most(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with (
        LoopbackServer(lambda body, n: reply(body, None)) as server,
        pytest.raises(PartialError, match="max_usd"),
    ):
        changes = [PRICE, "annotate.max_tokens=10", "annotate.max_usd=1"]
        annotate(
            load_recipe(toy(), [f"teacher.base_url={server.url}", *changes]), out=tmp_path / "run"
        )
    assert server.requests == 10


def test_a_row_that_always_fails_leaves_the_rest_of_the_run_complete(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def deaf(body: dict[str, Any], number: int) -> Any:
        return (500, {}, b"{}") if "number 5 " in question(body) else good_answer(body, number)

    with LoopbackServer(deaf) as server:
        recipe = load_recipe(
            toy(train=8, test=4), [f"teacher.base_url={server.url}", "teacher.max_attempts=2"]
        )
        for _ in range(2):
            result = annotate(recipe, out=tmp_path / "run")
            assert (
                result.splits["train"].accepted,
                result.splits["train"].rejected["no-reply"],
            ) == (7, 1)
    assert (
        json.loads((tmp_path / "run" / "annotate" / "manifest.json").read_text())["status"]
        == "partial"
    )


def test_rows_refused_again_stay_refused(toy: Callable[..., Path], tmp_path: Path) -> None:
    def picky(body: dict[str, Any], number: int) -> Any:
        bad = any(f"number {i} " in question(body) for i in range(10, 17))
        return (400, {}, b'{"error": {"message": "unsafe"}}') if bad else good_answer(body, number)

    with LoopbackServer(picky) as server:
        recipe = load_recipe(
            toy(train=20, test=4), [f"teacher.base_url={server.url}", "annotate.concurrency=2"]
        )
        annotate(recipe, out=tmp_path / "run")
        from dsbs.annotation.run import annotate as run

        again = run(recipe, out=tmp_path / "run", retry_refused=True)
        assert server.requests == 24 + 7 and again.splits["train"].rejected == {"refused": 7}
        annotate(recipe, out=tmp_path / "run")
        assert server.requests == 31


def test_half_a_character_at_the_end_of_a_reply_is_replaced(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def cut(body: dict[str, Any], number: int) -> Any:
        reply = completion(good_answer(body, number) + " \ud83d")
        reply["choices"][0]["finish_reason"] = {"type": "odd"}
        return 200, {}, json.dumps(reply).encode()

    with LoopbackServer(cut) as server:
        result = annotate(
            load_recipe(toy(train=6, test=4), [f"teacher.base_url={server.url}"]),
            out=tmp_path / "run",
        )
    assert server.requests == 10 and result.splits["train"].rows == 6


def test_a_limit_below_the_concurrency_keeps_slow_replies(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer, latency_s=0.5) as server:
        recipe = load_recipe(
            toy(train=12, test=4), [f"teacher.base_url={server.url}", "annotate.max_requests=5"]
        )
        with pytest.raises(PartialError, match="max_requests"):
            annotate(recipe, out=tmp_path / "run")
        assert server.requests == 5
    rows = [
        json.loads(line)
        for line in (tmp_path / "run" / "annotate" / "train.jsonl").open(encoding="utf-8")
    ]
    assert sum(row["accepted"] for row in rows) == 5


def test_annotate_works_in_a_notebook(toy: Callable[..., Path], tmp_path: Path) -> None:
    async def cell() -> Any:
        return annotate(recipe, out=tmp_path / "run")

    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(toy(train=4, test=4), [f"teacher.base_url={server.url}"])
        assert asyncio.run(cell()).splits["train"].accepted == 4


def test_a_proxys_password_and_a_late_key_are_not_shown(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsbs.annotation.backends.openai import OpenAITeacher

    monkeypatch.setenv("MY_KEY", "sk-very-secret-key-0123456789")
    (endpoint,) = OpenAITeacher(load_recipe(toy(), ["teacher.api_key_env=MY_KEY"])).endpoints
    shown = endpoint.redact("x" * 280 + " sk-very-secret-key-0123456789")
    assert "sk-very" not in shown
    assert "hunter2" not in endpoint.redact(
        "Cannot connect, url='http://bob:hunter2@127.0.0.1:3128'"
    )
    monkeypatch.setenv("http_proxy", "bob:hunter2@127.0.0.1:3128")  # which curl accepts, too
    recipe = load_recipe(
        toy(), ["teacher.base_url=http://10.255.255.1/v1", "teacher.api_key_env=null"]
    )
    (endpoint,) = OpenAITeacher(recipe).endpoints
    assert "hunter2" not in endpoint.redact("cannot connect to bob:hunter2@127.0.0.1:3128")


def test_a_small_budget_without_max_tokens_still_allows_requests(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(lambda body, n: reply(body, 1)) as server:
        changes = [PRICE, "annotate.max_tokens=null", "annotate.max_usd=3"]
        annotate(
            load_recipe(toy(train=40, test=4), [f"teacher.base_url={server.url}", *changes]),
            out=tmp_path / "run",
        )
    assert {body["max_tokens"] for body in server.bodies} == {30}  # a tenth of the limit, in cents


def test_replies_whose_tokens_nobody_counted_count_in_the_next_command_too(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    changes = [PRICE, "annotate.max_tokens=10", "annotate.max_usd=1"]  # ten replies
    with LoopbackServer(lambda body, n: reply(body, None)) as server:
        recipe = load_recipe(toy(train=40), [f"teacher.base_url={server.url}", *changes])
        for _ in range(2):
            with pytest.raises(PartialError, match="max_usd"):
                annotate(recipe, out=tmp_path / "run")
            assert server.requests == 10
