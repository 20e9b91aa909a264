"""What the teacher costs: its bill, its price for a prediction, and when a student has saved it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsbs.evaluation.recorded import TEACHER
from dsbs.evaluation.systems import System
from dsbs.records.results import BreakEven, Results
from dsbs.records.subsets import rows_per_label
from dsbs.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class Costs:
    """What the teacher costs, in dollars and milliseconds; None: unknown."""

    usd_per_request: float | None = None
    ms_per_request: float | None = None
    bills: Mapping[str, float] = field(default_factory=dict)
    """For the training rows, in dollars, by the system that learned from them."""


def teacher_costs(run: RunFolder, results: Results) -> Costs:
    """What the teacher costs, as its annotations record it."""
    seconds = run.manifest("annotate").get("mean_seconds")
    teacher = results.system(TEACHER)
    return Costs(
        usd_per_request=None if teacher is None else teacher.usd_per_prediction,
        ms_per_request=1000 * seconds if isinstance(seconds, int | float) else None,
        bills={item.system: item.spent_usd for item in results.break_even},
    )


def break_evens(
    systems: Sequence[System],
    spent_usd: float | None,
    usd_per_prediction: float | None,
    usd_per_row: float | None = None,
) -> Iterator[BreakEven]:
    """For students of the teacher: after how many predictions they have saved its bill.

    ``spent_usd`` is the bill for the training rows, ``usd_per_prediction`` the teacher's price. A
    student of a share of the rows is charged that share; one of so many rows per label is charged
    ``usd_per_row`` for each. Nothing if a price is unknown or zero.
    """
    if not spent_usd or not usd_per_prediction:
        return
    for system in systems:
        if system.students and system.students[0].source is not None:
            subset = system.students[0].subset
            if rows_per_label(subset) is None:
                spent = spent_usd * float(subset)
            else:
                spent = (usd_per_row or 0.0) * (system.training_rows or 0)
            if not spent:
                continue
            yield BreakEven(
                system=system.name,
                spent_usd=spent,
                teacher_usd_per_prediction=usd_per_prediction,
                predictions=math.ceil(spent / usd_per_prediction),
            )


def teacher_bill(
    annotate_manifest: Mapping[str, Any], split: str
) -> tuple[float | None, float | None]:
    """Dollars that annotating a split cost, in total and per row; None: unknown.

    Earlier versions wrote 0.0 for recorded replies, whose tokens nobody counted.
    """
    summary = annotate_manifest.get("splits", {}).get(split, {})
    usd = summary.get("usd")
    rows = summary.get("rows")
    if usd == 0 and not any((summary.get("usage") or {}).values()):
        usd = None
    if usd is None or not rows:
        return usd, None
    return usd, usd / rows


def teacher_price(annotate_manifest: Mapping[str, Any], split: str) -> float | None:
    """Dollars for a prediction of the teacher; None: unknown.

    What a row of the split cost that was paid for (no copy, no recorded reply), without its hint: a
    request has no gold label to hint at.
    """
    usd, usd_per_row = teacher_bill(annotate_manifest, split)
    if usd is None or usd_per_row is None:
        return None
    summary = annotate_manifest["splits"][split]
    paid_rows = int(summary.get("paid_rows") or summary["rows"])
    return (usd - float(summary.get("usd_of_hints", 0.0))) / paid_rows
