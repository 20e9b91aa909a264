"""Doubles of log formats, made from the pages that describe them: all give the same call."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from dsbs.importing.calls import CallStore
from dsbs.importing.formats import FORMATS
from dsbs.importing.run import source_files
from dsbs.progress import NoProgress

SYSTEM = "Route the message: billing or shipping."
QUESTION = "Where is my parcel?"
REPLY = "shipping"
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTION}]
USAGE = {"prompt_tokens": 20, "completion_tokens": 2, "total_tokens": 22}
SECRET = "sk-proj-abcdefghijklmnopqrstuvwxyz012345"


def completion(message: dict[str, Any] | None = None, finish: str = "stop") -> dict[str, Any]:
    """https://platform.openai.com/docs/api-reference/chat/object"""
    choice = {
        "index": 0,
        "message": message or {"role": "assistant", "content": REPLY, "refusal": None},
        "logprobs": None,
        "finish_reason": finish,
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1738960610,
        "model": "m-1",
        "choices": [choice],
        "usage": USAGE,
    }


def responses_body() -> dict[str, Any]:
    """https://platform.openai.com/docs/api-reference/responses/object"""
    text = {"type": "output_text", "text": REPLY, "annotations": []}
    return {
        "id": "resp_1",
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": "m-1",
        "output": [
            {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "w"}]},
            {"type": "message", "role": "assistant", "content": [text]},
        ],
        "usage": {"input_tokens": 20, "output_tokens": 2, "total_tokens": 22},
    }


def anthropic_body() -> dict[str, Any]:
    """https://docs.anthropic.com/en/api/messages"""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m-1",
        "content": [{"type": "text", "text": REPLY}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 20, "output_tokens": 2},
    }


ANTHROPIC_REQUEST = {
    "model": "m-1",
    "max_tokens": 9,
    "system": [{"type": "text", "text": SYSTEM}],
    "messages": [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}],
}


def openai_stored() -> list[Any]:
    """A page of GET /v1/chat/completions, and one of …/{completion_id}/messages.

    https://platform.openai.com/docs/api-reference/chat/list
    https://platform.openai.com/docs/api-reference/chat/getMessages
    """
    messages = [
        {"id": f"chatcmpl-1-{i}", "name": None, "content_parts": None, **message}
        for i, message in enumerate(MESSAGES)
    ]
    page = {"object": "list", "first_id": "chatcmpl-1", "last_id": "chatcmpl-1", "has_more": False}
    return [page | {"data": [completion()]}, page | {"data": messages}]


def openai_batch(url: str, request: dict[str, Any], body: dict[str, Any]) -> list[Any]:
    """https://platform.openai.com/docs/api-reference/batch/request-input, request-output; Azure's
    are the same: https://learn.microsoft.com/azure/ai-services/openai/how-to/batch
    """
    return [
        {
            "id": "batch_req_1",
            "custom_id": "r-1",
            "response": {"status_code": 200, "request_id": "req_1", "body": body},
            "error": None,
        },
        {"custom_id": "r-1", "method": "POST", "url": url, "body": {"model": "m", **request}},
    ]


def anthropic_batch() -> list[Any]:
    """https://docs.anthropic.com/en/api/creating-message-batches

    https://docs.anthropic.com/en/api/retrieving-message-batch-results
    """
    return [
        {"custom_id": "r-1", "params": ANTHROPIC_REQUEST},
        {"custom_id": "r-1", "result": {"type": "succeeded", "message": anthropic_body()}},
    ]


def bedrock(operation: str, request: Any, reply: Any) -> list[Any]:
    """https://docs.aws.amazon.com/bedrock/latest/userguide/model-invocation-logging.html"""
    return [
        {
            "schemaType": "ModelInvocationLog",
            "schemaVersion": "1.0",
            "timestamp": "2025-06-26T12:00:00Z",
            "accountId": "123456789012",
            "identity": {"arn": "arn:aws:iam::123456789012:user/u"},
            "region": "us-east-1",
            "requestId": "r-1",
            "operation": operation,
            "modelId": "m-1",
            "input": {
                "inputContentType": "application/json",
                "inputBodyJson": request,
                "inputTokenCount": 20,
            },
            "output": {
                "outputContentType": "application/json",
                "outputBodyJson": reply,
                "outputTokenCount": 2,
            },
        }
    ]


CONVERSE = {
    "messages": [{"role": "user", "content": [{"text": QUESTION}]}],
    "system": [{"text": SYSTEM}],
}


def converse_reply() -> dict[str, Any]:
    """https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_Converse.html"""
    return {
        "output": {"message": {"role": "assistant", "content": [{"text": REPLY}]}},
        "stopReason": "end_turn",
        "metrics": {"latencyMs": 551},
        "usage": {"inputTokens": 20, "outputTokens": 2, "totalTokens": 22},
    }


def converse_stream() -> list[Any]:
    """https://docs.aws.amazon.com/bedrock/latest/APIReference/API_runtime_ConverseStream.html"""
    return [
        {"messageStart": {"role": "assistant"}},
        {"contentBlockDelta": {"delta": {"text": "ship"}, "contentBlockIndex": 0}},
        {"contentBlockDelta": {"delta": {"text": "ping"}, "contentBlockIndex": 0}},
        {"messageStop": {"stopReason": "end_turn"}},
        {"metadata": {"usage": {"inputTokens": 20, "outputTokens": 2}}},
    ]


def anthropic_stream() -> list[Any]:
    """https://docs.anthropic.com/en/docs/build-with-claude/streaming"""
    start = anthropic_body() | {"content": [], "stop_reason": None}
    return [
        {"type": "message_start", "message": start},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "ship"}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "ping"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {}},
    ]


def azure_gateway() -> list[Any]:
    """API Management's resource log with bodies, in Azure Monitor's envelope.

    https://learn.microsoft.com/azure/azure-monitor/reference/tables/apimanagementgatewaylogs
    """
    properties = {
        "method": "POST",
        "url": "https://x.azure-api.net/openai/deployments/d/chat/completions",
        "responseCode": 200,
        "requestHeaders": {"api-key": SECRET},
        "backendRequestBody": json.dumps({"messages": MESSAGES}),
        "backendResponseBody": json.dumps(completion()),
    }
    entry = {
        "time": "2025-05-28T10:00:00Z",
        "resourceId": "/SUBSCRIPTIONS/S",
        "operationName": "Microsoft.ApiManagement/GatewayLogs",
        "category": "GatewayLogs",
        "correlationId": "r-1",
        "properties": properties,
    }
    return [{"records": [entry]}]


def azure_llm() -> list[Any]:
    """https://learn.microsoft.com/azure/azure-monitor/reference/tables/apimanagementgatewayllmlog"""
    columns = {"CorrelationId": "r-1", "ModelName": "m-1", "PromptTokens": 20, "RequestId": "q"}
    reply = [{"role": "assistant", "content": REPLY}]
    return [
        columns | {"SequenceNumber": 0, "RequestMessages": json.dumps(MESSAGES)},
        columns
        | {"SequenceNumber": 1, "CompletionTokens": 2, "ResponseMessages": json.dumps(reply)},
    ]


def otlp(attributes: dict[str, Any], events: Iterable[Any] = ()) -> list[Any]:
    """https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding"""
    span = {
        "traceId": "5b8efff798038103d269b633813fc60c",
        "spanId": "eee19b7ec3c1b174",
        "name": "chat m-1",
        "attributes": pairs({"gen_ai.operation.name": "chat", **attributes}),
        "events": [{"name": name, "attributes": pairs(values)} for name, values in events],
    }
    return [{"resourceSpans": [{"resource": {}, "scopeSpans": [{"scope": {}, "spans": [span]}]}]}]


def pairs(values: dict[str, Any]) -> list[Any]:
    return [{"key": key, "value": otlp_value(value)} for key, value in values.items()]


def otlp_value(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"kvlistValue": {"values": pairs(value)}}
    if isinstance(value, list):
        return {"arrayValue": {"values": [otlp_value(entry) for entry in value]}}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"stringValue": value}


MODEL = {
    "gen_ai.response.model": "m-1",
    "gen_ai.usage.input_tokens": 20,
    "gen_ai.usage.output_tokens": 2,
}
PARTS = [{"role": "user", "parts": [{"type": "text", "content": QUESTION}]}]
REPLY_PARTS = [
    {
        "role": "assistant",
        "parts": [{"type": "text", "content": REPLY}],
        "finish_reason": "stop",
    }
]
SYSTEM_PARTS = [{"type": "text", "content": SYSTEM}]


def otel_messages(*, structured: bool) -> list[Any]:
    """https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/: JSON strings, or values"""
    write: Any = (lambda value: value) if structured else json.dumps
    return otlp(
        MODEL
        | {
            "gen_ai.system_instructions": write(SYSTEM_PARTS),
            "gen_ai.input.messages": write(PARTS),
            "gen_ai.output.messages": write(REPLY_PARTS),
        }
    )


def otel_content_events() -> list[Any]:
    """https://github.com/open-telemetry/semantic-conventions/blob/v1.27.0/docs/gen-ai/gen-ai-spans.md"""
    reply = [{"role": "assistant", "content": REPLY}]
    return otlp(
        MODEL,
        [
            ("gen_ai.content.prompt", {"gen_ai.prompt": json.dumps(MESSAGES)}),
            ("gen_ai.content.completion", {"gen_ai.completion": json.dumps(reply)}),
        ],
    )


def otel_numbered() -> list[Any]:
    """https://github.com/traceloop/semantic-conventions: attributes of OpenLLMetry"""
    values = {
        f"gen_ai.prompt.{i}.{name}": text
        for i, message in enumerate(MESSAGES)
        for name, text in message.items()
    }
    return otlp(
        MODEL
        | values
        | {"gen_ai.completion.0.role": "assistant", "gen_ai.completion.0.content": REPLY}
    )


def otel_log_events() -> list[Any]:
    """https://github.com/open-telemetry/semantic-conventions/blob/v1.36.0/docs/gen-ai/gen-ai-events.md"""
    bodies = {
        "gen_ai.system.message": {"content": SYSTEM},
        "gen_ai.user.message": {"content": QUESTION},
        "gen_ai.choice": {
            "index": 0,
            "finish_reason": "stop",
            "message": {"content": REPLY},
        },
    }
    spans = otlp(MODEL)
    ids = spans[0]["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    records = [
        {
            "traceId": ids["traceId"],
            "spanId": ids["spanId"],
            "eventName": name,
            "body": otlp_value(body),
        }
        for name, body in bodies.items()
    ]
    return [*spans, {"resourceLogs": [{"scopeLogs": [{"logRecords": records}]}]}]


def otel_console() -> list[Any]:
    """https://opentelemetry-python.readthedocs.io: ConsoleSpanExporter writes one object a span."""
    return [
        {
            "name": "chat m-1",
            "context": {"trace_id": "0x5b", "span_id": "0xee"},
            "attributes": MODEL
            | {
                "gen_ai.system_instructions": json.dumps(SYSTEM_PARTS),
                "gen_ai.input.messages": json.dumps(PARTS),
                "gen_ai.output.messages": json.dumps(REPLY_PARTS),
            },
            "events": [],
        }
    ]


def cloudwatch() -> list[Any]:
    """https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_FilterLogEvents.html"""
    (entry,) = bedrock("Converse", CONVERSE, converse_reply())
    event = {"logStreamName": "s", "timestamp": 1, "message": json.dumps(entry), "eventId": "1"}
    return [{"events": [event], "searchedLogStreams": []}]


CHAT = "/v1/chat/completions"
DOUBLES: dict[str, tuple[str, list[Any]]] = {
    "openai stored completions": ("openai", openai_stored()),
    "openai batch": ("openai-batch", openai_batch(CHAT, {"messages": MESSAGES}, completion())),
    "responses batch": (
        "openai-batch",
        openai_batch(
            "/v1/responses", {"instructions": SYSTEM, "input": QUESTION}, responses_body()
        ),
    ),
    "anthropic batch": ("anthropic-batch", anthropic_batch()),
    "anthropic pair": (
        "pairs",
        [
            {
                "request": {"headers": {"x-api-key": SECRET}, "body": ANTHROPIC_REQUEST},
                "response": {"status": 200, "body": anthropic_body()},
            }
        ],
    ),
    "openai pair, streamed": (
        "pairs",
        [{"request": json.dumps(ANTHROPIC_REQUEST), "response": anthropic_stream()}],
    ),
    "bedrock converse": ("bedrock", bedrock("Converse", CONVERSE, converse_reply())),
    "bedrock converse stream": ("bedrock", bedrock("ConverseStream", CONVERSE, converse_stream())),
    "bedrock anthropic": ("bedrock", bedrock("InvokeModel", ANTHROPIC_REQUEST, anthropic_body())),
    "bedrock anthropic stream": (
        "bedrock",
        bedrock("InvokeModelWithResponseStream", ANTHROPIC_REQUEST, anthropic_stream()),
    ),
    "cloudwatch": ("bedrock", cloudwatch()),
    "azure gateway": ("azure", azure_gateway()),
    "azure llm log": ("azure", azure_llm()),
    "otel messages": ("opentelemetry", otel_messages(structured=False)),
    "otel structured": ("opentelemetry", otel_messages(structured=True)),
    "otel content events": ("opentelemetry", otel_content_events()),
    "otel numbered": ("opentelemetry", otel_numbered()),
    "otel log events": ("opentelemetry", otel_log_events()),
    "otel console": ("opentelemetry", otel_console()),
    "chat fine-tuning": (
        "messages",
        [{"model": "m-1", "messages": [*MESSAGES, {"role": "assistant", "content": REPLY}]}],
    ),
}


def read(path: Path) -> CallStore:
    store = CallStore()
    store.read(source_files([path], NoProgress()), NoProgress())
    return store


def write_lines(path: Path, values: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", DOUBLES)
def test_a_double_of_each_format_gives_the_same_call(name: str, tmp_path: Path) -> None:
    expected, entries = DOUBLES[name]
    store = read(write_lines(tmp_path / "no-such-suffix", entries))
    assert expected in store.tally.formats, store.tally
    assert not store.tally.skipped
    (model,) = store.models()
    (group,) = store.contexts(model)
    assert group[1] == [("system", SYSTEM)]
    (call,) = store.calls(model, [group[0]])
    assert (call.question, call.completion, call.model) == (QUESTION, REPLY, "m-1")
    if name != "chat fine-tuning":
        assert (store.tally.prompt_tokens, store.tally.completion_tokens) == (20, 2)
    if name == "responses batch":
        assert call.reasoning == "w"
    store.close()


BODIES: dict[str, tuple[Any, Any]] = {
    # https://docs.aws.amazon.com/bedrock/latest/userguide/model-parameters-meta.html
    "llama": ({"prompt": QUESTION}, {"generation": REPLY, "stop_reason": "stop"}),
    # https://docs.aws.amazon.com/bedrock/latest/userguide/model-parameters-titan-text.html
    "titan": ({"inputText": QUESTION}, {"results": [{"outputText": REPLY, "tokenCount": 2}]}),
    "titan stream": ({"inputText": QUESTION}, [{"outputText": "ship"}, {"outputText": "ping"}]),
    # https://docs.aws.amazon.com/bedrock/latest/userguide/model-parameters-mistral-text-completion.html
    "mistral": ({"prompt": QUESTION}, {"outputs": [{"text": REPLY, "stop_reason": "stop"}]}),
    # https://docs.aws.amazon.com/bedrock/latest/userguide/model-parameters-cohere-command-r-plus.html
    "cohere": ({"message": QUESTION}, {"text": REPLY, "finish_reason": "COMPLETE"}),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_bedrocks_models(name: str, tmp_path: Path) -> None:
    store = read(write_lines(tmp_path / "log", bedrock("InvokeModel", *BODIES[name])))
    (call,) = store.calls("m-1", [number for number, *_ in store.contexts("m-1")])
    assert (call.question, call.completion) == (QUESTION, REPLY)
    store.close()


def test_prompt_and_completion_and_gzip_by_content(tmp_path: Path) -> None:
    """https://platform.openai.com/docs/guides/legacy-fine-tuning: prompt, completion"""
    path = tmp_path / "log.json"  # neither .gz nor .jsonl
    line = json.dumps({"prompt": QUESTION, "completion": REPLY, "label": "billing"})
    path.write_bytes(gzip.compress(f"\ufeff{line}\n".encode()))
    store = read(path)
    (call,) = store.calls("", [1])
    assert (call.question, call.completion, call.gold) == (QUESTION, REPLY, "billing")
    store.close()


def test_pretty_printed_pages_are_read_as_documents(tmp_path: Path) -> None:
    path = tmp_path / "stored.json"
    path.write_text("\n".join(json.dumps(page, indent=2) for page in openai_stored()))
    store = read(path)
    assert store.models() == {"m-1": 1}
    store.close()


TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": {}}]}
UNUSABLE: dict[str, Any] = {
    "error": {"custom_id": "1", "response": None, "error": {"code": "batch_expired"}},
    "tool calls": {"request": {"messages": MESSAGES}, "response": completion(TOOL_CALL)},
    "truncated": {
        "request": {"messages": MESSAGES},
        "response": completion(finish="length"),
    },
    "refused": {
        "request": {"messages": MESSAGES},
        "response": completion(finish="content_filter"),
    },
    "streaming fragment": {
        "id": "c",
        "object": "chat.completion.chunk",
        "choices": [{"delta": {"content": "sh"}}],
        "messages": MESSAGES,
    },
    "no reply": {"messages": MESSAGES},
    "images or files": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            {"role": "assistant", "content": REPLY},
        ]
    },
    "no prompt in the log": completion() | {"id": "chatcmpl-lonely"},
    "body in another file": bedrock("Converse", CONVERSE, None)[0]
    | {"input": {"inputBodyS3Path": "s3://b/k"}, "output": {"outputBodyS3Path": "s3://b/k"}},
    "no bodies in the log": {
        "category": "RequestResponse",
        "operationName": "ChatCompletions_Create",
        "properties": "{}",
    },
    "a NUL character": {"prompt": "a\0b", "completion": REPLY},
    "unknown format": {"level": "info", "msg": "started"},
    "malformed entry": {"resourceSpans": 7},
}


def test_entries_without_a_row_are_counted_by_reason(tmp_path: Path) -> None:
    store = read(write_lines(tmp_path / "log", UNUSABLE.values()))
    assert dict(store.tally.skipped) == dict.fromkeys(UNUSABLE, 1)
    assert store.models() == {}
    store.close()


def test_a_custom_id_of_several_requests_joins_none(tmp_path: Path) -> None:
    (reply, request) = openai_batch(CHAT, {"messages": MESSAGES}, completion())
    other = request | {"body": {"messages": [{"role": "user", "content": "Hi"}]}}
    store = read(write_lines(tmp_path / "log", [request, other, reply]))
    assert dict(store.tally.skipped) == {"several requests with one custom_id": 1}
    store.close()


def test_each_format_names_its_page() -> None:
    assert all(log_format.source.startswith("https://") for log_format in FORMATS)
    assert {name for name, _ in DOUBLES.values()} <= {log_format.name for log_format in FORMATS}


def test_files_of_a_folder_that_are_not_read_are_counted(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.out", "c"):
        (tmp_path / name).write_text("{}\n", encoding="utf-8")
    said: list[str] = []

    class Said(NoProgress):
        def say(self, text: str) -> None:
            said.append(text)

    assert source_files([tmp_path], Said()) == [tmp_path / "a.jsonl"]
    (message,) = said
    assert "2 files not read (first: b.out)" in message
    assert source_files([tmp_path / "b.out"], Said()) == [tmp_path / "b.out"] and len(said) == 1
