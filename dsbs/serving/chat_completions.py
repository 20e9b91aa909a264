"""OpenAI's completions and chat completions over a student (OpenAI API reference, "Completions" and "Chat").

A student reads its input alone and decodes greedily. What would change the answer and cannot be done is refused, so that no
client takes one answer for another; what changes nothing (a seed, a user's name, fields unknown here) is left aside.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from dsbs.serving.model import Completion
from dsbs.serving.settings import ApiError


class _Form(BaseModel, frozen=True, extra="ignore"):
    model: str | None = None  # whatever it says: the answer names the student that gave it
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    n: int | None = None
    stream: bool | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    response_format: Any = None

    def refuse(self) -> None:
        """Raises Refused (400) for what a student cannot do."""
        if self.temperature:
            raise _cannot("temperature", "it decodes greedily; send 0 or leave it out")
        if self.n not in (None, 1):
            raise _cannot("n", "it has one answer to an input; send 1 or leave it out")
        if self.stream:
            raise _cannot(
                "stream", "its answers are short and come whole; send false or leave it out"
            )
        if self.presence_penalty or self.frequency_penalty or self.logit_bias:
            raise _cannot(
                "presence_penalty, frequency_penalty, logit_bias",
                "it decodes greedily; leave them out",
            )
        asked = self.response_format
        if asked is not None and not (isinstance(asked, dict) and asked.get("type") == "text"):
            raise _cannot(
                "response_format",
                'it writes what it learned to; send {"type": "text"} or leave it out',
            )
        if any(not mark for mark in self.marks):
            raise ApiError(400, "stop: an empty text", "invalid_value")

    @property
    def marks(self) -> list[str]:
        """Where an answer is cut."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionForm(_Form):
    prompt: (
        str | list[str]
    )  # the student's input as the task renders it; a row of fields as JSON where the task needs them
    logprobs: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    def refuse(self) -> None:
        super().refuse()
        if self.logprobs is not None:
            raise _cannot("logprobs", "POST /predict gives the probability of the whole label")
        if self.best_of not in (None, 1) or self.echo or self.suffix:
            raise _cannot("best_of, echo, suffix", "leave them out")

    @property
    def inputs(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class _Part(BaseModel, frozen=True):
    type: Literal["text"]
    text: str


class _Message(BaseModel, frozen=True, extra="ignore"):
    role: str
    content: str | list[_Part] | None = None

    @property
    def text(self) -> str:
        return (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content or ())
        )


class ChatForm(_Form):
    messages: list[_Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None

    def refuse(self) -> None:
        super().refuse()
        if self.logprobs:
            raise _cannot("logprobs", "POST /predict gives the probability of the whole label")
        chosen = {str(one) for one in (self.tool_choice, self.function_call)} - {"None", "none"}
        if self.tools or self.functions or chosen:
            raise _cannot("tools, tool_choice, functions, function_call", "leave them out")

    @property
    def input(self) -> str:
        """The user's message. A system's is left aside: what it may say, the student was trained for. Raises Refused (400)."""
        said = [message for message in self.messages if message.role not in ("system", "developer")]
        if len(said) != 1 or said[0].role != "user":
            raise ApiError(
                400,
                "messages: a student answers one user message, its input, and reads no examples or earlier turns",
                "invalid_value",
            )
        return said[0].text


def _cannot(what: str, instead: str) -> ApiError:
    return ApiError(400, f"{what}: a student cannot do that: {instead}", "unsupported_value")


def completions_body(name: str, made: Sequence[Completion], marks: Sequence[str]) -> dict[str, Any]:
    """The body of an answer by the student ``name``; texts end before the first of ``marks``."""
    choices = [
        {"index": index, **_ended(one, marks), "logprobs": None} for index, one in enumerate(made)
    ]
    return _body("cmpl", "text_completion", name, choices, made)


def chat_body(name: str, made: Completion, marks: Sequence[str]) -> dict[str, Any]:
    """The same for a chat."""
    ended = _ended(made, marks)
    message = {"role": "assistant", "content": ended["text"], "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": ended["finish_reason"],
        "logprobs": None,
    }
    return _body("chatcmpl", "chat.completion", name, [choice], [made])


def _ended(made: Completion, marks: Sequence[str]) -> dict[str, str]:
    at = min((found for mark in marks if (found := made.text.find(mark)) >= 0), default=None)
    if at is None:
        return {"text": made.text, "finish_reason": made.finish_reason}
    return {"text": made.text[:at], "finish_reason": "stop"}


def _body(
    prefix: str, kind: str, name: str, choices: list[dict[str, Any]], made: Sequence[Completion]
) -> dict[str, Any]:
    prompt, written = (
        sum(one.prompt_tokens for one in made),
        sum(one.completion_tokens for one in made),
    )
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }
    about = {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
    }
    return {**about, "choices": choices, "usage": usage}
