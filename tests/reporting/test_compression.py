"""What the page says of compressed students: accuracy, size and time beside the student as trained, and healing's share."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from made_run import compress, make_run

from dsbs.errors import UserError
from dsbs.records.compression import Measurement
from dsbs.reporting.compression import compression_table, healing_sentences, outdated_sentences
from dsbs.reporting.csv_files import write_csv_files
from dsbs.reporting.figures import draw_figures
from dsbs.reporting.figures.scatter import frontier_of
from dsbs.reporting.run import report_runs
from dsbs.reporting.runs import load_run

STUDENT = "step-by-step-gold-s0"
HOSTILE = "<script>alert(1)</script>|{{ 7*7 }}"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    run = make_run(tmp_path / "made", rows=12, subsets=(1.0,), seeds=(0,))
    compress(run, STUDENT, ("quantize=int8",), 0.63, 1.85, 3.0)
    compress(
        run, STUDENT, ("prune-ff=0.5",), 0.62, 5.6, 7.0, before_healing=0.54, healing_steps=200
    )
    compress(
        run, STUDENT, ("prune-heads=0.5",), 0.57, 6.1, 7.5, before_healing=0.55, healing_steps=200
    )
    compress(run, STUDENT, ("prune-ff=0.5", "quantize=int8"), 0.618, 1.4, 2.0)
    return run


def test_each_chain_stands_below_the_student_as_trained_from_the_largest_to_the_smallest(
    made: Path,
) -> None:
    table = compression_table([load_run(made)])
    assert table is not None
    (group,) = table.groups
    assert group.title == STUDENT
    assert [line.heading for line in group.rows] == [
        "as trained", "prune-heads=0.5", "prune-ff=0.5", "quantize=int8", "prune-ff=0.5+quantize=int8",
    ]  # fmt: skip
    rows = {line.heading: dict(zip(table.headings, line.cells, strict=True)) for line in group.rows}
    original, pruned, int8 = rows["as trained"], rows["prune-ff=0.5"], rows["quantize=int8"]
    assert (original["accuracy,\u00a0%"], original["MB"], original["ms, batch\u00a064"]) == (
        "63.2",
        "7.40",
        "72",
    )
    assert original["95% CI"] == "[60.2, 66.1]", "Wilson's, of 632 in 1,000"
    assert (int8["points lost"], int8["agreement,\u00a0%"], int8["MB"]) == (
        "0.2",
        "95.0",
        "1.85 (4.0×)",
    )
    assert (
        int8["ms, batch\u00a01"] == "3 (3.0×)"
        and int8["result"] == "accepted"
        and int8["recovered"] == "–"
    )
    assert pruned["recovered"] == "87%" and rows["prune-heads=0.5"]["result"] == "rejected"
    assert "more than 2 points (--max-drop)" in table.notes["result"]


def test_healing_that_recovered_less_than_half_is_said_to(made: Path, tmp_path: Path) -> None:
    run = load_run(made)
    (said,) = healing_sentences([run])
    assert (
        said
        == f"{STUDENT}, prune-heads=0.5: 200 steps of healing recovered 2.0 of the 8.2 points lost, less than half."
    )
    compress(made, STUDENT, ("low-rank=0.1",), 0.5, 3.0, 8.0, before_healing=0.52, healing_steps=9)
    said = healing_sentences([load_run(made)])[0]
    assert said.endswith("recovered none of the 11.2 points lost and cost 2.0 more.")
    shares = {one.name: one.recovered for one in run.compressed}
    assert shares["prune-ff=0.5"] == pytest.approx(0.08 / 0.092) and shares["quantize=int8"] is None


def test_where_nothing_was_lost_there_is_nothing_to_recover(made: Path) -> None:
    compress(
        made, STUDENT, ("drop-layers=1",), 0.64, 6.0, 8.0, before_healing=0.632, healing_steps=5
    )
    table = compression_table([load_run(made)])
    assert table is not None
    cells = {line.heading: line.cells for line in table.groups[0].rows}["drop-layers=1"]
    assert (
        cells[table.headings.index("recovered")] == "nothing lost"
        and cells[table.headings.index("points lost")] == "−0.8"
    )


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ([(1, 0.5), (2, 0.6), (3, 0.6), (4, 0.55)], {0, 1}),
        ([(1, 0.5), (1, 0.5)], {0, 1}),
        ([(1, 0.5), (1, 0.6)], {1}),
        ([(5, 0.1)], {0}),
    ],
)
def test_the_frontier_holds_what_nothing_beats_in_both(
    points: list[tuple[float, float]], best: set[int]
) -> None:
    assert frontier_of(points) == best


def test_the_figure_joins_and_names_the_frontier_of_what_was_kept(made: Path) -> None:
    compress(made, STUDENT, ("tiny=1",), 0.3, 0.2, 0.5)  # the smallest by far, and refused
    (figure,) = [one for one in draw_figures([load_run(made)]) if one.name == "frontier"]
    root = ElementTree.fromstring(figure.svg)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert texts.count("quantize=int8") == 3, "beside its points in both panels, and in the legend"
    assert texts.count("as trained") == 3, "nothing is as accurate"
    assert texts.count("prune-ff=0.5") == 1 and texts.count("tiny=1") == 1, "in the legend alone"
    told = [element.text for element in root.iter(f"{SVG}title")]
    assert f"{STUDENT}, tiny=1: 30.0%, 0.20 MB, 0.5 ms, rejected" in told


def test_without_times_the_figure_has_the_sizes_alone(made: Path) -> None:
    run = load_run(made)
    parts = ("original", "compressed")
    bare = [
        one.model_copy(
            update={part: getattr(one, part).model_copy(update={"latency": []}) for part in parts}
        )
        for one in run.compressed
    ]
    run.compressed[:] = bare
    (figure,) = [one for one in draw_figures([run]) if one.name == "frontier"]
    assert figure.title == "Accuracy against size" and "ms for a single row" not in figure.svg


def test_a_run_without_compressed_students_has_no_section(tmp_path: Path) -> None:
    run = make_run(tmp_path / "plain", rows=12, subsets=(1.0,), seeds=(0,))
    page = report_runs([run]).page.read_text(encoding="utf-8")
    assert 'id="compressed"' not in page and "#compressed" not in page
    assert (
        compression_table([load_run(run)]) is None
        and (run / "report" / "compressed.csv").read_text(encoding="utf-8") == ""
    )


def test_several_runs_stand_in_one_section_each_with_its_name(made: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", name="other", rows=12, subsets=(1.0,), seeds=(0,))
    compress(other, STUDENT, ("quantize=int8",), 0.63, 1.85, 3.0)
    plain = make_run(tmp_path / "plain", name="plain", rows=12, subsets=(1.0,), seeds=(0,))
    runs = [load_run(folder) for folder in (made, other, plain)]
    table = compression_table(runs)
    assert table is not None and [group.title for group in table.groups] == [
        f"made: {STUDENT}",
        f"other: {STUDENT}",
    ]
    assert [one.name for one in draw_figures(runs) if one.name.startswith("frontier")] == [
        "frontier-1",
        "frontier-2",
    ]
    page = report_runs([made, other, plain], out=tmp_path / "joint").page.read_text(
        encoding="utf-8"
    )
    assert (
        page.count('id="compressed"') == 1
        and "made: step-by-step-gold-s0, prune-heads=0.5: 200 steps of healing" in page
    )


def test_names_from_disk_are_shown_as_text(made: Path) -> None:
    compress(made, HOSTILE.replace("/", ""), (HOSTILE.replace("/", ""),), 0.63, 1.85, 3.0)
    page = report_runs([made]).page.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page


def test_every_number_is_in_the_spreadsheet(made: Path) -> None:
    report_runs([made])
    with (made / "report" / "compressed.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["chain"]: row for row in csv.DictReader(file)}
    assert (
        next(iter(rows)) == "" and rows[""]["accuracy"] == "0.632" and rows[""]["agreement"] == ""
    )
    healed = rows["prune-ff=0.5"]
    assert (healed["accuracy_before_healing"], healed["healing_steps"], healed["accepted"]) == (
        "0.54",
        "200",
        "yes",
    )
    assert float(healed["healing_recovered"]) == pytest.approx(0.08 / 0.092)
    assert (
        rows["quantize=int8"]["batch_64_p50_ms"] == "24.0"
        and rows["prune-heads=0.5"]["accepted"] == "no"
    )


def test_a_record_that_cannot_be_read_says_which(made: Path) -> None:
    path = made / "compress" / STUDENT / "quantize=int8" / "compress.json"
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"quantize=int8/compress\.json is no record"):
        load_run(made)


def test_what_was_made_of_weights_that_are_there_no_more_is_left_out_and_said_to_be(
    made: Path,
) -> None:
    compress(made, STUDENT, ("tiny=1",), 0.6, 0.2, 0.5, fingerprint="old")
    run = load_run(made)
    assert "tiny=1" not in [one.name for one in run.compressed] and len(run.compressed) == 4
    assert outdated_sentences([run]) == [
        "1 compressed student left out: the original was retrained since; compress it again."
    ]
    record = made / "train" / STUDENT / "train.json"
    trained = json.loads(record.read_text(encoding="utf-8"))
    trained["student"]["fingerprint"] = "new"
    record.write_text(json.dumps(trained), encoding="utf-8")
    page = report_runs([made]).page.read_text(encoding="utf-8")
    assert "5 compressed students left out" in page and "quantize=int8" not in page


def test_chains_stand_below_the_student_as_trained_that_they_were_held_against(made: Path) -> None:
    other = Measurement(accuracy=0.7, megabytes=7.4, latency=[])
    compress(made, STUDENT, ("low-rank=0.5",), 0.69, 4.0, 5.0, n=100, original=other)
    run = load_run(made)
    table = compression_table([run])
    assert table is not None
    tops = {
        group.title: (group.rows[0].cells[0], [line.heading for line in group.rows[1:]])
        for group in table.groups
    }
    assert tops[f"{STUDENT} on 100 rows"] == ("70.0", ["low-rank=0.5"])
    assert (
        tops[f"{STUDENT} on 1,000 rows"][0] == "63.2"
        and len(tops[f"{STUDENT} on 1,000 rows"][1]) == 4
    )
    write_csv_files([run], made / "tables")
    with (made / "tables" / "compressed.csv").open(encoding="utf-8", newline="") as file:
        starts = [
            (row["rows"], row["accuracy"]) for row in csv.DictReader(file) if not row["chain"]
        ]
    assert sorted(starts) == [("100", "0.7"), ("1000", "0.632")]
