"""Shards: a run split over several machines (`--shard`, then `merge`) or on a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dsbs.annotation.summary import AnnotateResult, SplitSummary
from dsbs.config import Recipe
from dsbs.errors import DsbsError, PartialError, UserError, needs_extra
from dsbs.progress import Progress
from dsbs.run_folder import RunFolder
from dsbs.tasks.data import position

TASK_RETRIES = 3  # of a task whose worker died; it continues from the shard's store


@dataclass(frozen=True, slots=True)
class Shard:
    """The ``number``-th (from 1) of ``count`` parts of the rows, by a hash of their ids."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``2/4`` is the second of four. Raises UserError."""
        number, _, count = text.partition("/")
        if not (number.isdigit() and count.isdigit()) or not 1 <= int(number) <= int(count):
            raise UserError(
                f"--shard {text}: not a shard",
                hint="write the number and the count of the parts: 1/4, 2/4, 3/4, 4/4",
            )
        return cls(int(number), int(count))

    def has(self, row_id: str) -> bool:
        return int(position(row_id, "shard") * self.count) == self.number - 1

    def folder(self, run: RunFolder) -> RunFolder:
        """The shard's own run folder, inside the run's."""
        return run.shard(str(self))

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"


class AnnotateShard(Protocol):
    """``annotate`` as a Ray task calls it."""

    def __call__(
        self, recipe: Recipe, *, out: str | Path, shard: Shard, retry_refused: bool
    ) -> AnnotateResult: ...


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a Ray task returns. ``failure`` is an error's exit code, problem and hint."""

    shard: Shard
    summaries: dict[str, SplitSummary]
    failure: tuple[int, str, str] | None = None

    def error(self) -> DsbsError | None:
        """The failure as an error again: exceptions with keyword arguments do not unpickle."""
        if self.failure is None:
            return None
        code, problem, hint = self.failure
        for kind in (UserError, PartialError):
            if code == kind.exit_code:
                return kind(problem, hint=hint)
        return DsbsError(problem, hint=hint)


def annotate_on_ray(
    recipe: Recipe,
    annotate: AnnotateShard,
    run: RunFolder,
    *,
    progress: Progress,
    retry_refused: bool = False,
) -> tuple[dict[str, SplitSummary], PartialError | None]:
    """Run ``annotate.ray.shards`` shards as Ray tasks into ``run``'s shard folders.

    All machines must see the run folder and the data under the same paths, and have the key in
    their environment. The recipe's limits are divided among the shards. A task whose worker dies
    is restarted and continues from its store. Returns what ``combine_results`` returns; raises what
    ``annotate`` raises.
    """
    with needs_extra("ray", "annotate.engine ray"):
        import ray
    section = recipe.annotate.ray
    starts_cluster = not ray.is_initialized()
    if starts_cluster:
        ray.init(
            address=section.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=None if section.address else False,
        )
    try:
        check_resources(dict(ray.cluster_resources()), recipe)  # type: ignore[no-untyped-call]
        task = ray.remote(
            num_cpus=section.cpus_per_shard,
            num_gpus=section.gpus_per_shard,
            max_retries=TASK_RETRIES,
        )(run_shard)
        tasks = [
            _Task(task, annotate, shard_recipe(recipe, shard), run, shard, retry_refused)
            for shard in (Shard(i, section.shards) for i in range(1, section.shards + 1))
        ]
        concurrency = min(section.shards, recipe.annotate.concurrency)
        results = _run_tasks(ray, tasks, concurrency, progress)
    finally:
        if starts_cluster:
            ray.shutdown()
    return combine_results(results)


def combine_results(
    results: Sequence[ShardResult],
) -> tuple[dict[str, SplitSummary], PartialError | None]:
    """What each split's shards requested, and the first error that can be continued.

    Raises any other error of a shard.
    """
    errors = [error for result in results if (error := result.error()) is not None]
    for error in errors:
        if not isinstance(error, PartialError):
            raise error
    requested: dict[str, SplitSummary] = {}
    for result in results:
        for split, summary in result.summaries.items():
            requested.setdefault(split, SplitSummary()).add_requests(summary)
    partial = next((error for error in errors if isinstance(error, PartialError)), None)
    return requested, partial


@dataclass(frozen=True, slots=True)
class _Task:
    """A Ray task that has not been submitted."""

    remote: Any
    annotate: AnnotateShard
    recipe: Recipe
    run: RunFolder
    shard: Shard
    retry_refused: bool

    def submit(self) -> Any:
        return self.remote.remote(
            self.annotate, self.recipe, str(self.run.path.absolute()), str(Path.cwd()), self.shard,
            self.retry_refused,
        )  # fmt: skip


def _run_tasks(
    ray: Any, tasks: Sequence[_Task], concurrency: int, progress: Progress
) -> list[ShardResult]:
    """Run the tasks, ``concurrency`` at a time. Results are in the order in which they ended."""
    pending = list(tasks)
    running: list[Any] = []
    results: list[ShardResult] = []
    try:
        while pending or running:
            while pending and len(running) < concurrency:
                running.append(pending.pop(0).submit())
            ready, running = ray.wait(running)
            for result in ray.get(ready):
                results.append(result)
                text = f"shard {result.shard} ended ({len(results)} of {len(tasks)})"
                if result.failure is not None:
                    text += f": {result.failure[1]}"
                progress.say(text)
    finally:
        for task in running:  # an interrupted driver leaves no task behind that goes on buying
            ray.cancel(task)
    return results


def run_shard(
    annotate: AnnotateShard,
    recipe: Recipe,
    run: str,
    working_directory: str,
    shard: Shard,
    retry_refused: bool,
) -> ShardResult:
    """On a worker: annotate one shard."""
    os.chdir(working_directory)  # a recipe's relative paths are relative to the driver's
    try:
        result = annotate(recipe, out=run, shard=shard, retry_refused=retry_refused)
    except DsbsError as error:
        return ShardResult(shard, {}, (error.exit_code, error.problem, error.hint))
    return ShardResult(shard, result.splits)


def check_resources(available: dict[str, float], recipe: Recipe) -> None:
    """Raises UserError where the cluster can never start a shard: Ray would wait silently."""
    section = recipe.annotate.ray
    for resource, key, needed in (
        ("CPU", "cpus_per_shard", section.cpus_per_shard),
        ("GPU", "gpus_per_shard", section.gpus_per_shard),
    ):
        total = available.get(resource, 0)
        if needed > total:
            raise UserError(
                f"annotate.ray.{key}: {needed:g}, and the whole cluster has {total:g} {resource}",
                hint="lower it, or name a larger cluster in annotate.ray.address",
            )


def shard_recipe(recipe: Recipe, shard: Shard) -> Recipe:
    """The recipe of one shard: all shards together keep to the recipe's limits."""
    count = shard.count
    annotate = recipe.annotate
    teacher = recipe.teacher
    max_requests = annotate.max_requests
    if max_requests is not None:
        max_requests = max_requests // count + (shard.number <= max_requests % count)
    limits = {
        "concurrency": max(1, annotate.concurrency // count),
        "max_usd": _divided(annotate.max_usd, count),
        "max_requests": max_requests,
    }
    caps = {
        "rpm": _divided(teacher.rpm, count),
        "tpm": _divided(teacher.tpm, count),
        "endpoints": tuple(
            endpoint.model_copy(
                update={
                    "rpm": _divided(endpoint.rpm, count),
                    "tpm": _divided(endpoint.tpm, count),
                }
            )
            for endpoint in teacher.endpoints
        ),
    }
    return recipe.model_copy(
        update={
            "annotate": annotate.model_copy(update=limits),
            "teacher": teacher.model_copy(update=caps),
        }
    )


def _divided(limit: float | None, count: int) -> float | None:
    if limit is None:
        return None
    return limit / count
