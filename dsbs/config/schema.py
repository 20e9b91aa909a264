"""JSON schema of the recipe, for editors (``dsbs schema``), and the sections that make it up."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from dsbs.config.recipe import Recipe
from dsbs.config.registry import METHODS, TASKS, TEACHERS, TERMS, entry
from dsbs.config.sections import Section, as_tuple
from dsbs.config.student import NamedStudentSection, StudentSection
from dsbs.config.terms import TermSettings
from dsbs.config.train import StudentTrainSection

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """The documentation of a section's keys: the docstring below each field, with None called null
    as in YAML.
    """
    texts = {}
    for name, field in section.model_fields.items():
        text = " ".join((field.description or "").split())
        texts[name] = re.sub(r"\bNone\b", "null", text).replace("``", "`")
    return texts


def sections() -> dict[str, type[Section]]:
    """Every section of a recipe by its dotted path ("train.lora"), in the order of the file; "" is
    the whole file.

    The kinds of loss term are listed as ``train.terms.<kind>``, and the section of one of several
    students as ``student.NAME``.
    """
    by_path: dict[str, type[Section]] = {}

    def visit(path: str, section: type[Section]) -> None:
        by_path[path] = section
        if section is TermSettings:
            for kind in TERMS:
                by_path[f"{path}.{kind}"] = entry(TERMS, kind)
        for name, field in section.model_fields.items():
            inner = section_of(field.annotation)
            if inner is not None:
                visit(f"{path}.{name}".removeprefix("."), inner)
            if inner is StudentSection:
                by_path["student.NAME"] = NamedStudentSection
                by_path["student.NAME.train"] = StudentTrainSection

    visit("", Recipe)
    return by_path


def section_of(annotation: Any) -> type[Section] | None:
    """The section in a field's type: the type itself, or one inside a union or a tuple."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        inner = section_of(argument)
        if inner is not None:
            return inner
    return None


class _RecipeJsonSchema(GenerateJsonSchema):
    """Pydantic's schema, with a single value allowed where ``as_tuple`` makes it a list."""

    def function_before_schema(
        self, schema: core_schema.BeforeValidatorFunctionSchema
    ) -> JsonSchemaValue:
        inner = super().function_before_schema(schema)
        if schema["function"]["function"] is not as_tuple:
            return inner
        options = inner.get("anyOf", [inner])
        items = [option["items"] for option in options if "items" in option]
        return {"anyOf": [*options, *items]}


def recipe_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a recipe as people write it.

    It allows a single value in place of a list, a teacher's file in place of its section, and
    sections left empty.
    """
    schema = Recipe.model_json_schema(schema_generator=_RecipeJsonSchema)
    definitions = schema["$defs"]
    by_name = {section.__name__: section for section in sections().values()}
    _add_terms(definitions)
    for name, definition in [("Recipe", schema), *definitions.items()]:
        _document(definition, by_name[name])
    _add_registered_names(definitions)
    section, mapping = schema["properties"]["student"].pop("oneOf")
    mapping["additionalProperties"] = {"anyOf": [mapping["additionalProperties"], {"type": "null"}]}
    schema["properties"]["student"]["anyOf"] = [section, mapping, {"type": "null"}]
    teacher_file = {
        "type": "string",
        "description": "a file with a teacher: section, e.g. recipes/teachers/vllm.yaml",
    }
    for key, spec in schema["properties"].items():
        if "$ref" in spec and key != "task":
            other = teacher_file if key == "teacher" else {"type": "null"}
            spec["anyOf"] = [{"$ref": spec.pop("$ref")}, other]
    schema["required"] = ["task", "teacher"]  # the name defaults to the file's
    return {
        "$schema": DIALECT,
        "title": "dsbs recipe",
        "description": "One YAML file is one experiment.",
    } | schema


def _add_terms(definitions: dict[str, Any]) -> None:
    """Replace the base class of loss terms by the registered kinds."""
    del definitions["TermSettings"]
    references = []
    for kind in TERMS:
        settings = entry(TERMS, kind)
        definition = settings.model_json_schema(schema_generator=_RecipeJsonSchema)
        definitions.update(definition.pop("$defs", {}))
        definition["properties"]["kind"]["const"] = kind
        definitions[settings.__name__] = definition
        references.append({"$ref": f"#/$defs/{settings.__name__}"})
    definitions["TrainSection"]["properties"]["terms"]["items"] = {"anyOf": references}


def _document(definition: dict[str, Any], section: type[Section]) -> None:
    """Give the keys of a section their documentation, and remove what repeats the code."""
    del definition["title"]
    texts = descriptions(section)
    for key, spec in definition["properties"].items():
        _clean(section.model_fields[key], spec)
        spec["description"] = texts[key]


def _clean(field: FieldInfo, spec: dict[str, Any]) -> None:
    spec.pop("title", None)
    if section_of(field.annotation) is not None and spec.get("default") is not None:
        del spec["default"]  # each of its keys has its own
    min_length = spec.pop("minLength", None)  # pydantic's name for it behind a validator
    if min_length is None:
        return
    for option in spec.get("anyOf", ()):
        if option.get("type") == "array":
            option["minItems"] = min_length


def _add_registered_names(definitions: dict[str, Any]) -> None:
    task = definitions["TaskSection"]["properties"]
    task["name"]["enum"] = list(TASKS)
    for option in task["labels"]["anyOf"]:
        if option["type"] == "array":  # YAML reads some labels as numbers
            option["items"] = {"type": ["string", "integer"]}
    definitions["TeacherSection"]["properties"]["kind"]["enum"] = list(TEACHERS)
    with_terms = rf"^({'|'.join(METHODS)})(\+[a-z][a-z0-9-]*)+$"
    method = {
        "anyOf": [
            {"type": "string", "enum": list(METHODS)},
            {"type": "string", "pattern": with_terms},
        ]
    }
    methods = definitions["TrainSection"]["properties"]["methods"]
    methods["anyOf"] = [methods["anyOf"][0] | {"items": method}, method]
