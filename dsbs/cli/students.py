"""The commands around a student: validate, train, eval, report, predict."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsbs.cli.common import (
    DryRun,
    Json,
    Out,
    Overrides,
    RecipePath,
    indented,
    load,
    print_json,
    progress,
    stamp,
)
from dsbs.errors import GateError, UserError

if TYPE_CHECKING:
    from dsbs.records.results import Results

MinAccuracy = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, metavar="X", help="Exit with code 4 where the headline system's accuracy is below X, e.g. 0.8.",
        show_default=False,
    ),
]  # fmt: skip
MinDelta = Annotated[
    float | None,
    typer.Option(
        min=-1, max=1, metavar="Y", help="The same for its accuracy less that of its first baseline, e.g. 0.02 or -0.01.",
        show_default=False,
    ),
]  # fmt: skip
ScoreOnly = Annotated[
    bool,
    typer.Option(
        "--score-only", help="Load no model: score the prediction files that are there, anew."
    ),
]


def validate(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Load the data, render the first prompt, tokenise; report truncation and unknown tokens. No model, no call."""
    from dsbs.project.validate import validate as run

    result = run(load(recipe, overrides))
    if as_json:
        print_json(result.as_json())
        return
    for name, split in result.splits.items():
        labels = ", ".join(f"{label} {count}" for label, count in split.get("labels", {}).items())
        print(
            f"{name}: {split['rows']} rows, {split['with_gold']} with gold"
            + (f" ({labels})" if labels else "")
        )
        for what in ("inputs", "targets"):
            if split[what]:
                figures = split[what]
                print(
                    f"  {what}: {figures['median']} tokens in the median, {figures['longest']} at most; "
                    f"{100 * figures['truncated']:.1f} % cut, {100 * figures['unknown']:.2f} % unknown tokens"
                )
    if result.first_prompt is not None:
        print(
            f"\nThe first prompt, as a completions endpoint gets it:\n{indented(result.first_prompt)}"
        )
    print()
    for warning in result.warnings:
        print(f"warning: {warning}")
    print(
        "The recipe is valid." if not result.warnings else "The recipe is valid; see the warnings."
    )


def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Json = False,
    dry_run: DryRun = False,
) -> None:
    """Train every student of the recipe's grid; finished ones are kept, an interrupted one continues."""
    from dsbs.training import run as loop
    from dsbs.training.distributed import destroy_process_group, is_main_process

    loaded = load(recipe, overrides)
    if dry_run:
        lines = loop.planned(loaded, out)
        if as_json:
            print_json({"students": lines})
        else:
            for line in lines:
                state = "finished before" if line["done"] else f"{line['steps']} steps"
                if line["trials"] and not line["done"]:
                    state += f", chosen among {line['trials']} trials"
                rows = f"{line['rows']} rows, {line['rationales']} with a rationale, {line['valid']} valid"
                print(f"{line['name']}: {rows}; {state}")
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's way to say Ctrl-C
    result = loop.train(loaded, out=out, progress=progress())
    destroy_process_group()
    if not is_main_process():  # of several processes one speaks
        return
    if as_json:
        print_json(result.as_json())
        return
    stamp(result.reportable)
    for student in result.students:
        print(
            f"{student.name}: valid accuracy {100 * student.valid_accuracy:.1f} % at step {student.best_step} of "
            f"{student.steps}; {student.examples_per_s:.0f} examples/s, {student.wall_s:.0f} s; {student.path}"
        )
        for name, value in student.tuned.items():
            print(f"  {name} {value:g}, chosen on valid")


def evaluate(
    recipe: RecipePath,
    overrides: Overrides = None,
    out: Out = None,
    as_json: Json = False,
    score_only: ScoreOnly = False,
    min_accuracy: MinAccuracy = None,
    min_delta: MinDelta = None,
) -> None:
    """Predict with every student, score all systems by one path, compare them with their baselines.

    Files from elsewhere take part as eval.predictions.NAME=FILE, JSON lines of id and prediction.
    """
    from dsbs.records.summary import gate_failures
    from dsbs.evaluation.run import evaluate as run

    results = run(load(recipe, overrides), out=out, progress=progress(), score_only=score_only)
    if as_json:
        print_json(results.as_json())
    else:
        _print_comparison(results)
    missed = gate_failures(results, min_accuracy, min_delta)
    if missed:
        raise GateError(
            "\n  ".join(missed),
            hint="look where the systems differ; the results are written all the same",
        )


def _print_comparison(results: Results) -> None:
    from rich.console import Console
    from rich.table import Table

    from dsbs.records.summary import headline, headline_details, results_table

    stamp(results.reportable)
    headings, rows = results_table(results)
    table = Table(title=f"{results.split}, {results.n} rows", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(table)
    for sentence in dict.fromkeys([headline(results), *headline_details(results)]):
        print(sentence)
    print(f"results: {Path(results.run) / 'eval' / 'results.json'}")


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN… [KEY=VALUE]…",
            help="Run folders, or recipes (whose run folders are meant) with overrides, e.g. runs/small runs/base.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="One recipe: its run folder. Else: where the report is written; by default the run folder, or "
            "runs/report-<names> for several.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write report.html, tables and figures of one run, or of several side by side."""
    from dsbs.reporting.run import report_runs

    folders, to = _reported(runs, out)
    written = report_runs(folders, out=to)
    if as_json:
        print_json(written.as_json())
    else:
        print(written.page)


def _reported(arguments: list[str], out: str | None) -> tuple[list[Path], str | None]:
    """The run folders that the arguments mean, and where to write. ``--out`` of one recipe is its run folder."""
    from dsbs.run_folder import run_folder

    overrides = [text for text in arguments if "=" in text and not Path(text).exists()]
    runs = [text for text in arguments if text not in overrides]
    recipes = [text for text in runs if not Path(text).is_dir()]
    if not runs:
        raise UserError(
            "no run is named",
            hint="dsbs report RUN, a run folder or a recipe; overrides come after it",
        )
    if overrides and not recipes:
        raise UserError(
            f"{overrides[0]}: overrides belong to a recipe, and {runs[0]} is a run folder",
            hint="leave them out, or name the recipe in place of the folder",
        )
    for name in recipes:
        if not name.endswith((".yaml", ".yml")) and not Path(name).is_file():
            raise UserError(
                f"{name} is neither a run folder nor a recipe",
                hint="name a folder as runs/demo, or a .yaml file",
            )
    alone = len(runs) == 1 and bool(recipes)
    folders = [
        run_folder(load(one, overrides), out if alone else None) if one in recipes else Path(one)
        for one in runs
    ]
    return folders, None if alone else out


def predict(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT",
            help="A student's folder, or a recipe: its run's student that is best on valid.",
        ),
    ],
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help="Text or JSONL, a row a line; - is stdin.")
    ] = "-",
    rationale: Annotated[
        bool,
        typer.Option(
            "--rationale",
            help="Add a rationale. A step-by-step student decodes it apart: it is not why the label was chosen.",
        ),
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 64,
    max_label_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens generated for a label, at most.")
    ] = 64,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Where STUDENT is a recipe: key=value.")
    ] = None,
    out: Out = None,
) -> None:
    """Answer rows: text or JSONL in, JSONL out."""
    from dsbs.students import Student

    if student.endswith((".yaml", ".yml")):
        from dsbs.evaluation.predictions import best_student

        student = best_student(load(student, overrides), out, needs_rationales=rationale)
        print(f"student: {student}", file=sys.stderr)
    loaded = Student.load(student)
    lines = _input_lines(file)
    batch: list[tuple[int, Any]] = []

    def flush() -> None:
        answers = loaded.predict(
            [
                item["input"]
                if isinstance(item, dict) and isinstance(item.get("input"), dict)
                else item
                for _, item in batch
            ],
            rationale=rationale,
            batch_size=batch_size,
            max_label_tokens=max_label_tokens,
        )
        for (number, item), answer in zip(batch, answers, strict=True):
            row: dict[str, Any] = {
                "id": item["id"] if isinstance(item, dict) and "id" in item else str(number)
            }
            row |= {"prediction": answer.label, "raw": answer.raw}
            row |= {"probability": answer.probability, "truncated": answer.truncated}
            if rationale:
                row |= {
                    "rationale": answer.rationale,
                    "rationale_is_causal": loaded.card.reasons_first,
                }
            print(json.dumps(row, ensure_ascii=False))
        sys.stdout.flush()
        batch.clear()

    for number, item in lines:
        batch.append((number, item))
        if len(batch) >= batch_size:
            flush()
    if batch:
        flush()


def _input_lines(file: str) -> Iterator[tuple[int, Any]]:
    """Rows of a file or stdin: an object where the line begins with '{', else the line's text."""
    from dsbs.files import open_text

    with _stdin() if file == "-" else open_text(_existing(file)) as stream:
        for number, line in enumerate(stream, 1):
            text = line.strip()
            if not text:
                continue
            if not text.startswith("{"):
                yield number, text
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError):
                raise UserError(
                    f"{file}:{number}: not valid JSON", hint="a line is a JSON object or plain text"
                ) from None
            yield number, row


@contextmanager
def _stdin() -> Iterator[Any]:
    yield sys.stdin


def _existing(file: str) -> Path:
    from dsbs.files import find

    return find(file, what="input file", hint="give a text or JSONL file, or - for stdin")
