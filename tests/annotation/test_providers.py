"""recipes/teachers/: each provider's shapes of errors and replies, answered by a loopback double.

The page of each shape is beside it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer
from loopback import LoopbackServer, Scripted, read_rows

from dsbs import annotate, load_recipe

THOUGHT = "Hm. Answer: billing? Let me see."
SOON = {"Retry-After": "0.01"}


def error(message: str, kind: str | None, code: Any, **more: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code, **more}}


# the first responses of each, before it answers: status, headers, body
REFUSALS: dict[str, list[tuple[int, dict[str, str], Any]]] = {
    # https://platform.openai.com/docs/guides/rate-limits
    # https://github.com/griptape-ai/ComfyUI-Griptape/issues/312
    "openai": [
        (
            400,
            {},
            error(
                "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                "'max_completion_tokens' instead.",
                "invalid_request_error",
                "unsupported_parameter",
            ),
        ),
        (
            400,
            {},
            error(
                "Unsupported value: 'temperature' does not support 0 with this model. Only the "
                "default (1) value is supported.",
                "invalid_request_error",
                "unsupported_value",
            ),
        ),
        (
            429,
            SOON | {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "10ms"},
            error("Rate limit reached for gpt-6-luna", "requests", "rate_limit_exceeded"),
        ),
    ],
    # https://platform.claude.com/docs/en/api/openai-sdk
    # https://platform.claude.com/docs/en/api/errors
    "anthropic": [
        (
            400,
            {},
            error("`temperature` is deprecated for this model.", "invalid_request_error", None),
        ),
        (
            429,
            SOON | {"anthropic-ratelimit-requests-remaining": "0"},
            {
                "type": "error",
                "error": {
                    "type": "rate_limit_error",
                    "message": "This request would exceed the rate limit for your organization",
                },
                "request_id": "req_1",
            },
        ),
    ],
    # https://ai.google.dev/gemini-api/docs/openai
    # https://github.com/SuzumiyaAkizuki/ComfyUI-NewBie-LLM-Formatter/issues/3
    "gemini": [
        (
            400,
            {},
            [
                {
                    "error": {
                        "code": 400,
                        "message": "Invalid JSON payload received. Unknown name "
                        '"reasoning_effort": Cannot find field.',
                        "status": "INVALID_ARGUMENT",
                    }
                }
            ],
        ),
        (
            429,
            SOON,
            [{"error": {"code": 429, "message": "Quota", "status": "RESOURCE_EXHAUSTED"}}],
        ),
    ],
    # https://console.groq.com/docs/rate-limits
    # https://github.com/Aider-AI/aider/issues/3265
    "groq": [
        (
            429,
            {"retry-after": "0.01", "x-ratelimit-remaining-tokens": "0"},
            error(
                "Rate limit reached for model `openai/gpt-oss-120b` on tokens per minute (TPM): "
                "Limit 8000, Used 7000, Requested 1590. Please try again in 10ms.",
                "tokens",
                "rate_limit_exceeded",
            ),
        )
    ],
    # https://docs.together.ai/docs/error-codes
    "together": [(429, SOON, error("Rate limit", "rate_limit", None))],
    # https://docs.mistral.ai/api/
    # https://github.com/editor-code-assistant/eca/issues/231
    "mistral": [
        (
            422,
            {},
            {
                "object": "error",
                "message": {
                    "detail": [
                        {
                            "type": "extra_forbidden",
                            "loc": ["body", "temperature"],
                            "msg": "Extra inputs are not permitted",
                            "input": 0.0,
                        }
                    ]
                },
                "type": "invalid_request_error",
                "param": None,
                "code": None,
            },
        ),
        (
            429,
            SOON,
            {
                "object": "error",
                "message": "Rate limit exceeded",
                "type": "rate_limited",
                "param": None,
                "code": "1300",
            },
        ),
    ],
    # https://api-docs.deepseek.com/quick_start/error_codes
    # https://github.com/deepseek-ai/DeepSeek-V3/issues/69
    "deepseek": [
        (
            400,
            {},
            error(
                "Invalid max_tokens value, the valid range of max_tokens is [1, 8192]",
                "invalid_request_error",
                "invalid_request_error",
            ),
        ),
        (503, SOON, error("The server is overloaded", "server_error", "service_unavailable")),
    ],
    # https://openrouter.ai/docs/api/reference/errors-and-debugging
    "openrouter": [
        (
            429,
            SOON,
            {
                "error": {
                    "message": "Provider returned error",
                    "code": 429,
                    "metadata": {"raw": "temporarily rate-limited", "provider_name": "Groq"},
                },
                "user_id": "user_1",
            },
        )
    ],
    # https://docs.litellm.ai/docs/proxy/error_reference
    # https://github.com/BerriAI/litellm/issues/13327
    "litellm": [
        (
            400,
            {"x-litellm-version": "1.80"},
            error(
                'litellm.BadRequestError: AzureException BadRequestError - { "error": { "message":'
                " \"Unsupported parameter: 'temperature' is not supported with this model.\","
                ' "param": "temperature" } }. Received Model Group=my-model',
                None,
                "400",
            ),
        ),
        (
            429,
            SOON,
            error("litellm.RateLimitError: RateLimitError: OpenAIException", None, "429"),
        ),
    ],
}

# what a 200 has: fields of the message, of the choice, of the usage
REPLIES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "openai": (
        {"refusal": None, "annotations": []},
        {"logprobs": None},
        {
            "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 3},
        },
    ),
    "anthropic": ({}, {}, {}),
    "gemini": ({"extra_content": {"google": {"thought_signature": "x"}}}, {}, {}),
    # https://console.groq.com/docs/reasoning
    "groq": ({"reasoning": THOUGHT}, {}, {"queue_time": 0.1, "total_time": 0.2}),
    "together": ({"reasoning": THOUGHT, "tool_calls": []}, {"finish_reason": "eos", "seed": 1}, {}),
    # https://docs.mistral.ai/capabilities/reasoning/
    "mistral": ({"prefix": False}, {}, {"num_cached_tokens": 0}),
    # https://api-docs.deepseek.com/api/create-chat-completion
    "deepseek": (
        {"reasoning_content": THOUGHT},
        {},
        {"prompt_cache_hit_tokens": 4, "prompt_cache_miss_tokens": 7},
    ),
    # https://openrouter.ai/docs/use-cases/reasoning-tokens
    "openrouter": (
        {"reasoning": THOUGHT, "reasoning_details": [{"type": "reasoning.text", "text": THOUGHT}]},
        {"native_finish_reason": "completed"},
        {"cost": 0.1, "prompt_tokens_details": {"cached_tokens": 4}},
    ),
    # https://docs.litellm.ai/docs/reasoning_content
    "litellm": (
        {
            "reasoning_content": THOUGHT,
            "thinking_blocks": [{"type": "thinking", "thinking": THOUGHT, "signature": "x"}],
            "provider_specific_fields": {},
        },
        {},
        {},
    ),
}
KEYS = {
    "openai": "OPENAI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "groq": "GROQ_API_KEY",
    "together": "TOGETHER_API_KEY",
    "mistral": "MISTRAL_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY",
    "openrouter": "OPENROUTER_API_KEY",
    "litellm": "LITELLM_API_KEY",
}


def double(provider: str) -> Callable[[dict[str, Any], int], Scripted]:
    """Answers as the provider does, after its refusals."""
    message, choice, usage = REPLIES[provider]

    def answer(body: dict[str, Any], number: int) -> Scripted:
        if number <= len(REFUSALS[provider]):
            status, headers, refusal = REFUSALS[provider][number - 1]
            return status, headers, json.dumps(refusal).encode()
        content: Any = good_answer(body, number)
        if provider == "mistral":
            thinking = {"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}
            content = [thinking, {"type": "text", "text": content}]
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": content, **message},
                    "finish_reason": "stop",
                    **choice,
                }
            ],
            "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18, **usage},
        }
        return 200, {}, json.dumps(reply).encode()

    return answer


@pytest.mark.parametrize("provider", REFUSALS)
def test_a_providers_recipe_annotates_against_its_shapes(
    provider: str,
    toy: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEYS[provider], "secret")
    monkeypatch.setattr("dsbs.annotation.endpoint_pool.FIRST_WAIT_S", 0.01)
    path = toy(train=4, test=2, annotate={"concurrency": 1})
    with LoopbackServer(double(provider)) as server:
        recipe = load_recipe(
            path, [f"teacher=recipes/teachers/{provider}.yaml", f"teacher.base_url={server.url}"]
        )
        result = annotate(recipe, out=tmp_path / "run")
        assert server.requests == 6 + len(REFUSALS[provider])
        assert set(server.keys) == {"Bearer secret"}
        assert server.bodies[-1]["model"] == recipe.teacher.model
    summary = result.splits["train"]
    usage = summary.usage
    assert (summary.accepted, usage.prompt_tokens, usage.completion_tokens) == (4, 44, 28)
    assert (usage.cached_tokens == 16) == (provider in ("openai", "deepseek", "openrouter"))
    rows = read_rows(tmp_path / "run")
    assert {row["rationale"] for row in rows} <= {
        "The message is about an invoice.",
        "The message is about a parcel.",
    }


def test_every_recipe_names_the_variable_of_its_key() -> None:
    for provider, variable in KEYS.items():
        file = f"recipes/teachers/{provider}.yaml"
        recipe = load_recipe("recipes/demo.yaml", [f"teacher={file}"])
        assert recipe.teacher.api_key_env == variable
