"""The label's log-probability out of a reply's token log-probabilities."""

from __future__ import annotations

import json

from dsbs.annotate.parse import find_anchor, first_turn, said
from dsbs.prompts import Prompt


def label_logprob(raw: str, text: str, prompt: Prompt) -> float | None:
    """Sum of the log-probabilities, in nats, of the tokens of the answer's line after the anchor; None without them.

    ``raw`` is the reply's JSON in one of the OpenAI API's two forms: chat (``logprobs.content[].token, .logprob``) or legacy
    completions (``logprobs.tokens, .token_logprobs``). A token that straddles the anchor's end is the label's.
    """
    tokens = _tokens(raw)
    if tokens is None:
        return None
    turn, _ = first_turn(said(text)[0], prompt.stop)
    at, anchor = find_anchor(turn, prompt.anchor)
    if at < 0:
        return None
    whole = "".join(token for token, _ in tokens)
    offset = whole.find(turn)  # the turn may begin after blank lines, or after a reasoning model's thoughts
    if offset < 0:
        return None
    answer = turn[at + len(anchor) :]
    line = answer.lstrip().split("\n", 1)[0].rstrip()
    if not line:
        return None
    begin = offset + at + len(anchor) + (len(answer) - len(answer.lstrip()))
    end = begin + len(line)
    total, place, found = 0.0, 0, False
    for token, logprob in tokens:
        if place < end and place + len(token) > begin and token.strip():
            total, found = total + logprob, True
        place += len(token)
    return round(total, 6) if found else None


def _tokens(raw: str) -> list[tuple[str, float]] | None:
    try:
        given = json.loads(raw)["choices"][0]["logprobs"]
        if "content" in given:
            return [(str(one["token"]), float(one["logprob"])) for one in given["content"]]
        return [(str(t), float(p or 0.0)) for t, p in zip(given["tokens"], given["token_logprobs"], strict=True)]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
