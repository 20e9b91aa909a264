"""CSV files hold every number of the results, and no spreadsheet evaluates their text."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from sample_run import change_results, make_run

from dsbs.reporting.csv_files import write_csv_files
from dsbs.reporting.runs import EvaluatedRun, load_run

HOSTILE = {  # label -> cell
    "=HYPERLINK(1)": "'=HYPERLINK(1)",
    "+1": "'+1",
    "-1": "'-1",
    "@SUM(A1)": "'@SUM(A1)",
    "\t=1": "'\t=1",
    'two\nlines, "quoted"': 'two\nlines, "quoted"',
    "ü 漢字 \u202e": "ü 漢字 \u202e",
    "a\x00b": "a\ufffdb",
    "＝1": "'＝1",
}


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedRun:
    """A run that no test changes."""
    return load_run(make_run(tmp_path_factory.mktemp("shared") / "sample"))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write(runs: list[EvaluatedRun], folder: Path) -> dict[str, list[dict[str, str]]]:
    return {path.stem: read(path) for path in write_csv_files(runs, folder)}


def test_systems_have_their_numbers(shared_run: EvaluatedRun, tmp_path: Path) -> None:
    rows = {row["system"]: row for row in write([shared_run], tmp_path)["systems"]}
    assert list(rows) == [system.name for system in shared_run.results.systems]
    for system in shared_run.results.systems:
        row = rows[system.name]
        assert float(row["accuracy"]) == system.accuracy
        assert (float(row["accuracy_low"]), float(row["accuracy_high"])) == system.ci95
        assert row["parameters"] == str(system.parameters or "")
        assert float(row["metric_macro_f1"]) == system.metrics["macro_f1"].value
    assert rows["teacher"]["usd_per_prediction"] == "0.0004"
    assert rows["teacher"]["seeds"] == ""
    student = rows["step-by-step-gold-n0.5"]
    assert (student["subset"], student["training_rows"], student["seeds"]) == ("0.5", "400", "0 1")
    assert student["batch_1_p50_ms"] == "9.0"
    assert student["batch_64_p95_ms"] == "120.0"
    assert student["batch_1_device"] == "cpu"


def test_comparisons_have_their_numbers(shared_run: EvaluatedRun, tmp_path: Path) -> None:
    rows = write([shared_run], tmp_path)["comparisons"]
    assert len(rows) == 6
    first, second = rows[:2]
    assert (first["system"], first["against"]) == ("distill-teacher", "finetune-gold")
    assert (first["delta"], first["reliable"]) == ("-0.03", "no")
    assert (second["p_holm"], second["reliable"]) == ("0.036", "yes")
    assert (second["wins"], second["losses"]) == ("9", "4")
    assert second["delta_per_seed"] == "0.07 0.07"


def test_the_curve_has_every_share_of_the_rows(shared_run: EvaluatedRun, tmp_path: Path) -> None:
    rows = write([shared_run], tmp_path)["curve"]
    assert [(row["method"], row["rows"]) for row in rows] == [
        (method, rows)
        for method in ("distill", "finetune", "step-by-step")
        for rows in ("200", "400", "800")
    ]


def test_metrics_have_a_row_for_each_value(shared_run: EvaluatedRun, tmp_path: Path) -> None:
    rows = [
        row
        for row in write([shared_run], tmp_path)["metrics"]
        if row["system"] == "step-by-step-gold"
    ]
    assert [(row["metric"], row["label"], row["seed"]) for row in rows] == [
        ("accuracy", "", ""),
        ("accuracy", "", "0"),
        ("accuracy", "", "1"),
        ("exact_match", "", ""),
        ("macro_f1", "", ""),
        ("ece", "", ""),
        ("recall", "entailment", ""),
        ("recall", "neutral", ""),
        ("recall", "contradiction", ""),
    ]
    assert rows[5]["value"] == "0.12"
    assert rows[5]["value_low"] == ""


def test_text_from_data_is_not_a_formula_and_stays_in_its_cell(tmp_path: Path) -> None:
    def add_hostile_names(results: dict[str, Any]) -> None:
        measure = {"value": -0.5, "ci95": None, "n": 3}
        recall = dict.fromkeys(HOSTILE, measure)
        teacher = results["systems"][0]
        results["systems"] = [teacher | {"recall": recall, "metrics": {"=m": measure}}]

    tables = write([change_results(make_run(tmp_path / "run"), add_hostile_names)], tmp_path)
    rows = [row for row in tables["metrics"] if row["metric"] == "recall"]
    assert [row["label"] for row in rows] == list(HOSTILE.values())
    assert {row["value"] for row in rows} == {"-0.5"}, "a negative number stays a number"
    assert "metric_=m" in tables["systems"][0]
    assert (tmp_path / "comparisons.csv").read_text(encoding="utf-8") == ""


def test_runs_of_equal_name_are_distinguished(tmp_path: Path) -> None:
    runs = [
        load_run(make_run(tmp_path / parent / "demo", name="demo", rows=6, subsets=(1.0,)))
        for parent in ("old", "new")
    ]
    rows = write(runs, tmp_path / "report")["systems"]
    assert {row["run"] for row in rows} == {"old/demo", "new/demo"}


def test_equal_results_give_equal_files(shared_run: EvaluatedRun, tmp_path: Path) -> None:
    first = write_csv_files([shared_run], tmp_path / "a")
    second = write_csv_files([shared_run], tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
