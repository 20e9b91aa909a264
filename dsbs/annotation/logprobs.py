"""The label's log-probability out of a reply's token log-probabilities."""

from __future__ import annotations

import json
from typing import Any

from dsbs.annotation.parse import find_anchor, first_turn, said
from dsbs.prompting import Prompt


def label_logprob(raw: str, text: str, prompt: Prompt) -> float | None:
    """Sum of the log-probabilities, in nats, of the tokens of the answer's line after the anchor; None without them.

    ``raw`` is the reply's JSON in one of the OpenAI API's two forms: chat (``logprobs.content[].token, .logprob``) or legacy
    completions (``logprobs.tokens, .token_logprobs``). A token that straddles the anchor's end is the label's.
    """
    tokens = _tokens(raw)
    if tokens is None:
        return None
    spoken = said(text)[0]
    turn, _ = first_turn(spoken, prompt.stop)
    at, anchor = find_anchor(turn, prompt.anchor)
    answer = turn[at + len(anchor) :] if at >= 0 else ""
    line = answer.lstrip().split("\n", 1)[0].rstrip()
    if not line:
        return None
    # in bytes, because a token may hold part of a character; the turn is looked for behind a reasoning model's thoughts
    whole = b"".join(token for token, _ in tokens)
    before = whole.find(text.encode())
    thoughts = len(text.encode()) - len(spoken.encode())
    offset = whole.find(turn.encode(), before + thoughts if before >= 0 else 0)
    if offset < 0:
        return None
    begin = offset + len(turn[: len(turn) - len(answer.lstrip())].encode())
    end = begin + len(line.encode())
    total, place, found = 0.0, 0, False
    for token, logprob in tokens:
        if place < end and place + len(token) > begin and token.strip():
            total, found = total + logprob, True
        place += len(token)
    return round(total, 6) if found else None


def _tokens(raw: str) -> list[tuple[bytes, float]] | None:
    try:
        given = json.loads(raw)["choices"][0]["logprobs"]
        if "content" in given:
            return [(_bytes(one), float(one["logprob"])) for one in given["content"]]
        return [
            (str(t).encode(), float(p or 0.0))
            for t, p in zip(given["tokens"], given["token_logprobs"], strict=True)
        ]
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _bytes(token: dict[str, Any]) -> bytes:
    given = token.get("bytes")
    return bytes(given) if given is not None else str(token["token"]).encode("utf-8", "replace")
