"""CSV files with the report's numbers, for people with a spreadsheet or a script.

Shares and differences are fractions, times milliseconds or seconds as the column says, money US dollars; what an empty cell
would hold is not known.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsbs.files import atomic
from dsbs.records.compression import Measurement
from dsbs.records.results import Interval, Latency, SystemResult
from dsbs.records.summary import is_reliable
from dsbs.reporting.compression import by_original
from dsbs.reporting.gather import Run
from dsbs.reporting.naming import run_titles

Cell = str | int | float | bool | None
_FORMULA = (
    "=",
    "+",
    "-",
    "@",
    "＝",
    "＋",
    "－",
    "＠",
)  # what spreadsheets calculate where a cell begins with it


def write_tables(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Write the runs' tables into ``folder``, one row a fact, the run's name first; equal results give equal files."""
    titles = run_titles(runs)
    named = list(zip(titles, runs, strict=True))
    tables = {
        "systems.csv": _systems(named),
        "comparisons.csv": _comparisons(named),
        "curve.csv": _curve(named),
        "metrics.csv": _metrics(named),
        "compressed.csv": _compressed(named),
    }
    return [_write(folder / name, rows) for name, rows in tables.items()]


def _systems(runs: Iterable[tuple[str, Run]]) -> list[dict[str, Cell]]:
    rows = []
    for title, run in runs:
        for system in run.results.systems:
            row: dict[str, Cell] = {
                "run": title,
                "task": run.results.task,
                "split": run.results.split,
                "rows": run.results.n,
                "system": system.name,
                "kind": system.kind,
                "method": system.method,
                "labels": system.labels,
                "subset": system.subset,
                "training_rows": system.training_rows,
                "seeds": " ".join(map(str, system.seeds)),
                "accuracy": system.accuracy,
                **_ends("accuracy", system.ci95),
                "interval": system.interval,
                "unreadable": system.unreadable,
                "parameters": system.parameters,
                "megabytes": system.megabytes,
                "ms_per_example": system.ms_per_example,
                "train_s": system.train_s,
                "usd_per_prediction": system.usd_per_prediction,
            }
            for latency in system.latency:
                row |= _times(latency)
            for name, measure in system.metrics.items():
                row |= {f"metric_{name}": measure.value, **_ends(f"metric_{name}", measure.ci95)}
            rows.append(row)
    return rows


def _times(latency: Latency) -> dict[str, Cell]:
    name = f"batch_{latency.batch_size}"
    return {
        f"{name}_p50_ms": latency.p50_ms,
        f"{name}_p95_ms": latency.p95_ms,
        f"{name}_device": latency.device,
    }


def _comparisons(runs: Iterable[tuple[str, Run]]) -> list[dict[str, Cell]]:
    return [
        {
            "run": title,
            "system": system.name,
            "against": other,
            "delta": versus.delta,
            **_ends("delta", versus.ci95),
            "p": versus.p,
            "p_holm": versus.p_holm,
            "reliable": is_reliable(versus),
            "test": versus.test,
            "wins": versus.wins,
            "losses": versus.losses,
            "minimum_detectable_effect": versus.minimum_detectable_effect,
        }
        for title, run in runs
        for system in run.results.systems
        for other, versus in system.versus.items()
    ]


def _curve(runs: Iterable[tuple[str, Run]]) -> list[dict[str, Cell]]:
    """Every student system, so that one share of the rows makes a curve of one point."""
    return [
        {
            "run": title,
            "method": system.method,
            "labels": system.labels,
            "subset": system.subset,
            "rows": system.training_rows,
            "accuracy": system.accuracy,
            **_ends("accuracy", system.ci95),
        }
        for title, run in runs
        for system in sorted(run.results.systems, key=_place)
        if system.kind == "student"
    ]


def _place(system: SystemResult) -> tuple[str, str, float]:
    return system.method or "", system.labels or "", system.subset or 0.0


def _metrics(runs: Iterable[tuple[str, Run]]) -> list[dict[str, Cell]]:
    """One value a row: accuracy over and by seeds, every metric, recall by label."""
    rows: list[dict[str, Cell]] = []
    for title, run in runs:
        for system in run.results.systems:
            start: dict[str, Cell] = {"run": title, "system": system.name}
            whole = start | {"metric": "accuracy", "value": system.accuracy, "n": run.results.n}
            rows.append(whole | _ends("value", system.ci95))
            for seed, accuracy in zip(system.seeds, system.accuracy_per_seed, strict=False):
                rows.append(
                    start
                    | {"metric": "accuracy", "seed": seed, "value": accuracy, "n": run.results.n}
                )
            for name, measure in system.metrics.items():
                rows.append(
                    start
                    | {
                        "metric": name,
                        "value": measure.value,
                        "n": measure.n,
                        **_ends("value", measure.ci95),
                    }
                )
            for label, measure in system.recall.items():
                one: dict[str, Cell] = {
                    "metric": "recall",
                    "label": label,
                    "value": measure.value,
                    "n": measure.n,
                }
                rows.append(start | one | _ends("value", measure.ci95))
    order = ("run", "system", "metric", "label", "seed", "value", "value_low", "value_high", "n")
    return [{name: row.get(name) for name in order} for row in rows]


def _compressed(runs: Iterable[tuple[str, Run]]) -> list[dict[str, Cell]]:
    """What `dsbs compress` made, and before each student's first line the student as trained, whose chain is empty."""
    rows: list[dict[str, Cell]] = []
    for title, run in runs:
        for first, one in (
            (records[0], one) for records in by_original(run.compressed) for one in records
        ):
            start: dict[str, Cell] = {"run": title, "student": one.student}
            if one is first:
                rows.append(
                    start | {"chain": "", "rows": one.n, "split": "valid"} | _standing(one.original)
                )
            rows.append(
                start
                | {"chain": one.name, "rows": one.n, "split": "valid"}
                | _standing(one.compressed)
                | {
                    "accuracy_of_original": one.original.accuracy,
                    "agreement": one.agreement,
                    "accuracy_before_healing": one.before_healing,
                    "healing_steps": one.healing_steps,
                    "healing_recovered": one.recovered,
                    "max_drop": one.max_drop,
                    "accepted": one.accepted,
                }
            )
    return rows


def _standing(one: Measurement) -> dict[str, Cell]:
    row: dict[str, Cell] = {
        "accuracy": one.accuracy,
        "megabytes": one.megabytes,
        "parameters": one.parameters,
    }
    for latency in one.latency:
        row |= _times(latency)
    return row


def _ends(name: str, interval: Interval | None) -> dict[str, Cell]:
    low, high = (None, None) if interval is None else interval
    return {f"{name}_low": low, f"{name}_high": high}


def _write(path: Path, rows: list[dict[str, Cell]]) -> Path:
    """Columns stand in the order in which rows first have them; a table without rows is an empty file."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(path) as file:
        if columns:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(map(_cell, columns))
            writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    return path


def _cell(value: Any) -> str:
    """A number as a number and text as text, even where a spreadsheet would calculate it: after a ' it does not."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value).encode(errors="replace").decode()  # half of a surrogate pair is in no file
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text.replace("\0", "\ufffd")
