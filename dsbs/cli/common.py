"""Shared by the commands: options, tables, JSON output, input rows, and the stages' plans and
results in text.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsbs.errors import UserError
from dsbs.formatting import count, dollars, duration, listing, percent, rate, setting_text

if TYPE_CHECKING:
    from dsbs.annotation.planning import Plan
    from dsbs.annotation.summary import AnnotateResult, SplitSummary
    from dsbs.config import Recipe
    from dsbs.progress import Progress
    from dsbs.records.results import Results
    from dsbs.tasks import Task
    from dsbs.training.run import TrainResult

RecipePath = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe's YAML file, or one that ships with dsbs: recipes/demo.yaml.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Short for --set KEY=VALUE, e.g. train.max_steps=200.",
        show_default=False,
    ),
]
SetKeys = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe key, e.g. train.max_steps=200; may be repeated.",
        show_default=False,
    ),
]
Out = Annotated[
    str | None,
    typer.Option("--out", help="Run folder. Default: runs/<recipe name>.", show_default=False),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what the command would do, without doing it.")
]
_PIPE_WIDTH = 160  # columns of a table that is not printed to a terminal


def load(recipe: str, *overrides: list[str] | None) -> Recipe:
    """The recipe with ``overrides``, in order: positional ones, then those of ``--set``."""
    from dsbs.config.load import load_recipe

    return load_recipe(recipe, merged(*overrides))


def merged(*overrides: list[str] | None) -> list[str]:
    """All overrides in one list."""
    return [text for texts in overrides for text in texts or ()]


def progress() -> Progress:
    from dsbs.progress import make_progress

    return make_progress()


def print_json(value: Any) -> None:
    """Print one line of JSON, with escapes where stdout cannot encode every character."""
    is_unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    print(json.dumps(value, ensure_ascii=not is_unicode, default=list))


def print_table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    numeric: bool = False,
) -> None:
    """Print a table on stdout, as wide as the terminal.

    ``numeric`` right-aligns all columns but the first.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, heading in enumerate(headings):
        is_number = numeric and index > 0
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(width=width, highlight=False, markup=False).print(table)


def read_rows(file: str, task: Task) -> Iterator[tuple[str, str | dict[str, Any]]]:
    """The id and the input of each row in a file or, for ``-``, on stdin: a text or its fields.

    A file of rows (.csv, .tsv, .jsonl, .parquet) is read like a recipe's data. Of any other, each
    line that is not empty is a row: a JSON object if it begins with ``{``, else a text. A row
    without an id gets the number of its line. Raises UserError with the line of a mistake.
    """
    from dsbs.files import find_file, open_text
    from dsbs.tasks.tables import format_of, read_table

    if file == "-":
        with _utf8_stdin() as lines:
            yield from _read_lines(lines, "stdin", task)
        return
    hint = "give a file of rows (.csv, .tsv, .jsonl, .parquet), a text file, or - for stdin"
    path = find_file(file, what="input file", hint=hint)
    if format_of(path) is None:
        with open_text(path) as lines:
            yield from _read_lines(lines, file, task)
        return
    for where, row in read_table(path):
        yield _identified(task, row, where)


@contextmanager
def _utf8_stdin() -> Iterator[Iterable[str]]:
    """Standard input as UTF-8, which the locale may not be."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        yield sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(
            f"stdin is not UTF-8 text ({error.reason})",
            hint="convert it, e.g. iconv -f WINDOWS-1252 -t UTF-8",
        ) from None


def _read_lines(
    lines: Iterable[str], name: str, task: Task
) -> Iterator[tuple[str, str | dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        where = f"{name}:{number}"
        text = line.strip()
        if text.startswith("{"):
            yield _identified(task, _parse_object(text, where), where)
        elif text and task.needs_fields:
            raise UserError(
                f"{where}: plain text, but {task.name} needs the fields of a row",
                hint="give JSON lines or a file with the columns of the training data",
            )
        elif text:
            yield str(number), text


def _identified(task: Task, row: dict[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    from dsbs.tasks.data import input_of

    row_id, fields = input_of(task, row, where)
    return row_id or where.rpartition(":")[2], fields


def _parse_object(text: str, where: str) -> dict[str, Any]:
    try:
        row: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(
            f"{where}: not valid JSON", hint="a line is a JSON object or plain text"
        ) from None
    return row


def shown_prompt(text: str, max_length: int = 1500) -> str:
    """A prompt for the terminal, indented. A long one is cut in the middle."""
    if len(text) > max_length:
        end = max_length // 3
        hidden = f"{len(text) - max_length:,} of {len(text):,} characters not shown"
        note = f"[… {hidden}; --json has the whole text …]"
        text = f"{text[: max_length - end]}\n{note}\n{text[-end:]}"
    return "\n".join(f"  | {line}" for line in text.split("\n"))


def print_smoke_warning(reportable: bool) -> None:
    if not reportable:
        print("smoke: not reportable (task.limit is set)")


def print_annotate_plan(plan: Plan) -> None:
    source = "assumed; a pilot measures it"
    if plan.is_timed:
        source = "the mean of earlier replies"
    cost = dollars(plan.usd)
    if plan.usd is not None:
        cost = f"at most {cost}"
    if plan.likely_usd is not None and plan.likely_usd != plan.usd:
        cost = (
            f"about {dollars(plan.likely_usd)} at {plan.tokens_per_reply:,} completion tokens per "
            f"reply, {cost}"
        )
    print(f"The first prompt:\n{shown_prompt(plan.first_prompt)}\n")
    requests = count(plan.requests, "request")
    print(f"{count(plan.rows, 'row')}: at most {requests} to send, {plan.cached:,} replies cached")
    print(
        f"about {plan.prompt_tokens:,} prompt tokens (at four characters each) and at most "
        f"{plan.max_completion_tokens:,} completion tokens; {cost}"
    )
    print(
        f"about {duration(plan.seconds)} at {plan.seconds_per_reply:.1f} s per reply ({source}); "
        "nothing was sent"
    )


def print_annotate_result(result: AnnotateResult) -> None:
    print_smoke_warning(result.reportable)
    for split, summary in result.splits.items():
        print_split(split, summary)
        _print_reviews(result.run, split)
        if split == "train" and result.remaining is not None:
            print(f"  {result.remaining:,} rows remain that --next has not chosen")
    print(f"annotations: {result.run / 'annotate'}")


def _print_reviews(run: Path, split: str) -> None:
    from dsbs.records.reviews import deciding_reviews
    from dsbs.run_folder import RunFolder

    with suppress(UserError):  # a damaged line is the error of training, not of this command
        decided = len(deciding_reviews(RunFolder(run).read_reviews(split)))
        if decided:
            print(
                f"  people decided on {count(decided, 'row')} (review/{split}.jsonl), which count"
            )


def print_split(name: str, summary: SplitSummary) -> None:
    rejected = listing(summary.rejected) or "none"
    print(
        f"{name}: {count(summary.rows, 'row')}, {summary.accepted:,} accepted; rejected: {rejected}"
    )
    overall = rate(summary.label_accuracy)
    accepted = rate(summary.label_accuracy_accepted)
    which = "rows accepted without a hint" if summary.hinted else "accepted rows"
    print(f"  label accuracy {overall}, of {which} {accepted}")
    if summary.chosen:
        print(
            f"  {count(summary.chosen, 'row')} chosen by --next; label accuracy on the "
            f"{summary.random:,} random ones {rate(summary.label_accuracy_random)}, an estimate "
            "for all rows"
        )
    if summary.hinted:
        print(f"  with a hint: {listing(summary.hinted)}")
    if not summary.requests and not summary.cached:  # a teacher on disk
        return
    requests = count(summary.requests, "request")
    if summary.wasted:
        requests += f", {sum(summary.wasted.values())} of them wasted ({listing(summary.wasted)})"
    usage = summary.usage
    tokens = "tokens not counted"
    if usage.prompt_tokens is not None:
        tokens = f"{usage.prompt_tokens:,} prompt"
        if usage.cached_tokens:
            tokens += f" ({usage.cached_tokens:,} from the provider's cache)"
        tokens += f" and {usage.completion_tokens or 0:,} completion tokens"
    print(
        f"  {requests}, {summary.cached:,} cached; {tokens}, {dollars(summary.usd)}; "
        f"{duration(summary.wall_s)}"
    )


def print_train_plan(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        state = count(line["steps"], "step")
        if line["done"]:
            state = "already trained"
        elif line["trials"]:
            state += f", chosen among {line['trials']} trials"
        rows = count(line["rows"], "row")
        if line["valid"] is None:
            rows = f"at most {rows}"
        else:
            rows += f", {line['rationales']} with a rationale, {line['valid']} valid"
        print(f"{line['name']}: {rows}; {state}")


def print_train_result(result: TrainResult) -> None:
    print_smoke_warning(result.reportable)
    for student in result.students:
        print(
            f"{student.name}: valid accuracy {percent(student.valid_accuracy)} "
            f"at step {student.best_step} of {student.steps}; "
            f"{student.examples_per_s:.0f} examples/s, {duration(student.wall_s)}; {student.path}"
        )
        for name, value in student.tuned.items():
            print(f"  {name} {setting_text(value)}, chosen on valid")


def print_results(results: Results) -> None:
    from dsbs.records.sentences import student_sentences
    from dsbs.records.summary import headline, headline_details, results_table

    print_smoke_warning(results.reportable)
    headings, rows = results_table(results)
    print_table(headings, rows, title=f"{results.split}, {count(results.n, 'row')}", numeric=True)
    print(" ".join([headline(results), *headline_details(results)]))
    for sentence in student_sentences(results):
        print(sentence)
    print(f"results: {Path(results.run) / 'eval' / 'results.json'}")
