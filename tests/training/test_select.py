"""train.select: which annotations pass, and how many of each label a student learns from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import good_answer
from loopback import LoopbackServer

from dsbs import annotate, load_recipe
from dsbs.config import DataSection, SelectSection, TaskSection
from dsbs.records import Annotation, TeacherName
from dsbs.tasks import make_task
from dsbs.tasks.data import position
from dsbs.training.grid import grid
from dsbs.training.rows import Data, Row, gather, select_annotations

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
        {
            "schema": "dsbs.annotation/1",
            "id": f"r{number}",
            "input": {},
            "label": label,
            "gold": gold,
        }
        | fields
        | {"teacher": TeacherName(kind="openai")}
    )


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
def test_an_annotation_passes_when_it_meets_every_condition(
    section: dict[str, object], passed: list[int]
) -> None:
    selected = select_annotations(ROWS, SelectSection.model_validate(section), TASK)
    assert [row.id for row in selected] == [f"r{i}" for i in passed]


def data(count: int, max_per_label: int | None) -> Data:
    """Two rows of three are annotated with the first label."""
    labels = ["shipping" if i % 3 == 0 else "billing" for i in range(count)]
    rows = [
        Row(f"r{i}", "text", None, label, ("why",), annotated=(label,))
        for i, label in enumerate(labels)
    ]
    order = sorted(range(count), key=lambda i: position(rows[i].id, "subset"))
    return Data(rows, [], "gold", {}, order, [], max_per_label)


def annotated(rows: Sequence[Row]) -> set[str]:
    return {row.id for row in rows if row.teacher is not None}


def test_a_smaller_maximum_chooses_among_the_rows_of_a_larger_one() -> None:
    few = annotated(data(60, 5).subset(1.0))
    more = annotated(data(60, 15).subset(1.0))
    assert (len(few), len(more)) == (10, 30) and few < more
    assert len(data(60, 5).subset(1.0)) == 60, "the other rows keep their gold labels"


def test_the_maximum_counts_the_annotations_of_the_subset() -> None:
    rows = data(80, 9).subset(0.25)
    labels = Counter(row.teacher for row in rows if row.teacher is not None)
    unlimited = Counter(row.teacher for row in data(80, None).subset(0.25))
    assert len(rows) == 20
    assert labels == {label: min(9, number) for label, number in unlimited.items()}
    assert max(unlimited.values()) > 9


def test_held_out_rows_do_not_count_towards_the_maximum(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        overrides = [
            f"teacher.base_url={server.url}",
            "task.data.valid_fraction=0.4",
            "train.methods=distill",
            "train.select.max_per_label=8",
        ]
        recipe = load_recipe(toy(), overrides)
        annotate(recipe, out=tmp_path / "run")
    task = make_task(recipe.task)
    rows = gather(recipe, task, tmp_path / "run", grid(recipe.train)).subset(1.0)
    before = Counter(row.gold for row in rows)
    assert Counter(row.teacher for row in rows if row.teacher) == {
        label: min(8, number) for label, number in before.items()
    }
