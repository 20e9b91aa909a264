"""CSV for spreadsheets: nothing is lost on the way, and nothing wrong is imported."""

from __future__ import annotations

import csv
import io
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_queue import TASK, decision, review_row

from dsbs.errors import UserError
from dsbs.records.reviews import Review, deciding_reviews
from dsbs.review.queue import ordered
from dsbs.review.spreadsheet import export_csv, import_csv
from dsbs.run_folder import RunFolder, append_review

ROWS = [
    review_row("007", annotation={"rationale": "=1+1 is two.\nReally.", "gold": "shipping"}),
    review_row("b"),
    review_row("c", None),
    review_row("d"),
]
ROWS = [
    row if row.id != "007" else type(row)(
        row.id, {"text": '=cmd|"/c calc"!A1', "id": "x"}, "", row.label,
        row.annotation.rationale, "shipping", row.annotation,
    )
    for row in ROWS
]  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def exported(run: RunFolder, path: Path) -> list[dict[str, str]]:
    items = ordered(ROWS, TASK, order="file")
    export_csv(path, items, run.read_reviews("train"))
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def save(path: Path, rows: list[dict[str, str]], **form: Any) -> Path:
    """As a spreadsheet may: other separators, line ends, encodings and order of columns."""
    text = io.StringIO()
    names = form.pop("names", list(rows[0]))
    writer = csv.DictWriter(
        text,
        names,
        delimiter=form.pop("delimiter", ","),
        lineterminator=form.pop("end", "\r\n"),
        extrasaction="ignore",
        quoting=csv.QUOTE_ALL,
    )
    writer.writeheader()
    writer.writerows(rows)
    path.write_bytes(
        (form.pop("start", "") + text.getvalue()).encode(form.pop("encoding", "utf-8"))
    )
    assert not form
    return path


def take_back(path: Path, run: RunFolder) -> tuple[dict[str, int], int, int]:
    result = import_csv(path, ROWS, TASK, run, "train", "ada")
    return dict(result.saved), result.unchanged, result.undecided


def test_no_cell_is_a_formula_and_input_fields_keep_clear_of_other_columns(
    run: RunFolder, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    rows = exported(run, path)
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")
    assert [row["id"] for row in rows] == ["007", "b", "c", "d"]
    assert (rows[0]["text"], rows[0]["input.id"]) == ('\'=cmd|"/c calc"!A1', "x")
    assert rows[0]["rationale"] == "'=1+1 is two.\nReally." and rows[0]["why"] == "gold is shipping"
    assert take_back(path, run) == ({}, 0, 4) and not run.reviews("train").exists()


@pytest.mark.parametrize(
    "form",
    [
        {"delimiter": ";", "start": "\ufeff"},
        {"delimiter": ";", "start": "sep=;\r\n"},
        {"delimiter": "\t", "encoding": "utf-16"},
        {"end": "\n"},
        {"end": "\r"},
        {"names": ["comment", "decision", "new_label", "new_rationale", "label", "rationale", "id",
                   "gold_is_wrong", "new_gold"]},
    ],
)  # fmt: skip
def test_decisions_are_taken_back_from_what_a_spreadsheet_saved(
    run: RunFolder, tmp_path: Path, form: dict[str, Any]
) -> None:
    rows = exported(run, tmp_path / "rows.csv")
    rows[0] |= {"decision": "Accepted", "gold_is_wrong": "x", "rationale": rows[0]["rationale"]}
    rows[1] |= {"new_label": " SHIPPING ", "new_rationale": "'=A1 is\r\na cell", "comment": "=1"}
    rows[3] |= {"new_rationale": " (none) "}
    path = save(tmp_path / "back.csv", rows, **form)
    assert take_back(path, run) == ({"accepted": 1, "corrected": 2}, 0, 1)
    saved = deciding_reviews(run.read_reviews("train"))
    assert saved["007"].gold_is_wrong and saved["007"].right_gold("shipping") == "billing"
    assert (saved["b"].label, saved["b"].rationale) == ("shipping", "=A1 is\na cell")
    assert (saved["d"].label, saved["d"].rationale) == (None, "")
    assert saved["b"].comment == "=1" and saved["b"].reviewer == "ada"
    # A file can be imported twice, and an export holds what was decided.
    assert take_back(path, run) == ({}, 3, 1)
    with pytest.raises(UserError, match="may have decisions that are not imported yet"):
        exported(run, path)
    path.unlink()
    assert exported(run, path)[1]["new_label"] == "shipping"
    assert take_back(path, run) == ({}, 3, 1)


def test_a_second_decision_is_refused_where_the_first_is_saved_already(
    run: RunFolder, tmp_path: Path
) -> None:
    rows = exported(run, tmp_path / "rows.csv")
    rows[0] |= {"decision": "accepted"}
    assert take_back(save(tmp_path / "first.csv", rows), run) == ({"accepted": 1}, 0, 3)
    both = [*rows, rows[0] | {"decision": "rejected"}]
    with pytest.raises(UserError, match="row 2 has another decision for id '007'"):
        take_back(save(tmp_path / "both.csv", both), run)
    assert deciding_reviews(run.read_reviews("train"))["007"].decision == "accepted"


def test_all_unusable_rows_are_listed_and_nothing_is_imported(
    run: RunFolder, tmp_path: Path
) -> None:
    rows = exported(run, tmp_path / "rows.csv")
    rows[0] |= {"id": "7", "decision": "accepted"}
    rows[1] |= {"new_label": "returns"}
    rows[2] |= {"decision": "accepted"}
    rows[3] |= {"decision": "maybe"}
    more = {"decision": "accepted"}
    rows += [
        rows[3] | more | {"id": "nobody"},
        rows[3] | more | {"label": "shipping"},
        rows[3] | more | {"new_label": "shipping"},
        rows[3] | {"decision": "corrected"},
        rows[3] | {"decision": "", "new_gold": "shipping"},
        rows[3] | more,
        rows[3] | {"decision": "rejected"},
    ]
    rows[5] |= {"rationale": "another"}
    path = save(tmp_path / "back.csv", rows)
    with pytest.raises(UserError) as error:
        take_back(path, run)
    assert error.value.problem.splitlines()[1:] == [
        "  row 2: id '7' is '007' in the run: format the id column as text",
        "  row 3: new_label is 'returns', which is not a label of the task",
        "  row 4: accepted, but the row has no label: write one into new_label",
        "  row 5: decision is 'maybe', not one of accepted, corrected, rejected, skipped, undone",
        "  row 6: no row of the run has id 'nobody'",
        "  row 7: its label is 'shipping' here and 'billing' in the run: write another label into "
        "new_label; if the rows were annotated anew, export them again",
        "  row 8: accepted, but new_label or new_rationale is filled in",
        "  row 9: corrected, but new_label and new_rationale change nothing",
        "  row 10: gold_is_wrong without a decision: write accepted or rejected",
        "  row 12: row 11 has another decision for id 'd'",
    ]
    assert not run.reviews("train").exists()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "has no rows"),
        (b"id,label,decision\r\n", "has no rows"),
        (b"id,decision\r\nb,accepted\r\n", "no column 'label'"),
        (b"id,label,decision\r\nb,billing,\xe9\r\n", "is not UTF-8 text"),
        (b'id,label,decision\r\nb,"billing,accepted\r\n', "not valid CSV"),
    ],
)
def test_a_file_that_is_no_export_is_refused(
    run: RunFolder, tmp_path: Path, content: bytes, problem: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=problem):
        take_back(path, run)
    with pytest.raises(UserError, match="cannot be read"):
        take_back(tmp_path / "none.csv", run)


TEXTS = st.text(
    st.one_of(
        st.sampled_from("=+-@'\"\t;, \n＝"),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"),
    ),
    min_size=1,
    max_size=12,
).map(str.strip).filter(bool)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_whatever_people_wrote_comes_back_as_it_was(
    decisions: list[tuple[str, str]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, other = RunFolder(Path(folder) / "a"), RunFolder(Path(folder) / "b")
        for (rationale, comment), row in zip(decisions, ROWS, strict=False):
            fields = {"rationale": rationale, "comment": comment, "decision": "corrected"}
            review = decision(row.id, shown=row.label, label="shipping", **fields)
            append_review(run, "train", Review.model_validate(dict(review)))
        reviews = deciding_reviews(run.read_reviews("train"))
        path = Path(folder) / "rows.csv"
        export_csv(path, ordered(ROWS, TASK, order="file"), run.read_reviews("train"))
        import_csv(path, ROWS, TASK, other, "train", "ada")
        taken_back = deciding_reviews(other.read_reviews("train"))
        assert {i: (r.rationale, r.comment, r.label) for i, r in taken_back.items()} == {
            i: (r.rationale, r.comment, r.label) for i, r in reviews.items()
        }
