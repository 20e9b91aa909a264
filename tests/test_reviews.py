"""Reviews: the file that loses no acknowledged decision, which of them count, and the overlay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dsbs.config import TaskSection
from dsbs.errors import UserError
from dsbs.records import Annotation, Example, Sample, TeacherName
from dsbs.records.reviews import (
    Review,
    apply_gold,
    apply_reviews,
    current_reviews,
    deciding_review,
    read_reviews,
    write_reviews,
)
from dsbs.run_folder import RunFolder, append_review
from dsbs.tasks import make_task
from dsbs.training.rows import vote_distribution

TASK = make_task(
    TaskSection.model_validate(
        {"name": "classification", "labels": ["cat", "dog", "bird"], "data": {"train": "x.csv"}}
    )
)


def review(decision: str = "accepted", *, at: int = 0, **fields: Any) -> Review:
    time = f"2026-11-26T10:{at // 60:02}:{at % 60:02}+00:00"
    values = {"id": "1", "shown": "cat", "reviewer": "ada", "time": time, "decision": decision}
    values |= fields
    return Review.model_validate(values)


def annotation(**fields: Any) -> Annotation:
    samples = [
        Sample(text="", label="cat", rationale="It purrs."),
        Sample(text="", label="cat", rationale="It has whiskers."),
        Sample(text="", label="dog", rationale="It barks."),
    ]
    values = {
        "id": "1",
        "input": {"text": "an animal"},
        "gold": "cat",
        "label": "cat",
        "own_label": "cat",
        "rationale": "It purrs.",
        "provenance": "own",
        "samples": samples,
        "vote_share": 2 / 3,
        "accepted": True,
        "teacher": TeacherName(kind="openai", model="m"),
    }
    return Annotation.model_validate(values | fields)


def overlaid(of_row: Sequence[Review], **fields: Any) -> Annotation:
    return apply_reviews({"1": annotation(**fields)}, {"1": of_row}, TASK)["1"]


# --- the file


DECISIONS = st.builds(
    lambda decision, text, reviewer, at, sampled: review(
        decision,
        at=at,
        id=text or "1",
        reviewer=reviewer,
        sampled=sampled,
        comment=text,
        **({"rationale": text, "label": "dog"} if decision == "corrected" else {}),
    ),
    st.sampled_from(["accepted", "corrected", "rejected", "skipped", "undone"]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.sampled_from(["ada", "grace", "Ⅷ\u2028"]),
    st.integers(0, 3599),
    st.booleans(),
)


@settings(max_examples=30, deadline=None)
@given(st.lists(DECISIONS, max_size=6), st.binary(max_size=12), st.data())
def test_every_saved_decision_is_read_whatever_a_killed_process_left_behind(
    decisions: list[Review], torn: bytes, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "review" / "train.jsonl"
        split = data.draw(st.integers(0, len(decisions)))
        write_reviews(path, decisions[:split])
        half = b'{"schema": "dsbs.review/1", ' + torn.replace(b"\n", b"")
        with path.open("ab") as file:
            file.write(half)
        write_reviews(path, decisions[split:])
        by_id: dict[str, list[Review]] = {}
        for decision in decisions:
            by_id.setdefault(decision.id, []).append(decision)
        assert read_reviews(path) == by_id
        assert half not in path.read_bytes() or not decisions


def test_a_last_line_without_its_line_break_counts_and_is_not_glued_to_the_next(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    assert read_reviews(folder.reviews("train")) == {}
    append_review(folder, "train", review())
    path = folder.reviews("train")
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert read_reviews(path) == {"1": [review()]}
    append_review(folder, "train", review("rejected", at=1))
    assert read_reviews(path) == {"1": [review(), review("rejected", at=1)]}


def test_decisions_of_many_threads_are_all_saved(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: append_review(folder, "train", review(id=str(n))), range(40)))
    assert sorted(map(int, read_reviews(folder.reviews("train")))) == list(range(40))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_process_loses_no_decision_that_it_acknowledged(tmp_path: Path) -> None:
    program = f"""
import itertools
from dsbs.records.reviews import Review
from dsbs.run_folder import RunFolder, append_review
for n in itertools.count():
    time = "2026-11-26T10:00:00+00:00"
    review = Review(id=str(n), decision="rejected", reviewer="ada", time=time)
    append_review(RunFolder({str(tmp_path)!r}), "train", review)
    print(n, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        while process.stdout.readline() not in (b"20\n", b""):
            pass
        process.send_signal(signal.SIGKILL)
        acknowledged = 20 + len(process.stdout.readlines())
    saved = read_reviews(RunFolder(tmp_path).reviews("train"))
    assert set(saved) >= {str(n) for n in range(acknowledged + 1)}


def test_a_wrong_line_is_an_error_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    write_reviews(path, [review()])
    with path.open("a") as file:
        file.write('{"id": "2"}\n')
    with pytest.raises(UserError, match=r"train.jsonl:2: not a review \(decision: Field required"):
        read_reviews(path)


@pytest.mark.parametrize(
    "fields",
    [
        {"decision": "corrected"},
        {"decision": "accepted", "shown": None},
        {"decision": "accepted", "label": "dog"},
        {"gold": "dog"},
        {"decision": "skipped", "gold_is_wrong": True},
        {"time": "2026-11-26T10:00:00"},
        {"reviewer": ""},
    ],
)
def test_a_decision_that_contradicts_itself_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        review(**fields)


# --- which decisions count


def test_undo_takes_back_the_same_reviewers_previous_decision() -> None:
    decisions = [review("rejected", at=0), review("accepted", at=1), review("undone", at=2)]
    assert deciding_review(decisions) == decisions[0]
    assert deciding_review([*decisions, review("undone", at=3)]) is None
    assert deciding_review([*decisions, review("undone", at=3), review("undone", at=4)]) is None
    other = review("undone", at=3, reviewer="grace")
    assert deciding_review([*decisions, other]) == decisions[0]


def test_the_latest_reviewer_decides_and_one_who_skips_does_not() -> None:
    late = review("rejected", at=9, reviewer="grace")
    early = review("accepted", at=1)
    assert deciding_review([late, early]) == late
    zoned = late.model_copy(update={"time": "2026-11-26T12:00:02+02:00"})
    assert deciding_review([zoned, early]) == zoned  # 10:00:02 in UTC
    skipped = review("skipped", at=10, reviewer="grace")
    assert deciding_review([early, late, skipped]) == early
    assert current_reviews([early, late, skipped]) == {"ada": early, "grace": skipped}


# --- the overlay


def test_rows_without_a_decision_are_the_same_objects() -> None:
    rows = {"1": annotation(), "2": annotation(id="2")}
    for reviews in ({}, {"3": [review(id="3")]}, {"1": [review("skipped")]}):
        assert all(apply_reviews(rows, reviews, TASK)[key] is row for key, row in rows.items())


def test_an_accepted_annotation_teaches_what_it_taught() -> None:
    accepted = overlaid([review()])
    assert accepted == annotation(provenance="reviewed")


def test_a_rejected_annotation_is_not_used() -> None:
    rejected = overlaid([review("rejected")])
    assert (rejected.accepted, rejected.reject_reason) == (False, "rejected-in-review")


def test_another_label_takes_the_reason_of_a_reply_with_it_or_the_one_written() -> None:
    dog = overlaid([review("corrected", label="dog")])
    assert (dog.label, dog.own_label, dog.provenance) == ("dog", "dog", "reviewed")
    assert dog.rationale == "It barks." and {s.label for s in dog.samples} == {"dog"}
    bird = overlaid([review("corrected", label="bird")])
    assert bird.rationale is None and [s.label for s in bird.samples] == ["bird"]
    written = overlaid([review("corrected", label="bird", rationale="It sings.")])
    assert (written.label, written.rationale) == ("bird", "It sings.")


def test_an_edited_rationale_replaces_the_old_one_everywhere() -> None:
    edited = overlaid([review("corrected", rationale="It says meow.")])
    assert (edited.label, edited.rationale) == ("cat", "It says meow.")
    rationales = [sample.rationale for sample in edited.samples]
    assert rationales == [None, "It has whiskers.", "It barks."]


def test_a_row_that_was_rejected_or_hinted_is_used_once_somebody_accepts_it() -> None:
    rejected = {"label": None, "rationale": None, "accepted": False, "reject_reason": "too-short"}
    accepted = overlaid([review()], **rejected)
    assert accepted.accepted and accepted.reject_reason is None
    assert (accepted.label, accepted.rationale) == ("cat", "It purrs.")
    hinted = overlaid([review()], own_label="dog", provenance="hinted")
    assert (hinted.own_label, hinted.provenance, hinted.rationale) == (
        "cat", "reviewed", "It purrs.",
    )  # fmt: skip
    assert {sample.label for sample in hinted.samples} == {"cat"}


def test_gold_marked_wrong_is_the_one_given_else_the_label_that_is_right() -> None:
    rows = [Example("1", {"text": "an animal"}, "bird"), Example("2", {"text": "x"}, "cat")]
    annotations = {"1": annotation(gold="bird")}

    def gold(decision: Review) -> str | None:
        first, second = apply_gold(rows, {"1": [decision]}, TASK)
        assert second is rows[1]
        overlay = apply_reviews(annotations, {"1": [decision]}, TASK)["1"]
        assert overlay.gold == first.label
        return first.label

    assert gold(review()) == "bird"
    assert gold(review(gold_is_wrong=True)) == "cat"
    assert gold(review("corrected", label="dog", gold_is_wrong=True)) == "dog"
    assert gold(review("rejected", gold_is_wrong=True, gold="dog")) == "dog"
    assert gold(review("rejected", gold_is_wrong=True)) is None


def test_a_decision_outlasts_a_new_annotation_of_the_row() -> None:
    dog = {"label": "dog", "own_label": "dog", "rationale": "It barks."}
    accepted = overlaid([review()], **dog)
    assert (accepted.label, accepted.rationale) == ("cat", "It purrs.")
    assert overlaid([review("rejected")], **dog) == annotation(**dog)


def test_votes_for_other_labels_are_not_taught_after_a_correction() -> None:
    before = overlaid([review()])
    assert vote_distribution(before, ["cat", "dog", "bird"], TASK) == [2 / 3, 1 / 3, 0]
    for label, votes in (("dog", [0, 1, 0]), ("bird", [0, 0, 1])):
        corrected = overlaid([review("corrected", label=label)])
        assert vote_distribution(corrected, ["cat", "dog", "bird"], TASK) == votes


def test_a_label_that_the_task_has_no_longer_is_an_error_that_names_the_row() -> None:
    fish = review("corrected", label="fish")
    with pytest.raises(UserError, match="ada's review of row '1' has label 'fish'"):
        overlaid([fish])
    wrong = review("rejected", gold_is_wrong=True, gold="fish")
    with pytest.raises(UserError, match="which is not one of the task's labels"):
        apply_gold([Example("1", {"text": "an animal"}, "cat")], {"1": [wrong]}, TASK)


def test_a_label_in_an_earlier_spelling_is_written_as_the_task_writes_it_now() -> None:
    old = review("corrected", label="DOG", gold_is_wrong=True, gold="Dog")
    assert overlaid([old]).label == "dog"
    (row,) = apply_gold([Example("1", {"text": "an animal"}, "cat")], {"1": [old]}, TASK)
    assert row.label == "dog"
