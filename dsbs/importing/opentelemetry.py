"""OpenTelemetry's GenAI conventions: spans, span events and log records.

Messages are in attributes (``gen_ai.input.messages``, numbered ones before them), in span events,
or in log records of their own, which the ids of trace and span join.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from dsbs.importing.bodies import (
    Record,
    Unusable,
    Usage,
    id_text,
    object_or_empty,
    parsed,
    role_of,
    text_of,
    with_reply,
    with_request,
)

Object = dict[str, Any]


def is_opentelemetry(value: Object) -> bool:
    if "resourceSpans" in value or "resourceLogs" in value:
        return True
    return any(name.startswith("gen_ai.") for name in _attributes(value.get("attributes")))


def read_opentelemetry(value: Object) -> Iterator[Record]:
    """Spans with their events, and events that are log records of their own."""
    for resource in value.get("resourceSpans") or ():
        for scope in resource.get("scopeSpans") or ():
            for span in scope.get("spans") or ():
                yield from _read_span(span)
    for resource in value.get("resourceLogs") or ():
        for scope in resource.get("scopeLogs") or ():
            for entry in scope.get("logRecords") or ():
                yield from _read_event(entry)
    if "attributes" in value:  # one span or event, as exporters to files and consoles write it
        is_event = "body" in value or "eventName" in value
        yield from _read_event(value) if is_event else _read_span(value)


def _attributes(value: Any) -> Object:
    """Attributes by name: an object, or OTLP's list of keys and typed values."""
    if isinstance(value, dict):
        return value
    entries = value if isinstance(value, list) else ()
    return {
        str(entry.get("key")): _otlp_value(entry.get("value"))
        for entry in entries
        if isinstance(entry, dict)
    }


def _otlp_value(value: Any) -> Any:
    if not isinstance(value, dict) or len(value) != 1:
        return value
    ((kind, inner),) = value.items()
    if kind == "arrayValue":
        return [_otlp_value(entry) for entry in (inner or {}).get("values") or ()]
    if kind == "kvlistValue":
        return _attributes((inner or {}).get("values"))
    if kind == "intValue":
        with suppress(TypeError, ValueError):
            return int(inner)
    return inner if kind.endswith("Value") else value


def _span_key(value: Object) -> str | None:
    context = object_or_empty(value.get("context"))
    ids = [
        value.get(name) or context.get(other)
        for name, other in (("traceId", "trace_id"), ("spanId", "span_id"))
    ]
    if not all(ids):
        ids = [value.get("trace_id"), value.get("span_id")]
    return ":".join(map(str, ids)) if all(ids) else None


def _read_span(span: Object) -> Iterator[Record]:
    attributes = _attributes(span.get("attributes"))
    for event in span.get("events") or ():
        if isinstance(event, dict) and str(event.get("name")).startswith("gen_ai.content."):
            attributes |= _attributes(event.get("attributes"))
    if not any(name.startswith("gen_ai.") for name in attributes):
        return
    key = _span_key(span)
    record = _from_attributes(attributes)
    record.id = key or id_text(attributes.get("gen_ai.response.id"))
    if record.messages is None and record.completion is None and record.problem is None:
        events = [e for e in span.get("events") or () if isinstance(e, dict)]
        for event in events:
            _add_event(record, str(event.get("name")), _attributes(event.get("attributes")))
    if record.problem is None and record.completion is None and record.messages is None:
        if attributes.get("gen_ai.operation.name") in (None, "chat", "text_completion"):
            record.key, record.half = key, "reply"  # its messages may be log records
            record.problem = "no messages in the span"
            yield record
        return
    yield record


def _from_attributes(attributes: Object) -> Record:
    record = Record(
        model=id_text(attributes.get("gen_ai.response.model"))
        or id_text(attributes.get("gen_ai.request.model")),
        usage=Usage.of(
            attributes.get(
                "gen_ai.usage.input_tokens", attributes.get("gen_ai.usage.prompt_tokens")
            ),
            attributes.get(
                "gen_ai.usage.output_tokens", attributes.get("gen_ai.usage.completion_tokens")
            ),
        ),
    )
    prompt = parsed(attributes.get("gen_ai.input.messages", attributes.get("gen_ai.prompt")))
    reply = parsed(attributes.get("gen_ai.output.messages", attributes.get("gen_ai.completion")))
    system = parsed(attributes.get("gen_ai.system_instructions"))
    prompt = prompt or _numbered(attributes, "gen_ai.prompt.")
    reply = reply or _numbered(attributes, "gen_ai.completion.")
    if prompt:
        body = {"messages": prompt} if isinstance(prompt, list) else {"prompt": prompt}
        with_request(record, body | ({"system": system} if system else {}))
    if reply:
        message = reply[-1] if isinstance(reply, list) else reply
        message = message if isinstance(message, dict) else {"content": message}
        finish = message.get("finish_reason") or _first(
            attributes.get("gen_ai.response.finish_reasons")
        )
        with_reply(record, {"choices": [{"message": message, "finish_reason": finish}]})
    return record


def _first(value: Any) -> Any:
    value = parsed(value)
    return value[0] if isinstance(value, list) and value else None


def _numbered(attributes: Object, prefix: str) -> list[Object]:
    """Messages in attributes such as ``gen_ai.prompt.0.role`` (OpenLLMetry before 0.50)."""
    messages: dict[int, Object] = {}
    for name, value in attributes.items():
        number, _, part = name.removeprefix(prefix).partition(".")
        if name.startswith(prefix) and number.isdecimal() and part:
            messages.setdefault(int(number), {})[part] = value
    return [messages[number] for number in sorted(messages)]


def _read_event(entry: Object) -> Iterator[Record]:
    """A message of a call, or all of it, in a log record."""
    attributes = _attributes(entry.get("attributes"))
    name = str(entry.get("eventName") or attributes.get("event.name") or "")
    if name == "gen_ai.client.inference.operation.details":
        record = _from_attributes(attributes)
        record.id = _span_key(entry)
        yield record
    elif name.startswith("gen_ai."):
        record = Record(key=_span_key(entry), id=_span_key(entry), is_part=True)
        body = _otlp_value(entry.get("body"))
        _add_event(record, name, attributes | object_or_empty(body))
        record.half = "request" if record.messages else "reply"
        if record.messages or record.completion or record.problem:
            yield record


def _add_event(record: Record, name: str, values: Object) -> None:
    """Add the message of an event ``gen_ai.*.message`` or ``gen_ai.choice`` to a record."""
    message = parsed(values.get("message"))
    if name == "gen_ai.choice":
        message = (
            message if isinstance(message, dict) else {"content": message or values.get("content")}
        )
        finish = values.get("finish_reason")
        with_reply(record, {"choices": [{"message": message, "finish_reason": finish}]})
    elif name.endswith(".message"):
        role = role_of(values.get("role") or name.split(".")[1])
        try:
            text = text_of(parsed(values.get("content")))
        except Unusable as problem:
            record.problem = problem.reason
            return
        record.messages = [*(record.messages or ()), (role, text)]
