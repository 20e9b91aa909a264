"""``dsbs serve``: answer HTTP requests with a student."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dsbs.cli.common import Json, Out, SetKeys, load, print_json, progress
from dsbs.errors import UserError

if TYPE_CHECKING:
    from dsbs.serving.cascade import Cascade, CascadeSettings
    from dsbs.serving.run import ServerInfo


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
MaxBody = Annotated[int, typer.Option(min=1, help="Largest request body, in kilobytes.")]
Queue = Annotated[
    int, typer.Option(min=1, help="Rows that may wait; any more are refused with status 429.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, help="Threads of the model. Default: one per core.", show_default=False),
]
ReplyFormat = Annotated[
    Literal["label", "step-by-step"],
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
Fallback = Annotated[
    str | None,
    typer.Option(
        metavar="RECIPE",
        help="Recipe whose teacher answers the rows that the student is not sure of, by the "
        "student's threshold.json.",
        show_default=False,
    ),
]
MaxUsd = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="With --fallback: US dollars for the teacher a day (UTC). Default: annotate.max_usd "
        "of the recipe, else no limit.",
        show_default=False,
    ),
]
TeacherFailure = Annotated[
    Literal["student", "error"],
    typer.Option(
        help="Where the teacher has no answer: the student's, marked as such; or an error (502)."
    ),
]
TeacherTimeout = Annotated[
    float, typer.Option(min=0.1, help="Seconds that a row waits for the teacher.")
]
Audit = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Share of the student's answers that the teacher is asked about too, after the "
        "response.",
    ),
]
Breach = Annotated[
    Literal["fallback", "warn"],
    typer.Option(
        help="Where the audit shows that the target is missed: the teacher answers everything, or "
        "a warning."
    ),
]
NoNovelty = Annotated[
    bool,
    typer.Option(
        "--no-novelty",
        help="Let the student answer inputs that are unlike its validation rows, if it is sure.",
    ),
]
ResetAudit = Annotated[
    bool,
    typer.Option("--reset-audit", help="Begin the audit anew: the student answers again."),
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
    max_body_kb: MaxBody = 1024,
    max_rows: Annotated[int, typer.Option(min=1, max=10_000, help="Rows per request.")] = 256,
    queue: Queue = 2048,
    threads: Threads = None,
    reply: ReplyFormat = "label",
    anchor: Anchor = None,
    drain_s: Annotated[
        int, typer.Option(min=0, help="Seconds for open requests when the server is stopped.")
    ] = 30,
    fallback: Fallback = None,
    overrides: SetKeys = None,
    out: Out = None,
    max_usd: MaxUsd = None,
    on_teacher_failure: TeacherFailure = "student",
    teacher_timeout_s: TeacherTimeout = 30.0,
    audit: Audit = 0.02,
    on_breach: Breach = "fallback",
    no_novelty: NoNovelty = False,
    reset_audit: ResetAudit = False,
    as_json: Json = False,
) -> None:
    """Serve a student: POST /predict, OpenAI's completions and chat, /health, /metrics and /docs.

    Rows of all clients are batched. With --fallback, a teacher answers what the student is not sure
    of. SIGTERM and Ctrl-C stop the server once open requests are answered. With --json, one line
    on stdout reports that the server is ready.
    """
    from dsbs.serving.cascade import CascadeSettings
    from dsbs.serving.run import serve as run
    from dsbs.serving.settings import Settings

    settings = Settings(
        batch_size=batch_size,
        max_wait_ms=max_wait_ms,
        max_body_kb=max_body_kb,
        max_rows=max_rows,
        queue=queue,
        reply=reply,
        anchor=anchor,
        drain_s=drain_s,
    )

    def announce(server: ServerInfo) -> None:
        _announce(server, as_json)

    cascade_settings = CascadeSettings(
        audit=audit,
        on_teacher_failure=on_teacher_failure,
        on_breach=on_breach,
        teacher_timeout_s=teacher_timeout_s,
        max_waiting=queue,
        max_usd=max_usd,
        asks_novel=not no_novelty,
        reset_audit=reset_audit,
    )
    if fallback is None:
        is_default = cascade_settings == CascadeSettings(max_waiting=queue)
        _check_no_teacher(bool(overrides or out or not is_default))
    with _cascade(student, fallback, overrides, out, cascade_settings) as cascade:
        run(
            student,
            settings,
            announce,
            host=host,
            port=port,
            token_env=token_env,
            threads=threads,
            cascade=cascade,
        )


def _check_no_teacher(has_options: bool) -> None:
    """Raises UserError where an option about the teacher has no effect."""
    if has_options:
        raise UserError(
            "an option about the teacher is given (--set, --out, --max-usd, --audit, --on-breach, "
            "--on-teacher-failure, --teacher-timeout-s, --no-novelty or --reset-audit), and there "
            "is no teacher",
            hint="add --fallback RECIPE",
        )


def _cascade(
    student: str,
    fallback: str | None,
    overrides: list[str] | None,
    out: str | None,
    settings: CascadeSettings,
) -> AbstractContextManager[Cascade | None]:
    """The student before the teacher of a recipe; None without a recipe."""
    if fallback is None:
        return nullcontext()
    from dsbs.project.live_teacher import open_cascade

    return open_cascade(student, load(fallback, overrides), settings, progress(), out=out)


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
