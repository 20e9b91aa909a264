"""Log formats: one record each, recognized by a line's content, with the page that describes it.

A reader turns a JSON object into Records. A batch's requests and replies lie in different files, a
trace's messages in different records: such Records are halves that share a ``key``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dsbs.importing.bodies import (
    Record,
    Usage,
    call_of,
    id_text,
    is_reply,
    is_request,
    object_or_empty,
    parsed,
    role_of,
    with_reply,
    with_request,
)
from dsbs.importing.opentelemetry import is_opentelemetry, read_opentelemetry

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Format:
    """How to recognize and read one kind of log entry."""

    name: str
    title: str
    source: str
    """The page that describes it."""
    matches: Callable[[Object], bool]
    read: Callable[[Object], Iterator[Record]]


def read_object(value: Object) -> Iterator[tuple[str, Record]]:
    """The format's name and the records of a log entry, or of the entries that a page of them
    lists. Nothing: no format matches.
    """
    for log_format in FORMATS:
        if log_format.matches(value):
            for record in log_format.read(value):
                yield log_format.name, record
            return
    for entry in _listed(value):
        yield from read_object(entry)


# Where pages and exports list entries: OpenAI, Azure Monitor, CloudWatch (filter-log-events, S3).
_LISTS = ("data", "records", "value", "events", "logEvents")


def _listed(value: Object) -> Iterator[Object]:
    """The entries that an object lists."""
    for name in _LISTS:
        entries = value.get(name)
        if not isinstance(entries, list):
            continue
        for entry in entries:
            if isinstance(entry, dict):
                inner = parsed(entry.get("message")) if len(entry) > 1 else None
                yield inner if isinstance(inner, dict) and "role" not in inner else entry
        return
    inner = parsed(value.get("@message"))  # CloudWatch Logs Insights
    if isinstance(inner, dict):
        yield inner


# --- OpenAI and Azure: batches, stored completions


def _is_openai_batch(value: Object) -> bool:
    return "custom_id" in value and ("response" in value or "body" in value or "error" in value)


def _read_openai_batch(value: Object) -> Iterator[Record]:
    key = id_text(value["custom_id"])
    if "body" in value and "response" not in value:
        yield with_request(Record(key=key, half="request"), value["body"])
        return
    response = value.get("response")
    record = Record(key=key, id=key, half="reply")
    status = object_or_empty(response).get("status_code")
    if value.get("error") or not isinstance(response, dict) or status not in (None, 200):
        record.problem = "error"
        yield record
        return
    yield with_reply(record, response.get("body"))


def _is_openai(value: Object) -> bool:
    return is_reply(value) and value.get("object") in (
        "chat.completion",
        "chat.completion.chunk",
        "response",
        "text_completion",
    )


def _read_openai(value: Object) -> Iterator[Record]:
    request = next(
        (value[name] for name in ("request", "messages", "input_messages") if value.get(name)),
        value if is_request(value) else None,
    )
    if isinstance(request, list):
        request = {"messages": request}
    record = with_reply(Record(key=id_text(value.get("id")), gold=_gold(value)), value)
    if request is None:
        record.half = "reply"
    else:
        with_request(record, request)
    yield record


def _is_message_page(value: Object) -> bool:
    """A page of a stored completion's messages, whose ids are the completion's with a number."""
    entries = value.get("data")
    return isinstance(entries, list) and bool(entries) and all(map(_is_stored_message, entries))


def _is_stored_message(value: Any) -> bool:
    return isinstance(value, dict) and "role" in value and "content" in value and "id" in value


def _read_message_page(value: Object) -> Iterator[Record]:
    for entry in value["data"]:
        record = with_request(Record(half="request", is_part=True), {"messages": [entry]})
        record.key = str(entry["id"]).rpartition("-")[0]
        yield record


# --- Anthropic


def _is_anthropic_batch(value: Object) -> bool:
    return "custom_id" in value and ("result" in value or "params" in value)


def _read_anthropic_batch(value: Object) -> Iterator[Record]:
    key = id_text(value["custom_id"])
    if "params" in value:
        yield with_request(Record(key=key, half="request"), value["params"])
        return
    record = Record(key=key, id=key, half="reply")
    result = value["result"]
    if not isinstance(result, dict) or result.get("type") != "succeeded":
        record.problem = "error"
        yield record
        return
    yield with_reply(record, result.get("message"))


def _is_anthropic(value: Object) -> bool:
    return value.get("type") == "message" and value.get("role") == "assistant" and is_reply(value)


# --- Bedrock


def _is_bedrock(value: Object) -> bool:
    return value.get("schemaType") == "ModelInvocationLog" or (
        "recordId" in value and "modelInput" in value
    )


def _read_bedrock(value: Object) -> Iterator[Record]:
    if "modelInput" in value:  # batch inference
        reply = value.get("modelOutput") or {"error": value.get("error")}
        yield call_of(value["modelInput"], reply, record_id=value["recordId"])
        return
    source, target = value.get("input") or {}, value.get("output") or {}
    identity = {"record_id": value.get("requestId"), "model": value.get("modelId")}
    if value.get("errorCode") or not target:
        yield Record(id=id_text(value.get("requestId")), problem="error")
    elif "inputBodyJson" not in source or "outputBodyJson" not in target:
        # bodies above 100 KB are S3 objects of their own
        problem = "body in another file"
        yield Record(id=id_text(value.get("requestId")), problem=problem)
    else:
        record = call_of(source["inputBodyJson"], target["outputBodyJson"], **identity)
        counts = Usage.of(source.get("inputTokenCount"), target.get("outputTokenCount"))
        record.usage = counts if counts.prompt is not None else record.usage
        record.model = id_text(value.get("modelId"))
        yield record


# --- Azure: API Management's gateway log, and its log of language models


def _azure_properties(value: Object) -> Object:
    merged = value | object_or_empty(parsed(value.get("properties")))
    return {name.casefold(): entry for name, entry in merged.items()}


def _is_azure(value: Object) -> bool:
    names = {name.casefold() for name in value}
    if names & {"requestmessages", "responsemessages", "backendresponsebody", "responsebody"}:
        return True
    # Azure Monitor's envelope of a resource log
    return "category" in names and "properties" in names and "operationname" in names


def _read_azure(value: Object) -> Iterator[Record]:
    columns = _azure_properties(value)
    key = id_text(columns.get("correlationid") or columns.get("requestid"))
    if "requestmessages" in columns or "responsemessages" in columns:
        yield from _read_azure_llm(columns, key)
        return
    request = columns.get("requestbody") or columns.get("backendrequestbody")
    reply = columns.get("responsebody") or columns.get("backendresponsebody")
    status = columns.get("responsecode") or columns.get("resultsignature")
    if str(status or 200) != "200":
        yield Record(id=key, problem="error")
    elif not request or not reply:
        yield Record(id=key, problem="no bodies in the log")
    else:
        yield call_of(request, reply, record_id=key)


def _read_azure_llm(columns: Object, key: str | None) -> Iterator[Record]:
    usage = Usage.of(columns.get("prompttokens"), columns.get("completiontokens"))
    model = id_text(columns.get("modelname") or columns.get("deploymentname"))
    for name in ("requestmessages", "responsemessages"):
        messages = parsed(columns.get(name))
        if not messages:
            continue
        half: Literal["request", "reply"] = "request" if name == "requestmessages" else "reply"
        record = Record(id=key, key=key, half=half, model=model)
        if not isinstance(messages, list):
            record.problem = "split over several entries"
        elif name == "requestmessages":
            with_request(record, {"messages": messages})
        else:
            record = with_reply(record, {"choices": [{"message": messages[-1]}]})
            record.usage = usage
        yield record


# --- requests beside replies, and plain messages

# What programs call the two bodies of a call in their own logs.
_PAIRS = (
    ("request", "response"),
    ("request_body", "response_body"),
    ("requestBody", "responseBody"),
    ("body", "response"),
    ("input", "output"),
    ("params", "message"),
)


def _pair(value: Object) -> tuple[Any, Any] | None:
    for first, second in _PAIRS:
        request, reply = parsed(value.get(first)), parsed(value.get(second))
        if isinstance(request, dict) and "body" in request:  # beside url and headers
            request = parsed(request["body"])
        if isinstance(reply, dict) and "body" in reply:
            reply = parsed(reply["body"])
        if isinstance(request, dict) and is_request(request) and isinstance(reply, dict | list):
            return request, reply
    return None


def _read_pair(value: Object) -> Iterator[Record]:
    pair = _pair(value)
    assert pair is not None
    yield call_of(*pair, record_id=value.get("id") or value.get("request_id"), gold=_gold(value))


_COMPLETIONS = ("completion", "response", "output", "answer")
_GOLD = ("label", "gold", "expected", "ideal")


def _gold(value: Object) -> Any:
    """A row's own label, where a log comes with it."""
    for holder in (value, object_or_empty(value.get("metadata"))):
        for name in _GOLD:
            if isinstance(holder.get(name), str | int | float | list | dict):
                return holder[name]
    return None


def _is_messages(value: Object) -> bool:
    if isinstance(value.get("messages"), list):
        return True
    prompt = value.get("prompt", value.get("input"))
    return isinstance(prompt, str) and any(
        isinstance(value.get(name), str | Mapping) for name in _COMPLETIONS
    )


def _read_messages(value: Object) -> Iterator[Record]:
    body: Object = {"system": value.get("system"), "model": value.get("model")}
    reply: Any = next((value[name] for name in _COMPLETIONS if value.get(name)), None)
    if isinstance(value.get("messages"), list):
        messages = list(value["messages"])
        if reply is None:
            last = messages.pop() if messages else None
            if not isinstance(last, dict) or role_of(last.get("role")) != "assistant":
                yield Record(id=id_text(value.get("id")), problem="no reply")
                return
            reply = last
        body["messages"] = messages
    else:
        body["prompt"] = value.get("prompt", value.get("input"))
    if isinstance(reply, str):
        reply = {"content": reply}
    if not is_reply(reply):
        reply = {"choices": [{"message": reply}]}
    record = call_of(body, reply, record_id=value.get("id"), gold=_gold(value))
    record.model = record.model or id_text(value.get("model"))
    yield record


FORMATS = (
    Format(
        "openai-batch",
        "OpenAI or Azure OpenAI batch",
        "https://platform.openai.com/docs/api-reference/batch/request-output",
        _is_openai_batch,
        _read_openai_batch,
    ),
    Format(
        "anthropic-batch",
        "Anthropic message batch",
        "https://docs.anthropic.com/en/api/retrieving-message-batch-results",
        _is_anthropic_batch,
        _read_anthropic_batch,
    ),
    Format(
        "bedrock",
        "Bedrock model invocation log",
        "https://docs.aws.amazon.com/bedrock/latest/userguide/model-invocation-logging.html",
        _is_bedrock,
        _read_bedrock,
    ),
    Format(
        "opentelemetry",
        "OpenTelemetry GenAI",
        "https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/",
        is_opentelemetry,
        read_opentelemetry,
    ),
    Format(
        "openai-messages",
        "OpenAI stored completions: messages",
        "https://platform.openai.com/docs/api-reference/chat/getMessages",
        _is_message_page,
        _read_message_page,
    ),
    Format(
        "openai",
        "OpenAI stored completions",
        "https://platform.openai.com/docs/api-reference/chat/list",
        _is_openai,
        _read_openai,
    ),
    Format(
        "anthropic",
        "Anthropic message",
        "https://docs.anthropic.com/en/api/messages",
        _is_anthropic,
        _read_openai,
    ),
    Format(
        "pairs",
        "requests with their responses",
        "https://docs.anthropic.com/en/api/messages",
        lambda value: _pair(value) is not None,
        _read_pair,
    ),
    Format(
        "azure",
        "Azure API Management log",
        "https://learn.microsoft.com/azure/azure-monitor/reference/tables/apimanagementgatewayllmlog",
        _is_azure,
        _read_azure,
    ),
    Format(
        "messages",
        "messages",
        "https://platform.openai.com/docs/guides/supervised-fine-tuning",
        _is_messages,
        _read_messages,
    ),
)
TITLES = {log_format.name: log_format.title for log_format in FORMATS}
