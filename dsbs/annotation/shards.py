"""Shards of an annotation: `--shard` on several machines, or tasks on a Ray cluster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from dsbs.annotation.summary import AnnotateResult, SplitSummary
from dsbs.config import Recipe
from dsbs.errors import PartialError
from dsbs.progress import Progress
from dsbs.run_folder import RunFolder
from dsbs.shards import Shard, ShardResult, raise_lasting, run_on_ray


class AnnotateShard(Protocol):
    """``annotate`` as a Ray task calls it."""

    def __call__(
        self, recipe: Recipe, *, out: str | Path, shard: Shard, retry_refused: bool
    ) -> AnnotateResult: ...


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
    work = partial(
        annotate_shard, annotate, recipe, str(run.path.absolute()), retry_refused=retry_refused
    )
    results = run_on_ray(
        work,
        recipe.annotate.ray,
        user="annotate.engine ray",
        concurrency=recipe.annotate.concurrency,
        progress=progress,
    )
    return combine_results(results)


def combine_results(
    results: Sequence[ShardResult[dict[str, SplitSummary]]],
) -> tuple[dict[str, SplitSummary], PartialError | None]:
    """What each split's shards requested, and the first error that can be continued.

    Raises any other error of a shard.
    """
    error = raise_lasting(results)
    requested: dict[str, SplitSummary] = {}
    for result in results:
        for split, summary in (result.value or {}).items():
            requested.setdefault(split, SplitSummary()).add_requests(summary)
    return requested, error


def annotate_shard(
    annotate: AnnotateShard, recipe: Recipe, run: str, shard: Shard, *, retry_refused: bool
) -> dict[str, SplitSummary]:
    """On a worker: annotate one shard, within its part of the recipe's limits."""
    result = annotate(
        shard_recipe(recipe, shard), out=run, shard=shard, retry_refused=retry_refused
    )
    return result.splits


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
