"""The commands: parse, call one stage, print its summary. Results go to stdout, all else to stderr."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dsbs.errors import DsbsError, PartialError, UserError

app = typer.Typer(
    name="dsbs",
    help="Distilling Step-by-Step: annotate with a large teacher, train a small student, compare it with its baselines.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file, or a shipped one: recipes/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]…", help="Override recipe keys, e.g. train.max_steps=200.", show_default=False),
]
Out = Annotated[str | None, typer.Option("--out", help="Run folder. Default: runs/<recipe name>.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None, as_json: Json = False) -> None:
    """Load the data, render the first prompt, tokenise; report truncation and unknown tokens. No model, no call."""
    from dsbs.check import validate as run

    result = run(_load(recipe, overrides))
    if as_json:
        _print_json(result.as_json())
        return
    for name, split in result.splits.items():
        labels = ", ".join(f"{label} {count}" for label, count in split.get("labels", {}).items())
        print(f"{name}: {split['rows']} rows, {split['with_gold']} with gold" + (f" ({labels})" if labels else ""))
        for what in ("inputs", "targets"):
            if split[what]:
                figures = split[what]
                print(
                    f"  {what}: {figures['median']} tokens in the median, {figures['longest']} at most; "
                    f"{100 * figures['truncated']:.1f} % cut, {100 * figures['unknown']:.2f} % unknown tokens"
                )
    if result.first_prompt is not None:
        print(f"\nThe first prompt, as a completions endpoint gets it:\n{_indented(result.first_prompt)}")
    print()
    for warning in result.warnings:
        print(f"warning: {warning}")
    print("The recipe is valid." if not result.warnings else "The recipe is valid; see the warnings.")


@app.command()
def annotate(
    recipe: RecipePath, overrides: Overrides = None, out: Out = None, as_json: Json = False, dry_run: DryRun = False
) -> None:
    """Ask the teacher for a rationale and a label of every row."""
    from dsbs.annotate import engine

    loaded = _load(recipe, overrides)
    if dry_run:
        plan = engine.plan(loaded, out)
        if as_json:
            _print_json({
                "requests": plan.requests, "cached": plan.cached, "rows": plan.rows,
                "prompt_tokens": plan.prompt_tokens, "max_completion_tokens": plan.max_completion_tokens, "max_usd": plan.usd,
                "first_prompt": plan.first_prompt,
            })  # fmt: skip
            return
        print(f"The first prompt:\n{_indented(plan.first_prompt)}\n")
        print(f"{plan.rows} rows: {plan.requests} requests to send, {plan.cached} replies bought before")
        print(
            f"about {plan.prompt_tokens:,} prompt tokens (four characters a token) and at most "
            f"{plan.max_completion_tokens:,} completion tokens, {_dollars(plan.usd)} at most; nothing was sent"
        )
        return
    result = engine.annotate(loaded, out=out, meter=_meter())
    if as_json:
        _print_json(result.as_json())
    else:
        from dsbs.intervals import percent

        _stamp(result.reportable)
        for split, summary in result.splits.items():
            rejected = ", ".join(f"{reason} {count}" for reason, count in sorted(summary.rejected.items())) or "none"
            print(f"{split}: {summary.rows} rows, {summary.accepted} accepted; rejected: {rejected}")
            overall, accepted = percent(summary.label_accuracy), percent(summary.label_accuracy_accepted)
            print(f"  label accuracy {overall}, of the accepted {accepted}")
            print(
                f"  {summary.requests} requests, {summary.cached} cached; {summary.prompt_tokens:,} prompt and "
                f"{summary.completion_tokens:,} completion tokens, {_dollars(summary.usd)}; {summary.wall_s:.1f} s"
            )
        print(f"annotations: {result.run / 'annotate'}")
    missing = sum(summary.rejected["no-reply"] for summary in result.splits.values())
    if missing and loaded.teacher.kind in ("openai", "llamacpp"):
        raise PartialError(f"{missing} rows got no reply", hint="run the same command again: it asks for these alone")


@app.command()
def train(
    recipe: RecipePath, overrides: Overrides = None, out: Out = None, as_json: Json = False, dry_run: DryRun = False
) -> None:
    """Train every student of the recipe's grid; finished ones are kept, an interrupted one continues."""
    from dsbs.train import loop

    loaded = _load(recipe, overrides)
    if dry_run:
        lines = loop.planned(loaded, out)
        if as_json:
            _print_json({"students": lines})
        else:
            for line in lines:
                state = "finished before" if line["done"] else f"{line['steps']} steps"
                rows = f"{line['rows']} rows, {line['rationales']} with a rationale, {line['valid']} valid"
                print(f"{line['name']}: {rows}; {state}")
        return
    result = loop.train(loaded, out=out, meter=_meter())
    if as_json:
        _print_json(result.as_json())
        return
    _stamp(result.reportable)
    for student in result.students:
        print(
            f"{student.name}: valid accuracy {100 * student.valid_accuracy:.1f} % at step {student.best_step} of "
            f"{student.steps}; {student.examples_per_s:.0f} examples/s, {student.wall_s:.0f} s; {student.path}"
        )


@app.command("eval")
def evaluate(recipe: RecipePath, overrides: Overrides = None, out: Out = None, as_json: Json = False) -> None:
    """Predict with every student, score all systems by one path, compare them with the baseline."""
    from dsbs.eval.compare import evaluate as run

    result = run(_load(recipe, overrides), out=out, meter=_meter())
    if as_json:
        _print_json(result.as_json())
        return
    from rich.console import Console
    from rich.table import Table

    from dsbs.eval.table import cells, verdict

    _stamp(result.reportable)
    headings, rows = cells(result.as_json())
    table = Table(title=f"{result.split}, {result.n} rows", title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "system" else "right")
    for row in rows:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False).print(table)
    for sentence in verdict(result.as_json()):
        print(sentence)
    print(f"results: {result.run / 'eval' / 'results.json'}")


@app.command()
def report(recipe: RecipePath, overrides: Overrides = None, out: Out = None, as_json: Json = False) -> None:
    """Write the run's report.html from its files."""
    from dsbs.report.page import report as run

    path = run(_load(recipe, overrides), out=out)
    if as_json:
        _print_json({"report": str(path)})
    else:
        print(path)


@app.command()
def predict(
    student: Annotated[
        str,
        typer.Argument(metavar="STUDENT", help="A student's folder, or a recipe: its run's student that is best on valid."),
    ],
    file: Annotated[str, typer.Argument(metavar="[FILE]", help="Text or JSONL, a row a line; - is stdin.")] = "-",
    rationale: Annotated[
        bool, typer.Option("--rationale", help="Add a rationale. It is decoded apart and is not why the label was chosen.")
    ] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows decoded together.")] = 64,
    max_label_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated for a label, at most.")] = 64,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Where STUDENT is a recipe: key=value.")] = None,
    out: Out = None,
) -> None:
    """Answer rows: text or JSONL in, JSONL out."""
    from dsbs.student import Student

    if student.endswith((".yaml", ".yml")):
        from dsbs.eval.predict import best_student

        student = best_student(_load(student, overrides), out, needs_rationales=rationale)
        print(f"student: {student}", file=sys.stderr)
    loaded = Student.load(student)
    lines = _input_lines(file)
    batch: list[tuple[int, Any]] = []

    def flush() -> None:
        answers = loaded.predict(
            [item["input"] if isinstance(item, dict) and isinstance(item.get("input"), dict) else item for _, item in batch],
            rationale=rationale,
            batch_size=batch_size,
            max_label_tokens=max_label_tokens,
        )
        for (number, item), answer in zip(batch, answers, strict=True):
            row: dict[str, Any] = {"id": item["id"] if isinstance(item, dict) and "id" in item else str(number)}
            row |= {"prediction": answer.label, "raw": answer.raw}
            if rationale:
                row |= {"rationale": answer.rationale, "rationale_is_causal": False}
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
    from dsbs.artefacts import open_text

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
                raise UserError(f"{file}:{number}: not valid JSON", hint="a line is a JSON object or plain text") from None
            yield number, row


@contextmanager
def _stdin() -> Iterator[Any]:
    yield sys.stdin


def _existing(file: str) -> Path:
    from dsbs.artefacts import find

    return find(file, what="input file", hint="give a text or JSONL file, or - for stdin")


def _load(recipe: str, overrides: list[str] | None) -> Any:
    from dsbs.recipe import load_recipe

    return load_recipe(recipe, overrides or [])


def _meter() -> Any:
    from dsbs.progress import make_meter

    return make_meter()


def _print_json(value: Any) -> None:
    print(json.dumps(value, ensure_ascii=False, default=list))


def _indented(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def _dollars(usd: float | None) -> str:
    return "of unknown price" if usd is None else f"{usd:.4f} dollars"


def _stamp(reportable: bool) -> None:
    if not reportable:
        print("smoke: not reportable (task.limit is set)")


def _exit_code() -> int:
    """Run the command line; a failure that a person can act on becomes its message and exit code."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except SystemExit as end:  # how typer ends: the code is already said
        if end.code == 130:
            print("dsbs: interrupted; run the same command to continue", file=sys.stderr)
        return end.code if isinstance(end.code, int) else 0
    except DsbsError as error:
        print(f"dsbs: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"dsbs: the disk is full ({error})\n  try: free some space, then run the same command", file=sys.stderr)
        return 3
    return 0


def main() -> None:
    """Entry point of ``dsbs``. Exit codes: 0 done, 1 failed, 2 usage, 3 partial and resumable, 130 interrupted."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(_exit_code())
