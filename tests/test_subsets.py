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
    classes = [() if label is None else (label,) for label in labels]
    few = subset_indices(order, f"{number}-per-label", classes)
    many = subset_indices(order, f"{number + more}-per-label", classes)
    assert few == sorted(few) and set(few) <= set(many)
    available = Counter(label for label in labels if label is not None)
    assert Counter(labels[index] for index in few) == {
        label: min(number, count) for label, count in available.items()
    }


@given(st.lists(st.sets(st.sampled_from("abc")), min_size=1), st.integers(1, 6), st.integers(0, 6))
def test_rows_of_several_labels_count_for_each(
    classes: list[set[str]], number: int, more: int
) -> None:
    order = list(range(len(classes)))
    few = subset_indices(order, f"{number}-per-label", classes)
    assert set(few) <= set(subset_indices(order, f"{number + more}-per-label", classes))
    for label in "abc":
        of_label = [index for index in order if label in classes[index]]
        assert set(of_label[:number]) <= set(few)
    first = {i for label in "abc" for i in [i for i in order if label in classes[i]][:number]}
    assert set(few) == first


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
