"""Rows into Examples: every format alike, every bad row named, the held-out parts fixed by id."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import write_csv, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from dsbs.config import Recipe
from dsbs.errors import DsbsError, UserError
from dsbs.records import Example
from dsbs.tasks import make_task
from dsbs.tasks.data import is_held_out, load, position, survey
from dsbs.tasks.tables import read_table

LABELS = ["billing", "shipping"]

ROWS = [
    {"id": "a", "text": 'He said "no", twice', "label": "billing", "rationale": "It is said."},
    {"id": "b", "text": "two\nlines, é and \u2028", "label": "shipping", "rationale": "Lines."},
    {"id": "c", "text": "plain", "label": "Billing", "rationale": "Plain."},
]


def recipe(
    train: str | Path,
    name: str = "classification",
    *,
    data: dict[str, Any] | None = None,
    **task: Any,
) -> Recipe:
    if name == "classification":
        task.setdefault("labels", ["billing", "shipping"])
    sources = {"train": str(train), "valid": str(train), "test": str(train)} | (data or {})
    return Recipe(name="x", task={"name": name, "data": sources} | task, teacher={"model": "m"})


def rows_of(made: Recipe, split: str = "train") -> list[Example]:
    return load(made, make_task(made.task), split)


def read(train: str | Path, name: str = "classification", **task: Any) -> list[Example]:
    return rows_of(recipe(train, name, **task))


def problem(train: str | Path, name: str = "classification", **task: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        read(train, name, **task)
    assert caught.value.hint
    return caught.value


def many(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": f"r{i}", "text": f"text {i}", "label": "billing"}
        for i in range(start, start + count)
    ]


# --- formats


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def in_format(folder: Path, kind: str) -> str:
    path = folder / f"train.{kind}"
    if kind == "jsonl":
        return str(write_jsonl(path, ROWS))
    if kind == "jsonl.gz":
        path.write_bytes(gzip.compress(write_jsonl(folder / "plain.jsonl", ROWS).read_bytes()))
        return str(path)
    if kind == "csv":
        return str(write_csv(path, ROWS))
    if kind == "tsv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(ROWS[0]), delimiter="\t")
            writer.writeheader()
            writer.writerows(ROWS)
        return str(path)
    if kind == "parquet":
        return str(write_parquet(path, ROWS))
    (folder / "rows").mkdir()
    write_jsonl(folder / "rows" / "train.jsonl", ROWS)
    return f"hub://{folder / 'rows'}/train"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "csv", "tsv", "parquet", "hub"])
def test_every_format_gives_the_same_examples(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    found = read(in_format(tmp_path, kind))
    assert found == [
        Example("a", {"text": 'He said "no", twice'}, "billing", "It is said."),
        Example("b", {"text": "two\nlines, é and \u2028"}, "shipping", "Lines."),
        Example("c", {"text": "plain"}, "billing", "Plain."),
    ]


def test_nested_and_flat_rows_give_the_same_examples(tmp_path: Path) -> None:
    flat = {"id": "1", "premise": "A man.", "hypothesis": "A person.", "label": "entailment"}
    nested = {
        "id": "1",
        "input": {"premise": "A man.", "hypothesis": "A person."},
        "label": "entailment",
    }
    assert read(write_jsonl(tmp_path / "a.jsonl", [flat]), "esnli") == read(
        write_jsonl(tmp_path / "b.jsonl", [nested]), "esnli"
    )


def test_a_recorded_completion_comes_along_and_meta_stays_out(tmp_path: Path) -> None:
    row = ROWS[0] | {
        "teacher": {"model": "m", "completion": " raw\n"},
        "meta": {"answer": "secret"},
    }
    (found,) = read(write_jsonl(tmp_path / "a.jsonl", [row]))
    assert found.completion == " raw\n"
    assert found.input == {"text": ROWS[0]["text"]}


def test_columns_are_found_by_the_names_that_the_recipe_gives(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "a.csv", [{"key": "7", "Message": "hello", "team": "shipping", "why": "so"}]
    )
    columns = {"id": "key", "text": "Message", "label": "team", "rationale": "why"}
    assert read(path, columns=columns) == [Example("7", {"text": "hello"}, "shipping", "so")]


def test_an_input_template_takes_several_columns(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "a.csv",
        [{"id": "1", "title": "T", "body": "B", "label": "billing", "noise": "n"}],
    )
    made = recipe(path, input="{{ title }}: {{ body }}")
    (found,) = rows_of(made)
    assert found.input == {"title": "T", "body": "B"}
    assert make_task(made.task).text(found.input) == "T: B"


def test_rows_without_a_label_are_unlabeled_not_refused(tmp_path: Path) -> None:
    rows = [
        {"id": "1", "text": "a", "label": None},
        {"id": "2", "text": "b"},
        {"id": "3", "text": "c", "label": " "},
    ]
    assert [row.label for row in read(write_jsonl(tmp_path / "a.jsonl", rows))] == [
        None,
        None,
        None,
    ]


def test_paths_are_looked_for_beside_the_recipe(tmp_path: Path) -> None:
    from dsbs.config.load import load_recipe

    write_csv(tmp_path / "rows.csv", ROWS)
    path = tmp_path / "r.yaml"
    path.write_text(
        "task: {name: classification, labels: [billing, shipping], data: {train: rows.csv}}\n"
        "teacher: {model: m}\n"
    )
    made = load_recipe(path, ["task.data.test=rows.csv", "task.data.valid=rows.csv"])
    assert [row.id for row in rows_of(made)] == ["a", "b", "c"]


# --- ids


def test_a_missing_id_is_made_from_the_content(tmp_path: Path) -> None:
    rows = [
        {"text": "one", "label": "billing"},
        {"text": "two", "label": "billing"},
        {"text": "one", "label": "shipping"},
    ]
    first = [row.id for row in read(write_jsonl(tmp_path / "a.jsonl", rows))]
    assert len(set(first)) == 3
    turned = [row.id for row in read(write_jsonl(tmp_path / "b.jsonl", rows[::-1]))]
    assert turned == first[::-1]  # whatever the order


def test_a_made_id_does_not_depend_on_the_format(tmp_path: Path) -> None:
    rows = [{"text": "one", "label": "billing"}]
    ids = {
        read(write_jsonl(tmp_path / "a.jsonl", rows))[0].id,
        read(write_csv(tmp_path / "a.csv", rows))[0].id,
    }
    assert len(ids) == 1


def test_copies_without_ids_stay_apart_and_on_one_side_of_a_hold_out(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 60}", "label": "billing"} for i in range(180)]
    made = recipe(write_jsonl(tmp_path / "a.jsonl", rows), data={"test": None, "valid": None})
    train, test = rows_of(made, "train"), rows_of(made, "test")
    assert len({row.id for row in train + test}) == 180
    assert not {row.input["text"] for row in train} & {row.input["text"] for row in test}
    assert set(Counter(row.input["text"] for row in test).values()) == {3}
    held = {row.input["text"] for row in train if is_held_out(made, row)}
    assert held
    assert not held & {row.input["text"] for row in train if not is_held_out(made, row)}


def test_copies_are_on_one_side_whatever_their_ids_and_labels(tmp_path: Path) -> None:
    rows = [
        {"id": f"r{i}", "text": f"Text\u00a0{i}" if i < 60 else f" text  {i % 60}", "label": label}
        for i, label in enumerate(LABELS * 90)
    ]
    made = recipe(write_jsonl(tmp_path / "a.jsonl", rows), data={"test": None, "valid": None})
    train, test = rows_of(made, "train"), rows_of(made, "test")
    assert len(train) + len(test) == 180

    def numbers(part: list[Example]) -> Counter[int]:
        return Counter(int(row.id[1:]) % 60 for row in part)

    held = numbers([row for row in train if is_held_out(made, row)])
    learned = numbers([row for row in train if not is_held_out(made, row)])
    assert set(held.values()) == set(learned.values()) == set(numbers(test).values()) == {3}
    # Rows without a copy are where their own ids put them.
    assert {row.id for row in test if int(row.id[1:]) < 60} == {
        f"r{i}" for i in range(60) if position(f"r{i}", "test") < 0.2
    }


def test_ids_of_your_own_are_held_out_one_by_one_whatever_they_are_made_of(tmp_path: Path) -> None:
    rows = [{"id": f"corpus~{i}", "text": f"text {i}", "label": "billing"} for i in range(200)]
    made = recipe(write_jsonl(tmp_path / "a.jsonl", rows), data={"test": None, "valid": None})
    held = sum(is_held_out(made, row) for row in rows_of(made, "train"))
    assert 5 <= held <= 40


def test_an_id_that_occurs_twice_is_named_with_both_lines(tmp_path: Path) -> None:
    rows = many(5)
    rows[4]["id"] = "r1"
    message = problem(write_jsonl(tmp_path / "a.jsonl", rows)).problem
    assert "a.jsonl:5: id 'r1' occurs twice" in message
    assert "first in line 2" in message


def test_numbers_as_ids_are_text(tmp_path: Path) -> None:
    rows = [{"id": 0, "text": "a", "label": "billing"}, {"id": 1, "text": "b", "label": "billing"}]
    assert [row.id for row in read(write_jsonl(tmp_path / "a.jsonl", rows))] == ["0", "1"]


# --- what pandas and other writers leave behind


def test_nan_is_an_empty_cell_and_never_the_word(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"id": "1", "text": "t", "label": NaN}\n{"id": "2", "text": "u", "label": "nan"}\n'
        '{"id": 3.0, "text": "v", "label": "billing", "rationale": NaN}\n'
    )
    found = read(tmp_path / "a.jsonl")
    assert [(row.id, row.label, row.rationale) for row in found] == [
        ("1", None, None),
        ("2", None, None),
        ("3", "billing", None),
    ]


@pytest.mark.parametrize("label", ["nan", "NaN"])
def test_nan_is_a_label_where_the_recipe_says_so(tmp_path: Path, label: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "text": "t", "label": label}])
    assert [row.label for row in read(path, labels=[label, "eng"])] == [label]


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("text", "NaN", "text is empty"),
        ("text", '"nan"', "text is 'nan'"),
        ("text", "null", "text is empty"),
        ("text", "Infinity", "text is an infinite number"),
        ("text", '["a", "b"]', "text is a list"),
        ("text", '{"a": 1}', "text is a dict"),
        ("text", '"a\\u0000b"', "text has a NUL character"),
        ("label", '["billing"]', "label is a list"),
        ("label", '{"name": "billing"}', "label is a dict"),
        ("label", "-Infinity", "label is an infinite number"),
        ("id", "[1]", "id is a list"),
        ("rationale", "[]", "rationale is a list"),
    ],
)
def test_a_cell_that_is_no_text_is_refused_by_its_line(
    tmp_path: Path, name: str, value: str, told: str
) -> None:
    cells = {"id": '"1"', "text": '"t"', "label": '"billing"'} | {name: value}
    line = "{" + ", ".join(f'"{key}": {cell}' for key, cell in cells.items()) + "}"
    (tmp_path / "a.jsonl").write_text('{"id": "0", "text": "t"}\n' + line + "\n")
    assert f"a.jsonl:2: {told}" in problem(tmp_path / "a.jsonl").problem


def test_a_template_reads_lists_but_never_prints_them_as_python_does(tmp_path: Path) -> None:
    row = {"id": "1", "words": ["a", "b"], "note": float("nan"), "label": "billing"}
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    made = recipe(path, input="{{ words | join(' ') }}{{ note }}")
    (found,) = rows_of(made)
    assert make_task(made.task).text(found.input) == "a b"
    error = problem(path, input="{{ words }}")
    assert "a.jsonl:1: task.input: the template prints a list" in error.problem
    assert "join" in error.hint


@pytest.mark.parametrize(
    "text",
    [
        ",text,label\n0,hello,billing\n1,there,shipping\n",
        "Unnamed: 0,text,label\n0,hello,billing\n1,there,shipping\n",
        " text , label \nhello,billing\nthere,shipping\n",
        "text,label,,\nhello,billing,,\nthere,shipping\n,,,\n\n",
        "text,label\nhello,billing\n,\nthere,shipping,\n",
        "text,label\rhello,billing\rthere,shipping\r",
        "\ufefftext,label\r\nhello,billing\r\nthere,shipping\r\n",
        "index,message,label\n0,hello,billing\n1,there,shipping\n",
    ],
    ids=["index", "read again", "spaces", "columns", "rows", "CR", "BOM and CRLF", "reset_index"],
)
def test_a_table_is_read_without_what_its_writer_added(tmp_path: Path, text: str) -> None:
    (tmp_path / "TABLE.CSV").write_bytes(text.encode())
    (tmp_path / "utf16.csv").write_bytes(text.encode("utf-16"))
    for name in ("TABLE.CSV", "utf16.csv"):
        found = read(tmp_path / name)
        assert [(*row.input.values(), row.label) for row in found] == [
            ("hello", "billing"),
            ("there", "shipping"),
        ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.csv", "text,label,\na,billing,odd\n", r"a\.csv:2: more cells than columns \(3 and 2"),
        ("a.csv", "text,,label\na,odd,billing\n", r"a\.csv:2: 'odd' is in a column without a name"),
        ("a.csv", "text, text\na,b\n", r"a\.csv:1: two columns are called 'text'"),
        ("a.csv", "text\tlabel\na\tbilling\n", r"a\.csv:1: columns are separated by '\\t'"),
        ("a.csv", "text,label\na\0b,billing\n", r"a\.csv:2: text has a NUL character"),
        ("a.csv", 'text,label\nx,billing\n"a\nb,billing\n', r"a\.csv:3: not valid CSV"),
        ("a.tsv", "text,label\na,billing\n", r"a\.tsv:1: columns are separated by ','"),
        ("a.tsv", 'text\tlabel\n"a\tbilling\nb"\n', r"a\.tsv:3: fewer cells than columns"),
        ("a.tsv", 'text\n"a\nb"\nc\n', r"unclear whether quotes enclose cells here: it has 4 l"),
        ("a.tsv", 'text\tlabel\n"a\tb\tx\nc"\tbilling\n', r"unclear whether quotes enclose cells"),
        ("a.json", '[\n{"text": "a"}\n]\n', r"a\.json:1: not valid JSON .*\n.*jq -c"),
        ("a.csv", "te\0xt,label\na,billing\n", r"a\.csv:1: NUL characters"),
        (
            "a.json",
            '{\n"text": "a"\n}\n',
            r"a\.json:1: not valid JSON .*\n.*on one line",
        ),
        ("a.jsonl", '[{"text": "a"}]\n', r"a\.jsonl:1: a JSON list, not an object\n.*jq -c"),
        ("a.jsonl", '{"text": "a"}\n{"te', r"a\.jsonl:2: .*ends in the middle of this line"),
        ("a.jsonl", '{"text": "a"}\n\0\0\0\0', r"a\.jsonl:2: .*the line has NUL characters"),
    ],
)
def test_a_file_that_cannot_be_right_is_refused_by_line(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_text(text, newline="")
    with pytest.raises(UserError, match=told):
        read(tmp_path / name)


def test_another_encoding_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("text,label\ncafé,billing\n".encode("latin-1"))
    error = problem(tmp_path / "a.csv")
    assert "is not UTF-8 text" in error.problem
    assert "iconv" in error.hint


# --- quotes in TSV


def test_a_quote_in_tsv_is_a_character_and_every_line_a_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ['"I was billed', 'Where is it "', '"No"', 'say "no', "it's"]
    (tmp_path / "a.tsv").write_text(
        "text\tlabel\n" + "".join(f"{line}\tbilling\n" for line in lines)
    )
    assert [row.input["text"] for row in read(tmp_path / "a.tsv")] == lines
    (tmp_path / "b.tsv").write_text(
        "text\tlabel\n" + "".join(f"{line}\tbilling\n" for line in lines[:2])
    )
    assert [row.input["text"] for row in read(tmp_path / "b.tsv")] == lines[:2]
    assert "quotes are read as characters" in caplog.text  # a CSV reader makes one row of both


CELLS = st.text(st.sampled_from("ab \"',.é"), min_size=1, max_size=6).filter(str.strip)
TABLES = st.integers(2, 3).flatmap(
    lambda width: st.lists(st.lists(CELLS, min_size=width, max_size=width), min_size=1, max_size=5)
)


@given(TABLES)
def test_a_tsv_that_was_written_without_quoting_keeps_its_rows(table: list[list[str]]) -> None:
    names = ["a", "b", "c"][: len(table[0])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tsv"
        path.write_text("".join("\t".join(cells) + "\n" for cells in [names, *table]))
        found = [list(row.values()) for _, row in read_table(path)]
    assert len(found) == len(table)
    for cells, texts in zip(table, found, strict=True):
        assert all(
            text in (cell, cell[1:-1].replace('""', '"'))
            for cell, text in zip(cells, texts, strict=True)
        )


@given(TABLES, st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), st.booleans())
def test_a_tsv_that_a_csv_library_wrote_keeps_its_cells(
    table: list[list[str]], quoting: Any, with_breaks: bool
) -> None:
    if with_breaks:
        table = [[cell.replace(",", "\n") for cell in cells] for cells in table]
    table = [cells for cells in table if any(map(str.strip, cells))] or [["a", "b"]]
    names = ["a", "b", "c"][: len(table[0])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tsv"
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t", quoting=quoting).writerows([names, *table])
        found = [list(row.values()) for _, row in read_table(path)]
    assert found == table


# --- bad rows


def test_several_bad_rows_are_told_at_once(tmp_path: Path) -> None:
    rows = many(6)
    rows[1]["label"] = "sales"
    rows[3]["text"] = " "
    rows[5]["id"] = "r0"
    message = problem(write_jsonl(tmp_path / "a.jsonl", rows)).problem
    assert message.startswith("3 unusable rows:")
    assert "a.jsonl:2: label 'sales' is not one of billing, shipping" in message
    assert "a.jsonl:4: text is empty" in message
    assert "a.jsonl:6: id 'r0' occurs twice" in message


def test_of_many_bad_rows_the_first_five_are_named(tmp_path: Path) -> None:
    rows = [row | {"label": "sales"} for row in many(40)]
    message = problem(write_jsonl(tmp_path / "a.jsonl", rows)).problem
    assert message.startswith("5 unusable rows (and perhaps more):")
    assert [f"a.jsonl:{i}:" in message for i in range(1, 8)] == [True] * 5 + [False] * 2


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", many(9))
    lines = path.read_text().split("\n")
    lines[6] = lines[6][:-4]
    path.write_text("\n".join(lines))
    assert "a.jsonl:7: not valid JSON" in problem(path).problem


def test_a_missing_column_tells_the_columns_there_are(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "a.csv", [{"id": "1", "premise": "p", "hypo": "h", "label": "neutral"}]
    )
    error = problem(path, "esnli")
    assert "a.csv:2: no column 'hypothesis' (columns: id, premise, hypo, label)" in error.problem
    assert "task.columns" in error.hint


def test_two_text_columns_are_not_guessed_between(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"title": "t", "body": "b", "label": "billing"}])
    message = problem(path).problem
    assert "title" in message
    assert "body" in message


def test_a_label_column_that_is_not_there_is_a_mistake_not_unlabeled_rows(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"text": "t", "team": "billing"}])
    message = problem(path, columns={"label": "taem", "text": "text"}).problem
    assert "no column 'taem' (columns: text, team)" in message


def test_a_missing_column_is_reported_once_for_the_file(tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "team": "billing"} for i in range(20)]
    message = problem(write_csv(tmp_path / "a.csv", rows), columns={"label": "taem"}).problem
    assert message == f"{tmp_path / 'a.csv'}:2: no column 'taem' (columns: text, team)"


def test_a_mapped_column_of_a_field_is_in_the_file(tmp_path: Path) -> None:
    fields = {"sender": {"type": "text"}, "total": {"type": "number"}}
    columns = {"sender": "from", "total": "amount"}
    rows = [{"text": f"t{i}", "from": "Ann", "amuont": str(i)} for i in range(20)]
    keys: dict[str, Any] = {
        "name": "extraction",
        "labels": None,
        "fields": fields,
        "columns": columns,
    }
    for name, where in (("a.csv", "a.csv:2"), ("a.jsonl", "a.jsonl")):
        write = write_csv if name.endswith(".csv") else write_jsonl
        error = problem(write(tmp_path / name, rows), **keys)
        expected = f"{tmp_path / where}: no column 'amount' (columns: text, from, amuont)"
        assert error.problem == expected
        assert error.hint.startswith("did you mean 'amuont'? task.columns.total must name")
    sparse = [{"text": "a", "from": "Ann"}, {"text": "b", "amount": 3}]
    labels = [row.label for row in read(write_jsonl(tmp_path / "b.jsonl", sparse), **keys)]
    assert labels == ["sender: Ann\ntotal: null", "sender: null\ntotal: 3"], "rows may lack a name"
    whole = [{"text": "a", "label": {"sender": "Ann", "total": 3}}]
    read(write_jsonl(tmp_path / "c.jsonl", whole), **keys)
    empty = [{"text": "a", "from": "Ann", "amount": ""}, {"text": "b", "from": "", "amount": ""}]
    labels = [row.label for row in read(write_csv(tmp_path / "b.csv", empty), **keys)]
    assert labels == ["sender: Ann\ntotal: null", None], "an empty column is no mistake"


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    assert "a.jsonl is empty" in problem(tmp_path / "a.jsonl").problem


def test_a_table_with_a_header_alone_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text,label\n")
    assert "a.csv has no rows: a header alone" in problem(tmp_path / "a.csv").problem


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id;text;label\n1;a;billing\n", r"a\.csv:1: columns are separated by ';'"),
        ("id,text,text\n1,a,b\n", r"a\.csv:1: two columns are called 'text'"),
        ("id,text,label\n1,a,billing\n2,a, b,billing\n", r"a\.csv:3: more cells than columns"),
        ("id,text,label\n1,a,billing\n2,a\n", r"a\.csv:3: fewer cells than columns"),
        ('id,text,label\n1,"a"b,billing\n', r"a\.csv:2: not valid CSV"),
        ('id,text,label\n1,"a,billing\n', r"a\.csv:\d: not valid CSV"),
    ],
)
def test_a_table_with_crooked_rows_is_refused_by_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=told):
        read(tmp_path / "a.csv")


def test_other_kinds_of_file_are_refused_with_those_that_are_known(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    error = problem(tmp_path / "a.xlsx")
    assert "unknown file format" in error.problem
    assert ".parquet" in error.hint


def test_parquet_text_without_its_mark_is_read_and_other_bytes_are_refused(tmp_path: Path) -> None:
    rows = [{"id": b"1", "text": "é".encode(), "label": b"billing"}]
    assert read(write_parquet(tmp_path / "a.parquet", rows)) == [
        Example("1", {"text": "é"}, "billing")
    ]
    rows.append({"id": b"2", "text": b"\xff\xfe", "label": b"billing"})
    told = problem(write_parquet(tmp_path / "b.parquet", rows)).problem
    assert "b.parquet:2: text has bytes that are not UTF-8 text" in told


def test_invalid_utf8_in_a_parquet_text_column_is_refused_by_its_row(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.array([b"good", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    assert "a.parquet:2: the row cannot be read" in problem(tmp_path / "a.parquet").problem


def test_class_numbers_are_read_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=LABELS)}
    )
    columns = {"text": ["a", "b", "c"], "label": [1, 0, -1]}
    table = datasets.Dataset.from_dict(columns, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    assert [row.label for row in read(tmp_path / "a.parquet")] == ["shipping", "billing", None]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: table)
    assert [row.label for row in read("hub://a/train")] == ["shipping", "billing", None]


def test_a_category_of_pandas_is_its_text(tmp_path: Path) -> None:
    import pandas

    frame = pandas.DataFrame({"text": ["a", "b"], "label": ["billing", None]}, index=[5, 7])
    frame["label"] = frame["label"].astype("category")
    frame.rename(columns={"text": "message"}).to_parquet(tmp_path / "a.parquet")
    assert [(row.input, row.label) for row in read(tmp_path / "a.parquet")] == [
        ({"text": "a"}, "billing"),
        ({"text": "b"}, None),
    ]


def test_a_broken_parquet_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("x")
    assert "not a readable parquet file" in problem(tmp_path / "a.parquet").problem


@pytest.mark.parametrize("source", ["hub://svamp", "hub:///train", "hub://"])
def test_a_hub_address_without_its_split_is_refused(source: str) -> None:
    assert "not of the form hub://owner/name/split" in problem(source).problem


def test_a_hub_split_that_is_not_there_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DsbsError, match="elsewhere"):
        read(f"hub://{tmp_path}/elsewhere")


def test_half_an_emoji_is_read_or_refused_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"id": "1", "text": "cut \\ud83d", "label": "billing"}\n'
    )  # JSON allows it, UTF-8 does not
    try:
        rows = read(path)
    except UserError as error:
        assert "a.jsonl:1" in error.problem
    else:
        assert len(survey(rows).hash) == 64


def test_a_date_in_a_parquet_column_is_read_as_text(tmp_path: Path) -> None:
    row = {"id": "1", "day": datetime.date(2024, 5, 1), "message": "hello", "label": "billing"}
    made = recipe(write_parquet(tmp_path / "a.parquet", [row]), input="{{ day }}: {{ message }}")
    (found,) = rows_of(made)
    assert make_task(made.task).text(found.input) == "2024-05-01: hello"
    assert len(survey([found]).hash) == 64
    assert json.dumps(found.input)  # annotations and predictions are JSON


# --- splits


def test_held_out_parts_are_the_same_every_time_and_share_no_row(tmp_path: Path) -> None:
    made = recipe(write_jsonl(tmp_path / "a.jsonl", many(400)), data={"test": None, "valid": None})
    train, valid, test = (rows_of(made, split) for split in ("train", "valid", "test"))
    assert [rows_of(made, split) for split in ("train", "valid", "test")] == [train, valid, test]
    assert not {row.id for row in test} & {row.id for row in train}
    assert {row.id for row in train} | {row.id for row in test} == {f"r{i}" for i in range(400)}
    assert valid == [
        row for row in train if is_held_out(made, row)
    ]  # annotated with the rest, not trained on
    assert 50 <= len(test) <= 110  # a fifth
    assert 15 <= len(valid) <= 55  # a tenth of the rest


def test_added_rows_move_none_between_the_parts(tmp_path: Path) -> None:
    small = recipe(
        write_jsonl(tmp_path / "a.jsonl", many(200, start=50)), data={"test": None, "valid": None}
    )
    large = recipe(
        write_jsonl(tmp_path / "b.jsonl", many(400)[::-1]), data={"test": None, "valid": None}
    )
    for split in ("train", "valid", "test"):
        before = {row.id for row in rows_of(small, split)}
        after = {row.id for row in rows_of(large, split)}
        assert before == {row_id for row_id in after if 50 <= int(row_id[1:]) < 250}


def test_a_valid_file_of_its_own_is_used_whole(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "a.jsonl", many(50))
    valid = write_jsonl(tmp_path / "v.jsonl", many(100, start=1000))
    made = recipe(train, data={"valid": str(valid), "test": None})
    assert len(rows_of(made, "valid")) == 100  # test is held out of the train file only
    assert not any(is_held_out(made, row) for row in rows_of(made, "train"))


def test_a_test_file_of_its_own_leaves_train_whole(tmp_path: Path) -> None:
    test = write_jsonl(tmp_path / "t.jsonl", many(7, start=1000))
    made = recipe(
        write_jsonl(tmp_path / "a.jsonl", many(50)), data={"valid": None, "test": str(test)}
    )
    assert len(rows_of(made, "train")) == 50
    assert [row.id for row in rows_of(made, "test")] == [f"r{i}" for i in range(1000, 1007)]


def test_a_rows_place_is_spread_evenly_and_differs_between_the_parts() -> None:
    places = [position(f"r{i}", "valid") for i in range(2000)]
    assert all(0 <= place < 1 for place in places)
    assert all(
        150 <= sum(i / 10 <= place < (i + 1) / 10 for place in places) <= 250 for i in range(10)
    )
    assert position("r1", "valid") != position("r1", "test")


def test_a_held_out_part_without_rows_is_told(tmp_path: Path) -> None:
    made = recipe(write_jsonl(tmp_path / "a.jsonl", many(1)), data={"test": None, "valid": None})
    with pytest.raises(UserError, match="has no rows"):
        for split in ("train", "valid", "test"):
            rows_of(made, split)


def test_a_limit_takes_the_first_rows_of_every_split(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", many(100))
    whole = recipe(path, data={"test": None, "valid": None})
    limited = recipe(path, data={"test": None, "valid": None}, limit=4)
    for split in ("train", "valid", "test"):
        assert rows_of(limited, split) == rows_of(whole, split)[:4]


def test_the_data_hash_changes_with_any_part_of_a_row() -> None:
    base = {
        "id": "a",
        "input": {"text": "t"},
        "label": "billing",
        "rationale": "r",
        "completion": "c",
    }
    changed = [
        base | change
        for change in ({"id": "b"}, {"input": {"text": "u"}}, {"label": None}, {"rationale": ""})
    ]
    changed += [base | {"completion": "d"}]
    assert len({survey([Example(**row)]).hash for row in (base, *changed)}) == 6
    assert survey([Example(**base)]).hash != survey([Example(**base)] * 2).hash


# --- what data sets call things


CHOICES = ["bank", "river", "sea"]


@pytest.mark.parametrize(
    "given",
    [
        {"choices": {"label": ["A", "B", "C"], "text": CHOICES}, "answerKey": "B"},
        {"choices": CHOICES, "label": "river"},
        {"choices": CHOICES, "answer": "B"},
        {
            "choices": [
                {"label": "A", "text": "bank"},
                {"label": "B", "text": "river"},
                {"text": "sea"},
            ],
            "label": "(b)",
        },
        {"choices": json.dumps(CHOICES), "label": "River"},
        {"choices": json.dumps({"label": ["A", "B", "C"], "text": CHOICES}), "label": "b"},
        {"c_0": "bank", "c_1": "river", "c_2": "sea", "label": "river"},
        {"choices": "(a) bank\n(b) river\n(c) sea", "label": "river"},
    ],
    ids=[
        "hub",
        "list",
        "letter",
        "objects",
        "json text",
        "json of the hub's",
        "c_0",
        "lettered text",
    ],
)
def test_cqa_takes_choices_in_every_form(tmp_path: Path, given: dict[str, Any]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"id": "1", "question": "Where?", **given}])
    assert read(path, "cqa") == [Example("1", {"question": "Where?", "choices": CHOICES}, "river")]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"choices": "bank, river"},
        {"choices": 3},
        {"choices": ["bank"]},
        {"choices": ["a", " "]},
        {"choices": list("abcdefghijk")},
    ],
)
def test_cqa_refuses_what_are_no_choices(tmp_path: Path, given: dict[str, Any]) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"id": "1", "question": "Where?", "label": "a", **given}]
    )
    assert "a.jsonl:1" in problem(path, "cqa").problem


@pytest.mark.parametrize("label", ["mountain", "D", "BB"])
def test_cqa_refuses_a_label_that_is_no_choice(tmp_path: Path, label: str) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"question": "Where?", "choices": CHOICES, "label": label}]
    )
    assert "is not one of the choices" in problem(path, "cqa").problem


NLI_ROWS = [
    {"uid": "u0", "premise": "p", "hypothesis": "h", "label": 0, "reason": "r"},
    {"uid": "u1", "premise": "p", "hypothesis": "h", "label": 1, "reason": ""},
    {"uid": "u2", "premise": "p", "hypothesis": "h", "label": 2, "reason": "r"},
    {"uid": "u3", "premise": "p", "hypothesis": "h", "label": -1, "reason": "r"},
]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_nli_takes_class_numbers_and_leaves_minus_one_unlabeled(tmp_path: Path, kind: str) -> None:
    write = write_jsonl if kind == "jsonl" else write_csv
    found = read(write(tmp_path / f"a.{kind}", NLI_ROWS), "anli")
    assert [(row.id, row.label) for row in found] == [
        ("u0", "entailment"),
        ("u1", "neutral"),
        ("u2", "contradiction"),
        ("u3", None),
    ]
    assert [row.rationale for row in found] == ["r", None, "r", "r"]


def test_esnli_takes_the_published_column_names(tmp_path: Path) -> None:
    row = {
        "pairID": "x#1",
        "Sentence1": "p",
        "Sentence2": "h",
        "gold_label": "neutral",
        "Explanation_1": "e",
    }
    found = read(write_csv(tmp_path / "a.csv", [row]), "esnli")
    assert found == [Example("x#1", {"premise": "p", "hypothesis": "h"}, "neutral", "e")]


def test_snlis_dash_for_no_majority_is_unlabeled(tmp_path: Path) -> None:
    (found,) = read(write_jsonl(tmp_path / "a.jsonl", [NLI_ROWS[0] | {"label": "-"}]), "esnli")
    assert found.label is None


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_minus_one_is_an_answer_like_any_other_where_answers_are_numbers(
    tmp_path: Path, kind: str
) -> None:
    rows = [{"id": "1", "text": "3 - 4?", "label": -1}, {"id": "2", "text": "3 - 5?", "label": -2}]
    write = write_jsonl if kind == "jsonl" else write_csv
    found = read(write(tmp_path / f"a.{kind}", rows), "generation", numeric=True)
    assert [row.label for row in found] == ["-1", "-2"]


def test_svamp_takes_the_published_column_names_and_spells_labels_its_own_way(
    tmp_path: Path,
) -> None:
    row = {
        "ID": "chal-1",
        "Body": "Two and three.",
        "Question": "Sum?",
        "Equation": "(2+3)",
        "Answer": "5",
    }
    found = read(write_csv(tmp_path / "a.csv", [row]), "svamp")
    assert found == [
        Example("chal-1", {"body": "Two and three.", "question": "Sum?"}, "( 2.0 + 3.0 )")
    ]


def test_the_shared_rows_load_whole(shared_data: Path) -> None:
    train = shared_data / "svamp" / "train.jsonl.gz"
    found = rows_of(
        recipe(train, "svamp", data={"test": str(shared_data / "svamp" / "test.jsonl.gz")}), "test"
    )
    assert len(found) == 200
    assert all(row.completion and row.label for row in found)


def test_served_rows_are_all_trained_on_and_none_is_held_out(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", numbered("own", 40))
    served = write_jsonl(tmp_path / "served.jsonl", numbered("served", 40))
    data = {"valid": None, "test": None, "valid_fraction": 0.4, "served": str(served)}
    made = recipe(train, data=data, limit=20)
    rows = rows_of(made)
    own = [row for row in rows if not row.is_served]
    assert len(own) == 20 and any(is_held_out(made, row) for row in own)
    trained = [row.id for row in rows if not is_held_out(made, row)]
    assert [row_id for row_id in trained if row_id.startswith("served")] == [
        f"served-{number}" for number in range(40)
    ]
    for split in ("valid", "test"):
        assert not any(row.id.startswith("served") for row in rows_of(made, split))


def numbered(name: str, number: int) -> list[dict[str, str]]:
    return [
        {"id": f"{name}-{i}", "text": f"{name} text {i}", "label": LABELS[i % 2]}
        for i in range(number)
    ]
