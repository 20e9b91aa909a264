"""Ledger of a cascade's server: what it answered, audited and spent, in ``serve/ledger.sqlite``.

What the teacher was asked for is committed at once. Rows that the student answered are counted in
memory and committed every second, so that a killed server loses the count of one second at most.
A write that fails raises sqlite3.Error and leaves nothing half written.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsbs.errors import UserError
from dsbs.files import canonical_json, digest, now, write_jsonl
from dsbs.records.measures import Rate, exact_rate
from dsbs.students.calibration import Threshold

logger = logging.getLogger(__name__)
AUDIT_WINDOW = 1000  # audited rows, the latest ones, that agreement is measured on
_USD_DIGITS = 9  # decimals: more are the rounding error of a sum
_SCHEMA = """
CREATE TABLE IF NOT EXISTS cascades (
    id TEXT PRIMARY KEY,             -- of a student with a threshold
    student TEXT NOT NULL,           -- its name
    threshold TEXT NOT NULL,         -- threshold.json
    first_audit INTEGER NOT NULL,    -- audits before it are from before a reset
    breach TEXT,                     -- why the teacher answers everything; NULL: it does not
    created TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS counts (
    cascade TEXT NOT NULL,
    name TEXT NOT NULL,
    value INTEGER NOT NULL,
    PRIMARY KEY (cascade, name)
);
CREATE TABLE IF NOT EXISTS audits (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    cascade TEXT NOT NULL,
    agrees INTEGER NOT NULL,         -- whether the teacher's label is the student's
    created TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS spending (
    day TEXT PRIMARY KEY,            -- UTC
    usd REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS rows (    -- that the teacher was asked
    id TEXT PRIMARY KEY,
    input TEXT NOT NULL,             -- the task's fields, as JSON
    created TEXT NOT NULL
);
"""


@dataclass(frozen=True, slots=True)
class CascadeState:
    """What a server has counted for one student with one threshold."""

    student: str
    counts: Mapping[str, int]
    audited: int
    """Of the latest audited rows, at most ``AUDIT_WINDOW``."""
    agreed: int
    breach: str | None
    usd: float
    """Of all days, for every student of the run."""
    usd_today: float

    @property
    def coverage(self) -> float | None:
        """The share of the rows that the student was sure of. None: no rows yet."""
        sure = self.counts.get("sure", 0)
        rows = sure + self.counts.get("unsure", 0) + self.counts.get("novel", 0)
        return sure / rows if rows else None

    @property
    def agreement(self) -> Rate | None:
        """Of the audited rows, the share in which the teacher agrees, with its exact interval."""
        return exact_rate(self.agreed, self.audited)

    def as_json(self) -> dict[str, Any]:
        agreement = self.agreement
        return {
            "student": self.student,
            "counts": dict(sorted(self.counts.items())),
            "coverage": self.coverage,
            "audited": self.audited,
            "agreement": None if agreement is None else agreement.value,
            "agreement_ci95": None if agreement is None else list(agreement.ci95),
            "breach": self.breach,
            "usd": self.usd,
            "usd_today": self.usd_today,
        }


class Ledger:
    """``serve/ledger.sqlite``, for one student with one threshold. Threads may share it."""

    def __init__(self, path: Path, student: str, threshold: Threshold) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        record = canonical_json(threshold.model_dump(mode="json", by_alias=True))
        self.cascade = digest(student, record)
        self._lock = threading.Lock()
        self._pending: Counter[str] = Counter()
        self._has_failed = False
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.executescript(_SCHEMA)
            self._db.execute(
                "INSERT OR IGNORE INTO cascades VALUES (?, ?, ?, 0, NULL, ?)",
                (self.cascade, student, record, now()),
            )
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{path} cannot be opened ({error})",
                hint="check the folder's permissions, or move the file away",
            ) from None
        self._state = _read_state(self._db, self.cascade, student)
        self._counts = Counter(self._state.counts)

    # --- writing

    @contextmanager
    def survive_errors(self) -> Iterator[None]:
        """Ends the block where a write fails, and logs the first failure: a full disk must not cost
        a paid answer.
        """
        try:
            yield
        except sqlite3.Error as error:
            if not self._has_failed:
                self._has_failed = True
                logger.error(
                    "the ledger cannot be written (%s): rows are still answered, but audits, "
                    "spending and rows for --from-serve may be lost; check the disk",
                    getattr(error, "sqlite_errorname", type(error).__name__),
                )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All writes of the block or none. The lock is held."""
        self._db.execute("BEGIN")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # some errors have rolled it back
                self._db.execute("ROLLBACK")
            raise

    # --- counting

    def count(self, name: str) -> None:
        """Count a row; ``flush`` commits it."""
        with self._lock:
            self._counts[name] += 1
            self._pending[name] += 1

    def flush(self) -> None:
        """Commit the counts. Where that fails they stay pending."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        with self._transaction():
            self._write_counts(self._pending)
        self._pending.clear()

    def _write_counts(self, counts: Counter[str]) -> None:
        for name, number in counts.items():
            self._db.execute(
                "INSERT INTO counts VALUES (?, ?, ?)"
                " ON CONFLICT (cascade, name) DO UPDATE SET value = value + excluded.value",
                (self.cascade, name, number),
            )

    def add_row(self, fields: Mapping[str, Any]) -> None:
        """Record a row that the teacher has answered: the next student may learn from it."""
        text = canonical_json(fields)
        with self._lock:
            self._db.execute(
                "INSERT OR IGNORE INTO rows VALUES (?, ?, ?)",
                (f"serve-{digest(text)[:16]}", text, now()),
            )

    def add_audit(self, *, agrees: bool) -> CascadeState:
        """Record an audited row. Returns the state with it."""
        with self._lock:
            with self._transaction():
                self._db.execute(
                    "INSERT INTO audits (cascade, agrees, created) VALUES (?, ?, ?)",
                    (self.cascade, int(agrees), now()),
                )
                self._write_counts(self._pending + Counter(audited=1))
            self._pending.clear()
            self._counts["audited"] += 1
            self._refresh()
        return self.state

    def add_usd(self, usd: float) -> None:
        with self._lock:
            self._db.execute(
                "INSERT INTO spending VALUES (?, ?)"
                " ON CONFLICT (day) DO UPDATE SET usd = usd + excluded.usd",
                (today(), usd),
            )
            self._refresh()

    # --- breach

    def set_breach(self, reason: str) -> None:
        """Close the student, even where that cannot be written."""
        with self._lock:
            self._state = replace(self._state, breach=reason)
            self._db.execute("UPDATE cascades SET breach = ? WHERE id = ?", (reason, self.cascade))
            self._refresh()

    def reset_audit(self) -> None:
        """Forget the breach, and the audits that led to it."""
        with self._lock:
            self._db.execute(
                "UPDATE cascades SET breach = NULL, first_audit ="
                " (SELECT coalesce(max(number), 0) + 1 FROM audits) WHERE id = ?",
                (self.cascade,),
            )
            self._state = replace(self._state, breach=None)
            self._refresh()

    # --- reading

    def _refresh(self) -> None:
        state = _read_state(self._db, self.cascade, self._state.student)
        # A breach that could not be written holds until the server ends.
        self._state = replace(state, breach=state.breach or self._state.breach)

    @property
    def breach(self) -> str | None:
        """Why the teacher answers everything. None: it does not."""
        return self._state.breach

    @property
    def state(self) -> CascadeState:
        """What is counted, including what is not yet committed."""
        return replace(self._state, counts=dict(self._counts))

    def usd_today(self) -> float:
        with self._lock:
            return _usd(self._db, today())

    def close(self) -> None:
        with self.survive_errors():
            self.flush()
        with self._lock:
            self._db.close()


def today() -> str:
    """The day in UTC."""
    return now()[:10]


def _usd(db: sqlite3.Connection, day: str) -> float:
    row = db.execute("SELECT usd FROM spending WHERE day = ?", (day,)).fetchone()
    return 0.0 if row is None else round(row[0], _USD_DIGITS)


def _read_state(db: sqlite3.Connection, cascade: str, student: str) -> CascadeState:
    breach, first = db.execute(
        "SELECT breach, first_audit FROM cascades WHERE id = ?", (cascade,)
    ).fetchone()
    counts = db.execute("SELECT name, value FROM counts WHERE cascade = ?", (cascade,))
    audited, agreed = db.execute(
        "SELECT count(*), coalesce(sum(agrees), 0) FROM (SELECT agrees FROM audits"
        " WHERE cascade = ? AND number >= ? ORDER BY number DESC LIMIT ?)",
        (cascade, first, AUDIT_WINDOW),
    ).fetchone()
    total = db.execute("SELECT coalesce(sum(usd), 0) FROM spending").fetchone()[0]
    return CascadeState(
        student,
        dict(counts),
        audited,
        agreed,
        breach,
        round(total, _USD_DIGITS),
        _usd(db, today()),
    )


def read_states(path: Path) -> list[CascadeState]:
    """The state of every student that was served in a run, the latest one first."""
    if not path.is_file():
        return []
    db = _open_to_read(path)
    try:
        cascades = db.execute("SELECT id, student FROM cascades ORDER BY created DESC").fetchall()
        return [_read_state(db, cascade, student) for cascade, student in cascades]
    finally:
        db.close()


def write_rows(path: Path, target: Path, columns: Mapping[str, str]) -> int:
    """Write the rows that the teacher answered as input rows. Returns their number.

    ``columns``: the recipe's ``task.columns``.
    """
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: no server has asked the teacher of this run",
            hint="run `dsbs serve STUDENT --fallback RECIPE` first",
        )
    db = _open_to_read(path)
    try:
        stored = db.execute("SELECT id, input FROM rows ORDER BY rowid").fetchall()
    finally:
        db.close()
    if not stored:
        raise UserError(
            f"{path} has no rows: the teacher has not been asked yet",
            hint="send requests to `dsbs serve STUDENT --fallback RECIPE` first",
        )

    def lines() -> Iterator[str]:
        for row_id, text in stored:
            fields = {columns.get(name, name): value for name, value in json.loads(text).items()}
            unknown = {columns[name]: None for name in ("label", "rationale") if name in columns}
            row = {columns.get("id", "id"): row_id} | fields | unknown
            yield json.dumps(row, ensure_ascii=False)

    return write_jsonl(target, lines())


def _open_to_read(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        db.execute("SELECT 1 FROM cascades LIMIT 1")
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{path} cannot be read ({error})", hint="move the file away, or pass --out"
        ) from None
    return db
