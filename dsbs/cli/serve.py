"""The command that puts a student behind HTTP."""

from __future__ import annotations

import dataclasses
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import Json, print_json

if TYPE_CHECKING:
    from dsbs.serving.run import Ready


class Reply(StrEnum):
    label = "label"
    step_by_step = "step-by-step"


def serve(
    student: Annotated[
        str,
        typer.Argument(metavar="STUDENT", help="A student's folder, of training or of an export."),
    ],
    host: Annotated[str, typer.Option(help="The address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The environment variable with the token that clients must bear. Default: none is asked for.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded together, at most.")] = 64,
    max_wait_ms: Annotated[
        float,
        typer.Option(
            min=0,
            max=1000,
            help="Milliseconds that a row waits for others while the model is idle.",
        ),
    ] = 5.0,
    max_body_kb: Annotated[
        int, typer.Option(min=1, help="Kilobytes of a request's body, at most.")
    ] = 1024,
    max_rows: Annotated[
        int, typer.Option(min=1, max=10_000, help="Rows of a request, at most.")
    ] = 256,
    queue: Annotated[
        int, typer.Option(min=1, help="Rows that wait for the model, at most; more get a 429.")
    ] = 2048,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads of the model. Default: one for each core.", show_default=False
        ),
    ] = None,
    reply: Annotated[
        Reply,
        typer.Option(
            help="What the OpenAI endpoints write: the label; or rationale, line break, anchor and label, as `dsbs annotate` "
            "reads a teacher."
        ),
    ] = Reply.label,
    anchor: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="What stands before the label there. Default: nothing with label, 'Answer:' with step-by-step.",
            show_default=False,
        ),
    ] = None,
    drain_s: Annotated[
        int,
        typer.Option(min=0, help="Seconds for what is in flight when the server is told to stop."),
    ] = 30,
    as_json: Json = False,
) -> None:
    """Answer over HTTP with a student: POST /predict, OpenAI's completions and chat, /health and /metrics.

    Rows of all clients are decoded in batches. SIGTERM and Ctrl-C stop it once what is in flight is answered. With --json the
    line on stdout says that it is ready, and where.
    """
    from dsbs.serving.run import serve as run
    from dsbs.serving.settings import Settings

    settings = Settings(
        batch_size=batch_size, max_wait_ms=max_wait_ms, max_body_kb=max_body_kb, max_rows=max_rows, queue=queue,
        reply=reply.value, anchor=anchor, drain_s=drain_s,
    )  # fmt: skip

    def ready(server: Ready) -> None:
        if server.exposed:
            print(
                "dsbs: whoever reaches this address is answered: no token is asked for (--token-env NAME asks for one)",
                file=sys.stderr,
            )
        if as_json:
            told = dataclasses.asdict(server)
            print_json({name: told[name] for name in ("url", "student", "pid")})
            sys.stdout.flush()
        else:
            print(f"{server.student} answers on {server.url} (Ctrl-C stops it)", file=sys.stderr)

    run(student, settings, ready, host=host, port=port, token_env=token_env, threads=threads)
