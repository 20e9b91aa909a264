"""Votes on several labels, fields and scores, and when they are settled."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from loopback import LoopbackServer, question, read_rows
from pydantic import ValidationError
from several_labels import ROWS, TASKS, recipe_file

from dsbs import annotate, load_recipe
from dsbs.annotation.vote import majority, samples_needed, weighted_majority
from dsbs.config import Recipe, TaskSection
from dsbs.prompting import source_fingerprint
from dsbs.records import Sample
from dsbs.tasks import Task, make_task

TAGS = make_task(TaskSection(name="multilabel", data={"train": "-"}, labels=["a", "b", "c"]))
SCALE = make_task(TaskSection(name="score", data={"train": "-"}, range=(1, 5)))
FIELDS = make_task(
    TaskSection(
        name="extraction",
        data={"train": "-"},
        fields={"name": {"type": "text"}, "total": {"type": "number"}},
    )
)


def samples(*labels: str | None, **each: list[Any]) -> list[Sample]:
    """A sample for each label, None for an unreadable one, with the rationales r0, r1, …"""
    made = []
    for i, label in enumerate(labels):
        values: dict[str, Any] = {"text": "…", "label": label, "rationale": label and f"r{i}"}
        values["reason"] = "unparsed" if label is None else None
        made.append(Sample(**values | {name: of_samples[i] for name, of_samples in each.items()}))
    return made


def test_each_label_wins_by_the_majority_of_the_readable_samples() -> None:
    vote = majority(samples("a; b", None, "a", "b; c", "a; c"), TAGS)
    assert vote.label == "a; b"  # b and c are tied, and the first sample has b and not c
    assert vote.part_shares == {"a": 0.75, "b": 0.5, "c": 0.5}
    assert vote.share == 0.5, "a row is as sure as its least sure part"
    assert vote.rationale == "r0"


def test_a_vote_may_be_for_no_label_and_for_a_set_that_no_sample_has() -> None:
    assert majority(samples("a", "b", "c"), TAGS).label == "none"
    vote = majority(samples("a; b", "b; c", "a; c"), TAGS)
    assert vote.label == "a; b; c"
    assert vote.rationale == "r0" and vote.share == pytest.approx(2 / 3)


def test_fields_win_one_by_one_and_values_that_mean_the_same_vote_together() -> None:
    lines = ["name: Ann\ntotal: 3", "name: ann\ntotal: null", "name: Bob\ntotal: null"]
    vote = majority(samples(*lines), FIELDS)
    assert vote.label == "name: Ann\ntotal: null"
    assert vote.part_shares == pytest.approx({"name": 2 / 3, "total": 2 / 3})
    assert vote.rationale == "r1", "its sample agrees with the whole result"


def test_the_closest_samples_flaw_rejects_the_row() -> None:
    flawed = samples("a", "a", "b; c", reason=["too-short", "copies-exemplar", None])
    vote = majority(flawed, TAGS)
    assert (vote.label, vote.reason, vote.rationale) == ("a", "too-short", None)
    nothing = majority(samples(None, None), TAGS)
    assert nothing.label is None and nothing.reason == "unparsed" and nothing.part_shares is None


@pytest.mark.parametrize(
    ("labels", "median", "mean"),
    [
        (("1", "5", "5"), "5", "4"),
        (("4", "3"), "4", "4"),  # both are as near: the first sampled
        (("3", "4"), "3", "3"),
        (("1", "2", "5", None), "2", "3"),
        (("5", "1", "1", "5"), "5", "3"),
    ],
)
def test_scores_vote_by_their_median_or_mean(
    labels: tuple[str | None, ...], median: str, mean: str
) -> None:
    vote = majority(samples(*labels), SCALE)
    assert vote.label == median
    readable = [label for label in labels if label]
    assert vote.share == pytest.approx(readable.count(median) / len(readable))
    assert majority(samples(*labels), SCALE, "mean").label == mean


@given(st.lists(st.integers(1, 5), min_size=1, max_size=9))
def test_the_median_is_a_sampled_score_between_both_medians(scores: list[int]) -> None:
    vote = majority(samples(*map(str, scores)), SCALE)
    low, high = statistics.median_low(scores), statistics.median_high(scores)
    assert int(vote.label or 0) == next(score for score in scores if score in (low, high))
    assert vote.rationale == f"r{scores.index(int(vote.label or 0))}"
    mean = int(majority(samples(*map(str, scores)), SCALE, "mean").label or 0)
    assert abs(mean - statistics.fmean(scores)) <= 0.5 + 1e-9


def test_an_ensembles_members_vote_by_their_weight() -> None:
    members = samples("1", "4", "5", run=["x", "y", "z"], weight=[3.0, 1.0, 1.0])
    assert weighted_majority(members, SCALE).label == "1"
    assert weighted_majority(members, SCALE, "mean").label == "2"  # 2.4
    tags = samples("a", "b", "b; c", run=["x", "y", "z"], weight=[1.0, 1.0, 1.0])
    vote = weighted_majority(tags, TAGS)
    assert vote.label == "b" and vote.run == "y" and vote.rationale == "r1"
    assert vote.part_shares == pytest.approx({"a": 2 / 3, "b": 2 / 3, "c": 2 / 3})


# --- early stopping

Tags = st.sampled_from(["none", "a", "b", "a; b", "a; b; c", None])
Scores = st.sampled_from(["1", "2", "3", "5", None])
Lines = st.sampled_from(
    ["name: Ann\ntotal: 3", "name: ann\ntotal: 4", "name: Bob\ntotal: null", None]
)


@given(
    st.one_of(
        *(
            st.tuples(st.just(task), st.lists(labels, min_size=1, max_size=7))
            for task, labels in ((TAGS, Tags), (SCALE, Scores), (FIELDS, Lines))
        )
    ),
    st.sampled_from(["median", "mean"]),
)
def test_stopping_early_never_changes_the_label(
    drawn: tuple[Task, list[str | None]], scores: Any
) -> None:
    task, labels = drawn
    everything = samples(*labels)
    requested = 0
    while needed := samples_needed(everything[:requested], len(labels), task, scores):
        requested += needed
    assert requested <= len(labels)
    stopped = majority(everything[:requested], task, scores)
    assert stopped.label == majority(everything, task, scores).label


def test_agreement_stops_early() -> None:
    assert samples_needed([], 5, TAGS) == 3
    assert samples_needed(samples("a; b", "a; b", "a; b"), 5, TAGS) == 0
    assert samples_needed(samples("a; b", "a; b", "a"), 5, TAGS) == 1, "b is open"
    assert samples_needed(samples("4", "4", "4"), 5, SCALE) == 0
    assert samples_needed(samples("4", "4", "4"), 5, SCALE, "mean") == 2


# --- through annotate


def recipe(folder: Path, url: str, **annotate: Any) -> Recipe:
    rows = [{"id": str(i), "text": f"text {i}", "label": 3} for i in range(4)]
    path = str(write_jsonl(folder / "rows.jsonl", rows))
    return Recipe.model_validate(
        {
            "name": "votes",
            "task": {"name": "score", "range": [1, 5], "data": {"train": path, "test": path}},
            "teacher": {"model": "loopback", "base_url": url},
            "annotate": {"splits": ["train"], "samples": 3, "temperature": 0.7} | annotate,
        }
    )


def test_the_choice_of_median_or_mean_costs_no_request(tmp_path: Path) -> None:
    replies = iter(["1", "5", "5"] * 4)
    with LoopbackServer(lambda body, number: f"It is so.\nAnswer: {next(replies)}") as server:
        options = {"stop_early": False, "concurrency": 1}
        by_median = recipe(tmp_path, server.url, **options)
        by_mean = recipe(tmp_path, server.url, **options, score_vote="mean")
        for each, label in ((by_median, "5"), (by_mean, "4")):
            annotate(each, out=tmp_path / "run")
            rows = read_rows(tmp_path / "run")
            assert [row["own_label"] for row in rows] == [label] * 4
            assert "part_shares" not in rows[0]
            assert server.received.total() == 12
    task = make_task(by_mean.task)
    assert source_fingerprint(by_mean, task) != source_fingerprint(by_median, task)


def test_a_score_vote_needs_scores() -> None:
    sections = {
        "name": "votes",
        "task": {"name": "esnli", "data": {"train": "x.csv"}},
        "teacher": {"kind": "human"},
        "annotate": {"score_vote": "mean"},
    }
    with pytest.raises(ValidationError, match=r"annotate.score_vote belongs to score, not to esn"):
        Recipe.model_validate(sections)


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize("kind", list(ROWS))
def test_a_wrong_answer_is_asked_again_with_a_hint(kind: str, form: str, tmp_path: Path) -> None:
    task = make_task(TaskSection.model_validate(TASKS[kind] | {"data": {"train": "-"}}))
    wrong = {"multilabel": "none", "score": "5", "extraction": "kind: bill\nnumber: 7"}[kind]
    gold = {row["text"]: task.gold(row["label"], {}, "row") for row in ROWS[kind](6)}

    def teacher(body: dict[str, Any], number: int) -> str:
        asked = question(body)
        label = gold[next(text for text in gold if text in asked)]
        shown = json.dumps(task.value(label)) if kind == "extraction" else label
        if "right answer" in asked:
            assert f"is: {shown}." in asked, "on one line, with a clear end"
        else:
            label = wrong
        why = "The words of the message say so."
        if form == "json":
            return json.dumps({"rationale": why, "label": task.value(label)})
        return f"{why}\nAnswer: {label}"

    with LoopbackServer(teacher) as server:
        path = recipe_file(tmp_path, kind, teacher={"model": "m", "base_url": server.url})
        changes = ["annotate.hint=true", f"annotate.format={form}", "task.limit=6"]
        annotate(load_recipe(path, [*changes, "annotate.splits=[train]"]), out=tmp_path / "run")
    rows = read_rows(tmp_path / "run")
    hinted = [row for row in rows if row["provenance"] == "hinted"]
    assert len(hinted) == sum(label != wrong for label in gold.values()) >= 4
    for row in rows:
        assert row["accepted"] and row["label"] == row["gold"] and row["own_label"] == wrong
        assert row.get("part_shares") is None or row not in hinted, "the votes were for another one"
        assert row["rationale"] == "The words of the message say so."
