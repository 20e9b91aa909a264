"""Spreadsheets: the queue as a CSV file, and decisions read back from it."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from dsbs.errors import UserError
from dsbs.files import atomic_write, canonical_json, now
from dsbs.formatting import count
from dsbs.records import Unreadable
from dsbs.records.reviews import (
    Review,
    Reviews,
    current_reviews,
    deciding_review,
    deciding_reviews,
    write_reviews,
)
from dsbs.reporting.csv_files import text_cell, text_of_cell
from dsbs.review.queue import QueueItem, ReviewRow
from dsbs.run_folder import RunFolder
from dsbs.tasks import Task
from dsbs.tasks.data import numeric_id
from dsbs.tasks.tables import spreadsheet_rows

# Columns that are read back: the row as it was shown, and what the reviewer fills in.
_SHOWN = ("id", "label", "rationale", "random")
_FILLED_IN = ("decision", "new_label", "new_rationale", "gold_is_wrong", "new_gold", "comment")
_DECISIONS = {
    "accept": "accepted",
    "correct": "corrected",
    "reject": "rejected",
    "skip": "skipped",
    "undo": "undone",
}
_NO_RATIONALE = "(none)"  # the rationale is wrong, and nothing replaces it
_YES = ("yes", "y", "true", "1", "x")
_NO = ("", "no", "n", "false", "0")
_MAX_PROBLEMS = 20  # in one message
_MAX_CELL = 32_767  # characters; Excel cuts longer cells


@dataclass(frozen=True, slots=True)
class SpreadsheetImport:
    """What `import_csv` read."""

    saved: Counter[str]
    """By decision."""
    unchanged: int
    """Rows whose decision was already saved."""
    undecided: int


def export_csv(path: str | Path, items: Sequence[QueueItem], reviews: Reviews) -> None:
    """Write the queue in its order, one line per row, with the decisions that count so far.

    Text that a spreadsheet would evaluate gets a leading ', which ``import_csv`` removes. Raises
    UserError for a file that exists: it may have decisions that are not imported.
    """
    if Path(path).exists():
        raise UserError(
            f"{path} exists, and may have decisions that are not imported yet",
            hint="import it with --import-csv and remove it, or give another name",
        )
    fields = dict.fromkeys(name for item in items for name in item.row.input)
    taken = {*_SHOWN, *_FILLED_IN, "why", "vote", "gold", "student"}
    columns = {name: f"input.{name}" if name in taken else name for name in fields}
    decided = deciding_reviews(reviews)
    with atomic_write(Path(path)) as file:
        file.write("\ufeff")  # Excel reads UTF-8 only with a byte order mark
        writer = csv.writer(file)
        shown = ("label", "rationale", "vote", "gold", "student", "why", "random")
        writer.writerow(map(text_cell, ["id", *columns.values(), *shown, *_FILLED_IN]))
        for item in items:
            row = item.row
            inputs = (row.input.get(name) for name in columns)
            texts = [
                row.id,
                *(value if isinstance(value, str) else _json(value) for value in inputs),
                row.label,
                row.rationale,
                "" if row.vote_share is None else f"{row.vote_share:.2f}",
                row.gold,
                row.student_label,
                "; ".join(item.reasons),
                "yes" if item.sampled else "no",
                *_filled_in(decided.get(row.id)),
            ]
            writer.writerow([text_cell(text or "") for text in texts])


def import_csv(
    path: str | Path,
    rows: Iterable[ReviewRow],
    task: Task,
    run: RunFolder,
    split: str,
    reviewer: str,
) -> SpreadsheetImport:
    """Save the decisions in a file that ``export_csv`` wrote and a spreadsheet may have saved.

    Columns may be in any order, and those that are not read may be missing. A decision that is
    already saved is not saved again, so a file can be imported twice. Raises UserError with the
    numbers of all unusable rows, and then saves nothing.
    """
    path = Path(path)
    by_id = {row.id: row for row in rows}
    reviews = run.read_reviews(split)
    problems: list[str] = []
    decisions: dict[str, tuple[int, Review]] = {}  # those in the file
    new: list[Review] = []
    unchanged = undecided = 0
    time = now()
    for number, cells in _read(path):
        row = by_id.get(cells["id"].strip())
        try:
            if row is None:
                raise ValueError(_unknown_id(cells["id"], by_id))
            review = _review(cells, row, task, reviewer, time)
            if review is None:
                undecided += 1
                continue
            earlier_row, earlier = decisions.get(row.id, (number, review))
            if earlier != review:
                raise ValueError(f"row {earlier_row} has another decision for id {row.id!r}")
        except ValueError as error:
            problems.append(f"row {number}: {_reason(error)}")
            continue
        if row.id in decisions:
            continue
        decisions[row.id] = (number, review)
        if _is_saved(review, reviews.get(row.id, ())):
            unchanged += 1
        else:
            new.append(review)
    if problems:
        raise _unusable(path, problems)
    if new:
        write_reviews(run.reviews(split), new)
    return SpreadsheetImport(Counter(review.decision for review in new), unchanged, undecided)


def _json(value: object) -> str:
    return "" if value is None else canonical_json(value)


def _filled_in(review: Review | None) -> list[str]:
    """The cells that a reviewer fills in, in the order of ``_FILLED_IN``."""
    if review is None:
        return [""] * len(_FILLED_IN)
    return [
        review.decision,
        review.label or "",
        _NO_RATIONALE if review.rationale == "" else review.rationale or "",
        "yes" if review.gold_is_wrong else "",
        review.gold or "",
        review.comment or "",
    ]


# --- reading


def _read(path: Path) -> Iterable[tuple[int, dict[str, str]]]:
    """The rows with all columns that are read, as text. Raises UserError where one is missing."""
    is_empty = True
    try:
        for number, cells in spreadsheet_rows(path):
            folded = {name.casefold(): cell for name, cell in cells.items()}
            for name in ("id", "label", "decision"):
                if name not in folded:
                    raise UserError(
                        f"{path}: no column {name!r} (columns: {', '.join(cells)})",
                        hint="use the exported file, and keep its first row",
                    )
            is_empty = False
            names = (*_SHOWN, *_FILLED_IN)
            yield number, {name: _text(folded.get(name, "")) for name in names}
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", hint="give the CSV file that people edited"
        ) from None
    if is_empty:
        raise UserError(f"{path} has no rows", hint="export the rows again")


def _text(cell: str) -> str:
    return text_of_cell(cell.replace("\r\n", "\n").replace("\r", "\n"))


def _review(
    cells: Mapping[str, str], row: ReviewRow, task: Task, reviewer: str, time: str
) -> Review | None:
    """The decision in a row; None: there is none. Raises ValueError for an invalid one."""
    decision = _decision(cells)
    if decision is None:
        return None
    if not _is_same_label(cells["label"], row.label, task):
        raise ValueError(
            f"its label is {cells['label']!r} here and {row.label!r} in the run: write another "
            "label into new_label; if the rows were annotated anew, export them again"
        )
    if cells["rationale"] and not _is_same_text(cells["rationale"], row.rationale or ""):
        raise ValueError(
            "its rationale differs from the run's: write a new one into new_rationale; if the "
            "rows were annotated anew, export them again"
        )
    label = _label(cells["new_label"], row, task, "new_label")
    gold = _label(cells["new_gold"], row, task, "new_gold")
    if label is not None and row.label is not None and task.correct(label, row.label):
        label = None
    rationale = cells["new_rationale"].strip() or None
    if rationale == row.rationale:
        rationale = None
    elif rationale == _NO_RATIONALE:
        rationale = ""
    if decision == "corrected" and label is None and rationale is None:
        raise ValueError("corrected, but new_label and new_rationale change nothing")
    if decision != "corrected" and (label is not None or rationale is not None):
        raise ValueError(f"{decision}, but new_label or new_rationale is filled in")
    if decision in ("accepted", "corrected") and label is None and row.label is None:
        raise ValueError(f"{decision}, but the row has no label: write one into new_label")
    return Review.model_validate(
        {
            "id": row.id,
            "decision": decision,
            "label": label,
            "shown": row.label,
            "rationale": rationale,
            "gold_is_wrong": gold is not None or _is_yes(cells["gold_is_wrong"]),
            "gold": gold,
            "comment": cells["comment"].strip() or None,
            "reviewer": reviewer,
            "time": time,
            "sampled": cells["random"].strip().casefold() in _YES,
        }
    )


def _decision(cells: Mapping[str, str]) -> str | None:
    """The decision; a new label or rationale alone is a correction."""
    word = cells["decision"].strip().casefold()
    if not word:
        if cells["new_label"].strip() or cells["new_rationale"].strip():
            return "corrected"
        if cells["new_gold"].strip() or _is_yes(cells["gold_is_wrong"]):
            raise ValueError("gold_is_wrong without a decision: write accepted or rejected")
        return None
    for beginning, decision in _DECISIONS.items():
        if word in (beginning, decision):
            return decision
    raise ValueError(f"decision is {word!r}, not one of {', '.join(_DECISIONS.values())}")


def _is_yes(cell: str) -> bool:
    word = cell.strip().casefold()
    if word not in (*_YES, *_NO):
        raise ValueError(f"gold_is_wrong is {word!r}, not yes or no")
    return word in _YES


def _label(cell: str, row: ReviewRow, task: Task, column: str) -> str | None:
    if not cell.strip():
        return None
    label = task.read_label(cell.strip(), row.input)
    if isinstance(label, Unreadable):
        raise ValueError(f"{column} is {cell.strip()[:60]!r}, which is not a label of the task")
    return label


def _is_same_label(cell: str, label: str | None, task: Task) -> bool:
    """Whether a cell is the label that was exported; spreadsheets rewrite numbers."""
    if not cell.strip() or label is None:
        return not cell.strip() and label is None
    return _is_same_text(cell, label) or task.correct(cell.strip(), label)


def _is_same_text(cell: str, text: str) -> bool:
    exported = _text(text_cell(text)).strip()
    return exported == cell.strip() or (
        len(exported) > _MAX_CELL - 1 and exported.startswith(cell.strip()[: _MAX_CELL - 1])
    )


def _is_saved(review: Review, of_row: Sequence[Review]) -> bool:
    """Whether a decision is the reviewer's current one, or the one that counts."""
    current = current_reviews(of_row).get(review.reviewer)
    if review.decision == "undone":
        return current is None
    decided = {"time", "reviewer", "sampled"}
    ours = review.model_dump(exclude=decided)
    return any(
        ours == other.model_dump(exclude=decided)
        for other in (current, deciding_review(of_row))
        if other is not None
    )


# --- messages


def _unknown_id(cell: str, by_id: Mapping[str, ReviewRow]) -> str:
    row_id = cell.strip()
    for known_id in by_id:
        if numeric_id(known_id) == numeric_id(row_id):
            return f"id {row_id!r} is {known_id!r} in the run: format the id column as text"
    return f"no row of the run has id {row_id!r}"


def _reason(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    return str(error)


def _unusable(path: Path, problems: Sequence[str]) -> UserError:
    shown = [f"  {problem}" for problem in problems[:_MAX_PROBLEMS]]
    if len(problems) > _MAX_PROBLEMS:
        shown.append(f"  … and {len(problems) - _MAX_PROBLEMS} more")
    heading = f"{path}: {count(len(problems), 'unusable row')}; nothing was imported"
    return UserError("\n".join([heading, *shown]), hint="correct these rows, then import again")
