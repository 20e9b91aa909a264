"""Methods and the grid of students; a method registered in one place works in every stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import good_answer
from loopback import LoopbackServer

from dsbs import annotate, evaluate, load_recipe, report, train, validate
from dsbs.config import TrainSection
from dsbs.config.registry import METHODS
from dsbs.students.student import Student
from dsbs.training.grid import grid
from dsbs.training.methods import Method, View, method_of


def test_the_grid_trains_methods_without_labels_of_their_own_on_the_recipes() -> None:
    specs = grid(TrainSection(labels=("gold", "teacher"), seeds=(0, 1)))
    assert [spec.name for spec in specs if spec.seed == 0] == [
        "step-by-step-gold-s0",
        "step-by-step-teacher-s0",
        "finetune-gold-s0",
        "distill-teacher-s0",
    ]
    assert len(specs) == 8


def test_single_task_methods_have_no_prefix_and_step_by_step_has_the_published_ones() -> None:
    train = TrainSection(rationale_weight=0.3)
    views = method_of("step-by-step").views(train)
    assert [(view.prefix, view.weight) for view in views] == [
        ("predict: ", 1.0),
        ("explain: ", 0.3),
    ]
    for name in ("finetune", "distill"):
        assert [(view.target, view.prefix) for view in method_of(name).views(train)] == [
            ("label", "")
        ]


def test_every_method_is_registered_under_its_name_and_has_its_own_color() -> None:
    methods = {name: method_of(name) for name in METHODS}
    assert all(method.name == name for name, method in methods.items())
    assert all(method.description and method.citation for method in methods.values())
    assert len({method.color for method in methods.values()}) == len(methods)


SHOUTED = Method(
    name="shouted",
    title="shouted",
    views=lambda _train: (View("label", "SHOUT: ", 1.0),),
    description="It learned labels after a prefix in capitals.",
    color="#112233",
)


def test_a_method_registered_in_one_place_validates_trains_evaluates_and_is_reported(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "shouted", f"{__name__}:SHOUTED")
    run = tmp_path / "run"
    with LoopbackServer(good_answer) as server:
        overrides = [f"teacher.base_url={server.url}", "train.methods=[shouted, finetune]"]
        recipe = load_recipe(toy(), [*overrides, "train.max_steps=2"])
        validate(recipe)
        annotate(recipe, out=run)
    students = train(recipe, out=run).students
    assert [student.name for student in students] == ["shouted-gold-s0", "finetune-gold-s0"]
    assert Student.load(students[0].path).card.prefixes == {"label": "SHOUT: "}
    systems = {system.name for system in evaluate(recipe, out=run).systems}
    assert {"shouted-gold", "finetune-gold"} <= systems
    report(recipe, out=run)
    card = (Path(students[0].path) / "README.md").read_text(encoding="utf-8")
    assert SHOUTED.description.rstrip(".") in card
