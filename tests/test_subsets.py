"""Subsets of the train rows: shares, and rows of each label."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsbs.config import TrainSection
from dsbs.records.subsets import subset_indices, subset_rank, subset_suffix
from dsbs.training.grid import grid

LABELS = st.lists(st.sampled_from(["billing", "shipping", "returns", None]), min_size=1)


@given(LABELS, st.randoms(), st.integers(1, 6), st.integers(0, 6))
def test_so_many_rows_of_each_label_or_all_that_it_has_nested(
    labels: list[str | None], random: object, number: int, more: int
) -> None:
    order = list(range(len(labels)))
    random.shuffle(order)  # type: ignore[attr-defined]
    few = subset_indices(order, f"{number}-per-label", labels)
    many = subset_indices(order, f"{number + more}-per-label", labels)
    assert few == sorted(few) and set(few) <= set(many)
    available = Counter(label for label in labels if label is not None)
    assert Counter(labels[index] for index in few) == {
        label: min(number, count) for label, count in available.items()
    }


def test_systems_are_named_after_their_subset_shares_first() -> None:
    train = TrainSection.model_validate(
        {"methods": "finetune", "subset": ["5-per-label", 0.5, "10-per-label", 1.0]}
    )
    assert [spec.name for spec in grid(train)] == [
        "finetune-gold-s0",
        "finetune-gold-n0.5-s0",
        "finetune-gold-10-per-label-s0",
        "finetune-gold-5-per-label-s0",
    ]
    assert max(train.subset, key=subset_rank) == 1.0 and subset_suffix(0.125) == "-n0.125"


@pytest.mark.parametrize(
    "subset", [0, 5, "5", "0-per-label", "five-per-label", True, "5-per-lable"]
)
def test_a_subset_is_a_share_or_rows_per_label(subset: object) -> None:
    with pytest.raises(ValueError, match="a number of rows of each label, such as 5-per-label"):
        TrainSection.model_validate({"subset": subset})
