"""From rows to token ids and batches: what each method's student reads and is to write."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from dsbs.config import LabelSource
from dsbs.files import digest
from dsbs.training.losses import IGNORED
from dsbs.training.methods import View
from dsbs.training.rows import Row
from dsbs.training.tokens import Ids, Tokens

if TYPE_CHECKING:
    from torch import Tensor

Encoded = dict[
    str, list[tuple[Ids, Ids]]
]  # target of a view -> (input ids, target ids), as many as it may write


@dataclass(frozen=True, slots=True)
class Taught:
    """What one view is taught: ``pairs`` (P, 2), places of inputs' and targets' tokens; row i has ends[i] to ends[i + 1]."""

    pairs: NDArray[np.int32]
    ends: NDArray[np.int64]


class EncodedRows(Sequence[Encoded]):
    """A student's rows: those that teach at least one view."""

    def __init__(self, tokens: Tokens, views: Mapping[str, Taught]) -> None:
        self._tokens, self._views = tokens, views
        counts = sum(np.diff(taught.ends) for taught in views.values())
        self._rows = np.flatnonzero(counts)

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each view, the numbers of tokens of its inputs and of its targets, in no order."""
        pairs = {name: taught.pairs for name, taught in self._views.items()}
        return {
            name: (self._tokens.lengths(pair[:, 0]), self._tokens.lengths(pair[:, 1]))
            for name, pair in pairs.items()
        }

    @overload
    def __getitem__(self, row: int) -> Encoded: ...
    @overload
    def __getitem__(self, row: slice) -> list[Encoded]: ...
    def __getitem__(self, row: int | slice) -> Encoded | list[Encoded]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        i = self._rows[row]
        found = {
            name: taught.pairs[taught.ends[i] : taught.ends[i + 1]]
            for name, taught in self._views.items()
        }
        return {
            name: [(self._tokens[source], self._tokens[target]) for source, target in pairs]
            for name, pairs in found.items()
            if len(pairs)
        }


class Encoder:
    """Makes rows into what one student's views read and write."""

    def __init__(self, tokens: Tokens, max_input_tokens: int, max_target_tokens: int) -> None:
        self._tokens = tokens
        self._max_input, self._max_target = max_input_tokens, max_target_tokens

    def rows(self, rows: Sequence[Row], views: Sequence[View], labels: LabelSource) -> EncodedRows:
        """Rows that teach at least one view. A view whose target is missing from a row is left out of it."""
        taught: dict[str, Taught] = {}
        for view in views:
            targets = [row.targets(view.target, labels) for row in rows]
            # without the label that it explains, a rationale teaches the wrong task; with λ = 0 it teaches nothing
            chosen = [
                i
                for i, texts in enumerate(targets)
                if texts and rows[i].label(labels) and view.taught
            ]
            counts = np.zeros(len(rows), np.int64)
            counts[chosen] = [len(targets[i]) for i in chosen]
            inputs = self._tokens.places(
                view.prefix, [rows[i].text for i in chosen], self._max_input
            )
            outputs = self._tokens.places(
                "", [text for i in chosen for text in targets[i]], self._max_target, target=True
            )
            pairs = np.stack([np.repeat(inputs, counts[chosen]), outputs], axis=1)
            taught[view.target] = Taught(pairs, np.concatenate([[0], np.cumsum(counts)]))
        return EncodedRows(self._tokens, taught)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts as they are written."""
        return [
            self._tokens[place].tolist()
            for place in self._tokens.places("", texts, self._max_target, target=True)
        ]

    def soft(
        self, rows: Sequence[Row], view: View, labels: LabelSource
    ) -> dict[bytes, NDArray[np.float32]]:
        """The annotations' distributions over the task's labels (L,) of the rows that teach, by the ids of ``view``'s input.

        Rows that read the same share the mean of theirs.
        """
        known = [row for row in rows if row.votes is not None and row.label(labels) is not None]
        found: dict[bytes, list[tuple[float, ...]]] = {}
        places = self._tokens.places(view.prefix, [row.text for row in known], self._max_input)
        for row, place in zip(known, places, strict=True):
            found.setdefault(self._tokens[place].astype(np.int64).tobytes(), []).append(
                row.votes or ()
            )
        return {key: np.asarray(np.mean(votes, axis=0), np.float32) for key, votes in found.items()}

    def cut(self, rows: EncodedRows) -> Iterator[str]:
        """Warnings of inputs and targets that are as long as they may be: what was longer is cut."""
        for name, (sources, targets) in rows.lengths().items():
            for what, lengths, limit, key in (
                ("inputs", sources, self._max_input, "max_input_tokens"),
                (f"{name} targets", targets, self._max_target, "max_target_tokens"),
            ):
                share = float((lengths >= limit).mean()) if len(lengths) else 0.0
                if share > 0:
                    lost = (
                        ", and with their end the label"
                        if name == "rationale-then-label" and what != "inputs"
                        else ""
                    )
                    part = f"{100 * share:.1f} %" if share >= 0.0005 else "less than 0.1 %"
                    yield f"{part} of the {what} reach student.{key} ({limit}): what is longer is cut{lost}"


class Drawn:
    """Rows of which each view that may write several targets writes one, drawn anew in each epoch.

    The draw depends on seed, epoch and row alone, so that a resumed training draws as an undisturbed one.
    """

    def __init__(self, rows: Sequence[Encoded], seed: int) -> None:
        self._rows, self._seed = rows, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Encoded:
        draw = int(digest(f"{self._seed}:{self.epoch}:{i}")[:15], 16)
        return {name: [pairs[draw % len(pairs)]] for name, pairs in self._rows[i].items()}


class PaddedDataset:
    """Rows, and past their end as many empty ones as are asked for: they are read like others and teach nothing."""

    def __init__(self, rows: Sequence[Encoded], target: str) -> None:
        self._rows = rows
        source, _ = next(iter(rows[0].values()))[0]
        self._empty: Encoded = {target: [(source, np.array([IGNORED]))]}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Encoded:
        return self._rows[i] if i < len(self._rows) else self._empty


def encoded_hash(rows: Sequence[Encoded]) -> str:
    state = hashlib.sha256()
    for row in rows:
        for name, pairs in sorted(row.items()):
            plain = [
                (np.asarray(source).tolist(), np.asarray(target).tolist())
                for source, target in pairs
            ]
            state.update(repr((name, plain)).encode())
        state.update(b";")
    return state.hexdigest()


def soft_hash(soft: Mapping[bytes, NDArray[np.float32]]) -> str:
    state = hashlib.sha256()
    for ids, votes in sorted(soft.items()):
        state.update(hashlib.sha256(ids).digest() + votes.tobytes())
    return state.hexdigest()


@dataclass(slots=True)
class PackedBatch:
    """One view's B sequences of a batch, concatenated without padding; N input and M target tokens.

    ``soft_labels`` and ``teacher_top_k`` are set for the loss terms that need them.
    """

    rows: Tensor
    """(B,) index in the batch of each sequence's example."""
    source: Tensor
    """(N,) input ids."""
    source_lengths: Tensor
    """(B,)"""
    target: Tensor
    """(M,) target ids, IGNORED in the empty rows of a ``PaddedDataset``."""
    target_lengths: Tensor
    """(B,)"""
    soft_labels: Tensor | None = None
    """(B, L) probabilities of the task's labels; zeros where a row has none."""
    teacher_top_k: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By term: ids (M, K) and log-probabilities (M, K) of the teachers' K likeliest tokens."""

    def to(self, device: Any, *, non_blocking: bool = False) -> PackedBatch:
        """This batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """This batch in page-locked memory; PyTorch's DataLoader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        moved: dict[str, Tensor] = {}
        for name in ("rows", "source", "source_lengths", "target", "target_lengths"):
            moved[name] = change(getattr(self, name))
        if self.soft_labels is not None:
            moved["soft_labels"] = change(self.soft_labels)
        top_k = {
            term: (change(ids), change(logprobs))
            for term, (ids, logprobs) in self.teacher_top_k.items()
        }
        return replace(self, **moved, teacher_top_k=top_k)


def collate(rows: Sequence[Encoded]) -> dict[str, PackedBatch]:
    """Rows -> ``{target: PackedBatch}`` of the views that they teach, without padding; B differs between views.

    Where a row has several targets, all rows' first ones come first, then their second ones.
    """
    import torch

    batch = {}
    for name in sorted({name for row in rows for name in row}):
        most = max(len(row.get(name, ())) for row in rows)
        here = [
            (k, i) for k in range(most) for i, row in enumerate(rows) if k < len(row.get(name, ()))
        ]
        pairs = [rows[i][name][k] for k, i in here]
        sources = [np.asarray(source) for source, _ in pairs]
        targets = [np.asarray(target) for _, target in pairs]
        batch[name] = PackedBatch(
            rows=torch.tensor([i for _, i in here]),
            source=torch.from_numpy(np.concatenate(sources).astype(np.int64)),
            source_lengths=torch.tensor([len(source) for source in sources]),
            target=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            target_lengths=torch.tensor([len(target) for target in targets]),
        )
    return batch


def rows_of(flat: PackedBatch) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Each row's input ids and target ids."""

    def split(ids: Tensor, lengths: Tensor) -> list[NDArray[np.int64]]:
        return np.split(ids.cpu().numpy(), np.cumsum(lengths.cpu().numpy())[:-1])

    sources = split(flat.source, flat.source_lengths)
    targets = split(flat.target, flat.target_lengths)
    return sources, targets


def pad(flat: PackedBatch, pad_id: int, start: int) -> dict[str, Any]:
    """Flat rows -> input_ids and attention_mask (B, S), labels and decoder_input_ids (B, T), as transformers' models take them.

    ``start`` is the token that the decoder begins with.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    sources = list(torch.split(flat.source, flat.source_lengths.tolist()))
    targets = list(torch.split(flat.target, flat.target_lengths.tolist()))
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    shifted = labels.roll(1, dims=1)
    shifted[shifted == IGNORED] = pad_id
    shifted[:, 0] = start
    return {
        "input_ids": pad_sequence(sources, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sources], batch_first=True),
        "decoder_input_ids": shifted,
        "labels": labels,
    }
