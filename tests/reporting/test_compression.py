"""Compressed students in the report: accuracy, size and time beside the original, and healing."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from sample_run import compress, make_run

from dsbs.errors import UserError
from dsbs.records.results import Measurement
from dsbs.reporting.compression import (
    compression_table,
    healer_sentences,
    healing_sentences,
    outdated_sentences,
)
from dsbs.reporting.csv_files import write_csv_files
from dsbs.reporting.figures.scatter import frontier_figure, frontier_of
from dsbs.reporting.run import render, report_runs
from dsbs.reporting.runs import EvaluatedRun, load_run
from dsbs.reporting.tables import Table

STUDENT = "step-by-step-gold-s0"
HOSTILE = "<script>alert(1)<script>|{{ 7*7 }}"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "sample", rows=12, subsets=(1.0,), seeds=(0,))
    healing = {"healing_steps": 200}
    compress(run, STUDENT, ("quantize=int8",), 0.63, 1.85, 3.0)
    compress(run, STUDENT, ("prune-ff=0.5",), 0.62, 5.6, 7.0, before_healing=0.54, **healing)
    compress(run, STUDENT, ("prune-heads=0.5",), 0.57, 6.1, 7.5, before_healing=0.55, **healing)
    compress(run, STUDENT, ("prune-ff=0.5", "quantize=int8"), 0.618, 1.4, 2.0)
    return run


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory: pytest.TempPathFactory) -> EvaluatedRun:
    """A run that no test changes."""
    return load_run(make_run(tmp_path_factory.mktemp("shared") / "sample"))


def table_of(*runs: EvaluatedRun) -> Table:
    table = compression_table(runs)
    assert table is not None
    return table


def cells_by_chain(table: Table) -> dict[str, dict[str, str]]:
    (group,) = table.groups
    return {row.heading: dict(zip(table.headings, row.cells, strict=True)) for row in group.rows}


def test_chains_follow_their_original_from_the_largest_to_the_smallest(folder: Path) -> None:
    table = table_of(load_run(folder))
    assert table.groups[0].title == STUDENT
    rows = cells_by_chain(table)
    assert list(rows) == [
        "as trained",
        "prune-heads=0.5",
        "prune-ff=0.5",
        "quantize=int8",
        "prune-ff=0.5+quantize=int8",
    ]
    original = rows["as trained"]
    assert original["accuracy,\u00a0%"] == "63.2"
    assert original["MB"] == "7.40"
    assert original["ms, batch\u00a064"] == "72"
    assert original["95% CI"] == "[60.2, 66.1]", "Wilson's, of 632 in 1,000"
    int8 = rows["quantize=int8"]
    assert int8["points lost"] == "0.2"
    assert int8["agreement,\u00a0%"] == "95.0"
    assert int8["MB"] == "1.85 (4.0×)"
    assert int8["ms, batch\u00a01"] == "3 (3.0×)"
    assert int8["result"] == "accepted"
    assert int8["recovered"] == "–"
    assert rows["prune-ff=0.5"]["recovered"] == "87%"
    assert rows["prune-heads=0.5"]["result"] == "rejected"
    assert "more than 2 points (--max-drop)" in table.notes["result"]


def test_healing_that_recovered_less_than_half_is_pointed_out(folder: Path) -> None:
    run = load_run(folder)
    assert healing_sentences([run]) == [
        f"{STUDENT}, prune-heads=0.5: 200 steps of healing recovered 2.0 of the 8.2 points lost, "
        "less than half."
    ]
    shares = {record.name: record.recovered for record in run.compressed}
    assert shares["prune-ff=0.5"] == pytest.approx(0.08 / 0.092)
    assert shares["quantize=int8"] is None
    harmed = {"before_healing": 0.52, "healing_steps": 9}
    compress(folder, STUDENT, ("low-rank=0.1",), 0.5, 3.0, 8.0, **harmed)
    sentence = healing_sentences([load_run(folder)])[0]
    assert sentence.endswith("recovered none of the 11.2 points lost and cost 2.0 more.")


def test_students_healed_in_different_ways_stand_side_by_side(folder: Path) -> None:
    for healer, accuracy in (("rows", 0.58), ("original", 0.61), ("both", 0.6)):
        healing = {"before_healing": 0.532, "healing_steps": 50, "healed_by": (healer,)}
        compress(folder, STUDENT, ("drop-layers=0.5",), accuracy, 5.0, 4.0, **healing)
    run = load_run(folder)
    rows = cells_by_chain(table_of(run))
    names = ["drop-layers=0.5", "drop-layers=0.5@both", "drop-layers=0.5@rows"]
    start = list(rows).index(names[0])
    assert list(rows)[start : start + 3] == names
    assert [rows[name]["healed by"] for name in names] == ["original", "rows and original", "rows"]
    assert rows["prune-ff=0.5"]["healed by"] == "rows", "in a record of an earlier version"
    assert rows["quantize=int8"]["healed by"] == "–"
    assert [rows[name]["recovered"] for name in names] == ["78%", "68%", "48%"]
    (sentence,) = healer_sentences([run])
    assert sentence == (
        f"{STUDENT}, drop-layers=0.5: of the accuracy lost on 1,000 rows, 50 steps of healing "
        "recovered 78% (original), 68% (rows and original) and 48% (rows)."
    )
    (figure,) = frontier_figure([run])
    texts = [element.text for element in ElementTree.fromstring(figure.svg).iter(f"{SVG}text")]
    assert set(names) <= set(texts)


def test_without_a_loss_there_is_nothing_to_recover(folder: Path) -> None:
    healing = {"before_healing": 0.632, "healing_steps": 5}
    compress(folder, STUDENT, ("drop-layers=1",), 0.64, 6.0, 8.0, **healing)
    row = cells_by_chain(table_of(load_run(folder)))["drop-layers=1"]
    assert row["recovered"] == "nothing lost"
    assert row["points lost"] == "−0.8"


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(1, 0.5), (2, 0.6), (3, 0.6), (4, 0.55)], {0, 1}),
        ([(1, 0.5), (1, 0.5)], {0, 1}),
        ([(1, 0.5), (1, 0.6)], {1}),
        ([(5, 0.1)], {0}),
    ],
)
def test_the_frontier_holds_points_that_no_other_beats(
    points: list[tuple[float, float]], best: set[int]
) -> None:
    assert frontier_of(points) == best


def test_the_figure_joins_and_names_the_accepted_frontier(folder: Path) -> None:
    compress(folder, STUDENT, ("tiny=1",), 0.3, 0.2, 0.5)  # smallest by far, and rejected
    (figure,) = frontier_figure([load_run(folder)])
    root = ElementTree.fromstring(figure.svg)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert texts.count("quantize=int8") == 3, "beside its points in both panels, and in the legend"
    assert texts.count("as trained") == 3, "no other is as accurate"
    assert texts.count("prune-ff=0.5") == 1, "only in the legend"
    assert texts.count("tiny=1") == 1
    tooltips = [element.text for element in root.iter(f"{SVG}title")]
    assert f"{STUDENT}, tiny=1: 30.0%, 0.20 MB, 0.5 ms, rejected" in tooltips


def test_without_times_the_figure_shows_sizes_only(folder: Path) -> None:
    run = load_run(folder)
    run.compressed[:] = [
        record.model_copy(
            update={
                name: getattr(record, name).model_copy(update={"latency": []})
                for name in ("original", "compressed")
            }
        )
        for record in run.compressed
    ]
    (figure,) = frontier_figure([run])
    assert figure.title == "Accuracy against size"
    assert "ms for a single row" not in figure.svg


def test_a_run_without_compressed_students_has_no_section(
    shared_run: EvaluatedRun, tmp_path: Path
) -> None:
    page = render([shared_run], [])
    assert 'id="compressed"' not in page
    assert "#compressed" not in page
    assert compression_table([shared_run]) is None
    write_csv_files([shared_run], tmp_path)
    assert (tmp_path / "compressed.csv").read_text(encoding="utf-8") == ""


def test_several_runs_share_a_section(
    folder: Path, shared_run: EvaluatedRun, tmp_path: Path
) -> None:
    other = make_run(tmp_path / "other", name="other", rows=12, subsets=(1.0,), seeds=(0,))
    compress(other, STUDENT, ("quantize=int8",), 0.63, 1.85, 3.0)
    runs = [load_run(folder), load_run(other)]
    assert [group.title for group in table_of(*runs).groups] == [
        f"sample: {STUDENT}",
        f"other: {STUDENT}",
    ]
    figures = frontier_figure([*runs, shared_run])
    assert [figure.name for figure in figures] == ["frontier-1", "frontier-2"]
    page = render(runs, [])
    assert page.count('id="compressed"') == 1
    assert "sample: step-by-step-gold-s0, prune-heads=0.5: 200 steps of healing" in page


def test_names_from_disk_are_escaped(folder: Path) -> None:
    compress(folder, HOSTILE, (HOSTILE,), 0.63, 1.85, 3.0)
    page = render([load_run(folder)], [])
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_the_csv_file_has_every_number(folder: Path, tmp_path: Path) -> None:
    write_csv_files([load_run(folder)], tmp_path)
    with (tmp_path / "compressed.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["chain"]: row for row in csv.DictReader(file)}
    assert next(iter(rows)) == ""
    assert rows[""]["accuracy"] == "0.632"
    assert rows[""]["agreement"] == ""
    healed = rows["prune-ff=0.5"]
    assert healed["accuracy_before_healing"] == "0.54"
    assert healed["healing_steps"] == "200"
    assert healed["accepted"] == "yes"
    assert float(healed["healing_recovered"]) == pytest.approx(0.08 / 0.092)
    assert rows["quantize=int8"]["batch_64_p50_ms"] == "24.0"
    assert rows["prune-heads=0.5"]["accepted"] == "no"


def test_an_unreadable_record_is_named(folder: Path) -> None:
    path = folder / "compress" / STUDENT / "quantize=int8" / "compress.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"quantize=int8/compress\.json"):
        load_run(folder)


def test_students_compressed_from_earlier_weights_are_left_out(folder: Path) -> None:
    compress(folder, STUDENT, ("tiny=1",), 0.6, 0.2, 0.5, fingerprint="old")
    run = load_run(folder)
    assert len(run.compressed) == 4
    assert "tiny=1" not in [record.name for record in run.compressed]
    assert outdated_sentences([run]) == [
        "1 compressed student left out: the original was retrained since; compress it again."
    ]
    path = folder / "train" / STUDENT / "train.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["student"]["fingerprint"] = "new"
    path.write_text(json.dumps(record), encoding="utf-8")
    page = report_runs([folder]).read_text(encoding="utf-8")
    assert "5 compressed students left out" in page
    assert "quantize=int8" not in page


def test_chains_follow_the_original_they_were_measured_against(
    folder: Path, tmp_path: Path
) -> None:
    original = Measurement(accuracy=0.7, megabytes=7.4, latency=[])
    compress(folder, STUDENT, ("low-rank=0.5",), 0.69, 4.0, 5.0, n=100, original=original)
    run = load_run(folder)
    groups = {group.title: group.rows for group in table_of(run).groups}
    few = groups[f"{STUDENT} on 100 rows"]
    assert few[0].cells[0] == "70.0"
    assert [row.heading for row in few[1:]] == ["low-rank=0.5"]
    many = groups[f"{STUDENT} on 1,000 rows"]
    assert many[0].cells[0] == "63.2"
    assert len(many) == 5
    write_csv_files([run], tmp_path)
    with (tmp_path / "compressed.csv").open(encoding="utf-8", newline="") as file:
        originals = [row for row in csv.DictReader(file) if not row["chain"]]
    accuracies = sorted((row["rows"], row["accuracy"]) for row in originals)
    assert accuracies == [("100", "0.7"), ("1000", "0.632")]
