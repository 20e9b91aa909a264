"""``dsbs export``: write a student in another format."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import Json, print_json, progress, read_rows
from dsbs.formatting import count, megabytes, percent

if TYPE_CHECKING:
    from dsbs.exporting import Exported


def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A student's folder.")],
    format: Annotated[
        str, typer.Option("--format", help="ct2 (CTranslate2), gguf (llama.cpp), onnx or torch.")
    ] = "ct2",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Type of the weights, e.g. int8 or float32. Default: int8 for ct2, float16 for "
            "gguf, float32 for others.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="Output folder. Default: STUDENT/export/<format>[-<quantize>].",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text or JSONL rows to compare the export on. Default: the run's valid rows, or "
            "generated texts.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a student in a format that runs without dsbs, and compare it with the original."""
    from dsbs.exporting.run import export as run

    texts = None if examples is None else _texts(student, examples)
    exported = run(student, format, quantize=quantize, out=out, examples=texts, progress=progress())
    if as_json:
        print_json(exported.model_dump(mode="json", by_alias=True) | {"path": str(exported.path)})
    else:
        _print_export(exported)


def _print_export(exported: Exported) -> None:
    check = exported.equivalence
    print(
        f"{exported.path}: {exported.format} {exported.quantize}, {megabytes(exported.megabytes)}, "
        f"{exported.times_smaller:.1f} times smaller"
    )
    figures = [f"{percent(check.greedy_agreement)} of greedy outputs equal"]
    if check.beam_agreement is not None:
        figures.append(f"{percent(check.beam_agreement)} with beam search")
    if check.score_difference is not None:
        figures.append(f"log-probabilities within {check.score_difference:.2g} nats")
    print(
        f"compared with transformers on {count(check.rows, 'row')} ({check.source}): "
        f"{', '.join(figures)}"
    )
    script = exported.path / "predict.py"
    if script.is_file():
        print(f"try: python {script}, which reads one text per line from stdin")
    else:
        print(f"try: dsbs predict {exported.path} messages.txt")


def _texts(student: str, file: str) -> list[str]:
    """Inputs without prefix, from lines of text or JSON rows with the student's columns."""
    from dsbs.students.card import read_card
    from dsbs.tasks import make_task

    task = make_task(read_card(student).task)
    return [row if isinstance(row, str) else task.text(row) for _, row in read_rows(file, task)]
