"""A recipe's file into a Recipe: overrides, a teacher's file in its place, and every mistake told with its line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dsbs.config import Recipe, Section
from dsbs.config.yaml_lines import Located, Path_, dotted, load_located
from dsbs.errors import UserError
from dsbs.files import find_file


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe. Raises UserError naming every mistake with its file and line.

    ``overrides`` are ``key=value`` texts, split on the first ``=``; the value is read as YAML.
    """
    file = find_file(
        path,
        what="recipe",
        hint="give the path of a YAML file; shipped ones are recipes/<name>.yaml",
    )
    try:
        located = load_located(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason})", hint="give a YAML recipe"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or "cannot be read"
        raise UserError(
            f"{where}: not valid YAML: {what}", hint="mend the line; strings with ':' need quotes"
        ) from None
    if not isinstance(located.data, dict):
        state = "is empty" if located.data is None else "is not a mapping of sections"
        raise UserError(
            f"{path} {state}",
            hint="begin with 'task:' and 'teacher:'; recipes/demo.yaml is an example",
        )

    data = located.data
    _fetch_teacher(data, file.parent)
    problems = [f"{path}:{line}: {text}" for line, text in located.problems]
    from_command_line: set[Path_] = set()
    for text in overrides:
        problem = _override(data, text, from_command_line)
        if problem:
            problems.append(f"override {text!r}: {problem}")
        _fetch_teacher(data, file.parent)
    data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._") or "run")
    try:
        recipe = Recipe.model_validate(data)
        recipe._folder = recipe.student._folder = file.parent
    except ValidationError as error:
        problems += [
            _describe(issue, str(path), located, from_command_line) for issue in error.errors()
        ]
        recipe = None
    if problems or recipe is None:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        raise UserError(
            f"{count} in the recipe\n" + "\n".join(f"  {problem}" for problem in problems),
            hint="mend the recipe; `dsbs show recipes/demo.yaml` prints every key",
        )
    return recipe


def _fetch_teacher(data: dict[Any, Any], beside: Path) -> None:
    """Put a teacher's file in the place of its name: ``teacher: recipes/teachers/vllm.yaml``. Raises UserError."""
    name = data.get("teacher")
    if not isinstance(name, str):
        return
    hint = "give a YAML file with a teacher: section; shipped ones are recipes/teachers/<name>.yaml"
    file = find_file(name, what="teacher file", hint=hint, beside=beside)
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not valid YAML ({error})", hint=hint) from None
    if not isinstance(found, dict) or not isinstance(found.get("teacher"), dict):
        raise UserError(f"{name} has no teacher: section", hint=hint)
    data["teacher"] = found["teacher"]


def _override(data: dict[Any, Any], text: str, seen: set[Path_]) -> str | None:
    key, equals, value = text.partition("=")
    parts = tuple(key.strip().split("."))
    if not equals or not all(parts):
        return "not of the form key=value, e.g. train.max_steps=200"
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        return f"the value is not valid YAML ({getattr(error, 'problem', error)})"
    target = data
    for part in parts[:-1]:
        if target.get(part) is None:
            target[part] = {}
        target = target[part]
        if not isinstance(target, dict):
            return f"{part} is not a section"
    target[parts[-1]] = parsed
    seen.add(parts)
    return None


def _describe(issue: Any, path: str, located: Located, overridden: set[Path_]) -> str:
    loc: Path_ = tuple(issue["loc"])
    name = dotted(loc)
    if any(
        loc[: len(parts)] == parts or (parts[: len(loc)] == loc and loc not in located.lines)
        for parts in overridden
    ):
        where = "command line"
    else:
        line = located.line(loc)
        where = f"{path}:{line}" if line else path
    if issue["type"] == "extra_forbidden":
        return f"{where}: {_unknown_key(loc)}"
    if issue["type"] == "missing":
        return f"{where}: {name} is missing"
    message = issue["msg"].removeprefix("Value error, ")
    if issue["type"] == "value_error":
        return (
            f"{where}: {name}: {message}"
            if name and not message.startswith(name.split(".")[0] + ".")
            else (f"{where}: {message}")
        )
    given = located.spelling.get(loc, issue.get("input"))
    shown = f" (given: {str(given)[:60]!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {name}: {message[:1].lower()}{message[1:]}{shown}"


def _unknown_key(loc: Path_) -> str:
    *parents, key = loc
    text = f"{dotted(loc)}: unknown key"
    section: type[BaseModel] | None = Recipe
    for part in parents:
        annotation = section.model_fields[str(part)].annotation if section else None
        section = next((t for t in (annotation, *get_args(annotation)) if _is_section(t)), None)
    known = list(section.model_fields) if section else []
    near = [
        f"did you mean {name!r}?"
        for name in difflib.get_close_matches(str(key), known, n=1, cutoff=0.6)
    ]
    homes = [home for home in _homes(str(key), Recipe, ()) if home != dotted(tuple(parents))]
    if homes:
        near.append(f"it belongs to {' or '.join(homes)}")
    if near:
        return f"{text}; {', or '.join(near)}"
    return f"{text} (known here: {', '.join(known)})" if known else text


def _homes(key: str, section: type[BaseModel], path: Path_) -> list[str]:
    """The sections, as dotted paths, that have a key of this name."""
    found = [dotted(path)] if path and key in section.model_fields else []
    for name, part in section.model_fields.items():
        if _is_section(part.annotation):
            found += _homes(key, part.annotation, (*path, name))
    return found


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


# --- recipes as manifests and results record them


def as_given(recipe: Recipe) -> dict[str, Any]:
    """All keys, but for those that others exclude: what can be read as a recipe again."""
    found = recipe.model_dump(mode="json")
    if found["teacher"]["endpoints"]:
        del found["teacher"]["base_url"]
    return found


def recorded(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A record's recipe with this version's keys where it fits this version, else as it is."""
    recipe: dict[str, Any] = manifest["recipe"]
    known = read_recorded(manifest)
    return recipe if known is None else as_given(known)


def read_recorded(manifest: Mapping[str, Any]) -> Recipe | None:
    """A manifest's recipe, or None where there is none that this version can read."""
    said = manifest.get("recipe")
    if not isinstance(said, dict):
        return None
    teacher = said.get("teacher")
    if isinstance(teacher, dict) and teacher.get("endpoints"):
        said = said | {
            "teacher": {key: value for key, value in teacher.items() if key != "base_url"}
        }
    try:
        return Recipe.model_validate(said)
    except ValidationError:
        return None
