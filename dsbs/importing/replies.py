"""Forms of a log's replies: where the label and the rationale stand, and the task that they belong
to, proposed from a sample.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsbs.annotation.thoughts import split_thoughts
from dsbs.config.sections import label_key
from dsbs.importing.prompts import MAX_LABEL_LENGTH, json_object, listed_labels
from dsbs.tasks.marks import tidy

_MIN_SHARE = 0.8  # of the replies, that have a form
_MIN_MARKED = 0.5  # of the replies, that have a mark such as "Answer:"
_MAX_LABELS = 400
_MIN_COVERED = 0.9  # of the replies, whose label is one of a closed set
_MAX_LINE = 1000  # characters of a line in which a label is looked for
_MAX_POINTS = 21  # of a scale
_NUMBER = re.compile(r"[-+]?\d{1,3}(?:,\d{3})+(?:\.\d+)?|[-+]?\d+(?:\.\d+)?")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_LABEL_KEYS = (
    "label", "category", "class", "classification", "intent", "sentiment", "answer", "topic",
    "team", "route", "decision", "verdict", "score", "rating", "result", "output", "tags", "labels",
    "categories", "topics",
)  # fmt: skip
_RATIONALE_KEYS = (
    "rationale", "reasoning", "reason", "explanation", "thought", "thoughts", "justification",
    "analysis", "why", "chain_of_thought",
)  # fmt: skip
_ASIDE_KEYS = ("confidence", "probability", "certainty", "id")
_ANCHOR = re.compile(
    r"(?P<anchor>(?:[*_#>\s]*)(?:[^\W\d_][\w '-]{0,40}?)(?::[*_]*|\s+(?:is|are)\b:?)|####|=>|→)\s*"
    r"(?P<label>\S.*)$"
)
_STATED = re.compile(
    r"(?:^|[.!?]\s+)(?:[Ss]o|[Tt]herefore|[Tt]hus|[Hh]ence)?,?\s*"
    r"([^.!?]*\b(?:answer|label|category|result|score)\s+is:?)\s+(\S.*)$"
)
_TAG = re.compile(r"<(?P<name>[A-Za-z][\w-]{0,30})>\s*(?P<text>[^<>]{1,400}?)\s*</(?P=name)>")
_PARTS = re.compile(r"\s*[,;|\n]\s*")


@dataclass(slots=True)
class ReplyForm:
    """A task and how its replies are read: sections of a recipe and of a prompt file."""

    task: dict[str, Any]
    prompt: dict[str, Any]
    format: str = "text"
    has_rationale: bool = False
    labels: dict[str, int] = field(default_factory=dict)
    """Replies of the sample by label, the most frequent first; those without any are listed in
    the prompt."""
    description: str = ""
    """The form in a few words."""


@dataclass(slots=True)
class _Reading:
    """One way to read replies: the label texts that it finds, and the prompt keys that do it."""

    labels: list[Any]
    prompt: dict[str, Any]
    description: str
    format: str = "text"
    has_rationale: bool = False


def propose(completions: Sequence[str], constant_text: str) -> ReplyForm:
    """The task and the form of replies, by a sample of them and what all prompts say."""
    visible = [split_thoughts(text)[0].strip() for text in completions]
    readings = [
        reading
        for read in (_by_json, _by_tag, _by_last_line, _by_first_line, _whole)
        if (reading := read(visible)) is not None
    ]
    for reading in readings:
        form = _task_of(reading, constant_text)
        if form is not None:
            return form
    for reading in readings:
        if reading.format == "json" or reading.prompt.get("anchor") or "pattern" in reading.prompt:
            return _form(reading, "generation", {})
    texts = [text for text in visible if text]
    return ReplyForm(
        {"name": "generation"},
        {"pattern": r"(?s)^\s*(?P<label>.+?)\s*$", "answer": "{{ label }}"}
        if any("\n" in text for text in texts)
        else _LABEL_ALONE,
        description="free text",
    )


_LABEL_ALONE: dict[str, Any] = {"order": "label-first", "anchor": [], "answer": "{{ label }}"}


# --- ways to read a reply


def _by_json(texts: Sequence[str]) -> _Reading | None:
    """A JSON object with a label, or with fields to extract."""
    values = [value for value in map(json_object, texts) if value is not None]
    if len(values) < _MIN_SHARE * len(texts):
        return None
    counts = Counter(key for value in values for key in value)
    keys = [key for key, number in counts.most_common() if number >= 0.05 * len(values)]
    rationale = next((key for key in keys if key.lower() in _RATIONALE_KEYS), None)
    label_keys = [key for key in keys if key != rationale and key.lower() not in _ASIDE_KEYS]
    named = [key for key in label_keys if key.lower() in _LABEL_KEYS]
    if len(label_keys) == 1:
        label = label_keys[0]
    elif len(named) == 1 and all(_is_free(values, key) for key in label_keys if key != named[0]):
        label = named[0]
        rationale = rationale or next((key for key in label_keys if key != label), None)
    else:
        return _Reading(values, dict(_LABEL_ALONE), "a JSON object with the fields", "fields")
    labels = [value[label] for value in values if value.get(label) is not None]
    what = "a JSON object" + (f" with {label!r} and {rationale!r}" if rationale else "")
    if label == "label" and rationale in (None, "rationale"):
        prompt = {"order": _order(values, label, rationale)}
        return _Reading(labels, prompt, what, "json", rationale is not None)
    order = _order(values, label, rationale)
    prompt = {
        "order": order,
        "pattern": _json_pattern(label, rationale, order, labels),
        "answer": _json_answer(label, rationale, order, labels),
    }
    return _Reading(labels, prompt, what, has_rationale=rationale is not None)


def _is_free(values: Sequence[dict[str, Any]], key: str) -> bool:
    """Whether the values of a key are sentences."""
    texts = [value.get(key) for value in values]
    words = [len(text.split()) for text in texts if isinstance(text, str)]
    return len(words) > 0.5 * len(texts) and sum(words) >= 4 * len(words)


def _order(values: Sequence[dict[str, Any]], label: str, rationale: str | None) -> str:
    if rationale is None:
        return "label-first"
    both = [list(value) for value in values if label in value and rationale in value]
    first = sum(keys.index(label) < keys.index(rationale) for keys in both)
    return "label-first" if 2 * first > len(both) else "rationale-first"


_STRING = r'"(?P<{}>(?:[^"\\]|\\.)*)"'


def _json_pattern(label: str, rationale: str | None, order: str, labels: Sequence[Any]) -> str:
    texts = [_json_part(label, labels, "label")]
    if rationale is not None:
        texts.append(rf'"{re.escape(rationale)}"\s*:\s*{_STRING.format("rationale")}')
    if order == "rationale-first":
        texts.reverse()
    return "(?s)" + ".*?".join(texts)


def _json_part(key: str, labels: Sequence[Any], group: str) -> str:
    if any(isinstance(label, list) for label in labels):
        value = rf"(?P<{group}>\[[^\]]*\]|[^\[,}}]+)"
    elif all(isinstance(label, str) for label in labels):
        value = _STRING.format(group)
    else:
        value = rf'"?(?P<{group}>[^",}}\s]+)'
    return rf'"{re.escape(key)}"\s*:\s*{value}'


def _json_answer(label: str, rationale: str | None, order: str, labels: Sequence[Any]) -> str:
    quote = '"' if all(isinstance(value, str) for value in labels) else ""
    parts = [f'"{label}": {quote}{{{{ label }}}}{quote}']
    if any(isinstance(value, list) for value in labels):
        parts = [f'"{label}": {{{{ label }}}}']
    if rationale is not None:
        parts.append(f'"{rationale}": "{{{{ rationale }}}}"')
    if order == "rationale-first":
        parts.reverse()
    return "{" + ", ".join(parts) + "}"


def _by_tag(texts: Sequence[str]) -> _Reading | None:
    """``<answer>billing</answer>``, after a rationale."""
    names = Counter(name for text in texts for name in {m["name"] for m in _TAG.finditer(text)})
    common = [name for name, number in names.items() if number >= _MIN_MARKED * len(texts)]
    names_of_labels = [name for name in common if name.lower() not in _RATIONALE_KEYS]
    if not names_of_labels:
        return None
    name = next((n for n in names_of_labels if n.lower() in _LABEL_KEYS), names_of_labels[-1])
    labels = []
    is_explained = 0
    for text in texts:
        matches = [match for match in _TAG.finditer(text) if match["name"] == name]
        if matches:
            labels.append(matches[-1]["text"])
            is_explained += len(text[: matches[-1].start()].split()) > 3
    has_rationale = 2 * is_explained > len(labels)
    prompt = {
        "pattern": rf"(?s)^(?P<rationale>.*)<{name}>\s*(?P<label>[^<>]*?)\s*</{name}>",
        "answer": f"{{{{ rationale }}}}\n<{name}>{{{{ label }}}}</{name}>",
    }
    what = f"a label in <{name}>"
    return _Reading(labels, prompt, what, has_rationale=has_rationale)


def _by_last_line(texts: Sequence[str]) -> _Reading | None:
    """A rationale, then an anchor such as ``Answer:`` and the label."""
    lines = [text.splitlines()[-1].strip()[-_MAX_LINE:] if text else "" for text in texts]
    matches = [_last_anchor(line) for line in lines]
    counts = Counter(
        match[0]
        for match in matches
        if match is not None and match[0].strip(": ").lower() not in _RATIONALE_KEYS
    )
    if not counts:
        return None
    anchor, number = counts.most_common(1)[0]
    if number < _MIN_MARKED * len(texts):
        return None
    labels = [match[1] for match in matches if match is not None and match[0] == anchor]
    explained = [
        text for text in texts if len(text.rpartition(anchor)[0].split()) > 3 and anchor in text
    ]
    has_rationale = 2 * len(explained) > number
    prompt: dict[str, Any] = {"anchor": [anchor]}
    answer = f"{{{{ rationale }}}}\n{anchor} {{{{ label }}}}"
    if not has_rationale:
        prompt["order"] = "label-first"
        answer = f"{anchor} {{{{ label }}}}"
    prompt["answer"] = answer
    what = f"a label after {anchor!r}" + (", behind a rationale" if has_rationale else "")
    return _Reading(labels, prompt, what, has_rationale=has_rationale)


def _last_anchor(line: str) -> tuple[str, str] | None:
    """The anchor of a line and the text after it: "So the answer is (7 + 2)."."""
    sentence = _STATED.search(line)
    match = None if sentence else _ANCHOR.match(line)
    if sentence is not None:
        anchor, label = sentence.groups()
        anchor = " ".join(anchor.split()[-3:])
    elif match is not None:
        anchor, label = match["anchor"].strip(" \t*_#>") or match["anchor"].strip(), match["label"]
    else:
        return None
    return anchor[:1].upper() + anchor[1:], label.strip().strip("*_").strip()


def _by_first_line(texts: Sequence[str]) -> _Reading | None:
    """A label, alone or after an anchor, in the first line; the rationale below."""
    pairs = [text.partition("\n") for text in texts if text]
    explained = [rest for _, _, rest in pairs if len(rest.split()) > 3]
    if not pairs or len(explained) < _MIN_SHARE * len(texts):
        return None
    matches = [_ANCHOR.match(line) for line, _, _ in pairs]
    anchors = Counter(m["anchor"].strip(" \t*_#>") for m in matches if m is not None)
    prompt: dict[str, Any] = {"order": "label-first", "anchor": []}
    labels: list[Any] = [line.strip() for line, _, _ in pairs]
    anchor, number = anchors.most_common(1)[0] if anchors else ("", 0)
    if number >= _MIN_SHARE * len(texts):
        prompt["anchor"] = [anchor]
        labels = [m["label"] for m in matches if m is not None]
    prompt["answer"] = f"{anchor} {{{{ label }}}}\n{{{{ rationale }}}}".lstrip()
    return _Reading(labels, prompt, "a label, then a rationale", has_rationale=True)


def _whole(texts: Sequence[str]) -> _Reading | None:
    """The label alone."""
    return _Reading(list(texts), dict(_LABEL_ALONE), "a label alone")


# --- tasks


def _task_of(reading: _Reading, constant_text: str) -> ReplyForm | None:
    """The task whose labels a reading finds. None: they are no labels of a closed set, no numbers
    and no fields.
    """
    labels = reading.labels
    if reading.format == "fields":
        fields = _extracted_fields(labels)
        if fields is None:
            return None
        names = ", ".join(fields)
        return ReplyForm(
            {"name": "extraction", "fields": fields},
            reading.prompt,
            description=f"{reading.description} {names}",
        )
    listed = [label for label in labels if isinstance(label, list)]
    if 2 * len(listed) > len(labels):
        parts = [str(part) for label in listed for part in label]
        counts = _closed_set(parts, constant_text, total=len(parts))
        return None if counts is None else _form(reading, "multilabel", counts)
    texts = [_plain_label(label) for label in labels if isinstance(label, str | int | float)]
    scale = _scale(texts)
    if scale is not None:
        form = _form(reading, "score", _by_number(texts))
        form.task |= scale
        return form
    numbers = [text for text in texts if _NUMBER.fullmatch(text.strip("$€£()= "))]
    are_numbers = len(texts) >= 4 and len(numbers) >= _MIN_COVERED * len(texts)
    counts = None
    if not are_numbers or len(set(numbers)) <= _MAX_POINTS:
        counts = _closed_set(texts, constant_text, total=len(labels))
    if counts is not None:
        return _form(reading, "classification", counts)
    if are_numbers:
        form = _form(reading, "generation", {})
        form.task["numeric"] = True
        return form
    if not texts or max(map(len, texts)) > 10 * MAX_LABEL_LENGTH:
        return None
    several = [part for text in texts for part in _PARTS.split(text) if part]
    if len(several) > 1.2 * len(texts):
        counts = _closed_set(several, constant_text, total=len(several))
        if counts is not None:
            counts.pop("none", None)
            return _form(reading, "multilabel", counts)
    return None


def _form(reading: _Reading, task: str, counts: Mapping[str, int]) -> ReplyForm:
    section: dict[str, Any] = {"name": task}
    if task in ("classification", "multilabel"):
        section["labels"] = sorted(counts)
    return ReplyForm(
        section,
        reading.prompt,
        reading.format,
        reading.has_rationale,
        dict(counts),
        reading.description,
    )


def _plain_label(label: str | float) -> str:
    """A label's text without the marks around it."""
    if isinstance(label, str):
        first = label.strip().splitlines()[0] if label.strip() else ""
        return tidy(first).strip("()[]\"'` ") if len(label) <= 10 * MAX_LABEL_LENGTH else label
    return json.dumps(label)


def _closed_set(texts: Sequence[str], constant_text: str, *, total: int) -> dict[str, int] | None:
    """Counts of the labels of a closed set, the most frequent first. None: there is no such set.

    Where the prompt lists the labels, those are the set, with all that no reply has.
    """
    spellings: dict[str, Counter[str]] = {}
    for text in texts:
        if text and len(text) <= MAX_LABEL_LENGTH and "\n" not in text:
            spellings.setdefault(label_key(text), Counter())[text] += 1
    counts = {key: spelling.total() for key, spelling in spellings.items()}
    names = {key: spelling.most_common(1)[0][0] for key, spelling in spellings.items()}
    listed = listed_labels(constant_text, counts, share=_MIN_COVERED)
    if listed is not None:
        chosen = {name: counts.get(key, 0) for key, name in listed.items()}
    else:
        least = 2 if total >= 20 else 1
        chosen = {names[key]: number for key, number in counts.items() if number >= least}
        if len(chosen) > max(2, 0.34 * total):
            return None
    is_covered = sum(chosen.values()) >= _MIN_COVERED * total
    if not is_covered or not 2 <= len(chosen) <= _MAX_LABELS:
        return None
    return dict(sorted(chosen.items(), key=lambda pair: (-pair[1], pair[0])))


def _scale(texts: Sequence[str]) -> dict[str, Any] | None:
    """``range`` and ``step`` of numbers that are points of a scale."""
    numbers = [float(text) for text in texts if _NUMBER.fullmatch(text) and "," not in text]
    points = sorted(set(numbers))
    is_scale = len(numbers) >= max(4, _MIN_COVERED * len(texts)) and 3 <= len(points) <= _MAX_POINTS
    if not is_scale or len(numbers) < 2 * len(points):
        return None
    low, high = points[0], points[-1]
    step = next((s for s in (1.0, 0.5, 0.1) if all(_is_multiple(p - low, s) for p in points)), None)
    if step is None or (high - low) / step > _MAX_POINTS - 1:
        return None
    scale: dict[str, Any] = {"range": [_number(low), _number(high)]}
    return scale if step == 1.0 else scale | {"step": step}


def _is_multiple(value: float, step: float) -> bool:
    return math.isclose(value / step, round(value / step), abs_tol=1e-6)


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value


def _by_number(texts: Sequence[str]) -> dict[str, int]:
    counts = Counter(text for text in texts if _NUMBER.fullmatch(text))
    return dict(sorted(counts.items(), key=lambda pair: float(pair[0].replace(",", ""))))


def _extracted_fields(values: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The fields of JSON objects, with their types. None: an object has parts of its own."""
    keys = list(dict.fromkeys(key for value in values for key in value))
    if not 1 <= len(keys) <= 40:
        return None
    fields = {}
    for key in keys:
        entries = [value.get(key) for value in values]
        section = _field_type([entry for entry in entries if entry not in (None, "", [])])
        if section is None:
            return None
        if all(entry not in (None, "", []) for entry in entries):
            section["required"] = True
        fields[key] = section
    return fields


def _field_type(entries: Sequence[Any]) -> dict[str, Any] | None:
    if any(isinstance(entry, dict) for entry in entries):
        return None
    if any(isinstance(entry, list) for entry in entries):
        is_plain = all(isinstance(p, str) for e in entries if isinstance(e, list) for p in e)
        return {"type": "list"} if is_plain else None
    if entries and all(isinstance(e, int | float) and not isinstance(e, bool) for e in entries):
        return {"type": "number"}
    texts = [json.dumps(e) if isinstance(e, bool) else str(e) for e in entries]
    if texts and all(_DATE.fullmatch(text) for text in texts):
        return {"type": "date"}
    counts = Counter(texts)
    is_closed = len(counts) <= 20 and len(texts) >= 5 * len(counts)
    is_short = all(len(text.split()) <= 4 for text in counts)
    is_label = len(counts) >= 2 and all(
        text == " ".join(text.split())
        and not text.endswith((";", ","))
        and label_key(text) != "null"
        for text in counts
    )
    if is_closed and is_short and is_label:
        return {"type": "label", "labels": sorted(counts)}
    return {"type": "text"}
