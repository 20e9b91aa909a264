"""Command line: one module per command; results go to stdout, everything else to stderr."""

from __future__ import annotations

import errno
import io
import logging
import os
import sqlite3
import sys
from importlib import import_module
from typing import Annotated

import typer

from dsbs.errors import DsbsError
from dsbs.files import DISK_FULL

# In the order of `dsbs --help`: each command's function and its help in a line.
COMMANDS = {
    "init": ("dsbs.cli.init:init", "Create a recipe, a prompt and sample data"),
    "import": ("dsbs.cli.import_log:import_log", "Turn a log of calls into rows and a recipe"),
    "doctor": ("dsbs.cli.doctor:doctor", "Check this machine, and a recipe's data and endpoints"),
    "validate": ("dsbs.cli.validate:validate", "Check a recipe against its data"),
    "run": ("dsbs.cli.run:run", "Run all stages: annotate, train, eval, report"),
    "annotate": ("dsbs.cli.annotate:annotate", "Ask the teacher for rationales and labels"),
    "merge": ("dsbs.cli.annotate:merge", "Join the shards of an annotation"),
    "compare-teachers": (
        "dsbs.cli.compare_teachers:compare_teachers",
        "Compare several teachers on a sample",
    ),
    "review": ("dsbs.cli.review:review", "Accept, correct or reject annotations in a browser"),
    "train": ("dsbs.cli.train:train", "Train the students of a recipe"),
    "eval": ("dsbs.cli.evaluate:evaluate", "Score and compare all systems"),
    "report": ("dsbs.cli.report:report", "Write an HTML report of one run or several"),
    "predict": ("dsbs.cli.predict:predict", "Label rows with a student"),
    "compress": ("dsbs.cli.compress:compress", "Make a student smaller"),
    "export": ("dsbs.cli.export:export", "Write a student as ONNX, CTranslate2, torch or GGUF"),
    "push": ("dsbs.cli.push:push", "Upload a student to the Hugging Face Hub"),
    "serve": ("dsbs.cli.serve:serve", "Answer HTTP requests with a student"),
    "ls": ("dsbs.cli.ls:ls", "List runs and their students"),
    "show": ("dsbs.cli.show:show", "Show a recipe with all its keys, or compare two"),
    "schema": ("dsbs.cli.init:schema", "Print the JSON schema of recipes for editors"),
}

app = typer.Typer(
    name="dsbs",
    help="Distilling Step-by-Step: annotate rows with a large teacher, train a small student, "
    "compare it with its baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        from dsbs.files import versions

        print(f"dsbs {versions().get('dsbs', '(not installed)')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass


for _name, (_spec, _short_help) in COMMANDS.items():
    _module, _function = _spec.split(":")
    app.command(_name, short_help=_short_help)(getattr(import_module(_module), _function))


# Errors about a path that a user gave. A file that is missing is each command's own message.
_WRONG_PATH = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG,
    errno.ELOOP,
)  # fmt: skip


def _exit_code() -> int:
    """Run the command line; an error that the user can act on is a message and an exit code."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:  # how typer ends; its message is already printed
        if end.code == 130:
            print("dsbs: interrupted; run the same command to continue", file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0
    except DsbsError as error:
        print(f"dsbs: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Nobody reads stdout any more: the interpreter's own flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except sqlite3.DatabaseError as error:
        print(
            f"dsbs: a database of the run is damaged ({error})\n  try: restore "
            "annotate/replies.sqlite (or serve/ledger.sqlite) from a copy; "
            "`sqlite3 FILE .recover` saves what can be read",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        if error.errno in _WRONG_PATH and error.filename is not None:
            hint = "check the path and its permissions"
            print(f"dsbs: {error.filename}: {error.strerror}\n  try: {hint}", file=sys.stderr)
            return 2
        if error.errno not in DISK_FULL:
            raise
        print(
            f"dsbs: the disk is full ({error})\n  try: free some space, then run the same command",
            file=sys.stderr,
        )
        return 3
    return 0


def replace_unencodable() -> None:
    """Print "?" for characters that a terminal or a log lacks because it is not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def main() -> None:
    """Entry point of ``dsbs``.

    Exit codes: 0 done, 1 failed, 2 bad usage, recipe or data, 3 partial and resumable, 4 below a
    gate (``eval``, ``compress``), 130 interrupted.
    """
    replace_unencodable()
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    # A model that is missing is reported once by dsbs; the Hub client would warn dozens of times.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # What Apple GPUs lack runs on the CPU; torch reads this when it is imported.
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    sys.exit(_exit_code())
