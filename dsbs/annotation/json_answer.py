"""JSON answers (``annotate.format: json``): the schema that constrains them, and how they are read.

They are read as strictly as text: an answer that is cut, repeated with another label or not JSON
gives no label. Text and code fences around the object are ignored, because endpoints without
schemas add them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dsbs.annotation.text_answer import Answer
from dsbs.prompting import Order, in_order
from dsbs.tasks import Task


def response_format(task: Task, order: Order) -> dict[str, Any]:
    """The ``response_format`` of a request: rationale and label in the prompt's order.

    Source: https://platform.openai.com/docs/guides/structured-outputs.
    """
    properties = in_order({"rationale": {"type": "string"}, "label": task.label_schema()}, order)
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "answer", "strict": True, "schema": schema},
    }


def read_json_answer(text: str, task: Task, *, may_be_cut: bool) -> Answer:
    """The answer in a reply's first turn, which has a ``{``.

    ``may_be_cut``: the token budget ended the reply, or it is not known what did.
    """
    objects = list(_objects(text))
    answers = [(value, start) for value, start in objects if "label" in value]
    if not answers:
        is_open = text.count("{") > text.count("}") or not objects
        return Answer(reason="truncated" if may_be_cut and is_open else "unparsed")
    value, start = answers[-1]
    rationale = value.get("rationale") or ""
    label = value["label"]
    is_repeated = any(other["label"] != label for other, _ in answers)
    if is_repeated or isinstance(label, _Several):
        return Answer(reason="several-answers")
    if label is None:
        return Answer(reason="empty")
    label_text = task.json_text(label)
    if label_text is None and isinstance(label, list):
        if len(label) > 1:
            return Answer(reason="several-answers")
        label_text = label[0] if label else None
    if not isinstance(label_text, str):
        return Answer(reason="unparsed")
    if isinstance(rationale, list) and all(isinstance(sentence, str) for sentence in rationale):
        rationale = " ".join(rationale)
    if not isinstance(rationale, str):
        rationale = ""
    return Answer(rationale.strip(), label_text, _label_span(text, start))


class _Several:
    """The values of a name that an object has twice with different values."""


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        values[name] = value if values.get(name, value) == value else _Several()
    return values


# numbers keep their spelling: 007 is no JSON, but 1.0 is
_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs, parse_int=str, parse_float=str, parse_constant=str, strict=False
)


def _objects(text: str) -> Iterator[tuple[dict[str, Any], int]]:
    """The JSON objects in a text and where they begin; those inside one without a label too."""
    start = text.find("{")
    while start >= 0:
        next_search = start + 1
        try:
            value, end = _DECODER.raw_decode(text, start)
        except (ValueError, RecursionError):
            pass
        else:
            yield value, start
            if "label" in value:
                next_search = end
        start = text.find("{", next_search)


def _label_span(text: str, start: int) -> tuple[int, int]:
    """Where the label of the object that begins at ``start`` stands; an empty span: not found."""
    key = text.find('"label"', start)
    while key >= 0:
        position = key + len('"label"')
        colon = text[position:].lstrip()
        if colon.startswith(":"):
            value = colon[1:].lstrip()
            begin = len(text) - len(value)
            try:
                _, length = _DECODER.raw_decode(value)
            except ValueError:
                break
            if value.startswith('"'):
                return begin + 1, begin + length - 1
            return begin, begin + length
        key = text.find('"label"', position)
    return 0, 0
