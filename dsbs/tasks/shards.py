"""Shards: parts of the rows by a hash of their ids, for several machines or a Ray cluster."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from dsbs.config.teacher import RaySection
from dsbs.errors import DsbsError, PartialError, UserError, needs_extra
from dsbs.progress import Progress
from dsbs.tasks.data import position

TASK_RETRIES = 3  # of a Ray task whose worker died; it continues from what its shard has written
Result = TypeVar("Result")


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

    @classmethod
    def all(cls, count: int) -> list[Shard]:
        return [cls(number, count) for number in range(1, count + 1)]

    def has(self, row_id: str) -> bool:
        return shard_number(row_id, self.count) == self.number

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"


def shard_number(row_id: str, count: int) -> int:
    """The number, from 1, of the shard that has a row."""
    return int(position(row_id, "shard") * count) + 1


@dataclass(frozen=True, slots=True)
class ShardResult(Generic[Result]):
    """What a Ray task returns: what its work returned, or the error that ended it."""

    shard: Shard
    value: Result | None
    error: DsbsError | None = None


def run_on_ray(
    work: Callable[[Shard], Result],
    section: RaySection,
    *,
    user: str,
    concurrency: int | None = None,
    progress: Progress,
) -> list[ShardResult[Result]]:
    """Run ``work`` for each of ``section.shards`` shards as a Ray task.

    ``user`` names what asks for Ray, in messages. At most ``concurrency`` tasks run at a time. All
    machines must see the files under the same paths and have the same environment. A task whose
    worker dies is started again. Results are in the order in which the tasks ended.
    """
    with needs_extra("ray", user):
        import ray
    starts_cluster = not ray.is_initialized()
    if starts_cluster:
        ray.init(
            address=section.address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=None if section.address else False,
        )
    try:
        resources = dict(ray.cluster_resources())  # type: ignore[no-untyped-call]
        check_resources(resources, section, user)
        task: Any = ray.remote(
            num_cpus=section.cpus_per_shard,
            num_gpus=section.gpus_per_shard,
            max_retries=TASK_RETRIES,
        )(run_shard)
        shards = Shard.all(section.shards)
        return _run_tasks(ray, task, work, shards, concurrency or len(shards), progress)
    finally:
        if starts_cluster:
            ray.shutdown()


def raise_lasting(results: Sequence[ShardResult[Any]]) -> PartialError | None:
    """Raise the first error that running again does not heal; else return the first other one."""
    errors = [result.error for result in results if result.error is not None]
    for error in errors:
        if not isinstance(error, PartialError):
            raise error
    return next((error for error in errors if isinstance(error, PartialError)), None)


def _run_tasks(
    ray: Any,
    task: Any,
    work: Callable[[Shard], Result],
    shards: Sequence[Shard],
    concurrency: int,
    progress: Progress,
) -> list[ShardResult[Result]]:
    pending = list(shards)
    running: list[Any] = []
    results: list[ShardResult[Result]] = []
    try:
        while pending or running:
            while pending and len(running) < concurrency:
                running.append(task.remote(work, str(Path.cwd()), pending.pop(0)))
            ready, running = ray.wait(running)
            for result in ray.get(ready):
                results.append(result)
                text = f"shard {result.shard} ended ({len(results)} of {len(shards)})"
                if result.error is not None:
                    text += f": {result.error.problem}"
                progress.say(text)
    finally:
        for reference in running:  # an interrupted driver leaves no task behind that goes on
            ray.cancel(reference)
    return results


def run_shard(
    work: Callable[[Shard], Result], working_directory: str, shard: Shard
) -> ShardResult[Result]:
    """On a worker: do the work of one shard."""
    os.chdir(working_directory)  # relative paths are relative to the driver's
    try:
        return ShardResult(shard, work(shard))
    except DsbsError as error:
        return ShardResult(shard, None, error)


def check_resources(available: dict[str, float], section: RaySection, user: str) -> None:
    """Raises UserError where the cluster can never start a shard: Ray would wait silently."""
    for resource, key, needed in (
        ("CPU", "cpus_per_shard", section.cpus_per_shard),
        ("GPU", "gpus_per_shard", section.gpus_per_shard),
    ):
        total = available.get(resource, 0)
        if needed > total:
            hint = "start Ray on a larger machine"
            if user.startswith("annotate."):  # it has keys of a recipe
                hint = f"lower annotate.ray.{key}, or name a larger cluster in annotate.ray.address"
            raise UserError(
                f"{user}: a task needs {needed:g} {resource}, and the whole cluster has {total:g}",
                hint=hint,
            )
