"""Compressed students beside the ones they were made of: the table of the frontier, and what is said below it."""

from __future__ import annotations

from collections.abc import Sequence

from dsbs.formatting import interval, points_number
from dsbs.records.compression import Compressed
from dsbs.records.results import BATCH_SIZES, wilson
from dsbs.reporting import text as words
from dsbs.reporting.gather import Run
from dsbs.reporting.sections import NOTHING, Group, Line, Table

HALF = 0.5  # of what was lost; healing that recovers less is said to
UNCHANGED = "as trained"


def by_original(records: Sequence[Compressed]) -> list[list[Compressed]]:
    """The records of each student as trained: its chains are held against it alone, and not against what another number of
    rows of valid said of the same student.
    """
    found: dict[tuple[str, int, float], list[Compressed]] = {}
    for one in records:
        found.setdefault((one.student, one.n, one.original.accuracy), []).append(one)
    return list(found.values())


def outdated(runs: Sequence[Run]) -> list[str]:
    """A sentence for each run some of whose compressed students were made of weights that are there no more."""
    said = []
    for run in runs:
        if run.outdated:
            of = f"{run.name}: " if len(runs) > 1 else ""
            many = "compressed student was" if run.outdated == 1 else "compressed students were"
            said.append(
                f"{of}{run.outdated:,} {many} left out: the student was trained anew since; compress it again."
            )
    return said


def frontier(runs: Sequence[Run]) -> Table | None:
    """Every student that was compressed, as it was trained and after each chain. None where there is none."""
    records = [one for run in runs for one in run.compressed]
    if not records:
        return None
    rows = " or ".join(f"{count:,}" for count in sorted({one.n for one in records}))
    devices = ", ".join(
        sorted({found.device for one in records for found in one.compressed.latency})
    )
    allowed = " or ".join(f"{100 * drop:g}" for drop in sorted({one.max_drop for one in records}))
    better = "in brackets: how many times less than as trained"
    columns = [
        ("accuracy,\u00a0%", f"on the {rows} rows of valid"),
        (
            "95% CI",
            "Wilson's, of that accuracy: a loss that is small beside it may be chance",
        ),
        ("points lost", "against the student as trained"),
        ("agreement,\u00a0%", "rows on which its label is that of the student as trained"),
        ("MB", f"of the weight files; {better}"),
        *(
            (f"ms, batch\u00a0{size}", f"median time of a call on {devices}; {better}")
            for size in BATCH_SIZES
        ),
        ("recovered", "share of the points lost that the last step's healing brought back"),
        ("finding", f"refused is what lost more than {allowed} points (--max-drop)"),
    ]
    headings, notes = map(list, zip(*columns, strict=True))
    groups = [
        group for run in runs for group in _groups(run, f"{run.name}: " if len(runs) > 1 else "")
    ]
    return Table(headings, notes, [False] * len(headings), groups)


def _groups(run: Run, of: str) -> list[Group]:
    """A group for each student as trained, its chains from the largest to the smallest."""
    found = []
    alike = by_original(run.compressed)
    students = [records[0].student for records in alike]
    for records in alike:
        made = sorted(records, key=lambda one: -one.compressed.megabytes)
        student = made[0].student
        rows = f" on {made[0].n:,} rows" if students.count(student) > 1 else ""
        found.append(Group(of + student + rows, [_original(made[0]), *map(_line, made)]))
    return found


def _span(accuracy: float, rows: int) -> str:
    """The 95 % interval of an accuracy, Wilson's."""
    rate = wilson(round(accuracy * rows), rows)
    return NOTHING if rate is None else interval(rate.ci95)


def _original(one: Compressed) -> Line:
    here = one.original
    times = [words.ms(here.median_ms(size)) or NOTHING for size in BATCH_SIZES]
    accuracy = [words.share(here.accuracy) or NOTHING, _span(here.accuracy, one.n)]
    cells = [*accuracy, NOTHING, NOTHING, f"{here.megabytes:,.2f}", *times, NOTHING, NOTHING]
    return Line(UNCHANGED, cells, strong=True)


def _line(one: Compressed) -> Line:
    before, after = one.original, one.compressed
    cells = [
        words.share(after.accuracy) or NOTHING,
        _span(after.accuracy, one.n),
        _plain(before.accuracy - after.accuracy),
        words.share(one.agreement) or NOTHING,
        _less(f"{after.megabytes:,.2f}", before.megabytes, after.megabytes),
    ]
    for size in BATCH_SIZES:
        time = after.median_ms(size)
        cells.append(
            NOTHING if time is None else _less(str(words.ms(time)), before.median_ms(size), time)
        )
    return Line(one.name, [*cells, _healing(one), "kept" if one.accepted else "refused"])


def _less(said: str, before: float | None, after: float) -> str:
    return said if before is None or after <= 0 else f"{said} ({before / after:.1f}×)"


def _healing(one: Compressed) -> str:
    share = one.recovered
    if share is not None:
        return f"{100 * share:.0f}\u00a0%"
    return NOTHING if one.before_healing is None else "nothing lost"


def healing_sentences(runs: Sequence[Run]) -> list[str]:
    """A sentence for each chain whose healing brought back less than half of what was lost."""
    said = []
    for run in runs:
        for one in run.compressed:
            share = one.recovered
            if share is None or share >= HALF or one.before_healing is None:
                continue
            lost, back = (
                one.original.accuracy - one.before_healing,
                one.compressed.accuracy - one.before_healing,
            )
            who = f"{run.name}: {one.student}" if len(runs) > 1 else one.student
            how = f"recovered {_plain(back)} of the {_plain(lost)} points lost, less than half"
            if back < 0:
                how = f"recovered none of the {_plain(lost)} points lost, and cost {_plain(-back)} more"
            said.append(f"{who}, {one.name}: healing, {one.healing_steps:,} steps, {how}.")
    return said


def _plain(share: float) -> str:
    return points_number(share).removeprefix("+")
