"""Command reference: writes docs/commands.md from the commands' own help.

    python tools/command_reference.py

A test compares the committed page with what this writes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from dsbs.cli import app
from dsbs.files import atomic_write

PAGE = Path(__file__).resolve().parent.parent / "docs" / "commands.md"
HEAD = """\
# Commands

Written by `tools/command_reference.py` from the commands' `--help`; do not edit it by hand.

Results go to stdout, progress and messages to stderr. `--json` prints one JSON object on stdout and
nothing else. An interrupted command continues when it is run again: finished work is not
repeated, and replies are not bought twice.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | failed: an unreachable endpoint, a missing model; finished work is kept |
| 2 | a mistake in usage, recipe or data; the message says what to fix |
| 3 | partial: a spending limit, a full disk, rows without a reply; run the command again |
| 4 | finished, but below `--min-accuracy`, `--min-delta`, `--min-coverage` or `--max-drop` |
| 130 | interrupted by Ctrl-C or, where a run can continue, SIGTERM; run the command again |

"""
MORE = {  # pages that say more than the help does
    "init": "[Managing runs and recipes](projects.md)",
    "import": "[Importing a log](importing.md)",
    "doctor": "[Managing runs and recipes](projects.md)",
    "validate": "[Tutorial](tutorial.md), "
    "[Choosing a teacher](teachers.md#the-prompt-before-a-reply-is-paid-for)",
    "run": "[Tutorial](tutorial.md), [Training](training.md#run-all-stages)",
    "annotate": "[Annotation](annotation.md), [Choosing a teacher](teachers.md)",
    "merge": "[Annotation](annotation.md#scale-shards-and-ray)",
    "compare-teachers": "[Choosing a teacher](teachers.md#several-teachers-on-the-same-rows)",
    "train": "[Training](training.md), [Choosing λ](choosing-lambda.md), "
    "[Distributed training](training-on-many.md)",
    "eval": "[Evaluation](evaluation.md)",
    "report": "[Reading a report](reading-a-report.md)",
    "review": "[Reviewing annotations](reviewing.md)",
    "predict": "[Files of predictions](deploy.md#predict), [Python API](python.md)",
    "compress": "[Compressing a student](compress.md)",
    "export": "[Exporting a student](deploy.md)",
    "push": "[Uploading to the Hugging Face Hub](deploy.md#push)",
    "serve": "[Serving a student](serving.md)",
    "ls": "[Managing runs and recipes](projects.md)",
    "show": "[Managing runs and recipes](projects.md)",
    "schema": "[Recipe reference](recipe-reference.md)",
}


def page() -> str:
    """The complete page."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    listed = "".join(
        f"- [`dsbs {name}`](#dsbs-{name}): {first_sentence(command.help)}\n"
        for name, command in commands.items()
    )
    sections = [f"\n{section(name, command)}" for name, command in commands.items()]
    return HEAD + listed + "".join(sections)


def section(name: str, command: Any) -> str:
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    options = [item for item in command.params if item.param_type_name == "option"]
    usage = " ".join(
        ["dsbs", name, *(placeholder(item) for item in arguments), "[OPTIONS]" if options else ""]
    ).strip()
    lines = [
        f"## `dsbs {name}` {{ #dsbs-{name} }}",
        "",
        " ".join(command.help.split()),
        "",
        f"    {usage}",
        "",
    ]
    lines += ["| | meaning |", "| --- | --- |"]
    lines += [f"| `{cell(item.metavar)}` | {cell(item.help)} |" for item in arguments]
    lines += [f"| `{spelled(item)}` | {cell(item.help)}{default(item)} |" for item in options]
    if name in MORE:
        lines += ["", f"More: {MORE[name]}."]
    return "\n".join(lines) + "\n"


def placeholder(argument: Any) -> str:
    """``FILE``, ``[FILE]`` if it may be left out, ``FILE…`` if there may be several."""
    text: str = argument.metavar
    if not argument.required:
        text = f"[{text}]"
    if argument.nargs == -1:
        text += "…"
    return text


def spelled(option: Any) -> str:
    value = "" if option.is_flag else f" {option.metavar or 'VALUE'}"
    return " ".join(option.opts) + value


def default(option: Any) -> str:
    if option.is_flag or option.default is None or not option.show_default:
        return ""
    return f" Default: {getattr(option.default, 'value', option.default)}."


def first_sentence(text: str) -> str:
    return " ".join(text.split()).split(". ")[0].rstrip(".")


def cell(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    with atomic_write(PAGE) as file:
        file.write(page())
    print(PAGE, file=sys.stderr)
