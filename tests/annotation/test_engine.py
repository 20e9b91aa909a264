"""Requests to a teacher: what is sent, stored, retried, and what stops a run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, write_jsonl
from loopback import LoopbackServer, completion, question, read_rows

from dsbs import DsbsError, UserError, annotate, load_recipe
from dsbs.annotation.planning import plan
from dsbs.files import lock_folder

Answer = Callable[[dict[str, Any], int], Any]


def test_every_row_becomes_one_annotation_in_the_files_order(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        result = annotate(
            load_recipe(toy(), [f"teacher.base_url={server.url}"]), out=tmp_path / "run"
        )
        assert server.requests == 52
    rows = read_rows(tmp_path / "run")
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(40)]
    assert set(rows[0]) == {
        "schema", "id", "input", "gold", "label", "own_label", "rationale", "provenance", "samples",
        "vote_share", "label_logprob", "accepted", "reject_reason", "usage", "usd", "teacher",
        "request_key",
    }  # fmt: skip
    assert (
        rows[0]["label"] == rows[0]["gold"] == "billing"
        and rows[0]["rationale"] == "The message is about an invoice."
    )
    assert rows[0]["usage"] == {"prompt_tokens": 11, "completion_tokens": 7, "cached_tokens": None}
    summary = result.as_json()["splits"]["train"]
    assert (
        summary["rows"] == summary["accepted"] == summary["requests"] == 40
        and summary["label_accuracy"] == 1.0
    )


def test_a_rerun_sends_nothing_and_writes_the_same_bytes(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(toy(), [f"teacher.base_url={server.url}"])
        annotate(recipe, out=tmp_path / "run")
        first = (tmp_path / "run" / "annotate" / "train.jsonl").read_bytes()
        again = annotate(recipe, out=tmp_path / "run")
        assert server.requests == 52
    assert (tmp_path / "run" / "annotate" / "train.jsonl").read_bytes() == first
    assert again.splits["train"].cached == 40 and again.splits["train"].requests == 0


def test_a_recorded_completion_is_used_and_only_the_rest_is_asked(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    recorded = "It is about a bill.\nAnswer: billing"
    completions = {"r0": recorded, "r2": "I cannot say.", "r3": recorded}
    rows = [
        {"id": f"r{i}", "input": {"text": f"My invoice number {i} is wrong."}}
        | ({"teacher": {"completion": completions[f"r{i}"]}} if f"r{i}" in completions else {})
        for i in range(6)
    ]
    write_jsonl(tmp_path / "log.jsonl", rows)
    log = ["task.data.train=log.jsonl", "annotate.splits=train", "task.columns={}"]
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        recipe = load_recipe(toy(), [*log, url, "annotate.use_recorded=true"])
        assert plan(recipe, tmp_path / "run").requests == 4
        result = annotate(recipe, out=tmp_path / "run")
        assert server.requests == result.splits["train"].requests == 4
        written = {row["id"]: row for row in read_rows(tmp_path / "run")}
        assert [written[f"r{i}"]["provenance"] for i in (0, 1, 2, 3)] == [
            "recorded", "own", "own", "recorded",
        ]  # fmt: skip
        assert written["r0"]["rationale"] == "It is about a bill." and written["r0"]["accepted"]
        assert written["r0"]["usage"]["prompt_tokens"] is None
        annotate(load_recipe(toy(), [*log, url]), out=tmp_path / "all")
        assert server.requests == 10  # without the key, every row is asked


def test_another_url_buys_everything_again_and_going_back_buys_nothing(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy()
    with LoopbackServer(good_answer) as first, LoopbackServer(good_answer) as second:
        for server, expected in ((first, (52, 0)), (second, (52, 52)), (first, (52, 52))):
            annotate(load_recipe(path, [f"teacher.base_url={server.url}"]), out=tmp_path / "run")
            assert (first.requests, second.requests) == expected


@pytest.mark.parametrize(
    "change",
    [
        "teacher.model=other",
        "annotate.temperature=0.5",
        "task.description=Route it.",
        "teacher.extra_body={top_p: 0.9}",
    ],
)
def test_a_changed_request_is_bought_again(
    toy: Callable[..., Path], tmp_path: Path, change: str
) -> None:
    path = toy(train=4, test=4)
    with LoopbackServer(good_answer) as server:
        annotate(load_recipe(path, [f"teacher.base_url={server.url}"]), out=tmp_path / "run")
        annotate(
            load_recipe(path, [f"teacher.base_url={server.url}", change]), out=tmp_path / "run"
        )
        assert server.requests == 16


def test_raising_max_tokens_asks_again_for_the_cut_rows_only(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def long_winded(body: dict[str, Any], number: int) -> Any:
        if "number 3 " in question(body) and body["max_tokens"] < 300:
            return (
                200,
                {},
                json.dumps(completion("It is about a par", finish_reason="length")).encode(),
            )
        return good_answer(body, number)

    path = toy(train=8, test=4)
    with LoopbackServer(long_winded) as server:
        url = f"teacher.base_url={server.url}"
        annotate(load_recipe(path, [url, "annotate.max_tokens=256"]), out=tmp_path / "run")
        assert [row["reject_reason"] for row in read_rows(tmp_path / "run")][3] == "truncated"
        annotate(load_recipe(path, [url, "annotate.max_tokens=300"]), out=tmp_path / "run")
        assert server.requests == 13
        assert all(row["accepted"] for row in read_rows(tmp_path / "run"))
        annotate(load_recipe(path, [url, "annotate.max_tokens=200"]), out=tmp_path / "run")
        assert server.requests == 13, "a longer reply answers a smaller budget too"


@pytest.mark.parametrize(
    "failure",
    [
        (429, {"Retry-After": "1"}, b'{"error": {"message": "slow down"}}'),
        (500, {}, b'{"error": {"message": "oops"}}'),
        (408, {}, b"{}"),
        (200, {}, b'{"choices": ['),
        (200, {}, b'{"choices": []}'),
    ],
    ids=["429", "500", "408", "cut JSON", "no choice"],
)
def test_transient_failures_are_retried(
    toy: Callable[..., Path], tmp_path: Path, failure: Any
) -> None:
    def flaky(body: dict[str, Any], number: int) -> Any:
        return failure if number == 2 else good_answer(body, number)

    with LoopbackServer(flaky) as server:
        started = time.monotonic()
        result = annotate(
            load_recipe(toy(train=6, test=4), [f"teacher.base_url={server.url}"]),
            out=tmp_path / "run",
        )
        assert server.requests == 11
    assert result.splits["train"].accepted == 6
    if failure[0] == 429:
        assert time.monotonic() - started >= 1.0


def test_a_request_that_the_endpoint_refuses_rejects_its_row_alone(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def picky(body: dict[str, Any], number: int) -> Any:
        return (
            (400, {}, b'{"error": {"message": "unsafe"}}')
            if "number 5 " in question(body)
            else good_answer(body, number)
        )

    with LoopbackServer(picky) as server:
        recipe = load_recipe(
            toy(train=8, test=4), [f"teacher.base_url={server.url}", "annotate.concurrency=1"]
        )
        result = annotate(recipe, out=tmp_path / "run")
    assert dict(result.splits["train"].rejected) == {"refused": 1}
    assert [row["id"] for row in read_rows(tmp_path / "run") if not row["accepted"]] == ["r5"]


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "key"), (403, "access"), (404, "no model"), (400, "every request")],
)
def test_permanent_failures_stop_at_once(
    toy: Callable[..., Path], tmp_path: Path, status: int, message: str
) -> None:
    with LoopbackServer(
        lambda body, number: (status, {}, b'{"error": {"message": "no"}}')
    ) as server:
        with pytest.raises(UserError, match=message):
            annotate(load_recipe(toy(), [f"teacher.base_url={server.url}"]), out=tmp_path / "run")
        assert server.requests <= 16
    assert not (tmp_path / "run" / "annotate" / "train.jsonl").exists()


def test_the_key_goes_out_as_bearer_and_nowhere_else(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-very-secret-123")
    echo = b'{"error": {"message": "Incorrect API key provided: sk-very-secret-123"}}'
    path = toy(train=4, test=4, teacher={"api_key_env": "MY_KEY"})
    with LoopbackServer(good_answer) as server:
        annotate(load_recipe(path, [f"teacher.base_url={server.url}"]), out=tmp_path / "run")
        assert set(server.keys) == {"Bearer sk-very-secret-123"}
    with (
        LoopbackServer(lambda body, number: (401, {}, echo)) as server,
        pytest.raises(UserError) as refused,
    ):
        annotate(load_recipe(path, [f"teacher.base_url={server.url}"]), out=tmp_path / "run")
    assert "sk-very-secret" not in str(refused.value) and "[key]" in str(refused.value)
    for file in (tmp_path / "run").rglob("*"):
        assert not file.is_file() or b"sk-very-secret" not in file.read_bytes(), file


def test_an_unreachable_teacher_ends_with_exit_code_1(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(DsbsError, match="does not answer") as error:
        annotate(load_recipe(toy(), ["teacher.max_attempts=2"]), out=tmp_path / "run")
    assert error.value.exit_code == 1


def test_rows_without_a_reply_are_marked_and_requested_again(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    broken = {"on": True}

    def half_broken(body: dict[str, Any], number: int) -> Any:
        if broken["on"] and "number 6 " in question(body):
            return 503, {}, b"{}"
        return good_answer(body, number)

    path = toy(train=8, test=4)
    with LoopbackServer(half_broken) as server:
        recipe = load_recipe(
            path,
            [f"teacher.base_url={server.url}", "teacher.max_attempts=2", "annotate.concurrency=1"],
        )
        first = annotate(recipe, out=tmp_path / "run")
        assert dict(first.splits["train"].rejected) == {"no-reply": 1}
        manifest = json.loads(
            (tmp_path / "run" / "annotate" / "manifest.json").read_text(encoding="utf-8")
        )
        assert manifest["status"] == "partial"
        broken["on"] = False
        sent = server.requests
        second = annotate(recipe, out=tmp_path / "run")
        assert server.requests == sent + 1 and second.splits["train"].accepted == 8


def test_the_majority_of_several_samples_wins(toy: Callable[..., Path], tmp_path: Path) -> None:
    answers: dict[str, int] = {}

    def wavering(body: dict[str, Any], number: int) -> str:
        answers[question(body)] = count = answers.get(question(body), 0) + 1
        return good_answer(body, number) if count != 2 else "Hm.\nAnswer: shipping"

    path = toy(train=6, test=4, annotate={"samples": 3, "temperature": 0.7, "concurrency": 1})
    with LoopbackServer(wavering) as server:
        result = annotate(
            load_recipe(path, [f"teacher.base_url={server.url}"]), out=tmp_path / "run"
        )
        assert server.requests == 25, "two that agree of three are not asked a third time"
        answers.clear()
        recipe = load_recipe(path, [f"teacher.base_url={server.url}", "annotate.stop_early=false"])
        annotate(recipe, out=tmp_path / "run")
        assert server.requests == 30, "the third ones only"
    assert (
        result.splits["train"].label_accuracy is not None
        and result.splits["train"].label_accuracy.value == 1.0
    )
    row = read_rows(tmp_path / "run")[0]
    assert row["vote_share"] == pytest.approx(2 / 3) and len(row["samples"]) == 3
    assert row["rationale"] == "The message is about an invoice."


def test_rows_with_equal_requests_share_one_reply(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(train=4, test=4)
    rows = "".join(f"d{i},My invoice is wrong.,billing\n" for i in range(20))
    (tmp_path / "train.csv").write_text("id,text,team\n" + rows, encoding="utf-8")
    with LoopbackServer(good_answer, latency_s=0.05) as server:
        result = annotate(
            load_recipe(path, [f"teacher.base_url={server.url}"]), out=tmp_path / "run"
        )
        assert server.requests == 1 + 4
    assert result.splits["train"].accepted == 20


def test_a_reasoning_models_text_is_kept_and_may_be_the_rationale(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def thinking(body: dict[str, Any], number: int) -> Any:
        spent = "number 1 " in question(body)
        reply = completion(
            "" if spent else good_answer(body, number), finish_reason="length" if spent else "stop"
        )
        reply["choices"][0]["message"]["reasoning_content"] = "Let me think about it."
        return 200, {}, json.dumps(reply).encode()

    path = toy(train=4, test=2)
    with LoopbackServer(thinking) as server:
        url = f"teacher.base_url={server.url}"
        annotate(load_recipe(path, [url, "annotate.max_tokens=256"]), out=tmp_path / "run")
        rows = read_rows(tmp_path / "run")
        assert [row["reject_reason"] for row in rows] == [None, "spent-on-reasoning", None, None]
        assert rows[0]["rationale"] == "The message is about an invoice."
        annotate(
            load_recipe(
                path, [url, "annotate.rationale_from=reasoning", "annotate.max_tokens=256"]
            ),
            out=tmp_path / "run",
        )
        assert read_rows(tmp_path / "run")[0]["rationale"] == "Let me think about it."
        assert server.requests == 6, "the same replies, read another way"
        annotate(load_recipe(path, [url, "annotate.max_tokens=512"]), out=tmp_path / "run")
        assert server.requests == 7, "only the row that was cut is asked again"


def test_completions_get_a_prompt_with_stops_and_extra_fields_come_last(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(
        train=2,
        test=2,
        teacher={"endpoint": "completions", "extra_body": {"temperature": None, "top_k": 1}},
    )
    with LoopbackServer(good_answer) as server:
        annotate(load_recipe(path, [f"teacher.base_url={server.url}"]), out=tmp_path / "run")
    body = server.bodies[0]
    assert body["prompt"].endswith("is wrong.") and body["stop"] == ["\nText:"]
    assert "temperature" not in body and body["top_k"] == 1 and "messages" not in body


def test_a_plan_sends_and_writes_nothing(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(train=6, test=4)
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}"])
        planned = plan(recipe, tmp_path / "run")
        assert (planned.rows, planned.requests, planned.cached) == (
            10,
            10,
            0,
        ) and "invoice number 0" in planned.first_prompt
        assert server.requests == 0 and not (tmp_path / "run").exists()
        annotate(recipe, out=tmp_path / "run")
        assert plan(recipe, tmp_path / "run").cached == 10


def test_a_second_process_learns_which_one_holds_the_run(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer) as server, lock_folder(tmp_path / "run" / "annotate"):
        with pytest.raises(DsbsError, match="in use by process"):
            annotate(load_recipe(toy(), [f"teacher.base_url={server.url}"]), out=tmp_path / "run")
        assert server.requests == 0


def test_recorded_and_human_teachers_send_nothing(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(train=2, test=2)
    rows = [
        {"id": f"r{i}", "completion": f"It is.\nAnswer: {('billing', 'shipping')[i % 2]}"}
        for i in (0, 1, 1000)
    ]
    (tmp_path / "said.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    result = annotate(
        load_recipe(path, ["teacher={kind: recorded, completions: said.jsonl}"]),
        out=tmp_path / "run",
    )
    assert result.splits["train"].accepted == 2 and dict(result.splits["test"].rejected) == {
        "no-reply": 1
    }
    (tmp_path / "train.csv").write_text(
        "id,text,team,rationale\n1,My invoice.,billing,An invoice.\n2,My parcel.,shipping,\n",
        encoding="utf-8",
    )
    result = annotate(
        load_recipe(path, ["teacher={kind: human}", "annotate.splits=train"]),
        out=tmp_path / "human",
    )
    first, second = read_rows(tmp_path / "human")
    assert (
        first["rationale"] == "An invoice."
        and first["provenance"] == "human"
        and not second["accepted"]
    )
