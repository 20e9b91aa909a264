"""The commands that ask a teacher: annotate, merge, compare-teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dsbs.cli.common import (
    DryRun,
    Json,
    Out,
    Overrides,
    RecipePath,
    dollars,
    indented,
    load,
    print_json,
    progress,
    stamp,
)
from dsbs.errors import UserError


def annotate(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Json = False,
    dry_run: DryRun = False,
    pilot: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Annotate a stratified sample of N rows, project the bill, and stop.",
        ),
    ] = None,
    batch: Annotated[
        bool,
        typer.Option("--batch", help="Buy by the endpoint's Batch API: cheaper, within hours."),
    ] = False,
    batch_export: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the requests for `vllm run-batch`; ask nobody."),
    ] = None,
    batch_import: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Take the output of `vllm run-batch` back; ask nobody."),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only this part of the rows; join with `dsbs merge`."),
    ] = None,
    retry_refused: Annotated[
        bool,
        typer.Option(
            "--retry-refused",
            help="Ask again what the endpoint refused for good in an earlier run.",
        ),
    ] = False,
) -> None:
    """Ask the teacher for a rationale and a label of every row."""
    from dsbs.annotation import planning
    from dsbs.annotation import run as engine
    from dsbs.annotation.shards import Shard

    loaded = load(recipe, overrides)
    part = Shard.parse(shard) if shard is not None else None
    _exclude({"--pilot": pilot, "--batch": batch, "--batch-export": batch_export, "--shard": shard})
    _exclude(
        {
            "--pilot": pilot,
            "--batch": batch,
            "--batch-export": batch_export,
            "--batch-import": batch_import,
        }
    )
    if dry_run:
        _print_plan(planning.plan(loaded, out, part, batch=batch), as_json)
        return
    if pilot is not None:
        _print_pilot(planning.pilot(loaded, pilot, out=out, progress=progress()), as_json)
        return
    if batch_export is not None:
        count = engine.export_batch(loaded, batch_export, out=out)
        print_json({"requests": count, "file": str(batch_export)}) if as_json else print(
            f"{count} requests: {batch_export}"
        )
        return
    result = engine.annotate(
        loaded,
        out=out,
        progress=progress(),
        buying="batch" if batch else "nothing" if batch_import is not None else "online",
        shard=part,
        outputs=[batch_import] if batch_import is not None else [],
        retry_refused=retry_refused,
    )
    _print_result(result, as_json)


def merge(
    recipe: RecipePath,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[SHARD]…", help="Shards' run folders. Default: all in <run>/shards."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override recipe keys: key=value.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Join what shards bought (`dsbs annotate --shard`) into the run. Asks nobody."""
    from dsbs.annotation.run import merge as run

    _print_result(
        run(load(recipe, overrides), out=out, folders=folders or (), progress=progress()), as_json
    )


def compare_teachers(
    recipe: RecipePath,
    teachers: Annotated[
        list[str],
        typer.Argument(
            metavar="TEACHER…",
            help="Files with a `teacher:` section, or the recipe's with changes: model=a,base_url=b.",
        ),
    ],
    rows: Annotated[int, typer.Option(min=1, help="Rows of the sample.")] = 100,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override recipe keys: key=value.")
    ] = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Ask several teachers the same rows; compare accuracy, agreement, parse rate, price and speed."""
    from dsbs.project.compare_teachers import compare_teachers as run

    recipes = {}
    for teacher in teachers:
        is_file = teacher.endswith((".yaml", ".yml"))
        name = Path(teacher).stem if is_file else teacher
        if name in recipes:
            raise UserError(f"two teachers are called {name}", hint="rename one of the files")
        changes = (
            [f"teacher={teacher}"]
            if is_file
            else [f"teacher.{change.strip()}" for change in teacher.split(",")]
        )
        recipes[name] = load(recipe, [*(overrides or []), *changes])
    result = run(recipes, rows=rows, out=out, progress=progress())
    if as_json:
        print_json(result.as_json())
        return
    from dsbs.formatting import rate

    rows_: list[list[str]] = []
    for one in result.contenders:
        versus = result.versus.get(one.name)
        rows_.append(
            [
                one.name,
                rate(one.summary.label_accuracy),
                f"{100 * versus['delta']:+.1f} (p {versus['p_holm']:.3f})" if versus else "–",
                rate(one.parse_rate),
                "–" if one.usd_a_rationale is None else f"{one.usd_a_rationale:.6f}",
                "–" if one.seconds_a_reply is None else f"{one.seconds_a_reply:.2f}",
                ", ".join(
                    f"{other} {100 * share:.0f} %"
                    for other, share in result.agreement[one.name].items()
                ),
            ]
        )
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result.rows} rows, {result.with_gold} with gold", title_justify="left")
    headings = (
        "teacher",
        "label accuracy",
        "to the first (Holm)",
        "parse rate",
        "dollars/rationale",
        "s/reply",
        "agrees with",
    )
    for heading in headings:
        table.add_column(heading)
    for row in rows_:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else 160, highlight=False, markup=False).print(
        table
    )
    print(f"figures: {result.path}")


def _exclude(options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other", hint="use one of them")


def _print_plan(plan: Any, as_json: bool) -> None:
    if as_json:
        print_json(plan.as_json())
        return
    how = "as earlier replies took" if plan.is_timed else "assumed; a pilot measures it"
    print(f"The first prompt:\n{indented(plan.first_prompt)}\n")
    print(
        f"{plan.rows} rows: {plan.requests} requests to send at most, {plan.cached} replies bought before"
    )
    print(
        f"about {plan.prompt_tokens:,} prompt tokens (four characters a token) and at most "
        f"{plan.max_completion_tokens:,} completion tokens, {dollars(plan.usd)} at most"
    )
    print(
        f"about {_duration(plan.seconds)} at {plan.seconds_a_reply:.1f} s a reply ({how}); nothing was sent"
    )


def _print_pilot(result: Any, as_json: bool) -> None:
    if as_json:
        print_json(result.as_json())
        return
    from dsbs.formatting import rate

    _print_split("pilot", result.summary)
    print(f"  parse rate {rate(result.parse_rate)}")
    print(f"annotations: {result.path}")
    usd = dollars(result.projected_usd)
    print(
        f"All {result.rows} rows: about {usd} and {_duration(result.projected_seconds)} at this rate."
    )
    print("Run without --pilot to go on: the pilot's replies are not bought again.")


def _print_result(result: Any, as_json: bool) -> None:
    if as_json:
        print_json(result.as_json())
    else:
        stamp(result.reportable)
        for split, summary in result.splits.items():
            _print_split(split, summary)
        print(f"annotations: {result.run / 'annotate'}")
    error = result.error()
    if error is not None:
        raise error


def _print_split(name: str, summary: Any) -> None:
    from dsbs.formatting import rate

    rejected = (
        ", ".join(f"{reason} {count}" for reason, count in sorted(summary.rejected.items()))
        or "none"
    )
    print(f"{name}: {summary.rows} rows, {summary.accepted} accepted; rejected: {rejected}")
    overall, accepted = rate(summary.label_accuracy), rate(summary.label_accuracy_accepted)
    print(f"  label accuracy {overall}, of the accepted {accepted}")
    if summary.hinted:
        print(
            "  with a hint: "
            + ", ".join(f"{outcome} {count}" for outcome, count in sorted(summary.hinted.items()))
        )
    wasted = (
        f", {sum(summary.wasted.values())} of them wasted ({_list(summary.wasted)})"
        if summary.wasted
        else ""
    )
    cached = (
        f" ({summary.cached_tokens:,} from the provider's cache)" if summary.cached_tokens else ""
    )
    print(
        f"  {summary.requests} requests{wasted}, {summary.cached} cached; {summary.prompt_tokens:,} prompt{cached} and "
        f"{summary.completion_tokens:,} completion tokens, {dollars(summary.usd)}; {summary.wall_s:.1f} s"
    )


def _list(counts: Any) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(counts.items()))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
