"""Shards as tasks on a Ray cluster of this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import good_answer, run_dsbs
from loopback import LoopbackServer

from dsbs import load_recipe
from dsbs.annotation.shards import Shard, shard_recipe


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
        url = f"teacher.base_url={server.url}"
        assert run_dsbs("annotate", str(path), url, "--out", "alone", cwd=tmp_path).returncode == 0
        ray = ["annotate.engine=ray", "annotate.ray={shards: 2, cpus_per_shard: 0.5}"]
        result = run_dsbs("annotate", str(path), url, *ray, "--out", "run", "--json", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert server.requests == 96
        again = run_dsbs("annotate", str(path), url, "--out", "run", "--json", cwd=tmp_path)
        assert again.returncode == 0 and server.requests == 96, "the joined store has all of it"
    summary = json.loads(result.stdout)["splits"]["train"]
    assert (summary["accepted"], summary["requests"], summary["cached"]) == (40, 40, 0)
    for split in ("train", "test"):
        files = [tmp_path / run / "annotate" / f"{split}.jsonl" for run in ("run", "alone")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_needing_more_than_the_cluster_has_is_an_error_at_once(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray = ["annotate.engine=ray", "annotate.ray={shards: 1, cpus_per_shard: 640}"]
    result = run_dsbs(
        "annotate",
        str(toy()),
        "teacher.base_url=http://127.0.0.1:9/v1",
        *ray,
        cwd=tmp_path,
        timeout=60,
    )
    assert result.returncode == 2 and "cpus_per_shard: 640" in result.stderr


def test_a_failure_on_a_worker_is_reported_as_on_this_machine(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray = ["annotate.engine=ray", "annotate.ray={shards: 1, cpus_per_shard: 0.5}"]
    with LoopbackServer(lambda body, number: (401, {}, b"{}")) as server:
        result = run_dsbs(
            "annotate", str(toy()), f"teacher.base_url={server.url}", *ray, cwd=tmp_path
        )
    assert (
        result.returncode == 2
        and "does not accept the key" in result.stderr
        and "Traceback" not in result.stderr
    )
