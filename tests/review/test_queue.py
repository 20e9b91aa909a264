"""The queue: likely mistakes first, random rows among them, and what they say of the teacher."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import TEAMS, toy_rows, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbs import annotate, load_recipe, train
from dsbs.config import DataSection, Recipe, TaskSection
from dsbs.errors import UserError
from dsbs.evaluation.floors import FloorInputs
from dsbs.evaluation.reviewed import agreement, estimate, random_order
from dsbs.evaluation.tfidf import learned_labels
from dsbs.records import Annotation, Example, TeacherName
from dsbs.records.reviews import Review
from dsbs.review.queue import FILTERS, QueueItem, ReviewRow, load_rows, ordered, signs
from dsbs.run_folder import RunFolder
from dsbs.tasks import make_task

TASK = make_task(TaskSection(name="classification", labels=TEAMS, data=DataSection(train="-")))
TEACHER = TeacherName(kind="openai", model="m")


def annotated(row_id: str, label: str | None = "billing", **fields: Any) -> Annotation:
    values: dict[str, Any] = {"id": row_id, "input": {"text": row_id}, "teacher": TEACHER}
    values |= {"label": label, "own_label": label, "accepted": label is not None}
    return Annotation.model_validate(values | fields)


def review_row(row_id: str, label: str | None = "billing", **fields: Any) -> ReviewRow:
    annotation = annotated(row_id, label, **fields.pop("annotation", {}))
    return ReviewRow(
        row_id, {}, row_id, annotation.label, None, annotation.gold, annotation, **fields
    )


def decision(row_id: str, label: str | None = "billing", **fields: Any) -> Review:
    """That ``label`` is right. None: that the annotation is to be rejected."""
    values: dict[str, Any] = {"id": row_id, "shown": "billing", "reviewer": "ada"}
    values |= {"time": "2026-11-26T10:00:00+00:00", "decision": "accepted"}
    if label is None:
        values["decision"] = "rejected"
    elif label != "billing":
        values |= {"decision": "corrected", "label": label}
    return Review.model_validate(values | fields)


# --- order


ROWS = [
    review_row("agreed"),
    review_row("gold", annotation={"gold": "shipping"}),
    review_row("student", student_label="shipping", student_probability=0.97),
    review_row("unsure", student_label="shipping", student_probability=0.3),
    review_row("learned", learned_label="shipping", label_quality=0.05),
    review_row("vote", annotation={"vote_share": 0.6}),
    review_row("alike", alike=(("r9", "shipping"),)),
    review_row("none", None),
]


def test_each_sign_of_a_mistake_says_why_the_row_is_there() -> None:
    reasons = {row.id: [sentence for _, sentence in signs(row, TASK)] for row in ROWS}
    assert reasons == {
        "agreed": [],
        "gold": ["gold is shipping"],
        "student": ["the student says shipping (97.0% sure)"],
        "unsure": [],
        "learned": ["rows like it are shipping; billing has a probability of 5.0%"],
        "vote": ["only 60.0% of the teacher's votes"],
        "alike": ["nearly the same text as r9 (shipping)"],
        "none": [],
    }
    both = review_row(
        "both", student_label="shipping", student_probability=0.6, annotation={"gold": "shipping"}
    )
    assert [sentence for _, sentence in signs(both, TASK)] == [
        "gold is shipping", "the student says shipping (60.0% sure)",
    ]  # fmt: skip
    hinted = {"own_label": "shipping", "provenance": "hinted", "gold": "billing"}
    [(_, sentence)] = signs(review_row("hinted", annotation=hinted), TASK)
    assert sentence == "the teacher said shipping before it was given the gold label"


@pytest.mark.parametrize(
    ("name", "passing"),
    [
        ("gold-differs", ["gold"]),
        ("student-differs", ["student"]),
        ("unlikely", ["learned"]),
        ("low-vote", ["vote"]),
        ("duplicates", ["alike"]),
        ("not-accepted", ["none"]),
    ],
)
def test_a_filter_keeps_the_rows_that_it_names_and_none_is_random(
    name: str, passing: list[str]
) -> None:
    items = ordered(ROWS, TASK, only=[name])
    assert [item.row.id for item in items] == passing
    assert not any(item.sampled for item in items)


def test_every_filter_is_tested_and_an_unknown_one_is_refused() -> None:
    assert len(FILTERS) == 6
    with pytest.raises(UserError, match="no filter 'odd'"):
        ordered(ROWS, TASK, only=["odd"])
    assert [item.row.id for item in ordered(ROWS, TASK, label="shipping")] == []


MANY = [
    review_row(f"r{n}", student_label="shipping", student_probability=0.6 + n / 200)
    if n < 60
    else review_row(f"r{n}", None if n % 20 == 0 else "billing")
    for n in range(200)
]


def test_every_fifth_row_is_the_next_random_one_and_the_others_are_likely_mistakes() -> None:
    items = ordered(MANY, TASK)
    assert sorted(item.row.id for item in items) == sorted(row.id for row in MANY)
    assert [i for i, item in enumerate(items[:50]) if item.sampled] == list(range(4, 50, 5))
    likely = [int(item.row.id[1:]) for item in items[:40] if not item.sampled]
    assert likely == sorted(likely, reverse=True) and max(likely) == 59
    # Whoever follows the queue decides the beginning of the random order without a gap.
    seen = {item.row.id for item in items[:50]}
    labeled = [row.id for row in MANY if row.label is not None]
    assert seen.issuperset(random_order(labeled)[:10])


def test_random_and_file_order_and_decided_rows_at_the_end() -> None:
    def ids(items: Sequence[QueueItem]) -> list[str]:
        return [item.row.id for item in items]

    random_items = ordered(MANY, TASK, order="random")
    labeled = [row.id for row in MANY if row.label is not None]
    assert ids(random_items)[: len(labeled)] == random_order(labeled)
    assert [item.sampled for item in random_items] == [i < len(labeled) for i in range(200)]
    assert ids(ordered(MANY, TASK, order="file")) == [row.id for row in MANY]
    reviews = {"r59": [decision("r59")], "r58": [decision("r58", reviewer="grace")]}
    assert set(ids(ordered(MANY, TASK, reviews=reviews))[-2:]) == {"r59", "r58"}
    assert ids(ordered(MANY, TASK, reviews=reviews, reviewer="ada"))[-1] == "r59"
    assert "r58" in ids(ordered(MANY, TASK, reviews=reviews, reviewer="ada"))[:2]


# --- the teacher's true accuracy


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.4))
def test_the_estimate_is_that_of_the_random_rows_whatever_else_was_reviewed(
    seed: int, wrong_share: float
) -> None:
    rng = random.Random(seed)
    annotations = {f"x{n}": annotated(f"x{n}") for n in range(150)}
    wrong = {row_id for row_id in annotations if rng.random() < wrong_share}
    beginning = random_order(annotations)[:30]
    others = rng.sample(random_order(annotations)[31:], 40)
    reviews = {
        row_id: [decision(row_id, "shipping" if row_id in wrong else "billing")]
        for row_id in [*beginning, *others]
    }
    result = estimate(annotations, reviews, TASK, needed=30)
    assert result.rate is not None and (result.decided, result.other) == (30, 40)
    assert result.rate.correct == sum(row_id not in wrong for row_id in beginning)
    assert estimate(annotations, reviews, TASK, needed=31).missing == 1


def test_before_enough_random_rows_it_says_how_many_are_missing_and_which_count() -> None:
    annotations = {f"x{n}": annotated(f"x{n}") for n in range(300)}
    order = random_order(annotations)
    reviews = {row_id: [decision(row_id)] for row_id in [*order[:40], *order[60:65]]}
    early = estimate(annotations, reviews, TASK)
    assert early.rate is None and early.sentence == (
        "60 more random rows to review before the teacher's true accuracy can be estimated "
        "(40 of 100). 5 other reviewed rows do not count: only random rows show the accuracy on "
        "all."
    )
    reviews |= {row_id: [decision(row_id)] for row_id in order[:98]}
    reviews[order[3]] = [decision(order[3], decision="skipped")]
    reviews[order[4]] = [decision(order[4], None)]
    annotations[order[5]] = annotated(order[5], None)
    reviews |= {row_id: [decision(row_id, "shipping")] for row_id in order[98:101]}
    late = estimate(annotations, reviews, TASK)
    assert late.rate is not None and (late.rate.correct, late.rate.n) == (95, 100)
    assert late.sentence == (
        "The teacher is right on 95.0% of the annotated rows (95% CI [88.8, 97.8]), by 100 random "
        "rows. "
        "1 skipped random row may be harder than most."
    )


def test_where_next_chose_rows_the_estimate_and_the_queue_draw_from_its_random_rows() -> None:
    # Chosen rows are hard: the teacher is wrong on all of them, and right on all random ones.
    chosen = {f"c{n}": annotated(f"c{n}", chosen_by="both") for n in range(60)}
    earlier = {f"e{n}": annotated(f"e{n}") for n in range(10)}
    drawn = {f"r{n}": annotated(f"r{n}", chosen_by="random") for n in range(20)}
    annotations = chosen | earlier | drawn
    reviews = {i: [decision(i, "billing" if i in drawn else "shipping")] for i in annotations}
    result = estimate(annotations, reviews, TASK)
    assert result.rate is not None and (result.rate.correct, result.rate.n) == (20, 20)
    assert (result.needed, result.other) == (20, 70)
    assert result.sentence.startswith("The teacher is right on 100.0% of all rows of the split (")

    rows = [ReviewRow(i, {}, i, row.label, None, None, row) for i, row in annotations.items()]
    items = ordered(rows, TASK)
    sampled = [item.row.id for item in items if item.sampled]
    assert len(sampled) > 5 and sampled == [i for i in random_order(drawn) if i in sampled]
    items = ordered(rows, TASK, order="random")
    assert [item.row.id for item in items[:20]] == random_order(drawn)
    assert [item.sampled for item in items] == [n < 20 for n in range(90)]

    without = estimate(chosen, {i: reviews[i] for i in chosen}, TASK)
    assert without.rate is None and without.sentence.startswith(
        "The teacher's true accuracy cannot be estimated: there are no random rows. 60 other"
    )


def test_rows_without_a_reply_do_not_count_in_the_estimate() -> None:
    annotations = {f"x{n}": annotated(f"x{n}") for n in range(40)}
    missing = {"reject_reason": "no-reply", "accepted": False, "label": None, "own_label": None}
    for n in range(30):
        annotations[f"x{n}"] = annotations[f"x{n}"].model_copy(update=missing)
    assert estimate(annotations, {}, TASK).missing == 10
    reviews = {f"x{n}": [decision(f"x{n}")] for n in range(30, 40)}
    result = estimate(annotations, reviews, TASK)
    assert result.rate is not None and (result.rate.correct, result.rate.n) == (10, 10)


def test_a_rejected_row_is_judged_by_its_gold_label() -> None:
    annotations = {f"x{n}": annotated(f"x{n}", gold="billing") for n in range(4)}
    reviews = {row_id: [decision(row_id, None)] for row_id in annotations}
    reviews["x0"] = [decision("x0", None, gold_is_wrong=True)]
    result = estimate(annotations, reviews, TASK)
    assert result.rate is not None and (result.rate.correct, result.rate.n) == (3, 4)


# --- two reviewers


def test_two_reviewers_are_compared_on_the_rows_that_both_decided_on() -> None:
    ours = {"1": "billing", "2": "billing", "3": "shipping", "4": None, "5": "billing"}
    theirs = {"1": "billing", "2": "shipping", "3": "shipping", "4": None}
    reviews = {row_id: [decision(row_id, label)] for row_id, label in ours.items()}
    for row_id, label in theirs.items():
        reviews[row_id].append(decision(row_id, label, reviewer="grace"))
    reviews["5"].append(decision("5", decision="skipped", reviewer="grace"))
    result = agreement(reviews, TASK)
    assert result is not None and (result.rows, result.agreed) == (4, 3)
    # Observed 3/4, expected (2*1 + 1*2 + 1*1) / 16.
    assert result.kappa == pytest.approx((3 / 4 - 5 / 16) / (1 - 5 / 16))
    low, high = result.kappa_ci95 or (1.0, 0.0)
    assert -1 <= low < result.kappa < high <= 1
    assert result.sentence == (
        "ada and grace agree on 3 of 4 rows that both reviewed, Cohen's kappa 0.64 "
        f"(95% CI [{low:.2f}, {high:.2f}])."
    )
    [(row_id, first, second)] = result.differences
    assert (row_id, first.reviewer, second.label) == ("2", "ada", "shipping")
    assert agreement({"1": [decision("1")]}, TASK) is None
    equations = make_task(TaskSection(name="svamp", data={"train": "-"}))
    spelled = {
        str(n): [decision(str(n), f"{2 * n} / 2"), decision(str(n), f"{n}", reviewer="grace")]
        for n in range(1, 9)
    }
    spelled["9"] = [decision("9", None), decision("9", None, reviewer="grace")]
    assert (by_value := agreement(spelled, equations)) is not None
    assert (by_value.agreed, by_value.kappa) == (9, pytest.approx(1.0))
    same = {"1": [decision("1"), decision("1", reviewer="grace")]}
    assert (only := agreement(same, TASK)) is not None and only.kappa is None


def test_kappa_of_two_reviewers_and_its_interval() -> None:
    from sklearn.metrics import cohen_kappa_score

    labels = ("billing", "shipping", "returns")
    pairs = [(labels[n % 3], labels[(n + (n % 5 == 0)) % 3]) for n in range(300)]
    widths = []
    for rows in (60, 300):
        reviews = {
            str(n): [decision(str(n), ours), decision(str(n), theirs, reviewer="grace")]
            for n, (ours, theirs) in enumerate(pairs[:rows])
        }
        result = agreement(reviews, TASK)
        assert result is not None and result.kappa_ci95 is not None
        assert result.kappa == pytest.approx(cohen_kappa_score(*zip(*pairs[:rows], strict=True)))
        low, high = result.kappa_ci95
        assert low < result.kappa < high
        widths.append(high - low)
    # An independent figure: the large-sample standard error of Cohen (1960) at 80% agreement.
    se = (0.8 * 0.2 / 300) ** 0.5 / (1 - 1 / 3)
    assert widths[0] > 1.8 * widths[1]
    assert widths[1] == pytest.approx(2 * 1.96 * se, rel=0.15)


def test_two_reviewers_who_always_agree_are_not_certain_to() -> None:
    lows = []
    for rows in (4, 400):
        reviews = {
            str(n): [
                decision(str(n), ("billing", "shipping")[n % 2], reviewer=name)
                for name in ("ada", "grace")
            ]
            for n in range(rows)
        }
        result = agreement(reviews, TASK)
        assert result is not None and result.kappa == 1 and result.kappa_ci95 is not None
        lows.append(result.kappa_ci95[0])
        assert result.kappa_ci95[1] == 1
    assert lows[0] < 0.8 and lows[0] < lows[1] < 1


# --- from a run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A teacher that is wrong about r3 and r14, of which r99 is a copy with the right label."""
    folder = tmp_path_factory.mktemp("queue")
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(toy_rows(60)):
        label = TEAMS[(number + (number in (3, 14))) % 2]
        completion = f"The message is about {label}.\nAnswer: {label}"
        rows.append({**row, "teacher": {"completion": completion}})
    right = "The message is about billing.\nAnswer: billing"
    rows.append({**rows[14], "id": "r99", "text": rows[14]["text"].upper()})
    rows[-1]["teacher"] = {"completion": right}
    rows.append({**toy_rows(1)[0], "id": "r100", "text": "Hm.", "teacher": {"completion": "?"}})
    section = {
        "name": "queue",
        "task": {
            "name": "classification",
            "labels": list(TEAMS),
            "columns": {"label": "team"},
            "data": {
                "train": str(write_jsonl(folder / "rows.jsonl", rows)),
                "test": str(write_jsonl(folder / "test.jsonl", toy_rows(4, start=1000))),
            },
        },
        "teacher": {"kind": "recorded"},
        "annotate": {"splits": ["train"]},
        "student": {"init": "scratch", "vocab_size": 200, "max_input_tokens": 32},
        "train": {"methods": ["finetune"], "batch_size": 8, "max_steps": 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(section))
    return load_recipe(folder / "recipe.yaml")


def test_a_runs_rows_have_the_students_answer_likely_labels_and_near_duplicates(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    annotate(recipe, out=run.path)
    rows = {row.id: row for row in load_rows(recipe, run)}
    assert len(rows) == 62 and rows["r3"].student is None
    assert "r3" in {row.id for row in rows.values() if row.learned_label is not None}
    assert (rows["r3"].label, rows["r3"].learned_label) == ("billing", "shipping")
    assert ("r99", "billing") in rows["r14"].alike and ("r14", "shipping") in rows["r99"].alike
    assert rows["r100"].label is None and not rows["r100"].is_accepted
    first = {item.row.id for item in ordered(list(rows.values()), make_task(recipe.task))[:4]}
    assert {"r3", "r14"} <= first

    # The search is kept until a label changes.
    kept = run.review_signs("train").read_bytes()
    monkeypatch.setattr("dsbs.review.queue.near_pairs", None)
    assert {row.id: row for row in load_rows(recipe, run)} == rows
    assert run.review_signs("train").read_bytes() == kept

    [student] = train(recipe, out=run.path).students
    rows = {row.id: row for row in load_rows(recipe, run)}
    assert {row.student for row in rows.values()} == {student.name}
    assert all(row.student_probability is not None for row in rows.values())
    files = [path.name for path in (run.stage("eval") / "predictions" / "review").iterdir()]
    assert files == [f"{student.name}.jsonl"]


def test_a_likely_mistake_among_several_labels_is_learned_too(recipe: Recipe) -> None:
    task = make_task(TaskSection(name="multilabel", labels=TEAMS, data=DataSection(train="-")))
    rows = [Example(row["id"], {"text": row["text"]}, row["team"]) for row in toy_rows(60)]
    pairs = [(row, TEAMS[1] if row.id == "r4" else str(row.label)) for row in rows]
    learned = learned_labels(FloorInputs(recipe.students[None], task, [], train=pairs), 5)
    assert [row_id for row_id, (_, _, is_issue) in learned.items() if is_issue] == ["r4"]
    assert learned["r4"][0] == TEAMS[0] and learned["r4"][1] < 0.5
