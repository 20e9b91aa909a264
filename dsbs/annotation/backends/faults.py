"""Faults: finish reasons and errors of endpoints, and whose fault an error is.

Two literal tables, each line with its source. Replies that come online, replies of a batch and
errors inside a 200 all go through them. The docs' table of errors is generated from ``FAULTS``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

# --- finish reasons

Ending = Literal["whole", "cut", "broken off", "filtered"]

_OPENAI = "https://platform.openai.com/docs/api-reference/chat/object"
_MISTRAL = "https://docs.mistral.ai/api/#tag/chat"
_DEEPSEEK = "https://api-docs.deepseek.com/api/create-chat-completion"
_GEMINI = "https://ai.google.dev/api/generate-content#FinishReason"
_ANTHROPIC = "https://platform.claude.com/docs/en/build-with-claude/handling-stop-reasons"
_BEDROCK = "https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html"
_COHERE = "https://docs.cohere.com/reference/chat"
_OPENROUTER = "https://openrouter.ai/docs/api/reference/overview"
_VLLM = "https://github.com/vllm-project/vllm/blob/main/vllm/v1/engine/__init__.py"
_SGLANG = "https://docs.sglang.ai/basic_usage/native_api.html"
_TGI = "https://huggingface.github.io/text-generation-inference/"
_TOGETHER = "https://docs.together.ai/reference/chat-completions-1"
_OLLAMA = "https://github.com/ollama/ollama/blob/main/docs/api.md"
_LLAMACPP = "https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md"
_WATSONX = "https://ibm.github.io/watsonx-ai-node-sdk/"
_ZHIPU = "https://docs.z.ai/api-reference/llm/chat-completion"

# reason in lower case with underscores -> how the reply ended, who sends it, where it is documented
FINISH_REASONS: Mapping[str, tuple[Ending, str, str]] = {
    "stop": ("whole", "OpenAI, Azure, Groq and most others", _OPENAI),
    "tool_calls": ("whole", "OpenAI", _OPENAI),
    "function_call": ("whole", "OpenAI, earlier", _OPENAI),
    "length": ("cut", "OpenAI", _OPENAI),
    "content_filter": ("filtered", "OpenAI, Azure", _OPENAI),
    "error": ("broken off", "OpenRouter, Mistral, Cohere, vLLM", _OPENROUTER),
    "model_length": ("cut", "Mistral", _MISTRAL),
    "insufficient_system_resource": ("broken off", "DeepSeek", _DEEPSEEK),
    "aborted": ("broken off", "DeepSeek", _DEEPSEEK),
    "end_turn": ("whole", "Anthropic, Bedrock", _ANTHROPIC),
    "stop_sequence": ("whole", "Anthropic, Bedrock, Cohere, TGI", _ANTHROPIC),
    "tool_use": ("whole", "Anthropic, Bedrock", _ANTHROPIC),
    "max_tokens": ("cut", "Anthropic, Bedrock, Gemini, Cohere", _ANTHROPIC),
    "model_context_window_exceeded": ("cut", "Anthropic, Bedrock, Z.ai", _ANTHROPIC),
    "pause_turn": ("broken off", "Anthropic", _ANTHROPIC),
    "compaction": ("broken off", "Anthropic", _ANTHROPIC),
    "refusal": ("filtered", "Anthropic", _ANTHROPIC),
    "guardrail_intervened": ("filtered", "Bedrock", _BEDROCK),
    "content_filtered": ("filtered", "Bedrock", _BEDROCK),
    "malformed_model_output": ("broken off", "Bedrock", _BEDROCK),
    "malformed_tool_use": ("broken off", "Bedrock", _BEDROCK),
    "safety": ("filtered", "Gemini", _GEMINI),
    "recitation": ("filtered", "Gemini", _GEMINI),
    "language": ("filtered", "Gemini", _GEMINI),
    "blocklist": ("filtered", "Gemini", _GEMINI),
    "prohibited_content": ("filtered", "Gemini", _GEMINI),
    "spii": ("filtered", "Gemini", _GEMINI),
    "image_safety": ("filtered", "Gemini", _GEMINI),
    "model_armor": ("filtered", "Vertex AI", _GEMINI),
    "other": ("broken off", "Gemini", _GEMINI),
    "malformed_function_call": ("broken off", "Gemini", _GEMINI),
    "malformed_response": ("broken off", "Gemini", _GEMINI),
    "unexpected_tool_call": ("broken off", "Gemini", _GEMINI),
    "too_many_tool_calls": ("broken off", "Gemini", _GEMINI),
    "complete": ("whole", "Cohere", _COHERE),
    "tool_call": ("whole", "Cohere", _COHERE),
    "timeout": ("broken off", "Cohere", _COHERE),
    "error_toxic": ("filtered", "Cohere", _COHERE),
    "error_limit": ("cut", "Cohere", _COHERE),
    "user_cancel": ("broken off", "Cohere", _COHERE),
    "abort": ("broken off", "vLLM, SGLang", _VLLM),
    "repetition": ("cut", "vLLM", _VLLM),
    "eos": ("whole", "Together, llama.cpp", _TOGETHER),
    "eos_token": ("whole", "TGI", _TGI),
    "matched": ("whole", "SGLang", _SGLANG),
    "word": ("whole", "llama.cpp", _LLAMACPP),
    "limit": ("cut", "llama.cpp", _LLAMACPP),
    "load": ("broken off", "Ollama", _OLLAMA),
    "unload": ("broken off", "Ollama", _OLLAMA),
    "time_limit": ("broken off", "watsonx", _WATSONX),
    "cancelled": ("broken off", "watsonx", _WATSONX),
    "sensitive": ("filtered", "Z.ai", _ZHIPU),
    "network_error": ("broken off", "Z.ai", _ZHIPU),
}


def plain_reason(reason: str) -> str:
    """A finish reason in the table's spelling: ``FinishReason.MAX_TOKENS`` is ``max_tokens``."""
    name = reason.strip().rpartition(".")[2]
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)  # endTurn
    return name.lower().replace("-", "_").replace(" ", "_").removeprefix("finish_reason_")


def ending(reason: str | None) -> Ending | None:
    """How a reply with this finish reason ended. None: there is no reason, or it is not known."""
    if reason is None:
        return None
    name = plain_reason(reason)
    return FINISH_REASONS[name][0] if name in FINISH_REASONS else None


def plain_ending(reason: str | None) -> str | None:
    """A finish reason as it is stored: "length" for all that cut, "content_filter" for filters."""
    names = {"cut": "length", "filtered": "content_filter"}
    return names.get(ending(reason) or "", reason)


def is_unknown_reason(reason: str | None) -> bool:
    """Whether an endpoint gave a finish reason that no provider in the table documents."""
    return bool(reason) and ending(reason) is None


# --- errors

Blame = Literal[
    "account", "content", "row", "unclear", "parameter", "recipe", "throttled", "endpoint"
]

# what dsbs does, for the documentation
ACTIONS: Mapping[Blame, str] = {
    "account": "stops with exit code 3; nothing is kept as refused, and the same command goes on",
    "content": "rejects that row (`refused`); other rows are not affected",
    "row": "rejects that row (`refused`); other rows are not affected",
    "unclear": "rejects that row (`refused`), once a later request has been answered. The same "
    "refusal 16 times in a row stops the run with exit code 3 if a request that was answered "
    "before is refused too",
    "parameter": "adapts the request where it can; else as for an unclear error",
    "recipe": "stops with exit code 2",
    "throttled": "waits (`Retry-After`, at least its own backoff) and asks again; a wait of more "
    "than ten minutes stops with exit code 3",
    "endpoint": "asks again, up to `teacher.max_attempts` times",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """One line of the table of errors.

    It applies to an error with one of the ``statuses`` (empty: any) whose body has one of the
    ``codes`` or whose message has one of the ``words``, all in lower case; without codes and words,
    the status decides alone.
    """

    blame: Blame
    statuses: tuple[int, ...] = ()
    codes: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    providers: str = "all"
    source: str = ""


_DIGEST = "https://www.developersdigest.tech/errors/api"
_OPENAI_ERRORS = "https://platform.openai.com/docs/guides/error-codes"
_QUOTA = (
    "https://learn.microsoft.com/microsoft-cloud/dev/dev-proxy/concepts/openai-insufficient-quota"
)
_OPENROUTER_ERRORS = "https://openrouter.ai/docs/api/reference/errors-and-debugging"
_GEMINI_ERRORS = "https://ai.google.dev/gemini-api/docs/troubleshooting"
_ALIBABA = "https://help.aliyun.com/en/model-studio/error-code"
_FIREWORKS = "https://docs.fireworks.ai/guides/inference-error-codes"
_LITELLM = "https://docs.litellm.ai/docs/proxy/error_reference"
_AZURE_BATCH = "https://learn.microsoft.com/en-us/answers/questions/2285577"
_HTTP = "https://www.rfc-editor.org/rfc/rfc9110#section-15"

# The first line that applies decides. An error inside a 200 has the status that its code names;
# where it names none, every line with codes or words is tried.
# fmt: off
FAULTS: tuple[Fault, ...] = (
    Fault("unclear", (400, 403, 406, 413, 422, 451), ("html",), (),
          "firewalls: the page of one in front of the endpoint", _HTTP),
    Fault("throttled", (402,), ("in_flight_budget_exhausted", "openrouter_in_flight_budget"), (),
          "OpenRouter", f"{_DIGEST}/openrouter/402-in-flight-budget-exhausted"),
    Fault("content", (),
          ("content_filter", "responsibleaipolicyviolation", "content_policy_violation",
           "contentpolicyviolationerror", "flagged_input", "data_inspection_failed",
           "datainspectionfailed"), (),
          "Azure, OpenAI, OpenRouter, LiteLLM, Alibaba",
          f"{_DIGEST}/azure-openai/400-content-filter"),
    Fault("account", (),
          ("insufficient_quota", "credit_balance_exhausted", "organization_spend_limit_exceeded",
           "project_spend_limit_exceeded", "organization_usage_limit_exceeded",
           "billing_not_active", "billing_hard_limit_reached", "account_deactivated"), (),
          "OpenAI", _QUOTA),
    Fault("account", (),
          ("billing_error", "payment_required", "insufficient_balance", "insufficient_credits"), (),
          "Anthropic, OpenRouter", f"{_DIGEST}/anthropic-api"),
    Fault("account", (), ("budget_exceeded",),
          ("budget has been exceeded", "exceededbudget", "exceededtokenbudget", "over budget",
           "budget exceeded", "max budget limit"), "LiteLLM", _LITELLM),
    Fault("account", (),
          ("exceeded_current_quota_error", "arrearage", "insufficient_user_quota", "1113", "1008"),
          ("account is in good standing", "overdue payment", "in arrears"),
          "Moonshot, Alibaba, one-api, Z.ai, MiniMax", _ALIBABA),
    Fault("account", (), (),
          ("credit balance is too low", "specified api usage limits"),
          "Anthropic", "https://github.com/anthropics/claude-code/issues/66314"),
    Fault("account", (), (),
          ("used all available credits", "out of credits", "spending limit", "spend limit"),
          "xAI", "https://github.com/continuedev/continue/issues/10373"),
    Fault("account", (), (),
          ("no credits left", "not enough credits", "more credits", "insufficient credit",
           "insufficient balance", "insufficient fund", "exceeded your current quota",
           "check your plan and billing", "check your billing", "billing hard limit",
           "usage limit for this billing", "monthly included credits", "account is not active",
           "account has been deactivated", "billing is not enabled", "billing to be enabled",
           "enable billing", "failure to pay", "past due invoice", "unpaid invoice"),
          "OpenAI, OpenRouter, DeepSeek, Hugging Face, Gemini", _OPENAI_ERRORS),
    Fault("account", (400, 401, 402, 403, 412, 429), (), ("is suspended", "been suspended"),
          "Fireworks, Moonshot", _FIREWORKS),
    Fault("account", (402, 412), (), (), "OpenRouter, DeepSeek, Fireworks", _FIREWORKS),
    Fault("account", (429,), ("per_day_quota",), (), "Gemini", _GEMINI_ERRORS),
    Fault("account", (400, 429), ("token_limit_exceeded",), ("enqueued token", "enqueued request"),
          "OpenAI and Azure, a full queue of batches", _AZURE_BATCH),
    Fault("row", (400, 413, 422, 500),
          ("context_length_exceeded", "exceed_context_size_error", "string_above_max_length",
           "string_too_long", "request_too_large", "max_tokens_exceeded"),
          ("maximum context length", "context length exceeded", "context window", "context size",
           "prompt is too long", "input is too long", "input length", "max_new_tokens` must be",
           "too many tokens", "input token count", "longer than the maximum model length",
           "too large for model"),
          "OpenAI, vLLM, llama.cpp, Anthropic, Gemini, TGI, Mistral",
          "https://github.com/vllm-project/vllm/pull/24995"),
    Fault("content", (400, 403, 422, 451), ("invalid_prompt", "1301", "1026", "1027"),
          ("usage guideline", "content management policy", "content policy", "content filter",
           "usage policies", "usage policy", "safety system", "safety check", "safety filter",
           "safety reasons", "moderation", "flagged", "guardrail", "inappropriate content",
           "considered high risk", "sensitive content", "responsible ai"),
          "xAI, OpenRouter, OpenAI, Anthropic, Moonshot, Z.ai, MiniMax",
          "https://github.com/theopenco/llmgateway/pull/1785"),
    Fault("recipe", (400, 403, 404, 410),
          ("model_not_found", "model_decommissioned", "modelnotfound"),
          ("has been decommissioned", "has been deprecated", "model not found", "invalid model"),
          "OpenAI, Groq", _OPENAI_ERRORS),
    Fault("recipe", (400, 401, 403),
          ("invalid_api_key", "api_key_invalid", "invalidapikey"),
          ("api key not valid", "invalid api key", "incorrect api key",
           "location is not supported", "country, region, or territory"),
          "Gemini, OpenAI", _GEMINI_ERRORS),
    Fault("account", (400,), ("failed_precondition",), (),
          "Gemini", f"{_DIGEST}/gemini-api/400-failed-precondition"),
    Fault("parameter", (400, 422),
          ("unsupported_parameter", "unsupported_value", "unknown_parameter", "extra_forbidden"),
          ("unsupported parameter", "unsupported value", "unknown parameter",
           "unrecognized request argument", "extra inputs are not permitted",
           "is not supported with this model", "is not supported by this model",
           "does not support parameters", "is unsupported", "system role not supported",
           "developer instruction is not enabled"),
          "OpenAI, Groq, Mistral, vLLM, LiteLLM, Gemini",
          "https://github.com/microsoft/clarity-agent/issues/59"),
    Fault("recipe", (300, 301, 302, 303, 304, 305, 307, 308), (), (), "all", _HTTP),
    Fault("recipe", (401, 403, 404, 405, 406, 407, 410, 415), (), (), "all", _HTTP),
    Fault("row", (429,), (), ("must be reduced in order to run", "request too large"),
          "OpenAI", "https://github.com/DrShushen/climb/issues/13"),
    Fault("throttled", (429,), (), (), "all", _HTTP),
    Fault("throttled", (400, 403, 503), ("throttling", "throttling.ratequota", "slow_down"),
          ("too many requests",), "Alibaba, OpenAI", _ALIBABA),
    Fault("endpoint", (408, 409, 424, 425, 498, 499), (), (),
          "Groq and others", "https://console.groq.com/docs/errors"),
)
# fmt: on


@dataclass(frozen=True, slots=True)
class ErrorBody:
    """What an error says: its message, its codes (in lower case), and the parameter it names.

    ``status`` is the HTTP status that the body itself names, which errors inside a 200 do.
    """

    message: str
    codes: frozenset[str] = frozenset()
    parameter: str | None = None
    status: int | None = None


_CODE_FIELDS = ("code", "type", "status", "error_code", "error_type", "reason", "limit_source")
_NESTED = ("innererror", "metadata", "details", "violations", "error")
_MESSAGE_FIELDS = ("message", "msg", "detail", "status_msg", "error_message", "errorMessage")
_NOT_PARAMETERS = ("messages", "prompt", "input", "model")


def error_body(body: bytes | str | object) -> ErrorBody:
    """Read an error's body: JSON of any provider's form, an HTML page, or plain text."""
    value: object = body
    if isinstance(body, bytes | str):
        text = body.decode(errors="replace") if isinstance(body, bytes) else body
        try:
            value = json.loads(text)
        except ValueError:
            return _text_body(text)
    while isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, dict):
        return ErrorBody("" if value in (None, []) else str(value))
    inner = value.get("error") or value.get("base_resp") or value
    while isinstance(inner, list) and inner:
        inner = inner[0]
    codes = set(_codes(value))
    if not isinstance(inner, dict):
        return ErrorBody(_message(inner), frozenset(codes), None, _status(codes))
    codes |= set(_codes(inner))
    parameter = inner.get("param") or _location(inner.get("detail"))
    if parameter is not None and str(parameter).partition(".")[0] in _NOT_PARAMETERS:
        parameter = None
    return ErrorBody(
        _message(inner) or _message(value) or json.dumps(value, ensure_ascii=False),
        frozenset(codes),
        None if parameter is None else str(parameter),
        _status(codes),
    )


def _text_body(text: str) -> ErrorBody:
    """A body that is not JSON. Of an HTML page, the text without tags, scripts and styles."""
    if not re.match(r"\s*(?:<!doctype|<html|<head|<\?xml|<!--)", text, re.IGNORECASE):
        return ErrorBody(text)
    words = re.sub(r"(?is)<(script|style)\b.*?</\1>|<[^>]*>", " ", text)
    return ErrorBody("an HTML page: " + " ".join(words.split()), frozenset({"html"}))


def _message(value: object) -> str:
    """The text of an error's message, whatever holds it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "; ".join(filter(None, map(_message, value[:3])))
    if isinstance(value, dict):
        for name in _MESSAGE_FIELDS:
            if value.get(name):
                return _message(value[name])
        if isinstance(value.get("error"), str):
            return str(value["error"])
    return ""


def _codes(value: Mapping[str, Any]) -> Iterator[str]:
    """Every code in an error, in the objects inside it too."""
    for name in (*_CODE_FIELDS, "status_code"):
        code = value.get(name)
        if isinstance(code, str | int) and not isinstance(code, bool) and code != "":
            yield str(code).lower()
    if "flagged_input" in value:
        yield "flagged_input"
    if "perday" in str(value.get("quotaId", "")).lower():
        yield "per_day_quota"
    for name in _NESTED:
        nested = value.get(name)
        for item in nested if isinstance(nested, list) else [nested]:
            if isinstance(item, dict):
                yield from _codes(item)


def _status(codes: set[str]) -> int | None:
    """The HTTP status among an error's codes."""
    return next((int(code) for code in sorted(codes) if re.fullmatch("[45][0-9]{2}", code)), None)


def _location(detail: object) -> str | None:
    """The field that a validation error is about (FastAPI: ``{"loc": ["body", "stop"]}``)."""
    if isinstance(detail, list) and detail and isinstance(detail[0], dict):
        location = detail[0].get("loc")
        if isinstance(location, list) and len(location) > 1:
            return str(location[1])
    return None


def error_inside(value: object) -> ErrorBody | None:
    """The error that the body of a 200 holds instead of an answer, or beside it."""
    while isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, dict):
        return None
    response = value.get("base_resp")  # MiniMax
    is_refused = isinstance(response, dict) and response.get("status_code") not in (0, None)
    if value.get("error") or value.get("object") == "error" or is_refused:
        return error_body(value)
    choices = value.get("choices")
    if isinstance(choices, list):
        if choices and isinstance(choices[0], dict) and choices[0].get("error"):
            return error_body(choices[0])
        return None
    if any(value.get(name) for name in ("detail", "message", "msg", "code")):
        return error_body(value)
    return None


def classify(status: int | None, error: ErrorBody) -> Blame:
    """Whose fault an error is, by the first line of the table that applies.

    ``status`` None: not known. Without a line, a 4xx is unclear and all else the endpoint's fault.
    """
    message = " ".join(error.message.lower().split())
    for fault in FAULTS:
        if fault.statuses and status is not None and status not in fault.statuses:
            continue
        if not fault.codes and not fault.words:
            if status is not None:
                return fault.blame
        elif not error.codes.isdisjoint(fault.codes) or any(w in message for w in fault.words):
            return fault.blame
    if status is not None and 400 <= status < 500:
        return "parameter" if error.parameter else "unclear"
    return "endpoint"


def is_final(refusal: str) -> bool:
    """Whether a stored refusal ("HTTP 400: …") holds: by the table it was not the account's fault,
    and no parameter's.
    """
    match = re.match(r"HTTP (\d{3}): ?(.*)", refusal, re.DOTALL)
    if match is None:
        return True
    blame = classify(int(match.group(1)), ErrorBody(match.group(2)))
    return blame in ("row", "content", "unclear", "recipe")
