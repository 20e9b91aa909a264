"""A run in parts: by hand on several machines (`--shard`, then `merge`), or as tasks on a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dsbs.annotation.annotator import Shard
from dsbs.annotation.backends import is_asked
from dsbs.annotation.run import annotate, shard_folder, store_file
from dsbs.annotation.summary import AnnotateResult, SplitSummary
from dsbs.config import Recipe
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.progress import NoProgress, Progress
from dsbs.run_folder import run_folder


def parse_shard(text: str) -> Shard:
    """``2/4`` is the second of four. Raises UserError."""
    number, _, count = text.partition("/")
    if not (number.isdigit() and count.isdigit()) or not 1 <= int(number) <= int(count):
        raise UserError(
            f"--shard {text} is no part of a whole",
            hint="write the part and how many there are: 1/4, 2/4, 3/4, 4/4",
        )
    return Shard(int(number), int(count))


def merge(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    folders: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> AnnotateResult:
    """Join the replies of shards into the run's store and rebuild its annotations. Nothing is asked.

    ``folders`` are the shards' run folders; none given: all under ``<run>/shards``. Raises UserError where there is no store.
    """
    if not is_asked(recipe.teacher.kind):
        raise UserError(
            f"a teacher of kind {recipe.teacher.kind} has no replies to join",
            hint="run `dsbs annotate` without --shard",
        )
    parts = [Path(folder) for folder in folders] or sorted(
        (run_folder(recipe, out) / "shards").glob("*-of-*")
    )
    stores = [store_file(part) for part in parts]
    missing = [str(store) for store in stores if not store.is_file()]
    if missing or not stores:
        raise UserError(
            f"no replies of a shard at {missing[0]}"
            if missing
            else f"{run_folder(recipe, out)} has no shards",
            hint="run `dsbs annotate RECIPE --shard 1/N` first, or name the shards' run folders",
        )
    return annotate(recipe, out=out, progress=progress, buying="nothing", stores=stores)


def annotate_on_ray(
    recipe: Recipe,
    *,
    out: str | Path | None = None,
    progress: Progress | None = None,
    retry_refused: bool = False,
) -> AnnotateResult:
    """Run ``annotate.ray.shards`` shards as Ray tasks, then merge them.

    All machines must see the run folder and the data under the same paths, and have the key in their environment. Limits are
    split among the shards. A task that dies is started again and goes on from its store. Raises what ``annotate`` raises.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            "annotate.engine ray needs the package ray", hint="pip install 'dsbs[ray]'"
        ) from None
    progress = progress or NoProgress()
    section = recipe.annotate.ray
    run = run_folder(recipe, out).absolute()
    shards = [Shard(i, section.shards) for i in range(1, section.shards + 1)]
    own_cluster = not ray.is_initialized()
    if own_cluster:
        ray.init(
            address=section.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False if not section.address else None,
        )
    try:
        _check_room(dict(ray.cluster_resources()), recipe)  # type: ignore[no-untyped-call]
        remote = ray.remote(
            num_cpus=section.cpus_per_shard, num_gpus=section.gpus_per_shard, max_retries=3
        )(_one_shard)
        where = (str(run), str(Path.cwd()))
        todo: list[Callable[[], Any]] = [
            partial(remote.remote, _split_limits(recipe, shard), *where, shard, retry_refused)
            for shard in shards
        ]
        bought, failures = _run_all(
            ray, todo, min(section.shards, recipe.annotate.concurrency), progress
        )
    finally:
        if own_cluster:
            ray.shutdown()
    fatal = [failure for failure in failures if failure[0] != PartialError.exit_code]
    if fatal:
        code, problem, hint = fatal[0]
        raise (UserError if code == UserError.exit_code else DsbsError)(problem, hint=hint)
    result = merge(
        recipe, out=out, progress=progress, folders=[shard_folder(run, shard) for shard in shards]
    )
    if failures:
        raise PartialError(failures[0][1], hint=failures[0][2])
    for split, summary in result.splits.items():
        _add_counts(summary, bought.get(split, SplitSummary()))
    return result


Failure = tuple[int, str, str]  # exit code, problem, hint


def _run_all(
    ray: Any, todo: list[Callable[[], Any]], at_once: int, progress: Progress
) -> tuple[dict[str, SplitSummary], list[Failure]]:
    """Start the tasks, some at once; what all of them counted, and the failures."""
    bought: dict[str, SplitSummary] = {}
    failures: list[Failure] = []
    waiting: list[Any] = []
    done, count = 0, len(todo)
    try:
        while todo or waiting:
            while todo and len(waiting) < at_once:
                waiting.append(todo.pop(0)())
            ready, waiting = ray.wait(waiting)
            for name, summaries, failure in ray.get(ready):
                done += 1
                progress.say(
                    f"shard {name} ended ({done} of {count})"
                    + (f": {failure[1]}" if failure else "")
                )
                failures += [failure] if failure else []
                for split, summary in summaries.items():
                    _add_counts(bought.setdefault(split, SplitSummary()), summary)
    finally:
        for one in waiting:  # an interrupted driver leaves no task behind that goes on buying
            ray.cancel(one)
    return bought, failures


def _add_counts(total: SplitSummary, part: SplitSummary) -> None:
    """What was sent, not what is in the rows: the merged rows are counted already. Shards run side by side."""
    total.requests += part.requests
    total.cached += part.cached
    total.wasted += part.wasted
    total.wall_s = max(total.wall_s, part.wall_s)


def _check_room(there: dict[str, float], recipe: Recipe) -> None:
    """Raises UserError where the cluster could never start a shard: Ray would wait for ever and say nothing."""
    section = recipe.annotate.ray
    for kind, key, needed in (
        ("CPU", "cpus_per_shard", section.cpus_per_shard),
        ("GPU", "gpus_per_shard", section.gpus_per_shard),
    ):
        if needed > there.get(kind, 0):
            raise UserError(
                f"annotate.ray.{key}: {needed:g}, and the whole cluster has {there.get(kind, 0):g} {kind}",
                hint="set aside less for a shard, or name a larger cluster in annotate.ray.address",
            )


def _one_shard(
    recipe: Recipe, run: str, cwd: str, shard: Shard, retry_refused: bool
) -> tuple[str, dict[str, SplitSummary], Failure | None]:
    """On a worker: annotate one shard. A failure travels as its parts, for the driver to raise."""
    os.chdir(cwd)  # a recipe's relative paths mean what they mean to the driver
    try:
        result = annotate(recipe, out=run, shard=shard, retry_refused=retry_refused)
    except DsbsError as error:
        return str(shard), {}, (error.exit_code, error.problem, error.hint)
    return str(shard), result.splits, None


def _split_limits(recipe: Recipe, shard: Shard) -> Recipe:
    """The recipe of one shard: all of them together keep to the whole recipe's limits."""
    count = shard.count

    def share(value: Any) -> Any:
        return None if value is None else value / count

    annotate_, teacher = recipe.annotate, recipe.teacher
    requests = annotate_.max_requests
    limits = {
        "concurrency": max(1, annotate_.concurrency // count),
        "max_usd": share(annotate_.max_usd),
        "max_requests": None
        if requests is None
        else requests // count + (shard.number <= requests % count),
    }
    caps = {
        "rpm": share(teacher.rpm),
        "tpm": share(teacher.tpm),
        "endpoints": tuple(
            one.model_copy(update={"rpm": share(one.rpm), "tpm": share(one.tpm)})
            for one in teacher.endpoints
        ),
    }
    return recipe.model_copy(
        update={
            "annotate": annotate_.model_copy(update=limits),
            "teacher": teacher.model_copy(update=caps),
        }
    )
