"""The command that writes a student in another format."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dsbs.cli.common import Json, print_json, progress
from dsbs.errors import UserError


def export(
    student: Annotated[str, typer.Argument(metavar="STUDENT", help="A student's folder.")],
    format: Annotated[
        str, typer.Option("--format", help="ct2 (CTranslate2), gguf (llama.cpp), onnx or torch.")
    ] = "ct2",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="How weights are kept, e.g. int8 or float32. Default: ct2 int8, gguf float16, others float32.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="Folder. Default: STUDENT/export/<format>[-<quantize>].",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Text or JSONL to compare on, a row a line. Default: the run's valid rows, or made texts.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a student so that it runs without dsbs, and compare it with the student."""
    from dsbs.exporting.run import export as run

    texts = None if examples is None else _texts(student, examples)
    done = run(student, format, quantize=quantize, out=out, examples=texts, progress=progress())
    if as_json:
        print_json(done.model_dump(mode="json", by_alias=True) | {"path": str(done.path)})
        return
    found = done.equivalence
    print(
        f"{done.path}: {done.format} {done.quantize}, {done.megabytes:.2f} MB, {done.smaller:.1f} times smaller"
    )
    parts = [f"{100 * found.greedy_agreement:.1f} % of greedy texts equal"]
    if found.beam_agreement is not None:
        parts.append(f"{100 * found.beam_agreement:.1f} % by beam search")
    if found.score_difference is not None:
        parts.append(f"log-probabilities within {found.score_difference:.2g} nats")
    print(f"against transformers on {found.rows} rows ({found.source}): {', '.join(parts)}")
    print(f"try: python {done.path / 'predict.py'}, which reads a text in each line of stdin")


def _texts(student: str, file: str) -> list[str]:
    """Inputs without prefix, of lines that are text or JSON rows as the student's data had them."""
    from dsbs.files import find_file, open_text
    from dsbs.students import read_card
    from dsbs.tasks import make_task

    task = make_task(read_card(student).task)
    texts = []
    with open_text(find_file(file, what="examples", hint="give a text or JSONL file")) as lines:
        for number, line in enumerate(lines, 1):
            text = line.strip()
            if text.startswith("{"):
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError):
                    raise UserError(
                        f"{file}:{number}: not valid JSON",
                        hint="a line is a JSON object or plain text",
                    ) from None
                nested = row.get("input")
                texts.append(
                    task.text(task.fields(nested if isinstance(nested, dict) else row, "input"))
                )
            elif text:
                texts.append(text)
    return texts
