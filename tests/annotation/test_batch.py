"""The batch lane: the same replies at half the price, none lost or sent twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_server import BatchServer
from conftest import good_answer, run_dsbs
from loopback import LoopbackServer, completion, question, read_rows

from dsbs import PartialError, UserError, load_recipe
from dsbs.annotation import batch as lane
from dsbs.annotation.run import annotate, export_batch


def answer(body: dict[str, Any]) -> Any:
    return good_answer(body, 0)


def recipe(path: Path, url: str, *overrides: str) -> Any:
    return load_recipe(path, [f"teacher.base_url={url}", "annotate.batch.poll_s=0.01", *overrides])


def test_a_batch_brings_the_same_replies_as_online_at_half_the_price(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path, price = toy(train=10, test=4), "teacher.price={input: 1000, output: 2000}"
    with BatchServer(answer, polls=3) as server, LoopbackServer(good_answer) as online:
        annotate(recipe(path, online.url, price), out=tmp_path / "online")
        result = annotate(recipe(path, server.url, price), out=tmp_path / "batch", buying="batch")
        assert (server.requests, len(server.batches), server.online) == (14, 1, 0)
        again = annotate(recipe(path, server.url, price), out=tmp_path / "batch")
        assert server.requests == 14 and again.splits["train"].cached == 10, (
            "online finds what the batch bought"
        )
    assert result.splits["train"].accepted == 10
    online_rows, batch_rows = read_rows(tmp_path / "online"), read_rows(tmp_path / "batch")
    assert [row["label"] for row in online_rows] == [row["label"] for row in batch_rows]
    assert batch_rows[0]["usd"] == pytest.approx(online_rows[0]["usd"] / 2)


def test_long_lists_are_cut_into_several_batches(toy: Callable[..., Path], tmp_path: Path) -> None:
    with BatchServer(answer) as server:
        annotate(
            recipe(toy(train=10, test=4), server.url, "annotate.batch.max_requests=5"),
            out=tmp_path / "run",
            buying="batch",
        )
        assert (server.requests, len(server.batches)) == (14, 3)


def test_expired_requests_go_online_or_to_the_next_batch(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=10, test=4)
    with BatchServer(answer) as server:
        server.expire = lambda body: "number 3 " in question(body) or "number 4 " in question(body)
        with pytest.raises(PartialError, match="2 requests came back"):
            annotate(recipe(path, server.url), out=tmp_path / "run", buying="batch")
        assert [row["reject_reason"] for row in read_rows(tmp_path / "run")].count("no-reply") == 2
        server.expire = lambda body: "number 4 " in question(body)
        with pytest.raises(PartialError, match="1 request came back"):
            annotate(recipe(path, server.url), out=tmp_path / "run", buying="batch")
        assert server.requests == 16 and server.online == 0
        annotate(recipe(path, server.url), out=tmp_path / "run")
        assert server.requests == 16 and server.online == 1
    assert all(row["accepted"] for row in read_rows(tmp_path / "run"))
    assert len(list((tmp_path / "run" / "annotate" / "batches").glob("*/output.jsonl"))) == 2, (
        "as they came"
    )


def test_a_refused_line_is_final_and_a_failed_one_is_left_over(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def picky(body: dict[str, Any]) -> Any:
        if "number 1 " in question(body):
            return 400, {"error": {"message": "unsafe"}}
        return (
            (500, {"error": {"message": "oops"}}) if "number 2 " in question(body) else answer(body)
        )

    with BatchServer(picky) as server, pytest.raises(PartialError, match="1 request came back"):
        annotate(recipe(toy(train=6, test=4), server.url), out=tmp_path / "run", buying="batch")
    assert [row["reject_reason"] for row in read_rows(tmp_path / "run")] == [
        None,
        "refused",
        "no-reply",
        None,
        None,
        None,
    ]


def test_lines_of_a_batch_go_through_the_same_table_of_faults(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    is_well = {"on": False}

    def faulty(body: dict[str, Any]) -> Any:
        if "number 1 " in question(body):
            return 403, {"error": {"message": "Content violates usage guidelines."}}
        if not is_well["on"] and "number 2 " in question(body):
            return 400, {"error": {"message": "Your credit balance is too low"}}
        if not is_well["on"] and "number 3 " in question(body):
            return 200, completion("It is.\nAnswer: bil", finish_reason="error")
        return answer(body)

    path = toy(train=6, test=4)
    with BatchServer(faulty) as server:
        with pytest.raises(PartialError, match="credit balance is too low"):
            annotate(recipe(path, server.url), out=tmp_path / "run", buying="batch")
        rows = read_rows(tmp_path / "run")
        reasons = [row["reject_reason"] for row in rows]
        assert reasons == [None, "refused", "no-reply", "no-reply", None, None]
        assert "usage guidelines" in rows[1]["reject_detail"]
        assert "finish_reason error" in rows[3]["reject_detail"]
        assert rows[3]["usage"]["completion_tokens"] == 7, "it is on the bill"
        is_well["on"] = True
        result = annotate(recipe(path, server.url), out=tmp_path / "run", buying="batch")
    assert result.splits["train"].rejected == {"refused": 1} and server.requests == 12


def test_a_full_queue_of_batches_is_waited_for_by_running_again(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    words = "Enqueued token limit reached for m. Limit: 2,000,000 enqueued tokens."
    path = toy(train=4, test=4)
    with BatchServer(answer, refuse=words) as server:
        with pytest.raises(PartialError, match="queue of batches is full"):
            annotate(recipe(path, server.url), out=tmp_path / "run", buying="batch")
        assert {row["reject_reason"] for row in read_rows(tmp_path / "run")} == {"no-reply"}
        server._refuse = None
        result = annotate(recipe(path, server.url), out=tmp_path / "run", buying="batch")
    assert result.splits["train"].accepted == 4


def test_a_batch_that_is_refused_as_a_whole_says_why(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with (
        BatchServer(answer, refuse="line 1: no such model") as server,
        pytest.raises(UserError, match="no such model"),
    ):
        annotate(recipe(toy(train=4, test=4), server.url), out=tmp_path / "run", buying="batch")


def test_samples_that_depend_on_earlier_ones_go_into_further_batches(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with BatchServer(answer) as server:
        loaded = recipe(
            toy(train=4, test=4), server.url, "annotate.samples=3", "annotate.temperature=0.7"
        )
        annotate(loaded, out=tmp_path / "run", buying="batch")
        assert (server.requests, len(server.batches)) == (16, 1), "two that agree settle it"


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize(
    "step", ["files.create", "batches.create", "batches.retrieve", "files.content"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_step_nothing_is_submitted_twice(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, when: str
) -> None:
    resource_name, name = step.split(".")
    original = lane.BatchClient.__init__
    armed = [True]

    def instrumented(self: Any, *args: Any) -> None:
        original(self, *args)
        resource = getattr(self._openai, resource_name)
        real = getattr(resource, name)

        def dying(*a: Any, **k: Any) -> Any:
            if armed[0] and when == "before":
                raise Killed
            result = real(*a, **k)
            if armed[0]:
                raise Killed
            return result

        setattr(resource, name, dying)

    monkeypatch.setattr(lane.BatchClient, "__init__", instrumented)
    path = toy(train=6, test=4)
    with BatchServer(answer) as server:
        with pytest.raises(Killed):
            annotate(recipe(path, server.url), out=tmp_path / "run", buying="batch")
        armed[0] = False
        annotate(recipe(path, server.url), out=tmp_path / "run", buying="batch")
        assert (len(server.batches), server.requests) == (1, 10)
    assert all(row["accepted"] for row in read_rows(tmp_path / "run"))


def test_requests_go_out_by_file_and_their_output_comes_back(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=6, test=4)
    loaded = recipe(path, "http://127.0.0.1:9/v1")
    assert export_batch(loaded, tmp_path / "requests.jsonl", out=tmp_path / "run") == 10
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").open(encoding="utf-8")]
    assert {line["method"] for line in lines} == {"POST"} and {line["url"] for line in lines} == {
        "/v1/chat/completions"
    }
    assert (
        len({line["custom_id"] for line in lines}) == 10 and lines[0]["body"]["model"] == "loopback"
    )
    with pytest.raises(UserError, match="exists already"):
        export_batch(loaded, tmp_path / "requests.jsonl", out=tmp_path / "run")
    output = [  # as `vllm run-batch` writes it
        {
            "id": "vllm-1",
            "custom_id": line["custom_id"],
            "error": None,
            "response": {
                "status_code": 200,
                "request_id": "r",
                "body": completion(answer(line["body"])),
            },
        }
        for line in lines[:-1]
    ]
    (tmp_path / "out.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in output), encoding="utf-8"
    )
    result = run_dsbs(
        "annotate",
        str(path),
        "teacher.base_url=http://127.0.0.1:9/v1",
        "--out",
        str(tmp_path / "run"),
        "--batch-import",
        str(tmp_path / "out.jsonl"),
        cwd=tmp_path,
    )
    assert result.returncode == 3 and "1 row got no reply" in result.stderr
    assert sum(row["accepted"] for row in read_rows(tmp_path / "run")) == 6
    assert "9 replies taken" in result.stderr
    before = (tmp_path / "run" / "annotate" / "train.jsonl").read_bytes()
    annotate(loaded, out=tmp_path / "run", buying="nothing", outputs=[tmp_path / "out.jsonl"])
    assert (tmp_path / "run" / "annotate" / "train.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_batch_that_never_reached_the_endpoint_is_built_again(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=6, test=4)
    with LoopbackServer(lambda body, number: (503, {}, b"{}")) as away, pytest.raises(PartialError):
        annotate(recipe(path, away.url), out=tmp_path / "run", buying="batch")
    with BatchServer(answer) as server:
        with pytest.raises(PartialError, match="max_requests"):
            annotate(
                recipe(path, server.url, "annotate.max_requests=0"),
                out=tmp_path / "run",
                buying="batch",
            )
        assert server.requests == 0, "today's limits hold for yesterday's batch"
        annotate(recipe(path, server.url), out=tmp_path / "run")
        annotate(recipe(path, server.url), out=tmp_path / "run", buying="batch")
        assert (server.requests, server.online) == (0, 10)


def test_one_unreadable_line_of_an_output_costs_that_line_alone(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def cut(body: dict[str, Any]) -> Any:
        text = answer(body)
        return text + " \ud83d" if "number 1 " in question(body) else text

    with BatchServer(cut) as server:
        finish = server.finish

        def spoiled(name: str, batch: dict[str, Any]) -> None:
            finish(name, batch)
            server.files[f"{name}-output"] += b"{not json\n"

        server.finish = spoiled  # type: ignore[method-assign]
        result = annotate(
            recipe(toy(train=6, test=4), server.url), out=tmp_path / "run", buying="batch"
        )
    assert (
        result.splits["train"].wasted["batch"] == 1
        and sum(row["own_label"] is not None for row in read_rows(tmp_path / "run")) >= 5
    )


def test_an_endpoint_without_batches_is_a_usage_error(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(lambda body, number: (404, {}, b"{}")) as server:
        result = run_dsbs(
            "annotate",
            str(toy(train=4, test=4)),
            f"teacher.base_url={server.url}",
            "--batch",
            cwd=tmp_path,
        )
    assert result.returncode == 2 and "has no batches" in result.stderr


def test_a_batch_keeps_to_the_limits(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(train=10, test=4)
    with BatchServer(answer) as server:
        with pytest.raises(PartialError, match="max_requests"):
            annotate(
                recipe(path, server.url, "annotate.max_requests=6"),
                out=tmp_path / "run",
                buying="batch",
            )
        assert server.requests == 6
        price = "teacher.price={input: 1000, output: 2000}"
        with pytest.raises(PartialError, match="max_usd"):
            annotate(
                recipe(path, server.url, price, "annotate.max_usd=0.01"),
                out=tmp_path / "run",
                buying="batch",
            )
        assert server.requests == 6


def test_an_output_that_is_read_twice_is_billed_once_and_is_no_second_answer(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    loaded = recipe(toy(train=4, test=4), "http://127.0.0.1:9/v1", "annotate.splits=[train]")
    export_batch(loaded, tmp_path / "requests.jsonl", out=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "requests.jsonl").open(encoding="utf-8")]
    bodies = [completion(answer(line["body"])) for line in lines]
    bodies[0]["choices"][0]["message"]["content"] = None
    (tmp_path / "out.jsonl").write_text(
        "".join(
            json.dumps(
                {"custom_id": line["custom_id"], "response": {"status_code": 200, "body": body}}
            )
            + "\n"
            for line, body in zip(lines, bodies, strict=True)
        ),
        encoding="utf-8",
    )
    files = []
    for _ in range(3):
        result = annotate(
            loaded, out=tmp_path / "run", buying="nothing", outputs=[tmp_path / "out.jsonl"]
        )
        assert result.splits["train"].rejected == {"no-reply": 1}, "it may be asked again"
        files.append((tmp_path / "run" / "annotate" / "train.jsonl").read_bytes())
    assert files[0] == files[1] == files[2]
