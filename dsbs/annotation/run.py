"""The stage: buy what the store does not have, then derive one annotation per row from what it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from dsbs.annotation.annotator import Annotator, Shard
from dsbs.annotation.asking import Requester
from dsbs.annotation.backends import is_asked, make_teacher
from dsbs.annotation.backends.base import Archive, Teacher
from dsbs.annotation.backends.ensemble import EnsembleTeacher
from dsbs.annotation.batch import buy_batches, export, take_back
from dsbs.annotation.deriving import derive, kept, recalled, write
from dsbs.annotation.store import ReplyStore
from dsbs.annotation.summary import AnnotateResult, SplitSummary
from dsbs.config import Recipe
from dsbs.errors import PartialError, UserError
from dsbs.progress import NoProgress, Progress, running
from dsbs.prompting import source_fingerprint
from dsbs.records.rows import Example
from dsbs.run_folder import RunFolder, annotation_file, run_folder
from dsbs.tasks.load import survey

Buying = Literal["online", "batch", "nothing"]  # how replies that the store lacks are come by


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
    """Annotate the splits that the recipe names into ``annotate/<split>.jsonl``, one row for every input row.

    Replies that the run's store already has are not bought again; nor are those in ``stores`` (of shards) and ``outputs`` (of
    exported batches), which are taken in first. Requests that the endpoint refused for good are asked again only with
    ``retry_refused``. A ``shard`` has a run folder of its own inside the run's; with ``annotate.engine: ray`` all of them
    run as tasks of a cluster. Raises UserError for what the user can mend and, once the rows are written, PartialError where
    a limit or the endpoint ended the run early (rows without a reply say so).
    """
    progress = progress or NoProgress()
    asked = is_asked(recipe.teacher.kind)
    if recipe.annotate.engine == "ray" and asked and buying == "online" and shard is None:
        from dsbs.annotation.shards import annotate_on_ray

        return annotate_on_ray(recipe, out=out, progress=progress, retry_refused=retry_refused)
    work = Annotator(recipe, shard)
    whole = run_folder(recipe, out)
    run = whole if shard is None else shard_folder(whole, shard)
    surveys = {str(split): survey(work.examples(split)) for split in recipe.annotate.splits}
    teacher = (
        make_teacher(recipe) if buying == "online" or not asked else None
    )  # a missing key leaves no trace
    if isinstance(teacher, EnsembleTeacher):
        teacher.refuse(whole)
    with (
        RunFolder(run).lock("annotate"),
        RunFolder(run).record(
            "annotate", recipe, {split: found.hash for split, found in surveys.items()}
        ) as record,
    ):
        record["prompt"] = work.prompt.model_dump(mode="json") if work.prompt is not None else None
        record["source"] = source_fingerprint(recipe, work.task)
        if isinstance(teacher, EnsembleTeacher):
            record["members"] = [one.as_json() for one in teacher.members]
        record["shard"] = None if shard is None else str(shard)
        summaries = {split: SplitSummary() for split in surveys}
        stopped: PartialError | None = None
        if asked:
            with open_store(run, None if shard is None else whole) as store:
                for path in stores:
                    progress.say(f"{store.take_in(path)} replies taken from {path}")
                for path in outputs:
                    progress.say(
                        f"{take_back(store, run / 'annotate' / 'batches', path)} replies taken from {path}"
                    )
                totals = {split: found.rows for split, found in surveys.items()}
                if teacher is not None:
                    stopped = wait_for(
                        buy_online(
                            work,
                            teacher,
                            store,
                            progress,
                            totals,
                            summaries,
                            retry_refused=retry_refused,
                        )
                    )
                elif buying == "batch":
                    stopped = buy_batches(
                        work, store, run / "annotate" / "batches", progress, summaries
                    )
                for split, summary in summaries.items():
                    derive(
                        work,
                        work.examples(split),
                        annotation_file(run, split),
                        summary,
                        kept(work, store),
                    )
        else:
            _recall(work, teacher, run, progress, summaries)
        record["splits"] = {name: summary.as_json() for name, summary in summaries.items()}
        if stopped is not None:
            raise stopped
        if any(summary.rejected["no-reply"] for summary in summaries.values()):
            record["status"] = "partial"
        return AnnotateResult(run, summaries, reportable=recipe.task.limit is None, can_go_on=asked)


def export_batch(recipe: Recipe, path: Path, *, out: str | Path | None = None) -> int:
    """Write what the rows lack to ``path`` in the OpenAI Batch format, for `vllm run-batch`. Returns the number of requests.

    ``annotate(…, outputs=[file])`` takes its output back. Raises UserError.
    """
    if not is_asked(recipe.teacher.kind):
        raise UserError(
            f"a teacher of kind {recipe.teacher.kind} is sent no requests",
            hint="run without --batch-export",
        )
    work, run = Annotator(recipe), run_folder(recipe, out)
    with RunFolder(run).lock("annotate"), open_store(run) as store:
        return export(work, store, run / "annotate" / "batches", path)


def shard_folder(run: Path, shard: Shard) -> Path:
    return run / "shards" / str(shard)


def store_file(run: Path) -> Path:
    return run / "annotate" / "replies.sqlite"


def open_store(run: Path, whole: Path | None = None) -> ReplyStore:
    """A run's store; a shard's looks into that of the ``whole`` run too."""
    return ReplyStore(store_file(run), beside=None if whole is None else store_file(whole))


# --- the two ways to replies


def wait_for(buying: Coroutine[Any, Any, PartialError | None]) -> PartialError | None:
    """Run to its end, in a thread of its own where this one has a loop already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(buying)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, buying).result()


async def buy_online(
    work: Annotator,
    teacher: Teacher,
    store: ReplyStore,
    progress: Progress,
    totals: Mapping[str, int],
    summaries: Mapping[str, SplitSummary],
    examples: Callable[[str], Iterable[Example]] | None = None,
    retry_refused: bool = False,
) -> PartialError | None:
    """Ask for what the rows of each split lack. Returns the reason where a limit or the endpoint ended it early."""
    try:
        asking = Requester(work, teacher, store, progress, retry_refused=retry_refused)
        store.hold_reserve(asking.most)
        for split, total in totals.items():
            rows = work.examples(split) if examples is None else examples(split)
            await asking.rows(f"annotate {split}", rows, total, summaries[split])
    except PartialError as error:
        return error
    finally:
        await teacher.close()
    return None


def _recall(
    work: Annotator,
    archive: Archive | EnsembleTeacher | None,
    run: Path,
    progress: Progress,
    summaries: Mapping[str, SplitSummary],
) -> None:
    assert archive is not None
    for split, summary in summaries.items():
        started = time.monotonic()
        with running(progress, f"read {split}", None):
            annotations = recalled(work, archive, work.examples(split), split)
            write(work, annotations, annotation_file(run, split), summary, progress)
        summary.wall_s = time.monotonic() - started
        if isinstance(archive, EnsembleTeacher):
            for lack in archive.lacking(split, summary.rows):
                progress.say(lack)
    if all(summary.rows == summary.rejected["no-reply"] for summary in summaries.values()):
        if isinstance(archive, EnsembleTeacher):
            raise UserError(
                "no member of the ensemble has a reply to any row",
                hint="run `dsbs annotate` of the members first",
            )
        where = "teacher.completion in the rows, or the file teacher.completions"
        what = "rationale column" if work.recipe.teacher.kind == "human" else where
        raise UserError(
            f"the data has no {what} for any row", hint="check teacher.kind and task.columns"
        )
