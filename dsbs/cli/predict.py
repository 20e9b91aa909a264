"""``dsbs predict``: label rows with a trained student."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsbs.cli.common import SetKeys, load, print_json, progress, read_rows
from dsbs.errors import UserError
from dsbs.formatting import count

if TYPE_CHECKING:
    from dsbs.students.prediction import Options
    from dsbs.tasks.shards import Shard

Row = tuple[str, str | dict[str, Any]]  # its id, and a text or the task's fields


Output = Annotated[
    str | None,
    typer.Option(
        "--out",
        help="Output file (.jsonl, .csv, .parquet); one that was interrupted is continued. "
        "Default: JSON lines on stdout. With a recipe, another name is the run folder.",
        show_default=False,
    ),
]


def predict(
    student: Annotated[
        str,
        typer.Argument(
            metavar="STUDENT",
            help="A student's folder; or a recipe: the student of its run that is best on valid.",
        ),
    ],
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="Rows (.csv, .tsv, .jsonl, .parquet), or text, one row per line; - is stdin.",
        ),
    ] = "-",
    rationale: Annotated[
        bool,
        typer.Option(
            "--rationale",
            help="Add a rationale. A step-by-step student writes it separately: it is not why the "
            "label was chosen.",
        ),
    ] = False,
    top: Annotated[
        int,
        typer.Option(
            min=0,
            metavar="N",
            help="Add the N likeliest labels with their probabilities; without a label head, every "
            "label is scored, which takes longer.",
        ),
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 64,
    max_label_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tokens of a label. Default: that of the student's training.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, or tasks with --engine ray.")
    ] = 1,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N", help="Label shard I of N only, by a hash of the ids.", show_default=False
        ),
    ] = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="ray: label in shards on a Ray cluster.")
    ] = "local",
    overrides: SetKeys = None,
    out: Output = None,
) -> None:
    """Label rows: a file of rows or lines of text in, predictions out."""
    from dsbs.students.card import read_card
    from dsbs.students.prediction import Options
    from dsbs.students.prediction_tables import FORMATS
    from dsbs.tasks.shards import Shard

    output = None
    run_folder = None
    is_recipe = student.endswith((".yaml", ".yml"))
    if out is not None and is_recipe and not out.lower().endswith(FORMATS):
        run_folder = out
    elif out is not None:
        output = Path(out)
    if is_recipe:
        from dsbs.evaluation.predictions import best_student

        student = best_student(load(student, overrides), run_folder, needs_rationales=rationale)
        print(f"student: {student}", file=sys.stderr)
    elif overrides:
        raise UserError(
            f"--set needs a recipe, and {student} is a student's folder", hint="leave --set out"
        )
    limit = max_label_tokens or read_card(student).max_label_tokens
    options = Options(rationale, batch_size, limit, top)
    parsed_shard = None if shard is None else Shard.parse(shard)
    if engine == "ray":
        _check_ray(file, output, parsed_shard)
    if output is None:
        _print_predictions(student, file, options, workers, parsed_shard)
    else:
        _write_predictions(student, file, output, options, workers, parsed_shard, engine)


def _check_ray(file: str, output: Path | None, shard: Shard | None) -> None:
    if file == "-" or output is None:
        raise UserError(
            "--engine ray needs an input file and --out, which all machines can reach",
            hint="e.g. dsbs predict STUDENT rows.parquet --engine ray --out labels.parquet",
        )
    if shard is not None:
        raise UserError("--engine ray makes its own shards", hint="remove --shard")


def _rows(student: str, file: str) -> Iterator[Row]:
    from dsbs.students.card import read_card
    from dsbs.tasks import make_task

    yield from read_rows(file, make_task(read_card(student).task))


def _print_predictions(
    student: str, file: str, options: Options, workers: int, shard: Shard | None
) -> None:
    from dsbs.students.prediction import predict_in_processes, predict_rows
    from dsbs.students.student import Student

    rows: Iterable[Row] = _rows(student, file)
    if shard is not None:
        rows = (row for row in rows if shard.has(row[0]))
    if workers > 1:
        chunks = predict_in_processes(Path(student), rows, options, workers)
    else:
        chunks = predict_rows(Student.load(student), rows, options)
    for chunk in chunks:
        for prediction in chunk:
            print_json(prediction)
        sys.stdout.flush()


def _write_predictions(
    student: str,
    file: str,
    output: Path,
    options: Options,
    workers: int,
    shard: Shard | None,
    engine: Literal["local", "ray"],
) -> None:
    from dsbs.students.prediction import predict_file, predict_on_ray

    open_rows = partial(_rows, str(Path(student).absolute()), file)
    if engine == "ray":
        number = predict_on_ray(
            Path(student), open_rows, output, options,
            source=file, shards=workers, progress=progress(),
        )  # fmt: skip
    else:
        number = predict_file(
            Path(student), open_rows, output, options,
            source=file, workers=workers, shard=shard, progress=progress(),
        )  # fmt: skip
    print(f"{output}: {count(number, 'prediction')}", file=sys.stderr)
