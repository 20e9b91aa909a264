"""How runs and systems are called where people read them."""

from __future__ import annotations

from collections.abc import Sequence

from dsbs.records.results import SystemResult
from dsbs.reporting.gather import Run


def run_titles(runs: Sequence[Run]) -> list[str]:
    """A name for each run that no other folder has: the recipe's, or as much of the folder's path as it takes."""
    titles = [run.name for run in runs]
    depth = 0
    while len(set(titles)) < len(runs) and depth < max(
        len(run.path.resolve().parts) for run in runs
    ):
        depth += 1
        twice = {title for title in titles if titles.count(title) > 1}
        tails = ["/".join(run.path.resolve().parts[-depth:]) for run in runs]
        titles = [
            tail if title in twice else title for title, tail in zip(titles, tails, strict=True)
        ]
    return titles


def series_title(system: SystemResult) -> str:
    """What the students of one method and label source are called at every share of the data; others keep their name."""
    return f"{system.method}, {system.labels} labels" if system.method else system.name


def whole(systems: Sequence[SystemResult]) -> list[SystemResult]:
    """The teacher, the outside systems, and the students of the largest share of each method."""
    largest: dict[str, float] = {}
    for system in systems:
        if system.subset is not None:
            largest[series_title(system)] = max(
                system.subset, largest.get(series_title(system), 0.0)
            )
    return [
        system
        for system in systems
        if system.subset is None or system.subset == largest[series_title(system)]
    ]
