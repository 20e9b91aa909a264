"""Leakage: rows of valid and test that are also in train, and equal inputs with different labels.

Inputs are equal if they differ in nothing but case, white space and Unicode's variants. They are
near-equal if they share at least ``SIMILARITY`` of their characters in the same order; candidates
are rows with a similar set of character n-grams, by MinHash (Broder, 1997) and locality-sensitive
hashing.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from dsbs.formatting import count
from dsbs.records import Example
from dsbs.tasks import Task
from dsbs.tasks.data import comparable

if TYPE_CHECKING:
    import numpy as np

    Signatures = np.ndarray[Any, np.dtype[np.uint32]]

SIMILARITY = 0.9
_NGRAM = 5  # characters
_MAX_CHARACTERS = 5000  # of an input that are compared
# Two inputs with 70% of their n-grams in common are candidates with a probability of 98%.
_BANDS = 15
_BAND_SIZE = 4
_MAX_CANDIDATES = 8  # in each band: rows of one template would all be candidates
_MAX_EXAMPLES = 3

Kind = Literal["equal", "near-equal", "other-label"]


@dataclass(slots=True)
class Overlap:
    """Rows of a split that repeat rows of an earlier split, or of their own."""

    kind: Kind
    """``other-label``: equal inputs whose gold labels differ."""
    earlier: str
    split: str
    total: int
    """The split's number of rows."""
    rows: int = 0
    """The rows of ``split`` that repeat one of ``earlier``."""
    examples: list[tuple[Example, Example]] = field(default_factory=list)
    """The first few: the earlier row and its repetition."""

    def add(self, earlier: Example, row: Example) -> None:
        self.rows += 1
        if len(self.examples) < _MAX_EXAMPLES:
            self.examples.append((earlier, row))

    def as_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "splits": [self.earlier, self.split],
            "rows": self.rows,
            "examples": [
                [{"id": row.id, "line": row.line, "label": row.label} for row in pair]
                for pair in self.examples
            ],
        }

    def warning(self) -> str:
        pairs = "; ".join(
            f"{self._name(row)} and {self.earlier} {self._name(earlier)}"
            for earlier, row in self.examples
        )
        rows = f"{self.split}: {self.rows:,} of {count(self.total, 'row')}"
        if self.kind == "other-label":
            return (
                f"{rows} with an input that has another label in {self.earlier}, e.g. {pairs}; "
                "correct or remove one of each two"
            )
        if self.kind == "near-equal":
            return (
                f"{rows} nearly the same in {self.earlier}, e.g. {pairs}; if they are copies, "
                f"accuracy there is too optimistic: remove them from {self.earlier}"
            )
        return (
            f"{rows} also in {self.earlier}, e.g. {pairs}; accuracy there is too optimistic: "
            f"remove them from {self.earlier}"
        )

    def _name(self, row: Example) -> str:
        label = f", {row.label}" if self.kind == "other-label" else ""
        line = "" if row.line is None else f"line {row.line}"
        details = f"{line}{label}".removeprefix(", ")
        return f"{row.id!r} ({details})" if details else repr(row.id)


def find_overlaps(splits: Mapping[str, Sequence[Example]], task: Task) -> list[Overlap]:
    """Repetitions between splits, and contradicting labels between and within them."""
    inputs = {split: [comparable(row.input) for row in rows] for split, rows in splits.items()}
    overlaps = []
    for earlier, split in combinations(splits, 2):
        equal = Overlap("equal", earlier, split, len(splits[split]))
        near = Overlap("near-equal", earlier, split, len(splits[split]))
        by_input = dict(zip(reversed(inputs[earlier]), reversed(splits[earlier]), strict=True))
        rest = []
        for index, row in enumerate(splits[split]):
            original = by_input.get(inputs[split][index])
            if original is None:
                rest.append(index)
            else:
                equal.add(original, row)
        by_task = bool(task.inputs)
        for index, original_index in _near_equal(inputs[earlier], inputs[split], rest, by_task):
            near.add(splits[earlier][original_index], splits[split][index])
        overlaps += [equal, near]
    overlaps += _contradictions(splits, inputs, task)
    return [overlap for overlap in overlaps if overlap.rows]


def _contradictions(
    splits: Mapping[str, Sequence[Example]],
    inputs: Mapping[str, Sequence[tuple[str, ...]]],
    task: Task,
) -> Iterable[Overlap]:
    """Rows whose label differs from that of the first row with the same input."""
    first_rows: dict[tuple[str, ...], tuple[str, Example]] = {}
    overlaps: dict[tuple[str, str], Overlap] = {}
    for split, rows in splits.items():
        for fields, row in zip(inputs[split], rows, strict=True):
            if row.label is None:
                continue
            earlier, first = first_rows.setdefault(fields, (split, row))
            if first.label is not None and not task.correct(row.label, first.label):
                overlap = overlaps.setdefault(
                    (earlier, split), Overlap("other-label", earlier, split, len(rows))
                )
                overlap.add(first, row)
    return overlaps.values()


# --- near-equal inputs


def near_pairs(rows: Sequence[Example], task: Task) -> list[tuple[int, int]]:
    """The pairs of indices, the smaller one first, of rows with equal or nearly equal inputs.

    Of many rows that are alike, not every pair.
    """
    inputs = [comparable(row.input) for row in rows]
    pairs = _near_equal(inputs, inputs, range(len(inputs)), bool(task.inputs), all_of_them=True)
    return sorted({(min(pair), max(pair)) for pair in pairs if pair[0] != pair[1]})


def _near_equal(
    originals: Sequence[tuple[str, ...]],
    inputs: Sequence[tuple[str, ...]],
    indices: Sequence[int],
    by_field: bool,
    *,
    all_of_them: bool = False,
) -> Iterator[tuple[int, int]]:
    """Yield (index, index of the original) for inputs that are nearly one of the originals, the
    first one or all of them.

    ``by_field``: every field must be similar, else the whole. Two hypotheses about one long
    premise are two examples.
    """
    from rapidfuzz import fuzz

    if not originals or not indices:
        return
    texts = ["\n".join(fields)[:_MAX_CHARACTERS] for fields in originals]
    queries = ["\n".join(inputs[index])[:_MAX_CHARACTERS] for index in indices]
    candidates = _candidates(_signatures(texts), _signatures(queries))
    for number, index in enumerate(indices):
        for candidate in candidates[number]:
            pairs: Iterable[tuple[str, str]] = [(texts[candidate], queries[number])]
            if by_field:
                pairs = zip(originals[candidate], inputs[index], strict=False)
            if all(_ratio_is_high(fuzz.ratio, *pair) for pair in pairs):
                yield index, candidate
                if not all_of_them:
                    break


def _ratio_is_high(ratio: Any, text: str, other: str) -> bool:
    cutoff = 100 * SIMILARITY
    return bool(
        ratio(text[:_MAX_CHARACTERS], other[:_MAX_CHARACTERS], score_cutoff=cutoff) >= cutoff
    )


def _signatures(texts: Sequence[str]) -> Signatures:
    """(texts, bands * band size): the MinHash of each text's character n-grams."""
    import numpy as np
    from datasketch import MinHash

    empty = MinHash(num_perm=_BANDS * _BAND_SIZE, hashfunc=_hash, scheme="affine32")
    signatures = np.empty((len(texts), _BANDS * _BAND_SIZE), dtype=np.uint32)
    for index, text in enumerate(texts):
        signature = empty.copy()
        starts = range(max(1, len(text) - _NGRAM + 1))
        signature.update_batch({text[start : start + _NGRAM] for start in starts})
        signatures[index] = signature.hashvalues
    return signatures


def _hash(ngram: str) -> int:
    return zlib.crc32(ngram.encode("utf-8", "surrogatepass"))


def _candidates(originals: Signatures, queries: Signatures) -> list[list[int]]:
    """For each query the originals with an equal band, those with several equal bands first."""
    import numpy as np

    counts: list[Counter[int]] = [Counter() for _ in queries]
    for first in range(0, _BANDS * _BAND_SIZE, _BAND_SIZE):
        keys = _band_keys(originals[:, first : first + _BAND_SIZE])
        query_keys = _band_keys(queries[:, first : first + _BAND_SIZE])
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        starts = np.searchsorted(keys, query_keys, side="left")
        ends = np.searchsorted(keys, query_keys, side="right")
        for query in np.flatnonzero(ends > starts):
            end = min(ends[query], starts[query] + _MAX_CANDIDATES)
            counts[query].update(order[starts[query] : end].tolist())
    return [[original for original, _ in counter.most_common()] for counter in counts]


def _band_keys(band: Signatures) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """One number for each row of a band, equal for equal rows."""
    import numpy as np

    keys = np.zeros(len(band), dtype=np.uint64)
    for column in band.T:
        keys = keys * np.uint64(0x9E3779B97F4A7C15) + column
    return keys
