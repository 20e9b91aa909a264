"""Sentences about floors, label efficiency and break-even, for summaries and reports."""

from __future__ import annotations

from dsbs.formatting import (
    count,
    dollars,
    percent,
    points,
    sentence_list,
    signed_confidence_interval,
)
from dsbs.records.results import BreakEven, FloorComparison, LabelEfficiency, SystemResult


def floor_warnings(system: SystemResult | None) -> list[str]:
    """A sentence that names the floors that a system does not beat, if any."""
    if system is None:
        return []
    missed = [
        f"{floor} ({_floor_difference(comparison)})"
        for floor, comparison in system.versus_floors.items()
        if not comparison.is_beaten
    ]
    if not missed:
        return []
    noun = "the floor" if len(missed) == 1 else "the floors"
    return [f"{system.name} does not beat {noun} {sentence_list(missed)}."]


def floor_details(system: SystemResult | None) -> list[str]:
    """A sentence about the floors that a system beats, and how to read all of them."""
    if system is None or not system.versus_floors:
        return []
    beaten = [
        f"{floor} ({_floor_difference(comparison)})"
        for floor, comparison in system.versus_floors.items()
        if comparison.is_beaten
    ]
    details = []
    if beaten:
        noun = "floor" if len(beaten) == 1 else "floors"
        details.append(f"It beats the {noun} {sentence_list(beaten)}.")
    return [*details, "Comparisons with floors are outside Holm's correction."]


def floor_sentences(system: SystemResult) -> list[str]:
    """A sentence for each floor that a system is compared with."""
    sentences = []
    for floor, comparison in system.versus_floors.items():
        verb = "beats" if comparison.is_beaten else "does not beat"
        difference = _floor_difference(comparison)
        sentences.append(f"{system.name} {verb} the floor {floor} ({difference}).")
    return sentences


def _floor_difference(comparison: FloorComparison) -> str:
    return f"{points(comparison.delta)}, {signed_confidence_interval(comparison.ci95)}"


def label_efficiency_sentence(efficiency: LabelEfficiency) -> str:
    """How many labels a method needs to be as accurate as another system."""
    method = f"{efficiency.method} with {efficiency.labels} labels"
    target = f"{efficiency.system} ({percent(efficiency.accuracy)})"
    low, high = efficiency.ci95
    if efficiency.rows is None:
        sentence = f"{method} does not match {target} within {efficiency.largest:,} rows"
        if low is None:
            return f"{sentence}."
        return f"{sentence}; the 95% CI begins at {low:,} rows."
    return (
        f"{method} needs {_row_limit(efficiency.rows, efficiency)} rows to match {target} "
        f"(95% CI {_row_limit(low, efficiency)} to {_row_limit(high, efficiency)} rows)."
    )


def _row_limit(rows: int | None, efficiency: LabelEfficiency) -> str:
    """A number of rows. Outside the curve only a bound is known."""
    if rows is None:
        return f"more than {efficiency.largest:,}"
    if rows <= efficiency.smallest:
        return f"at most {rows:,}"
    return f"{rows:,}"


def break_even_sentence(break_even: BreakEven) -> str:
    """After how many predictions the teacher's bill for the training rows is recovered."""
    price = dollars(1000 * break_even.teacher_usd_per_prediction)
    return (
        f"{break_even.system}: annotating its training rows cost {dollars(break_even.spent_usd)}. "
        f"It recovers that after {count(break_even.predictions, 'prediction')}, "
        f"since the teacher costs {price} per 1,000 predictions."
    )
