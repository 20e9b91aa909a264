"""Cached log-probabilities of local teachers, for ``response`` terms with ``top_k``.

On disk are, for each target token, the K likeliest tokens. Each file holds some rows, each under
the hash of its input and target. Every student that learns the same row from the same teachers
finds it there; a killed process loses at most one file.

Shapes: M target tokens, T of one row, V vocabulary entries (or classes), K cached ones.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsbs.config import TrainSection
from dsbs.files import atomic_write, canonical_json, digest
from dsbs.progress import Progress, running
from dsbs.students.card import Head
from dsbs.students.weights import device
from dsbs.training.distillation import Term, ensemble_logprobs
from dsbs.training.distillation.local_teachers import (
    LocalTeacher,
    add_own_inputs,
    teacher_runners,
    teachers_fingerprint,
)
from dsbs.training.distillation.response import ResponseTerm
from dsbs.training.distributed import is_main_process, wait
from dsbs.training.encode import Encoded, PackedBatch, collate, rows_of
from dsbs.training.methods import View

if TYPE_CHECKING:
    from torch import Tensor

    from dsbs.training.distillation.local_teachers import TeacherRunner


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """What a student gives probabilities for."""

    head: Head
    size: int
    """Vocabulary entries, or classes of a label head."""


_ROWS_PER_FILE = 2000
_TopTokens = tuple[NDArray[np.int32], NDArray[np.float32]]  # ids, log-probabilities (T, K)
# a batch -> by view, ids and log-probabilities (M, K)
_AskTeachers = Callable[[Mapping[str, PackedBatch]], dict[str, tuple["Tensor", "Tensor"]]]


class TeacherLogprobs:
    """The log-probabilities in ``folder``, named after the teachers, the temperature and K.

    ``vocabulary`` is how many vocabulary entries they cover. Of the rows on disk, memory holds
    those with a key in ``keys``: other students' may be many times as many.
    """

    def __init__(
        self, folder: Path, vocabulary: int, views: Sequence[View], keys: Set[bytes]
    ) -> None:
        self.vocabulary = vocabulary
        self.views = views
        self._folder = folder
        self._keys = keys
        self._cached: dict[bytes, _TopTokens] = {}
        self._unsaved: dict[bytes, _TopTokens] = {}
        self._read_files()

    def lookup(self, packed: PackedBatch, view: View) -> tuple[Tensor, Tensor]:
        """A view's packed rows -> ids and log-probabilities in nats, each (M, K)."""
        import torch

        rows = [self._cached.get(key) for key in row_keys(packed, view)]
        width = next((row[0].shape[1] for row in rows if row is not None), 1)
        # the empty rows that give all processes equally many batches are never cached
        blank = (np.zeros((1, width), np.int32), np.zeros((1, width), np.float32))
        filled = [blank if row is None else row for row in rows]
        ids = np.concatenate([row_ids for row_ids, _ in filled]).astype(np.int64)
        logprobs = np.concatenate([row_logprobs for _, row_logprobs in filled])
        return torch.from_numpy(ids), torch.from_numpy(logprobs)

    def fill(
        self,
        rows: Sequence[Encoded],
        ask_teachers: _AskTeachers,
        batch_size: int,
        progress: Progress,
        title: str,
    ) -> None:
        """Ask the teachers about the rows that are not cached; one process asks, all wait."""
        if is_main_process():
            missing = [i for i, row in enumerate(rows) if not self._has(row)]
            if missing:
                with running(progress, f"{title}: teachers' log-probabilities", len(missing)):
                    for first in range(0, len(missing), batch_size):
                        indices = missing[first : first + batch_size]
                        self._ask([rows[i] for i in indices], ask_teachers)
                        progress.update(first + len(indices))
                    self._save()
        wait()
        if not is_main_process():
            self._read_files()

    def _has(self, row: Encoded) -> bool:
        return all(key in self._cached for key in _keys_of(row, self.views))

    def _ask(self, rows: list[Encoded], ask_teachers: _AskTeachers) -> None:
        batch = collate(rows)
        answers = ask_teachers(batch)
        for view in self.views:
            if view.target not in batch:
                continue
            packed = batch[view.target]
            ends = np.cumsum(packed.target_lengths.numpy())[:-1]
            ids, logprobs = (
                np.split(tensor.cpu().numpy(), ends) for tensor in answers[view.target]
            )
            keys = row_keys(packed, view)
            for key, row_ids, row_logprobs in zip(keys, ids, logprobs, strict=True):
                self._unsaved[key] = (row_ids.astype(np.int32), row_logprobs.astype(np.float32))
        if len(self._unsaved) >= _ROWS_PER_FILE:
            self._save()

    def _save(self) -> None:
        if not self._unsaved:
            return
        rows = list(self._unsaved.values())
        name = digest(*(key.hex() for key in self._unsaved))[:32]
        with atomic_write(self._folder / f"{name}.npz", binary=True) as file:
            np.savez(
                file,
                keys=np.frombuffer(b"".join(self._unsaved), np.uint8).reshape(len(rows), -1),
                lengths=np.array([len(ids) for ids, _ in rows], np.int32),
                ids=np.concatenate([ids for ids, _ in rows]),
                logprobs=np.concatenate([logprobs for _, logprobs in rows]),
            )
        self._cached |= self._unsaved
        self._unsaved = {}

    def _read_files(self) -> None:
        for path in sorted(self._folder.glob("*.npz")):
            self._cached |= _read_file(path, self._keys)


def cache_logprobs(
    terms: Sequence[Term],
    section: TrainSection,
    views: Sequence[View],
    teachers: Sequence[LocalTeacher],
    outputs: ModelOutputs,
    folder: Path,
    rows: Sequence[Encoded],
    batch_size: int,
    progress: Progress,
    title: str,
) -> dict[str, TeacherLogprobs]:
    """By term with ``top_k``, its teachers' log-probabilities for all ``rows``.

    Those that ``folder`` lacks are computed first, ``batch_size`` rows at a time. ``outputs`` are
    the student's.
    """
    cached: dict[str, TeacherLogprobs] = {}
    for term in terms:
        if not isinstance(term, ResponseTerm) or term.top_k is None:
            continue
        shared = outputs.size
        if outputs.head == "text":
            shared = min([shared, *(teacher.vocabulary for teacher in teachers)])
        top_k = min(term.top_k, shared)
        key = digest(
            teachers_fingerprint(teachers),
            canonical_json([term.temperature, top_k, shared, section.ensemble]),
        )
        names = term.compared_views(views)
        if outputs.head == "labels":
            names = ["label"]
        compared = [view for view in views if view.target in names]
        keys = {row_key for row in rows for row_key in _keys_of(row, compared)}
        logprobs = TeacherLogprobs(folder / key[:32], shared, compared, keys)
        ask_teachers = _top_k_asker(term, section, compared, teachers, top_k, shared, outputs.head)
        logprobs.fill(rows, ask_teachers, batch_size, progress, title)
        cached[term.title] = logprobs
    return cached


def _top_k_asker(
    term: ResponseTerm,
    section: TrainSection,
    views: Sequence[View],
    teachers: Sequence[LocalTeacher],
    top_k: int,
    vocabulary: int,
    head: Head,
) -> _AskTeachers:
    """A function that runs the teachers on a batch and returns their ``top_k`` likeliest tokens."""
    import torch

    target_device = torch.device(device())
    weights = [teacher.weight for teacher in teachers]

    @cache
    def runners() -> list[TeacherRunner]:  # loads the teachers, which a full cache never needs
        scores_labels = head == "labels"
        return teacher_runners(teachers, views, section, target_device, scores_labels=scores_labels)

    def ask_teachers(batch: Mapping[str, PackedBatch]) -> dict[str, tuple[Tensor, Tensor]]:
        loaded = runners()  # outside inference mode, as training may use the same models
        add_own_inputs(teachers, batch.get(views[0].target))
        inputs: dict[str, PackedBatch] = {
            view.target: batch[view.target].to(target_device)
            for view in views
            if view.target in batch
        }
        answers: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.inference_mode():
            outputs = [runner(inputs) for runner in loaded]
            for view in inputs:
                rows = [
                    output.label_scores if head == "labels" else output.logits[view]
                    for output in outputs
                ]
                logprobs = ensemble_logprobs(
                    [logits[:, :vocabulary] for logits in rows if logits is not None],
                    weights,
                    temperature=term.temperature,
                    ensemble=section.ensemble,
                )
                top = logprobs.topk(top_k)
                answers[view] = (top.indices, top.values)
        return answers

    return ask_teachers


def row_keys(packed: PackedBatch, view: View) -> list[bytes]:
    """Each row's key on disk: a hash of its input and its target."""
    return [_key(source, target, view) for source, target in zip(*rows_of(packed), strict=True)]


def _keys_of(row: Encoded, views: Sequence[View]) -> Iterator[bytes]:
    for view in views:
        for source, target in row.get(view.target, ()):
            yield _key(np.asarray(source), np.asarray(target), view)


def _key(source: NDArray[Any], target: NDArray[Any], view: View) -> bytes:
    state = hashlib.blake2b(source.astype(np.int32).tobytes(), digest_size=16)
    state.update(view.start.encode() + b"\0")
    state.update(target.astype(np.int32).tobytes())
    return state.digest()


def _read_file(path: Path, keys: Set[bytes]) -> dict[bytes, _TopTokens]:
    """The rows of a file that are among ``keys``. A damaged file has none and is removed."""
    try:
        with np.load(path, allow_pickle=False) as file:
            ends = np.cumsum(file["lengths"])[:-1]
            ids = np.split(file["ids"], ends)
            logprobs = np.split(file["logprobs"], ends)
            rows: dict[bytes, _TopTokens] = {}
            for raw_key, row_ids, row_logprobs in zip(file["keys"], ids, logprobs, strict=True):
                key = raw_key.tobytes()
                if key in keys:
                    # copies, since a slice would keep the whole file's array in memory
                    rows[key] = (row_ids.copy(), row_logprobs.copy())
            return rows
    except OSError:
        return {}
    except (ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile):
        if is_main_process():
            path.unlink(missing_ok=True)
        return {}
