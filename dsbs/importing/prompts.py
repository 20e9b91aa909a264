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
from dataclasses import dataclass, replace
from typing import Any

from dsbs.config.sections import label_key
from dsbs.config.task import RESERVED_COLUMNS
from dsbs.files import digest
from dsbs.importing.bodies import Message
from dsbs.importing.calls import Call, CallStore

SAMPLE = 2000  # calls by which a prompt and its replies are recognized
_MIN_SHARE = 0.005  # of a model's calls, for a context to be a prompt of its own
_MIN_CALLS = 5
_COMPARED = 40  # texts that a template is made of
_MAX_MARKS = 200  # that are compared
_MAX_MARK_LENGTH = 40  # of the white space and marks around one
_MAX_LISTING = 200_000  # characters of a prompt in which labels are looked for
_MAX_FIELDS = 12
MAX_LABEL_LENGTH = 80
_BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s+(?P<item>.+?)\s*$")
_LISTED = re.compile(r"\s*(?:[,;|/]|\bor\b|\band\b)\s*")
# What may stand between two values: a tag, a name with a colon, a heading or another line.
_MARK = re.compile(
    r"</?[A-Za-z][\w-]{0,40}(?:\s[^<>\n]{0,60})?>"
    r"|^[^\S\n]{0,20}[#*>-]{0,9}[^\S\n]{0,9}[^\W\d_][^\n:=]{0,60}[:=]"
    r"|\"{3}|`{3}\w*|(?<=\s)[A-Z]\w{1,30}:|(?<=\s)\w{1,30}:(?=\s)",
    re.MULTILINE,
)
_LINE = re.compile(r"^.{3,200}$", re.MULTILINE)
_MARKS_BEFORE = re.compile(r"[\s\"'`*#(\[<-]*$")
_MARKS_AFTER = re.compile(r"[\s\"'`*>-]*")
# Where a constant beginning may end, and a constant end may begin.
_ENDS = re.compile(r"\n|[:>\])]\s*|[\"'`]+|\s[-–—]+\s")
_BEGINS = re.compile(r"\n|<|[\"'`]+|\s[-–—]+\s")
_LONG = 25  # characters of a constant part that need no mark
_STAMP = re.compile(
    r"\d+|\b(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b"
    r"|\b(?:mon|tues?|wednes|thurs?|fri|satur|sun)(?:day)?\b",
    re.IGNORECASE,
)
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
    skeleton: str | None = None
    """A message without dates and numbers, which are not constant and no input."""

    def values(self, text: str) -> dict[str, Any] | None:
        """The fields of a message. None: it has another form."""
        if not self.fields and text == self.texts[0]:
            return {}
        if self.skeleton is not None:
            return {} if _skeleton(text) == self.skeleton else None
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

    A context that many calls share, but for its dates and numbers, is one; the others belong
    together by their roles.
    """
    alike: dict[str, list[int]] = {}
    calls_of: Counter[str] = Counter()
    roles_of: dict[str, str] = {}
    for number, messages, calls in store.contexts(model):
        key = digest(*(_skeleton(text) for _, text in messages))
        alike.setdefault(key, []).append(number)
        calls_of[key] += calls
        roles_of[key] = " ".join(role for role, _ in messages)
    least = max(_MIN_CALLS, _MIN_SHARE * calls_of.total())
    groups: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()
    for key, numbers in alike.items():
        group = key if calls_of[key] >= least else roles_of[key]
        groups.setdefault(group, []).extend(numbers)
        counts[group] += calls_of[key]
    return [(tuple(groups[group]), calls) for group, calls in counts.most_common()]


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
    for texts in reversed(columns):  # the question has the first choice of names
        pieces = _stamped(texts) if messages else None
        pieces = pieces or _json_pieces(texts, names) or _pieces(texts, names)
        names += pieces.fields
        messages.insert(0, pieces)
    if not names:  # one question again and again
        messages[-1] = Pieces(("", ""), ("text",))
    form = PromptForm(contexts, calls, roles, tuple(messages))
    if len(form.fields) == 1:  # the task calls its only input so
        messages = [_renamed(message) if message.fields else message for message in messages]
        form = replace(form, messages=tuple(messages))
    return form


def _stamped(texts: Sequence[str]) -> Pieces | None:
    """Texts that differ in dates and numbers alone, as the last of them. None: they differ more."""
    skeletons = {_skeleton(text) for text in set(texts)}
    return Pieces((texts[-1],), skeleton=skeletons.pop()) if len(skeletons) == 1 else None


def _skeleton(text: str) -> str:
    return _STAMP.sub("0", text)


def _renamed(message: Pieces) -> Pieces:
    """A message whose only field is called ``text``."""
    keys = None if message.keys is None else dict.fromkeys(message.keys, "text")
    return Pieces(message.texts, ("text",), keys)


# --- messages that are JSON objects


def _json_pieces(texts: Sequence[str], names: Sequence[str]) -> Pieces | None:
    values = [json_object(text) for text in texts]
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


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, perhaps in a code fence."""
    if not text.lstrip().startswith(("{", "```")):
        return None
    try:
        value = json.loads(text[text.find("{") : text.rfind("}") + 1])
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _json_values(text: str, keys: dict[str, str]) -> dict[str, Any] | None:
    value = json_object(text)
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
    return _without_constant_fields(Pieces(texts_around, tuple(fields)), distinct)


def _without_constant_fields(pieces: Pieces, texts: Sequence[str]) -> Pieces:
    """Pieces without the fields that have the same value in all ``texts``."""
    rows = [values for text in texts if (values := pieces.values(text)) is not None]
    around = [pieces.texts[0]]
    fields: list[str] = []
    for name, text in zip(pieces.fields, pieces.texts[1:], strict=True):
        contents = {str(row[name]) for row in rows}
        if len(contents) == 1 and len(rows) > 1 and len(pieces.fields) > 1:
            around[-1] += contents.pop() + text
        else:
            fields.append(name)
            around.append(text)
    return Pieces(tuple(around), tuple(fields))


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
    """Constant texts inside of all ``texts``, in order: tags, names with a colon, headings, lines,
    each once in every text, with the white space and marks around them.
    """
    stride = max(1, len(texts) // _COMPARED)
    compared = texts[::stride][:_COMPARED]
    shortest = min(compared, key=len)
    separators: list[str] = []
    positions = [0] * len(compared)
    matches = [*_MARK.finditer(shortest), *_LINE.finditer(shortest)]
    matches.sort(key=lambda match: (match.start(), -match.end()))
    for mark in list(dict.fromkeys(match.group() for match in matches))[:_MAX_MARKS]:
        starts = [
            text.find(mark, position) for text, position in zip(compared, positions, strict=True)
        ]
        is_constant = all(start >= 0 for start in starts) and all(
            text.count(mark) == 1 for text in compared
        )
        if not is_constant:
            continue
        befores = [text[p:i] for text, p, i in zip(compared, positions, starts, strict=True)]
        afters = [text[i + len(mark) :] for text, i in zip(compared, starts, strict=True)]
        ends = [text[: -_MAX_MARK_LENGTH - 1 : -1] for text in befores]
        before = _MARKS_BEFORE.search(_common_start(ends)[::-1])
        after = _MARKS_AFTER.match(_common_start([text[:_MAX_MARK_LENGTH] for text in afters]))
        separator = f"{before.group() if before else ''}{mark}{after.group() if after else ''}"
        separators.append(separator)
        length = len(mark) + (len(after.group()) if after else 0)
        positions = [start + length for start in starts]
    return separators[: _MAX_FIELDS - 1]


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
    bullets, named = list[str](), list[str]()
    text = text[:_MAX_LISTING]
    for line in [*(" ".join(line.split()) for line in text.splitlines()), ""]:
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
