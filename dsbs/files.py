"""Files: JSON lines, atomic writes, folder locks, hashes, and the files that ship with dsbs.

Operating systems differ in how files are locked, replaced and allocated; that is settled here.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import hashlib
import json
import os
import platform
import re
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal, TextIO

from filelock import FileLock, Timeout

from dsbs.errors import DsbsError, PartialError, UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # or a file is as large as it may be
# How libraries report a full disk; the last three are torch.save's, which hides the reason.
_DISK_FULL_MESSAGES = (
    os.strerror(errno.ENOSPC),
    "Disk quota exceeded",
    os.strerror(errno.EFBIG),
    "There is not enough space on the disk",  # Windows
    "PytorchStreamWriter failed writing",
    "iostream error",
    "unexpected pos",
)
_LOCK = ".lock"
_HOLDER = ".lock-holder"  # a file of its own: Windows lets nobody read a locked one
_LOCK_WAIT_S = 0.2  # `is_locked` takes a free lock for a moment
_LOOK_S = 0.04
_IS_WINDOWS = os.name == "nt"
_MOVE_WAIT_S = 3.0
_NO_ALLOCATION = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)  # of some file systems
FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_DEVICE_NAME = r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?"
_PACKAGE = Path(__file__).resolve().parent
# Packages whose versions decide results.
_VERSIONED = (
    "dsbs",
    "torch",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "openai",
    "xllamacpp",
)


def expand_user(path: str | Path) -> Path:
    """A path with the home directory in place of ``~``; a name that begins with ~ is kept."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def find_file(path: str | Path, *, what: str, hint: str, folder: Path | None = None) -> Path:
    """Find a file by the path given, in ``folder``, or among the files that ship with dsbs.

    Shipped prompts, recipes and data lie in a checkout's root or inside an installed wheel.
    ``what`` names the file in the message. Raises UserError where there is no such file.
    """
    expanded = expand_user(path)
    candidates = [expanded]
    if not expanded.is_absolute():
        if folder is not None:
            candidates.append(folder / expanded)
        roots = (_PACKAGE / "_shipped", _PACKAGE.parent)
        candidates += [root / expanded for root in roots if _has_shipped_files(root)]
    try:
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        if expanded.is_dir():
            raise UserError(f"{what} {path} is a directory", hint=hint)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:  # a text in place of a path
            raise
    raise UserError(f"{what} {path} does not exist (working directory: {Path.cwd()})", hint=hint)


def _has_shipped_files(root: Path) -> bool:
    return (root / "prompts").is_dir() and (root / "recipes").is_dir()


# --- JSON lines


# Encodings by their byte order mark; UTF-32's begins with that of UTF-16.
_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_GZIP_MARK = b"\x1f\x8b"
_BLOCK = 64 * 1024  # bytes read at once from the end of a file
_HEAD_BYTES = 64 * 1024  # of a file, by which its line ends are recognized


@contextmanager
def open_text(path: Path, *, errors: Literal["strict", "replace"] = "strict") -> Iterator[TextIO]:
    """Open text, gzipped or not, whatever its name: UTF-8, or UTF-16 with a byte order mark.

    Only ``\\n`` ends a line (in a file without any, ``\\r``): data hold other Unicode line
    separators. ``errors="replace"`` reads bytes that are not text as U+FFFD.
    """
    with path.open("rb") as raw:
        is_gzip = path.suffix.lower() == ".gz" or raw.read(2) == _GZIP_MARK
    opener: Any = gzip.open if is_gzip else open
    encoding = "utf-8-sig"
    newline = "\n"
    try:
        with opener(path, "rb") as file:
            head = file.read(_HEAD_BYTES)
        for mark, name in _ENCODINGS:
            if head.startswith(mark):
                encoding = name
                break
        if b"\r" in head and b"\n" not in head:
            newline = "\r"
        with opener(path, "rt", encoding=encoding, newline=newline, errors=errors) as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not {encoding.removesuffix('-sig').upper()} text ({error.reason})",
            hint=f"save it as UTF-8, e.g. iconv -f WINDOWS-1252 -t UTF-8 {path.name}",
        ) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"{path} is not a complete gzip file ({error})", hint="download or compress it again"
        ) from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) and skip blank lines. Raises UserError with the line's
    number.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                # Half of a surrogate pair is not a character, and cannot be written to a file.
                if "\\ud" in line.lower():
                    json.dumps(row, ensure_ascii=False).encode()
            except RecursionError:
                raise _not_json(path, number, line, "nested too deeply") from None
            except ValueError as error:
                reason = getattr(error, "msg", None) or str(error)
                raise _not_json(path, number, line, reason) from None
            if not isinstance(row, dict):
                hint = 'each line must be an object such as {"id": "1", "text": "…"}'
                if isinstance(row, list):
                    hint = _array_hint(path)
                raise UserError(
                    f"{path}:{number}: a JSON {type(row).__name__}, not an object", hint=hint
                )
            yield number, row


def _not_json(path: Path, number: int, line: str, reason: str) -> UserError:
    problem = f"{path}:{number}: not valid JSON ({reason})"
    hint = "fix or remove the line"
    if number == 1 and line.lstrip().startswith("["):
        hint = _array_hint(path)
    elif line.strip() == "{":
        hint = f"write each object on one line: jq -c . {path.name}"
    elif "\0" in line:
        problem += "; the line has NUL characters"
        hint = "remove the line; a file in UTF-16 must be saved as UTF-8"
    elif not line.endswith(("\n", "\r")):
        problem += "; the file ends in the middle of this line"
        hint = "remove the line, or write the file again: its writer was interrupted"
    return UserError(problem, hint=hint)


def _array_hint(path: Path) -> str:
    return f"write one object per line instead of an array: jq -c '.[]' {path.name}"


def cut_torn_line(path: Path) -> dict[str, Any] | None:
    """Cut off what follows the last complete object of a JSON-lines file, such as a line that was
    half-written by a killed process. Returns that object; None: there is none, or no file.
    """
    with suppress(FileNotFoundError), path.open("r+b") as file:
        while (end := file.seek(0, os.SEEK_END)) > 0:
            start = last_line_start(file, end)
            file.seek(start)
            line = file.read()
            row = None
            with suppress(ValueError):
                row = json.loads(line)
            if line.endswith(b"\n") and isinstance(row, dict):
                return row
            file.truncate(start)
    return None


def last_line_start(file: IO[bytes], end: int) -> int:
    """Where the last line starts, complete or not, in a file of ``end`` bytes."""
    stop = end - 1  # its own line break
    while stop > 0:
        start = max(0, stop - _BLOCK)
        file.seek(start)
        position = file.read(stop - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        stop = start
    return 0


def write_jsonl(path: Path, rows: Iterable[str]) -> int:
    """Write serialized ``rows`` atomically. Returns the number of rows."""
    count = 0
    with atomic_write(path) as file:
        for row in rows:
            file.write(row)
            file.write("\n")
            count += 1
    return count


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def atomic_write(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Open a file for writing that appears under ``path`` complete or not at all, even if the
    process is killed.

    UTF-8 text, or bytes. Raises PartialError where the disk is full.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder", hint="give the name of a file")
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    text: dict[str, str] = {} if binary else {"encoding": "utf-8", "newline": "\n"}
    try:
        with partial.open("wb" if binary else "w", **text) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        move(partial, path)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise PartialError(
            f"cannot write {path} ({error.strerror})",
            hint="free some space or pass --out, then run the same command",
        ) from None
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def full_disk_as_partial(folder: Path, hint: str) -> Iterator[None]:
    """Turn any library's error about a full disk into a PartialError."""
    try:
        yield
    except DsbsError:
        raise
    except Exception as error:
        if not _is_disk_full(error):
            raise
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise PartialError(
            f"cannot write to {folder}: its disk seems full ({reason})", hint=hint
        ) from None


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, reports a full disk."""
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL:
            return True
        if any(message in str(error) for message in _DISK_FULL_MESSAGES):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- hashes


def digest(*texts: str) -> str:
    """Hex SHA-256 over texts, each closed by a NUL so that no two lists of texts collide."""
    state = hashlib.sha256()
    for text in texts:
        state.update(text.encode("utf-8", "surrogatepass"))
        state.update(b"\0")
    return state.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


# --- folders


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises UserError where a file is in the way, or permission
    is denied.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(
            f"cannot create the directory {path} ({error.strerror})",
            hint="use another one with --out",
        ) from None


@contextmanager
def lock_folder(folder: Path, *, remove: bool = False) -> Iterator[None]:
    """Hold ``folder`` for this process. The system releases it if the process is killed.

    ``remove``: remove the folder at the end if nothing but the lock is left in it. Raises DsbsError
    naming the process that holds it already, and UserError where nothing can be written.
    """
    make_folder(folder)
    lock = FileLock(folder / _LOCK, thread_local=False)
    holder = folder / _HOLDER
    try:
        lock.acquire(timeout=_LOCK_WAIT_S)
    except Timeout:
        raise DsbsError(
            f"{folder} is in use by {_read_holder(holder) or 'another process'}",
            hint="wait for it to end, then run the same command",
        ) from None
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise UserError(
            f"cannot write to the directory {folder} ({error.strerror})",
            hint="use another one with --out",
        ) from None
    try:
        text = f"process {os.getpid()} on {platform.node()} since {now()}"
        holder.write_text(text, encoding="utf-8")
        yield
    finally:
        with suppress(OSError):  # a full disk, or a folder that was moved away
            holder.unlink(missing_ok=True)
            if remove:
                (folder / _LOCK).unlink(missing_ok=True)  # Windows does it on release
        lock.release()
        if remove:
            with suppress(OSError):
                folder.rmdir()


def is_locked(folder: Path) -> bool:
    """Whether a process holds ``folder``; False where its lock cannot be read."""
    path = folder / _LOCK
    try:
        if not path.is_file():
            return False
        lock = FileLock(path, thread_local=False)
        with lock.acquire(timeout=_LOOK_S, poll_interval=_LOOK_S / 4):
            return False
    except Timeout:
        return True
    except OSError:  # somebody else's folder, which may be read only
        return _read_holder(folder / _HOLDER) is not None


def _read_holder(path: Path) -> str | None:
    """The process that holds a folder, as it describes itself. None: it says nothing."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def check_file_name(name: str) -> None:
    """Raises ValueError for a name that is no file's on every operating system."""
    if not re.fullmatch(FILE_NAME, name):
        raise ValueError(f"{name!r}: a name may contain only letters, digits, '.', '_' and '-'")
    if name.endswith(".") or re.fullmatch(_DEVICE_NAME, name.lower()):
        raise ValueError(f"{name!r}: Windows has no file of this name")


def move(source: Path, target: Path) -> None:
    """Rename a file or a folder; replaces a file or an empty folder.

    Windows refuses while another program has either open: a virus scanner for a moment, an editor
    for longer. Raises UserError for the latter.
    """
    deadline = time.monotonic() + _MOVE_WAIT_S
    while True:
        try:
            if source.is_dir() and target.is_dir():
                target.rmdir()  # Windows replaces no folder, not even an empty one
            source.replace(target)
            return
        except PermissionError:
            if not _IS_WINDOWS:
                raise
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{target} cannot be replaced: another program has it open",
                    hint="close it there, then run the same command",
                ) from None
        time.sleep(0.02)


def allocate(path: Path, size: int) -> None:
    """Create a file that takes ``size`` bytes of disk space. Raises OSError for a full disk."""
    with path.open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
                return
            except OSError as error:
                if error.errno not in _NO_ALLOCATION:
                    raise
        for start in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - start)))
        file.flush()
        os.fsync(file.fileno())


# --- what a manifest records


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results, without importing any of them."""
    installed = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed
