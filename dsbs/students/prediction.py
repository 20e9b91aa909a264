"""Predictions of a file of rows: streamed, in several processes, continued after a kill.

Rows are read and written in order, some hundred at a time, so that memory does not grow with the
file. ``predictions.jsonl`` is appended to as it is made. A .csv or .parquet file is made from such
a file when all rows are done.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from dsbs.config.teacher import RaySection
from dsbs.errors import PartialError, UserError
from dsbs.files import (
    cut_torn_line,
    digest,
    full_disk_as_partial,
    lock_folder,
    make_folder,
    read_jsonl,
    write_json,
)
from dsbs.formatting import count
from dsbs.progress import NoProgress, Progress, running
from dsbs.students.prediction_tables import FORMATS, prediction_line, write_table
from dsbs.students.student import Answer, Student
from dsbs.students.weights import usable_cores
from dsbs.tasks.shards import Shard, raise_lasting, run_on_ray, shard_number

Row = tuple[str, str | dict[str, Any]]  # its id, and a text or the task's fields
_BATCHES = 8  # that a process answers at once, sorted by length
_HINT = "free some space, then run the same command: it continues"


@dataclass(frozen=True, slots=True)
class Options:
    """What decides the content of a prediction."""

    rationale: bool = False
    batch_size: int = 64
    max_label_tokens: int = 64
    top: int = 0
    """How many of the likeliest labels to add, with their probabilities. A student that writes its
    label scores every label of the closed set."""


# --- one process


def predict_rows(
    student: Student, rows: Iterable[Row], options: Options, batches: int = 1
) -> Iterator[list[dict[str, Any]]]:
    """The predictions of ``rows``, in lists of up to ``batches`` batches.

    Raises UserError where the student has no distribution for ``options.top``, or no rationales.
    """
    for chunk in _chunks(rows, batches * options.batch_size):
        yield _predict(student, chunk, options)


def _chunks(rows: Iterable[Row], size: int) -> Iterator[list[Row]]:
    iterator = iter(rows)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _predict(student: Student, rows: list[Row], options: Options) -> list[dict[str, Any]]:
    answers = student.predict(
        [item for _, item in rows],
        rationale=options.rationale,
        batch_size=options.batch_size,
        max_label_tokens=options.max_label_tokens,
        canonical=True,
        score_labels=options.top > 0,
    )
    predictions = []
    for (row_id, _), answer in zip(rows, answers, strict=True):
        prediction: dict[str, Any] = {
            "id": row_id,
            "prediction": answer.label,
            "label": answer.value,
            "raw": answer.raw,
            "probability": answer.probability,
            "truncated": answer.truncated,
        }
        if answer.expected_number is not None:
            prediction["expected_number"] = answer.expected_number
        if student.card.task.fields is not None:
            prediction["field_probabilities"] = answer.field_probabilities
        if options.top:
            prediction["top"] = _top(answer, options.top)
        if options.rationale:
            prediction["rationale"] = answer.rationale
            prediction["rationale_is_causal"] = student.card.reasons_first
        predictions.append(prediction)
    return predictions


def _top(answer: Answer, number: int) -> list[dict[str, Any]]:
    likeliest = sorted((answer.distribution or {}).items(), key=lambda item: -item[1])
    return [{"label": label, "probability": share} for label, share in likeliest[:number]]


# --- several processes


def predict_in_processes(
    student: Path, rows: Iterable[Row], options: Options, workers: int
) -> Iterator[list[dict[str, Any]]]:
    """Like ``predict_rows``, in ``workers`` processes that share the cores.

    Raises PartialError where a process ends.
    """
    from concurrent.futures import Future, ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with _threads(max(1, usable_cores() // workers)):
        pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_start_worker)
        pending: deque[Future[list[dict[str, Any]]]] = deque()
        try:
            for chunk in _chunks(rows, _BATCHES * options.batch_size):
                pending.append(pool.submit(_predict_in_worker, student, chunk, options))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise PartialError(
                "a process of --workers ended, perhaps for lack of memory",
                hint="run the same command with fewer --workers: it continues",
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Set the threads of the processes to be started, unless OMP_NUM_THREADS sets them."""
    name = "OMP_NUM_THREADS"
    if name in os.environ:
        yield
        return
    os.environ[name] = str(number)
    try:
        yield
    finally:
        os.environ.pop(name, None)


def _start_worker() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """A worker whose parent is killed would wait for its next rows forever."""
    from multiprocessing import parent_process

    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


_loaded = cache(Student.load)  # in a worker process


def _predict_in_worker(student: Path, rows: list[Row], options: Options) -> list[dict[str, Any]]:
    return _predict(_loaded(student), rows, options)


# --- files


def check_output(out: Path) -> None:
    """Raises UserError for a name without a supported suffix."""
    if out.suffix.lower() not in FORMATS:
        raise UserError(
            f"--out {out}: not a file of predictions", hint=f"end its name in {', '.join(FORMATS)}"
        )


def predict_file(
    student: Path,
    open_rows: Callable[[], Iterable[Row]],
    out: Path,
    options: Options,
    *,
    source: str,
    workers: int = 1,
    shard: Shard | None = None,
    progress: Progress | None = None,
) -> int:
    """Write the predictions of all rows, or of a shard's, to ``out``; returns their number.

    What is in ``out`` already is kept, and the rest is added. ``open_rows`` opens the rows of
    ``source`` from their start. Raises UserError where ``out`` has other predictions, or those of
    other rows.
    """
    progress = progress or NoProgress()
    check_output(out)
    identity = _identity(student, source, shard, options)
    make_folder(out.parent)
    lock = lock_folder(out.with_name(f".{out.name}.lock"), remove=True)
    with lock, full_disk_as_partial(out.parent, _HINT):
        record = _check_record(out, identity)
        is_jsonl = out.suffix.lower() == ".jsonl"
        lines = out if is_jsonl else out.with_name(f".{out.name}.partial.jsonl")
        is_complete = out.exists() and not is_jsonl and not lines.exists()
        if out.exists() and not (record if is_jsonl else "rows" in record):
            raise UserError(
                f"{out} exists and is not from `dsbs predict`", hint="give another --out"
            )
        hashes = array("Q")
        rows = _hashed(open_rows(), shard, hashes)
        if is_complete:
            deque(rows, maxlen=0)
            return _check_table(record, hashes, out)
        done, again = _skip_done(lines, rows, _BATCHES * options.batch_size, out)
        _check_inputs(record, hashes, done, out)
        rows = chain(again, rows)
        if done:
            progress.say(f"{out}: {count(done, 'prediction')} already there")
        progress_record = identity | _progress_of(hashes, done)
        write_json(_record_path(out), progress_record)
        if workers > 1:
            chunks = predict_in_processes(student, rows, options, workers)
        else:
            chunks = predict_rows(Student.load(student), rows, options, _BATCHES)
        bar = running(progress, f"predict {out.name}", None, done, (1, "rows"))
        with bar, lines.open("a", encoding="utf-8", newline="\n") as file:
            for chunk in chunks:
                new = chunk[len(again) :]
                again = []
                file.writelines(prediction_line(prediction) for prediction in new)
                file.flush()
                os.fsync(file.fileno())  # the record must not be ahead of the predictions
                done += len(new)
                progress_record |= _progress_of(hashes, done)
                write_json(_record_path(out), progress_record)
                progress.update(done)
        # With the number of rows, a table that is there is this command's: it may be killed here.
        write_json(_record_path(out), progress_record | {"rows": done})
        if not is_jsonl:
            _write(out, (row for _, row in read_jsonl(lines)), options)
            lines.unlink()
    return done


def _identity(student: Path, source: str, shard: Shard | None, options: Options) -> dict[str, Any]:
    """What decides the predictions of a file, beside its rows."""
    return {
        "schema": "dsbs.predictions/1",
        "student": _fingerprint(student),
        "source": source,
        "shard": None if shard is None else str(shard),
        "options": asdict(options),
    }


def _hashed(rows: Iterable[Row], shard: Shard | None, hashes: array[int]) -> Iterator[Row]:
    """The shard's rows; after each one, ``hashes`` has a hash of all rows up to it, in eight
    bytes, so that a file may be larger than memory.
    """
    state = hashlib.sha256()
    for row in rows:
        if shard is not None and not shard.has(row[0]):
            continue
        state.update(json.dumps(row, sort_keys=True, default=str).encode())
        hashes.append(int.from_bytes(state.digest()[:8], "big"))
        yield row


def _progress_of(hashes: array[int], done: int) -> dict[str, Any]:
    """What a record says of ``done`` predictions: their number, and the hash of their rows."""
    return {"done": done, "inputs": f"{hashes[done - 1]:016x}" if done else None}


def _check_inputs(record: dict[str, Any], hashes: array[int], done: int, out: Path) -> None:
    """Raises UserError where the predictions that the record counts are of other rows."""
    counted = record.get("done", 0)  # earlier versions did not count
    if not 0 < counted <= done:
        return
    if len(hashes) < counted or _progress_of(hashes, counted)["inputs"] != record["inputs"]:
        raise _other_rows(out)


def _check_table(record: dict[str, Any], hashes: array[int], out: Path) -> int:
    """The number of rows of a complete table. Raises UserError where they are not the input's."""
    number = int(record["rows"])
    _check_inputs(record, hashes, number, out)
    if len(hashes) != number:
        raise _other_rows(out)
    return number


def _other_rows(out: Path) -> UserError:
    return UserError(
        f"{out} has the predictions of other rows than the input's",
        hint="give the same input as before, or another --out; to predict anew, remove that file "
        "and its .manifest.json",
    )


def predict_on_ray(
    student: Path,
    open_rows: Callable[[], Iterable[Row]],
    out: Path,
    options: Options,
    *,
    source: str,
    shards: int,
    progress: Progress,
) -> int:
    """Like ``predict_file``, with ``shards`` Ray tasks, whose predictions are joined in order."""
    check_output(out)
    identity = _identity(student, source, None, options)
    record = _check_record(out, identity)
    hashes = array("Q")
    if out.exists() and "rows" in record:
        deque(_hashed(open_rows(), None, hashes), maxlen=0)
        return _check_table(record, hashes, out)
    if out.exists():
        raise UserError(f"{out} exists", hint="give another --out")
    folder = out.absolute().with_name(f"{out.name}.shards")
    work = partial(
        _predict_shard,
        student=student.absolute(),
        open_rows=open_rows,
        folder=folder,
        options=options,
        source=source,
    )
    section = RaySection(shards=shards)
    error = raise_lasting(run_on_ray(work, section, user="--engine ray", progress=progress))
    if error is not None:
        raise error
    with ExitStack() as stack:
        files = [
            stack.enter_context((folder / f"{shard}.jsonl").open(encoding="utf-8"))
            for shard in Shard.all(shards)
        ]
        number = _write(out, _joined(_hashed(open_rows(), None, hashes), files), options)
    record = identity | _progress_of(hashes, number) | {"rows": number}
    write_json(_record_path(out), record)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return number


def _predict_shard(shard: Shard, *, folder: Path, **arguments: Any) -> int:
    return predict_file(out=folder / f"{shard}.jsonl", shard=shard, **arguments)


def _joined(rows: Iterable[Row], shards: list[Any]) -> Iterator[dict[str, Any]]:
    """The shards' predictions in the order of the rows."""
    for row_id, _ in rows:
        prediction: dict[str, Any] = json.loads(next(shards[shard_number(row_id, len(shards)) - 1]))
        assert prediction["id"] == row_id, "the shards were made from other rows"
        yield prediction


def _write(out: Path, predictions: Iterable[dict[str, Any]], options: Options) -> int:
    return write_table(out, predictions, top=options.top > 0, rationale=options.rationale)


def _record_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.manifest.json")


def _fingerprint(student: Path) -> str:
    """What tells a student from another one of the same name: its weights and its calibration."""
    from dsbs.students.calibration import CALIBRATION
    from dsbs.students.card import read_card
    from dsbs.students.weights import file_hash, weights_files

    files = [*weights_files(student), student / CALIBRATION]
    hashes = [file_hash(file) for file in files if file.exists()]
    return f"{read_card(student).name} ({digest(*hashes)[:12]})"


def _check_record(out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The record beside a file of predictions; {} where there is none.

    Raises UserError where it is of another student, file, shard or other options.
    """
    try:
        record: dict[str, Any] = json.loads(_record_path(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    for key, value in identity.items():
        if record.get(key) != value:
            raise UserError(
                f"{out} has predictions with another {key}: {record.get(key)}, not {value}",
                hint="give another --out, or remove that file and its .manifest.json",
            )
    return record


def _skip_done(
    lines: Path, rows: Iterator[Row], chunk_size: int, out: Path
) -> tuple[int, list[Row]]:
    """Advance ``rows`` past those that ``lines`` has.

    Returns the number of predictions there, and the last rows of them, which do not fill a chunk:
    they are predicted again with the rest of their chunk, so that its batches are those of a
    command that was not interrupted. A last line that was torn by a kill is cut off. Raises
    UserError where the rows are others.
    """
    last = cut_torn_line(lines)
    if last is None:
        return 0, []
    last_id = last.get("id")
    with lines.open("rb") as file:
        done = sum(1 for _ in file)
    in_chunk = done % chunk_size
    last_rows = list(islice(rows, done - in_chunk - 1, done - in_chunk)) if done > in_chunk else []
    again = list(islice(rows, in_chunk))
    last_row = [*last_rows, *again][-1:]
    if len(again) < in_chunk or [row_id for row_id, _ in last_row] != [last_id]:
        raise UserError(
            f"{out}: prediction {done} is of row {last_id!r}, which is not row {done} of the input",
            hint="give the same input as before, or another --out",
        )
    return done, again
