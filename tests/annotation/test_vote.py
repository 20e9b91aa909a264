"""Several samples, one answer."""

from __future__ import annotations

import pytest

from dsbs.annotation.vote import majority
from dsbs.config import TaskSection
from dsbs.records import Reason, Sample
from dsbs.tasks import make_task

SVAMP = make_task(TaskSection(name="svamp", data={"train": "-"}))
ESNLI = make_task(TaskSection(name="esnli", data={"train": "-"}))


def sample(label: str, rationale: str | None = "because") -> Sample:
    return Sample(text="…", label=label, rationale=rationale)


def unreadable(reason: Reason) -> Sample:
    return Sample(text="…", reason=reason)


def test_the_majority_label_wins_with_a_rationale_of_its_own() -> None:
    vote = majority(
        [sample("neutral", "n"), sample("entailment", "e1"), sample("entailment", "e2")], ESNLI
    )
    assert (vote.label, vote.rationale, vote.reason) == ("entailment", "e1", None)
    assert vote.share == pytest.approx(2 / 3)


def test_labels_that_the_task_holds_equal_vote_together() -> None:
    vote = majority(
        [
            sample("3.0"),
            sample("( 4.0 + 3.0 )"),
            sample("3.0"),
            sample("( 3.0 + 4.0 )"),
            sample("7.0"),
        ],
        SVAMP,
    )
    assert vote.label == "( 4.0 + 3.0 )"  # as the group's first spells it
    assert vote.share == pytest.approx(3 / 5)


def test_labels_without_a_value_vote_with_their_own_kind() -> None:
    vote = majority([sample("5.0"), sample("( 1.0 / 0.0 )"), sample("( 1.0 / 0.0 )")], SVAMP)
    assert vote.label == "( 1.0 / 0.0 )"


@pytest.mark.parametrize(
    "labels", [("neutral", "entailment"), ("entailment", "neutral", "neutral", "entailment")]
)
def test_of_equal_groups_the_one_named_first_wins(labels: tuple[str, ...]) -> None:
    vote = majority([sample(label) for label in labels], ESNLI)
    assert vote.label == labels[0]
    assert vote.share == pytest.approx(0.5)


def test_unreadable_samples_have_no_vote_and_no_share() -> None:
    vote = majority(
        [unreadable("truncated"), unreadable("empty"), unreadable("unparsed"), sample("neutral")],
        ESNLI,
    )
    assert (vote.label, vote.share, vote.reason) == ("neutral", 1.0, None)


def test_the_first_rationale_that_led_to_the_winner_is_taken() -> None:
    vote = majority(
        [sample("neutral", None), sample("entailment", "e"), sample("neutral", "n")], ESNLI
    )
    assert (vote.label, vote.rationale) == ("neutral", "n")


def test_a_winner_without_any_rationale_borrows_none() -> None:
    vote = majority(
        [sample("neutral", None), sample("entailment", "e"), sample("neutral", None)], ESNLI
    )
    assert (vote.label, vote.rationale) == ("neutral", None)


def test_where_nothing_is_readable_the_first_reason_stands() -> None:
    vote = majority(
        [unreadable("several-answers"), unreadable("truncated"), unreadable("truncated")], ESNLI
    )
    assert (vote.label, vote.rationale, vote.share, vote.reason) == (
        None,
        None,
        None,
        "several-answers",
    )


def test_no_samples_are_no_reply() -> None:
    assert majority([], ESNLI).reason == "no-reply"


def test_one_sample_is_its_own_majority() -> None:
    vote = majority([sample("neutral", "n")], ESNLI)
    assert (vote.label, vote.rationale, vote.share) == ("neutral", "n", 1.0)
