"""``dsbs schema``: the recipe as JSON schema, for editors; each key's description is the comment beside it in the code."""

from __future__ import annotations

import ast
import inspect
import io
import re
import textwrap
import tokenize
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from dsbs.config import Recipe
from dsbs.config.registry import METHODS, TASKS, TEACHERS, TERMS, entry
from dsbs.config.sections import Section, as_tuple
from dsbs.config.terms import TermSettings

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TOOLS = ("# noqa", "# type:", "# fmt:", "# pragma")  # comments that speak to a tool


def comments(section: type[BaseModel]) -> dict[str, str]:
    """What the source says beside each field of a recipe's section: field -> the comments on its lines, joined.

    The one place that the schema and the reference of the recipe take their words from; None is called null, as in YAML. A
    field without a comment is left out. Raises OSError where the source is not there.
    """
    base = section.__mro__[1]
    found = {} if base is Section or not issubclass(base, Section) else comments(base)
    for name, field in section.model_fields.items():
        if field.description:
            found[name] = re.sub(r"\bNone\b", "null", " ".join(field.description.split()))
    source = textwrap.dedent(inspect.getsource(section))
    said: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(_TOOLS):
            said[token.start[0]] = token.string.removeprefix("#").strip()
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    for node in definition.body:
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and node.target.id in section.model_fields
        ):
            lines = [
                said[line]
                for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
                if line in said
            ]
            if lines:
                found[node.target.id] = re.sub(r"\bNone\b", "null", " ".join(lines))
    return found


def sections() -> dict[str, type[Section]]:
    """Every section of a recipe by its dotted path ("train.lora"), in the order of the file; "" is the whole."""
    found: dict[str, type[Section]] = {}

    def walk(path: str, section: type[Section]) -> None:
        found[path] = section
        for name, field in section.model_fields.items():
            inner = section_of(field.annotation)
            if inner is TermSettings:
                kinds = {entry(TERMS, kind): kind for kind in TERMS}
                for settings, kind in kinds.items():
                    walk("train.terms" if len(kinds) == 1 else f"train.terms.{kind}", settings)
            elif inner is not None:
                walk(f"{path}.{name}".removeprefix("."), inner)

    walk("", Recipe)
    return found


def section_of(annotation: Any) -> type[Section] | None:
    """The section in a field's type: the type itself, or one of a union's or a tuple's."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for part in getattr(annotation, "__args__", ()):
        inner = section_of(part)
        if inner is not None:
            return inner
    return None


class _AsWritten(GenerateJsonSchema):
    """Lists that a single value may stand for."""

    def function_before_schema(
        self, schema: core_schema.BeforeValidatorFunctionSchema
    ) -> JsonSchemaValue:
        found = super().function_before_schema(schema)
        if schema["function"]["function"] is not as_tuple:
            return found
        kinds = found.get("anyOf", [found])
        return {"anyOf": [*kinds, *(one["items"] for one in kinds if "items" in one)]}


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe as people write it: with one value where several may stand, a teacher's file
    in place of its section, and sections left empty.
    """
    schema = Recipe.model_json_schema(schema_generator=_AsWritten)
    parts = schema["$defs"]
    by_name = {section.__name__: section for section in sections().values()}
    by_name |= _add_terms(parts)
    for name, part in [("Recipe", schema), *parts.items()]:
        del part["title"]
        said = comments(by_name[name])
        for key, spec in part["properties"].items():
            _as_written(by_name[name].model_fields[key], spec)
            if key in said:
                spec["description"] = said[key]
    parts["TaskSection"]["properties"]["name"]["enum"] = list(TASKS)
    parts["TeacherSection"]["properties"]["kind"]["enum"] = list(TEACHERS)
    many, one = parts["TrainSection"]["properties"]["methods"]["anyOf"]
    composed = {
        "type": "string",
        "pattern": rf"^({'|'.join(METHODS)})(\+[a-z][a-z0-9-]*)+$",
    }  # with terms by their names
    one["anyOf"] = [{"type": one.pop("type"), "enum": list(METHODS)}, composed]
    many["items"] = dict(one)
    (labels,) = (
        one
        for one in parts["TaskSection"]["properties"]["labels"]["anyOf"]
        if one["type"] == "array"
    )
    labels["items"] = {"type": ["string", "integer"]}  # a label that YAML reads as a number
    file = {
        "type": "string",
        "description": "a file with a teacher: section, e.g. recipes/teachers/vllm.yaml",
    }
    for key, spec in schema["properties"].items():
        if "$ref" in spec and key != "task":
            spec["anyOf"] = [
                {"$ref": spec.pop("$ref")},
                file if key == "teacher" else {"type": "null"},
            ]
    schema["required"] = ["task", "teacher"]  # the name is the file's where it is left out
    return {
        "$schema": DIALECT,
        "title": "dsbs recipe",
        "description": "One YAML file is one experiment.",
    } | schema


def _add_terms(parts: dict[str, Any]) -> dict[str, type[Section]]:
    """Put the registered kinds of term in the place of their base class. Returns their settings classes by name."""
    kinds: dict[type[TermSettings], list[str]] = {}
    for kind in TERMS:
        kinds.setdefault(entry(TERMS, kind), []).append(kind)
    del parts["TermSettings"]
    for settings, names in kinds.items():
        found = settings.model_json_schema(schema_generator=_AsWritten)
        parts.update(found.pop("$defs", {}))
        found["properties"]["kind"]["enum"] = names
        parts[settings.__name__] = found
    entries = [{"$ref": f"#/$defs/{settings.__name__}"} for settings in kinds]
    parts["TrainSection"]["properties"]["terms"]["items"] = {"anyOf": entries}
    return {settings.__name__: settings for settings in kinds}


def _as_written(field: FieldInfo, spec: dict[str, Any]) -> None:
    """A property without what only repeats the code, and with its limits where they belong."""
    spec.pop("title", None)
    if section_of(field.annotation) is not None and spec.get("default") is not None:
        del spec["default"]  # each of its keys has its own
    least = spec.pop("minLength", None)  # of a list, as pydantic calls it behind a validator
    for one in spec.get("anyOf", ()):
        if least is not None and one.get("type") == "array":
            one["minItems"] = least
