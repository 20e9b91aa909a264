"""Subsets of the train rows: a share of them, or a number of rows of each label (few-shot)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence

Subset = float | str
"""A share in (0, 1], or ``5-per-label``: five rows of each label."""

PER_LABEL = r"[1-9][0-9]*-per-label"


def rows_per_label(subset: Subset) -> int | None:
    """The rows of each label in a subset; None where it is a share of all rows."""
    if isinstance(subset, str) and re.fullmatch(PER_LABEL, subset):
        return int(subset.partition("-")[0])
    return None


def subset_suffix(subset: Subset) -> str:
    """What a subset adds to the names of its systems: nothing for all rows."""
    if subset == 1:
        return ""
    return f"-{subset}" if isinstance(subset, str) else f"-n{subset:g}"


def subset_text(subset: Subset) -> str:
    """A subset as a recipe spells it."""
    return subset if isinstance(subset, str) else f"{subset:g}"


def subset_rank(subset: Subset | None) -> tuple[bool, float]:
    """The order of subsets, small ones first; a share counts as larger than rows per label."""
    if subset is None:
        return False, 0.0
    number = rows_per_label(subset)
    return number is None, float(subset if number is None else number)


def subset_indices(
    order: Sequence[int], subset: Subset, classes: Sequence[Collection[str]]
) -> list[int]:
    """The indices of a subset's rows, ascending. A smaller subset's are among a larger one's.

    ``order`` is the rows' ``subset_order``, ``classes`` each row's labels: a subset per label has
    the first so many rows of each, some of which may be the same rows. A label with fewer rows than
    a subset asks for gives all of them; rows without a label are in no subset per label.
    """
    number = rows_per_label(subset)
    if number is None:
        return sorted(order[: max(1, round(float(subset) * len(order)))])
    counts: Counter[str] = Counter()
    indices = []
    for index in order:
        if any(counts[label] < number for label in classes[index]):
            indices.append(index)
        counts.update(classes[index])
    return sorted(indices)
