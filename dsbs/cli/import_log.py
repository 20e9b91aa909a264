"""``dsbs import``: turn a log of calls to a large model into rows and a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsbs.cli.common import DryRun, Json, print_json, progress, shown_prompt
from dsbs.formatting import count, listing, one_line, percent

if TYPE_CHECKING:
    from dsbs.importing.run import ImportResult

_MAX_LABELS = 20
_MAX_TEXT = 600  # characters of a prompt


def import_log(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="SOURCE",
            help="Log files or directories of them: JSON or JSON lines, also gzipped. Give a "
            "batch's input and output files together.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="ROWS.jsonl",
            help="File for the train rows; test rows, prompt and recipe are written next to it.",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Import the calls of this model. Default: the most frequent.", show_default=False
        ),
    ] = None,
    base_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="The teacher's endpoint, from which the recipe requests the replies that the log "
            "lacks. The key is read from OPENAI_API_KEY.",
            show_default=False,
        ),
    ] = None,
    prompt: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Import the calls with the log's N-th most frequent prompt.",
        ),
    ] = 1,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Maximum number of rows.", show_default=False),
    ] = None,
    test_fraction: Annotated[
        float,
        typer.Option(min=0, max=0.9, metavar="SHARE", help="Share of the rows used as test rows."),
    ] = 0.2,
    redact: Annotated[
        bool,
        typer.Option(
            help="Replace keys, e-mail, IP and cryptocurrency addresses, IBANs, and card, phone "
            "and social security numbers."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace files of an earlier import.")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Turn a log of calls to a large model into rows, a prompt file and a recipe.

    Reads OpenAI stored completions and batches, Azure and Bedrock logs, Anthropic messages and
    batches, OpenTelemetry GenAI spans, and lines with messages.
    """
    from dsbs.importing.run import ImportOptions
    from dsbs.importing.run import import_log as run

    options = ImportOptions(
        model=model,
        base_url=base_url,
        prompt=prompt,
        limit=limit,
        test_fraction=test_fraction,
        redact=redact,
        overwrite=overwrite,
        dry_run=dry_run,
    )
    result = run(sources, out, options, progress=progress())
    if as_json:
        print_json(result.as_json())
        return
    _print_log(result)
    _print_job(result)
    _print_files(result)


def _print_log(result: ImportResult) -> None:
    from dsbs.importing.formats import TITLES

    tally = result.tally
    formats = {TITLES[name]: number for name, number in tally.formats.items()}
    print(f"{count(tally.entries, 'entry', 'entries')}: {listing(formats)}")
    for reason, number in tally.skipped.most_common():
        where = tally.first_skipped.get(reason)
        print(f"  skipped, {reason}: {number:,}" + (f" (first: {where})" if where else ""))
    models = {name or "(not named)": number for name, number in result.models.items()}
    imported = f"; imported: {result.model or '(not named)'}" if len(models) > 1 else ""
    print(f"models: {listing(models)}{imported}")
    tokens = "tokens: not counted in the log"
    if tally.prompt_tokens or tally.completion_tokens:
        tokens = f"tokens: {tally.prompt_tokens:,} prompt, {tally.completion_tokens:,} completion"
    print(tokens)
    if len(result.prompts) > 1:
        print("prompts (choose with --prompt):")
        for number, prompt in enumerate(result.prompts, 1):
            mark = "*" if number == result.prompt else " "
            begins = prompt["begins"] or "(no system text)"
            print(f" {mark}{number}. {count(prompt['calls'], 'call')}: {begins}")


def _print_job(result: ImportResult) -> None:
    from dsbs.importing.redaction import hide_keys

    if result.instruction:
        instruction = shown_prompt(hide_keys(result.instruction), _MAX_TEXT)
        print(f"constant part of the prompt:\n{instruction}")
    if result.exemplars:
        print(f"worked examples in the prompt: {result.exemplars}")
    print(f"template:\n{shown_prompt(hide_keys(result.template), _MAX_TEXT)}")
    print("input fields, with the values of the first row:")
    for name, value in result.first_row.get("input", {}).items():
        print(f"  {name}: {one_line(hide_keys(str(value)), 200)}")
    print(f"replies: {result.reply_form}; task: {result.task['name']}")
    if result.labels:
        labels = list(result.labels.items())
        shown = ", ".join(f"{name} {number:,}" for name, number in labels[:_MAX_LABELS])
        more = f", and {len(labels) - _MAX_LABELS} more" if len(labels) > _MAX_LABELS else ""
        print(f"{count(len(labels), 'label')}, in a sample: {shown}{more}")
    rows = sum(result.rows.values()) - result.unanswered
    unread = f"; not read: {listing(result.unread)}" if result.unread else ""
    print(f"replies read: {percent(result.read / rows)} of {count(rows, 'row')}{unread}")
    if result.unanswered:
        print(f"without a reply, left for dsbs annotate: {count(result.unanswered, 'row')}")
    if result.private:
        advice = "" if result.redacted else "; --redact replaces them"
        print(f"private: {listing(result.private)}{advice}")
    if result.redacted:
        print(f"redacted: {listing(result.redacted)}")


def _print_files(result: ImportResult) -> None:
    for name, path in result.files.items():
        print(f"{name}: {path}")
    if not result.gold and result.rows.get("test"):
        print(
            "The log has no gold labels: the test rows have the teacher's labels, so results show "
            "how often a student agrees with the teacher. Correct them to measure accuracy."
        )
    if result.files:
        print("next:\n  " + "\n  ".join(result.next))
    else:
        print("dry run: nothing was written")
