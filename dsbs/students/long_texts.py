"""Long texts: which part of a text that is longer than a student's input is read.

A text is cut before its prefix and template are added, so that these stay complete in every format.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dsbs.config.task import LongInput, MaxInputSection
from dsbs.errors import UserError
from dsbs.students.formats import InputFormat
from dsbs.students.tokenizer import without_limit

# Between the windows of a text, each of which a label head reads as an input of its own. Views that
# write rationales read the text as one input, which ends in the first window.
WINDOW_SEPARATOR = "\x1d"
_GAP = " … "  # between a text's head and tail
_FEWEST = 12  # tokens of which a head and a tail can consist; fewer are the tail's
_TRIES = 8


def text_limit(
    strategy: LongInput, input_format: InputFormat, prefixes: Iterable[str], max_input_tokens: int
) -> int | None:
    """The most tokens of a text, without prefix and template. None: the format cuts its end.

    Raises UserError where prefix and template leave none.
    """
    if strategy == "head":
        return None
    limit = max_input_tokens - max(map(len, input_format.read(list(prefixes))))
    if limit < 1:
        raise UserError(
            f"student.max_input_tokens: {max_input_tokens} leaves no tokens for the text",
            hint="raise student.max_input_tokens",
        )
    return limit


def shortened(
    texts: Sequence[str], tokenizer: Any, limit: int, section: MaxInputSection
) -> list[str]:
    """The part of each text that is read: its last tokens, its first and last ones, or its windows,
    joined by WINDOW_SEPARATOR.

    A text of at most ``limit`` tokens stays as it is. Raises UserError for a tokenizer that does
    not say where its tokens are in a text.
    """
    return [
        text if len(spans) <= limit else _cut(text, spans, tokenizer, limit, section)
        for text, spans in zip(texts, _spans(tokenizer, texts), strict=True)
    ]


def _cut(
    text: str, spans: list[tuple[int, int]], tokenizer: Any, limit: int, section: MaxInputSection
) -> str:
    if section.strategy == "windows":
        text = text.replace(WINDOW_SEPARATOR, " ")
        firsts = range(0, min(len(spans), limit * section.windows), limit)
        windows = [spans[first : first + limit] for first in firsts]
        return WINDOW_SEPARATOR.join(text[window[0][0] : window[-1][1]] for window in windows)
    tokens = limit
    short = text
    for _ in range(_TRIES):
        short = _part(text, spans, tokens, section.strategy)
        # Tokens at a cut may be others than in the whole text.
        excess = len(_spans(tokenizer, [short])[0]) - limit
        if excess <= 0 or tokens <= excess:
            break
        tokens -= excess
    return short


def _part(text: str, spans: list[tuple[int, int]], tokens: int, strategy: LongInput) -> str:
    if strategy == "tail" or tokens < _FEWEST:
        return text[spans[-tokens][0] :].strip()
    tail = tokens // 2
    return f"{text[: spans[tokens - tail - 1][1]].strip()}{_GAP}{text[spans[-tail][0] :].strip()}"


def _spans(tokenizer: Any, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
    """Where each token of each text begins and ends."""
    if hasattr(tokenizer, "encode_batch"):  # an export's
        encodings = without_limit(tokenizer).encode_batch(list(texts), add_special_tokens=False)
        return [encoding.offsets for encoding in encodings]
    if not tokenizer.is_fast:
        raise UserError(
            f"task.max_input needs a tokenizer of the tokenizers package, and the student's is a "
            f"{type(tokenizer).__name__}",
            hint="save the tokenizer with tokenizer.json, or leave task.max_input out",
        )
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        truncation=False,
    )
    spans: list[list[tuple[int, int]]] = encoded["offset_mapping"]
    return spans
