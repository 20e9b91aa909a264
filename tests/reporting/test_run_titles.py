"""Names of runs and systems."""

from __future__ import annotations

from pathlib import Path

from sample_run import make_run

from dsbs.reporting.runs import full_data_systems, load_run, run_titles


def test_runs_are_named_by_recipe_and_equal_names_by_folder(tmp_path: Path) -> None:
    folders = ("a/demo", "b/demo", "other")
    runs = [
        load_run(make_run(tmp_path / folder, name=Path(folder).name, rows=6, subsets=(1.0,)))
        for folder in folders
    ]
    assert run_titles(runs) == ["a/demo", "b/demo", "other"]
    assert run_titles(runs[1:]) == ["demo", "other"]


def test_full_data_systems_have_the_largest_share_of_each_method(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "run", rows=6, subsets=(0.25, 0.5)))
    assert [system.name for system in full_data_systems(run.results.systems)] == [
        "teacher",
        "finetune-gold-n0.5",
        "distill-teacher-n0.5",
        "step-by-step-gold-n0.5",
    ]
