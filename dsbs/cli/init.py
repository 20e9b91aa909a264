"""``dsbs init`` and ``dsbs schema``: a new project folder, and the JSON schema for editors."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsbs.cli.common import Json, print_json


class Template(StrEnum):
    classification = "classification"
    multilabel = "multilabel"
    score = "score"
    extraction = "extraction"
    generation = "generation"
    nli = "nli"
    math = "math"


def init(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="Name of the new folder, of its recipe and its runs."),
    ],
    template: Annotated[
        Template,
        typer.Option(
            help="classification: one of a closed set of labels; multilabel: any number of them; "
            "score: a number on a scale; extraction: named fields; generation: free text; "
            "nli: premise and hypothesis; math: word problems and equations."
        ),
    ] = Template.classification,
    as_json: Json = False,
) -> None:
    """Create a folder with a recipe, a prompt and sample rows, ready to run and to adapt."""
    from dsbs.project.init import init as run

    folder = run(name, template.value)
    files = sorted(path.name for path in folder.iterdir())
    if as_json:
        print_json({"folder": str(folder), "files": files})
        return
    print(f"{folder}/: {', '.join(files)}")
    print(f"next:\n  cd {folder}\n  dsbs validate recipe.yaml\n  dsbs doctor recipe.yaml")
    print("README.md in that folder explains the rest; comments in recipe.yaml say what to change.")


def schema(
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Write the schema to this file. Default: stdout.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Print the recipe's JSON schema, which lets editors complete and check recipes."""
    from dsbs.config.schema import recipe_schema

    text = json.dumps(recipe_schema(), ensure_ascii=False, indent=2)
    if out is None:
        print(text)
        return
    from dsbs.files import atomic_write

    with atomic_write(out) as file:
        file.write(text + "\n")
    print(f"{out}\nIn a recipe's first line: # yaml-language-server: $schema={out}")
