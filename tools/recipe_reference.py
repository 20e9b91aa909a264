"""docs/recipe-reference.md from the recipe's sections and the comments beside their fields.

    python tools/recipe_reference.py

A test holds that the committed page is what this writes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dsbs.config.schema import comments, section_of, sections
from dsbs.config.sections import as_tuple
from dsbs.files import atomic_write

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipe-reference.md"
HEAD = """\
# The recipe, key by key

Written by `tools/recipe_reference.py` from `dsbs/recipe/`; do not edit it here.

A recipe is one YAML file with the sections below; every command reads the whole file and uses its own sections. An unknown
key is a mistake, and all mistakes are told at once with their lines. On the command line, `section.key=value` overrides a
key; the value is read as YAML: `train.seeds=[0,1,2]`, `student.model=null`. `dsbs show RECIPE` prints a recipe with nothing
left out, `dsbs schema` writes the JSON schema by which editors complete and check recipes.
"""
NAMES: dict[Any, str] = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "true or false",
    Any: "anything",
}


def page() -> str:
    """The whole page, as it is to be committed."""
    parts = [HEAD]
    for path, section in sections().items():
        title = f"`{path}` {{ #{anchor(path)} }}" if path else "The file"
        parts.append(f"{'#' * (2 + path.count('.'))} {title}\n")
        if path and section.__doc__:
            parts.append(f"{text(inspect.cleandoc(section.__doc__))}\n")
        parts.append(table(path, section))
    return "\n".join(parts)


def table(path: str, section: type[BaseModel]) -> str:
    said = comments(section)
    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in section.model_fields.items():
        key = f"{path}.{name}".removeprefix(".")
        inner = section_of(field.annotation)
        if inner is None:
            kind = typed(field.annotation, field.metadata)
        else:
            many = " (a list)" if get_origin(field.annotation) is tuple else ""
            kind = f"[section](#{anchor(key)}){many}" + (
                " or null" if NoneType in get_args(field.annotation) else ""
            )
        lines.append(
            f"| `{key}` | {kind} | {default(field, inner, key)} | {text(said.get(name, ''))} |"
        )
    return "\n".join(lines) + "\n"


def typed(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type and its bounds in words: "integer ≥ 0, or a list of such"."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return typed(parts[0], parts[1:])
    if origin in (Union, UnionType):
        kinds = [typed(part, metadata) for part in parts if part is not NoneType]
        return " or ".join([*kinds, "null"] if NoneType in parts else kinds)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in parts)
    if origin is tuple:
        alone = any(getattr(one, "func", None) is as_tuple for one in metadata)
        return f"{typed(parts[0])}, or a list of such" if alone else f"list of {typed(parts[0])}"
    if origin is dict:
        return f"mapping of text to {typed(parts[1])}"
    return " ".join([NAMES[annotation], *bounds(metadata)])


def bounds(metadata: Sequence[Any]) -> Iterator[str]:
    for one in metadata:
        if isinstance(one, FieldInfo):
            yield from bounds(one.metadata)
        for kind, name, sign in (
            (Gt, "gt", "&gt;"),
            (Ge, "ge", "≥"),
            (Lt, "lt", "&lt;"),
            (Le, "le", "≤"),
        ):
            if isinstance(one, kind):
                yield f"{sign} {getattr(one, name):,}"


def default(field: FieldInfo, inner: type[BaseModel] | None, key: str) -> str:
    if field.is_required():
        return "the file's name" if key == "name" else "needed"  # filled in when the file is read
    value = field.default
    if inner is not None and isinstance(value, BaseModel):
        return "its own"
    if isinstance(value, tuple):
        value = list(value)
    written = (
        yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    )
    return f"`{written}`"


def anchor(path: str) -> str:
    return path.replace(".", "-").replace("_", "-")


def text(said: str) -> str:
    """Plain text in a cell of a table: no HTML, no new column, no emphasis; code stays code."""
    said = " ".join(said.replace("``", "`").split())
    parts = said.split("`")
    plain = [
        part.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("*", "\\*")
        for part in parts[::2]
    ]
    code = [f"`{part}`" for part in parts[1::2]]
    joined = "".join(a + b for a, b in zip(plain, [*code, ""], strict=True))
    return joined.replace("|", "\\|")


if __name__ == "__main__":
    with atomic_write(PAGE) as file:
        file.write(page())
    print(PAGE, file=sys.stderr)
