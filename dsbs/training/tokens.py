"""Tokens: texts as ids, tokenized once for all students of a run and cached on disk.

Half a million examples are some 60 million ids: 240 MB as one array, 5 GB as Python lists.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.errors import DsbsError
from dsbs.files import atomic_write, digest, versions
from dsbs.progress import NoProgress, Progress, running
from dsbs.students.formats import InputFormat, PlainFormat
from dsbs.training.distributed import is_main_process

Ids = Sequence[int] | NDArray[np.int32]

_BATCH = 8192  # texts in one call: the tokenizer's objects for all of them would not fit
_MIN_CACHED = 2000  # texts: fewer are tokenized faster than they are looked up


class Tokens:
    """All texts tokenized so far, each under an index: ``tokens[index]`` are its ids.

    ``folder`` caches them for later runs (None: no cache). A file there is named by a hash of all
    that decides its ids; a damaged one is replaced, and one that cannot be written is skipped.
    """

    def __init__(
        self,
        tokenizer: Any,
        folder: Path | None = None,
        progress: Progress | None = None,
        input_format: InputFormat | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self._progress = progress or NoProgress()
        self.input_format: InputFormat = input_format or PlainFormat(tokenizer)
        self._ids: NDArray[np.int32] = np.zeros(0, np.int32)
        # Text i has the ids from ends[i] to ends[i + 1].
        self._ends: NDArray[np.int64] = np.zeros(1, np.int64)
        # (prefix, limit, target) -> text -> index
        self._indices: dict[tuple[str, int, bool], dict[str, int]] = {}
        self._identity: str | None = None
        self._used: set[str] = set()
        self._classes: NDArray[np.int32] | None = None

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        return self._ids[self._ends[index] : self._ends[index + 1]]

    def lengths(self, indices: NDArray[np.int32]) -> NDArray[np.int64]:
        """The number of ids of each text, its end token included."""
        return self._ends[indices + 1] - self._ends[indices]

    def indices(
        self, prefix: str, texts: Sequence[str], limit: int, *, target: bool = False
    ) -> NDArray[np.int32]:
        """The indices of ``prefix + text``, cut at ``limit`` ids, tokenized where they are new.

        ``target``: whether the texts are targets, not inputs.
        """
        indices = self._indices.setdefault((prefix, limit, target), {})
        new = [text for text in dict.fromkeys(texts) if text not in indices]
        if new:
            lengths, ids = self._load(prefix, new, limit, target)
            first = len(self._ends) - 1
            indices.update(zip(new, range(first, first + len(new)), strict=True))
            self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(lengths)])
            self._ids = np.concatenate([self._ids, ids])
        return np.fromiter((indices[text] for text in texts), np.int32, len(texts))

    def class_rows(self, count: int) -> NDArray[np.int32]:
        """The indices of rows of one id each: the classes from 0 to ``count`` - 1."""
        if self._classes is None or len(self._classes) < count:
            first = len(self._ends) - 1
            self._ends = np.concatenate([self._ends, self._ends[-1] + 1 + np.arange(count)])
            self._ids = np.concatenate([self._ids, np.arange(count, dtype=np.int32)])
            self._classes = np.arange(first, first + count, dtype=np.int32)
        return self._classes

    @property
    def tokenizer(self) -> Any:
        return self._tokenizer

    @property
    def used(self) -> frozenset[str]:
        """The names of the cache files that were read or written."""
        return frozenset(self._used)

    def sweep(self, used: Collection[str] = ()) -> None:
        """Remove cache files that this run did not use: of other texts, or of a killed run.

        ``used`` are the cache files of the run's other tokenizers.
        """
        if self._folder is None or not self._folder.is_dir():
            return
        for path in self._folder.iterdir():
            if path.stem not in self._used and path.stem not in used:
                path.unlink(missing_ok=True)

    def _load(
        self, prefix: str, texts: list[str], limit: int, target: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The lengths and ids of texts, from the cache where they are in it."""
        # nothing tells the states of a tokenizer in Python apart
        has_identity = hasattr(self._tokenizer, "backend_tokenizer")
        if self._folder is None or len(texts) < _MIN_CACHED or not has_identity:
            return self._tokenize(prefix, texts, limit, target)
        key = digest(
            self._tokenizer_identity(),
            *self.input_format.identity(target=target),
            str(limit),
            prefix,
            *texts,
        )[:32]
        path = self._folder / f"{key}.npz"
        self._used.add(key)
        cached = _read(path, len(texts))
        if cached is not None:
            return cached
        lengths, ids = self._tokenize(prefix, texts, limit, target)
        if is_main_process():
            _write(path, lengths, ids)
        return lengths, ids

    def _tokenize(
        self, prefix: str, texts: list[str], limit: int, target: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        lengths: list[int] = []
        ids = []
        encode = self.input_format.write if target else self.input_format.read
        with running(self._progress, "tokenize", len(texts)):
            for start in range(0, len(texts), _BATCH):
                batch = [prefix + text for text in texts[start : start + _BATCH]]
                rows = encode(batch, limit)
                lengths += [len(row) for row in rows]
                ids.append(np.fromiter((token for row in rows for token in row), np.int32))
                self._progress.update(start + len(batch))
        return np.array(lengths, np.int64), np.concatenate(ids)

    def _tokenizer_identity(self) -> str:
        """A hash of all that decides a text's ids: pieces, scores, normalization, versions."""
        if self._identity is None:
            state = json.loads(self._tokenizer.backend_tokenizer.to_str())
            for key in ("truncation", "padding"):  # left over from the last call
                state.pop(key, None)
            code = [versions().get(name, "") for name in ("tokenizers", "transformers")]
            self._identity = digest(json.dumps(state, sort_keys=True), *code)
        return self._identity


def _read(path: Path, count: int) -> tuple[NDArray[np.int64], NDArray[np.int32]] | None:
    """None without an intact file of ``count`` texts; the archive has checksums."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            lengths = archive["lengths"].astype(np.int64)
            ids = archive["ids"].astype(np.int32)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None  # a flipped bit may raise any of these
    return (lengths, ids) if len(lengths) == count and int(lengths.sum()) == len(ids) else None


def _write(path: Path, lengths: NDArray[np.int64], ids: NDArray[np.int32]) -> None:
    # On a full disk, training needs the space more.
    with contextlib.suppress(OSError, DsbsError), atomic_write(path, binary=True) as file:
        np.savez(file, lengths=_narrow(lengths), ids=_narrow(ids))


def _narrow(numbers: NDArray[Any]) -> NDArray[Any]:
    """The smallest integer type that holds the largest number: two bytes for a T5's ids."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
