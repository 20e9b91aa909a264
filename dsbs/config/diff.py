"""Recipe keys and values: every key with its default, and the differences between recipes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from dsbs.config import NamedStudentSection, Recipe, TrainSection
from dsbs.config.schema import section_of
from dsbs.config.sections import Section
from dsbs.config.student import is_several
from dsbs.config.train import RESOLVED

MISSING = object()
"""The value of a key that a recipe does not have."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a recipe: a key with its value, or the head of a section.

    ``default`` is MISSING where a key has none, and for a section that always exists.
    """

    path: tuple[str, ...]
    value: Any
    default: Any
    is_section: bool
    is_known: bool
    """Whether this version has the key."""

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def is_changed(self) -> bool:
        return self.default is not MISSING and (self.is_section or self.default != self.value)

    def as_yaml(self) -> str:
        """The line, with a comment if the value is not the default."""
        text = f"{'  ' * (len(self.path) - 1)}{self.path[-1]}:"
        if not self.is_section:
            text += f" {inline_yaml(self.value)}"
        if not self.is_known:
            return f"{text}  # unknown to this version"
        if self.is_changed:
            return f"{text}  # default: {inline_yaml(self.default)}"
        return text


def entries(recipe: Mapping[str, Any]) -> Iterator[Entry]:
    """All lines of a recipe with all its keys (``load.resolved_values``), in the file's order."""
    defaults = _defaults_for(recipe)
    for key, value in recipe.items():
        if key == "student" and is_several(value):
            yield Entry((key,), value, MISSING, is_section=True, is_known=True)
            yield from _student_entries(recipe, value)
        else:
            yield from _entries((), {key: value}, Recipe, defaults)


def _student_entries(
    recipe: Mapping[str, Any], students: Mapping[str, Mapping[str, Any]]
) -> Iterator[Entry]:
    """The lines of several students. The default of a training setting is the one in ``train``."""
    for name, section in students.items():
        path = ("student", name)
        yield Entry(path, section, MISSING, is_section=True, is_known=True)
        defaults = _defaults(NamedStudentSection)
        shared = recipe.get("train")
        train = section.get("train")
        if isinstance(shared, dict) and isinstance(train, dict):
            rates = {
                "learning_rate": shared.get("learning_rate"),
                "head_learning_rate": shared.get("head_learning_rate"),
            }
            followed = rates | {"learning_rate": train.get("learning_rate")}
            is_scratch = not section.get("model")
            resolved = _resolved(rates, is_scratch=is_scratch)
            defaults["train"] |= resolved | {
                key: value for key, value in shared.items() if value is not None
            }
            head = _resolved(followed, is_scratch=is_scratch)["head_learning_rate"]
            defaults["train"]["head_learning_rate"] = head
            if shared.get("max_epochs") or train.get("max_epochs"):
                defaults["train"]["max_steps"] = None
        yield from _entries(path, section, NamedStudentSection, defaults)


def _resolved(rates: Mapping[str, Any], *, is_scratch: bool) -> dict[str, Any]:
    """The defaults of a student's train section, given its learning rates."""
    numbers = {name: rate for name, rate in rates.items() if isinstance(rate, float)}
    train = TrainSection(**numbers).resolved(is_scratch=is_scratch)
    return {name: getattr(train, name) for name in RESOLVED}


def differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Dotted keys whose values differ, with each recipe's value; MISSING where it lacks the key."""
    flat = [
        {entry.key: entry.value for entry in entries(recipe) if not entry.is_section}
        for recipe in recipes
    ]
    keys = dict.fromkeys(key for values in flat for key in values)
    differing = {}
    for key in keys:
        values = [values.get(key, MISSING) for values in flat]
        is_equal = all(value == values[0] for value in values)
        if not is_equal and not _is_null_section(key, values, keys):
            differing[key] = values
    return differing


def inline_yaml(value: Any) -> str:
    """A value as YAML on one line."""
    style: dict[str, Any] = {
        "default_flow_style": True,
        "allow_unicode": True,
        "width": math.inf,
        "sort_keys": False,
    }
    text: str = yaml.safe_dump(value, **style).removesuffix("\n").removesuffix("\n...")
    if "\n" in text:  # only double quotes keep a line break on one line
        text = yaml.safe_dump(value, **style, default_style='"').removesuffix("\n")
    return text


def _is_null_section(key: str, values: Sequence[Any], keys: Mapping[str, Any]) -> bool:
    """Whether ``key`` is a section that is null in some recipes and has keys of its own in others.

    Its keys show the difference already.
    """
    is_null_or_missing = all(value is None or value is MISSING for value in values)
    return is_null_or_missing and any(name.startswith(f"{key}.") for name in keys)


def _entries(
    parents: tuple[str, ...],
    values: Mapping[str, Any],
    section: type[Section],
    defaults: Mapping[str, Any],
) -> Iterator[Entry]:
    for key, value in values.items():
        path = (*parents, key)
        inner = _section_at(section, key)
        default = defaults.get(key, MISSING)
        is_known = key in section.model_fields
        if inner is None or not isinstance(value, dict):
            yield Entry(path, value, default, is_section=False, is_known=is_known)
        elif isinstance(default, dict):
            yield Entry(path, value, MISSING, is_section=True, is_known=is_known)
            yield from _entries(path, value, inner, default)
        else:
            yield Entry(path, value, default, is_section=True, is_known=is_known)
            yield from _entries(path, value, inner, _defaults(inner))


def _section_at(section: type[Section], key: str) -> type[Section] | None:
    """The section under a key; None for a list of sections, which is a value."""
    field = section.model_fields.get(key)
    if field is None or isinstance(field.default, tuple):
        return None
    return section_of(field.annotation)


def _defaults_for(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a recipe with this student."""
    defaults = _defaults(Recipe)
    student = recipe.get("student")
    if is_several(student):
        return defaults
    is_scratch = isinstance(student, dict) and not student.get("model")
    defaults["train"] |= _resolved({}, is_scratch=is_scratch)
    section = recipe.get("train")
    if isinstance(section, dict):  # a label head's rate follows the other one
        followed = _resolved({"learning_rate": section.get("learning_rate")}, is_scratch=is_scratch)
        defaults["train"]["head_learning_rate"] = followed["head_learning_rate"]
    return defaults


def _defaults(section: type[Section]) -> dict[str, Any]:
    """A section's defaults as JSON values, nested sections included, required keys left out."""
    defaults: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = _section_at(section, name)
        default = field.default
        if isinstance(default, Section):
            defaults[name] = default.model_dump(mode="json")
        elif isinstance(default, tuple):
            defaults[name] = list(default)
        elif default is not PydanticUndefined:
            defaults[name] = default
        elif inner is not None:
            defaults[name] = _defaults(inner)
    return defaults
