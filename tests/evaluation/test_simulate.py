"""Leakage-adjusted simulatability: its formula by hand, and simulators that learn what there is to learn."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dsbs.evaluation.simulate
import dsbs.students
from dsbs import load_recipe
from dsbs.evaluation.score import score
from dsbs.evaluation.simulate import (
    ABSENT,
    kind_of,
    las_of_counts,
    leakage_adjusted,
    simulatability,
    simulate,
    simulated_file,
)
from dsbs.files import write_jsonl
from dsbs.progress import NoProgress
from dsbs.records.results import METRICS, Measure
from dsbs.records.rows import Example, Prediction
from dsbs.tasks import make_task

# --- the formula

ALL = np.arange(8)[None]


def las(*rows: tuple[int, int, int]) -> float:
    counts = np.bincount([kind_of(bool(x), bool(e), bool(xe)) for x, e, xe in rows], minlength=8)
    return float(las_of_counts(ALL)(counts[None])[0])


def test_the_formula_on_a_table_counted_by_hand() -> None:
    leaking = [(0, 1, 1), (1, 1, 1), (1, 1, 1), (0, 1, 0)]  # xe right 3 of 4, x right 2 of 4: 1/4
    others = (
        [(0, 0, 1), (1, 0, 0)] + [(0, 0, 1)] * 2 + [(0, 0, 0)] * 4
    )  # xe right 3 of 8, x right 1 of 8: 1/4
    assert las(*leaking, *others) == pytest.approx(1 / 4)
    assert las(*leaking, *others, *[(1, 0, 0)] * 4) == pytest.approx((1 / 4 + (3 - 5) / 12) / 2)


def test_a_group_without_rows_leaves_the_word_to_the_other() -> None:
    assert las((0, 1, 1), (1, 1, 1)) == 0.5
    assert las((0, 0, 1), (1, 0, 1), (1, 0, 1), (1, 0, 1)) == 0.25


@given(st.lists(st.tuples(*[st.booleans()] * 3), min_size=1, max_size=40))
def test_the_formula_is_the_papers_definition(rows: list[tuple[bool, bool, bool]]) -> None:
    groups = [[xe - x for x, e, xe in rows if e == leaks] for leaks in (False, True)]
    expected = np.mean([np.mean(group) for group in groups if group])
    assert las(*rows) == pytest.approx(expected)
    kinds = np.array([[kind_of(*row) for row in rows]])
    measure = leakage_adjusted(kinds)
    assert (
        measure is not None and measure.value == pytest.approx(expected) and measure.n == len(rows)
    )


def test_seeds_are_averaged_and_absent_rows_left_out() -> None:
    first = [kind_of(False, False, True), kind_of(True, True, True), ABSENT, ABSENT]  # (1 + 0) / 2
    second = [
        kind_of(False, False, False),
        ABSENT,
        kind_of(False, True, True),
        ABSENT,
    ]  # (0 + 1) / 2
    measure = leakage_adjusted(np.array([first, second]))
    assert measure is not None and (measure.value, measure.n) == (0.5, 3)
    assert leakage_adjusted(np.array([[ABSENT, ABSENT]])) is None


def test_rows_that_all_gain_alike_leave_room_for_others() -> None:
    measure = leakage_adjusted(np.full((1, 20), kind_of(True, True, True)))
    assert measure is not None and measure.value == 0 and measure.ci95 is not None
    assert measure.ci95[0] < 0 < measure.ci95[1]


# --- simulators


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be learned here are a few words: a simulator of a tenth of the size has them in a third of the steps."""
    shape = {
        "d_model": 64,
        "d_kv": 16,
        "num_heads": 4,
        "d_ff": 128,
        "num_layers": 2,
        "num_decoder_layers": 1,
    }
    monkeypatch.setitem(dsbs.students.SIZES, "nano", shape)
    monkeypatch.setattr(dsbs.evaluation.simulate, "STEPS", 100)
    monkeypatch.setattr(dsbs.evaluation.simulate, "SCRATCH_LEARNING_RATE", 3e-3)


COLOURS = {"red": "north", "blue": "south"}


def made_up(
    toy: Callable[..., Path], rationales: Callable[[int, str], str], *, told: bool, rows: int = 64
) -> tuple[Any, ...]:
    """A key is north or south: by its colour alone where the input has ``told`` it, else by house and rationale together."""
    recipe = load_recipe(toy(), ["task.labels=[north, south]", "student.dropout=0"])
    task = make_task(recipe.task)
    examples, predictions = [], {}
    for number in range(rows):
        house, colour = ("attic", "barn")[number % 2], ("red", "blue")[number // 2 % 2]
        label = (
            COLOURS[colour]
            if told or house == "attic"
            else {"red": "south", "blue": "north"}[colour]
        )
        text = f"the {house} {colour if told else ''}"
        examples.append(Example(id=f"r{number}", input={"text": text}, label=label))
        why = rationales(number, colour)
        predictions[f"r{number}"] = Prediction(
            id=f"r{number}", raw=label, rationale=why, made_by="test"
        )
    return recipe, task, score(task, examples, predictions, "made up")


def simulated(
    toy: Callable[..., Path], run: Path, rationales: Callable[[int, str], str], *, told: bool
) -> dict[str, Measure]:
    recipe, task, scored = made_up(toy, rationales, told=told)
    simulate(recipe, task, "student-s0", scored, run, NoProgress())
    return simulatability(run, ["student-s0"], [scored])


@pytest.mark.slow
def test_a_rationale_that_helps_without_giving_the_label_away_scores_above_0(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    found = simulated(toy, tmp_path, lambda number, colour: f"the key is {colour}", told=False)
    assert list(found) == [name for name in METRICS if name in found] and len(found) == 4
    assert found["las"].ci95 is not None and found["las"].ci95[0] > 0 and found["las"].n == 64
    assert found["leaking"].value < 0.8, "a colour alone says nothing"
    assert found["simulator_accuracy"].value > found["simulator_majority"].value + 0.2


@pytest.mark.slow
def test_a_rationale_of_noise_scores_about_zero(toy: Callable[..., Path], tmp_path: Path) -> None:
    rng = random.Random(0)
    found = simulated(
        toy,
        tmp_path,
        lambda number, colour: f"the key is {rng.choice(['round', 'flat'])}",
        told=True,
    )
    assert abs(found["las"].value) < 0.1
    assert found["simulator_accuracy"].value > 0.9, (
        "the input tells the label, and the simulator learned to read it"
    )


def test_what_was_simulated_is_kept_until_the_predictions_or_the_settings_change(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dsbs.evaluation.simulate, "STEPS", 1)
    recipe, task, scored = made_up(toy, lambda number, colour: colour, told=True)
    path = simulated_file(tmp_path, "student-s0")
    simulate(recipe, task, "student-s0", scored, tmp_path, NoProgress())
    first = path.read_bytes()
    lines = [json.loads(line) for line in first.splitlines()]
    assert [line["id"] for line in lines] == [row.id for row in scored.rows]
    assert {line["fold"] for line in lines} == {0, 1}
    assert all(isinstance(line[view], bool) for line in lines for view in ("x", "e", "xe"))

    stamp = path.stat().st_mtime_ns
    simulate(recipe, task, "student-s0", scored, tmp_path, NoProgress())
    assert path.stat().st_mtime_ns == stamp
    monkeypatch.setattr(dsbs.evaluation.simulate, "STEPS", 2)
    simulate(recipe, task, "student-s0", scored, tmp_path, NoProgress())
    assert path.stat().st_mtime_ns != stamp

    monkeypatch.setattr(dsbs.evaluation.simulate, "STEPS", 1)
    simulate(recipe, task, "student-s0", scored, tmp_path, NoProgress())
    assert path.read_bytes() == first, "the same seeds give the same simulator"

    _, _, other = made_up(toy, lambda number, colour: "another rationale", told=True)
    assert simulatability(tmp_path, ["student-s0"], [other]) == {}
    path.write_text("no JSON", encoding="utf-8")
    assert simulatability(tmp_path, ["student-s0"], [scored]) == {}
    simulate(recipe, task, "student-s0", scored, tmp_path, NoProgress())
    assert path.read_bytes() == first


def test_without_a_file_or_with_too_few_rationales_there_is_nothing(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, task, scored = made_up(toy, lambda number, colour: colour * (number < 20), told=True)
    said: list[str] = []
    progress = NoProgress()
    progress.say = said.append  # type: ignore[method-assign]
    simulate(recipe, task, "student-s0", scored, tmp_path, progress)
    assert "20 rows have a label and a rationale, too few" in said[0]
    assert simulatability(tmp_path, ["student-s0"], [scored]) == {}


def test_rows_without_a_rationale_are_left_out_and_seeds_are_averaged(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    """Files as `simulate` writes them, the answers by hand: the gain is 1 on each of the rows that do not leak."""
    _, _, scored = made_up(toy, lambda number, colour: colour * (number != 3), told=True, rows=8)
    for member, gain in (("a-s0", True), ("a-s1", False)):
        of = dsbs.evaluation.simulate._content(scored)
        rows = [
            {
                "id": f"r{i}",
                "fold": i % 2,
                "x": False,
                "e": i < 4,
                "xe": gain and i >= 4,
                "of": of,
                "made_by": "test",
            }
            for i in range(8)
            if i != 3
        ]
        write_jsonl(simulated_file(tmp_path, member), [json.dumps(row) for row in rows])
    found = simulatability(tmp_path, ["a-s0", "a-s1"], [scored, scored])
    assert found["las"].value == pytest.approx(((0 + 1) / 2 + 0) / 2) and found["las"].n == 7
    assert found["leaking"].value == pytest.approx(3 / 7)
    assert found["simulator_accuracy"].value == pytest.approx(4 / 7 / 2)


def test_rows_of_a_cluster_are_in_one_fold(toy: Callable[..., Path]) -> None:
    task = make_task(load_recipe(toy()).task)
    rows = [Example(f"r{i}", {"text": f"message {i // 4}"}, label="billing") for i in range(80)]
    said = {
        row.id: Prediction(id=row.id, raw="billing", rationale="an invoice", made_by="m")
        for row in rows
    }
    scored = score(task, rows, said, "m")

    def folds(cluster: str | None) -> list[set[int]]:
        found = dsbs.evaluation.simulate._rows(task, scored, cluster)
        return [{row.fold for row in found[i : i + 4]} for i in range(0, 80, 4)]

    assert all(len(part) == 1 for part in folds("text")) and set().union(*folds("text")) == {0, 1}
    assert any(len(part) == 2 for part in folds(None))
