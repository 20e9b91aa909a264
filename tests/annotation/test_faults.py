"""Errors and finish reasons of providers, and whose fault each of them is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer
from loopback import LoopbackServer, completion, question, read_rows

from dsbs import DsbsError, PartialError, UserError, annotate, load_recipe
from dsbs.annotation import endpoint_pool, requester
from dsbs.annotation.annotator import ContextCheck
from dsbs.annotation.backends import (
    RejectedError,
    Reply,
    Request,
    TransientError,
)
from dsbs.annotation.backends.faults import (
    FAULTS,
    FINISH_REASONS,
    Blame,
    classify,
    ending,
    error_body,
    plain_ending,
)
from dsbs.annotation.backends.openai import OpenAIEndpoint
from dsbs.annotation.endpoint_pool import EndpointPool, StopSignal
from dsbs.annotation.store import ReplyStore, RequestKeys
from dsbs.config import EndpointSection, TeacherSection
from dsbs.progress import NoProgress


def error(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


@pytest.mark.parametrize(
    ("status", "body", "blame"),
    [
        # https://github.com/anthropics/claude-code/issues/66314
        (400, error("Your credit balance is too low to access the Anthropic API."), "account"),
        # https://github.com/anthropics/claude-code/issues/38035
        (400, error("You have reached your specified API usage limits."), "account"),
        # https://docs.fireworks.ai/guides/inference-error-codes
        (412, error("Account acme is suspended", code="PRECONDITION_FAILED"), "account"),
        # https://learn.microsoft.com/microsoft-cloud/dev/dev-proxy/concepts/openai-insufficient-quota
        (429, error("No credits", type="insufficient_quota", code="x"), "account"),
        (429, error("Inactive", code="billing_not_active"), "account"),
        # https://api-docs.deepseek.com/quick_start/error_codes
        (402, error("Insufficient Balance"), "account"),
        # https://github.com/continuedev/continue/issues/10373, a bare text
        (
            429,
            "Your team x has either used all available credits or reached its monthly",
            "account",
        ),
        # https://github.com/Wei-Shaw/sub2api/issues/4069
        (403, {"code": "c", "error": "You have run out of credits"}, "account"),
        # https://www.mintlify.com/BerriAI/litellm/proxy/budget-alerts
        (400, error("ExceededBudget: over", type="budget_exceeded"), "account"),
        # https://help.aliyun.com/en/model-studio/error-code
        (
            400,
            error("Access denied, please make sure your account is in good standing."),
            "account",
        ),
        # https://forum.moonshot.ai/t/api-billing-behaviour/111
        (429, error("suspended", type="exceeded_current_quota_error"), "account"),
        # https://ai.google.dev/gemini-api/docs/troubleshooting; Gemini sends a list
        (400, [error("Free tier is not available", status="FAILED_PRECONDITION")], "account"),
        # https://learn.microsoft.com/en-us/answers/questions/2285577
        (400, error("number of enqueued tokens", code="token_limit_exceeded"), "account"),
        # https://www.developersdigest.tech/errors/api/openrouter/402-in-flight-budget-exhausted
        (
            402,
            error("busy", code=402, metadata={"limit_source": "openrouter_in_flight_budget"}),
            "throttled",
        ),
        # https://github.com/theopenco/llmgateway/pull/1785
        (403, error("Content violates usage guidelines. Failed check: X", code=403), "content"),
        # https://openrouter.ai/docs/api/reference/errors-and-debugging
        (403, error("Denied", code=403, metadata={"flagged_input": "my balance"}), "content"),
        # https://learn.microsoft.com/azure/ai-services/openai/concepts/content-filter
        (400, error("The response was filtered", code="content_filter"), "content"),
        (
            400,
            error("No", code="x", innererror={"code": "ResponsibleAIPolicyViolation"}),
            "content",
        ),
        # https://github.com/alan-turing-institute/t0-1/issues/69
        (400, error("Invalid prompt: your prompt was flagged", code="invalid_prompt"), "content"),
        # https://github.com/vllm-project/vllm/pull/24995
        (400, {"object": "error", "message": "maximum context length is 9", "code": 400}, "row"),
        # https://github.com/DrShushen/climb/issues/13
        (429, error("Request too large for m on tokens per min (TPM)", code="x"), "row"),
        (413, error("Request Entity Too Large", code="request_too_large"), "row"),
        (403, "<!DOCTYPE html><html><body>Sorry, you have been blocked</body></html>", "unclear"),
        (400, error("something new"), "unclear"),
        (422, {"detail": [{"loc": ["body", "stop"], "msg": "bad"}]}, "parameter"),
        # https://github.com/microsoft/clarity-agent/issues/59
        (400, error("Unsupported", code="unsupported_parameter", param="max_tokens"), "parameter"),
        (401, error("Incorrect API key provided"), "recipe"),
        (400, error("API key not valid.", status="INVALID_ARGUMENT"), "recipe"),
        (403, error("You lack permission"), "recipe"),
        (404, error("no such path"), "recipe"),
        (308, "", "recipe"),
        (429, error("Rate limit reached", code="rate_limit_exceeded"), "throttled"),
        # https://console.groq.com/docs/flex-processing
        (498, error("capacity_exceeded"), "endpoint"),
        # https://docs.claude.com/en/api/errors
        (529, error("Overloaded", type="overloaded_error"), "endpoint"),
        (502, "<html><title>Bad gateway</title></html>", "endpoint"),
        (None, error("upstream failed"), "endpoint"),
        (None, error("Insufficient Balance"), "account"),
        (None, {"base_resp": {"status_code": 1008, "status_msg": "no money"}}, "account"),
    ],
)
def test_whose_fault_an_error_is(status: int | None, body: object, blame: Blame) -> None:
    raw = body if isinstance(body, str) else json.dumps(body)
    assert classify(status, error_body(raw)) == blame


def test_every_line_of_the_tables_has_a_source_and_is_reachable() -> None:
    assert all(fault.source.startswith("https://") and fault.providers for fault in FAULTS)
    for reason, (how, provider, source) in FINISH_REASONS.items():
        assert provider and source.startswith("https://")
        spelled = reason.upper().replace("_", "-")
        assert ending(reason) == ending(spelled) == ending(f"FinishReason.{reason.upper()}") == how
    assert plain_ending("MAX_TOKENS") == "length" and plain_ending("SAFETY") == "content_filter"
    assert ending("brand_new") is None and ending(None) is None and plain_ending("new") == "new"


def endpoint() -> OpenAIEndpoint:
    section = EndpointSection(base_url="http://127.0.0.1:9/v1")
    return OpenAIEndpoint(TeacherSection(model="m"), section, "sk-secret", "e#chat")


def reading(body: object) -> Reply | Exception:
    raw = body if isinstance(body, str) else json.dumps(body)
    try:
        return endpoint().read_reply(raw, {})
    except (TransientError, RejectedError, DsbsError) as failure:
        return failure


def with_content(content: object, usage: object, **choice: Any) -> dict[str, Any]:
    body = completion("") | {"usage": usage}
    body["choices"][0] |= {"message": {"role": "assistant", "content": content}, **choice}
    return body


BILL = {"prompt_tokens": 12, "completion_tokens": 5}
NOTHING = {"prompt_tokens": 0, "completion_tokens": 0}


@pytest.mark.parametrize(
    ("body", "kind", "is_billed"),
    [
        (error("over capacity", code=502), "server error", False),
        ([error("over capacity", code=503)], "server error", False),
        (error("slow down", code=429), "throttled", False),
        (error("upstream failed") | {"usage": BILL}, "server error", True),
        (with_content("The N", BILL, error={"message": "died", "code": 502}), "server error", True),
        (with_content("The N", BILL, finish_reason="ERROR"), "broken off", True),
        (with_content("The N", NOTHING, finish_reason="abort"), "broken off", False),
        (with_content("", NOTHING, finish_reason="load"), "broken off", False),
        ({"choices": [], "usage": BILL}, "empty", True),
        ({"choices": [{"index": 0}], "usage": BILL}, "empty", True),
        (with_content(None, BILL), "empty", True),
        (with_content(None, NOTHING), "empty", False),
        (with_content("", NOTHING), "empty", False),
        ({"id": "x"}, "unreadable", False),
        ('{"choices": [{"mess', "unreadable", False),
        ("<html><title>Sign in</title></html>", "unreadable", False),
        ('data: {"choices": [{"delta": {"content": "The N"}}]}', "broken off", False),
    ],
)
def test_a_200_without_an_answer_is_a_failure_and_its_tokens_count(
    body: object, kind: str, is_billed: bool
) -> None:
    outcome = reading(body)
    if is_billed:
        assert isinstance(outcome, Reply) and outcome.prompt_tokens == 12 and outcome.raw != "{}"
        outcome = outcome.failure or outcome
    assert isinstance(outcome, TransientError) and outcome.kind == kind, outcome


def test_a_200_that_is_cut_filtered_or_empty_is_an_answer() -> None:
    for body, reason in (
        (with_content(None, BILL, finish_reason="MAX_TOKENS"), "length"),
        (with_content(None, BILL, finish_reason="guardrail_intervened"), "content_filter"),
        (with_content("", BILL), "stop"),
        (with_content("x", None, finish_reason="brand_new"), "brand_new"),
    ):
        outcome = reading(body)
        assert isinstance(outcome, Reply) and outcome.failure is None
        assert outcome.finish_reason == reason


def test_an_event_stream_that_nobody_asked_for_is_put_together() -> None:
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "reasoning_content": "hm"}}]},
        {"choices": [{"delta": {"content": "The "}}]},
        {"choices": [{"delta": {"content": "Nile"}, "finish_reason": "stop"}]},
        {"choices": [], "usage": BILL},
    ]
    lines = [": ping", *(f"data: {json.dumps(chunk)}" for chunk in chunks), "data: [DONE]"]
    outcome = reading("\r\n\r\n".join(lines))
    assert isinstance(outcome, Reply) and outcome.failure is None
    assert (outcome.text, outcome.reasoning, outcome.finish_reason) == ("The Nile", "hm", "stop")
    assert outcome.completion_tokens == 5 and outcome.raw.startswith(": ping")


def test_reasoning_tokens_that_are_counted_beside_the_others_are_billed() -> None:
    folder = BILL | {"total_tokens": 47, "completion_tokens_details": {"reasoning_tokens": 30}}
    among = folder | {"total_tokens": 17, "completion_tokens_details": {"reasoning_tokens": 4}}
    for usage, tokens in ((folder, 35), (among, 5)):
        outcome = reading(with_content("x", usage))
        assert isinstance(outcome, Reply) and outcome.completion_tokens == tokens


def test_an_error_shows_the_providers_words_without_the_key() -> None:
    outcome = reading(error("bad key sk-secret", code=401))
    assert isinstance(outcome, UserError) and "[key]" in str(outcome)
    outcome = reading(error("Insufficient Balance sk-secret"))
    assert isinstance(outcome, PartialError) and "sk-secret" not in str(outcome)


def test_stored_replies_of_earlier_versions_are_read_by_the_same_table(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path / "replies.sqlite")
    keys = RequestKeys(["k"], [])
    store.put("k", 10, "e", "m", 0, Reply("The Th", "insufficient_system_resource", 3, 4))
    stored = store.look_up(keys, 10)
    assert stored.reply is None and [reply.completion_tokens for reply in stored.wasted] == [4]
    store.put("k", 10, "e", "m", 0, Reply("The Thames", "STOP", 3, 5))
    stored = store.look_up(keys, 10)
    assert stored.reply is not None and stored.reply.text == "The Thames"
    assert [reply.completion_tokens for reply in stored.wasted] == [4], "it stays on the bill"
    store.put("z", 10, "e", "m", 0, Reply("", "stop", 0, 0))
    assert store.look_up(RequestKeys(["z"], []), 10).reply is None
    store.put("c", 10, "e", "m", 0, Reply("cut", "model_length"))
    assert store.look_up(RequestKeys(["c"], []), 20).reply is None
    reply = store.look_up(RequestKeys(["c"], []), 10).reply
    assert reply is not None and reply.finish_reason == "length"
    store.refuse("a", "HTTP 400: Your credit balance is too low")
    store.refuse("r", "HTTP 400: unsafe")
    assert store.refusal(["a"]) is None and store.refusal(["r"]) == "HTTP 400: unsafe"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_pool, "FIRST_WAIT_S", 0.001)


def number(body: dict[str, Any]) -> int:
    return int(question(body).partition("number ")[2].split()[0])


def test_a_hundred_flagged_rows_before_the_first_answer_cost_these_rows_alone(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requester, "FLAGGED_BEFORE_STOP", 10)
    path = toy(train=40, test=4)
    for message in ("flagged by our filter", "words that are in no table"):

        def picky(body: dict[str, Any], _number: int, message: str = message) -> Any:
            if number(body) < 20:
                return 400, {}, json.dumps(error(message)).encode()
            return good_answer(body, 0)

        out = tmp_path / message.split()[0]
        with LoopbackServer(picky) as server:
            changes = [f"teacher.base_url={server.url}", "annotate.concurrency=1"]
            result = annotate(load_recipe(path, changes), out=out)
        assert result.splits["train"].accepted == 20
        assert result.splits["train"].rejected == {"refused": 20}
        assert read_rows(out)[3]["reject_detail"] == f"HTTP 400: {message}"


def test_the_same_unclear_refusal_sixteen_times_stops_the_run_and_is_not_kept(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    is_paid = {"on": False}

    def dry(body: dict[str, Any], sent: int) -> Any:
        if sent > 6 and not is_paid["on"]:
            return 400, {}, json.dumps(error(f"Order {sent}: the purse holds nothing")).encode()
        return good_answer(body, 0)

    with LoopbackServer(dry) as server:
        changes = [f"teacher.base_url={server.url}", "annotate.concurrency=1"]
        recipe = load_recipe(toy(train=40, test=4), changes)
        with pytest.raises(PartialError, match="purse"):
            annotate(recipe, out=tmp_path / "run")
        assert server.requests == 6 + 16 + 1, "one that was answered before is asked once more"
        rows = read_rows(tmp_path / "run")
        assert {row["reject_reason"] for row in rows} == {None, "no-reply"}
        assert "purse" in rows[6]["reject_detail"]
        is_paid["on"] = True
        assert annotate(recipe, out=tmp_path / "run").splits["train"].accepted == 40


def test_a_row_that_always_crashes_the_server_does_not_end_a_run_that_begins_with_it(
    toy: Callable[..., Path], tmp_path: Path, quick: None
) -> None:
    def crashing(body: dict[str, Any], _number: int) -> Any:
        return (500, {}, b"{}") if number(body) == 0 else good_answer(body, 0)

    with LoopbackServer(crashing) as server:
        changes = [f"teacher.base_url={server.url}", "annotate.concurrency=1"]
        recipe = load_recipe(toy(train=8, test=4), [*changes, "teacher.max_attempts=2"])
        train = annotate(recipe, out=tmp_path / "run").splits["train"]
    assert train.accepted == 7 and train.rejected == {"no-reply": 1} and not train.cached


def test_only_empty_replies_that_cost_end_the_run_and_nobody_says_nothing_was_bought(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    empty = json.dumps({"choices": [], "usage": {"prompt_tokens": 10, "completion_tokens": 90}})
    price = 'teacher.price={"input": 0, "output": 1000}'
    with LoopbackServer(lambda body, sent: (200, {}, empty.encode())) as server:
        changes = [f"teacher.base_url={server.url}", "annotate.concurrency=1", price]
        changes.append("annotate.max_tokens=100")
        path = toy(train=40, test=4)
        with pytest.raises(PartialError, match="16 replies were empty") as error:
            annotate(load_recipe(path, changes), out=tmp_path / "run")
        assert server.requests == 32 and "nothing was bought" not in str(error.value)
        rows = read_rows(tmp_path / "run")
        assert sum(row["usd"] for row in rows) == pytest.approx(32 * 0.09)
        assert rows[0]["usage"]["completion_tokens"] == 180
        with pytest.raises(PartialError, match=r"max_usd: \$2.88 spent"):
            annotate(load_recipe(path, [*changes, "annotate.max_usd=2.9"]), out=tmp_path / "run")
        assert server.requests == 32


def test_the_summary_says_why_rows_failed_and_what_helps(
    toy: Callable[..., Path], tmp_path: Path, quick: None
) -> None:
    class Said(NoProgress):
        lines: list[str] = []

        def say(self, text: str) -> None:
            self.lines.append(text)

    def answer(body: dict[str, Any], _number: int) -> Any:
        if number(body) == 5:
            return 500, {}, json.dumps(error("CUDA out of memory")).encode()
        if number(body) in (3, 4):
            message = f"This model's maximum context length is 8192, not {9000 + number(body)}"
            return 400, {}, json.dumps(error(message)).encode()
        text = f"Answer: {'billing' if 'invoice' in question(body) else 'shipping'}\nBecause it is."
        return 200, {}, json.dumps(completion(text, finish_reason="tired")).encode()

    with LoopbackServer(answer) as server:
        changes = [f"teacher.base_url={server.url}", "teacher.max_attempts=2"]
        recipe = load_recipe(toy(train=8, test=4), changes)
        result = annotate(recipe, out=tmp_path / "run", progress=Said())
    said = "\n".join(Said.lines)
    assert "2 rows refused: HTTP 400: This model's maximum context length" in said
    assert "--retry-refused" in said and "1 row no-reply: HTTP 500: CUDA out of memory" in said
    assert "5 of 5 accepted rows without a rationale" in said
    assert said.count("tired 9") == 1
    train = result.as_json()["splits"]["train"]
    assert [detail["rows"] for detail in train["reject_details"]] == [2, 1]
    assert train["unknown_finish_reasons"] == {"tired": 5} and train["usd"] is None


def test_prompts_that_the_server_cuts_are_noticed_once() -> None:
    def body(characters: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": "x" * characters}]}

    whole = ContextCheck()
    for characters in range(1000, 40_000, 500):
        whole.add(body(characters), Reply("", prompt_tokens=characters // 4))
    assert whole.warning() is None
    far_below = ContextCheck()
    far_below.add(body(68_000), Reply("", prompt_tokens=2050))
    assert "2,050 prompt tokens" in str(far_below.warning()) and far_below.warning() is None
    same = ContextCheck()
    for characters in (1000, 9000, 12_000, 15_000):
        same.add(body(characters), Reply("", prompt_tokens=min(characters // 4, 2050)))
    assert "each of 3 prompts" in str(same.warning())


def test_nothing_but_429s_says_what_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_pool, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(endpoint_pool, "NOTICE_AFTER_S", 0.0)
    said: list[str] = []
    sent = 0

    class Throttled:
        identity = name = "http://slow"
        weight = 1.0
        rpm = tpm = None

        async def complete(self, request: Request) -> Reply:
            nonlocal sent
            sent += 1
            if sent < 8:  # a date in the past reads as 0 as well
                raise TransientError("HTTP 429: slow down", "throttled", 0.0)
            return Reply("fine")

    async def run() -> None:
        pool = EndpointPool([Throttled()], 1, StopSignal(), said.append)  # type: ignore[list-item]
        await pool.deliver(Request({}, 0), 1, attempts=6)
        assert pool.states[0]._throttles == 0

    asyncio.run(run())
    assert len(said) == 1 and "slow down" in said[0] and "http://slow" in said[0]
