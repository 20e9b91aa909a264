"""Several runs side by side: what their recipes do not share, and whether they were tested on the same rows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsbs.config.load import recorded
from dsbs.errors import UserError
from dsbs.reporting.gather import Run, gather
from dsbs.reporting.naming import run_titles

ABSENT = "–"


def gather_all(paths: Sequence[Path]) -> list[Run]:
    """Read the run folders, each named so that no two are called alike. Raises UserError as ``gather`` does, and where a
    folder is given twice.
    """
    for place, count in Counter(path.resolve() for path in paths).items():
        if count > 1:
            raise UserError(f"the run {place} is given {count} times", hint="name each run once")
    runs = [gather(path) for path in paths]
    return [replace(run, name=title) for run, title in zip(runs, run_titles(runs), strict=True)]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys of the resolved recipes, dotted, whose values differ, with each run's value; the recipe's name is no setting."""
    flat = [dict(_flatten(recorded({"recipe": run.recipe}), "")) for run in runs]
    keys = dict.fromkeys(key for one in flat for key in one)
    lines = [(key, [one.get(key, ABSENT) for one in flat]) for key in keys if key != "name"]
    return [(key, values) for key, values in lines if len(set(values)) > 1]


def same_rows(runs: Sequence[Run]) -> bool:
    """Whether all runs are known to have been evaluated on the same rows, by the data's hash."""
    hashes = {run.results.data.get(run.results.split) for run in runs}
    return len(hashes) == 1 and None not in hashes


def _flatten(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Leaves of nested mappings, as text; a list is a leaf, for its order and length are its value."""
    if isinstance(value, dict) and (value or not path):
        for key, inner in value.items():
            yield from _flatten(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, str):
        yield path, value
    else:
        yield path, json.dumps(value, ensure_ascii=False)
