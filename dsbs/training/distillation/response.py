"""Response term: the student's token distributions against its local teachers'.

Sources: Hinton et al. 2015, arXiv:1503.02531, section 2 (temperature, T²); Agarwal et al. 2024,
arXiv:2306.13649, equation of D_JSD(β) (reverse and generalized Jensen-Shannon divergence).

A teacher's log-probabilities may be cached on disk: for each target token, the K likeliest tokens.
Each file holds some rows, each under the hash of its input and target. Every student that learns
the same row from the same teachers finds it there; a killed process loses at most one file.

Shapes: M target tokens, T of one row, V vocabulary entries, K cached ones.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field

from dsbs.config import TrainSection
from dsbs.config.sections import as_tuple
from dsbs.files import atomic_write, canonical_json, digest
from dsbs.progress import Progress, running
from dsbs.students.weights import device
from dsbs.tasks import Task
from dsbs.training.distillation import Term, TermInputs, as_float, ensemble_logprobs
from dsbs.training.distillation.local_teachers import (
    LocalTeacher,
    teacher_runners,
    teachers_fingerprint,
)
from dsbs.training.distributed import is_main_process, wait
from dsbs.training.encode import Encoded, PackedBatch, collate, rows_of
from dsbs.training.losses import IGNORED
from dsbs.training.methods import BOTH, View

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["kl", "reverse", "js"]


class ResponseTerm(Term):
    """Learn the local teachers' token distributions."""

    divergence: Divergence = "kl"
    """kl: KL(teacher ‖ student); reverse: KL(student ‖ teacher); js: Jensen-Shannon."""
    share: float = Field(0.5, gt=0, lt=1)
    """js: the teacher's share β of the mixture that both are compared with."""
    temperature: float = Field(1.0, gt=0)
    """Divides the logits; its square multiplies the term."""
    targets: Annotated[
        tuple[Literal["label", "rationale"], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = ("label", "rationale")
    """Whose tokens are compared; for methods that write both in one text, all tokens."""
    top_k: int | None = Field(None, gt=0)
    """How many of the likeliest tokens are cached on disk. None: computed in every step."""

    description: ClassVar[str] = "It also learned the token probabilities of a local teacher."
    citation: ClassVar[str] = "Hinton et al., 2015, arXiv:1503.02531"

    @property
    def needs_teacher(self) -> bool:
        return True

    def compared_views(self, views: Sequence[View]) -> list[str]:
        """The views whose tokens are compared: those in ``targets``, and texts that hold both."""
        return [
            view.target
            for view in views
            if view.supervised and (view.target in self.targets or view.target not in BOTH)
        ]

    def problem(self, method: str, views: Sequence[View], task: Task) -> str | None:
        if self.compared_views(views):
            return None
        return f"compares {' and '.join(self.targets)} tokens, which {method} does not learn"

    def teacher_views(self, views: Sequence[View]) -> list[str]:
        return self.compared_views(views)

    def loss(self, inputs: TermInputs) -> Tensor | float:
        """The mean over each view's tokens, the views weighted as their own losses are."""
        weights: dict[str, float] = {}
        for view in self.compared_views(inputs.views):
            weight = inputs.step.weights.get(view, 0)
            if weight > 0:
                weights[view] = weight
        total_weight = sum(weights.values())
        loss: Tensor | float = 0.0
        for view, weight in weights.items():
            if view in inputs.batch:
                share = weight / total_weight / inputs.step.counts[view]
                loss = loss + self._summed(inputs, view) * share
        return loss

    def _summed(self, inputs: TermInputs, view: str) -> Tensor:
        """The divergences of a view's tokens, summed."""
        packed = inputs.batch[view]
        counted = packed.target != IGNORED
        student = inputs.student.logits[view]
        if self.title in inputs.cached_vocabulary:
            vocabulary = inputs.cached_vocabulary[self.title]
            ids, logprobs = packed.teacher_top_k[self.title]
            return top_k_response_loss(
                student[counted][:, :vocabulary],
                ids[counted],
                logprobs[counted],
                temperature=self.temperature,
                divergence=self.divergence,
                share=self.share,
            )
        teachers = [teacher.logits[view] for teacher in inputs.teachers]
        vocabulary = min(logits.shape[1] for logits in (student, *teachers))
        teacher = inputs.teacher_logprobs(
            [logits[counted][:, :vocabulary] for logits in teachers], self.temperature
        )
        return response_loss(
            student[counted][:, :vocabulary],
            teacher,
            temperature=self.temperature,
            divergence=self.divergence,
            share=self.share,
        )


def response_loss(
    student: Tensor, teacher: Tensor, *, temperature: float, divergence: Divergence, share: float
) -> Tensor:
    """student (M, V) logits, teacher (M, V) log-probabilities at T -> (): T² · Σ_m D_m in nats.

    With p the teacher's and q = softmax(student / T), D is KL(p ‖ q) for kl, KL(q ‖ p) for reverse,
    and for js β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q, β = share. T² keeps the
    gradient's size as T grows (arXiv:1503.02531, section 2.1).
    """
    q = (as_float(student) / temperature).log_softmax(dim=-1)
    return temperature**2 * _summed_divergence(as_float(teacher), q, divergence, share)


def top_k_response_loss(
    student: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    *,
    temperature: float,
    divergence: Divergence,
    share: float,
) -> Tensor:
    """``response_loss`` over K tokens and one bucket for all others: student (M, V) logits -> ().

    ``ids`` and ``logprobs`` (M, K) are the teacher's K tokens for each target token and their
    log-probabilities at T, normalized over all V. The bucket has the rest of 1 on each side:
    KL is at most the full one (data-processing inequality), and the student learns how much
    probability the other tokens have, but not which. K = V is the full term.
    """
    import torch

    q_all = (as_float(student) / temperature).log_softmax(dim=-1)
    q = q_all.gather(-1, ids)
    p = as_float(logprobs)
    if ids.shape[-1] < q_all.shape[-1]:
        q_rest = q_all.scatter(-1, ids, -math.inf).logsumexp(dim=-1, keepdim=True)
        # rounding on disk may leave nothing, or less, for the rest; its logarithm must stay finite
        p_rest = -torch.expm1(p.logsumexp(dim=-1, keepdim=True))
        p = torch.cat([p, p_rest.clamp_min(torch.finfo(p.dtype).eps).log()], dim=-1)
        q = torch.cat([q, q_rest], dim=-1)
    return temperature**2 * _summed_divergence(p.log_softmax(dim=-1), q, divergence, share)


def _summed_divergence(p: Tensor, q: Tensor, divergence: Divergence, share: float) -> Tensor:
    """p, q (M, N) log-probabilities of teacher and student -> (): summed divergences in nats."""
    import torch

    p = p.detach().clamp_min(torch.finfo(p.dtype).min)  # 0 · log 0 is 0, not NaN
    if divergence == "kl":
        return _summed_kl(p, q)
    if divergence == "reverse":
        return _summed_kl(q, p)
    mixture = torch.logaddexp(p + math.log(share), q + math.log1p(-share))
    return share * _summed_kl(p, mixture) + (1 - share) * _summed_kl(q, mixture)


def _summed_kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) of log-probabilities, summed over all rows, in nats."""
    from torch.nn.functional import kl_div

    return kl_div(q, p, reduction="sum", log_target=True)


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
    vocabulary: int,
    folder: Path,
    rows: Sequence[Encoded],
    batch_size: int,
    progress: Progress,
    title: str,
) -> dict[str, TeacherLogprobs]:
    """By term with ``top_k``, its teachers' log-probabilities for all ``rows``.

    Those that ``folder`` lacks are computed first, ``batch_size`` rows at a time. ``vocabulary`` is
    the student's number of entries.
    """
    cached: dict[str, TeacherLogprobs] = {}
    for term in terms:
        if not isinstance(term, ResponseTerm) or term.top_k is None:
            continue
        shared = min([vocabulary, *(teacher.model().config.vocab_size for teacher in teachers)])
        top_k = min(term.top_k, shared)
        key = digest(
            teachers_fingerprint(teachers),
            canonical_json([term.temperature, top_k, shared, section.ensemble]),
        )
        names = term.compared_views(views)
        compared = [view for view in views if view.target in names]
        keys = {row_key for row in rows for row_key in _keys_of(row, compared)}
        logprobs = TeacherLogprobs(folder / key[:32], shared, compared, keys)
        ask_teachers = _top_k_asker(term, section, compared, teachers, top_k, shared)
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
) -> _AskTeachers:
    """A function that runs the teachers on a batch and returns their ``top_k`` likeliest tokens."""
    import torch

    target_device = torch.device(device())
    runners = teacher_runners(teachers, views, section, target_device)
    weights = [teacher.weight for teacher in teachers]

    def ask_teachers(batch: Mapping[str, PackedBatch]) -> dict[str, tuple[Tensor, Tensor]]:
        inputs: dict[str, PackedBatch] = {
            view.target: batch[view.target].to(target_device)
            for view in views
            if view.target in batch
        }
        answers: dict[str, tuple[Tensor, Tensor]] = {}
        with torch.inference_mode():
            outputs = [runner(inputs) for runner in runners]
            for view in inputs:
                logprobs = ensemble_logprobs(
                    [output.logits[view][:, :vocabulary] for output in outputs],
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
