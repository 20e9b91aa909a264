"""The commands: parse, call one stage, print its summary. Results go to stdout, all else to stderr."""

from __future__ import annotations

import errno
import logging
import os
import sys

import typer

from dsbs.cli import compress, desk, export, serve, students, teachers
from dsbs.errors import DsbsError

app = typer.Typer(
    name="dsbs",
    help="Distilling Step-by-Step: annotate with a large teacher, train a small student, compare it with its baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(desk.init)
app.command()(desk.doctor)
app.command()(students.validate)
app.command()(teachers.annotate)
app.command()(teachers.merge)
app.command("compare-teachers")(teachers.compare_teachers)
app.command()(students.train)
app.command("eval")(students.evaluate)
app.command()(students.report)
app.command()(students.predict)
app.command()(compress.compress)
app.command()(export.export)
app.command()(serve.serve)
app.command()(desk.ls)
app.command()(desk.show)
app.command()(desk.schema)


def _exit_code() -> int:
    """Run the command line; a failure that a person can act on becomes its message and exit code."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:  # how typer ends: the code is already said
        if end.code == 130:
            print("dsbs: interrupted; run the same command to continue", file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0
    except DsbsError as error:
        print(f"dsbs: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # the reader left: nothing more to say
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"dsbs: the disk is full ({error})\n  try: free some space, then run the same command",
            file=sys.stderr,
        )
        return 3
    return 0


def main() -> None:
    """Entry point of ``dsbs``.

    Exit codes: 0 done, 1 failed, 2 usage, 3 partial and resumable, 4 below a gate (``eval``, ``compress``), 130 interrupted.
    """
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # our own message says once what it says forty times
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(_exit_code())
