"""Constant parts of a log's prompts: system text, few-shot turns and the template around the input.

Prompts with the same constant part are one job; a log may have several. What varies becomes the
fields of a row's input.
"""

from __future__ import annotations

import json
import keyword
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from dsbs.config.sections import label_key
from dsbs.config.task import RESERVED_COLUMNS
from dsbs.importing.bodies import Message
from dsbs.importing.calls import Call, CallStore

SAMPLE = 2000  # calls by which a prompt and its replies are recognized
_MIN_SHARE = 0.005  # of a model's calls, for a context to be a prompt of its own
_MIN_CALLS = 5
_COMPARED = 40  # texts that a template is made of
_MAX_TOKENS = 1500  # of a text between its constant ends
_MAX_FIELDS = 12
MAX_LABEL_LENGTH = 80
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+(?P<item>.+?)\s*$")
_LISTED = re.compile(r"\s*(?:[,;|/]|\bor\b|\band\b)\s*")
_TOKEN = re.compile(r"\s+|\w+|[^\w\s]")
# What makes a run of constant tokens a part of a template, and not a coincidence.
_SEPARATOR = re.compile(r"\n|<[/\w]|\w\s?[:=]\s|[\"'`]{3}")
# Where a constant beginning may end, and a constant end may begin.
_ENDS = re.compile(r"\n|[:>\])]\s*|[\"'`]+|\s+[-–—]+\s+")
_BEGINS = re.compile(r"\n|<|[\"'`]+|\s+[-–—]+\s+")
_LONG = 25  # characters of a constant part that need no mark
_NAMED = re.compile(
    r"(?:<(?P<tag>[A-Za-z][\w-]{0,40})[^<>]*>|(?P<name>[^\W\d][\w /-]{0,40}?)\s*[\"'`*]*\s*[:=]"
    r"|\#+\s*(?P<head>[^\W\d][\w -]{0,40}?)\s*)[\s\"'`*#\[(-]*$"
)
_JINJA = re.compile(r"\{\{|\{%|\{#|\}\}|%\}|#\}")
_WORDS = {"true", "false", "none", "loop", "self", "varargs", "kwargs", "caller", "namespace"}


@dataclass(frozen=True, slots=True)
class Pieces:
    """A message's constant texts, around the values of its ``fields``.

    ``keys`` are the keys of a message that is a JSON object; its constant ones have a value.
    """

    texts: tuple[str, ...]
    fields: tuple[str, ...] = ()
    keys: dict[str, str] | None = None
    """By key of the JSON object, the field's name."""

    def values(self, text: str) -> dict[str, Any] | None:
        """The fields of a message. None: it has another form."""
        if self.keys is not None:
            return _json_values(text, self.keys)
        if not self.fields:
            return {} if text.strip() == self.texts[0].strip() else None
        first, *inner, last = self.texts
        text = _padded(text, first, last)
        if not text.startswith(first) or not text.endswith(last):
            return None
        end = len(text) - len(last)
        position = len(first)
        values = []
        for separator in inner:
            found_at = text.find(separator, position, end)
            if found_at < 0:
                return None
            values.append(text[position:found_at])
            position = found_at + len(separator)
        if position > end:
            return None
        values.append(text[position:end])
        return dict(zip(self.fields, (value.strip() for value in values), strict=True))

    def template(self) -> str:
        """The message as a Jinja template of its fields."""
        if self.keys is not None:
            pairs = (f'"{key}": {{{{ {name} | tojson }}}}' for key, name in self.keys.items())
            return f"{{{', '.join(pairs)}}}"
        parts = [_escaped(self.texts[0])]
        for name, text in zip(self.fields, self.texts[1:], strict=True):
            parts += [f"{{{{ {name} }}}}", _escaped(text)]
        return "".join(parts)


def _padded(text: str, first: str, last: str) -> str:
    """A text whose ends lost the white space of its template, as some clients strip it."""
    if first != first.lstrip() and not text.startswith(first):
        text = first[: len(first) - len(first.lstrip())] + text.lstrip()
    if last != last.rstrip() and not text.endswith(last):
        text = text.rstrip() + last[len(last.rstrip()) :]
    return text


def _escaped(text: str) -> str:
    return _JINJA.sub(lambda match: f"{{{{ '{match.group()}' }}}}", text)


@dataclass(frozen=True, slots=True)
class PromptForm:
    """One job of a log: the messages of its prompts, and the calls that have them."""

    contexts: tuple[int, ...]
    calls: int
    roles: tuple[str, ...]
    messages: tuple[Pieces, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(name for message in self.messages for name in message.fields)

    def values(self, context: Sequence[Message], question: str) -> dict[str, Any] | None:
        """The fields of a call. None: its prompt has another form."""
        texts = [text for _, text in context] + [question]
        if len(texts) != len(self.messages):
            return None
        values: dict[str, Any] = {}
        for message, text in zip(self.messages, texts, strict=True):
            own_values = message.values(text)
            if own_values is None:
                return None
            values |= own_values
        return values if any(str(value).strip() for value in values.values()) else None

    @property
    def is_context_constant(self) -> bool:
        return not any(message.fields for message in self.messages[:-1])

    def constant_text(self) -> str:
        """Everything that all prompts have."""
        return "\n\n".join("\n".join(message.texts) for message in self.messages)


def prompt_groups(store: CallStore, model: str) -> list[tuple[tuple[int, ...], int]]:
    """The contexts of each job in a model's calls, and its calls, most frequent first.

    A context that many calls share is constant; the others belong together by their roles.
    """
    contexts = store.contexts(model)
    total = sum(calls for *_, calls in contexts)
    least = max(_MIN_CALLS, _MIN_SHARE * total)
    groups: dict[Any, list[int]] = {}
    counts: Counter[Any] = Counter()
    for number, messages, calls in contexts:
        key: Any = number if calls >= least else tuple(role for role, _ in messages)
        groups.setdefault(key, []).append(number)
        counts[key] += calls
    return [(tuple(groups[key]), calls) for key, calls in counts.most_common()]


def find_form(store: CallStore, model: str, contexts: tuple[int, ...], calls: int) -> PromptForm:
    """The form of the prompts with one of ``contexts``, by a sample."""
    sample = list(store.calls(model, contexts, SAMPLE))
    return form_of([store.context(call.context) for call in sample], sample, contexts, calls)


def form_of(
    prefixes: Sequence[Sequence[Message]],
    sample: Sequence[Call],
    contexts: tuple[int, ...],
    calls: int,
) -> PromptForm:
    """The form of a sample's prompts; ``prefixes`` are their messages before the last one."""
    roles = (*(role for role, _ in prefixes[0]), "user")
    columns = [[prefix[i][1] for prefix in prefixes] for i in range(len(roles) - 1)]
    columns.append([call.question for call in sample])
    messages: list[Pieces] = []
    names: list[str] = []
    for texts in columns:
        pieces = _json_pieces(texts, names) or _pieces(texts, names)
        names += pieces.fields
        messages.append(pieces)
    if len(names) == 1:  # the task calls its only input so
        messages = [
            Pieces(m.texts, ("text",), m.keys and dict.fromkeys(m.keys, "text")) if m.fields else m
            for m in messages
        ]
    elif not names:
        # one question again and again
        messages[-1] = Pieces(("", ""), ("text",))
    return PromptForm(contexts, calls, roles, tuple(messages))


# --- messages that are JSON objects


def _json_pieces(texts: Sequence[str], names: Sequence[str]) -> Pieces | None:
    values = [_json_object(text) for text in texts]
    objects = [value for value in values if value is not None]
    if len(objects) < 0.98 * len(texts) or len(set(texts)) == 1:
        return None
    keys = list(dict.fromkeys(key for value in objects for key in value))
    if not keys or len(keys) > _MAX_FIELDS:
        return None
    by_key: dict[str, str] = {}
    for key in keys:
        by_key[key] = _field_name(key, [*names, *by_key.values()])
    return Pieces((), tuple(by_key.values()), by_key)


def _json_object(text: str) -> dict[str, Any] | None:
    if not text.lstrip().startswith("{"):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_values(text: str, keys: dict[str, str]) -> dict[str, Any] | None:
    value = _json_object(text)
    if value is None or not value.keys() <= keys.keys():
        return None
    return {name: _plain(value.get(key)) for key, name in keys.items()}


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    return value if is_finite else str(value)


# --- templates


def _pieces(texts: Sequence[str], names: Sequence[str]) -> Pieces:
    """The constant parts of texts, and names of what is between them."""
    distinct = list(dict.fromkeys(texts))
    if len(distinct) == 1:
        return Pieces((distinct[0],))
    first = _snapped_start(_common_start(distinct))
    last = _snapped_end(_common_start([t[len(first) :][::-1] for t in distinct])[::-1])
    middles = [t[len(first) : len(t) - len(last)] for t in distinct]
    inner = _separators(middles)
    texts_around = (first, *inner, last)
    fields: list[str] = []
    for text in texts_around[:-1]:
        fields.append(_field_name(_name_before(text), [*names, *fields]))
    return Pieces(texts_around, tuple(fields))


def _common_start(texts: Sequence[str]) -> str:
    """The longest common prefix: that of the first and the last in alphabetical order."""
    first, last = min(texts), max(texts)
    length = next(
        (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first[:length]


def _snapped_start(text: str) -> str:
    """The beginning of a common prefix that ends where a template may: no half word, and no word
    that all inputs happen to begin with.
    """
    ends = [match.end() for match in _ENDS.finditer(text)]
    end = ends[-1] if ends else 0
    if len(text) - end > _LONG:
        end = max(end, _last_space(text))
    return text[:end]


def _last_space(text: str) -> int:
    spaces = list(re.finditer(r"\s+", text))
    return spaces[-1].end() if spaces else 0


def _snapped_end(text: str) -> str:
    match = _BEGINS.search(text)
    start = match.start() if match else len(text)
    if start > _LONG:
        space = re.search(r"\s", text)
        start = min(start, space.start() if space else start)
    return text[start:]


def _separators(texts: Sequence[str]) -> list[str]:
    """Constant texts inside of all ``texts``, in order."""
    stride = max(1, len(texts) // _COMPARED)
    compared = sorted(texts[::stride][:_COMPARED], key=len)
    runs = [_TOKEN.findall(compared[0])]
    if len(runs[0]) > _MAX_TOKENS:
        return []
    for text in compared[1:]:
        tokens = _TOKEN.findall(text)
        if len(tokens) > _MAX_TOKENS:
            continue
        runs = _common_runs(runs, tokens)
        if not runs:
            return []
    separators = ["".join(run) for run in runs]
    separators = [text for text in map(_trimmed, separators) if text][: _MAX_FIELDS - 1]
    # most texts must have them all; else the values' own words are among them
    while separators and not all(_has_in_order(text, separators) for text in texts):
        separators = [s for s in separators if all(s in text for text in texts)][:-1] or []
    return separators


def _common_runs(runs: list[list[str]], tokens: list[str]) -> list[list[str]]:
    """The parts of ``runs`` that ``tokens`` have as well, in the same order."""
    joined: list[str] = []
    for run in runs:
        joined += [*run, "\0"]  # a token of no text
    matcher = SequenceMatcher(None, joined, tokens, autojunk=False)
    common = []
    for start, _, size in matcher.get_matching_blocks():
        run = joined[start : start + size]
        if run and _SEPARATOR.search("".join(run)):
            common.append(run)
    return common


def _trimmed(text: str) -> str:
    """A separator without the words before its first mark, which are the value's own."""
    match = re.search(r"\n|<|[\"'`]{3}|\w[\w ]*[:=]", text)
    if match is None:
        return ""
    text = text[match.start() :]
    end = max((m.end() for m in _ENDS.finditer(text)), default=len(text))
    return text[:end] if end > 0 else text


def _has_in_order(text: str, separators: Sequence[str]) -> bool:
    position = 0
    for separator in separators:
        position = text.find(separator, position)
        if position < 0:
            return False
        position += len(separator)
    return True


def _name_before(text: str) -> str:
    match = _NAMED.search(text[-120:])
    if match is None:
        return "text"
    name = match["tag"] or match["name"] or match["head"]
    return " ".join(name.split()[-3:])


def _field_name(name: str, taken: Sequence[str]) -> str:
    """An identifier for a field, unlike ``taken``."""
    name = re.sub(r"\W+", "_", name.strip().lower(), flags=re.ASCII).strip("_") or "text"
    is_taken = name in RESERVED_COLUMNS or keyword.iskeyword(name) or name in _WORDS
    if is_taken or not name[0].isalpha():
        name = f"{name}_text" if name[0].isalpha() else f"text_{name}"
    number = 2
    base = name
    while name in taken:
        name = f"{base}_{number}"
        number += 1
    return name


# --- labels that a prompt lists


def listed_labels(text: str, counts: Mapping[str, int], *, share: float) -> dict[str, str] | None:
    """The list of labels in a prompt, by key: the one with most of the labels in ``counts``, which
    are replies by label. None: no list has ``share`` of the replies.
    """
    best: dict[str, str] | None = None
    best_covered = share * sum(counts.values())
    for items in _lists(text):
        keys = {label_key(item): item for item in items if len(item) <= MAX_LABEL_LENGTH}
        covered = sum(counts.get(key, 0) for key in keys)
        hits = sum(key in counts for key in keys)
        is_likely = hits >= 2 and hits >= 0.25 * len(keys)
        if is_likely and covered > best_covered:
            best, best_covered = keys, covered
    return best


def _lists(text: str) -> Iterator[list[str]]:
    """Lists in a text: bullets, the names before their descriptions, and runs with commas."""
    bullets: list[str] = []
    named: list[str] = []
    for line in [*text.splitlines(), ""]:
        match = _BULLET.match(line)
        item = line.strip() if match is None else match["item"]
        name, colon, _ = re.sub(r"\s+[-–—]\s+", ": ", item).partition(":")
        if match is None and not (colon and len(name.split()) <= 6) and not _is_bare(line):
            yield from (items for items in (bullets, named) if len(items) > 1)
            bullets, named = [], []
        else:
            bullets.append(_bare(item))
            named.append(_bare(name))
        for part in (line, line.rpartition(":")[2], line.partition(":")[2]):
            pieces = [_bare(piece) for piece in _LISTED.split(part)]
            if len(pieces) > 1:
                yield [piece for piece in pieces if piece]
                plain = [_bare(piece) for piece in re.split(r"\s*[,;|]\s*", part)]
                yield [piece for piece in plain if piece]
    joined = " ".join(text.split())
    for match in re.finditer(r"(?<=[:\[(])[^:\[\]().]{5,8000}", joined):
        yield [piece for piece in map(_bare, _LISTED.split(match.group())) if piece]


def _is_bare(line: str) -> bool:
    """Whether a line is a word or a few, as in a list without bullets."""
    return 0 < len(line.split()) <= 4 and not line.rstrip().endswith((":", ".", "?"))


def _bare(text: str) -> str:
    return text.strip().strip("\"'`*_<>[](){}.").strip()
