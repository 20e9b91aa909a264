"""Files: JSONL in and out, atomic writes, run folders, manifests, and where shipped files lie."""

from __future__ import annotations

import errno
import fcntl
import gzip
import hashlib
import json
import os
import platform
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from dsbs.errors import DsbsError, PartialError, UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_WORDS = (
    *(os.strerror(number) for number in _FULL),
    *(
        "PytorchStreamWriter failed writing",
        "iostream error",
        "unexpected pos",
    ),  # torch.save, which does not say why
)
CPUINFO = Path("/proc/cpuinfo")
_PACKAGE = Path(__file__).resolve().parent


def find(path: str | Path, *, what: str, hint: str, beside: Path | None = None) -> Path:
    """The file that ``path`` names: as given, beside ``beside`` (a folder), or shipped with dsbs (prompts, recipes, data).

    The one place that knows both a checkout and an installed wheel. Raises UserError where there is none.
    """
    given = Path(path).expanduser()
    candidates = [given]
    if not given.is_absolute():
        if beside is not None:
            candidates.append(beside / given)
        candidates += [
            root / given for root in (_PACKAGE / "_shipped", _PACKAGE.parent) if _is_home(root)
        ]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    if given.is_dir():
        raise UserError(f"{what} {path} is a folder", hint=hint)
    raise UserError(f"{what} {path} does not exist (looked from {Path.cwd()})", hint=hint)


def _is_home(root: Path) -> bool:
    return (root / "prompts").is_dir() and (root / "recipes").is_dir()


# --- JSON lines


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open UTF-8 text, gzipped or not, keeping ``\\n`` as the only line end (data hold other Unicode separators)."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 text ({error.reason})", hint="save it as UTF-8"
        ) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(
            f"{path} is not a whole gzip file ({error})", hint="download or compress it again"
        ) from None


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object). Blank lines are skipped; anything else wrong raises UserError with its line."""
    with open_text(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if (
                    "\\ud" in line.lower()
                ):  # half of a surrogate pair is no character, and no file can hold it
                    json.dumps(row, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                what = (
                    "nested too deeply"
                    if isinstance(error, RecursionError)
                    else getattr(error, "msg", None) or str(error)
                )
                raise UserError(
                    f"{path}:{number}: not valid JSON ({what})", hint="mend or remove the line"
                ) from None
            if not isinstance(row, dict):
                raise UserError(
                    f"{path}:{number}: a JSON {type(row).__name__}, not an object",
                    hint='each line must be an object such as {"id": "1", "text": "…"}',
                )
            yield number, row


def write_jsonl(path: Path, rows: Iterable[str]) -> int:
    """Write serialised ``rows`` so that a kill leaves either the old file or the new one. Returns the number of rows."""
    count = 0
    with atomic(path) as file:
        for row in rows:
            file.write(row)
            file.write("\n")
            count += 1
    return count


def write_json(path: Path, value: Any) -> None:
    with atomic(path) as file:
        file.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")


@contextmanager
def room(folder: Path, hint: str) -> Iterator[None]:
    """Tell a disk that fills up under a library's hands as a PartialError; each library has its own words for it."""
    try:
        yield
    except DsbsError:
        raise
    except Exception as error:
        if not _is_full(error):
            raise
        said = f"{type(error).__name__}: {str(error)[:200]}"
        raise PartialError(
            f"{folder} cannot be written to, its disk seems full ({said})", hint=hint
        ) from None


def _is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is of a full disk."""
    while error is not None:
        if getattr(error, "errno", None) in _FULL or any(
            words in str(error) for words in _FULL_WORDS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def atomic(path: Path) -> Iterator[TextIO]:
    """Text file that appears under ``path`` whole or not at all."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise PartialError(
            f"cannot write {path} ({error.strerror})",
            hint="free some space or pass --out, then run the same command",
        ) from None
    finally:
        partial.unlink(missing_ok=True)


def digest(*parts: str) -> str:
    """Hex SHA-256 over texts, each closed by a NUL so that no two lists of parts collide."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.encode("utf-8", "surrogatepass"))
        state.update(b"\0")
    return state.hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


# --- run folders


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises UserError where a file is in the way or may not be written."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            raise
        raise UserError(
            f"the folder {path} cannot be made ({error.strerror})",
            hint="use another one with --out",
        ) from None


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Hold ``folder`` for this process; a second process is told who has it. Released by the kernel if we are killed."""
    make_folder(folder)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise DsbsError(
                f"{folder} is in use by {holder}",
                hint="wait for it to end, then run the same command",
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {now()}")
        file.flush()
        yield


def aside(path: Path, mark: str) -> Path:
    """Where what lies at ``path`` is kept once it no longer fits: in ``aside/`` beside it, named by what it was made by."""
    name = path.name.removesuffix(".jsonl")
    return path.parent / "aside" / f"{name}-{mark[:12]}{path.name[len(name) :]}"


def set_aside(path: Path, mark: str) -> None:
    """Move a file or folder there, beside what is there already."""
    target = aside(path, mark)
    while target.exists():
        name = target.name.removesuffix(".jsonl")
        target = target.with_name(f"{name}+{target.name[len(name) :]}")
    make_folder(target.parent)
    path.rename(target)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what decides results, without importing any of it."""
    found = {"python": platform.python_version()}
    for name in (
        "dsbs",
        "torch",
        "transformers",
        "tokenizers",
        "sentencepiece",
        "openai",
        "xllamacpp",
    ):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def device_name(cpuinfo: Path = CPUINFO) -> str:
    """Of what the models run on: the GPU's, or the CPU's."""
    import torch

    if torch.cuda.is_available():
        name: Any = torch.cuda.get_device_name()
        return str(name)
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


@contextmanager
def manifest(
    path: Path, recipe: dict[str, Any], data: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Keep ``<stage>/manifest.json``: resolved recipe, versions, data hashes, start, end, status.

    ``data`` maps a split to the hash of its rows. What the body adds to the yielded dict is written too.
    """
    record: dict[str, Any] = {
        "status": "running",
        "started": now(),
        "ended": None,
        "recipe": recipe,
        "data": dict(data),
        "versions": versions(),
    }
    write_json(path, record)
    try:
        yield record
    except BaseException as error:
        stopped = {KeyboardInterrupt: "interrupted", PartialError: "partial"}
        status = next((told for kind, told in stopped.items() if isinstance(error, kind)), "failed")
        with suppress(
            PartialError
        ):  # of a full disk, say, the body's own words are the better ones
            write_json(path, record | {"status": status, "ended": now()})
        raise
    status = record["status"] if record["status"] != "running" else "done"
    write_json(path, record | {"status": status, "ended": now()})
