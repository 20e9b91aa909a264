"""``dsbs annotate`` and ``dsbs merge``: ask the teacher, and join shards."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsbs.cli.common import (
    DryRun,
    Json,
    Out,
    Overrides,
    RecipePath,
    SetKeys,
    load,
    print_annotate_plan,
    print_annotate_result,
    print_json,
    print_split,
    progress,
)
from dsbs.errors import UserError
from dsbs.formatting import count, dollars, duration, rate

if TYPE_CHECKING:
    from dsbs.annotation.planning import PilotResult, Plan
    from dsbs.annotation.run import Buying
    from dsbs.annotation.summary import AnnotateResult
    from dsbs.config import Recipe
    from dsbs.records import NextRounds


_SHOWN_IDS = 5  # of the rows that --next would choose
PilotRows = Annotated[
    int | None,
    typer.Option(
        "--pilot",
        min=1,
        metavar="N",
        help="Annotate a stratified sample of N rows, estimate the full cost, and stop.",
    ),
]
NextRows = Annotated[
    int | None,
    typer.Option(
        "--next",
        min=1,
        metavar="N",
        help="Choose the N train rows that are expected to teach most (annotate.next), and "
        "annotate only the rows chosen so far.",
    ),
]
Batch = Annotated[
    bool,
    typer.Option("--batch", help="Use the endpoint's Batch API: cheaper, done within hours."),
]
BatchExport = Annotated[
    Path | None,
    typer.Option(
        "--batch-export",
        metavar="FILE",
        help="Write the requests for `vllm run-batch`; send nothing.",
    ),
]
BatchImport = Annotated[
    Path | None,
    typer.Option(
        "--batch-import", metavar="FILE", help="Read the output of `vllm run-batch`; send nothing."
    ),
]
ShardName = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="Annotate shard I of N only; join with `dsbs merge`."
    ),
]
RetryRefused = Annotated[
    bool,
    typer.Option(
        "--retry-refused", help="Retry requests that the endpoint permanently rejected before."
    ),
]
FromServe = Annotated[
    bool,
    typer.Option(
        "--from-serve",
        help="Add the rows that a server sent to this teacher (`dsbs serve --fallback`) to the "
        "train rows. Their replies are stored and cost nothing.",
    ),
]


def annotate(
    recipe: RecipePath,
    overrides: Overrides = None,
    set_keys: SetKeys = None,
    out: Out = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    pilot: PilotRows = None,
    next_rows: NextRows = None,
    batch: Batch = False,
    batch_export: BatchExport = None,
    batch_import: BatchImport = None,
    shard: ShardName = None,
    from_serve: FromServe = False,
    retry_refused: RetryRefused = False,
) -> None:
    """Ask the teacher for a rationale and a label for every row."""
    from dsbs.annotation import planning
    from dsbs.annotation import run as stage
    from dsbs.annotation.backends import teacher_class
    from dsbs.annotation.shards import shard_recipe
    from dsbs.tasks.shards import Shard

    loaded = load(recipe, overrides, set_keys)
    if from_serve:
        loaded = _with_served_rows(loaded, out)
    parsed_shard = None if shard is None else Shard.parse(shard)
    if parsed_shard is not None:
        loaded = shard_recipe(loaded, parsed_shard)
    modes = {"--pilot": pilot, "--batch": batch, "--batch-export": batch_export}
    _check_exclusive(modes | {"--shard": shard})
    _check_exclusive(modes | {"--batch-import": batch_import})
    for name, value in (modes | {"--batch-import": batch_import, "--dry-run": dry_run}).items():
        _check_exclusive({"--retry-refused": retry_refused, name: value})
    _check_exclusive({"--next": next_rows, "--pilot": pilot, "--shard": shard})
    rounds = None
    if next_rows is not None:
        from dsbs.annotation.next_rows import choose

        rounds = choose(loaded, next_rows, out=out, write=not dry_run, progress=progress())
    if dry_run:
        if rounds is None or teacher_class(loaded.teacher.kind).is_asked:
            plan = planning.plan(loaded, out, parsed_shard, batch=batch, rounds=rounds)
            _print_plan(plan, rounds, as_json)
        else:
            _print_plan(None, rounds, as_json)
        return
    if pilot is not None:
        _print_pilot(planning.pilot(loaded, pilot, out=out, progress=progress()), as_json)
        return
    if batch_export is not None:
        _print_export(stage.export_batch(loaded, batch_export, out=out), batch_export, as_json)
        return
    buying: Buying = "online"
    outputs: list[Path] = []
    if batch:
        buying = "batch"
    elif batch_import is not None:
        buying = "nothing"
        outputs = [batch_import]
    result = stage.annotate(
        loaded,
        out=out,
        progress=progress(),
        buying=buying,
        shard=parsed_shard,
        outputs=outputs,
        retry_refused=retry_refused,
    )
    _print_result(result, as_json)


def _with_served_rows(recipe: Recipe, out: str | None) -> Recipe:
    """The recipe with the rows that a server sent to the teacher, which are written to a file."""
    from dsbs.run_folder import RunFolder
    from dsbs.serving.ledger import write_rows

    run = RunFolder.of(recipe, out)
    target = run.served_rows
    named = recipe.task.data.served
    folders = (Path(), recipe.folder or Path())  # as data files are found
    if named is not None and target.resolve() not in [(f / named).resolve() for f in folders]:
        raise UserError(
            f"task.data.served names {named}, and --from-serve writes {target}",
            hint="remove task.data.served, or annotate its rows without --from-serve",
        )
    rows = write_rows(run.ledger, target, recipe.task.columns)
    print(
        f"{count(rows, 'served row')}: {target}. To train on them: task.data.served={target}",
        file=sys.stderr,
    )
    data = recipe.task.data.model_copy(update={"served": str(target.absolute())})
    task = recipe.task.model_copy(update={"data": data})
    return recipe.model_copy(update={"task": task})


def merge(
    recipe: RecipePath,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SHARD", help="The shards' run folders. Default: all in <run>/shards."
        ),
    ] = None,
    overrides: SetKeys = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Join the replies and reviews of shards (`dsbs annotate --shard`). Sends nothing."""
    from dsbs.annotation.run import merge as run

    loaded = load(recipe, overrides)
    _print_result(run(loaded, out=out, folders=folders or (), progress=progress()), as_json)


def _check_exclusive(options: Mapping[str, Any]) -> None:
    used = [name for name, value in options.items() if value]
    if len(used) > 1:
        raise UserError(f"{' and '.join(used)} exclude each other", hint="use one of them")


def _print_plan(plan: Plan | None, rounds: NextRounds | None, as_json: bool) -> None:
    """``plan`` None: no requests are sent to the teacher."""
    entry = None if rounds is None else rounds.rounds[-1]
    if as_json:
        figures = {} if plan is None else plan.as_json()
        print_json(figures if entry is None else figures | {"next": entry.model_dump()})
        return
    if entry is not None:
        print(f"next: {', '.join(entry.rows[:_SHOWN_IDS])} … (all with --json)")
    if plan is not None:
        print_annotate_plan(plan)


def _print_export(requests: int, file: Path, as_json: bool) -> None:
    if as_json:
        print_json({"requests": requests, "file": str(file)})
    else:
        print(f"{count(requests, 'request')}: {file}")


def _print_pilot(result: PilotResult, as_json: bool) -> None:
    if as_json:
        print_json(result.as_json())
        return
    print_split("pilot", result.summary)
    print(f"  acceptance rate {rate(result.acceptance_rate)}")
    print(f"annotations: {result.path}")
    cost = dollars(result.projected_usd)
    if result.projected_usd is not None:
        cost = f"about {cost}"
    print(f"All {count(result.rows, 'row')}: {cost}, about {duration(result.projected_seconds)}.")
    print("Run without --pilot to continue: the pilot's replies are reused, not requested again.")


def _print_result(result: AnnotateResult, as_json: bool) -> None:
    if as_json:
        print_json(result.as_json())
    else:
        print_annotate_result(result)
    error = result.error()
    if error is not None:
        raise error
