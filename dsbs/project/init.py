"""New projects: a folder with a recipe, a prompt and sample rows, to be adapted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from string import Template
from typing import Literal

import yaml

from dsbs.config.schema import recipe_schema
from dsbs.errors import UserError
from dsbs.files import check_file_name, find_file, move

Kind = Literal["classification", "multilabel", "score", "extraction", "generation", "nli", "math"]
SCHEMA = "recipe.schema.json"
# Editors look for the schema beside the recipe.
_HEAD = f"# yaml-language-server: $schema={SCHEMA}\n"


def init(name: str, kind: Kind = "classification", parent: Path | None = None) -> Path:
    """Create the folder ``name`` in ``parent`` (None: here) from a shipped template; return it.

    It appears complete or not at all. Raises UserError for a name that a recipe cannot have, and
    where the folder exists.
    """
    try:
        check_file_name(name)
    except ValueError:
        raise UserError(
            f"{name!r} is not a valid name for a recipe and its runs",
            hint="use a letter or digit, then letters, digits, '.', '_' and '-'; "
            "to create it in another folder, go there first",
        ) from None
    folder = (parent or Path()) / name
    partial = folder.with_name(f".{name}.partial")  # a killed command may leave it
    try:
        if not _is_free(folder):
            raise UserError(
                f"{folder} exists already", hint="give another name; nothing is overwritten"
            )
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _fill(partial, name, kind)
        move(partial, folder)  # replaces an empty folder; fails on any other
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the folder {folder} cannot be created ({error.strerror})",
            hint="go to a writable folder",
        ) from None
    return folder


def _is_free(folder: Path) -> bool:
    """Whether nothing, or an empty folder, has this name."""
    if folder.is_symlink():
        return False
    if folder.is_dir():
        return not any(folder.iterdir())
    return not folder.exists()


def _fill(folder: Path, name: str, kind: Kind) -> None:
    hint = "install dsbs again: its templates are missing"
    source = find_file(f"data/templates/{kind}/recipe.yaml", what="template", hint=hint).parent
    for file in sorted(source.iterdir()):
        text = file.read_text(encoding="utf-8")
        if file.name == "recipe.yaml":
            # safe_dump quotes a name that YAML would read as a number
            text = _HEAD + yaml.safe_dump({"name": name}) + text
        elif file.name == "README.md":
            text = Template(text).substitute(name=name)
        (folder / file.name).write_text(text, encoding="utf-8", newline="\n")
    schema = json.dumps(recipe_schema(), ensure_ascii=False, indent=2)
    (folder / SCHEMA).write_text(schema + "\n", encoding="utf-8", newline="\n")
