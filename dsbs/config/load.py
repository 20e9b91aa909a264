"""Recipe loading: YAML with line numbers, overrides, a teacher's file, and all errors reported
together.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from dsbs.config.recipe import Recipe
from dsbs.config.registry import TERMS, entry
from dsbs.config.schema import section_of
from dsbs.config.sections import Section
from dsbs.config.student import ONE, SEVERAL, NamedStudentSection, StudentSection
from dsbs.config.train import RESOLVED, TrainSection
from dsbs.errors import UserError
from dsbs.files import find_file

KeyPath = tuple[str | int, ...]

# Keys that earlier versions had, and what to do about them.
REMOVED_KEYS = {
    "eval.simulator": "the simulator was removed; leave it out: eval.rationales: true measures "
    "rationales by ROUGE-L and by their agreement with the label",
    "report.tensorboard": "replaced by report.trackers: [tensorboard]",
}


# --- YAML with line numbers


@dataclass(slots=True)
class Located:
    """A parsed YAML document: its plain data, and where in the text each value is.

    ``lines`` holds the line (from 1) of every path, ``spelling`` every scalar as it is written,
    ``problems`` keys that are given twice, with their lines.
    """

    data: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    spelling: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[tuple[int, str]] = field(default_factory=list)

    def line(self, path: KeyPath) -> int | None:
        """The line of ``path``, or of its nearest ancestor in the text."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def load_located(text: str, at: KeyPath = ()) -> Located:
    """Parse one YAML document, which is the value at the path ``at`` of a file. Labels are text as
    they are spelled, whatever YAML reads in 007, no, 1.0 or 2024-01-01.

    Raises ``yaml.YAMLError`` where the text is not YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        located = Located(data=None)
        if node is not None:
            _locate(node, at, located, ())
            located.data = loader.construct_document(node)
    except (ValueError, RecursionError) as error:  # a date that does not exist, endless brackets
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()
    return located


def _locate(
    node: yaml.Node, path: KeyPath, located: Located, ancestors: tuple[yaml.Node, ...]
) -> None:
    if any(node is ancestor for ancestor in ancestors):
        raise yaml.composer.ComposerError(
            None, None, "an alias that contains itself", node.start_mark
        )
    ancestors = (*ancestors, node)
    located.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            child = (*path, str(key_node.value))
            if child in located.lines:  # YAML would silently keep the last one
                first = located.lines[child]
                located.problems.append(
                    (line, f"{dotted(child)} is given twice (first on line {first})")
                )
            located.lines[child] = line
            _locate(value_node, child, located, ancestors)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _locate(item, (*path, index), located, ancestors)
    elif isinstance(node, yaml.ScalarNode):
        # JSON writes an emoji as two escapes, which YAML leaves apart
        node.value = _SURROGATES.sub(_joined, node.value)
        located.spelling[path] = node.value
        if _is_label(path) and node.tag != "tag:yaml.org,2002:null":
            node.tag = "tag:yaml.org,2002:str"


def _is_label(path: KeyPath) -> bool:
    """Whether a value is one of a recipe's labels, or (a part of) the label of a prompt's
    exemplar.
    """
    keys = tuple(key for key in path if key != "<<")
    if keys[:1] == ("exemplars",):
        return keys[-1] == "label" or keys[2:3] == ("label",)
    is_of_field = keys[:2] == ("task", "fields") and keys[3:4] == ("labels",)
    return keys[:2] == ("task", "labels") or is_of_field


_SURROGATES = re.compile("[\ud800-\udbff][\udc00-\udfff]")


def _joined(pair: re.Match[str]) -> str:
    return pair.group().encode("utf-16", "surrogatepass").decode("utf-16")


def dotted(path: KeyPath) -> str:
    """``("train", "seeds", 0)`` as ``train.seeds[0]``."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        elif text:
            text += f".{key}"
        else:
            text = key
    return text


# --- a recipe's file


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe. Raises UserError with every error, its file and its line.

    ``overrides`` are ``key=value`` texts, split on the first ``=``; the value is read as YAML.
    """
    file = find_file(
        path,
        what="recipe",
        hint="give the path of a YAML file; shipped ones are recipes/<name>.yaml",
    )
    located = _read_yaml(file, path)
    data = located.data
    _insert_teacher_file(data, file.parent)
    problems = [f"{path}:{line}: {text}" for line, text in located.problems]
    overridden: set[KeyPath] = set()
    for text in overrides:
        problem = _override(data, text, overridden)
        if problem:
            problems.append(f"override {text!r}: {problem}")
        _insert_teacher_file(data, file.parent)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-._")
    data.setdefault("name", name or "run")
    try:
        recipe = Recipe.model_validate(data, context={"folder": file.parent})
    except ValidationError as error:
        problems += [
            _describe(issue, str(path), located, overridden)
            for issue in error.errors(include_url=False)
        ]
    if problems:
        count = f"{len(problems)} errors" if len(problems) > 1 else "an error"
        raise UserError(
            f"{count} in the recipe\n" + "\n".join(f"  {problem}" for problem in problems),
            hint="fix the recipe; `dsbs show recipes/demo.yaml` prints every key",
        )
    return recipe


def _read_yaml(file: Path, shown: str | Path) -> Located:
    """The mapping in a recipe's file. Raises UserError, which names the file as ``shown``."""
    try:
        located = load_located(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{shown} is not UTF-8 text ({error.reason})", hint="give a YAML recipe"
        ) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        location = f"{shown}:{mark.line + 1}" if mark else str(shown)
        reason = getattr(error, "problem", None) or "cannot be read"
        raise UserError(
            f"{location}: not valid YAML: {reason}",
            hint="fix the line; strings with ':' need quotes",
        ) from None
    if not isinstance(located.data, dict):
        state = "is empty" if located.data is None else "is not a mapping of sections"
        raise UserError(
            f"{shown} {state}",
            hint="begin with 'task:' and 'teacher:'; recipes/demo.yaml is an example",
        )
    return located


def _insert_teacher_file(data: dict[Any, Any], folder: Path) -> None:
    """Replace the name of a teacher's file (``teacher: recipes/teachers/vllm.yaml``) by its
    section. Raises UserError.
    """
    name = data.get("teacher")
    if not isinstance(name, str):
        return
    hint = "give a YAML file with a teacher: section; shipped ones are recipes/teachers/<name>.yaml"
    file = find_file(name, what="teacher file", hint=hint, folder=folder)
    try:
        content = load_located(file.read_text(encoding="utf-8")).data
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: not valid YAML ({error})", hint=hint) from None
    if not isinstance(content, dict) or not isinstance(content.get("teacher"), dict):
        raise UserError(f"{name} has no teacher: section", hint=hint)
    data["teacher"] = content["teacher"]


def _override(data: dict[Any, Any], text: str, overridden: set[KeyPath]) -> str | None:
    """Set one key. Returns what is wrong with the override, if anything."""
    key, equals, value = text.partition("=")
    path = tuple(key.strip().split("."))
    if not equals or not all(path):
        return "not of the form key=value, e.g. train.max_steps=200"
    try:
        parsed = load_located(value, path).data
    except yaml.YAMLError as error:
        return f"the value is not valid YAML ({getattr(error, 'problem', error)})"
    target = data
    for name in path[:-1]:
        if target.get(name) is None:
            target[name] = {}
        target = target[name]
        if not isinstance(target, dict):
            return f"{name} is not a section"
    target[path[-1]] = parsed
    overridden.add(path)
    return None


# --- errors

# Plain words for pydantic's kinds of errors (https://docs.pydantic.dev/latest/errors/validation_errors/).
_EXPECTED = {
    "a mapping of keys to values": ("model_type", "model_attributes_type", "dict_type"),
    "a list": ("list_type", "tuple_type", "set_type"),
    "text": ("string_type",),
    "an integer": ("int_type", "int_parsing", "int_from_float"),
    "a number": ("float_type", "float_parsing"),
    "true or false": ("bool_type", "bool_parsing"),
}
_PLAIN_MESSAGES = {
    kind: f"must be {expected}" for expected, kinds in _EXPECTED.items() for kind in kinds
}


def _describe(issue: Any, file: str, located: Located, overridden: set[KeyPath]) -> str:
    """One of pydantic's errors as a sentence with its place."""
    path: KeyPath = tuple(issue["loc"])
    if path[:1] == ("student",) and path[1:2] in ((ONE,), (SEVERAL,)):
        path = (path[0], *path[2:])  # without the form of the section, which is not in the file
    name = dotted(path)
    location = _location(path, file, located, overridden)
    message = _PLAIN_MESSAGES.get(issue["type"], issue["msg"]).removeprefix("Value error, ")
    if issue["type"] == "extra_forbidden":
        return f"{location}: {_unknown_key(path)}"
    if issue["type"] == "missing":
        return f"{location}: {name} is missing"
    if issue["type"] == "value_error":
        if not name or message.startswith(name.split(".")[0] + "."):
            return f"{location}: {message}"
        return f"{location}: {name}: {message}"
    value = issue.get("input")
    if location != "command line":
        value = located.spelling.get(path, value)
    shown = ""
    if isinstance(value, list | dict):
        shown = f" (given: a {'list' if isinstance(value, list) else 'mapping'})"
    elif isinstance(value, str | int | float | bool):
        shown = f" (given: {str(value)[:60]!r})"
    return f"{location}: {name}: {message[:1].lower()}{message[1:]}{shown}"


def _location(path: KeyPath, file: str, located: Located, overridden: set[KeyPath]) -> str:
    """ "recipe.yaml:7" or "command line"."""
    for override in overridden:
        is_below = path[: len(override)] == override
        is_made_by_it = override[: len(path)] == path and path not in located.lines
        if is_below or is_made_by_it:
            return "command line"
    line = located.line(path)
    return f"{file}:{line}" if line else file


def _unknown_key(path: KeyPath) -> str:
    name = dotted(path)
    if name in REMOVED_KEYS:
        return f"{name}: {REMOVED_KEYS[name]}"
    parent, key = path[:-1], str(path[-1])
    if path[:1] == ("student",) and parent[2:] == ("train",) and key in TrainSection.model_fields:
        return (
            f"{name}: all students share this setting, so that they are compared fairly; it "
            f"belongs to train"
        )
    if path == ("student", "train"):
        return f"{name}: only students with names have settings of their own; use train"
    keys: list[str] = []
    section = _section_at(parent)
    if section is not None:
        keys = list(section.model_fields)
    homes = [home for home in _sections_with(key, Recipe, ()) if home != dotted(parent)]
    if homes:
        return f"{name}: unknown key; it belongs to {' or '.join(homes)}"
    match = _nearest_key(key, keys)
    if match is not None:
        return f"{name}: unknown key; did you mean {match!r}?"
    if keys:
        return f"{name}: unknown key (known here: {', '.join(keys)})"
    return f"{name}: unknown key"


def _section_at(path: KeyPath) -> type[Section] | None:
    """The section at a path of the recipe; None for a loss term, which depends on its kind."""
    section: type[Section] | None = Recipe
    for position, key in enumerate(path):
        if section is None or isinstance(key, int):
            continue
        if position == 1 and path[0] == "student" and key not in section.model_fields:
            section = NamedStudentSection  # the key is a name
            continue
        if key in section.model_fields:  # otherwise the name of a field to extract
            section = section_of(section.model_fields[key].annotation)
    if section is not None and "kind" in section.model_fields and path[:2] == ("train", "terms"):
        return None
    return section


def _nearest_key(key: str, keys: Sequence[str]) -> str | None:
    """The key most like a misspelled one: of its section or, where clearly nearer, of another."""
    near = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    elsewhere = dict(_keys(Recipe, ()))
    far = difflib.get_close_matches(key, elsewhere, n=1, cutoff=0.85)
    if far and difflib.get_close_matches(key, [*near, *far], n=1)[0] not in near:
        return elsewhere[far[0]]
    return near[0] if near else None


def _keys(section: type[Section], path: KeyPath) -> Iterator[tuple[str, str]]:
    """Every key below ``path``, with its dotted path."""
    for name, info in section.model_fields.items():
        yield name, dotted((*path, name))
        inner = _section_in(info)
        if inner is not None:
            yield from _keys(inner, (*path, name))


def _sections_with(key: str, section: type[Section], path: KeyPath) -> Iterator[str]:
    """The sections below ``path``, as dotted paths, that have a key of this name."""
    if path and key in section.model_fields:
        yield dotted(path)
    for name, info in section.model_fields.items():
        inner = _section_in(info)
        if inner is not None:
            yield from _sections_with(key, inner, (*path, name))


def _section_in(field: FieldInfo) -> type[Section] | None:
    """The section under a key that always has one."""
    inner = section_of(field.annotation)
    return inner if inner in (field.annotation, StudentSection) else None


# --- recipes that manifests and results record


def resolved_values(recipe: Recipe) -> dict[str, Any]:
    """Every key of a recipe as a JSON value, with the defaults that depend on the student filled
    in.
    """
    values = recipe.model_dump(mode="json")
    for name, student in recipe.students.items():
        train = student.resolved_train.model_dump(mode="json")
        if student.train.counts_epochs:  # each student's rows decide its steps
            train["max_steps"] = None
        if name is None:
            values["train"] = train
        else:
            settings = values["student"][name]["train"]
            settings |= {key: train[key] for key in train if key in settings or key in RESOLVED}
    if values["teacher"]["endpoints"]:
        del values["teacher"]["base_url"]
    return values


def recorded(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's recipe with this version's keys if it can be read, else as it is."""
    values: dict[str, Any] = manifest["recipe"]
    recipe = read_recorded(manifest)
    return values if recipe is None else resolved_values(recipe)


def read_recorded(manifest: Mapping[str, Any]) -> Recipe | None:
    """A manifest's recipe, or None where it has none that this version can read."""
    values = manifest.get("recipe")
    if not isinstance(values, dict):
        return None
    try:
        return Recipe.model_validate(_current(values))
    except ValidationError:
        return None


def _current(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded recipe without keys that exclude each other, and without those of earlier
    versions.
    """
    values: dict[str, Any] = dict(recipe)
    values.setdefault("report", {})
    for name in ("teacher", "eval", "train", "report"):
        if isinstance(values.get(name), dict):
            values[name] = dict(values[name])
        else:
            return values
    if values["teacher"].get("endpoints"):
        values["teacher"].pop("base_url", None)
    for removed in REMOVED_KEYS:
        section, _, key = removed.partition(".")
        removed_value = values[section].pop(key, None)
        if key == "tensorboard" and removed_value:
            values[section]["trackers"] = ["tensorboard"]
    values["train"]["terms"] = [_current_term(term) for term in values["train"].get("terms", ())]
    return values


def _current_term(term: Any) -> Any:
    """A recorded loss term without the keys of other kinds, which earlier versions wrote."""
    if not isinstance(term, dict) or term.get("kind") not in TERMS:
        return term
    fields = entry(TERMS, term["kind"]).model_fields
    return {key: value for key, value in term.items() if key in fields}
