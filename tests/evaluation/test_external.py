"""External predictions: files as users write them, and every mistake in them."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_csv, write_jsonl
from made_students import make_student, rows_of

from dsbs import UserError, load_recipe
from dsbs.config import Recipe, TaskSection
from dsbs.evaluation.predictions import read_predictions
from dsbs.evaluation.recorded import add_external, read_external
from dsbs.records import Example, Prediction
from dsbs.run_folder import RunFolder
from dsbs.tasks import make_task

GOLD = ["billing", "shipping"] * 5


@pytest.fixture
def take(
    toy: Callable[..., Path], tmp_path: Path
) -> Callable[..., dict[str, dict[str, Prediction]]]:
    """Add files as external predictions of the 10 test rows, r1000 to r1009, to ``run``."""

    def taken(**predictions: str) -> dict[str, dict[str, Prediction]]:
        recipe = load_recipe(toy(test=10, eval={"predictions": predictions}))
        names = add_external(
            recipe, make_task(recipe.task), rows_of(recipe), RunFolder(tmp_path / "run")
        )
        assert names == list(predictions)
        return {
            name: read_predictions(RunFolder(tmp_path / "run").predictions(name)) for name in names
        }

    return taken


def lines(*changes: dict[str, Any], predictions: list[Any] = GOLD) -> list[dict[str, Any]]:
    """A file's ten objects, the first ones changed."""
    rows = [
        {"id": f"r{1000 + i}", "prediction": prediction} for i, prediction in enumerate(predictions)
    ]
    return [row | (changes[i] if i < len(changes) else {}) for i, row in enumerate(rows)]


def test_three_files_made_by_hand_become_prediction_files(
    take: Callable[..., dict[str, dict[str, Prediction]]], tmp_path: Path
) -> None:
    rows = lines(
        {
            "prediction": "Billing.",
            "probability": 0.25,
            "rationale": "An invoice.",
            "latency_ms": 12,
            "note": [1],
        }
    )
    plain = write_jsonl(tmp_path / "plain.jsonl", rows)
    mixed: list[Any] = [
        "shipping",
        None,
        "",
        "neither",
        7,
        0.5,
        "the billing team",
        "shipping",
        "billing",
        "shipping",
    ]
    (tmp_path / "packed.jsonl.gz").write_bytes(
        gzip.compress(
            "".join(json.dumps(row) + "\n\n" for row in lines(predictions=mixed)).encode()
        )
    )
    backwards = [*lines()[::-1], {"id": "of another split", "prediction": "billing"}]
    write_jsonl(tmp_path / "backwards.jsonl", backwards)
    predictions = take(
        rules=str(plain), packed="packed.jsonl.gz", **{"an-api.v2": "backwards.jsonl"}
    )  # beside the recipe

    first = predictions["rules"]["r1000"]
    assert first == Prediction(
        id="r1000",
        input={"text": "My invoice number 1000 is wrong."},
        gold="billing",
        raw="Billing.",
        prediction="billing",
        correct=True,
        probability=0.25,
        rationale="An invoice.",
        latency_ms=12.0,
        made_by="outside:" + hashlib.sha256(plain.read_bytes()).hexdigest(),
    )
    assert all(
        prediction.correct and prediction.schema_ == "dsbs.prediction/2"
        for prediction in predictions["rules"].values()
    )
    packed = list(predictions["packed"].values())
    assert [prediction.raw for prediction in packed] == [
        "shipping",
        "",
        "",
        "neither",
        "7",
        "0.5",
        "the billing team",
        "shipping",
        "billing",
        "shipping",
    ]
    assert [prediction.prediction for prediction in packed] == [
        "shipping",
        None,
        None,
        None,
        None,
        None,
        "billing",
        "shipping",
        "billing",
        "shipping",
    ]
    assert [prediction.correct for prediction in packed] == [False] * 6 + [True] * 4
    assert list(predictions["an-api.v2"]) == [f"r{i}" for i in range(1000, 1010)], (
        "in the split's order, and nothing else"
    )


def test_numbers_are_ids_and_answers_too(toy: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("train", "test"):
        write_jsonl(
            tmp_path / f"{name}.jsonl",
            [{"id": i, "question": f"{i} and 1?", "answer": i + 1} for i in range(10)],
        )
    task = {
        "name": "generation",
        "numeric": True,
        "input": "{{ question }}",
        "labels": None,
        "columns": {"label": "answer"},
        "data": {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")},
    }
    write_jsonl(tmp_path / "sums.jsonl", [{"id": i, "prediction": i + 1.0} for i in range(10)])
    recipe = load_recipe(toy(task=task, eval={"predictions": {"sums": "sums.jsonl"}}))
    add_external(recipe, make_task(recipe.task), rows_of(recipe), RunFolder(tmp_path / "run"))
    found = read_predictions(RunFolder(tmp_path / "run").predictions("sums"))
    assert (
        len(found) == 10
        and all(prediction.correct for prediction in found.values())
        and found["3"].raw == "4.0"
    )


def test_a_file_is_read_anew_every_time(
    take: Callable[..., dict[str, dict[str, Prediction]]], tmp_path: Path
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", lines())
    before = take(a="a.jsonl")["a"]["r1000"]
    write_jsonl(path, lines({"prediction": "shipping"}))
    after = take(a="a.jsonl")["a"]["r1000"]
    assert (before.correct, after.correct) == (True, False) and before.made_by != after.made_by
    assert not (tmp_path / "run" / "eval" / "predictions" / "aside").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"prediction": ["billing"]},
            r":1: prediction is \['billing'\].*\n.*text, a number or null",
        ),
        ({"prediction": True}, r":1: prediction is True"),
        ({"prediction": {"label": "billing"}}, r":1: prediction is \{"),
        ({"prediction": float("nan")}, r":1: prediction is nan"),
        ({"prediction": float("inf")}, r":1: prediction is inf"),
        ({"id": None}, r":1: id is None"),
        ({"id": " "}, r":1: id is ' '"),
        ({"id": 1.5}, r":1: id is 1.5"),
        ({"id": False}, r":1: id is False"),
        ({"probability": 1.01}, r":1: probability is 1.01.*\n.*from 0 to 1, or null"),
        ({"probability": -0.1}, r":1: probability is -0.1"),
        ({"probability": float("nan")}, r":1: probability is nan"),
        ({"probability": "0.5"}, r":1: probability is '0.5'"),
        ({"probability": True}, r":1: probability is True"),
        ({"latency_ms": -1}, r":1: latency_ms is -1"),
        ({"latency_ms": 10**400}, r":1: latency_ms is 1000"),
        ({"latency_ms": "fast"}, r":1: latency_ms is 'fast'"),
        ({"rationale": 3}, r":1: rationale is 3.*\n.*text or null"),
        ({"id": "r1001"}, r":2: id 'r1001' is already in line 1"),
    ],
)
def test_a_wrong_value_is_reported_with_file_line_and_key(
    take: Callable[..., dict[str, dict[str, Prediction]]],
    tmp_path: Path,
    change: dict[str, Any],
    message: str,
) -> None:
    write_jsonl(tmp_path / "a.jsonl", lines(change))
    with pytest.raises(UserError, match=rf"a\.jsonl{message}"):
        take(a="a.jsonl")
    assert not RunFolder(tmp_path / "run").predictions("a").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"a\.jsonl is empty"),
        ("\n \n", r"a\.jsonl is empty"),
        (
            '{"id": "r1000", "label": "billing"}\n',
            r"a\.jsonl:1: no key 'prediction' \(keys: 'id', 'label'\)",
        ),
        (
            '\n{"row": 1, "prediction": "billing"}\n',
            r"a\.jsonl:2: no key 'id' \(keys: 'row', 'prediction'\)",
        ),
        ("{}\n", r"a\.jsonl:1: no key 'id' \(keys: none\)"),
        ("r1000,billing\n", r"a\.jsonl:1: not valid JSON"),
        ('["r1000", "billing"]\n', r"a\.jsonl:1: a JSON list, not an object"),
        (
            '{"id": "r1003", "prediction": "billing"}\n',
            r"a\.jsonl lacks 9 of the split's 10 rows \(first: 'r1000'\)",
        ),
        ('{"id": "x", "prediction": "billing"}\n', r"a\.jsonl lacks 10 of the split's 10 rows"),
        (
            '{"id": "x", "prediction": "a"}\n{"id": "x", "prediction": "b"}\n',
            r"a\.jsonl:2: id 'x' is already in line 1",
        ),
    ],
)
def test_a_file_without_predictions_is_an_error(
    take: Callable[..., dict[str, dict[str, Prediction]]],
    tmp_path: Path,
    content: str,
    message: str,
) -> None:
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        take(a="a.jsonl")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet"])
def test_predictions_of_a_table_are_those_of_json_lines(
    take: Callable[..., dict[str, dict[str, Prediction]]], tmp_path: Path, kind: str
) -> None:
    rows = [
        {"id": row["id"], "prediction": row["prediction"], "probability": 0.5} for row in lines()
    ]
    rows[3] |= {"prediction": None, "probability": None}
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(rows)
    if kind == "parquet":
        frame.to_parquet(tmp_path / "a.parquet")
    else:
        frame.to_csv(tmp_path / f"a.{kind}", sep="\t" if kind == "tsv" else ",")
    write_jsonl(tmp_path / "b.jsonl", rows)
    taken = take(a=f"a.{kind}", b="b.jsonl")
    for row_id, prediction in taken["b"].items():
        other = taken["a"][row_id].model_dump(exclude={"made_by", "probability"})
        assert other == prediction.model_dump(exclude={"made_by", "probability"})
    assert taken["a"]["r1000"].probability == 0.5


def test_ids_that_lost_their_zeros_are_told(tmp_path: Path) -> None:
    section = {"name": "classification", "labels": ["billing", "shipping"], "data": {"train": "x"}}
    task = make_task(TaskSection.model_validate(section))
    rows = [Example(f"{i:03}", {"text": "t"}, "billing") for i in range(90, 110)]
    frame = [{"id": i, "prediction": "billing"} for i in range(90, 110)]
    write_jsonl(tmp_path / "a.jsonl", frame)
    with pytest.raises(UserError, match=r"has id '90' where the data have '090'.*\n.*dtype"):
        read_external(tmp_path / "a.jsonl", task, rows)
    write_csv(tmp_path / "a.csv", [row | {"id": f"{row['id']}.0"} for row in frame])
    with pytest.raises(UserError, match=r"has id '90.0' where the data have '090'"):
        read_external(tmp_path / "a.csv", task, rows)
    rows = [Example(str(i), {"text": "t"}, "billing") for i in range(90, 110)]
    write_jsonl(tmp_path / "b.jsonl", [row | {"id": float(row["id"])} for row in frame])
    assert len(read_external(tmp_path / "b.jsonl", task, rows)) == 20


def test_a_missing_file_a_directory_and_a_damaged_archive_are_reported(
    take: Callable[..., dict[str, dict[str, Prediction]]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"eval\.predictions\.a: the file no\.jsonl does not exist"):
        take(a="no.jsonl")
    with pytest.raises(UserError, match=r"eval\.predictions\.a: the file .* is a directory"):
        take(a=str(tmp_path))
    (tmp_path / "a.jsonl.gz").write_bytes(b"no archive")
    with pytest.raises(UserError, match="not a complete gzip file"):
        take(a="a.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes(
        '{"id": "r1000", "prediction": "Größe"}'.encode("latin-1")
    )
    with pytest.raises(UserError, match="not UTF-8"):
        take(a="latin.jsonl")


def test_a_name_that_is_a_students_is_refused_and_its_predictions_stay(
    take: Callable[..., dict[str, dict[str, Prediction]]], toy: Callable[..., Path], tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl", lines())
    recipe: Recipe = load_recipe(toy())
    make_student(recipe, tmp_path / "run")
    for name in ("finetune-gold-s0", "finetune-gold"):
        with pytest.raises(
            UserError, match=rf"eval\.predictions\.{name}: that name is a student's"
        ):
            take(**{name: "a.jsonl"})
    # of a student that is not trained in this run any more, with predictions that cost time
    theirs = RunFolder(tmp_path / "run").predictions("distill-teacher-s3")
    theirs.parent.mkdir(parents=True)
    write_jsonl(
        theirs,
        [{"schema": "dsbs.prediction/1", "id": "r1000", "raw": "billing", "made_by": "3f2a"}],
    )
    before = theirs.read_bytes()
    with pytest.raises(UserError, match=r"distill-teacher-s3\.jsonl is a student's"):
        take(**{"distill-teacher-s3": "a.jsonl"})
    assert theirs.read_bytes() == before


def test_taking_files_in_needs_no_torch(toy: Callable[..., Path], tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", lines())
    path = toy(test=10, eval={"predictions": {"a": "a.jsonl"}})
    code = (
        "import sys; from dsbs import load_recipe; from dsbs.run_folder import RunFolder; "
        "from dsbs.evaluation.recorded import add_external; "
        "from dsbs.tasks import make_task; from dsbs.tasks.data import load; "
        f"r = load_recipe({str(path)!r}); t = make_task(r.task); "
        "add_external(r, t, list(load(r, t, 'test')), RunFolder('run')); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=120)
    assert RunFolder(tmp_path / "run").predictions("a").is_file()
