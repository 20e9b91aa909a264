"""Selection: what passes, what stays out, and that nothing is asked for it."""

from __future__ import annotations

import pytest

from dsbs.config import DataSection, SelectSection, TaskSection
from dsbs.records.rows import Annotation, TeacherName
from dsbs.tasks import make_task
from dsbs.training.select import select

TASK = make_task(TaskSection(name="svamp", data=DataSection(train="x.jsonl")))


def row(
    number: int,
    label: str | None = "( 1.0 + 1.0 )",
    gold: str | None = "( 2.0 * 1.0 )",
    **more: object,
) -> Annotation:
    fields: dict[str, object] = {
        "vote_share": 1.0,
        "provenance": "own",
        "accepted": label is not None,
    } | more
    return Annotation.model_validate(
        {"schema": "dsbs.annotation/1", "id": f"r{number}", "input": {}, "label": label, "gold": gold} | fields
        | {"teacher": TeacherName(kind="openai")}
    )  # fmt: skip


ROWS = [
    row(0),
    row(1, label="( 5.0 - 1.0 )"),
    row(2, vote_share=0.4),
    row(3, provenance="hinted"),
    row(4, gold=None),
    row(5, label=None),
]


@pytest.mark.parametrize(
    ("section", "passed"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"agree_gold": True}, [0, 2, 3]),
        ({"min_vote": 0.5}, [0, 1, 3, 4]),
        ({"provenance": "own"}, [0, 1, 2, 4]),
        ({"agree_gold": True, "min_vote": 0.5, "provenance": ["own", "hinted"]}, [0, 3]),
    ],
)
def test_an_annotation_passes_when_it_meets_all_that_is_asked(
    section: dict[str, object], passed: list[int]
) -> None:
    assert sorted(select(ROWS, SelectSection.model_validate(section), TASK)) == [
        f"r{i}" for i in passed
    ]


def test_at_most_so_many_of_a_label_the_smaller_choice_inside_the_larger() -> None:
    rows = [row(i, label="( 1.0 + 1.0 )" if i % 3 else "( 3.0 - 1.0 )") for i in range(60)]
    few, more = (set(select(rows, SelectSection(max_per_label=n), TASK)) for n in (5, 15))
    assert len(few) == 10 and len(more) == 30 and few < more
    assert set(select(rows[::-1], SelectSection(max_per_label=5), TASK)) == few
