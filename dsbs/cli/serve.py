"""``dsbs serve``: answer HTTP requests with a student."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import Json, print_json

if TYPE_CHECKING:
    from dsbs.serving.run import ServerInfo


class Reply(StrEnum):
    label = "label"
    step_by_step = "step-by-step"


Student = Annotated[
    str,
    typer.Argument(metavar="STUDENT", help="Folder of a trained student or of an export."),
]
TokenEnv = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Environment variable with the bearer token that clients must send. Default: no "
        "authentication.",
        show_default=False,
    ),
]
MaxWait = Annotated[
    float,
    typer.Option(
        min=0, max=1000, help="Milliseconds that an idle model waits for more rows to batch."
    ),
]
Queue = Annotated[
    int, typer.Option(min=1, help="Rows that may wait; any more are refused with status 429.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of the model. Default: one per core.", show_default=False),
]
ReplyFormat = Annotated[
    Reply,
    typer.Option(
        help="What the OpenAI endpoints write: the label; or rationale, line break, anchor and "
        "label, the format that `dsbs annotate` reads from a teacher."
    ),
]
Anchor = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        help="Text before the label in a reply. Default: none for label, 'Answer:' for "
        "step-by-step.",
        show_default=False,
    ),
]


def serve(
    student: Student,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 8000,
    token_env: TokenEnv = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded together, at most.")] = 64,
    max_wait_ms: MaxWait = 5.0,
    max_body_kb: Annotated[
        int, typer.Option(min=1, help="Largest request body, in kilobytes.")
    ] = 1024,
    max_rows: Annotated[int, typer.Option(min=1, max=10_000, help="Rows per request.")] = 256,
    queue: Queue = 2048,
    threads: Threads = None,
    reply: ReplyFormat = Reply.label,
    anchor: Anchor = None,
    drain_s: Annotated[
        int, typer.Option(min=0, help="Seconds for open requests when the server is stopped.")
    ] = 30,
    as_json: Json = False,
) -> None:
    """Serve a student: POST /predict, OpenAI's completions and chat, /health and /metrics.

    Rows of all clients are batched. SIGTERM and Ctrl-C stop the server once open requests are
    answered. With --json, one line on stdout reports that the server is ready.
    """
    from dsbs.serving.run import serve as run
    from dsbs.serving.settings import Settings

    settings = Settings(
        batch_size=batch_size,
        max_wait_ms=max_wait_ms,
        max_body_kb=max_body_kb,
        max_rows=max_rows,
        queue=queue,
        reply=reply.value,
        anchor=anchor,
        drain_s=drain_s,
    )

    def announce(server: ServerInfo) -> None:
        _announce(server, as_json)

    run(student, settings, announce, host=host, port=port, token_env=token_env, threads=threads)


def _announce(server: ServerInfo, as_json: bool) -> None:
    if server.is_exposed:
        print(
            "warning: other machines can reach the server without authentication; pass --token-env",
            file=sys.stderr,
        )
    if as_json:
        print_json({"url": server.url, "student": server.student, "pid": server.pid})
        sys.stdout.flush()
    else:
        print(f"{server.student} listens on {server.url} (Ctrl-C stops it)", file=sys.stderr)
