"""``compress/<student>/frontier.md``: every compressed student of one original, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsbs.compress.origin import read_record
from dsbs.compressed import RECORD, Compressed, Standing
from dsbs.eval.latency import BATCH_SIZES
from dsbs.markdown import escape, table

HEADINGS = (
    "steps", "accuracy, %", "lost, points", "healed", "MB", "of original", "ms at 1", "of original", "ms at 64", "of original",
    "agreement, %", "accepted",
)  # fmt: skip


def frontier(folder: Path) -> str:
    """The table of ``<run>/compress/<student>``. Raises UserError for a record that cannot be read."""
    records = [read_record(path.parent) for path in sorted(folder.glob(f"*/{RECORD}"))]
    lines = [f"# {escape(folder.name)}, compressed", ""]
    if not records:
        return "\n".join([*lines, "No step is finished yet.", ""])
    rows = [original_cells(records[0].original)]
    rows += [[escape(name), *rest] for name, *rest in (cells(record, records) for record in records)]
    lines += table(HEADINGS, rows)
    lines += [
        "",
        f"On {records[0].n} rows of valid, by which the steps' healing is chosen too: on rows that nobody has seen expect a "
        "little less. Healed is the share of what the last step lost that its healing brought back. Times are medians; a "
        "student's share of the original's time is of calls that took turns with it on one machine.",
        "",
    ]
    return "\n".join(lines)


def original_cells(original: Standing) -> list[str]:
    """The original's row; its times are those of one of the measurements."""
    row = ["the original", f"{100 * original.accuracy:.1f}", "", "", f"{original.megabytes:.2f}", ""]
    return [*row, *(text for size in BATCH_SIZES for text in (_ms(original, size), "")), "", ""]


def cells(record: Compressed, others: Sequence[Compressed]) -> list[str]:
    """A row of the table; ``others`` have the student that the last step began with, where there is one."""
    before, after = record.original, record.compressed
    parent = next((one.compressed.accuracy for one in others if one.chain == record.chain[:-1]), before.accuracy)
    row = [record.name, f"{100 * after.accuracy:.1f}", f"{100 * (before.accuracy - after.accuracy):+.1f}"]
    row += [healed(record, parent), f"{after.megabytes:.2f}", f"{after.megabytes / before.megabytes:.2f}"]
    for size in BATCH_SIZES:
        row += [_ms(after, size), _ratio(before, after, size)]
    return [*row, f"{100 * record.agreement:.1f}", "yes" if record.accepted else "no"]


def healed(record: Compressed, parent: float) -> str:
    """Of the accuracy that the last step took from ``parent``, what healing gave back."""
    if record.before_healing is None:
        return ""
    lost = parent - record.before_healing
    if lost <= 0:
        return "nothing was lost"
    return f"{100 * (record.compressed.accuracy - record.before_healing) / lost:.0f} %"


def _p50(standing: Standing, size: int) -> float | None:
    return next((one.p50_ms for one in standing.latency if one.batch_size == size), None)


def _ms(standing: Standing, size: int) -> str:
    found = _p50(standing, size)
    return "" if found is None else f"{found:.1f}"


def _ratio(before: Standing, after: Standing, size: int) -> str:
    one, other = _p50(before, size), _p50(after, size)
    return "" if one is None or other is None else f"{other / one:.2f}"
