"""Compressed students beside their originals: the table of the page and the sentences below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsbs.formatting import (
    ABSENT,
    count,
    interval,
    milliseconds_number,
    percent_number,
    points_number,
    sentence_list,
)
from dsbs.records.measures import wilson
from dsbs.records.results import BATCH_SIZES, Compressed, Measurement
from dsbs.reporting.runs import EvaluatedRun, prefixed
from dsbs.reporting.tables import Column, RowGroup, Table, TableRow, optional

POOR_HEALING = 0.5  # healing that recovers a smaller share of the loss is pointed out
UNCHANGED = "as trained"
HEALERS = {"original": "original", "rows": "rows", "both": "rows and original", None: ABSENT}


def by_original(records: Sequence[Compressed]) -> list[list[Compressed]]:
    """The records of each original, measured on the same number of validation rows."""
    groups: dict[tuple[str, int, float], list[Compressed]] = {}
    for record in records:
        key = (record.student, record.n, record.original.accuracy)
        groups.setdefault(key, []).append(record)
    return list(groups.values())


def compression_table(runs: Sequence[EvaluatedRun]) -> Table | None:
    """Each original and its compressed students. None if no student was compressed."""
    records = [record for run in runs for record in run.compressed]
    if not records:
        return None
    columns = _columns(records)
    groups = [group for run in runs for group in _groups(run, runs)]
    return Table(columns, groups)


def _columns(records: Sequence[Compressed]) -> list[Column]:
    """The columns' headings and notes; their cells are made by ``_original_row`` and ``_row``."""
    rows = " or ".join(f"{rows:,}" for rows in sorted({record.n for record in records}))
    devices = sorted(
        {latency.device for record in records for latency in record.compressed.latency}
    )
    drops = sorted({record.max_drop for record in records})
    allowed = " or ".join(f"{100 * drop:g}" for drop in drops)
    ratio = "in brackets: how many times smaller than as trained"
    notes = {
        "accuracy,\u00a0%": f"on the {rows} validation rows",
        "95% CI": "of that accuracy (Wilson); a smaller loss may be chance",
        "points lost": "compared with the student as trained",
        "agreement,\u00a0%": "rows with the same label as the student as trained",
        "MB": f"size of the weight files; {ratio}",
        **{
            f"ms, batch\u00a0{size}": f"median time of a call on {', '.join(devices)}; {ratio}"
            for size in BATCH_SIZES
        },
        "healed by": "what the training after the last step learned from",
        "recovered": "share of the lost accuracy that this training regained",
        "result": f"rejected if it lost more than {allowed} points (--max-drop)",
    }
    return [Column(heading, lambda _: None, note=note) for heading, note in notes.items()]


def _groups(run: EvaluatedRun, runs: Sequence[EvaluatedRun]) -> list[RowGroup]:
    """A group for each original, its chains from the largest file size to the smallest.

    The students of one chain, healed in different ways, follow one another.
    """
    groups = []
    originals = by_original(run.compressed)
    students = [records[0].student for records in originals]
    for records in originals:
        largest: dict[tuple[str, ...], float] = {}
        for record in records:
            size = record.compressed.megabytes
            largest[record.chain] = max(largest.get(record.chain, 0.0), size)
        ordered = sorted(
            records, key=lambda record: (-largest[record.chain], record.chain, record.name)
        )
        title = ordered[0].student
        if students.count(title) > 1:
            title += f" on {count(ordered[0].n, 'row')}"
        rows = [_original_row(ordered[0]), *map(_row, ordered)]
        groups.append(RowGroup(prefixed(title, run, runs), rows))
    return groups


def _original_row(record: Compressed) -> TableRow:
    original = record.original
    cells = [
        percent_number(original.accuracy),
        _interval(original.accuracy, record.n),
        ABSENT,
        ABSENT,
        f"{original.megabytes:,.2f}",
        *(_time_cell(original, size) for size in BATCH_SIZES),
        ABSENT,
        ABSENT,
        ABSENT,
    ]
    return TableRow(UNCHANGED, cells, strong=True)


def _row(record: Compressed) -> TableRow:
    original = record.original
    compressed = record.compressed
    cells = [
        percent_number(compressed.accuracy),
        _interval(compressed.accuracy, record.n),
        _unsigned_points(original.accuracy - compressed.accuracy),
        percent_number(record.agreement),
        f"{compressed.megabytes:,.2f}" + _ratio(original.megabytes, compressed.megabytes),
    ]
    for size in BATCH_SIZES:
        ratio = _ratio(original.median_ms(size), compressed.median_ms(size))
        cells.append(_time_cell(compressed, size) + ratio)
    outcome = "accepted" if record.accepted else "rejected"
    cells += [HEALERS[record.healer], _healing_cell(record), outcome]
    return TableRow(record.name, cells)


def _time_cell(measurement: Measurement, batch_size: int) -> str:
    time_ms = measurement.median_ms(batch_size)
    return optional(milliseconds_number, time_ms) or ABSENT


def _ratio(before: float | None, after: float | None) -> str:
    if before is None or not after:
        return ""
    return f" ({before / after:.1f}×)"


def _interval(accuracy: float, rows: int) -> str:
    """The accuracy's 95% interval (Wilson)."""
    rate = wilson(round(accuracy * rows), rows)
    return ABSENT if rate is None else interval(rate.ci95)


def _healing_cell(record: Compressed) -> str:
    if record.before_healing is None:
        return ABSENT
    if record.recovered is None:
        return "nothing lost"
    return f"{100 * record.recovered:.0f}%"


def healing_sentences(runs: Sequence[EvaluatedRun]) -> list[str]:
    """A sentence for each chain whose healing restored less than half of the lost accuracy."""
    sentences = []
    for run in runs:
        for record in run.compressed:
            share = record.recovered
            if share is None or share >= POOR_HEALING or record.before_healing is None:
                continue
            loss = _unsigned_points(record.original.accuracy - record.before_healing)
            restored = record.compressed.accuracy - record.before_healing
            if restored < 0:
                effect = (
                    f"recovered none of the {loss} points lost and cost "
                    f"{_unsigned_points(-restored)} more"
                )
            else:
                effect = (
                    f"recovered {_unsigned_points(restored)} of the {loss} points lost, "
                    "less than half"
                )
            sentence = (
                f"{record.student}, {record.name}: "
                f"{count(record.healing_steps, 'step')} of healing {effect}."
            )
            sentences.append(prefixed(sentence, run, runs))
    return sentences


def healer_sentences(runs: Sequence[EvaluatedRun]) -> list[str]:
    """A sentence for each chain that was healed in several ways: how much each of them recovered.

    Only last steps that started from the same student and healed equally long are compared.
    """
    sentences = []
    for run in runs:
        groups: dict[tuple[Any, ...], list[Compressed]] = {}
        for record in run.compressed:
            start = (record.student, record.n, record.chain, record.healed_by[:-1])
            groups.setdefault((*start, record.healing_steps), []).append(record)
        for (student, rows, chain, _, steps), records in groups.items():
            shares = [
                f"{100 * record.recovered:.0f}% ({HEALERS[record.healer]})"
                for record in records
                if record.recovered is not None
            ]
            if len(shares) < 2:
                continue
            sentence = (
                f"{student}, {'+'.join(chain)}: of the accuracy lost on {count(rows, 'row')}, "
                f"{count(steps, 'step')} of healing recovered {sentence_list(shares)}."
            )
            sentences.append(prefixed(sentence, run, runs))
    return sentences


def outdated_sentences(runs: Sequence[EvaluatedRun]) -> list[str]:
    """A sentence for each run with compressed students whose original was retrained since."""
    sentences = []
    for run in runs:
        if run.outdated:
            students = count(run.outdated, "compressed student")
            sentence = f"{students} left out: the original was retrained since; compress it again."
            sentences.append(prefixed(sentence, run, runs))
    return sentences


def _unsigned_points(difference: float) -> str:
    return points_number(difference).removeprefix("+")
