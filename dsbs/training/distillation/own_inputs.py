"""Own inputs: what a local teacher reads where it does not read its student's tokens.

A teacher with another vocabulary, architecture, head or prompt reads the same texts in its own
format, beside the student's packed batch. Its label scores and the means over its inputs are
compared, never its tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsbs.students.card import StudentCard
from dsbs.students.formats import input_format_of
from dsbs.students.tokenizer import load_tokenizer
from dsbs.training.encode import PackedBatch, rows_of
from dsbs.training.losses import IGNORED
from dsbs.training.methods import View

if TYPE_CHECKING:
    from collections.abc import Callable

    from dsbs.training.packed import ForwardOutput

_BATCH = 8192  # texts in one call of the tokenizer


class OwnInputs:
    """The inputs of the teacher in ``folder``, by the bytes of its student's ids (int64).

    ``labels`` are the task's; empty: it has no closed set.
    """

    def __init__(self, folder: str, card: StudentCard, labels: Sequence[str]) -> None:
        target, prefix = next(iter(card.prefixes.items()))
        self.view = View("label", prefix, 1.0, start=card.starts.get(target, "pad"))
        self._limit = card.max_input_tokens
        self._format = input_format_of(load_tokenizer(folder), card.kind, card.template)
        self._ids: dict[bytes, NDArray[np.int32]] = {}
        self.label_ids: list[list[int]] = []
        """The label texts as the teacher writes them; empty: it has a label head."""
        if card.head == "text" and labels:
            self.label_ids = self._format.write(labels, card.max_target_tokens)

    def add(self, keys: Sequence[bytes], texts: Sequence[str]) -> None:
        """Tokenize the texts, without a prefix, whose keys are new."""
        new = [pair for pair in zip(keys, texts, strict=True) if pair[0] not in self._ids]
        for first in range(0, len(new), _BATCH):
            chunk = new[first : first + _BATCH]
            rows = self._format.read([self.view.prefix + text for _, text in chunk], self._limit)
            for (key, _), token_ids in zip(chunk, rows, strict=True):
                self._ids[key] = np.asarray(token_ids, np.int32)

    def of(self, packed: PackedBatch) -> tuple[Any, Any]:
        """A view's packed rows -> the ids (N,) that the teacher reads, and their lengths (B,)."""
        import torch

        filler = next(iter(self._ids.values()))
        rows = [
            filler if target[-1] == IGNORED else self._ids[source.tobytes()]
            for source, target in zip(*rows_of(packed), strict=True)
        ]
        ids = torch.from_numpy(np.concatenate(rows).astype(np.int64))
        return ids, torch.tensor([len(row) for row in rows])


def own_batch(packed: PackedBatch, teacher: str) -> dict[str, PackedBatch]:
    """The batch of a teacher with own inputs: those of the student's first view, without targets.

    A target is one token that nothing compares; IGNORED still marks the empty rows.
    """
    import torch

    source, lengths = packed.teacher_inputs[teacher]
    last = packed.target[packed.target_lengths.cumsum(0) - 1]
    first_view = replace(
        packed,
        source=source,
        source_lengths=lengths,
        target=torch.where(last == IGNORED, IGNORED, 0),
        target_lengths=torch.ones_like(packed.target_lengths),
        teacher_inputs={},
        teacher_top_k={},
        soft_labels=None,
    )
    return {"label": first_view}


def on_own_inputs(
    runner: Callable[[Mapping[str, PackedBatch]], ForwardOutput], teacher: str, first_view: str
) -> Callable[[Mapping[str, PackedBatch]], ForwardOutput]:
    """A runner for the batches of a teacher's student, whose first view is ``first_view``.

    Its output has no logits to compare.
    """
    from dsbs.training.packed import DistinctInputs, ForwardOutput

    def run(batch: Mapping[str, PackedBatch]) -> ForwardOutput:
        if first_view not in batch:
            return ForwardOutput({}, [], [], None, DistinctInputs([], [], {}), "label")
        output = runner(own_batch(batch[first_view], teacher))
        return replace(output, logits={}, decoder_states=[])

    return run
