"""Prices: the cost of replies, and limits that stop in time and lose nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, toy_rows, write_csv
from loopback import LoopbackServer

from dsbs import PartialError, UserError, annotate, load_recipe
from dsbs.annotation.annotator import Annotator, RowReplies
from dsbs.annotation.backends import Price, Reply, price_of
from dsbs.annotation.planning import plan
from dsbs.config import PriceSection, TeacherSection
from dsbs.evaluation.costs import teacher_price
from dsbs.run_folder import RunFolder

PRICE = "teacher.price={input: 1000, output: 2000}"  # 11 + 7 tokens a reply: 0.025 dollars


def test_the_recipes_price_precedes_the_public_list_and_unknown_is_not_free() -> None:
    public = price_of(TeacherSection(model="gpt-4.1-mini"), 0.5)
    assert public is not None and 0 < public.cached < public.input < public.output
    assert price_of(
        TeacherSection(model="gpt-4.1-mini", price=PriceSection(input=1, output=2)), 0.5
    ) == Price(1, 2, 1, 0.5)
    assert (
        price_of(TeacherSection(model="gpt-4.1-mini", base_url="http://127.0.0.1:8000/v1"), 0.5)
        is None
    )
    assert price_of(TeacherSection(kind="recorded"), 0.5) is None
    assert price_of(TeacherSection(kind="llamacpp", model="a"), 0.5) == Price(0, 0, 0, 0.5)


def test_cached_tokens_and_batches_are_cheaper() -> None:
    price = Price(input=1.0, output=4.0, cached=0.25, batch=0.5)
    online = Reply("", prompt_tokens=1_000_000, completion_tokens=500_000, cached_tokens=800_000)
    assert price.usd(online) == pytest.approx(0.2 * 1.0 + 0.8 * 0.25 + 0.5 * 4.0)
    assert price.usd(replace(online, lane="batch")) == pytest.approx(price.usd(online) / 2)
    assert price.usd(Reply("", completion_tokens=None)) is None
    assert Price(input=0, output=0, cached=0).usd(Reply("")) == 0


def test_cached_tokens_that_are_counted_beside_the_prompts_cost_too() -> None:
    price = Price(1.0, 0.0, 0.1)
    assert price.of(1000, 0, 900) == pytest.approx(190e-6), "100 fresh ones and 900 cached ones"
    assert price.of(100, 0, 900) == pytest.approx(190e-6), "the prompt's 100 are all fresh"


@pytest.mark.parametrize("hint", [False, True])
def test_copies_of_a_row_are_paid_for_once_and_do_not_lower_the_price_of_a_prediction(
    toy: Callable[..., Path], tmp_path: Path, hint: bool
) -> None:
    def always_wrong(body: dict[str, Any], number: int) -> str:
        answer = good_answer(body, number)
        return (
            answer.replace("billing", "?").replace("shipping", "billing").replace("?", "shipping")
        )

    path = toy(train=20)
    copies = [row | {"id": f"c{i}"} for i in range(4) for row in toy_rows(10, start=1000)]
    unique = [row | {"id": f"c{i}"} for i, row in enumerate(copies)]
    write_csv(tmp_path / "test.csv", unique)
    with LoopbackServer(always_wrong) as server:
        changes = [f"teacher.base_url={server.url}", f"annotate.hint={json.dumps(hint)}"]
        recipe = load_recipe(path, [*changes, "teacher.price={input: 1000, output: 1000}"])
        summary = annotate(recipe, out=tmp_path / "run").splits["test"]
    per_request = 0.018  # 12 prompt tokens and 6 of the completion
    assert summary.usd == pytest.approx(10 * per_request * (2 if hint else 1))
    assert summary.rows == 40 and summary.paid_rows == 10
    manifest = RunFolder(tmp_path / "run").manifest("annotate")
    assert teacher_price(manifest, "test") == pytest.approx(per_request)


def test_stored_replies_keep_their_cost_in_later_runs(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(toy(train=6, test=4), [f"teacher.base_url={server.url}", PRICE])
        for _ in range(2):
            result = annotate(recipe, out=tmp_path / "run")
            assert result.splits["train"].usd == pytest.approx(6 * 0.025)
        assert server.requests == 10
    row = json.loads(
        (tmp_path / "run" / "annotate" / "train.jsonl").open(encoding="utf-8").readline()
    )
    assert row["usd"] == pytest.approx(0.025)


def test_an_unknown_price_is_null_and_a_budget_without_one_is_refused(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=2, test=2)
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        assert (
            annotate(load_recipe(path, [url]), out=tmp_path / "run").as_json()["splits"]["train"][
                "usd"
            ]
            is None
        )
        with pytest.raises(UserError, match=r"teacher\.price"):
            annotate(load_recipe(path, [url, "annotate.max_usd=1"]), out=tmp_path / "run")
        assert server.requests == 4


def test_a_budget_is_never_passed_and_raising_it_goes_on(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=30, test=4)
    with LoopbackServer(good_answer, latency_s=0.02) as server:
        base = [f"teacher.base_url={server.url}", PRICE]
        with pytest.raises(PartialError, match="max_usd") as stopped:
            annotate(
                load_recipe(path, [*base, "annotate.max_usd=0.35", "annotate.max_tokens=8"]),
                out=tmp_path / "run",
            )
        assert stopped.value.exit_code == 3
        bought = server.requests
        assert 0.025 * bought <= 0.35 + 1e-9 and bought >= 5
        rows = [
            json.loads(line)
            for line in (tmp_path / "run" / "annotate" / "train.jsonl").open(encoding="utf-8")
        ]
        assert len(rows) == 30 and sum(row["accepted"] for row in rows) == bought
        assert {row["reject_reason"] for row in rows} == {None, "no-reply"}
        annotate(
            load_recipe(path, [*base, "annotate.max_usd=10", "annotate.max_tokens=8"]),
            out=tmp_path / "run",
        )
        assert server.requests == 34, "every reply was bought once"


def test_a_limit_of_requests_counts_one_command(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(train=12, test=4)
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}", "annotate.max_requests=7"])
        for total in (7, 14):
            with pytest.raises(PartialError, match="max_requests"):
                annotate(recipe, out=tmp_path / "run")
            assert server.requests == total
        annotate(recipe, out=tmp_path / "run")
        assert server.requests == 16


def test_a_plan_names_the_most_that_it_may_cost(toy: Callable[..., Path], tmp_path: Path) -> None:
    planned = plan(
        load_recipe(toy(train=2, test=2), [PRICE, "annotate.max_tokens=100"]), tmp_path / "run"
    )
    assert planned.usd == pytest.approx((planned.prompt_tokens * 1000 + 400 * 2000) / 1e6)


def test_a_plan_foresees_the_limit_that_the_requests_will_have(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=20, test=4)
    for change, tokens in (
        ("annotate.max_usd=0.5", 25),  # a tenth of it pays for 25 tokens
        ("teacher.context_tokens=512", 128),
        ("teacher.endpoint=completions", 256),
    ):
        recipe = load_recipe(path, [PRICE, change])
        planned = plan(recipe, out=tmp_path / "run")
        assert planned.max_completion_tokens == planned.requests * tokens, change
        annotator = Annotator(recipe)
        request = annotator.next_requests(next(annotator.examples("train")), RowReplies())[0]
        assert request.body["max_tokens"] == tokens, change
    limited = load_recipe(path, ["teacher.endpoint=completions", "teacher.context_tokens=512"])
    assert plan(limited, out=tmp_path / "run").max_completion_tokens == 24 * 128
