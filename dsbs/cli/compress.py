"""``dsbs compress``: make a trained student smaller."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import DryRun, Json, print_json, print_table, progress
from dsbs.compression import LayersBy
from dsbs.formatting import count
from dsbs.records.results import HealFrom

if TYPE_CHECKING:
    from dsbs.compression.planning import Options
    from dsbs.compression.run import CompressResult


_Student = Annotated[
    str,
    typer.Argument(
        metavar="STUDENT",
        help="Folder of a run's student, or a compressed student, whose chain is continued.",
    ),
]
_Methods = Annotated[
    list[str],
    typer.Option(
        "--method",
        metavar="STEP=VALUE",
        help="prune-heads, prune-ff, drop-layers, magnitude (the share to remove), low-rank "
        "(the share, or energy:share, to keep), quantize (int8, int16, float16). Repeat the "
        "option for a chain of steps.",
        show_default=False,
    ),
]
_MaxDrop = Annotated[
    float,
    typer.Option(min=0, max=1, metavar="X", help="Largest acceptable loss of accuracy on valid."),
]
_HealFrom = Annotated[
    HealFrom | None,
    typer.Option(
        show_default=False,
        help="What a smaller student learns from after each step: the original, by its token "
        "or label distributions and hidden states; the rows of its training; or both. Default: "
        "original where it fits in memory beside its copy, else rows.",
    ),
]
_HealSteps = Annotated[
    int | None,
    typer.Option(
        min=0,
        metavar="N",
        show_default=False,
        help="Optimizer steps of that training; 0: none. Default: a tenth of train.max_steps.",
    ),
]
_HealLearningRate = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        show_default=False,
        help="Learning rate of that training, above 0. Default: a third of the student's.",
    ),
]
_Rounds = Annotated[
    int,
    typer.Option(
        min=1,
        metavar="N",
        help="Remove a share of heads, units or layers in N parts, and measure importance before "
        "each.",
    ),
]
_LayersBy = Annotated[
    LayersBy,
    typer.Option(
        help="Which layers to drop: those whose omission raises the loss least (loss), that "
        "change their input least (influence), or all but evenly spaced ones (position).",
    ),
]


def compress(
    student: _Student,
    methods: _Methods,
    max_drop: _MaxDrop = 0.02,
    heal_from: _HealFrom = None,
    heal_steps: _HealSteps = None,
    heal_learning_rate: _HealLearningRate = None,
    rounds: _Rounds = 1,
    layers_by: _LayersBy = "loss",
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Prune, factorize or quantize a student; fine-tune after each step and compare on valid."""
    from dsbs.compression import run as stage
    from dsbs.compression.planning import Options

    if dry_run:
        options = Options(heal_from, heal_steps, heal_learning_rate, rounds, layers_by)
        _print_plan(student, methods, options, as_json=as_json)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # schedulers send it, like Ctrl-C
    result = stage.compress(
        student,
        methods,
        max_drop=max_drop,
        heal_from=heal_from,
        heal_steps=heal_steps,
        heal_learning_rate=heal_learning_rate,
        rounds=rounds,
        layers_by=layers_by,
        progress=progress(),
    )
    if as_json:
        print_json(result.as_json())
    else:
        _print_steps(result)
    refusal = result.refusal()
    if refusal:
        raise refusal


def _print_plan(student: str, methods: list[str], options: Options, *, as_json: bool) -> None:
    from dsbs.compression.run import prepare
    from dsbs.compression.source import find_source

    _, steps = prepare(find_source(student), methods, options, progress())
    lines = [
        {
            "name": step.name,
            "path": str(step.folder),
            "healing_steps": step.healing.steps,
            "heal_from": step.healing.source,
            "learning_rate": step.healing.learning_rate if step.healing.steps else None,
            "done": step.done,
        }
        for step in steps
    ]
    if as_json:
        print_json({"steps": lines})
        return
    for step in steps:
        state = "no healing"
        if step.done:
            state = "already done"
        elif step.healing.steps:
            healing = f"{count(step.healing.steps, 'step')} of healing"
            state = f"{healing} from {step.healing.source}"
        print(f"{step.name}: {state}; {step.folder}")


def _print_steps(result: CompressResult) -> None:
    from dsbs.compression.run import TABLE_HEADINGS

    title = f"{result.source.student.name} on {count(result.steps[0].n, 'row')} of valid"
    print_table(TABLE_HEADINGS, result.table(), title=title, numeric=True)
    print(f"students: {', '.join(map(str, result.folders))}")
