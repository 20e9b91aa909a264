"""The tables on disk hold every number of the results, and no spreadsheet runs what data put into them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from made_run import make_run

from dsbs.reporting.csv_files import write_csv_files
from dsbs.reporting.runs import EvaluatedRun, load_run

HOSTILE = [
    "=HYPERLINK(1)", "+1", "-1", "@SUM(A1)", "\t=1", 'two\nlines, "quoted"', "ü 漢字 \u202e", "a\x00b", "＝1",
]  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def run(tmp_path: Path) -> EvaluatedRun:
    return load_run(make_run(tmp_path / "run", rows=12))


def test_every_number_comes_back(run: EvaluatedRun, tmp_path: Path) -> None:
    paths = write_csv_files([run], tmp_path / "report")
    assert [path.name for path in paths] == [
        "systems.csv", "comparisons.csv", "curve.csv", "metrics.csv", "compressed.csv",
    ]  # fmt: skip
    systems, comparisons, curve, metrics, _ = paths

    by_name = {row["system"]: row for row in read(systems)}
    assert list(by_name) == [system.name for system in run.results.systems]
    for system in run.results.systems:
        row = by_name[system.name]
        assert float(row["accuracy"]) == system.accuracy
        assert (float(row["accuracy_low"]), float(row["accuracy_high"])) == system.ci95
        assert row["parameters"] == ("" if system.parameters is None else str(system.parameters))
        assert float(row["metric_macro_f1"]) == system.metrics["macro_f1"].value
    assert (
        by_name["teacher"]["usd_per_prediction"] == "0.0004" and by_name["teacher"]["seeds"] == ""
    )
    student = by_name["step-by-step-gold-n0.5"]
    assert (student["subset"], student["training_rows"], student["seeds"]) == ("0.5", "400", "0 1")
    assert (student["batch_1_p50_ms"], student["batch_64_p95_ms"], student["batch_1_device"]) == (
        "9.0",
        "120.0",
        "cpu",
    )

    (first, *others) = read(comparisons)
    assert (first["system"], first["against"], first["delta"], first["reliable"]) == (
        "distill-teacher", "finetune-gold", "-0.03", "no",
    )  # fmt: skip
    assert others[0]["reliable"] == "yes" and others[0]["p_holm"] == "0.036" and len(others) == 5

    drawn = [(row["method"], row["rows"]) for row in read(curve)]
    assert drawn == [
        (method, rows)
        for method in ("distill", "finetune", "step-by-step")
        for rows in ("200", "400", "800")
    ]

    of_student = [row for row in read(metrics) if row["system"] == "step-by-step-gold"]
    assert [(row["metric"], row["label"], row["seed"]) for row in of_student] == [
        ("accuracy", "", ""), ("accuracy", "", "0"), ("accuracy", "", "1"), ("exact_match", "", ""), ("macro_f1", "", ""),
        ("ece", "", ""), ("recall", "entailment", ""), ("recall", "neutral", ""), ("recall", "contradiction", ""),
    ]  # fmt: skip
    assert of_student[5]["value"] == "0.12" and of_student[5]["value_low"] == ""


def test_text_of_data_is_no_formula_and_stays_in_its_cell(
    run: EvaluatedRun, tmp_path: Path
) -> None:
    path = run.path / "eval" / "results.json"
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    some = {"value": -0.5, "ci95": None, "n": 3}
    results["systems"] = [
        results["systems"][0] | {"recall": dict.fromkeys(HOSTILE, some), "metrics": {"=m": some}}
    ]
    path.write_text(json.dumps(results), encoding="utf-8")
    tables = {
        path.name: path for path in write_csv_files([load_run(run.path)], tmp_path / "report")
    }
    rows = [row for row in read(tables["metrics.csv"]) if row["metric"] == "recall"]
    assert [row["label"] for row in rows] == [
        "'=HYPERLINK(1)", "'+1", "'-1", "'@SUM(A1)", "'\t=1", 'two\nlines, "quoted"', "ü 漢字 \u202e", "a\ufffdb", "'＝1",
    ]  # fmt: skip
    assert {row["value"] for row in rows} == {"-0.5"}, "a negative number stays one"
    assert "metric_=m" in read(tables["systems.csv"])[0]
    assert tables["comparisons.csv"].read_text(encoding="utf-8") == "", "nothing is compared"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [
        load_run(make_run(tmp_path / place / "demo", name="demo", rows=6, subsets=(1.0,)))
        for place in ("old", "new")
    ]
    systems, *_ = write_csv_files(runs, tmp_path / "report")
    assert {row["run"] for row in read(systems)} == {"old/demo", "new/demo"}


def test_equal_results_give_equal_files(run: EvaluatedRun, tmp_path: Path) -> None:
    first, second = (write_csv_files([run], tmp_path / place) for place in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
