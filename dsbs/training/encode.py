"""Encoding: rows to token ids, and token ids to packed batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from dsbs.config import LabelSource
from dsbs.files import digest
from dsbs.formatting import percent
from dsbs.students.long_texts import WINDOW_SEPARATOR
from dsbs.training.losses import IGNORED
from dsbs.training.methods import View
from dsbs.training.rows import Row
from dsbs.training.tokens import Ids, Tokens

if TYPE_CHECKING:
    from torch import Tensor

# By a view's target: (input ids, target ids) of each text that the view may write.
Encoded = dict[str, list[tuple[Ids, Ids]]]


@dataclass(frozen=True, slots=True)
class ViewTargets:
    """One view's inputs and targets of all rows."""

    pairs: NDArray[np.int32]
    """(P, 2) indices into ``Tokens`` of inputs and targets."""
    ends: NDArray[np.int64]
    """Row i has the pairs from ends[i] to ends[i + 1]."""


class EncodedRows(Sequence[Encoded]):
    """A student's rows: those with a target in at least one view."""

    def __init__(self, tokens: Tokens, views: Mapping[str, ViewTargets]) -> None:
        self._tokens = tokens
        self._views = views
        counts = sum(np.diff(targets.ends) for targets in views.values())
        self._rows = np.flatnonzero(counts)

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each view, the numbers of tokens of its inputs and of its targets, unordered."""
        lengths = {}
        for name, targets in self._views.items():
            inputs = self._tokens.lengths(targets.pairs[:, 0])
            lengths[name] = inputs, self._tokens.lengths(targets.pairs[:, 1])
        return lengths

    @overload
    def __getitem__(self, row: int) -> Encoded: ...
    @overload
    def __getitem__(self, row: slice) -> list[Encoded]: ...
    def __getitem__(self, row: int | slice) -> Encoded | list[Encoded]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        i = self._rows[row]
        encoded: Encoded = {}
        for name, targets in self._views.items():
            pairs = targets.pairs[targets.ends[i] : targets.ends[i + 1]]
            if len(pairs):
                encoded[name] = [(self._tokens[source], self._tokens[to]) for source, to in pairs]
        return encoded


class Encoder:
    """Encodes rows as the inputs and targets of one student's views."""

    def __init__(
        self,
        tokens: Tokens,
        max_input_tokens: int,
        max_target_tokens: int,
        classes: Sequence[str] = (),
        *,
        scores_choices: bool = False,
        reads_windows: bool = False,
    ) -> None:
        """``classes``: the labels of a label head, whose targets are their indices.

        ``scores_choices``: the label view has a sequence for each choice of a row, with target 1
        for the right one and 0 for the others. ``reads_windows``: it has one for each window of a
        text.
        """
        self._tokens = tokens
        self._max_input = max_input_tokens
        self._max_target = max_target_tokens
        self._class_of = {label: index for index, label in enumerate(classes)}
        self._scores_choices = scores_choices
        self._reads_windows = reads_windows

    def rows(self, rows: Sequence[Row], views: Sequence[View], labels: LabelSource) -> EncodedRows:
        """The rows with a target in at least one view; a view without a target is left out."""
        encoded: dict[str, ViewTargets] = {}
        for view in views:
            if self._scores_choices and view.target == "label":
                encoded[view.target] = self._choices(rows, view, labels)
                continue
            targets = [row.targets(view.target, labels) for row in rows]
            # Without the label that it explains, a rationale would train the wrong task.
            chosen = [
                i
                for i, texts in enumerate(targets)
                if texts and rows[i].label(labels) and view.supervised
            ]
            sources = [[rows[i].text] * len(targets[i]) for i in chosen]
            written = [targets[i] for i in chosen]
            if self._reads_windows and view.target == "label":
                # each window of a text is a sequence with the row's class
                sources = [rows[i].text.split(WINDOW_SEPARATOR) for i in chosen]
                written = [
                    texts * len(windows) for texts, windows in zip(written, sources, strict=True)
                ]
            counts = np.zeros(len(rows), np.int64)
            counts[chosen] = list(map(len, sources))
            inputs = self._tokens.indices(view.prefix, list(chain(*sources)), self._max_input)
            outputs = self._outputs(view, list(chain(*written)))
            pairs = np.stack([inputs, outputs], axis=1)
            ends = np.concatenate([[0], np.cumsum(counts)])
            encoded[view.target] = ViewTargets(pairs, ends)
        return EncodedRows(self._tokens, encoded)

    def _choices(self, rows: Sequence[Row], view: View, labels: LabelSource) -> ViewTargets:
        """The choices of the rows with a label. Of equal choices, the first is the right one."""
        texts: list[str] = []
        is_right: list[int] = []
        counts = np.zeros(len(rows), np.int64)
        for i, row in enumerate(rows):
            label = row.label(labels)
            if label is None:
                continue
            names = [choice for choice, _ in row.choices]
            right = names.index(label)
            texts += [view.prefix + text for _, text in row.choices]
            is_right += [int(choice == right) for choice in range(len(names))]
            counts[i] = len(names)
        inputs = self._tokens.indices("", texts, self._max_input)
        outputs = self._tokens.class_rows(2)[is_right]
        ends = np.concatenate([[0], np.cumsum(counts)])
        return ViewTargets(np.stack([inputs, outputs], axis=1), ends)

    def _outputs(self, view: View, texts: Sequence[str]) -> NDArray[np.int32]:
        """The indices of a view's targets: token ids, or the class of a label."""
        if self._class_of and view.target == "label":
            classes = self._tokens.class_rows(len(self._class_of))
            return classes[[self._class_of[text] for text in texts]]
        return self._tokens.indices("", texts, self._max_target, target=True)

    def texts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of texts as targets."""
        indices = self._tokens.indices("", texts, self._max_target, target=True)
        return [self._tokens[index].tolist() for index in indices]

    def soft_labels(
        self, rows: Sequence[Row], view: View, labels: LabelSource
    ) -> dict[bytes, NDArray[np.float32]]:
        """The annotations' distributions over the task's labels (L,), by the ids of their input.

        Of the rows with a label; rows with equal inputs share the mean of theirs.
        """
        voted = [row for row in rows if row.votes is not None and row.label(labels) is not None]
        votes: dict[bytes, list[tuple[float, ...]]] = {}
        for row, key in zip(voted, self.input_keys(voted, view), strict=True):
            votes.setdefault(key, []).append(row.votes or ())
        return {key: np.asarray(np.mean(v, axis=0), np.float32) for key, v in votes.items()}

    def input_keys(self, rows: Sequence[Row], view: View) -> list[bytes]:
        """The bytes of each row's input ids (int64), as a packed batch holds them."""
        indices = self._tokens.indices(view.prefix, [row.text for row in rows], self._max_input)
        return [self._tokens[index].astype(np.int64).tobytes() for index in indices]

    def truncation_warnings(self, rows: EncodedRows, windows: int = 1) -> Iterator[str]:
        """Warnings of inputs and targets that reach their limit: what is longer is cut.

        ``windows``: how many times ``student.max_input_tokens`` the limit of inputs is.
        """
        key = "max_input_tokens" if windows == 1 else f"max_input_tokens in {windows} windows"
        for name, (sources, targets) in rows.lengths().items():
            end = ""
            if name == "rationale-then-label":
                end = ", and so is the label at their end"
            yield from _truncated("inputs", sources, self._max_input, key)
            yield from _truncated(
                f"{name} targets", targets, self._max_target, "max_target_tokens", end
            )


def _truncated(
    texts: str, lengths: NDArray[np.int64], limit: int, key: str, end: str = ""
) -> Iterator[str]:
    share = float((lengths >= limit).mean()) if len(lengths) else 0.0
    if share > 0:
        shown = percent(share) if share >= 0.0005 else "less than 0.1%"
        yield f"{shown} of the {texts} reach student.{key} ({limit}): longer ones are cut{end}"


class ResampledRows:
    """Rows in which each view keeps one of its texts, sampled anew in each epoch.

    The sample depends on seed, epoch and row alone, so that a resumed training repeats it.
    """

    def __init__(self, rows: Sequence[Encoded], seed: int) -> None:
        self._rows = rows
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Encoded:
        number = int(digest(f"{self._seed}:{self.epoch}:{i}")[:15], 16)
        return {
            name: pairs if name == "label" else [pairs[number % len(pairs)]]
            for name, pairs in self._rows[i].items()
        }


class PaddedDataset:
    """Rows, and past their end any number of empty ones, whose targets count in no loss."""

    def __init__(self, rows: Sequence[Encoded], target: str) -> None:
        self._rows = rows
        source, _ = next(iter(rows[0].values()))[0]
        self._empty: Encoded = {target: [(source, np.array([IGNORED]))]}

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Encoded:
        return self._rows[i] if i < len(self._rows) else self._empty


def encoded_hash(rows: Sequence[Encoded]) -> str:
    """A hash of all ids; part of a student's fingerprint."""
    state = hashlib.sha256()
    for row in rows:
        for name, pairs in sorted(row.items()):
            lists = [
                (np.asarray(source).tolist(), np.asarray(target).tolist())
                for source, target in pairs
            ]
            state.update(repr((name, lists)).encode())
        state.update(b";")
    return state.hexdigest()


def soft_labels_hash(soft_labels: Mapping[bytes, NDArray[np.float32]]) -> str:
    state = hashlib.sha256()
    for ids, votes in sorted(soft_labels.items()):
        state.update(hashlib.sha256(ids).digest() + votes.tobytes())
    return state.hexdigest()


@dataclass(slots=True)
class PackedBatch:
    """One view's B sequences of a batch, concatenated without padding; N input and M target tokens.

    ``soft_labels``, ``teacher_top_k`` and ``teacher_inputs`` are set for the loss terms that need
    them.
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
    teacher_inputs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """By local teacher that does not read the student's tokens: its own ids (N,) of the B inputs,
    and their lengths (B,)."""

    def to(self, device: Any, *, non_blocking: bool = False) -> PackedBatch:
        """This batch on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """This batch in page-locked memory; PyTorch's DataLoader calls it."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        moved: dict[str, Any] = {}
        for name in ("rows", "source", "source_lengths", "target", "target_lengths"):
            moved[name] = change(getattr(self, name))
        if self.soft_labels is not None:
            moved["soft_labels"] = change(self.soft_labels)
        for name in ("teacher_top_k", "teacher_inputs"):
            pairs = getattr(self, name).items()
            moved[name] = {key: (change(first), change(second)) for key, (first, second) in pairs}
        return replace(self, **moved)


def collate(rows: Sequence[Encoded]) -> dict[str, PackedBatch]:
    """Rows -> ``{target: PackedBatch}`` of the views that they have; B differs between views.

    Where rows have several targets, all rows' first ones come first, then their second ones.
    """
    import torch

    batch = {}
    for name in sorted({name for row in rows for name in row}):
        count = max(len(row.get(name, ())) for row in rows)
        order = [
            (k, i) for k in range(count) for i, row in enumerate(rows) if k < len(row.get(name, ()))
        ]
        pairs = [rows[i][name][k] for k, i in order]
        sources = [np.asarray(source) for source, _ in pairs]
        targets = [np.asarray(target) for _, target in pairs]
        batch[name] = PackedBatch(
            rows=torch.tensor([i for _, i in order]),
            source=torch.from_numpy(np.concatenate(sources).astype(np.int64)),
            source_lengths=torch.tensor([len(source) for source in sources]),
            target=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
            target_lengths=torch.tensor([len(target) for target in targets]),
        )
    return batch


def count_targets(packed: PackedBatch) -> int:
    """Target tokens of a batch, without those of empty rows."""
    return int((packed.target != IGNORED).sum())


def count_inputs(batch: Mapping[str, PackedBatch]) -> int:
    """Input tokens of a batch, without those of empty rows."""
    return sum(
        int(packed.source_lengths[supervised_rows(packed)].sum()) for packed in batch.values()
    )


def count_examples(batch: Mapping[str, PackedBatch], view: str | None = None) -> int:
    """Examples of a batch, or of one of its views, without empty rows."""
    views = [packed for name, packed in batch.items() if view in (None, name)]
    rows = (packed.rows[supervised_rows(packed)].tolist() for packed in views)
    return len(set().union(*rows))


def supervised_rows(packed: PackedBatch) -> Tensor:
    """(B,): False for the empty rows that give all processes equally many batches."""
    last_tokens = packed.target[packed.target_lengths.cumsum(0) - 1]
    supervised: Tensor = last_tokens != IGNORED
    return supervised


def rows_of(packed: PackedBatch) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
    """Each sequence's input ids and target ids."""

    def split(ids: Tensor, lengths: Tensor) -> list[NDArray[np.int64]]:
        return np.split(ids.cpu().numpy(), np.cumsum(lengths.cpu().numpy())[:-1])

    sources = split(packed.source, packed.source_lengths)
    targets = split(packed.target, packed.target_lengths)
    return sources, targets


def pad(packed: PackedBatch, pad_id: int, start: int) -> dict[str, Any]:
    """The padded tensors that transformers' models take.

    ``input_ids`` and ``attention_mask`` (B, S), ``labels`` and ``decoder_input_ids`` (B, T);
    ``start`` is the decoder's first token.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    sources = list(torch.split(packed.source, packed.source_lengths.tolist()))
    targets = list(torch.split(packed.target, packed.target_lengths.tolist()))
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


def pad_prompts(packed: PackedBatch, pad_id: int) -> dict[str, Any]:
    """The padded tensors that a decoder takes: prompt and target in one row.

    ``input_ids`` and ``attention_mask`` (B, S), ``labels`` (B, S), at each position the token that
    follows it; IGNORED within the prompt.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids: list[Tensor] = []
    labels: list[Tensor] = []
    sources = torch.split(packed.source, packed.source_lengths.tolist())
    targets = torch.split(packed.target, packed.target_lengths.tolist())
    for source, target in zip(sources, targets, strict=True):
        ids.append(torch.cat([source, target[:-1]]))
        prompt = torch.full_like(source[:-1], IGNORED)
        labels.append(torch.cat([prompt, target]))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
    }
