"""Texts as token ids: each tokenised once for all students of a run, and kept on disk for the next run of the same texts.

Half a million examples are some 60 million ids: as one array 240 MB, as Python's lists of numbers 5 GB.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.files import digest, versions
from dsbs.progress import NoProgress, Progress, running
from dsbs.students import InputFormat, PlainFormat
from dsbs.training.distributed import is_main_process

Ids = Sequence[int] | NDArray[np.int32]

_AT_ONCE = 8192  # texts in one call: the tokenizer's own objects for all of them would not fit
_WORTH_A_FILE = 2000  # texts: fewer are tokenised sooner than they are looked up


class Tokens:
    """All texts tokenised so far, each by its place: ``tokens[place]`` are its ids.

    ``folder`` keeps them for later runs (None: they are not kept). A file there is named by a hash of all that decides its
    ids; one that is cut or damaged is made anew, and one that cannot be written is done without.
    """

    def __init__(
        self,
        tokenizer: Any,
        folder: Path | None = None,
        progress: Progress | None = None,
        wording: InputFormat | None = None,
    ) -> None:
        self._tokenizer, self._folder, self._progress = tokenizer, folder, progress or NoProgress()
        self.wording: InputFormat = wording or PlainFormat(tokenizer)
        self._ids: NDArray[np.int32] = np.zeros(0, np.int32)
        self._ends: NDArray[np.int64] = np.zeros(
            1, np.int64
        )  # text i has the ids from ends[i] to ends[i + 1]
        self._known: dict[
            tuple[str, int, bool], dict[str, int]
        ] = {}  # prefix, limit, target or not -> text -> place
        self._identity: str | None = None
        self._used: set[str] = set()

    def __getitem__(self, place: int) -> NDArray[np.int32]:
        return self._ids[self._ends[place] : self._ends[place + 1]]

    def lengths(self, places: NDArray[np.int32]) -> NDArray[np.int64]:
        """The number of ids of each text, its end token included."""
        return self._ends[places + 1] - self._ends[places]

    def places(
        self, prefix: str, texts: Sequence[str], limit: int, *, target: bool = False
    ) -> NDArray[np.int32]:
        """Where the ids of ``prefix + text`` are, cut at ``limit`` ids; ``target``: what is written rather than read."""
        known = self._known.setdefault((prefix, limit, target), {})
        new = [text for text in dict.fromkeys(texts) if text not in known]
        if new:
            lengths, ids = self._kept(prefix, new, limit, target)
            known.update(
                zip(new, range(len(self._ends) - 1, len(self._ends) - 1 + len(new)), strict=True)
            )
            self._ends = np.concatenate([self._ends, self._ends[-1] + np.cumsum(lengths)])
            self._ids = np.concatenate([self._ids, ids])
        return np.fromiter((known[text] for text in texts), np.int32, len(texts))

    def sweep(self) -> None:
        """Remove the files of texts that this run did not have (other data's, another tokenizer's), and what a kill left."""
        for path in (
            self._folder.iterdir() if self._folder is not None and self._folder.is_dir() else ()
        ):
            if path.stem not in self._used:
                path.unlink(missing_ok=True)

    def _kept(
        self, prefix: str, texts: list[str], limit: int, target: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """The lengths and ids of texts, from the file of an earlier run where there is one."""
        if self._folder is None or len(texts) < _WORTH_A_FILE:
            return self._tokenised(prefix, texts, limit, target)
        key = digest(
            self._tokenizers_identity(),
            *self.wording.identity(target=target),
            str(limit),
            prefix,
            *texts,
        )[:32]
        path = self._folder / f"{key}.npz"
        self._used.add(key)
        found = _read(path, len(texts))
        if found is None:
            found = self._tokenised(prefix, texts, limit, target)
            if is_main_process():
                _write(path, *found)
        return found

    def _tokenised(
        self, prefix: str, texts: list[str], limit: int, target: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        lengths, parts = [], []
        worded = self.wording.write if target else self.wording.read
        with running(self._progress, "tokenise", len(texts)):
            for start in range(0, len(texts), _AT_ONCE):
                some = [prefix + text for text in texts[start : start + _AT_ONCE]]
                rows = worded(some, limit)
                lengths += [len(row) for row in rows]
                parts.append(np.fromiter((token for row in rows for token in row), np.int32))
                self._progress.update(start + len(some))
        return np.array(lengths, np.int64), np.concatenate(parts)

    def _tokenizers_identity(self) -> str:
        """All that decides a text's ids besides the text: pieces, scores, normalisation, and whose code applies them."""
        if self._identity is None:
            parts = json.loads(self._tokenizer.backend_tokenizer.to_str())
            for state in ("truncation", "padding"):  # what the last call asked for
                parts.pop(state, None)
            code = [versions().get(name, "") for name in ("tokenizers", "transformers")]
            self._identity = digest(json.dumps(parts, sort_keys=True), *code)
        return self._identity


def _read(path: Path, count: int) -> tuple[NDArray[np.int64], NDArray[np.int32]] | None:
    """None where there is no whole file of ``count`` texts; the archive's checksums tell a damaged one."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            lengths, ids = kept["lengths"].astype(np.int64), kept["ids"].astype(np.int32)
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        RuntimeError,
        zipfile.BadZipFile,
    ):  # whatever bit was turned
        return None
    return (lengths, ids) if len(lengths) == count and int(lengths.sum()) == len(ids) else None


def _write(path: Path, lengths: NDArray[np.int64], ids: NDArray[np.int32]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):  # a full disk: training needs its room more than this does
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                np.savez(file, lengths=_narrow(lengths), ids=_narrow(ids))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _narrow(numbers: NDArray[Any]) -> NDArray[Any]:
    """In as few bytes as the largest needs: two for the ids of a T5."""
    return numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
