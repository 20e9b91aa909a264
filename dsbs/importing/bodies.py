"""Request and response bodies of the chat APIs: their messages, completion and token counts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from dsbs.annotation.thoughts import read_message

Message = tuple[str, str]  # role and text

_ROLES = {"developer": "system", "human": "user", "model": "assistant", "ai": "assistant"}
_TOOL_PARTS = {
    "tool_use", "tool_result", "tool_call", "tool_call_response", "function_call", "toolUse",
    "toolResult", "server_tool_use", "function_call_output",
}  # fmt: skip
_MEDIA = {
    "image", "image_url", "input_image", "input_audio", "audio", "document", "file", "input_file",
    "video", "blob", "uri",
}  # fmt: skip
_TRUNCATED = {"length", "max_tokens", "MAX_TOKENS", "max_output_tokens", "LENGTH"}
_TOOL_STOPS = {"tool_calls", "tool_use", "tool_call", "function_call"}


class Unusable(Exception):  # noqa: N818 -- a verdict, not a failure
    """A call that gives no row, and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a call. None: the log does not say."""

    prompt: int | None = None
    completion: int | None = None

    @classmethod
    def of(cls, prompt: Any, completion: Any) -> Usage:
        return cls(_token_count(prompt), _token_count(completion))


def _token_count(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal():
        value = int(value[:18])
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number and 0 <= value < 1 << 50 else None


def parsed(value: Any) -> Any:
    """A value that may be JSON in a string."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def object_or_empty(value: Any) -> dict[str, Any]:
    """A JSON object; {} for anything else."""
    return value if isinstance(value, dict) else {}


def role_of(value: Any) -> str:
    role = str(value or "user").lower()
    return _ROLES.get(role, role)


def text_of(content: Any) -> str:
    """The text of a message's content: a string, or parts. Raises Unusable for other media."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise Unusable("not text")
    return "".join(_part_text(part) for part in content)


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise Unusable("not text")
    kind = part.get("type")
    if kind in _TOOL_PARTS or _TOOL_PARTS & part.keys():
        raise Unusable("tool calls")
    if kind in _MEDIA or _MEDIA & part.keys():
        raise Unusable("images or files")
    text = part.get("text", part.get("content"))
    return text if isinstance(text, str) else ""


# --- requests


def is_request(body: dict[str, Any]) -> bool:
    """Whether an object is the body of a request."""
    if isinstance(body.get("messages"), list):
        return True
    return any(
        isinstance(body.get(name), str | list)
        for name in ("input", "prompt", "inputText", "contents")
    ) or (isinstance(body.get("message"), str) and "choices" not in body)


def messages_of(body: Any) -> list[Message]:
    """The messages of a request's body: chat, Responses and completions of OpenAI, Anthropic,
    Bedrock's Converse, and the bodies of its models.

    Raises Unusable where there is no text, or more than text.
    """
    if isinstance(body, list):
        body = {"messages": body}
    if not isinstance(body, dict):
        raise Unusable("no prompt")
    messages = [("system", text) for text in _system_texts(body)]
    listed = body.get("messages") or body.get("contents")
    if listed is None and isinstance(body.get("input"), list):
        listed = body["input"]
    if isinstance(listed, list):
        messages += [_message(entry) for entry in listed]
    else:
        names = ("prompt", "input", "inputText", "message")
        prompt = next((body[name] for name in names if body.get(name)), None)
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise Unusable("no prompt")
        messages.append(("user", prompt))
    messages = [(role, _encodable(text)) for role, text in messages]
    if not any(text.strip() for _, text in messages):
        raise Unusable("no prompt")
    return messages


def _system_texts(body: dict[str, Any]) -> Iterator[str]:
    for name in ("system", "instructions", "systemInstruction"):
        value = body.get(name)
        if isinstance(value, dict):
            value = value.get("parts", value.get("text"))
        if isinstance(value, list):
            value = "\n\n".join(filter(None, map(_part_text, value)))
        if isinstance(value, str) and value.strip():
            yield value


def _message(entry: Any) -> Message:
    if not isinstance(entry, dict):
        raise Unusable("no prompt")
    role = role_of(entry.get("role"))
    kind = entry.get("type")
    is_tool = role in ("tool", "function") or kind in _TOOL_PARTS
    if is_tool or entry.get("tool_calls") or entry.get("function_call"):
        raise Unusable("tool calls")
    if kind == "reasoning":
        return role, ""
    content = entry.get("content", entry.get("parts"))
    return role, text_of(content)


# --- replies


def is_reply(body: Any) -> bool:
    """Whether a value is the body of a response."""
    if isinstance(body, list):
        return bool(body) and all(isinstance(event, dict) for event in body)
    if not isinstance(body, dict):
        return False
    is_message = body.get("type") == "message" and isinstance(body.get("content"), list)
    return is_message or any(
        isinstance(body.get(name), list | dict)
        for name in ("choices", "output", "results", "outputs", "generations", "candidates")
    )


def completion_of(body: Any) -> tuple[str, str | None]:
    """The text of a response's body, and separate reasoning (None: there is none).

    Raises Unusable for errors, tool calls, truncated and empty replies, and lone fragments of a
    stream; the events of a whole stream are joined.
    """
    if isinstance(body, list):
        body = _joined(body)
    if isinstance(body, str):
        if body.startswith("data:"):
            return completion_of(_server_events(body))
        raise Unusable("not JSON")
    if not isinstance(body, dict):
        raise Unusable("no reply")
    if body.get("error") or body.get("status") == "failed":
        raise Unusable("error")
    if str(body.get("object", "")).endswith(".chunk"):
        raise Unusable("streaming fragment")
    message, finish = _reply_message(body)
    if finish in _TOOL_STOPS or _has_tools(message):
        raise Unusable("tool calls")
    if finish in _TRUNCATED:
        raise Unusable("truncated")
    text, reasoning = read_message(message)
    if finish in ("content_filter", "refusal", "SAFETY") or message.get("refusal"):
        raise Unusable("refused")
    if not text.strip():
        raise Unusable("no reply")
    return text, reasoning


def _has_tools(message: dict[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else ()
    return bool(message.get("tool_calls") or message.get("function_call")) or any(
        isinstance(part, dict) and (part.get("type") in _TOOL_PARTS or _TOOL_PARTS & part.keys())
        for part in parts
    )


def _reply_message(body: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """A response's message, as the chat API has it, and why it ended."""
    choices = body.get("choices")
    if isinstance(choices, list):
        choice = object_or_empty(choices[0]) if choices else {}
        message = choice.get("message")
        if isinstance(message, str) or message is None:
            message = {"content": message or choice.get("text")}
        if not isinstance(message, dict):
            raise Unusable("no reply")
        if "parts" in message and "content" not in message:  # OpenTelemetry
            message = message | {"content": [_chat_part(part) for part in message["parts"]]}
        return message, choice.get("finish_reason")
    output = body.get("output")
    if isinstance(output, list):  # Responses API
        return _responses_message(output), (body.get("incomplete_details") or {}).get("reason")
    if isinstance(output, dict) and isinstance(output.get("message"), dict):  # Converse
        message = output["message"]
        parts = [_chat_part(part) for part in message.get("content") or ()]
        return message | {"content": parts}, body.get("stopReason")
    if isinstance(body.get("content"), list):  # Anthropic
        return {"content": body["content"]}, body.get("stop_reason")
    return _model_message(body)


def _chat_part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    if "reasoningContent" in part:
        inner = object_or_empty(object_or_empty(part["reasoningContent"]).get("reasoningText"))
        return {"type": "reasoning", "text": inner.get("text", "")}
    if "content" in part and "text" not in part:
        return {"type": part.get("type"), "text": part["content"]}
    return part


def _responses_message(output: list[Any]) -> dict[str, Any]:
    parts: list[Any] = []
    for item in output:
        if not isinstance(item, dict):
            continue
        kind = item.get("type")
        if kind == "message":
            for part in item.get("content") or ():
                if isinstance(part, dict) and part.get("type") == "refusal":
                    raise Unusable("refused")
                parts.append(part)
        elif kind == "reasoning":
            summary = item.get("summary") or item.get("content") or ()
            parts += [{"type": "reasoning", "text": text_of(part)} for part in summary]
        elif str(kind).endswith("_call"):
            raise Unusable("tool calls")
    return {"content": parts}


# Replies of Bedrock's models and Gemini: where the text is, and why it ended.
_MODEL_REPLIES = (
    ("results", "outputText", "completionReason"),
    ("outputs", "text", "stop_reason"),
    ("generations", "text", "finish_reason"),
)


def _model_message(body: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    for name, text, finish in _MODEL_REPLIES:
        entries = body.get(name)
        if isinstance(entries, list) and entries and isinstance(entries[0], dict):
            return {"content": entries[0].get(text)}, entries[0].get(finish)
    for name in ("generation", "completion", "outputText", "text"):
        if isinstance(body.get(name), str):
            return {"content": body[name]}, body.get("stop_reason") or body.get("finish_reason")
    raise Unusable("no reply")


def _server_events(text: str) -> list[Any]:
    """The events of a stream that was logged as text."""
    lines = (line[5:].strip() for line in text.splitlines() if line.startswith("data:"))
    return [parsed(line) for line in lines if line != "[DONE]"]


def _joined(events: Iterable[Any]) -> dict[str, Any]:
    """The reply that a stream's events spell: OpenAI, Anthropic, Converse, Titan, Llama."""
    texts: list[str] = []
    thoughts: list[str] = []
    finish = None
    usage: dict[str, Any] = {}
    model = None
    for event in events:
        if not isinstance(event, dict):
            continue
        if event.get("type") == "error" or event.get("error"):
            raise Unusable("error")
        delta, stop = _delta(event)
        if _has_tools(delta) or "partial_json" in delta or "toolUse" in delta:
            raise Unusable("tool calls")
        text = delta.get("text") or delta.get("content") or delta.get("outputText")
        texts.append(text if isinstance(text, str) else "")
        thought = delta.get("thinking") or delta.get("reasoning_content")
        thoughts.append(thought if isinstance(thought, str) else "")
        finish = stop or finish
        inner = object_or_empty(event.get("message"))
        model = event.get("model") or inner.get("model") or model
        for holder in (inner, object_or_empty(event.get("metadata")), event):
            usage |= object_or_empty(holder.get("usage"))
    if finish is None and not any(texts):
        raise Unusable("streaming fragment")
    message = {"content": "".join(texts), "reasoning_content": "".join(thoughts)}
    choice = {"message": message, "finish_reason": finish}
    return {"choices": [choice], "usage": usage, "model": model}


def _delta(event: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The new part in an event of a stream, and why the stream ended."""
    choices = event.get("choices")
    if isinstance(choices, list):
        choice = object_or_empty(choices[0]) if choices else {}
        return object_or_empty(choice.get("delta")), choice.get("finish_reason")
    block = event.get("contentBlockDelta") or event.get("messageStop")
    if isinstance(block, dict):
        return object_or_empty(block.get("delta")), block.get("stopReason")
    delta = event.get("delta")
    if isinstance(delta, dict):
        return delta, delta.get("stop_reason")
    text = event.get("generation") or event.get("outputText") or event.get("completion")
    return {"text": text}, event.get("stop_reason") or event.get("completionReason")


def usage_of(body: Any) -> Usage:
    """The token counts that a response's body states."""
    if isinstance(body, list):
        totals = [usage_of(event.get("message")) for event in body if isinstance(event, dict)]
        totals += [usage_of(event.get("metadata")) for event in body if isinstance(event, dict)]
        totals += [usage_of(event) for event in body if isinstance(event, dict)]
        prompts = [usage.prompt for usage in totals if usage.prompt]
        completions = [usage.completion for usage in totals if usage.completion]
        return Usage(max(prompts, default=None), max(completions, default=None))
    if not isinstance(body, dict):
        return Usage()
    usage = body.get("usage")
    if isinstance(usage, dict):
        prompt = usage.get("prompt_tokens", usage.get("input_tokens", usage.get("inputTokens")))
        names = ("completion_tokens", "output_tokens", "outputTokens")
        return Usage.of(prompt, next((usage[name] for name in names if name in usage), None))
    return Usage.of(body.get("prompt_token_count"), body.get("generation_token_count"))


def _encodable(text: str) -> str:
    """``text`` without lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()


# --- calls


@dataclass(slots=True)
class Record:
    """A call, or the half of one that a log entry has.

    ``key`` joins a ``half`` to the other one; ``is_part`` marks one of several messages of a
    request. ``problem`` says why the entry gives no row.
    """

    messages: list[tuple[str, str]] | None = None
    completion: str | None = None
    reasoning: str | None = None
    id: str | None = None
    key: str | None = None
    half: Literal["request", "reply"] | None = None
    is_part: bool = False
    model: str | None = None
    usage: Usage = field(default_factory=Usage)
    problem: str | None = None
    gold: Any = None


def call_of(
    request: Any, reply: Any, *, record_id: Any = None, model: Any = None, gold: Any = None
) -> Record:
    """A whole call, from its two bodies."""
    record = Record(id=id_text(record_id), model=id_text(model), gold=gold)
    return with_reply(with_request(record, request), reply)


def with_request(record: Record, request: Any) -> Record:
    try:
        record.messages = messages_of(parsed(request))
    except Unusable as problem:
        record.problem = problem.reason
    if isinstance(request, dict):
        record.model = record.model or id_text(request.get("model"))
    return record


def with_reply(record: Record, reply: Any) -> Record:
    reply = parsed(reply)
    usage = usage_of(reply)
    record.usage = record.usage if usage == Usage() else usage
    if isinstance(reply, dict):
        record.model = id_text(reply.get("model")) or record.model
        record.id = record.id or id_text(reply.get("id"))
    try:
        record.completion, record.reasoning = completion_of(reply)
    except Unusable as problem:
        record.problem = record.problem or problem.reason
    return record


def id_text(value: Any) -> str | None:
    if isinstance(value, str | int) and not isinstance(value, bool):
        return str(value).strip() or None
    return None
