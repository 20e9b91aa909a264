"""Local teachers' likeliest tokens on disk: for each target token K ids and their log-probabilities, asked for once.

A file holds some rows, each under the hash of what it reads and writes, so that every student that is taught the same row by
the same teachers finds it, and a kill loses the last file at most.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsbs.config import TermSection, TrainSection
from dsbs.files import canonical_json, digest
from dsbs.progress import Progress, running
from dsbs.training.distillation.local_teachers import LocalTeacher, teachers_fingerprint
from dsbs.training.distributed import is_main_process, wait
from dsbs.training.encode import Encoded, PackedBatch, collate, rows_of
from dsbs.training.methods import View, term_views

if TYPE_CHECKING:
    from torch import Tensor

_ROWS = 2000  # of a file
GeneratedText = tuple[
    NDArray[np.int32], NDArray[np.float32]
]  # ids and log-probabilities (T, K) of one row


class TeacherLogprobs:
    """What is in ``folder``, whose name says of which teachers, temperature and K. ``width``: of the V entries that count.

    Of the rows there, those of ``wanted`` alone stay in memory: other students' may be many times as many.
    """

    def __init__(self, folder: Path, width: int, wanted: Set[bytes]) -> None:
        self.width = width
        self._folder, self._wanted = folder, wanted
        self._known: dict[bytes, GeneratedText] = {}
        self._new: dict[bytes, GeneratedText] = {}
        for path in sorted(folder.glob("*.npz")):
            self._known |= _read(path, wanted)

    def of(self, flat: PackedBatch, view: View) -> tuple[Tensor, Tensor]:
        """flat rows of M target tokens -> ids and log-probabilities in nats, each (M, K)."""
        import torch

        said = [self._known.get(key) for key in keys(flat, view)]
        there = [one for one in said if one is not None]
        if len(there) < len(said):
            # rows that processes are evened with teach nothing, and nobody was asked about them
            blank = np.zeros((1, there[0][0].shape[1] if there else 1))
            said = [
                (blank.astype(np.int32), blank.astype(np.float32)) if one is None else one
                for one in said
            ]
        ids = np.concatenate([one[0] for one in said if one is not None]).astype(np.int64)
        logprobs = np.concatenate([one[1] for one in said if one is not None])
        return torch.from_numpy(ids), torch.from_numpy(logprobs)

    def fill(
        self,
        rows: Sequence[Encoded],
        views: Sequence[View],
        ask: Callable[[dict[str, PackedBatch]], dict[str, tuple[Tensor, Tensor]]],
        size: int,
        progress: Progress,
        title: str,
    ) -> None:
        """Ask for the rows that are not there, ``size`` at a time: a batch -> each view's ids and log-probabilities (M, K)."""
        if is_main_process():
            missing = [i for i in range(len(rows)) if not self._has(rows[i], views)]
            if missing:
                with running(progress, f"{title}: teachers' log-probabilities", len(missing)):
                    for first in range(0, len(missing), size):
                        self._take([rows[i] for i in missing[first : first + size]], views, ask)
                        progress.update(min(len(missing), first + size))
                    self._write()
        wait()
        for path in () if is_main_process() else sorted(self._folder.glob("*.npz")):
            self._known |= _read(path, self._wanted)

    def _has(self, row: Encoded, views: Sequence[View]) -> bool:
        return all(key in self._known for key in _keys_of(row, views))

    def _take(self, rows: list[Encoded], views: Sequence[View], ask: Callable[..., Any]) -> None:
        batch = collate(rows)
        said = ask(batch)
        for view in views:
            flat = batch.get(view.target)
            if flat is None:
                continue
            ends = np.cumsum(flat.target_lengths.numpy())[:-1]
            ids, logprobs = (np.split(one.cpu().numpy(), ends) for one in said[view.target])
            for key, one, other in zip(keys(flat, view), ids, logprobs, strict=True):
                self._new[key] = one.astype(np.int32), other.astype(np.float32)
        if len(self._new) >= _ROWS:
            self._write()

    def _write(self) -> None:
        if not self._new:
            return
        name = digest(*(key.hex() for key in self._new))[:32]
        ids, logprobs = (np.concatenate([one[k] for one in self._new.values()]) for k in (0, 1))
        path = self._folder / f"{name}.npz"
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    keys=np.frombuffer(b"".join(self._new), np.uint8).reshape(len(self._new), -1),
                    lengths=np.array([len(one[0]) for one in self._new.values()], np.int32),
                    ids=ids,
                    logprobs=logprobs,
                )
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        self._known |= self._new
        self._new = {}


def cache_logprobs(
    terms: Sequence[TermSection],
    section: TrainSection,
    views: Sequence[View],
    teachers: Sequence[LocalTeacher],
    vocabulary: int,
    folder: Path,
    rows: Sequence[Encoded],
    size: int,
    progress: Progress,
    title: str,
) -> dict[str, TeacherLogprobs]:
    """For each term with ``top_k``, by its name, what ``folder`` holds of its teachers, after they were asked what is missing.

    ``vocabulary``: entries V of the student; ``size`` rows are asked for at a time.
    """
    found: dict[str, TeacherLogprobs] = {}
    for term in terms:
        if term.top_k is None:
            continue
        width = min([vocabulary, *(teacher.model().config.vocab_size for teacher in teachers)])
        many = min(term.top_k, width)
        key = digest(
            teachers_fingerprint(teachers),
            canonical_json([term.temperature, many, width, section.ensemble]),
        )
        asked = [view for view in views if view.target in term_views(term, views)]
        kept = found[term.title] = TeacherLogprobs(
            folder / key[:32], width, {one for row in rows for one in _keys_of(row, asked)}
        )
        kept.fill(
            rows,
            asked,
            _likeliest(term, section, asked, teachers, many, width),
            size,
            progress,
            title,
        )
    return found


def _likeliest(
    term: TermSection,
    section: TrainSection,
    views: Sequence[View],
    teachers: Sequence[LocalTeacher],
    many: int,
    width: int,
) -> Callable[[dict[str, PackedBatch]], dict[str, tuple[Tensor, Tensor]]]:
    """Asks the teachers about a batch: of each view the ``many`` likeliest tokens and their log-probabilities (M, K)."""
    import torch

    from dsbs.training.distillation.objective import DistillationLoss
    from dsbs.training.distillation.response import ensemble

    device = "cuda" if torch.cuda.is_available() else "cpu"
    readers = DistillationLoss((term,), section, views, teachers=teachers).readers(device)
    shares = [teacher.weight for teacher in teachers]

    def ask(batch: dict[str, PackedBatch]) -> dict[str, tuple[Tensor, Tensor]]:
        mine: dict[str, PackedBatch] = {
            view.target: batch[view.target] for view in views if view.target in batch
        }
        there = {name: flat.to(device) for name, flat in mine.items()}
        with torch.inference_mode():
            passes = [reader(there) for reader in readers]
            found: dict[str, tuple[Tensor, Tensor]] = {}
            for name in there:
                said = [one.logits[name][:, :width] for one in passes]
                top = ensemble(
                    said, shares, temperature=term.temperature, kind=section.ensemble
                ).topk(many)
                found[name] = (top.indices, top.values)
        return found

    return ask


def keys(flat: PackedBatch, view: View) -> list[bytes]:
    """Of each row, what it reads and what it writes."""
    sources, targets = rows_of(flat)
    return [_key(source, target, view) for source, target in zip(sources, targets, strict=True)]


def _keys_of(row: Encoded, views: Sequence[View]) -> Iterator[bytes]:
    for view in views:
        for source, target in row.get(view.target, ()):
            yield _key(np.asarray(source), np.asarray(target), view)


def _key(source: NDArray[Any], target: NDArray[Any], view: View) -> bytes:
    state = hashlib.blake2b(source.astype(np.int32).tobytes(), digest_size=16)
    state.update(view.start.encode() + b"\0")
    state.update(target.astype(np.int32).tobytes())
    return state.digest()


def _read(path: Path, wanted: Set[bytes]) -> dict[bytes, GeneratedText]:
    """Nothing of a file that is damaged, which is removed: its rows are asked for again."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            ends = np.cumsum(kept["lengths"])[:-1]
            ids, logprobs = np.split(kept["ids"], ends), np.split(kept["logprobs"], ends)
            # copies: a part of an array would hold the file's whole one
            return {
                name: (one.copy(), other.copy())
                for key, one, other in zip(kept["keys"], ids, logprobs, strict=True)
                if (name := key.tobytes()) in wanted
            }
    except OSError:
        return {}
    except (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        if is_main_process():
            path.unlink(missing_ok=True)
        return {}
