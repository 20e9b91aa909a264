"""CSV files of a report's numbers, for spreadsheets and scripts.

Shares and differences are fractions, times are milliseconds or seconds as the column says, and
money is US dollars. An empty cell is an unknown value.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsbs.files import atomic_write
from dsbs.records.measures import Interval, Measure
from dsbs.records.results import Latency, Measurement, SystemResult
from dsbs.records.sentences import is_reliable
from dsbs.records.subsets import subset_rank
from dsbs.reporting.compression import by_original
from dsbs.reporting.runs import EvaluatedRun, run_titles

Cell = str | int | float | bool | None
TitledRuns = Sequence[tuple[str, EvaluatedRun]]
# The first characters of a cell that a spreadsheet would calculate.
_FORMULA_STARTS = ("=", "+", "-", "@", "＝", "＋", "－", "＠")
_METRIC_COLUMNS = (
    "run",
    "system",
    "metric",
    "label",
    "seed",
    "value",
    "value_low",
    "value_high",
    "n",
)


def write_csv_files(runs: Sequence[EvaluatedRun], folder: Path) -> list[Path]:
    """Write the runs' tables into ``folder``, the run's name first in each row.

    Equal results give equal files.
    """
    titled = list(zip(run_titles(runs), runs, strict=True))
    tables = {
        "systems.csv": _system_rows(titled),
        "comparisons.csv": _comparison_rows(titled),
        "curve.csv": _curve_rows(titled),
        "metrics.csv": _metric_rows(titled),
        "risk_coverage.csv": _risk_rows(titled),
        "cascades.csv": _cascade_rows(titled),
        "compressed.csv": _compressed_rows(titled),
    }
    return [_write(folder / name, rows) for name, rows in tables.items()]


def _system_rows(runs: TitledRuns) -> list[dict[str, Cell]]:
    rows = []
    is_named = _has_several_students(runs)
    for title, run in runs:
        for system in run.results.systems:
            row: dict[str, Cell] = {
                "run": title,
                "task": run.results.task,
                "split": run.results.split,
                "rows": run.results.n,
                "system": system.name,
                "kind": system.kind,
                **({"student": system.student} if is_named else {}),
                "method": system.method,
                "floor": system.floor,
                "labels": system.labels,
                "subset": system.subset,
                "training_rows": system.training_rows,
                "seeds": " ".join(map(str, system.seeds)),
                "accuracy": system.accuracy,
                **_interval_columns("accuracy", system.ci95),
                "interval": system.interval,
                "unreadable": system.unreadable,
                "parameters": system.parameters,
                "megabytes": system.megabytes,
                "ms_per_example": system.ms_per_example,
                "train_s": system.train_s,
                "usd_per_prediction": system.usd_per_prediction,
            }
            for latency in system.latency:
                row |= _latency_columns(latency)
            for name, measure in system.metrics.items():
                row[f"metric_{name}"] = measure.value
                row |= _interval_columns(f"metric_{name}", measure.ci95)
            rows.append(row)
    return rows


def _latency_columns(latency: Latency) -> dict[str, Cell]:
    name = f"batch_{latency.batch_size}"
    return {
        f"{name}_p50_ms": latency.p50_ms,
        f"{name}_p95_ms": latency.p95_ms,
        f"{name}_device": latency.device,
    }


def _comparison_rows(runs: TitledRuns) -> list[dict[str, Cell]]:
    """Comparisons with other systems, then those with floors, which Holm's correction omits."""
    rows: list[dict[str, Cell]] = [
        {
            "run": title,
            "system": system.name,
            "against": baseline,
            "delta": comparison.delta,
            **_interval_columns("delta", comparison.ci95),
            "p": comparison.p,
            "p_holm": comparison.p_holm,
            "reliable": is_reliable(comparison),
            "test": comparison.test,
            "wins": comparison.wins,
            "losses": comparison.losses,
            "minimum_detectable_effect": comparison.minimum_detectable_effect,
            "delta_per_seed": " ".join(map(str, comparison.delta_per_seed.values())),
        }
        for title, run in runs
        for system in run.results.systems
        for baseline, comparison in system.comparisons.items()
    ]
    for title, run in runs:
        for system in run.results.systems:
            for floor, comparison in system.versus_floors.items():
                row: dict[str, Cell] = {
                    "run": title,
                    "system": system.name,
                    "against": floor,
                    "delta": comparison.delta,
                    **_interval_columns("delta", comparison.ci95),
                    "p": comparison.p,
                    "test": comparison.test,
                    "wins": comparison.wins,
                    "losses": comparison.losses,
                    "beaten": comparison.is_beaten,
                }
                rows.append(row)
    return rows


def _curve_rows(runs: TitledRuns) -> list[dict[str, Cell]]:
    """All students and floors that learn; a single share of the rows makes a curve of one point."""
    is_named = _has_several_students(runs)
    return [
        {
            "run": title,
            **({"student": system.student} if is_named else {}),
            "method": system.method or system.floor,
            "labels": system.labels,
            "subset": system.subset,
            "rows": system.training_rows,
            "accuracy": system.accuracy,
            **_interval_columns("accuracy", system.ci95),
        }
        for title, run in runs
        for system in sorted(run.results.systems, key=_curve_key)
        if system.kind in ("student", "floor") and system.subset is not None
    ]


def _curve_key(system: SystemResult) -> tuple[str, str, str, tuple[bool, float]]:
    method = system.method or system.floor or ""
    return system.student or "", method, system.labels or "", subset_rank(system.subset)


def _has_several_students(runs: TitledRuns) -> bool:
    return any(system.student is not None for _, run in runs for system in run.results.systems)


def _metric_rows(runs: TitledRuns) -> list[dict[str, Cell]]:
    """One value in each row: accuracy over all seeds and by seed, every metric, recall by label,
    and the measures of each of several labels or fields."""
    rows: list[dict[str, Cell]] = []
    for title, run in runs:
        n = run.results.n
        for system in run.results.systems:
            start: dict[str, Cell] = {"run": title, "system": system.name}
            accuracy = start | {"metric": "accuracy", "value": system.accuracy, "n": n}
            rows.append(accuracy | _interval_columns("value", system.ci95))
            for seed, value in zip(system.seeds, system.accuracy_per_seed, strict=False):
                rows.append(start | {"metric": "accuracy", "seed": seed, "value": value, "n": n})
            for name, measure in system.metrics.items():
                rows.append(start | {"metric": name} | _measure_columns(measure))
            selective = {} if system.selective is None else system.selective.measures
            for name, measure in selective.items():
                rows.append(start | {"metric": name} | _measure_columns(measure))
            for label, measure in system.recall.items():
                recall: dict[str, Cell] = {"metric": "recall", "label": label}
                rows.append(start | recall | _measure_columns(measure))
            for label, part in system.parts.items():
                for name, value in part:
                    if isinstance(value, Measure):
                        of_part: dict[str, Cell] = {"metric": name, "label": label}
                        rows.append(start | of_part | _measure_columns(value))
    return [{name: row.get(name) for name in _METRIC_COLUMNS} for row in rows]


def _measure_columns(measure: Measure) -> dict[str, Cell]:
    return {
        "value": measure.value,
        "n": measure.n,
        **_interval_columns("value", measure.ci95),
    }


def _risk_rows(runs: TitledRuns) -> list[dict[str, Cell]]:
    """The points of each system's risk-coverage curve."""
    return [
        {"run": title, "system": system.name, "coverage": coverage, "risk": risk}
        for title, run in runs
        for system in run.results.systems
        if system.selective is not None
        for coverage, risk in system.selective.curve
    ]


def _cascade_rows(runs: TitledRuns) -> list[dict[str, Cell]]:
    """Students in front of their teacher."""
    rows: list[dict[str, Cell]] = []
    for title, run in runs:
        for cascade in run.results.cascades:
            row: dict[str, Cell] = {"run": title} | cascade.model_dump(exclude={"curve"})
            for name, value in cascade:
                if isinstance(value, Measure):
                    row[name] = value.value
                    row |= _interval_columns(name, value.ci95)
            rows.append(row)
    return rows


def _compressed_rows(runs: TitledRuns) -> list[dict[str, Cell]]:
    """Compressed students, each group after its original, whose chain is empty."""
    rows: list[dict[str, Cell]] = []
    for title, run in runs:
        for records in by_original(run.compressed):
            original = records[0]
            start: dict[str, Cell] = {"run": title, "student": original.student}
            where: dict[str, Cell] = {"rows": original.n, "split": "valid"}
            rows.append(start | {"chain": ""} | where | _measurement_columns(original.original))
            for record in records:
                chain: dict[str, Cell] = {"chain": record.name}
                outcome: dict[str, Cell] = {
                    "accuracy_of_original": record.original.accuracy,
                    "agreement": record.agreement,
                    "accuracy_before_healing": record.before_healing,
                    "healing_steps": record.healing_steps,
                    "healed_by": record.healer,
                    "healing_recovered": record.recovered,
                    "max_drop": record.max_drop,
                    "accepted": record.accepted,
                }
                measured = _measurement_columns(record.compressed)
                rows.append(start | chain | where | measured | outcome)
    return rows


def _measurement_columns(measurement: Measurement) -> dict[str, Cell]:
    row: dict[str, Cell] = {
        "accuracy": measurement.accuracy,
        "megabytes": measurement.megabytes,
        "parameters": measurement.parameters,
    }
    for latency in measurement.latency:
        row |= _latency_columns(latency)
    return row


def _interval_columns(name: str, interval: Interval | None) -> dict[str, Cell]:
    low, high = interval or (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _write(path: Path, rows: list[dict[str, Cell]]) -> Path:
    """Columns are in the order in which rows first have them. No rows make an empty file."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with atomic_write(path) as file:
        if columns:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(map(_cell, columns))
            writer.writerows([_cell(row.get(name)) for name in columns] for row in rows)
    return path


def text_cell(text: str) -> str:
    """Text as a cell that no spreadsheet calculates: what would be is quoted by a leading '."""
    text = text.encode(errors="replace").decode()  # no file holds half a surrogate pair
    text = text.replace("\0", "\ufffd")
    return f"'{text}" if _is_formula(text.lstrip("'")) else text


def text_of_cell(cell: str) -> str:
    """The text that ``text_cell`` made a cell of."""
    is_quoted = cell.startswith("'") and _is_formula(cell.lstrip("'"))
    return cell[1:] if is_quoted else cell


def _is_formula(text: str) -> bool:
    return text.lstrip().startswith(_FORMULA_STARTS)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return {True: "yes", False: "no"}[value]
    if isinstance(value, int | float):
        return repr(value)
    return text_cell(str(value))
