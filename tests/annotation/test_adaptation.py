"""Parameters that an endpoint refuses are renamed or left out, once for a run.

Each refusal is one that was reported; its address is beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from batch_server import BatchServer
from conftest import good_answer
from hypothesis import given
from hypothesis import strategies as st
from loopback import LoopbackServer, Scripted, completion, question, read_rows

from dsbs import annotate, load_recipe
from dsbs.annotation.backends.adaptation import (
    Adaptation,
    Change,
    reasoning_fields,
    refused,
)
from dsbs.annotation.planning import pilot, plan
from dsbs.progress import NoProgress

MESSAGES = [
    {"role": "system", "content": "Route it."},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]
BODY: dict[str, Any] = {
    "model": "m",
    "messages": MESSAGES,
    "max_tokens": 500,
    "temperature": 0.0,
    "stop": ["\n\n"],
    "logprobs": True,
    "top_logprobs": 2,
    "n": 1,
    "seed": 1,
    "top_p": 0.9,
    "response_format": {"type": "json_schema", "json_schema": {}},
    "reasoning_effort": "low",
}
FOLDED = Change("system", "user")
RENAMED = Change("max_tokens", "max_completion_tokens")


def error(message: Any, param: str | None = None, code: Any = None) -> dict[str, Any]:
    body = {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    return {"error": body}


REFUSALS: dict[str, tuple[int, Any, list[Change]]] = {
    "https://github.com/griptape-ai/ComfyUI-Griptape/issues/312": (
        400,
        error(
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            "max_tokens",
            "unsupported_parameter",
        ),
        [RENAMED],
    ),
    "https://github.com/openai/openai-python/issues/1724": (
        400,
        error("Unrecognized request argument supplied: max_tokens"),
        [RENAMED],
    ),
    "https://github.com/johny-b/llmcomp/issues/69": (
        400,
        error(
            "Unsupported value: 'temperature' does not support 0 with this model. Only the default "
            "(1) value is supported.",
            "temperature",
            "unsupported_value",
        ),
        [Change("temperature")],
    ),
    "https://github.com/The-PR-Agent/pr-agent/issues/2456": (
        400,
        error("`temperature` is deprecated for this model."),
        [Change("temperature")],
    ),
    "https://github.com/SalesforceAIResearch/MCP-Universe/issues/49": (
        400,
        error("`temperature` and `top_p` cannot both be specified for this model."),
        [Change("top_p")],
    ),
    "https://github.com/BerriAI/litellm/issues/39829": (
        400,
        error(
            'litellm.BadRequestError: BedrockException - {"message":"This model doesn\'t support '
            'the temperature field. Remove temperature and try again."}'
        ),
        [Change("temperature")],
    ),
    "https://github.com/BerriAI/litellm/issues/13327": (
        400,
        error(
            'litellm.BadRequestError: AzureException BadRequestError - {\n "error": {\n "message": '
            '"Unsupported parameter: \'temperature\' is not supported with this model.",\n "param":'
            ' "temperature",\n "code": null\n }\n}. Received Model Group=azure/o3-mini'
        ),
        [Change("temperature")],
    ),
    "https://github.com/SWE-bench/SWE-smith/pull/155": (
        400,
        error("gpt-5 models don't support temperature=0. Only temperature=1 is supported."),
        [Change("temperature")],
    ),
    "https://github.com/BerriAI/litellm/issues/12635": (
        400,
        {
            "code": "Client specified an invalid argument",
            "error": "Argument not supported on this model: stop",
        },
        [Change("stop")],
    ),
    "https://github.com/miaoxworld/NativeTavern/issues/83": (
        400,
        {"error": "Model grok-4.6 does not support parameter stop."},
        [Change("stop")],
    ),
    "https://github.com/groq/groq-python/issues/25": (
        400,
        error("`logprobs` is not supported with this model"),
        [Change("logprobs"), Change("top_logprobs")],
    ),
    "https://github.com/confident-ai/deepeval/pull/2184": (
        403,
        error("You are not allowed to request logprobs from this model"),
        [Change("logprobs"), Change("top_logprobs")],
    ),
    "https://github.com/vllm-project/vllm-gaudi/pull/1098": (
        400,
        error("Gaudi doesn't support logprobs. Please remove 'logprobs'/'top_logprobs' from your "
              "request to receive a response.", code=400),
        [Change("logprobs"), Change("top_logprobs")],
    ),
    "https://github.com/crewAIInc/crewAI/issues/60": (
        422,
        {
            "object": "error",
            "message": {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "n"],
                        "msg": "Extra inputs are not permitted",
                        "input": {"temperature": 0},
                        "url": "https://errors.pydantic.dev/2.6/v/extra_forbidden",
                    }
                ]
            },
            "type": "invalid_request_error",
        },
        [Change("n")],
    ),
    "https://github.com/SuzumiyaAkizuki/ComfyUI-NewBie-LLM-Formatter/issues/3": (
        400,
        [
            {
                "error": {
                    "code": 400,
                    "message": 'Invalid JSON payload received. Unknown name "seed": Cannot find '
                    'field.\nInvalid JSON payload received. Unknown name "logprobs": Cannot find '
                    "field.",
                    "status": "INVALID_ARGUMENT",
                }
            }
        ],
        [Change("logprobs"), Change("top_logprobs"), Change("seed")],
    ),
    "https://github.com/tailcallhq/forgecode/issues/1177": (
        400,
        error(
            "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
            "messages[0].role",
            "unsupported_value",
        ),
        [FOLDED],
    ),
    "https://github.com/anthropics/claude-code/issues/61412": (
        400,
        error("role 'system' is not supported on this model"),
        [FOLDED],
    ),
    "vLLM with Gemma's chat template": (
        400,
        {"object": "error", "message": "System role not supported", "code": 400},
        [FOLDED],
    ),
    "https://github.com/microsoft/autogen/issues/1037": (
        400,
        {
            "object": "error",
            "message": "Conversation roles must alternate user/assistant/user/assistant/...",
        },
        [FOLDED],
    ),
    "https://github.com/withcatai/node-llama-cpp/issues/263": (
        500,
        error("Only user and assistant roles are supported!", code=500),
        [FOLDED],
    ),
    "https://github.com/llm-exe/llm-exe/issues/662": (
        400,
        error("This response_format type is unavailable now", code="invalid_request_error"),
        [Change("response_format", "json_object")],
    ),
    "https://github.com/BerriAI/litellm/issues/7580": (
        422,
        error("Failed to deserialize the JSON body into the target type: response_format: "
              "response_format.type `json_schema` is unavailable now at line 1 column 1193"),
        [Change("response_format", "json_object")],
    ),
    "https://github.com/dzhng/deep-research/issues/127": (
        400,
        error("'response_format.type' : value is not one of the allowed values "
              "['text','json_object']"),
        [Change("response_format", "json_object")],
    ),
    "https://github.com/iamsrikanthnani/pluely/issues/242": (
        400,
        error("`reasoning_effort` is not supported with this model"),
        [Change("reasoning_effort")],
    ),
}  # fmt: skip

OTHERS: dict[str, tuple[int, Any]] = {
    # a level that the model does not have is the recipe's mistake
    "https://github.com/kaitranntt/ccs/issues/344": (
        400,
        error(
            "Unsupported value: 'reasoning_effort' does not support 'xhigh' with this model. "
            "Supported values are: 'minimal', 'low', 'medium', and 'high'."
        ),
    ),
    # the recipe's own limit
    "https://github.com/deepseek-ai/DeepSeek-V3/issues/69": (
        400,
        error("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]"),
    ),
    "https://platform.openai.com/docs/guides/error-codes": (
        400,
        error("Invalid 'temperature': decimal above maximum value. Expected <= 2.", "temperature"),
    ),
    # one row
    "https://learn.microsoft.com/azure/ai-services/openai/concepts/content-filter": (
        400,
        error("The response was filtered due to the prompt triggering content management policy. "
              "Please modify your prompt and stop.", "prompt", "content_filter"),
    ),
    "https://github.com/vllm-project/vllm/issues/20409": (
        400,
        error("This model's maximum context length is 16 tokens. However, you requested 122946 "
              "tokens (112946 in the messages, 500 in the completion)."),
    ),
    "a row that is quoted": (400, error("unsupported language: the parcel will not stop")),
    "a server's fault": (500, error("unsupported operation on temperature")),
    "no JSON": (400, "<html>not supported</html>"),
}  # fmt: skip


@pytest.mark.parametrize("source", REFUSALS)
def test_a_refusal_names_the_parameter(source: str) -> None:
    status, body, changes = REFUSALS[source]
    assert refused(status, json.dumps(body).encode(), BODY) == changes


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("stop: Extra inputs are not permitted", Change("stop")),
        ("invalid temperature: only 1 is allowed for this model", Change("temperature")),
        ("This model only supports temperature=1", Change("temperature")),
        ("`temperature` may only be set to 1 when thinking is enabled", Change("temperature")),
        ("'stop' must not be set for reasoning models", Change("stop")),
        ("seed is not a valid parameter", Change("seed")),
        ("This model does not support system messages", FOLDED),
        ("'system' is not one of ['user', 'assistant']", FOLDED),
        ("messages: roles must be 'user' or 'assistant'", FOLDED),
        ("Invalid role: system", FOLDED),
        ("Unsupported role 'system'. Use 'developer' instead.", Change("system", "developer")),
    ],
)
def test_other_wordings_are_understood(message: str, change: Change) -> None:
    assert refused(400, json.dumps(error(message)).encode(), BODY) == [change]


@pytest.mark.parametrize("source", OTHERS)
def test_an_error_about_something_else_changes_nothing(source: str) -> None:
    status, body = OTHERS[source]
    assert refused(status, json.dumps(body).encode(), BODY) == []


@pytest.mark.parametrize(
    "message",
    [
        # https://github.com/deepseek-ai/DeepSeek-V3/issues/69
        "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]",
        # https://github.com/vllm-project/vllm/issues/42474
        "This model's maximum context length is 8192 tokens. However, you requested 16384 output "
        "tokens and your prompt contains at least 66 input tokens.",
        # https://console.groq.com/docs/errors
        "`max_tokens` must be less than or equal to `8192`, the maximum value for `max_tokens`",
    ],
)
def test_the_default_limit_is_left_to_an_endpoint_that_allows_fewer(message: str) -> None:
    changes = refused(400, json.dumps(error(message)).encode(), BODY | {"max_tokens": 16_384})
    assert changes == [Change("max_tokens")]


def test_a_parameter_with_two_unknown_names_is_left_out() -> None:
    adaptation = Adaptation()
    body: dict[str, Any] = {"model": "m", "max_tokens": 5}
    for name in ("max_tokens", "max_completion_tokens"):
        refusal = json.dumps(error(f"Unknown parameter: '{name}'.", name)).encode()
        assert adaptation.learn(400, refusal, adaptation.apply(body), body)
    assert adaptation.apply(body) == {"model": "m"}
    assert adaptation.forms(body)[1:] == [{"model": "m", "max_completion_tokens": 5}, body]


def test_the_instruction_moves_into_the_first_users_turn() -> None:
    body = {"model": "m", "messages": MESSAGES}
    folded = [{"role": "user", "content": "Route it.\n\na"}, *MESSAGES[2:]]
    assert FOLDED.apply(body)["messages"] == folded
    developer = Change("system", "developer").apply(body)
    assert developer["messages"] == [{"role": "developer", "content": "Route it."}, *MESSAGES[1:]]
    assert Change("developer", "user").apply(developer)["messages"] == folded


names = st.sampled_from([*BODY, "system", "developer", "max_completion_tokens"])
changes = st.lists(st.builds(Change, names, st.none()), max_size=4)


@given(changes)
def test_a_form_never_loses_what_a_request_cannot_do_without(learned: list[Change]) -> None:
    learned = [change for change in learned if change.name not in ("model", "messages")]
    adaptation = Adaptation(tuple(learned))
    forms = adaptation.forms(BODY)
    assert forms[0] == adaptation.apply(BODY)
    assert forms[-1] is BODY
    for form in forms:
        assert "Route it." in form["messages"][0]["content"]
        assert form["model"] == "m"


def test_reasoning_effort_goes_to_a_provider_as_it_takes_it() -> None:
    assert reasoning_fields("low", "https://api.openai.com/v1") == {"reasoning_effort": "low"}
    assert reasoning_fields("none", "https://api.deepseek.com")["thinking"] == {"type": "disabled"}
    claude = reasoning_fields("low", "https://api.anthropic.com/v1")
    assert claude["thinking"]["type"] == "enabled"
    assert reasoning_fields("high", "https://openrouter.ai/api/v1") == {
        "reasoning": {"effort": "high"}
    }
    assert reasoning_fields(None, "https://api.openai.com/v1") == {}


# --- a run


class Said(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def strict(body: dict[str, Any], number: int) -> str | Scripted:
    """A reasoning model that refuses one thing after the other."""
    refusals = {
        "max_tokens": "https://github.com/griptape-ai/ComfyUI-Griptape/issues/312",
        "temperature": "https://github.com/johny-b/llmcomp/issues/69",
        "stop": "https://github.com/BerriAI/litellm/issues/12635",
        "logprobs": "https://github.com/groq/groq-python/issues/25",
        "system": "https://github.com/tailcallhq/forgecode/issues/1177",
    }
    for name, source in refusals.items():
        if name in body or (name == "system" and body["messages"][0]["role"] == name):
            status, refusal, _ = REFUSALS[source]
            return status, {}, json.dumps(refusal).encode()
    return good_answer(body, number)


def test_a_reasoning_model_needs_no_extra_body(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(train=20, test=4, annotate={"logprobs": True, "concurrency": 4})
    said = Said()
    with LoopbackServer(strict) as server:
        settings = [f"teacher.base_url={server.url}", "teacher.extra_body={stop: ['###']}"]
        recipe = load_recipe(path, settings)
        run = tmp_path / "run"
        result = annotate(recipe, out=run, progress=said)
        assert result.splits["train"].accepted == 20
        sent = server.bodies[-1]
        assert set(sent) == {"model", "messages", "max_completion_tokens"}
        assert server.requests <= 24 + 5 * 4, "each request in flight learns at most once"
        told = [line for line in said.lines if "does not take" in line]
        assert len(told) == 5, told
        manifest = json.loads((run / "annotate/manifest.json").read_text(encoding="utf-8"))
        (changes,) = manifest["adaptations"].values()
        assert "max_tokens is sent as max_completion_tokens" in changes
        # a later command begins with the adapted form, and finds its replies
        before = server.requests
        again = annotate(recipe, out=run)
        assert (server.requests, again.splits["train"].cached) == (before, 20)
        assert plan(recipe, run).cached == 24
        annotate(load_recipe(path, [*settings, "teacher.extra_body={}"]), out=run)
        assert server.requests == before, "what was refused makes no other request"
        assert read_rows(run)[0]["accepted"]


def test_replies_from_before_a_refusal_are_not_bought_again(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    refuses = False

    def changing(body: dict[str, Any], number: int) -> str | Scripted:
        return strict(body, number) if refuses else good_answer(body, number)

    path = toy(train=8, test=4)
    with LoopbackServer(changing) as server:
        url = f"teacher.base_url={server.url}"
        annotate(load_recipe(path, [url]), out=tmp_path / "run")
        refuses = True
        added = "\n".join(f"new{i},A late parcel number {i}0,shipping" for i in range(4))
        with (path.parent / "train.csv").open("a", encoding="utf-8") as file:
            file.write(added + "\n")
        bought = sum(server.received.values())
        result = annotate(load_recipe(path, [url, "annotate.concurrency=1"]), out=tmp_path / "run")
        assert result.splits["train"].accepted == 12
        assert server.requests == bought + 4 + 3
        annotate(load_recipe(path, [url]), out=tmp_path / "run")
        assert server.requests == bought + 4 + 3


def test_a_pilot_says_what_to_set_where_rows_were_spent_on_reasoning(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def thinking(body: dict[str, Any], number: int) -> str | Scripted:
        if body["max_tokens"] > 2000:
            return good_answer(body, number)
        reply = completion("", finish_reason="length")
        reply["choices"][0]["message"]["reasoning"] = "Hm."
        return 200, {}, json.dumps(reply).encode()

    path = toy(train=8, test=4)
    said = Said()
    with LoopbackServer(thinking) as server:
        url = f"teacher.base_url={server.url}"
        pilot(load_recipe(path, [url, "annotate.max_tokens=256"]), 4, out=tmp_path, progress=said)
        assert any("set annotate.max_tokens: null" in line for line in said.lines)
        result = annotate(load_recipe(path, [url]), out=tmp_path)
    assert result.splits["train"].accepted == 8, "the default is not spent on reasoning"


def test_a_plan_without_a_limit_estimates_the_likely_cost(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    price = "teacher.price={input: 0, output: 1000}"
    with LoopbackServer(good_answer) as server:
        settings = [f"teacher.base_url={server.url}", price]
        path = toy(train=4, test=2)
        first = plan(load_recipe(path, settings), tmp_path / "run")
        assert first.usd == pytest.approx(6 * 16.384)
        assert first.likely_usd == pytest.approx(6 * 0.8)
        annotate(load_recipe(path, [*settings, "annotate.splits=[train]"]), out=tmp_path / "run")
        second = plan(load_recipe(path, settings), tmp_path / "run")
        assert (second.requests, second.tokens_per_reply) == (2, 7)
        assert question(server.bodies[0])


def test_a_refusal_inside_a_200_is_taken_at_its_word(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def answer(body: dict[str, Any], number: int) -> str | Scripted:
        if "temperature" in body:
            refusal = error("`temperature` is deprecated for this model.", code=400)
            return 200, {}, json.dumps(refusal).encode()
        return good_answer(body, number)

    with LoopbackServer(answer) as server:
        path = toy(train=3, test=1, annotate={"concurrency": 1})
        result = annotate(
            load_recipe(path, [f"teacher.base_url={server.url}"]), out=tmp_path / "run"
        )
        assert (result.splits["train"].accepted, server.requests) == (3, 5)


def test_a_batch_whose_parameters_are_refused_is_sent_again_in_another_form(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def answer(body: dict[str, Any]) -> Any:
        for name, source in (
            ("max_tokens", "https://github.com/griptape-ai/ComfyUI-Griptape/issues/312"),
            ("temperature", "https://github.com/johny-b/llmcomp/issues/69"),
        ):
            if name in body:
                return REFUSALS[source][0], REFUSALS[source][1]
        return good_answer(body, 0)

    path = toy(train=6, test=2, annotate={"batch": {"poll_s": 0.01}})
    with BatchServer(answer) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}"])
        result = annotate(recipe, out=tmp_path / "run", buying="batch")
        assert result.splits["train"].accepted == 6
        assert server.requests == 3 * 8
        annotate(recipe, out=tmp_path / "run", buying="batch")
        assert server.requests == 3 * 8
