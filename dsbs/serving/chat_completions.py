"""OpenAI-compatible completions and chat completions (OpenAI API reference, "Completions", "Chat").

A student reads one input and decodes greedily. Options that would change the answer but are not
supported are refused, so that no client mistakes one answer for another. Options that change
nothing (a seed, a user's name, unknown fields) are ignored.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from dsbs.serving.cascade import Routed
from dsbs.serving.model import Completion
from dsbs.serving.settings import ApiError
from dsbs.tasks import Task

_SMALLEST = 1e-30  # a probability of 0 has no finite logarithm, which JSON cannot hold


class PredictForm(BaseModel, frozen=True, extra="forbid"):
    """The body of ``POST /predict``."""

    inputs: list[Any]  # texts, or rows of fields
    rationale: bool = False
    max_label_tokens: int | None = Field(None, ge=1)  # None: the student's
    distribution: bool = False  # label heads always give it


class _Form(BaseModel, frozen=True, extra="ignore"):
    model: str | None = None  # ignored: the response names the student
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    n: int | None = None
    stream: bool | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    response_format: Any = None

    @property
    def top(self) -> int | None:
        """How many labels to give with their log-probabilities; None: no log-probabilities."""
        raise NotImplementedError

    def check_supported(self, *, has_distribution: bool) -> None:
        """Raises ApiError (400) for an option that a student does not support.

        ``has_distribution``: it has a probability for every label.
        """
        if self.top is not None and not has_distribution:
            raise _unsupported("logprobs", "POST /predict returns the label's probability")
        if self.temperature:
            raise _unsupported("temperature", "decoding is greedy; send 0 or leave it out")
        if self.n not in (None, 1):
            raise _unsupported("n", "there is one answer per input; send 1 or leave it out")
        if self.stream:
            raise _unsupported(
                "stream", "answers are short and sent whole; send false or leave it out"
            )
        if self.presence_penalty or self.frequency_penalty or self.logit_bias:
            raise _unsupported(
                "presence_penalty, frequency_penalty, logit_bias",
                "decoding is greedy; leave them out",
            )
        if any(not stop for stop in self.stops):
            raise ApiError(400, "stop: an empty string", "invalid_value")

    def json_names(self, task: Task, *, explains: bool) -> tuple[str, ...] | None:
        """The members of the JSON object that ``response_format`` asks for; (): the label as JSON.

        None: text. ``explains``: replies have a rationale. Raises ApiError (400) where the label
        has no other form than its text, or the schema has no place for it.
        """
        requested = {"type": "text"} if self.response_format is None else self.response_format
        kind = requested.get("type") if isinstance(requested, dict) else None
        if kind == "text":
            return None
        form = task.label_schema()["type"]
        if kind not in ("json_object", "json_schema") or form == "string":
            raise _unsupported(
                "response_format",
                'the format is the one learned in training; send {"type": "text"} or leave it out',
            )
        properties: Any = requested if kind == "json_schema" else {}
        for key in ("json_schema", "schema", "properties"):
            properties = properties.get(key) if isinstance(properties, dict) else None
        names = tuple(map(str, properties)) if isinstance(properties, dict) else ()
        if not names or (form == "object" and set(names) == set(task.part_names)):
            return ()
        if "rationale" in names and not explains:
            raise _unsupported(
                "response_format", "the schema has a rationale; serve with --reply step-by-step"
            )
        are_fields = form == "object" and not set(names).isdisjoint(task.part_names)
        if are_fields or len(set(names) - {"rationale"}) != 1:
            fields = f" or the fields {', '.join(task.part_names)}" if form == "object" else ""
            raise _unsupported(
                "response_format",
                f"the schema has {', '.join(names)}; the answer is one {form}: give one name for "
                f"it{fields}",
            )
        return names

    @property
    def stops(self) -> list[str]:
        """Texts at which an answer is cut."""
        if isinstance(self.stop, str):
            return [self.stop]
        return self.stop or []


class CompletionForm(_Form):
    """The body of ``POST /v1/completions``."""

    # The student's input as the task renders it; a JSON object where the task needs fields.
    prompt: str | list[str]
    logprobs: int | None = Field(None, ge=0)
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs

    def check_supported(self, *, has_distribution: bool) -> None:
        super().check_supported(has_distribution=has_distribution)
        if self.best_of not in (None, 1) or self.echo or self.suffix:
            raise _unsupported("best_of, echo, suffix", "leave them out")

    @property
    def inputs(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class _TextPart(BaseModel, frozen=True):
    type: Literal["text"]
    text: str


class _Message(BaseModel, frozen=True, extra="ignore"):
    role: str
    content: str | list[_TextPart] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content or ())


class ChatForm(_Form):
    """The body of ``POST /v1/chat/completions``."""

    messages: list[_Message]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def check_supported(self, *, has_distribution: bool) -> None:
        super().check_supported(has_distribution=has_distribution)
        choices = {str(choice) for choice in (self.tool_choice, self.function_call)}
        if self.tools or self.functions or choices - {"None", "none"}:
            raise _unsupported("tools, tool_choice, functions, function_call", "leave them out")

    @property
    def input(self) -> str:
        """The user's message. Raises ApiError (400) where there is another number of them.

        System messages are ignored: the student was trained for what they would say.
        """
        messages = [
            message for message in self.messages if message.role not in ("system", "developer")
        ]
        if len(messages) != 1 or messages[0].role != "user":
            raise ApiError(
                400,
                "messages: a student answers one user message, its input; it does not read "
                "examples or earlier turns",
                "invalid_value",
            )
        return messages[0].text


def _unsupported(option: str, advice: str) -> ApiError:
    return ApiError(400, f"{option}: not supported by a student: {advice}", "unsupported_value")


def completions_response(
    student: str, answers: Sequence[Routed], stops: Sequence[str], top: int | None = None
) -> dict[str, Any]:
    """The response body of a completion; texts end before the first of ``stops``.

    ``top``: as the form's. A label counts as one token.
    """
    completions = [_completion(answer) for answer in answers]
    choices = [
        {
            "index": index,
            **_stopped(completion, stops),
            "logprobs": _completion_logprobs(completion, top),
            **answer.fields(),
        }
        for index, (answer, completion) in enumerate(zip(answers, completions, strict=True))
    ]
    return _response("cmpl", "text_completion", student, choices, completions)


def chat_response(
    student: str, answer: Routed, stops: Sequence[str], top: int | None = None
) -> dict[str, Any]:
    """The response body of a chat completion. ``top``: as the form's."""
    completion = _completion(answer)
    stopped = _stopped(completion, stops)
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": stopped["text"], "refusal": None},
        "finish_reason": stopped["finish_reason"],
        "logprobs": _chat_logprobs(completion, top),
        **answer.fields(),
    }
    return _response("chatcmpl", "chat.completion", student, [choice], [completion])


def _completion(answer: Routed) -> Completion:
    completion = answer.outcome.completion
    assert completion is not None  # the options of these routes ask for one
    return completion


def _likeliest(distribution: dict[str, float]) -> list[tuple[str, float]]:
    """Labels with their log-probabilities in nats, the likeliest first."""
    ordered = sorted(distribution.items(), key=lambda item: -item[1])
    return [(label, math.log(max(share, _SMALLEST))) for label, share in ordered]


def _answer_first(completion: Completion, labels: Sequence[tuple[str, float]]) -> tuple[str, float]:
    """The label that was given, which is not the likeliest on a scale; else the likeliest."""
    return next((pair for pair in labels if pair[0] == completion.label), labels[0])


def _completion_logprobs(completion: Completion, top: int | None) -> dict[str, Any] | None:
    if top is None or completion.distribution is None:
        return None
    labels = _likeliest(completion.distribution)
    label, logprob = _answer_first(completion, labels)
    return {
        "tokens": [label],
        "token_logprobs": [logprob],
        "top_logprobs": [dict(labels[:top])],
        "text_offset": [0],
    }


def _chat_logprobs(completion: Completion, top: int | None) -> dict[str, Any] | None:
    if top is None or completion.distribution is None:
        return None
    labels = _likeliest(completion.distribution)
    answer, *entries = [
        {"token": label, "logprob": logprob, "bytes": list(label.encode())}
        for label, logprob in (_answer_first(completion, labels), *labels)
    ]
    return {"content": [answer | {"top_logprobs": entries[:top]}], "refusal": None}


def _stopped(completion: Completion, stops: Sequence[str]) -> dict[str, str]:
    positions = [completion.text.find(stop) for stop in stops]
    end = min((position for position in positions if position >= 0), default=None)
    if end is None:
        return {"text": completion.text, "finish_reason": completion.finish_reason}
    return {"text": completion.text[:end], "finish_reason": "stop"}


def _response(
    prefix: str,
    kind: str,
    student: str,
    choices: list[dict[str, Any]],
    completions: Sequence[Completion],
) -> dict[str, Any]:
    prompt_tokens = sum(completion.prompt_tokens for completion in completions)
    completion_tokens = sum(completion.completion_tokens for completion in completions)
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": student,
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }
