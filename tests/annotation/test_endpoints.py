"""Several endpoints, bad networks, full disks: every row has a reply or a reason."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, run_dsbs, small_disk_at, start_dsbs
from loopback import LoopbackServer, completion, read_rows

from dsbs import PartialError, UserError, annotate, load_recipe
from dsbs.annotation import endpoint_pool


def pool(*servers: LoopbackServer, weights: tuple[float, ...] = ()) -> str:
    shares = weights or tuple(1.0 for _ in servers)
    return "teacher.endpoints=" + json.dumps(
        [
            {"base_url": server.url, "weight": weight}
            for server, weight in zip(servers, shares, strict=True)
        ]
    )


@pytest.fixture
def open_toy(toy: Callable[..., Path]) -> Callable[..., Path]:
    """The toy recipe without a base_url of its own."""

    def make(*args: Any, **sections: Any) -> Path:
        path = toy(*args, **sections)
        recipe = json.loads(path.read_text(encoding="utf-8"))
        del recipe["teacher"]["base_url"]
        recipe["teacher"]["api_key_env"] = None
        path.write_text(json.dumps(recipe), encoding="utf-8")
        return path

    return make


def test_endpoints_share_the_rows_and_no_request_is_sent_to_both(
    open_toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = open_toy(train=36, test=4)
    with LoopbackServer(good_answer) as first, LoopbackServer(good_answer) as second:
        result = annotate(
            load_recipe(path, [pool(first, second, weights=(3, 1))]), out=tmp_path / "run"
        )
        assert (first.requests, second.requests) == (30, 10) and result.splits[
            "train"
        ].accepted == 36
        again = annotate(load_recipe(path, [pool(second, first)]), out=tmp_path / "run")
        assert first.requests + second.requests == 40 and again.splits["train"].cached == 36
        annotate(load_recipe(path, [f"teacher.base_url={first.url}"]), out=tmp_path / "run")
        assert (first.requests, second.requests) == (40, 10), (
            "one alone: only what the other had answered is bought of it"
        )


def test_when_an_endpoint_dies_the_other_takes_over(
    open_toy: Callable[..., Path], tmp_path: Path
) -> None:
    with (
        LoopbackServer(good_answer) as living,
        LoopbackServer(lambda body, n: (503, {}, b"{}")) as dying,
    ):
        result = annotate(
            load_recipe(open_toy(train=60, test=4), [pool(dying, living)]), out=tmp_path / "run"
        )
    assert result.splits["train"].accepted == 60 and living.requests == 64
    assert (
        0 < dying.requests < 20
        and sum(s.wasted["server error"] for s in result.splits.values()) == dying.requests
    )


def test_a_wrong_key_at_one_of_several_is_an_error_with_its_url(
    open_toy: Callable[..., Path], tmp_path: Path
) -> None:
    with (
        LoopbackServer(good_answer) as good,
        LoopbackServer(lambda body, n: (401, {}, b"{}")) as bad,
        pytest.raises(UserError, match=bad.url),
    ):
        annotate(load_recipe(open_toy(), [pool(good, bad)]), out=tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teacher.endpoints=[{base_url: 'http://a/v1'}, {base_url: 'http://a/v1/'}]", "twice"),
        ("teacher.endpoints=[{base_url: 'ftp://a'}]", "http"),
        ("teacher.endpoints=[{base_url: 'http://a/v1', weight: 0}]", "greater than 0"),
    ],
)
def test_wrong_endpoints_are_mistakes_of_the_recipe(
    open_toy: Callable[..., Path], override: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(open_toy(), [override])


def test_a_url_beside_endpoints_is_a_mistake(toy: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="exclude each other"):
        load_recipe(toy(), ["teacher.endpoints=[{base_url: 'http://a/v1'}]"])


@pytest.mark.parametrize("throttled", [0.05, 0.30])
def test_every_row_is_delivered_over_a_faulty_network(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, throttled: float
) -> None:
    monkeypatch.setattr(endpoint_pool, "FIRST_WAIT_S", 0.02)  # shorter waits, as many retries
    dice = random.Random(7)
    lock = threading.Lock()
    faults: Counter[str] = Counter()

    def faulty(body: dict[str, Any], number: int) -> Any:
        with lock:
            roll = dice.random()
        for share, kind, reply in (
            (
                throttled,
                "throttled",
                (429, {"Retry-After": "0.05"}, b'{"error": {"message": "slow down"}}'),
            ),
            (0.05, "server error", (500, {}, b'{"error": {"message": "oops"}}')),
            (0.02, "dropped", None),
            (0.02, "silent", "silence"),
            (0.03, "unreadable", (200, {}, b'{"choices": [{"mess')),
        ):
            if roll < share:
                with lock:
                    faults[kind] += 1
                if kind == "dropped":
                    raise ConnectionAbortedError
                if kind == "silent":
                    time.sleep(1.5)
                    raise ConnectionAbortedError
                return reply
            roll -= share
        return good_answer(body, number)

    path = toy(
        train=76,
        test=4,
        teacher={"timeout_s": 1.0, "max_attempts": 8},
        annotate={"concurrency": 16},
    )
    with LoopbackServer(faulty) as server:
        result = annotate(
            load_recipe(path, [f"teacher.base_url={server.url}"]), out=tmp_path / "run"
        )
        wasted = Counter[str]()
        for summary in result.splits.values():
            wasted += summary.wasted
        assert (
            sum(summary.requests for summary in result.splits.values())
            == server.requests
            == 80 + sum(wasted.values())
        )
    assert result.splits["train"].accepted == 76 and not result.splits["train"].rejected
    assert (
        wasted["throttled"] == faults["throttled"]
        and wasted["server error"] == faults["server error"]
    )
    assert wasted["unreadable"] == faults["unreadable"]
    assert len(faults) == 5, "each kind of fault occurred"
    assert wasted["connection"] + wasted["timeout"] == faults["dropped"] + faults["silent"]
    assert result.as_json()["splits"]["train"]["wasted"]


def test_rows_that_an_endpoint_never_answers_are_rejected_with_their_reason(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def deaf(body: dict[str, Any], number: int) -> Any:
        if "number 5 " in body["messages"][-1]["content"]:
            return 500, {}, b"{}"
        return good_answer(body, number)

    with LoopbackServer(deaf) as server:
        recipe = load_recipe(
            toy(train=8, test=4), [f"teacher.base_url={server.url}", "teacher.max_attempts=2"]
        )
        result = annotate(recipe, out=tmp_path / "run")
    assert [row["reject_reason"] for row in read_rows(tmp_path / "run")][
        5
    ] == "no-reply" and result.splits["train"].accepted == 7


def test_a_refused_row_is_requested_again_only_with_retry_refused(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def picky(body: dict[str, Any], number: int) -> Any:
        bad = "number 5 " in body["messages"][-1]["content"]
        return (400, {}, b'{"error": {"message": "unsafe"}}') if bad else good_answer(body, number)

    path = toy(train=8, test=4)
    with LoopbackServer(picky) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}"])
        for expected in (12, 12):
            annotate(recipe, out=tmp_path / "run")
            assert server.requests == expected
        assert read_rows(tmp_path / "run")[5]["reject_reason"] == "refused"
        out = ["--out", str(tmp_path / "run"), "--retry-refused"]
        assert (
            run_dsbs(
                "annotate", str(path), f"teacher.base_url={server.url}", *out, cwd=tmp_path
            ).returncode
            == 0
        )
        assert server.requests == 13


def test_caps_hold_over_a_whole_run(toy: Callable[..., Path], tmp_path: Path) -> None:
    with LoopbackServer(good_answer) as server:
        started = time.monotonic()
        recipe = load_recipe(
            toy(train=8, test=4), [f"teacher.base_url={server.url}", "teacher.rpm=1200"]
        )
        annotate(recipe, out=tmp_path / "run")
        assert time.monotonic() - started >= 11 * 0.05


def test_tokens_from_the_providers_cache_are_counted(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def cached(body: dict[str, Any], number: int) -> Any:
        reply = completion(good_answer(body, number))
        reply["usage"]["prompt_tokens_details"] = {"cached_tokens": 8}
        return 200, {}, json.dumps(reply).encode()

    with LoopbackServer(cached) as server:
        result = annotate(
            load_recipe(toy(train=4, test=4), [f"teacher.base_url={server.url}"]),
            out=tmp_path / "run",
        )
    assert result.as_json()["splits"]["train"]["usage"]["cached_tokens"] == 32
    assert read_rows(tmp_path / "run")[0]["usage"]["cached_tokens"] == 8


def test_a_redirect_is_an_error_with_its_target(toy: Callable[..., Path], tmp_path: Path) -> None:
    with (
        LoopbackServer(
            lambda body, number: (308, {"Location": "https://elsewhere.example/v1"}, b"")
        ) as server,
        pytest.raises(UserError, match=r"redirects to https://elsewhere\.example"),
    ):
        annotate(load_recipe(toy(), [f"teacher.base_url={server.url}"]), out=tmp_path / "run")


# --- the store, from outside


def test_the_store_is_consistent_for_a_reader_during_a_run(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    shell = shutil.which("sqlite3")
    path = toy(train=200, test=4)
    with LoopbackServer(good_answer, latency_s=0.02) as server:
        url = f"teacher.base_url={server.url}"
        process = start_dsbs("annotate", str(path), url, "--out", "run", cwd=tmp_path)
        store = tmp_path / "run" / "annotate" / "replies.sqlite"
        observations = []
        while process.poll() is None:
            time.sleep(0.1)
            if not store.is_file() or sum(server.completed.values()) < 20:
                continue
            completed = sum(server.completed.values())
            if shell:
                sql = "PRAGMA integrity_check; SELECT count(*) FROM replies;"
                output = subprocess.run(
                    [shell, "-cmd", ".timeout 5000", str(store), sql],
                    capture_output=True,
                    text=True,
                    check=True,
                ).stdout.split()
            else:
                reader = sqlite3.connect(store)
                output = [
                    str(reader.execute(sql).fetchone()[0])
                    for sql in ("PRAGMA integrity_check", "SELECT count(*) FROM replies")
                ]
            observations.append((output[0], int(output[1]), completed))
        assert process.returncode == 0
    assert observations and all(state == "ok" for state, _, _ in observations)
    assert all(count >= completed - 8 for _, count, completed in observations), (
        "what is not in it by then is in flight"
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 6 MB."""
    with small_disk_at(tmp_path / "disk", 6) as folder:
        yield folder


def test_a_full_disk_ends_with_exit_code_3_and_nothing_lost(
    toy: Callable[..., Path], tmp_path: Path, small_disk: Path
) -> None:
    padding = "because " * 2500

    def wordy(body: dict[str, Any], number: int) -> str:
        return f"{padding}\n{good_answer(body, number)}"

    path = toy(train=400, test=4, annotate={"concurrency": 8})
    with LoopbackServer(wordy, latency_s=0.01) as server:
        arguments = [
            "annotate",
            str(path),
            f"teacher.base_url={server.url}",
            "--out",
            str(small_disk / "run"),
        ]
        result = run_dsbs(*arguments, cwd=tmp_path)
        assert (
            result.returncode == 3
            and "Traceback" not in result.stderr
            and "free some space" in result.stderr
        )
        completed = sum(server.completed.values())
        store = sqlite3.connect(small_disk / "run" / "annotate" / "replies.sqlite")
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert store.execute("SELECT count(*) FROM replies").fetchone() == (completed,), (
            "every reply that was paid for"
        )
        store.close()
        assert 20 < completed < 404
        subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
        assert run_dsbs(*arguments, cwd=tmp_path).returncode == 0
        assert server.requests == 404, "and none was bought twice"


def test_a_full_disk_is_an_error_before_anything_is_sent(
    toy: Callable[..., Path], tmp_path: Path, small_disk: Path
) -> None:
    (small_disk / "filler").write_bytes(b"x" * (5_800 << 10))
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(toy(), [f"teacher.base_url={server.url}"])
        with pytest.raises(PartialError):
            annotate(recipe, out=small_disk / "run")
        assert server.requests == 0
