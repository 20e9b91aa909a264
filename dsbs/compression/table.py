"""``compress/<student>/frontier.md``: every compressed student of one original, side by side."""

from __future__ import annotations

from pathlib import Path

from dsbs.formatting import escape_markdown, markdown_table
from dsbs.records.compression import RECORD, Compressed, Measurement, read_record
from dsbs.records.results import BATCH_SIZES

HEADINGS = (
    "steps", "accuracy, %", "lost, points", "recovered", "MB", "of original", "ms at 1", "of original", "ms at 64",
    "of original", "agreement, %", "accepted",
)  # fmt: skip


def frontier(folder: Path) -> str:
    """The table of ``<run>/compress/<student>``. Raises UserError for a record that cannot be read."""
    records = [read_record(path.parent) for path in sorted(folder.glob(f"*/{RECORD}"))]
    lines = [f"# {escape_markdown(folder.name)}, compressed", ""]
    if not records:
        return "\n".join([*lines, "No step is finished yet.", ""])
    rows = [original_cells(records[0].original)]
    rows += [
        [escape_markdown(name), *rest] for name, *rest in (cells(record) for record in records)
    ]
    lines += markdown_table(HEADINGS, rows)
    lines += [
        "",
        f"On {records[0].n} rows of valid, by which the steps' healing is chosen too: on rows that nobody has seen expect a "
        "little less. Recovered is the share of what was lost against the original that the last step's healing "
        "brought back. Times are medians; a "
        "student's share of the original's time is of calls that took turns with it on one machine.",
        "",
    ]
    return "\n".join(lines)


def original_cells(original: Measurement) -> list[str]:
    """The original's row; its times are those of one of the measurements."""
    row = [
        "the original",
        f"{100 * original.accuracy:.1f}",
        "",
        "",
        f"{original.megabytes:.2f}",
        "",
    ]
    return [*row, *(text for size in BATCH_SIZES for text in (_ms(original, size), "")), "", ""]


def cells(record: Compressed) -> list[str]:
    """A row of the table."""
    before, after = record.original, record.compressed
    row = [
        record.name,
        f"{100 * after.accuracy:.1f}",
        f"{100 * (before.accuracy - after.accuracy):+.1f}",
    ]
    row += [
        _recovered(record),
        f"{after.megabytes:.2f}",
        f"{after.megabytes / before.megabytes:.2f}",
    ]
    for size in BATCH_SIZES:
        row += [_ms(after, size), _ratio(before, after, size)]
    return [*row, f"{100 * record.agreement:.1f}", "yes" if record.accepted else "no"]


def _recovered(record: Compressed) -> str:
    if record.recovered is not None:
        return f"{100 * record.recovered:.0f} %"
    return "" if record.before_healing is None else "nothing was lost"


def _ms(standing: Measurement, size: int) -> str:
    found = standing.median_ms(size)
    return "" if found is None else f"{found:.1f}"


def _ratio(before: Measurement, after: Measurement, size: int) -> str:
    one, other = before.median_ms(size), after.median_ms(size)
    return "" if one is None or other is None else f"{other / one:.2f}"
