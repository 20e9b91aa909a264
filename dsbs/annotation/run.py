"""Annotation: a teacher gives every row a rationale and a label.

Replies are bought, and rows are then derived from the replies by pure functions. Buying is the only
step that costs money; deriving is repeated freely, whenever the prompt's parser, the vote or a
setting changes.

    buy       rows ─► Annotator.next_requests ─► Requester, or batch ─► EndpointPool ─► endpoint
                                                           │
                                             annotate/replies.sqlite (ReplyStore)
                                                           │
    derive    rows ─► Annotator.derive ◄───────────────────┘
                          │   parse_reply ─► flaws ─► majority vote
                          ▼
                      write_annotations ─► annotate/<split>.jsonl, SplitSummary

A teacher on disk (recorded, human, ensemble) has no first step: ``Teacher.annotations``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from dsbs.annotation.annotator import Annotator
from dsbs.annotation.backends import Teacher, make_teacher, teacher_class
from dsbs.annotation.batch import buy_batches
from dsbs.annotation.batch_files import export, import_output
from dsbs.annotation.next_rows import finish_round, remaining
from dsbs.annotation.requester import send_requests
from dsbs.annotation.shards import annotate_on_ray
from dsbs.annotation.store import ReplyStore, open_store
from dsbs.annotation.summary import (
    AnnotateResult,
    RowsToRequest,
    SplitSummary,
    rationale_methods,
    write_annotations,
)
from dsbs.config import Recipe
from dsbs.errors import DsbsError, UserError
from dsbs.formatting import count, listing
from dsbs.progress import NoProgress, Progress, running
from dsbs.prompting import source_fingerprint
from dsbs.records import Annotation
from dsbs.records.reviews import Review, write_reviews
from dsbs.run_folder import RunFolder, read_annotations
from dsbs.tasks.data import survey
from dsbs.tasks.shards import Shard

_SPLITS = ("train", "valid", "test")
Buying = Literal["online", "batch", "nothing"]  # how missing replies are bought


def annotate(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    buying: Buying = "online",
    shard: Shard | None = None,
    stores: Sequence[Path] = (),
    outputs: Sequence[Path] = (),
    retry_refused: bool = False,
) -> AnnotateResult:
    """Annotate the recipe's splits into ``annotate/<split>.jsonl``, one row for every input row.

    Replies in the run's store are not bought again; nor are those in ``stores`` (of shards) and
    ``outputs`` (of exported batches), which are imported first. Requests that the endpoint refused
    for good are repeated only with ``retry_refused``. A ``shard`` has a run folder of its own
    inside the run's; with ``annotate.engine: ray`` all shards run as tasks of a cluster.

    Raises UserError for a mistake in the recipe or the data and, once the rows are written,
    PartialError where a limit or the endpoint ended the run early (rows without a reply say so).
    """
    progress = progress or NoProgress()
    kind = teacher_class(recipe.teacher.kind)
    buys_online = kind.is_asked and buying == "online"
    if recipe.annotate.engine == "ray" and buys_online and shard is None:
        return _annotate_on_ray(recipe, out, progress, retry_refused=retry_refused)
    parent_run = RunFolder.of(recipe, out)
    rounds = parent_run.next_rounds()
    annotator = Annotator(recipe, shard, rounds)
    run = parent_run if shard is None else parent_run.shard(str(shard))
    surveys = {str(split): survey(annotator.examples(split)) for split in recipe.annotate.splits}
    summaries = {split: SplitSummary() for split in surveys}
    teacher: Teacher | None = None
    if buys_online or not kind.is_asked:
        teacher = make_teacher(recipe)  # before any file is written: a missing key leaves no trace
        teacher.check_run_folder(parent_run.path)
    with (
        run.lock("annotate"),
        run.record(
            "annotate",
            recipe,
            {split: rows.hash for split, rows in surveys.items()},
        ) as record,
    ):
        record.update(_manifest_entries(annotator, teacher))
        stopped: DsbsError | None = None
        if not kind.is_asked:
            assert teacher is not None
            _read(annotator, teacher, run, summaries, progress)
        else:
            with open_store(run, None if shard is None else parent_run) as store:
                stopped = _import(annotator, store, run, stores, outputs, progress)
                _check_store(run, store)
                if teacher is not None:
                    counts = {split: rows.rows for split, rows in surveys.items()}
                    rows = _rows_to_request(annotator, counts, summaries)
                    stopped = send_requests(
                        annotator, teacher, store, rows, progress, retry_refused=retry_refused
                    )
                elif buying == "batch":
                    stopped = buy_batches(annotator, store, run, summaries, progress)
                _derive(annotator, store, run, summaries)
                record["adaptations"] = _adaptations(annotator, store)
                record["mean_seconds"] = store.mean_seconds(
                    annotator.identities, recipe.teacher.model
                )
        record["splits"] = {split: summary.as_json() for split, summary in summaries.items()}
        _say_warnings(annotator, summaries, progress)
        if stopped is not None:
            raise stopped
        if any(summary.rejected["no-reply"] for summary in summaries.values()):
            record["status"] = "partial"
        if shard is None and "train" in summaries:
            is_complete = not kind.is_asked or not summaries["train"].rejected["no-reply"]
            finish_round(parent_run, is_complete=is_complete)
    return AnnotateResult(
        run.path,
        summaries,
        reportable=recipe.task.limit is None,
        can_continue=kind.is_asked,
        remaining=remaining(recipe, annotator.task, rounds),
    )


def _check_store(run: RunFolder, store: ReplyStore) -> None:
    """Raises UserError where the store has lost the replies that the annotations were made from."""
    if not store.is_empty:
        return
    for split in _SPLITS:
        path = run.annotations(split)
        annotations = read_annotations(path) if path.is_file() else ()
        paid = sum(
            row.request_key is not None and row.has_reply and row.teacher.kind != "ensemble"
            for row in annotations
        )
        if paid:
            raise UserError(
                f"{store.path} has no replies, and {path} has {count(paid, 'row')} with one",
                hint=f"restore the file; to buy all replies again, move {path.parent} away",
            )


def _rows_to_request(
    annotator: Annotator, counts: dict[str, int], summaries: dict[str, SplitSummary]
) -> list[RowsToRequest]:
    return [
        RowsToRequest(split, partial(annotator.examples, split), counts[split], summary)
        for split, summary in summaries.items()
    ]


def _manifest_entries(annotator: Annotator, teacher: Teacher | None) -> dict[str, Any]:
    """What the manifest records beside the recipe and the data."""
    entries: dict[str, Any] = {"prompt": None}
    if annotator.prompt is not None:
        entries["prompt"] = annotator.prompt.model_dump(mode="json")
    entries["source"] = source_fingerprint(annotator.recipe, annotator.task)
    if teacher is not None:
        entries |= teacher.manifest_entries()
    entries["shard"] = None if annotator.shard is None else str(annotator.shard)
    return entries


def _adaptations(annotator: Annotator, store: ReplyStore) -> dict[str, list[str]]:
    """How each endpoint's requests differ from the recipe's, because it refused something."""
    model = annotator.recipe.teacher.model
    return {
        identity: [str(change) for change in store.adaptation(identity, model).changes]
        for identity in annotator.identities
    }


def _say_warnings(
    annotator: Annotator, summaries: dict[str, SplitSummary], progress: Progress
) -> None:
    unknown: Counter[str] = Counter()
    warnings = []
    for split, summary in summaries.items():
        warnings += summary.warnings(split, rationale_methods(annotator.recipe))
        unknown += summary.unknown_finish_reasons
    if unknown:
        warnings.append(
            f"finish reasons that are not known ({listing(unknown)}): these replies were read as "
            "if they might be cut; look whether they are whole"
        )
    context = annotator.context_check.warning()
    if context is not None:
        warnings.append(context)
    for warning in warnings:
        progress.say(f"warning: {warning}")


def _derive(
    annotator: Annotator, store: ReplyStore, run: RunFolder, summaries: dict[str, SplitSummary]
) -> None:
    """Write the annotations that the stored replies make."""
    for split, summary in summaries.items():
        annotations = annotator.derive(store, annotator.examples(split))
        _write(annotator, run, split, annotations, summary)


def _read(
    annotator: Annotator,
    teacher: Teacher,
    run: RunFolder,
    summaries: dict[str, SplitSummary],
    progress: Progress,
) -> None:
    """Write the annotations of a teacher on disk. Raises UserError where it has none."""
    for split, summary in summaries.items():
        started = time.monotonic()
        with running(progress, f"read {split}", None):
            annotations = teacher.annotations(annotator.examples(split), split)
            _write(annotator, run, split, annotations, summary, progress)
        summary.wall_s = time.monotonic() - started
        for warning in teacher.warnings(split, summary.rows):
            progress.say(warning)
    if all(summary.rows == summary.rejected["no-reply"] for summary in summaries.values()):
        raise teacher.no_annotations()


def _write(
    annotator: Annotator,
    run: RunFolder,
    split: str,
    annotations: Iterable[Annotation],
    summary: SplitSummary,
    progress: Progress | None = None,
) -> None:
    """Write a split's annotations; those of train rows say how the rows were chosen."""
    if split == "train":
        annotations = map(annotator.rounds.marked, annotations)
    write_annotations(run.annotations(split), annotations, annotator.task, summary, progress)


def _import(
    annotator: Annotator,
    store: ReplyStore,
    run: RunFolder,
    stores: Sequence[Path],
    outputs: Sequence[Path],
    progress: Progress,
) -> DsbsError | None:
    """Copy the replies of other stores and of exported batches' outputs into the store.

    Returns the error that an output holds.
    """
    error: DsbsError | None = None
    for path in stores:
        progress.say(f"{count(store.merge(path), 'reply', 'replies')} taken from {path}")
    for path in outputs:
        output = import_output(annotator, store, run, path, progress)
        progress.say(f"{count(output.replies, 'reply', 'replies')} taken from {path}")
        error = error or output.error
    return error


def _annotate_on_ray(
    recipe: Recipe, out: str | Path | None, progress: Progress, *, retry_refused: bool
) -> AnnotateResult:
    """Buy the shards' replies on a Ray cluster, then merge them."""
    run = RunFolder.of(recipe, out)
    requested, partial = annotate_on_ray(
        recipe, annotate, run, progress=progress, retry_refused=retry_refused
    )
    folders = [run.shard(str(shard)).path for shard in Shard.all(recipe.annotate.ray.shards)]
    result = merge(recipe, out=out, progress=progress, folders=folders)
    if partial is not None:
        raise partial
    for split, summary in result.splits.items():
        summary.add_requests(requested.get(split, SplitSummary()))
    return result


def merge(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    folders: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> AnnotateResult:
    """Join the replies of shards into the run's store and rebuild its annotations; send nothing.

    ``folders`` are the shards' run folders (empty: all under ``<run>/shards``). People's reviews
    of the shards are joined too. Raises UserError where a shard has no replies or a review cannot
    be read.
    """
    if not teacher_class(recipe.teacher.kind).is_asked:
        raise UserError(
            f"a teacher of kind {recipe.teacher.kind} has no replies to join",
            hint="run `dsbs annotate` without --shard",
        )
    run = RunFolder.of(recipe, out)
    shards = [RunFolder(folder) for folder in folders] or run.shards()
    stores = [shard.replies for shard in shards]
    problems = [f"there are no replies at {store}" for store in stores if not store.is_file()]
    if not stores:
        problems = [f"{run.path} has no shards"]
    if problems:
        raise UserError(
            problems[0],
            hint="run `dsbs annotate RECIPE --shard 1/N` first, or name the shards' run folders",
        )
    _join_reviews(run, shards, progress or NoProgress())
    return annotate(recipe, out=out, progress=progress, buying="nothing", stores=stores)


def _join_reviews(run: RunFolder, shards: Sequence[RunFolder], progress: Progress) -> None:
    """Add the decisions of the shards that the run lacks. Nothing is added twice."""
    for split in _SPLITS:
        present = {review.model_dump_json() for review in _decisions(run, split)}
        decisions = (review for shard in shards for review in _decisions(shard, split))
        new = [review for review in decisions if review.model_dump_json() not in present]
        if new:
            write_reviews(run.reviews(split), new)
            progress.say(f"{count(len(new), 'review')} of {split} joined from the shards")


def _decisions(run: RunFolder, split: str) -> Iterator[Review]:
    return chain.from_iterable(run.read_reviews(split).values())


def export_batch(recipe: Recipe, path: Path, *, out: str | Path | None = None) -> int:
    """Write the missing requests to ``path`` in the OpenAI Batch format, for `vllm run-batch`.

    ``annotate(…, outputs=[file])`` imports its output. Returns the number of requests. Raises
    UserError.
    """
    if not teacher_class(recipe.teacher.kind).is_asked:
        raise UserError(
            f"no requests are sent to a teacher of kind {recipe.teacher.kind}",
            hint="run without --batch-export",
        )
    run = RunFolder.of(recipe, out)
    annotator = Annotator(recipe, rounds=run.next_rounds())
    with run.lock("annotate"), open_store(run) as store:
        return export(annotator, store, run, path)
