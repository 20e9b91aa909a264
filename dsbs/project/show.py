"""``dsbs show``: a recipe, or the one that a run was made with, resolved; and what differs between two of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import PydanticUndefined

from dsbs.config import Recipe, TrainSection
from dsbs.config.load import load_recipe, recorded, resolved_values
from dsbs.config.schema import section_of
from dsbs.config.sections import Section
from dsbs.errors import UserError
from dsbs.run_folder import MANIFEST, STAGES, RunFolder

ABSENT = object()  # a key that one of two recipes does not have


@dataclass(frozen=True, slots=True)
class Resolved:
    """A recipe with nothing left out: all keys by section, and where it comes from.

    ``remarks`` tell of other recipes that the same run's stages were given.
    """

    source: str
    recipe: dict[str, Any]
    remarks: tuple[str, ...] = ()

    @property
    def changed(self) -> dict[str, Any]:
        """Dotted keys whose value is not the default -> the default."""
        return {entry.key: entry.default for entry in _entries(self.recipe) if entry.is_changed}

    def as_yaml(self) -> str:
        """YAML that is a recipe again, with a comment on every line that is not the default."""
        remarks = (" ".join(remark.split()) for remark in (self.source, *self.remarks))
        return "\n".join(
            [*(f"# {remark}" for remark in remarks), *map(_line, _entries(self.recipe))]
        )

    def as_json(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "remarks": list(self.remarks),
            "recipe": self.recipe,
            "not_default": self.changed,
        }


def resolve(given: str, overrides: list[str] | None = None) -> Resolved:
    """The recipe in a file, or the one that the newest stage of a run folder was given. Raises UserError."""
    path = Path(given)
    if not path.is_dir():
        return Resolved(given, resolved_values(load_recipe(given, overrides or ())))
    if overrides:
        raise UserError(
            f"{given} is a run, whose recipe is what it was",
            hint="leave --set out, or give a recipe's file",
        )
    records = {stage: RunFolder(path).manifest(stage) for stage in STAGES}
    records = {
        stage: record for stage, record in records.items() if isinstance(record.get("recipe"), dict)
    }
    if not records:
        raise UserError(
            f"{given} holds no run: no stage in it has a readable {MANIFEST}",
            hint="give runs/<name>",
        )
    newest = max(records, key=lambda stage: str(records[stage].get("started", "")))
    found = recorded(records[newest])
    remarks = []
    for stage, record in records.items():
        other = differences(recorded(record), found)
        if other:
            remarks.append(f"{stage} was given another recipe, different in {', '.join(other)}")
    return Resolved(
        f"{path / newest / MANIFEST}, {records[newest].get('started')}",
        found,
        tuple(remarks),
    )


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> both values; ABSENT where one side has no such key."""
    left, right = (
        {one.key: one.value for one in _entries(recipe) if not one.is_section} for recipe in (a, b)
    )
    found = {}
    for key in [*left, *(key for key in right if key not in left)]:
        pair = left.get(key, ABSENT), right.get(key, ABSENT)
        if pair[0] == pair[1] or _is_told_below(key, pair, left, right):
            continue
        found[key] = pair
    return found


def _is_told_below(
    key: str, pair: tuple[Any, Any], left: Mapping[str, Any], right: Mapping[str, Any]
) -> bool:
    """Whether a section that is null on one side is told key by key for the other."""
    other = right if pair[1] is ABSENT else left
    return ABSENT in pair and None in pair and any(name.startswith(f"{key}.") for name in other)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A line of a resolved recipe: a key with its value, or the head of a section (whose value is no concern then)."""

    path: tuple[str, ...]
    value: Any
    default: Any  # ABSENT: it has none, or it is a section that is always there
    is_section: bool
    is_known: bool

    @property
    def key(self) -> str:
        return ".".join(self.path)

    @property
    def is_changed(self) -> bool:
        return self.default is not ABSENT and (self.is_section or self.default != self.value)


def _entries(recipe: Mapping[str, Any]) -> Iterator[_Entry]:
    """All lines in the order of the recipe's sections."""

    def walk(
        path: tuple[str, ...],
        values: Mapping[str, Any],
        section: type[Section],
        defaults: Mapping[str, Any],
    ) -> Iterator[_Entry]:
        for key, value in values.items():
            inner, default = _section_at(section, key), defaults.get(key, ABSENT)
            here, known = (*path, key), key in section.model_fields
            if inner is None or not isinstance(value, dict):
                yield _Entry(here, value, default, is_section=False, is_known=known)
                continue
            stands = isinstance(default, dict)
            yield _Entry(
                here, value, ABSENT if stands else default, is_section=True, is_known=known
            )
            yield from walk(here, value, inner, default if stands else _defaults(inner))

    return walk((), recipe, Recipe, _defaults_for(recipe))


def _line(entry: _Entry) -> str:
    text = f"{'  ' * (len(entry.path) - 1)}{entry.path[-1]}:" + (
        "" if entry.is_section else f" {plain(entry.value)}"
    )
    if not entry.is_known:
        return f"{text}  # unknown to this version"
    return f"{text}  # default: {plain(entry.default)}" if entry.is_changed else text


def plain(value: Any) -> str:
    """A value as YAML on one line."""
    style: dict[str, Any] = {
        "default_flow_style": True,
        "allow_unicode": True,
        "width": math.inf,
        "sort_keys": False,
    }
    text: str = yaml.safe_dump(value, **style).removesuffix("\n").removesuffix("\n...")
    if "\n" in text:  # only double quotes keep a line break on the line
        text = yaml.safe_dump(value, **style, default_style='"').removesuffix("\n")
    return text


def _section_at(section: type[Section], key: str) -> type[Section] | None:
    """The section that a key holds one of; a list of sections is a value."""
    field = section.model_fields.get(key)
    if field is None or isinstance(field.default, tuple):
        return None
    return section_of(field.annotation)


def _defaults_for(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a recipe with this student."""
    defaults = _defaults(Recipe)
    student = recipe.get("student")
    is_scratch = isinstance(student, dict) and not student.get("model")
    train = TrainSection().resolved(is_scratch=is_scratch)
    defaults["train"] |= {"learning_rate": train.learning_rate, "max_steps": train.max_steps}
    return defaults


def _defaults(section: type[Section]) -> dict[str, Any]:
    """A section's defaults as JSON values, sections in it included; keys that must be given are left out."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = _section_at(section, name)
        if field.default is not PydanticUndefined:
            default = field.default
            found[name] = (
                default.model_dump(mode="json")
                if isinstance(default, Section)
                else _as_json(default)
            )
        elif inner is not None:
            found[name] = _defaults(inner)
    return found


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
