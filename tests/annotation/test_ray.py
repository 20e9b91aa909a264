"""Shards as tasks on a Ray cluster of this machine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import good_answer, run_dsbs
from loopback import LoopbackServer

from dsbs import PartialError, UserError, annotate, load_recipe
from dsbs.annotation.shards import annotate_shard, combine_results, shard_recipe
from dsbs.annotation.summary import SplitSummary
from dsbs.tasks.shards import Shard, ShardResult, check_resources, run_shard


def test_limits_are_split_among_the_shards(toy: Callable[..., Path]) -> None:
    changes = [
        "annotate.concurrency=64",
        "annotate.max_usd=8",
        "teacher.price={input: 1, output: 1}",
        "teacher.rpm=400",
    ]
    first_shard = shard_recipe(load_recipe(toy(), changes), Shard(1, 4))
    assert (
        first_shard.annotate.concurrency,
        first_shard.annotate.max_usd,
        first_shard.teacher.rpm,
        first_shard.teacher.tpm,
    ) == (16, 2.0, 100.0, None)
    request_limits = [
        shard_recipe(
            load_recipe(toy(), ["annotate.max_requests=5"]), Shard(i, 4)
        ).annotate.max_requests
        for i in (1, 2, 4)
    ]
    assert request_limits == [2, 1, 1]
    assert first_shard.folder is not None, "relative paths mean the same to a worker"


def test_a_run_on_ray_writes_the_same_files(toy: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    path = toy(train=40, test=8)
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}"])
        annotate(recipe, out=tmp_path / "local")
        result = run_dsbs(
            "annotate",
            str(path),
            f"teacher.base_url={server.url}",
            "annotate.engine=ray",
            "annotate.ray={shards: 2, cpus_per_shard: 0.5}",
            "--out",
            "run",
            "--json",
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        assert server.requests == 96
        annotate(recipe, out=tmp_path / "run")
        assert server.requests == 96, "the merged store has all replies"
    summary = json.loads(result.stdout)["splits"]["train"]
    assert (summary["accepted"], summary["requests"], summary["cached"]) == (40, 40, 0)
    for split in ("train", "test"):
        files = [tmp_path / run / "annotate" / f"{split}.jsonl" for run in ("run", "local")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_needing_more_than_the_cluster_has_is_an_error_at_once(toy: Callable[..., Path]) -> None:
    recipe = load_recipe(toy(), ["annotate.ray={shards: 1, cpus_per_shard: 640}"])
    message = "a task needs 640 CPU, and the whole cluster has 2"
    with pytest.raises(UserError, match=f"annotate.engine ray: {message}") as annotating:
        check_resources({"CPU": 2.0}, recipe.annotate.ray, "annotate.engine ray")
    assert "annotate.ray.cpus_per_shard" in annotating.value.hint
    with pytest.raises(UserError, match=f"--engine ray: {message}") as predicting:
        check_resources({"CPU": 2.0}, recipe.annotate.ray, "--engine ray")
    assert "annotate" not in predicting.value.hint


def test_a_failure_on_a_worker_is_raised_by_the_driver(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with LoopbackServer(lambda body, number: (401, {}, b"{}")) as server:
        recipe = load_recipe(toy(), [f"teacher.base_url={server.url}"])
        work = partial(annotate_shard, annotate, recipe, str(tmp_path / "run"), retry_refused=False)
        failed = run_shard(work, str(tmp_path), Shard(1, 2))
    failed = pickle.loads(pickle.dumps(failed))
    with pytest.raises(UserError, match="does not accept the key"):
        combine_results([ShardResult(Shard(2, 2), {}), failed])


def test_shards_that_can_be_continued_are_counted_and_their_first_error_returned() -> None:
    no_credit = PartialError("no credit", hint="pay")
    done = ShardResult(Shard(1, 2), {"train": SplitSummary(requests=3, wall_s=2.0)})
    stopped = ShardResult(Shard(2, 2), {"train": SplitSummary(requests=4, wall_s=1.0)}, no_credit)
    requested, error = combine_results([done, stopped])
    assert (requested["train"].requests, requested["train"].wall_s) == (7, 2.0)
    assert error is not None and error.problem == "no credit"
