"""Several students in one run: from the recipe to the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import good_answer
from label_heads import save_encoder
from loopback import LoopbackServer
from reporting.sample_run import make_run

from dsbs import UserError, annotate, evaluate, load_recipe, train
from dsbs.compression.source import find_source
from dsbs.config import EvalSection, Recipe
from dsbs.config.diff import entries
from dsbs.config.load import read_recorded, resolved_values
from dsbs.evaluation.metrics import Scored
from dsbs.evaluation.predictions import best_student
from dsbs.evaluation.systems import (
    System,
    compare,
    compare_with_floors,
    first_baselines,
    label_efficiencies,
    pairs,
    student_pairs,
)
from dsbs.project.runs import list_runs
from dsbs.project.validate import validate
from dsbs.records import TrainedStudent
from dsbs.records.results import Comparison, Results, SystemResult, read_results
from dsbs.records.sentences import student_sentences
from dsbs.reporting.card import write_cards
from dsbs.reporting.figures import draw_figures
from dsbs.reporting.figures.style import series_styles
from dsbs.reporting.run import render
from dsbs.reporting.runs import load_run
from dsbs.reporting.tables import accuracy_table
from dsbs.training.run import planned

SMALL = {"init": "scratch", "vocab_size": 200, "max_input_tokens": 64, "max_target_tokens": 32}


def written(toy: Callable[..., Path], students: dict[str, Any], **sections: Any) -> Path:
    """A toy recipe with these students, and more keys of other sections."""
    path = toy()
    recipe = json.loads(path.read_text(encoding="utf-8"))
    for name, keys in sections.items():
        recipe[name] |= keys
    recipe["student"] = students
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load_recipe(path, overrides)
    return str(error.value)


# --- the recipe


def test_a_mapping_of_names_is_several_students_with_settings_of_their_own(
    toy: Callable[..., Path],
) -> None:
    own = {"learning_rate": 0.003, "max_epochs": 2, "tune": {"weight_decay": [0, 0.1]}}
    path = written(toy, {"big": SMALL | {"size": "mini", "train": own}, "t5": SMALL, "x": None})
    recipe = load_recipe(path)
    students = recipe.students
    assert list(students) == ["big", "t5", "x"]
    assert students["big"].student.size == "mini"
    big = students["big"].train
    assert (big.learning_rate, big.max_epochs, big.max_steps) == (0.003, 2, None)
    assert big.tune is not None
    assert (students["t5"].train.learning_rate, students["t5"].train.max_steps) == (0.001, 6)
    assert students["t5"].train.tune is None
    restored = read_recorded({"recipe": json.loads(recipe.model_dump_json())})
    assert restored is not None
    for name, student in students.items():
        assert restored.students[name].training == student.training


def test_a_name_does_not_change_what_a_student_is(toy: Callable[..., Path]) -> None:
    (alone,) = load_recipe(toy()).students.values()
    named = load_recipe(written(toy, {"t5": SMALL})).students["t5"]
    assert alone.student_name is None
    assert named.training == alone.training


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ({"init": "scratch"}, "a5c97b96f6b70bdac42c95768828f45ae5681e5fff0e39a1a82b3756d9eb498e"),
        (
            {"model": "google/t5-v1_1-base"},
            "c180ac80e4f68c3036ddbbb6a6e618b1386a6e744b013d107b9bc8da60666f97",
        ),
    ],
)
def test_students_of_before_there_were_several_are_kept(
    student: dict[str, str], expected: str
) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "x",
            "task": {"name": "svamp", "data": {"train": "train.csv"}},
            "teacher": {"model": "m"},
            "student": student,
        }
    )
    assert recipe.students[None].training == expected


def test_mistakes_have_their_lines_and_names(toy: Callable[..., Path]) -> None:
    students = {
        "a/b": SMALL,
        "t5": SMALL | {"sise": "mini", "train": {"batchsize": 3, "seeds": [1], "max_steps": 0}},
        "lora": SMALL | {"train": {"lora": {}}},
        "T5": {"size": "huge", "train": {"micro_batch_size": 3}},
    }
    text = problems_of(written(toy, students))
    for expected in (
        "student.t5.sise: unknown key; did you mean 'size'?",
        "student.t5.train.batchsize: unknown key; did you mean 'batch_size'?",
        "student.t5.train.seeds: all students share this setting",
        "student.t5.train.max_steps: input should be greater than 0",
        "student.T5.size: input should be 'nano', 'mini' or 'small'",
    ):
        assert expected in text
    lines = written(toy, students).read_text(encoding="utf-8").splitlines()
    line = next(i for i, line in enumerate(lines, 1) if '"sise"' in line)
    assert f":{line}: student.t5.sise" in text
    for name, wrong in (("t5", ("sise", "train")), ("T5", ("size",))):
        students[name] = {k: v for k, v in students[name].items() if k not in wrong}
    text = problems_of(written(toy, students))
    for expected in (
        "student.a/b: 'a/b': a name may contain only letters",
        "student.lora.train: train.lora adapts pretrained weights",
        "student.T5: T5 and t5 differ only in case",
        "student.T5.train: train.batch_size must be a multiple of train.micro_batch_size",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("students", "problem"),
    [
        ({"modle": "x"}, "student.modle: unknown key; did you mean 'model'?"),
        ({"rationale_decodr": {"layers": 1}}, "did you mean 'rationale_decoder'?"),
        ({"t5": {}, "model": "x"}, "t5: names of students beside keys of a single one (model)"),
        ({"model": "x", "train": {"max_steps": 3}}, "only students with names have settings"),
        ({"model": {"size": "nano"}}, "student.model: must be text (given: a mapping)"),
    ],
)
def test_keys_tell_one_student_from_several(
    toy: Callable[..., Path], students: dict[str, Any], problem: str
) -> None:
    assert problem in problems_of(written(toy, students))


def test_show_lists_each_students_settings_with_the_defaults_of_train(
    toy: Callable[..., Path],
) -> None:
    recipe = load_recipe(
        written(toy, {"t5": SMALL | {"train": {"learning_rate": 0.01}}, "x": {"model": "y"}})
    )
    lines = {entry.key: entry for entry in entries(resolved_values(recipe))}
    assert lines["student.t5.train.learning_rate"].value == 0.01
    assert lines["student.t5.train.learning_rate"].default == 0.001
    assert lines["student.t5.train.head_learning_rate"].value == 0.1
    assert not lines["student.t5.train.head_learning_rate"].is_changed
    assert "student.x.train.batch_size" not in lines
    assert all(entry.is_known for entry in lines.values())


def test_a_method_that_a_head_cannot_learn_is_refused_with_the_student(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    students = {"t5": SMALL, "choice": SMALL | {"head": "labels"}}
    path = written(toy, students, train={"methods": ["finetune", "rationale-then-label"]})
    recipe = load_recipe(path)
    for check in (validate, lambda recipe: train(recipe, out=tmp_path / "run")):
        with pytest.raises(UserError, match=r"student choice: .*rationale-then-label") as error:
            check(recipe)
        assert "head is labels" in str(error.value)
    assert not (tmp_path / "run" / "train").exists()


# --- a run


@pytest.fixture
def run(toy: Callable[..., Path], tmp_path: Path) -> Iterator[tuple[Recipe, Path]]:
    """A recipe of an encoder and a T5 on a toy run whose teacher has answered."""
    model = str(save_encoder(tmp_path / "encoder"))
    students = {
        "minilm": {"model": model, "max_target_tokens": 16, "train": {"learning_rate": 0.003}},
        "t5": SMALL,
    }
    with LoopbackServer(good_answer) as server:
        path = written(
            toy,
            students,
            teacher={"base_url": server.url},
            train={"methods": ["step-by-step", "finetune"], "seeds": [0, 1], "max_steps": 2},
            eval={"floors": ["majority"], "latency_calls": 2},
        )
        recipe = load_recipe(path)
        annotate(recipe, out=tmp_path / "run")
    yield recipe, tmp_path / "run"


def test_two_students_by_two_methods_and_two_seeds(run: tuple[Recipe, Path]) -> None:
    recipe, folder = run
    validation = validate(recipe)
    assert list(validation.splits["train"]["students"]) == ["minilm", "t5"]
    names = [
        f"{student}-{method}-gold-s{seed}"
        for student in ("minilm", "t5")
        for seed in (0, 1)
        for method in ("step-by-step", "finetune")
    ]
    plan = planned(recipe, folder)
    assert [(entry["name"], entry["student"]) for entry in plan] == [
        (name, name.partition("-")[0]) for name in names
    ]
    result = train(recipe, out=folder)
    assert [student.name for student in result.students] == names
    assert [student["student"] for student in result.as_json()["students"]] == 4 * [
        "minilm"
    ] + 4 * ["t5"]
    assert all(entry["done"] for entry in planned(recipe, folder))
    (state,) = list_runs(folder)
    assert (state.finished, state.planned) == (8, 8)

    results = evaluate(recipe, out=folder)
    systems = {system.name: system for system in results.systems}
    assert [name for name in systems if systems[name].kind == "student"] == [
        "minilm-finetune-gold",
        "minilm-step-by-step-gold",
        "t5-finetune-gold",
        "t5-step-by-step-gold",
    ]
    assert systems["t5-finetune-gold"].student == "t5"
    assert (results.headline, results.baseline) == (
        "minilm-step-by-step-gold",
        "minilm-finetune-gold",
    )
    assert list(systems["t5-step-by-step-gold"].versus) == ["t5-finetune-gold"]
    assert list(systems["minilm-finetune-gold"].versus_students) == ["t5-finetune-gold"]
    assert list(systems["t5-finetune-gold"].versus_floors) == ["majority"]
    assert "The most accurate student is" in (folder / "eval" / "results.md").read_text("utf-8")
    cards = write_cards(load_run(folder))
    assert folder / "train" / "t5-finetune-gold-s1" / "README.md" in cards
    assert Path(best_student(recipe, folder)).name in names
    source = find_source(folder / "train" / "minilm-finetune-gold-s0")
    assert source.recipe.student_name == "minilm"
    assert source.recipe.train.learning_rate == 0.003


# --- made-up systems


def made(student: str | None, method: str, right: float, subset: float = 1.0) -> System:
    """A system of one seed on 100 rows, of which the first are right."""
    prefix = "" if student is None else f"{student}-"
    share = "" if subset == 1.0 else f"-n{subset:g}"
    record = TrainedStudent(
        name=f"{prefix}{method}-gold{share}-s0",
        student=student,
        method=method,
        labels="gold",
        seed=0,
        path="x",
        valid_accuracy=0.5,
        best_step=1,
        steps=1,
        examples_per_s=1,
        wall_s=1,
        parameters=1,
        fingerprint="f",
        subset=subset,
    )
    scored = Scored([], [], [], np.arange(100) < 100 * right)
    return System(record.system, "student", [scored], [record], training_rows=int(400 * subset))


def floor(name: str, start_of: str | None = None) -> System:
    scored = Scored([], [], [], np.arange(100) < 30)
    return System(name, "floor", [scored], floor=name, start_of=start_of)


def grid_of(*students: str | None) -> list[System]:
    return [
        made(student, method, 0.5 + 0.1 * number + 0.05 * better, subset)
        for number, student in enumerate(students)
        for subset in (1.0, 0.5)
        for better, method in enumerate(("finetune", "step-by-step"))
    ]


def test_methods_are_compared_within_a_student_and_students_by_the_same_method() -> None:
    systems = grid_of("a", "b", "c")
    teacher = System("teacher", "teacher", [Scored([], [], [], np.ones(100, dtype=bool))])
    within = {(one.name, other.name) for one, other in pairs([teacher, *systems], EvalSection())}
    assert within == {
        (f"{name}-step-by-step-gold{share}", f"{name}-finetune-gold{share}")
        for name in "abc"
        for share in ("", "-n0.5")
    } | {("teacher", f"{name}-finetune-gold") for name in "abc"}
    across = [(one.name, other.name) for one, other in student_pairs(systems)]
    assert len(across) == 2 * 3  # by each method, each two of the students
    assert ("a-finetune-gold", "c-finetune-gold") in across
    assert ("b-step-by-step-gold", "a-step-by-step-gold") not in across
    assert student_pairs(grid_of(None)) == []


def test_one_correction_covers_methods_and_students() -> None:
    systems = grid_of("a", "b")
    chosen = [*pairs(systems, EvalSection()), *student_pairs(systems)]
    comparisons = compare(chosen, None)
    p_values = [c.p for others in comparisons.values() for c in others.values()]
    adjusted = [c.p_holm for others in comparisons.values() for c in others.values()]
    assert len(p_values) == 4 + 2
    assert min(adjusted) == pytest.approx(min(1.0, 6 * min(p_values)))


def test_a_students_floors_and_curves_are_its_own() -> None:
    systems = [*grid_of("a", "b"), floor("majority"), floor("a-untrained", "a")]
    floors = compare_with_floors(systems, None)
    assert set(floors["a-finetune-gold"]) == {"majority", "a-untrained"}
    assert set(floors["b-finetune-gold"]) == {"majority"}
    chosen = pairs(systems, EvalSection())
    targets = first_baselines(chosen)
    assert [target.name for target in targets] == ["a-finetune-gold", "b-finetune-gold"]
    found = {
        (item.student, item.method): item.system
        for item in label_efficiencies(systems, targets, None)
    }
    assert found == {
        ("a", "step-by-step"): "a-finetune-gold",
        ("b", "step-by-step"): "b-finetune-gold",
    }


def comparison(delta: float, p: float) -> Comparison:
    ci95 = (delta - 0.05, delta + 0.05)
    return Comparison(delta=delta, ci95=ci95, p=p, p_holm=p, test="mcnemar-exact", wins=9, losses=4)


def results_of(tried: dict[str, int], difference: Comparison) -> Results:
    systems = [
        SystemResult(
            name=f"{name}-finetune-gold",
            kind="student",
            student=name,
            method="finetune",
            labels="gold",
            subset=1.0,
            accuracy=0.5 + 0.2 * (name == "t5"),
            ci95=(0.4, 0.8),
            interval="wilson",
            unreadable=0,
            accuracy_per_seed=[0.5],
            settings_tried=count,
        )
        for name, count in tried.items()
    ]
    first = systems[0].model_copy(update={"versus_students": {"t5-finetune-gold": difference}})
    return Results(
        run="r",
        name="r",
        task="classification",
        split="test",
        n=100,
        baseline=None,
        headline="minilm-finetune-gold",
        reportable=True,
        systems=[first, *systems[1:]],
    )


def test_the_verdict_names_the_best_student_and_its_difference() -> None:
    clear = results_of({"minilm": 2, "t5": 2}, comparison(-0.2, 0.001))
    best, difference, tuned = student_sentences(clear)
    assert best == "The most accurate student is t5 (t5-finetune-gold, 70.0%)."
    assert "t5-finetune-gold: 20.0 points more accurate than minilm-finetune-gold" in difference
    assert "[+15.0, +25.0]" in difference
    assert tuned == "All students were tuned alike, on 2 settings for each method."
    by_seed = comparison(-0.2, 0.001).model_copy(update={"delta_per_seed": {0: -0.4, 1: 0.0}})
    _, difference, _ = student_sentences(results_of({"minilm": 2, "t5": 2}, by_seed))
    assert "by seed the difference is +40.0 and +0.0 points" in difference, "seen from t5"
    unclear = results_of({"minilm": 0, "t5": 0}, comparison(-0.2, 0.3))
    _, difference, tuned = student_sentences(unclear)
    assert "no reliable difference from minilm-finetune-gold" in difference
    assert tuned.startswith("No student was tuned")
    *_, caution = student_sentences(results_of({"minilm": 6, "t5": 1}, comparison(-0.2, 0.3)))
    assert "not tuned alike (finetune tried settings: minilm 6, t5 1)" in caution
    assert student_sentences(results_of({"t5": 2}, comparison(-0.2, 0.3))) == []


def test_results_of_one_student_have_no_keys_of_several(tmp_path: Path) -> None:
    (alone,) = results_of({"t5": 0}, comparison(0.1, 0.1)).systems
    alone = alone.model_copy(
        update={"student": None, "versus_students": {}, "settings_tried": None}
    )
    assert not {"student", "versus_students", "settings_tried"} & alone.model_dump().keys()
    record = made(None, "finetune", 0.5).students[0]
    assert "student" not in record.model_dump()
    results = results_of({"t5": 0}, comparison(0.1, 0.1)).model_copy(update={"systems": [alone]})
    old = results.as_json() | {"schema": "dsbs.results/4"}
    (tmp_path / "results.json").write_text(json.dumps(old), encoding="utf-8")
    assert read_results(tmp_path / "results.json").systems == [alone]


def test_a_report_groups_students_and_draws_a_marker_for_each(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", students={"big": "mini", "little": "nano"})
    run = load_run(folder)
    groups = [group.title for group in accuracy_table([run]).groups]
    assert groups == ["student big", "student little", "other systems"]
    styles = series_styles([run])
    big = styles["big: finetune, gold labels"]
    little = styles["little: finetune, gold labels"]
    assert big.color == little.color and big.marker != little.marker
    assert big.marker == styles["big: step-by-step, gold labels"].marker
    drawn = draw_figures([run])
    page = render([run], drawn)
    assert "The most accurate student is big" in page and "student little" in page
    figures = {figure.name: figure.svg for figure in drawn}
    assert {"curve", "size", "speed"} <= figures.keys()
    for name in ("curve", "size", "speed"):
        assert "student big" in figures[name] and "step-by-step, gold labels" in figures[name]
        assert "big: step-by-step" not in figures[name].partition("</title>")[2]
