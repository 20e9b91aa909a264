"""Latency: what is timed, within which budget, and that it is timed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl
from made_students import make_student, rows_of

from dsbs import UserError, load_recipe
from dsbs.config import Recipe
from dsbs.evaluation import latency
from dsbs.evaluation.latency import (
    MIN_CALLS,
    latency_file,
    measure_latency,
    read_latency,
    time_models,
    timing_budget,
)
from dsbs.evaluation.predictions import loader, predict_student
from dsbs.progress import NoProgress
from dsbs.records import Prediction, TrainedStudent
from dsbs.records.results import Latency
from dsbs.run_folder import RunFolder
from dsbs.students.student import Student
from dsbs.students.weights import weights_megabytes


@pytest.fixture
def recipe(toy: Callable[..., Path]) -> Recipe:
    return load_recipe(toy(), ["eval.latency_calls=2", "eval.max_label_tokens=2"])


def with_eval(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update=changes)})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Every call of a student: its number of rows, and its keyword arguments."""
    recorded: list[tuple[int, dict[str, Any]]] = []
    original = Student.predict

    def predict(self: Student, items: list[Any], **options: Any) -> Any:
        recorded.append((len(items), options))
        return original(self, items, **options)

    monkeypatch.setattr(Student, "predict", predict)
    return recorded


def write_predictions(
    recipe: Recipe, run: RunFolder, student: TrainedStudent, latency_ms: float
) -> None:
    """A prediction file of which each row took ``latency_ms``."""
    predictions = [
        Prediction(id=row.id, raw="x", made_by="m", latency_ms=latency_ms)
        for row in rows_of(recipe)
    ]
    run.predictions(student.name).parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        run.predictions(student.name),
        [prediction.model_dump(mode="json", by_alias=True) for prediction in predictions],
    )


def measured(recipe: Recipe, student: TrainedStudent, path: Path) -> list[dict[str, Any]]:
    run = RunFolder(path)
    if not run.predictions(student.name).exists():
        write_predictions(recipe, run, student, latency_ms=60_000)
    results = measure_latency(recipe, student, rows_of(recipe), run, NoProgress())
    return [result.model_dump() for result in results]


# --- the budget


class SlowModel:
    """A model that takes so many seconds per row, by a clock of its own."""

    def __init__(self, seconds_per_row: float) -> None:
        self.now = 0.0
        self.batch_sizes: list[int] = []
        self._seconds_per_row = seconds_per_row

    def clock(self) -> float:
        return self.now

    def predict(self, items: Sequence[Any], **_: Any) -> None:
        self.batch_sizes.append(len(items))
        self.now += self._seconds_per_row * len(items)


def time_slow_model(
    model: SlowModel, monkeypatch: pytest.MonkeyPatch, *, max_calls: int, budget_s: float
) -> list[Latency]:
    monkeypatch.setattr(latency, "perf_counter", model.clock)
    models: Any = [model]
    (results,) = time_models(models, [{"text": "x"}], max_calls, 8, NoProgress(), budget_s)
    return results


def test_timing_stops_at_its_budget_and_records_the_calls_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SlowModel(seconds_per_row=0.01)
    results = time_slow_model(model, monkeypatch, max_calls=50, budget_s=10.0)
    assert model.now < 10.0 + 0.64, "at most one call over the budget"
    assert [result.calls for result in results] == [50, model.batch_sizes.count(64) - 3]
    assert 10 <= results[1].calls < 50
    assert results[1].p50_ms == pytest.approx(640.0)


def test_a_tight_budget_leaves_a_few_calls_of_each_batch_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = SlowModel(seconds_per_row=1.0)
    results = time_slow_model(model, monkeypatch, max_calls=50, budget_s=1.5)
    assert [result.calls for result in results] == [MIN_CALLS, MIN_CALLS]
    assert model.batch_sizes == [1] * MIN_CALLS + [64] * MIN_CALLS


def test_212_rows_are_timed_in_less_time_than_they_were_predicted_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A nano student took 2.5 s for 64 rows; fifty calls of them took two minutes."""
    seconds_per_row = 2.5 / 64
    model = SlowModel(seconds_per_row)
    budget_s = timing_budget([1000 * seconds_per_row] * 212)
    time_slow_model(model, monkeypatch, max_calls=50, budget_s=budget_s)
    assert model.now < 212 * seconds_per_row


def test_calls_beyond_the_maximum_are_warm_up_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SlowModel(seconds_per_row=0.001)
    results = time_slow_model(model, monkeypatch, max_calls=4, budget_s=1000.0)
    assert [result.calls for result in results] == [4, 4]
    assert model.batch_sizes == [1] * 7 + [64] * 7


def test_the_budget_is_half_of_what_predicting_took_and_half_a_second_at_least() -> None:
    assert timing_budget([4_000.0, None, 6_000.0]) == 5.0
    assert timing_budget([None]) == timing_budget([1.0]) == 0.5


def test_the_budget_is_read_from_the_prediction_file(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    student = make_student(recipe, tmp_path)
    write_predictions(recipe, run, student, latency_ms=1000.0)  # 12 rows
    model = SlowModel(seconds_per_row=0.001)
    monkeypatch.setattr(latency, "perf_counter", model.clock)
    budgets: list[float] = []

    def time_models(*arguments: Any) -> list[list[Latency]]:
        budgets.append(arguments[-1])
        return [[]]

    monkeypatch.setattr(latency, "time_models", time_models)
    measure_latency(recipe, student, rows_of(recipe), run, NoProgress())
    assert budgets == [6.0]


def test_a_measurement_that_its_budget_ended_is_kept(
    recipe: Recipe, tmp_path: Path, calls: list[tuple[int, dict[str, Any]]]
) -> None:
    recipe = with_eval(recipe, latency_calls=100_000)
    run = RunFolder(tmp_path)
    student = make_student(recipe, tmp_path)
    write_predictions(recipe, run, student, latency_ms=1.0)
    first = measured(recipe, student, tmp_path)
    assert all(MIN_CALLS <= result["calls"] < 100_000 for result in first)
    calls.clear()
    assert measured(recipe, student, tmp_path) == first and not calls


# --- what is timed


def test_single_calls_for_the_label_alone_are_timed_at_one_row_and_at_64(
    recipe: Recipe, tmp_path: Path, calls: list[tuple[int, dict[str, Any]]]
) -> None:
    student = make_student(recipe, tmp_path, "step-by-step")
    results = measured(with_eval(recipe, rationales=True), student, tmp_path)
    sizes = [size for size, _ in calls]
    assert sizes.count(1) > 2 and sizes.count(64) > 2, "some calls are warm-up"
    for size, options in calls:
        assert options["batch_size"] == size and options["max_label_tokens"] == 2
        assert not options.get("rationale")
    assert [(result["batch_size"], result["calls"]) for result in results] == [(1, 2), (64, 2)]
    for result in results:
        assert 0 < result["p50_ms"] <= result["p95_ms"] and result["device"]


def test_the_rows_are_drawn_in_an_order_of_their_own_that_never_changes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(recipe, tmp_path)
    batches: list[list[str]] = []
    monkeypatch.setattr(
        Student,
        "predict",
        lambda self, items, **options: batches.append([item["text"] for item in items]),
    )
    for run in ("a", "b"):
        measured(recipe, student, tmp_path / run)
    half = len(batches) // 2
    assert batches[:half] == batches[half:]
    texts = [row.input["text"] for row in rows_of(recipe)]
    assert set(batches[half - 1]) == set(texts), "64 rows out of 12 repeat them all"
    first = [batch[0] for batch in batches[:5]]
    assert first != texts[:5] and len(set(first)) == 5


# --- what is kept


def test_a_measurement_is_kept_while_it_fits(
    recipe: Recipe,
    tmp_path: Path,
    calls: list[tuple[int, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = make_student(recipe, tmp_path)
    path = latency_file(RunFolder(tmp_path), student)
    first = measured(recipe, student, tmp_path)
    before = path.read_bytes()
    calls.clear()
    assert measured(recipe, student, tmp_path) == first
    assert not calls and path.read_bytes() == before

    others = [
        (with_eval(recipe, latency_calls=3), student),
        (with_eval(recipe, max_label_tokens=3), student),
        (recipe, student.model_copy(update={"fingerprint": "trained anew"})),
    ]
    for other_recipe, other_student in others:
        calls.clear()
        measured(other_recipe, other_student, tmp_path)
        assert calls
    monkeypatch.setattr(latency, "device_name", lambda: "Another Device")
    elsewhere = measured(recipe, student, tmp_path)
    assert calls and {result["device"] for result in elsewhere} == {"Another Device"}
    monkeypatch.undo()
    content = json.loads(path.read_text(encoding="utf-8"))
    assert len(content["measurements"]) == 5, "no measurement is lost"
    assert measured(recipe, student, tmp_path) == first


def test_a_measurement_made_before_there_was_a_budget_fits(
    recipe: Recipe, tmp_path: Path, calls: list[tuple[int, dict[str, Any]]]
) -> None:
    student = make_student(recipe, tmp_path)
    first = measured(recipe, student, tmp_path)
    path = latency_file(RunFolder(tmp_path), student)
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["measurements"][0]["max_calls"]
    path.write_text(json.dumps(content), encoding="utf-8")
    calls.clear()
    assert measured(recipe, student, tmp_path) == first and not calls


def test_no_calls_time_nothing(recipe: Recipe, tmp_path: Path) -> None:
    student = make_student(recipe, tmp_path)
    assert measured(with_eval(recipe, latency_calls=0), student, tmp_path) == []
    assert not latency_file(RunFolder(tmp_path), student).exists()


def test_rescoring_reads_the_last_measurement_of_any_device(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    student = make_student(recipe, tmp_path)
    assert read_latency(run, student, recipe) == []
    measured(recipe, student, tmp_path)
    monkeypatch.setattr(latency, "device_name", lambda: "Another Device")
    last = measured(recipe, student, tmp_path)
    assert [result.model_dump() for result in read_latency(run, student, recipe)] == last
    assert read_latency(run, student, with_eval(recipe, latency_calls=9)) == []
    retrained = student.model_copy(update={"fingerprint": "trained anew"})
    assert read_latency(run, retrained, recipe) == []


def test_predictions_and_latency_load_a_student_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(recipe, tmp_path)
    rows = rows_of(recipe)
    run = RunFolder(tmp_path)
    loaded = []
    original = Student.load
    monkeypatch.setattr(Student, "load", lambda path: loaded.append(path) or original(path))
    for _ in range(2):
        load = loader(student)
        predict_student(recipe, student, rows, run, NoProgress(), load)
        measure_latency(recipe, student, rows, run, NoProgress(), load)
    assert loaded == [student.path]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"measurements": [{"fingerprint": 3}]}', '{"schema": "dsbs.latency/9"}']
)
def test_a_damaged_latency_file_is_reported(recipe: Recipe, tmp_path: Path, content: str) -> None:
    run = RunFolder(tmp_path)
    student = make_student(recipe, tmp_path)
    path = latency_file(run, student)
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="is not a latency file"):
        read_latency(run, student, recipe)


def test_megabytes_are_of_the_weights_alone(recipe: Recipe, tmp_path: Path) -> None:
    student = make_student(recipe, tmp_path)
    folder = Path(student.path)
    assert weights_megabytes(folder) == (folder / "model.safetensors").stat().st_size / 1e6
    (folder / "training_args.bin").write_bytes(b"0" * 1000)
    shards = {"model-00001-of-00002.safetensors": 3_000, "model-00002-of-00002.safetensors": 2_000}
    (folder / "model.safetensors").unlink()
    for name, size in shards.items():
        (folder / name).write_bytes(b"0" * size)
    assert weights_megabytes(folder) == 0.005
    with pytest.raises(UserError, match="has no weights"):
        weights_megabytes(tmp_path)
