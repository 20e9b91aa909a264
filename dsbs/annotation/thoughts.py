"""Reasoning: split from the visible part of a reply, whatever form it has.

Reasoning models write their thoughts before the answer. Servers with a reasoning parser return them
in a field or content part of their own; others leave them in the text, between tags (DeepSeek-R1,
Qwen3), behind a closing tag alone (the chat template wrote the opening one), or in channels
(gpt-oss: https://github.com/openai/harmony/blob/main/docs/format.md). A label in a thought is a
draft and is never read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from dsbs.tasks.label_set import LabelSet

_NAME = r"(?:\w+:)?(?:think|thinking|thoughts?|reasoning|reflection|scratchpad)"
# <think> and its like; [THINK] (Magistral), ◁think▷ (Kimi), <|begin_of_thought|> (OpenThinker),
# <|START_THINKING|> (Command A), <|channel>thought (Gemma 4)
_OPEN = rf"<{_NAME}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|channel>\w*"
_CLOSE = rf"</{_NAME}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<channel\|>"
_TAG = re.compile(rf"(?P<open>{_OPEN})|(?P<close>{_CLOSE})", re.IGNORECASE)
# a tag that the end of the reply cut in two
_CUT_TAG = re.compile(r"(?:</?(?:\w+:)?\w{0,12}|<\|?\w{0,20}\|?|\[/?THIN?K?|◁/?\w{0,5})\Z")

_CHANNEL = re.compile(
    r"(?:<\|start\|>\s*(?:assistant)?\s*)?(?:<\|channel\|>\s*(?P<name>\w+)[^<]{0,80}"
    r"(?:<\|constrain\|>[^<]{0,40})?(?:<\|message\|>|(?=\Z))"
    r"|(?:(?<=\A)|(?<=[>\s])|(?<=assistant))(?P<bare>analysis|commentary|final)<\|message\|>)"
)
_CHANNEL_END = re.compile(r"<\|(?:end|return|call|start)\|>")
# the same without special tokens, which some servers drop: analysisWe need …assistantfinalBecause …
_STRIPPED_START = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)(?:(?=[A-Z\"'(])|\s*\n)")
_STRIPPED_LOOSE = re.compile(r"\s*(?:assistant)?(?:analysis|commentary)")
_STRIPPED_FINAL = re.compile(r"assistant\s?final")

_TURN_END = re.compile(
    r"<\|(?:im_end|eot_id|eom_id|eot|end_of_turn|end_of_text|endoftext|end|return|call|user|im_start)\|>"
    r"|<｜[^｜<>\n]{0,40}end[^｜<>\n]{0,40}｜>|<｜User｜>|<end_of_turn>|<eos>|</s>\s*\Z"
)
_SPECIAL = re.compile(r"<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>")


def split_thoughts(text: str, labels: LabelSet | None = None) -> tuple[str, str | None]:
    """The visible part of a reply, and the thoughts in it (None: there are none).

    Without a mark of the thoughts' end everything behind the mark of their beginning is thought. A
    word that is one of ``labels`` is no mark. Special tokens are removed, and the visible part ends
    where one ends the turn.
    """
    visible = text
    thoughts: list[str] = []
    if "<|message|>" in text or "<|channel|>" in text:
        visible, thoughts = _split_channels(text)
    elif (start := _STRIPPED_LOOSE.match(text)) is not None:
        is_label = labels is not None and labels.spelled(start.group()) is not None
        if not is_label or _STRIPPED_FINAL.search(text):
            visible, thoughts = _split_stripped_channels(text)
    visible, tagged = _split_tags(visible)
    thoughts += tagged
    if "<" in visible:
        visible = _without_special_tokens(visible)
    if not thoughts:
        return visible, None
    joined = "\n".join(filter(None, (_without_marks(thought) for thought in thoughts)))
    return visible, joined or None


def _split_channels(text: str) -> tuple[str, list[str]]:
    """gpt-oss: only the channel ``final`` is visible."""
    headers = list(_CHANNEL.finditer(text))
    if not headers:
        return text, []
    visible: list[str] = []
    thoughts = [text[: headers[0].start()]]  # the reply may begin inside a channel
    for number, header in enumerate(headers):
        end = headers[number + 1].start() if number + 1 < len(headers) else len(text)
        body = _CHANNEL_END.split(text[header.end() : end], maxsplit=1)[0]
        if (header["name"] or header["bare"]) == "final":
            visible.append(body)
        else:
            thoughts.append(body)
    return "\n".join(visible), thoughts


def _split_stripped_channels(text: str) -> tuple[str, list[str]]:
    finals = list(_STRIPPED_FINAL.finditer(text))
    if finals:
        thought = _STRIPPED_LOOSE.sub("", text[: finals[-1].start()], count=1)
        return text[finals[-1].end() :], [thought]
    start = _STRIPPED_START.match(text)
    if start is not None:
        return "", [text[start.end() :]]
    return text, []


def _split_tags(text: str) -> tuple[str, list[str]]:
    """Text outside and inside of reasoning tags, which may be repeated, nested or unpaired."""
    visible: list[str] = []
    thoughts: list[str] = []
    position = 0
    is_inside = False
    for tag in _TAG.finditer(text):
        if _is_quoted(text, tag):
            continue
        piece = text[position : tag.start()]
        if tag["open"]:
            (thoughts if is_inside else visible).append(piece)
            is_inside = True
        else:
            if not is_inside:  # its opening tag was in the prompt, or it closes an outer one
                thoughts += visible
                visible = []
            thoughts.append(piece)
            is_inside = False
        position = tag.end()
    rest = text[position:]
    if is_inside:
        thoughts.append(rest)
    else:
        visible.append(rest)
    return "".join(visible), thoughts


def _is_quoted(text: str, tag: re.Match[str]) -> bool:
    """Whether the text mentions the tag instead of using it."""
    before = text[: tag.start()][-1:]
    after = text[tag.end() : tag.end() + 1]
    return bool(before and after) and before in "`\"'“" and after in "`\"'”"


def _without_special_tokens(text: str) -> str:
    """The first turn of ``text`` without special tokens such as ``<|eot_id|>``."""
    for end in _TURN_END.finditer(text):
        if _SPECIAL.sub("", text[: end.start()]).strip():
            text = text[: end.start()]
            break
    return _SPECIAL.sub("", text)


def _without_marks(thought: str) -> str:
    return _CUT_TAG.sub("", _SPECIAL.sub("", thought)).strip()


# --- a message of the chat API

_REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
_REASONING_LISTS = ("reasoning_details", "thinking_blocks")
_REASONING_PARTS = ("thinking", "reasoning", "redacted_thinking", "thought")


def read_message(message: dict[str, Any]) -> tuple[str, str | None]:
    """Text and separate reasoning of a chat message; the text as received, tags included.

    ``content`` is a string, null, or a list of parts, of which some are reasoning (Anthropic,
    Mistral). Reasoning fields: ``reasoning_content`` (DeepSeek, vLLM, llama.cpp, LiteLLM),
    ``reasoning`` (OpenRouter, Groq, newer vLLM), ``reasoning_details`` (OpenRouter),
    ``thinking_blocks`` (LiteLLM).
    """
    content = message.get("content")
    texts: list[str] = []
    thoughts: list[str] = []
    for name in _REASONING_FIELDS:
        thoughts += [] if thoughts else _strings(message.get(name))
    for name in _REASONING_LISTS:
        thoughts += [] if thoughts else _strings(message.get(name))
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict):
                texts += _strings(part)
            elif part.get("type") in _REASONING_PARTS or part.get("thought") is True:
                thoughts += _strings(part)
            else:
                texts += _strings(part.get("text"))
    else:
        texts = _strings(content) or _strings(message.get("refusal"))
    reasoning = "\n".join(thoughts).strip()
    return _encodable("".join(texts)), _encodable(reasoning) or None


def _strings(value: object) -> list[str]:
    """The texts in a field, which may be a string, a part or a list of parts."""
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, dict):
        names = ("text", "thinking", "reasoning", "summary", "content")
        return next(filter(None, (_strings(value.get(name)) for name in names)), [])
    if isinstance(value, Iterable):
        return [text for part in value for text in _strings(part)]
    return []


def _encodable(text: str) -> str:
    """``text`` without lone surrogates, which a token budget may leave and no file can hold."""
    return text.encode("utf-8", "replace").decode()
