"""``dsbs compress``: smaller students out of a trained one."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import DryRun, Json, print_json, progress

if TYPE_CHECKING:
    from dsbs.compression.run import CompressResult


def compress(
    student: Annotated[
        str,
        typer.Argument(metavar="STUDENT", help="A run's student, or a compressed one, whose chain goes on: its folder."),
    ],
    methods: Annotated[
        list[str],
        typer.Option(
            "--method",
            metavar="STEP=VALUE",
            help="prune-heads, prune-ff, drop-layers, magnitude (of a share that goes), low-rank (of a share or energy:share "
            "that stays), quantize (int8, int16, float16). Several make a chain.",
            show_default=False,
        ),
    ],
    max_drop: Annotated[
        float, typer.Option(min=0, max=1, metavar="X", help="Accuracy on valid that may be lost against the original.")
    ] = 0.02,
    heal_steps: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="N", show_default=False,
            help="Optimizer steps that each changed student trains on; 0: none. Default: a tenth of train.max_steps.",
        ),
    ] = None,
    heal_learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="X", show_default=False, help="Of that training, above 0. Default: a third of the student's own.",
        ),
    ] = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:  # fmt: skip
    """Make smaller students of a trained one: prune, factor, quantise; each healed and held against it on valid."""
    from dsbs.compression import run as engine

    if dry_run:
        _print_plan(student, methods, heal_steps, heal_learning_rate, as_json=as_json)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
    result = engine.compress(
        student,
        methods,
        max_drop=max_drop,
        heal_steps=heal_steps,
        heal_learning_rate=heal_learning_rate,
        progress=progress(),
    )
    if as_json:
        print_json(result.as_json())
    else:
        _print_steps(result)
    refusal = result.refusal()
    if refusal:
        raise refusal


def _print_plan(
    student: str,
    methods: list[str],
    heal_steps: int | None,
    heal_learning_rate: float | None,
    *,
    as_json: bool,
) -> None:
    from dsbs.compression.run import prepared
    from dsbs.compression.source import find_origin
    from dsbs.progress import NoProgress

    _, steps = prepared(find_origin(student), methods, heal_steps, heal_learning_rate, NoProgress())
    lines = [
        {
            "name": "+".join(step.chain),
            "path": str(step.folder),
            "healing_steps": step.healing_steps,
            "learning_rate": step.learning_rate if step.healing_steps else None,
            "done": step.done,
        }
        for step in steps
    ]
    if as_json:
        print_json({"steps": lines})
        return
    for line in lines:
        healing = (
            f"{line['healing_steps']} steps of healing" if line["healing_steps"] else "no healing"
        )
        print(f"{line['name']}: {'finished before' if line['done'] else healing}; {line['path']}")


def _print_steps(result: CompressResult) -> None:
    from rich.console import Console
    from rich.table import Table

    from dsbs.compression.table import HEADINGS, cells, original_cells

    table = Table(
        title=f"{result.origin.student.name} on {result.steps[0].n} rows of valid",
        title_justify="left",
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    table.add_row(*original_cells(result.steps[-1].original))
    for record in result.steps:
        table.add_row(*cells(record))
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(table)
    print(f"students: {', '.join(map(str, result.folders))}")
