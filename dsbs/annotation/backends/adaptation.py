"""Adaptation: the parameters of a request that an endpoint refuses are renamed or left out.

Reasoning models take ``max_completion_tokens`` and no temperature, some chat templates have no
system role, few endpoints know every field of the API. Which ones is learned from the endpoint's
own refusals, once for a run, and kept in its store, so that later commands begin with the form that
was accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_LIMITS = ("max_tokens", "max_completion_tokens")
_FIXED = ("model", "messages", "prompt")  # what a request cannot do without
DEFAULT_REPLY_TOKENS = 16_384  # of a chat model behind an API: thoughts included
_MAX_CHARACTERS = 4000  # of an error that are read
_ECHOED = ("input", "url", "request", "body", "messages", "prompt", "content", "ctx")
# beside 400: FastAPI's and Mistral's 422, OpenAI's 403 for log-probabilities, and template errors
# of llama.cpp and mistral.rs (500)
_STATUSES = (400, 403, 422, 500, 501)

_REFUSES = re.compile(
    r"unsupported|unrecogni|unknown|unexpected|unavailable|incompatible|deprecated|no longer"
    r"|not (?:be |currently |yet )?(?:support|accept|allow|permit|recogni|available|enabled)"
    r"|n't (?:support|accept|allow|recogni|compat)|extra (?:inputs|fields)|extra_forbidden"
    r"|(?:can|may|must|should)(?: ?not|'t) (?:both )?be|may only be|is disabled|mutually exclusive"
    r"|only (?:the default|supports?|1 is|temperature ?= ?1)|must be (?:set to )?1\b|remove "
    r"|not one of the allowed|not an? (?:allowed|accepted|supported|valid) (?:param|arg|field)"
    r"|cannot find field|invalid schema"
)
# a wrong value is the recipe's mistake, not a parameter that the model lacks
_WRONG_VALUE = re.compile(r"(?:supported|valid|allowed|accepted|possible) (?:values|options)")
_TOO_LARGE = re.compile(
    r"too (?:large|high|big)|maximum|context|valid range|less than|at most|exceed|> ?\d|<= ?\d"
)
_ROLE = r"(?:system|developer)"
_NO_SYSTEM = re.compile(
    rf"{_ROLE} (?:role|message|prompt|instruction)s?\b.{{0,40}}(?:n't|not)\b"
    rf"|(?:n't|not) (?:support|accept|allow|have|recogni\w+)\W+(?:an? |the )?'?{_ROLE}\b"
    rf"|role\W{{1,3}}{_ROLE}\W.{{0,20}}(?:n't|not)"
    rf"|(?:unexpected|unsupported|unknown|invalid) (?:chat |message )?role\W+{_ROLE}"
    rf"|{_ROLE}\W{{0,2}} is not (?:one of|a valid)|roles? must be.{{0,12}}user"
    r"|roles must alternate|only user(?:,| and) (?:assistant|model)"
)


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a request: the parameter ``name`` is renamed or its value replaced.

    ``replacement`` None: it is left out. The names ``system`` and ``developer`` are roles of the
    first message, ``response_format`` has a kind of format as its replacement.
    """

    name: str
    replacement: str | None = None

    def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        """The changed body; the same object where there is nothing to change."""
        if self.name in ("system", "developer"):
            return self._apply_role(body)
        if self.name not in body:
            return body
        changed = {name: value for name, value in body.items() if name != self.name}
        if self.name == "response_format" and self.replacement is not None:
            if body[self.name].get("type") != "json_schema":
                return body
            changed[self.name] = {"type": self.replacement}
        elif self.replacement is not None:
            changed.setdefault(self.replacement, body[self.name])
        return changed

    def _apply_role(self, body: dict[str, Any]) -> dict[str, Any]:
        messages = body.get("messages") or [{}]
        first = messages[0]
        if first.get("role") != self.name:
            return body
        if self.replacement == "developer":
            return body | {"messages": [first | {"role": "developer"}, *messages[1:]]}
        rest = messages[1:]
        content = first["content"]
        if rest and rest[0]["role"] == "user":
            content = f"{content}\n\n{rest[0]['content']}"
            rest = rest[1:]
        return body | {"messages": [{"role": "user", "content": content}, *rest]}

    def __str__(self) -> str:
        if self.name in ("system", "developer"):
            if self.replacement == "developer":
                return "the system role is sent as developer"
            return "the instruction is sent in the user's turn, without a system role"
        if self.replacement is None:
            return f"{self.name} is left out"
        if self.name == "response_format":
            return f"response_format is sent as {self.replacement}"
        return f"{self.name} is sent as {self.replacement}"


class Adaptation:
    """The changes that one endpoint needs for one model, in the order in which they were learned.

    ``on_change`` is called with each new change.
    """

    def __init__(self, changes: tuple[Change, ...] = ()) -> None:
        self.changes = changes
        self.on_change: Callable[[Change], None] = lambda _change: None

    def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body in the form that the endpoint accepts."""
        for change in self.changes:
            body = change.apply(body)
        return body

    def forms(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The forms in which the body may have been sent, the present one first."""
        forms = [body]
        for change in self.changes:
            changed = change.apply(forms[0])
            if changed is not forms[0]:
                forms.insert(0, changed)
        return forms

    def learn(self, status: int, error: bytes, sent: dict[str, Any], body: dict[str, Any]) -> bool:
        """Learn from a refusal of ``sent``, a form of ``body``; whether to send ``body`` again.

        There is no point where its present form is the one that was refused.
        """
        if status not in _STATUSES:
            return False
        for change in refused(status, error, sent):
            self._add(change)
        return self.apply(body) != sent

    def _add(self, change: Change) -> None:
        if Change(str(change.replacement), change.name) in self.changes:
            change = Change(change.name)  # the endpoint knows neither name
        if change not in self.changes:
            self.changes += (change,)
            self.on_change(change)


def refused(status: int, error: bytes, sent: Mapping[str, Any]) -> list[Change]:
    """The changes that an error asks for; none where it is about something else."""
    text, parameters = _read_error(error)
    if status == 403:
        return [Change(name) for name in sent if "logprobs" in name and "logprobs" in text]
    role = (sent.get("messages") or [{}])[0].get("role")
    if role in ("system", "developer") and (
        _NO_SYSTEM.search(text) or any("role" in name for name in parameters)
    ):
        if role == "system" and re.search(r"\buse \W?developer", text):
            return [Change("system", "developer")]
        return [Change(role, "user")]
    if status >= 500:
        return []
    for limit in _LIMITS:
        if sent.get(limit) == DEFAULT_REPLY_TOKENS and _is_too_large(limit, text, parameters):
            return [Change(limit)]
    if not _REFUSES.search(text):
        return []
    named = [name for name in sent if name not in _FIXED and _names(name, text, parameters)]
    if " both " in text:  # one of two may stay
        named = named[-1:]
    changes = {change: None for name in named for change in _changes(name, text, sent)}
    return list(changes)


def _is_too_large(limit: str, text: str, parameters: list[str]) -> bool:
    is_named = str(DEFAULT_REPLY_TOKENS) in text or _names(limit, text, parameters)
    return is_named and _TOO_LARGE.search(text) is not None


def _changes(name: str, text: str, sent: Mapping[str, Any]) -> list[Change]:
    """The changes for a parameter that an error names."""
    if name in _LIMITS:
        new_name = _LIMITS[1 - _LIMITS.index(name)]
        if _TOO_LARGE.search(text) and new_name not in text:
            return []  # the recipe's own limit
        return [Change(name, new_name)]
    if name == "response_format":
        is_schema = sent[name].get("type") == "json_schema"
        return [Change(name, "json_object" if is_schema else None)]
    if name in ("reasoning_effort", "reasoning", "thinking") and _WRONG_VALUE.search(text):
        return []
    if name == "logprobs":
        return [Change(field) for field in ("logprobs", "top_logprobs") if field in sent]
    return [Change(name)]


_OTHER_WORDS = {
    "response_format": r"json_schema|json_object|json mode|structured outputs?|guided.decoding",
    "reasoning_effort": r"reasoning\.effort",
}


def _names(name: str, text: str, parameters: list[str]) -> bool:
    """Whether an error names a parameter: as such, in quotes, or where the word is no plain one."""
    if any(parameter.split(".")[0] == name for parameter in parameters):
        return True
    word = re.escape(name)
    patterns = [
        rf"[`'\"]{word}(?:\.\w+)?[`'\"]",
        rf"(?:parameter|argument|field|property|propertie|key|option)s?\b(?: \w+){{0,5}}\W{{1,4}}"
        rf"{word}\b",
        rf"(?:^{word}\b|\s{word}: )",
        rf"\b{word} (?:parameter|argument|field|is |are )",
    ]
    if "_" in name or name in ("temperature", "logprobs"):
        patterns.append(rf"\b{word}\b")
    if name in _OTHER_WORDS:
        patterns.append(_OTHER_WORDS[name])
    return any(re.search(pattern, text) for pattern in patterns)


def _read_error(error: bytes) -> tuple[str, list[str]]:
    """An error's words in lower case, and the parameters that it names in a field of its own.

    Fields of FastAPI and Mistral that echo the request are left out.
    """
    raw = error.decode(errors="replace")
    try:
        value = json.loads(raw)
    except ValueError:
        value = raw
    texts: list[str] = []
    parameters: list[str] = []
    _collect(value, texts, parameters)
    text = "\n".join(texts).replace("\\", "").lower()
    return " ".join(text.split())[:_MAX_CHARACTERS], parameters


def _collect(value: Any, texts: list[str], parameters: list[str]) -> None:
    if isinstance(value, str):
        if value.lstrip().startswith("{"):  # a proxy's error that has the provider's inside
            try:
                _collect(json.loads(value), texts, parameters)
                return
            except ValueError:
                pass
        texts.append(value)
    elif isinstance(value, list):
        for item in value:
            _collect(item, texts, parameters)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name == "param" and isinstance(item, str):
                parameters += [part.strip() for part in item.split(",")]
            elif name == "loc" and isinstance(item, list):
                parameters.append(".".join(str(part) for part in item if part != "body"))
            elif name not in _ECHOED:
                _collect(item, texts, parameters)


# --- reasoning effort

_BUDGETS = {
    "minimal": 1024,
    "low": 2048,
    "medium": 4096,
    "high": 8192,
    "xhigh": 12_288,
    "max": 12_288,
}


def reasoning_fields(effort: str | None, url: str) -> dict[str, Any]:
    """The fields of a request that set ``teacher.reasoning_effort`` at a provider.

    Sources: https://platform.claude.com/docs/en/api/openai-sdk (``reasoning_effort`` is ignored
    there), https://api-docs.deepseek.com/guides/thinking_mode,
    https://openrouter.ai/docs/use-cases/reasoning-tokens.
    """
    if effort is None:
        return {}
    host = urlsplit(url).hostname or ""
    if host.endswith("anthropic.com"):
        if effort == "none":
            return {"thinking": {"type": "disabled"}}
        return {"thinking": {"type": "enabled", "budget_tokens": _BUDGETS[effort]}}
    if host.endswith("deepseek.com"):
        if effort == "none":
            return {"thinking": {"type": "disabled"}}
        return {"thinking": {"type": "enabled"}, "reasoning_effort": effort}
    if host.endswith("openrouter.ai"):
        return {"reasoning": {"effort": effort}}
    return {"reasoning_effort": effort}
