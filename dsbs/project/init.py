"""``dsbs init``: a folder with a recipe, a prompt and sample rows, to be changed into one's own."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from string import Template
from typing import Literal

import yaml

from dsbs.config import Recipe
from dsbs.config.schema import recipe_schema
from dsbs.errors import UserError
from dsbs.files import find_file

Kind = Literal["classification", "generation", "nli", "math"]
SCHEMA = "recipe.schema.json"
_HEAD = (
    f"# yaml-language-server: $schema={SCHEMA}\n"  # where editors look for it: beside the recipe
)


def init(name: str, kind: Kind = "classification", parent: Path | None = None) -> Path:
    """Make the folder ``name`` in ``parent`` (None: here) from a shipped template, and return it.

    It appears whole or not at all. Raises UserError for a name that a recipe cannot have, and where something is there.
    """
    pattern = str(Recipe.model_json_schema()["properties"]["name"]["pattern"])
    if not re.fullmatch(pattern.strip("^$"), name):
        raise UserError(
            f"{name!r} is no name for a recipe and its runs",
            hint="begin with a letter or digit, then letters, digits, '.', '_' and '-'; go to the folder that it shall lie in",
        )
    folder = (parent or Path()) / name
    partial = folder.with_name(f".{name}.partial")  # what a kill leaves behind is made anew
    try:
        if folder.is_symlink() or (
            folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
        ):
            raise UserError(
                f"{folder} is there already", hint="give another name; nothing is overwritten"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _fill(partial, name, kind)
        partial.rename(folder)  # an empty folder gives way, any other refuses
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the folder {folder} cannot be made ({error.strerror})",
            hint="go to a folder that can be written to",
        ) from None
    return folder


def _fill(folder: Path, name: str, kind: Kind) -> None:
    hint = "install dsbs again: its templates are missing"
    source = find_file(f"data/templates/{kind}/recipe.yaml", what="template", hint=hint).parent
    for file in sorted(source.iterdir()):
        text = file.read_text(encoding="utf-8")
        if file.name == "recipe.yaml":
            text = (
                _HEAD + yaml.safe_dump({"name": name}) + text
            )  # quoted where YAML would read a number
        elif file.name == "README.md":
            text = Template(text).substitute(name=name)
        (folder / file.name).write_text(text, encoding="utf-8", newline="\n")
    schema = json.dumps(recipe_schema(), ensure_ascii=False, indent=2)
    (folder / SCHEMA).write_text(schema + "\n", encoding="utf-8", newline="\n")
