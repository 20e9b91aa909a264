"""Latencies: what is timed, that it is timed once, and what the weights weigh. Never how long it took."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_students import make_student, rows_of

from dsbs import UserError, load_recipe
from dsbs.config import Recipe
from dsbs.evaluation import latency
from dsbs.evaluation.latency import latency_file, measure_latency, read_latency
from dsbs.evaluation.predict import loader, predict_student
from dsbs.progress import NoProgress
from dsbs.records.rows import TrainedStudent
from dsbs.students import Student, megabytes


@pytest.fixture
def recipe(toy: Callable[..., Path]) -> Recipe:
    return load_recipe(toy(), ["eval.latency_calls=4", "eval.max_label_tokens=2"])


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update=changes)})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Every call that a student gets: its rows' number, and how it is asked."""
    calls: list[tuple[int, dict[str, Any]]] = []
    really = Student.predict

    def predict(self: Student, items: list[Any], **how: Any) -> Any:
        calls.append((len(items), how))
        return really(self, items, **how)

    monkeypatch.setattr(Student, "predict", predict)
    return calls


def measured(recipe: Recipe, student: TrainedStudent, run: Path) -> list[dict[str, Any]]:
    return [
        one.model_dump()
        for one in measure_latency(recipe, student, rows_of(recipe), run, NoProgress())
    ]


def test_single_calls_for_the_label_alone_are_timed_at_one_row_and_at_64(
    recipe: Recipe, tmp_path: Path, asked: list[tuple[int, dict[str, Any]]]
) -> None:
    student = make_student(recipe, tmp_path, "step-by-step")
    found = measured(changed(recipe, rationales=True), student, tmp_path)
    sizes = [size for size, _ in asked]
    assert sizes.count(1) > 4 and sizes.count(64) > 4, "some calls come before those that count"
    assert all(how["batch_size"] == size and how["max_label_tokens"] == 2 for size, how in asked)
    assert not any(how.get("rationale") for _, how in asked)
    assert [(one["batch_size"], one["calls"]) for one in found] == [(1, 4), (64, 4)]
    assert all(0 < one["p50_ms"] <= one["p95_ms"] and one["device"] for one in found)


def test_the_rows_are_drawn_in_an_order_of_their_own_that_never_changes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, seen = make_student(recipe, tmp_path), []
    monkeypatch.setattr(
        Student, "predict", lambda self, items, **how: seen.append([item["text"] for item in items])
    )
    for run in ("a", "b"):
        measured(recipe, student, tmp_path / run)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    texts = [row.input["text"] for row in rows_of(recipe)]
    assert set(seen[half - 1]) == set(texts), (
        "a batch of 64 from 12 rows holds them all, again and again"
    )
    assert [one[0] for one in seen[:6]] != texts[:6] and len({one[0] for one in seen[:6]}) == 6


def test_what_was_timed_is_never_timed_again_while_it_fits(
    recipe: Recipe,
    tmp_path: Path,
    asked: list[tuple[int, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = make_student(recipe, tmp_path)
    first = measured(recipe, student, tmp_path)
    before = latency_file(tmp_path, student).read_bytes()
    asked.clear()
    assert measured(recipe, student, tmp_path) == first
    assert not asked and latency_file(tmp_path, student).read_bytes() == before

    others = [
        (changed(recipe, latency_calls=5), student),
        (changed(recipe, max_label_tokens=3), student),
        (recipe, student.model_copy(update={"fingerprint": "trained anew"})),
    ]
    for other, whom in others:
        asked.clear()
        measured(other, whom, tmp_path)
        assert asked
    monkeypatch.setattr(latency, "device_name", lambda: "Another Device")
    elsewhere = measured(recipe, student, tmp_path)
    assert asked and {one["device"] for one in elsewhere} == {"Another Device"}
    monkeypatch.undo()
    kept = json.loads(latency_file(tmp_path, student).read_text(encoding="utf-8"))
    assert len(kept["measurements"]) == 5, "nothing that was timed is lost"
    assert measured(recipe, student, tmp_path) == first


def test_no_calls_time_nothing(recipe: Recipe, tmp_path: Path) -> None:
    student = make_student(recipe, tmp_path)
    assert measured(changed(recipe, latency_calls=0), student, tmp_path) == []
    assert not latency_file(tmp_path, student).exists()


def test_rescoring_reads_what_was_timed_last_on_whatever_device(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(recipe, tmp_path)
    assert read_latency(tmp_path, student, recipe) == []
    measured(recipe, student, tmp_path)
    monkeypatch.setattr(latency, "device_name", lambda: "Another Device")
    last = measured(recipe, student, tmp_path)
    assert [one.model_dump() for one in read_latency(tmp_path, student, recipe)] == last
    assert read_latency(tmp_path, student, changed(recipe, latency_calls=9)) == []
    assert (
        read_latency(tmp_path, student.model_copy(update={"fingerprint": "trained anew"}), recipe)
        == []
    )


def test_predictions_and_latency_share_one_loading(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, rows = make_student(recipe, tmp_path), rows_of(recipe)
    loaded, really = [], Student.load
    monkeypatch.setattr(Student, "load", lambda path: loaded.append(path) or really(path))
    for _ in range(2):
        load = loader(student)
        predict_student(recipe, student, rows, tmp_path, NoProgress(), load)
        measure_latency(recipe, student, rows, tmp_path, NoProgress(), load)
    assert loaded == [student.path]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"measurements": [{"fingerprint": 3}]}', '{"schema": "dsbs.latency/9"}']
)
def test_a_damaged_file_of_latencies_is_told(recipe: Recipe, tmp_path: Path, content: str) -> None:
    student = make_student(recipe, tmp_path)
    path = latency_file(tmp_path, student)
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is not a file of latencies"):
        read_latency(tmp_path, student, recipe)


def test_megabytes_are_of_the_weights_alone(recipe: Recipe, tmp_path: Path) -> None:
    student = make_student(recipe, tmp_path)
    folder = Path(student.path)
    assert megabytes(folder) == (folder / "model.safetensors").stat().st_size / 1e6
    (folder / "training_args.bin").write_bytes(b"0" * 1000)
    shards = {"model-00001-of-00002.safetensors": 3_000, "model-00002-of-00002.safetensors": 2_000}
    (folder / "model.safetensors").unlink()
    for name, size in shards.items():
        (folder / name).write_bytes(b"0" * size)
    assert megabytes(folder) == 0.005
    with pytest.raises(UserError, match="has no weights"):
        megabytes(tmp_path)
