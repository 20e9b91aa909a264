"""Runs and systems by names that tell them apart."""

from __future__ import annotations

from pathlib import Path

from made_run import make_run

from dsbs.reporting.runs import full_data_systems, load_run, run_titles


def test_runs_are_called_by_their_recipes_and_those_of_one_recipe_by_their_folders(
    tmp_path: Path,
) -> None:
    places = ("a/demo", "b/demo", "other")
    made = [
        load_run(make_run(tmp_path / place, name=Path(place).name, rows=6, subsets=(1.0,)))
        for place in places
    ]
    assert run_titles(made) == ["a/demo", "b/demo", "other"]
    assert run_titles(made[1:]) == ["demo", "other"]


def test_full_data_systems_are_each_methods_largest_share(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", rows=6, subsets=(0.25, 0.5)))
    assert [system.name for system in full_data_systems(run.results.systems)] == [
        "teacher", "finetune-gold-n0.5", "distill-teacher-n0.5", "step-by-step-gold-n0.5",
    ]  # fmt: skip
