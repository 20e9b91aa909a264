"""Students of several labels, scales and fields, from the recipe to their answers."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import causal_models
import numpy as np
import pytest
import torch
from conftest import on_two_processes
from forked import DSBS
from label_heads import save_encoder
from several_labels import ROWS, TAGS, recipe_file

from dsbs import Student, UserError, compress, evaluate, load_recipe, report, train
from dsbs.config import Recipe
from dsbs.exporting.run import export
from dsbs.students.calibration import (
    Threshold,
    read_calibration,
    read_threshold,
    write_record,
)
from dsbs.students.card import read_card
from dsbs.students.novelty import fit_novelty
from dsbs.students.prediction import Options, predict_file

WORDS = ["invoice", "money", "parcel", "awful", "bad", "fair", "good", "great"]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes of a tiny encoder for a kind of task."""
    model = save_encoder(tmp_path / "encoder", words=WORDS)

    def make(kind: str, *overrides: str) -> Recipe:
        student = {"model": model, "max_target_tokens": 16}
        return load_recipe(recipe_file(tmp_path, kind, student=student), list(overrides))

    return make


def trained(recipe: Recipe, tmp_path: Path) -> Path:
    return Path(train(recipe, out=tmp_path / "run").students[0].path)


def texts(kind: str, count: int = 8) -> list[str]:
    return [row["text"] for row in ROWS[kind](count, start=1000)]


def modified(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_mtime_ns


def test_several_labels_are_learned_and_their_thresholds_follow_the_recipe(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    longer = ("train.max_steps=120", "train.eval_every=40", "train.class_weights=balanced")
    folder = trained(recipe("multilabel", *longer), tmp_path)
    card = read_card(folder)
    assert card.head == "labels" and card.classes == TAGS, "auto: an encoder chooses"
    student = Student.load(folder)
    rows = ROWS["multilabel"](16, start=1000)
    answers = student.predict([row["text"] for row in rows])
    assert sum(answer.value == row["label"] for answer, row in zip(answers, rows, strict=True)) > 9
    for answer in answers:
        distribution = answer.distribution or {}
        limits = student.label_thresholds or {}
        reached = [tag for tag, share in distribution.items() if share >= (limits[tag] or 2)]
        assert answer.value == reached and answer.raw == answer.label
        sureness = [s if tag in reached else 1 - s for tag, s in distribution.items()]
        assert answer.probability == min(sureness) == student.confidence(answer, {})
    assert any(sum((answer.distribution or {}).values()) > 1.2 for answer in answers)

    before = modified(folder)
    trained(recipe("multilabel", *longer, "eval.label_precision=0.9"), tmp_path)
    assert modified(folder) == before, "not trained again"
    calibration = read_calibration(folder)
    assert calibration is not None and calibration.label_thresholds is not None
    assert calibration.label_thresholds.precision == 0.9
    student.novelty = fit_novelty(np.random.default_rng(0).normal(size=(200, 16)))
    assert student.measure_novelty() is not None, "which answers in another way"
    again = student.predict([row["text"] for row in rows])
    assert [answer.label for answer in again] == [answer.label for answer in answers]


def test_the_answer_on_a_scale_is_the_median(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    student = Student.load(trained(recipe("score"), tmp_path))
    for answer in student.predict(texts("score")):
        distribution = answer.distribution or {}
        assert list(distribution) == ["1", "2", "3", "4", "5"]
        below = sum(share for point, share in distribution.items() if point < str(answer.value))
        assert below < 0.5 <= below + distribution[str(answer.value)] + 1e-9
        assert answer.label == str(answer.value) and answer.expected_number is not None
        mean = sum(int(point) * share for point, share in distribution.items())
        assert answer.expected_number == pytest.approx(mean)


@pytest.mark.parametrize("kind", ["multilabel", "score"])
def test_tables_and_lines_of_predictions(
    recipe: Callable[..., Recipe], tmp_path: Path, kind: str
) -> None:
    import pyarrow.parquet as pq

    folder = trained(recipe(kind, "train.max_steps=10", "train.eval_every=10"), tmp_path)
    rows = [(f"r{i}", {"text": text}) for i, text in enumerate(texts(kind))]
    for suffix in ("jsonl", "csv", "parquet"):
        out = tmp_path / f"predictions.{suffix}"
        predict_file(folder, lambda: rows, out, Options(top=2), source="rows")
    written = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in written.splitlines()]
    with (tmp_path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    table = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    for line, cell, row in zip(lines, cells, table, strict=True):
        assert isinstance(line["label"], list if kind == "multilabel" else int)
        assert json.loads(cell["label"]) == json.loads(row["label"]) == line["label"]
        assert cell["prediction"] == row["prediction"] == line["prediction"]
        assert len(line["top"]) == 2 and row["top"] == line["top"]
        assert ("expected_number" in line) == (kind == "score")
        assert row.get("expected_number") == line.get("expected_number")


@pytest.mark.parametrize("changes", [["train.lora={rank: 4, alpha: 8}"], []])
def test_a_killed_training_of_several_labels_continues(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
) -> None:
    from safetensors.torch import load_file

    from dsbs.training.callbacks import MetricsLogger

    pytest.importorskip("peft")
    settings = recipe("multilabel", "train.max_steps=10", "train.eval_every=3", *changes)
    undisturbed = trained(settings, tmp_path)
    expected = load_file(undisturbed / "head.safetensors")
    undisturbed.rename(tmp_path / "undisturbed")
    passed = MetricsLogger.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passed(self, args, state, control, **kwargs)
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLogger, "on_step_end", killed)
        trained(settings, tmp_path)
    torch.manual_seed(99)
    again = load_file(trained(settings, tmp_path) / "head.safetensors")
    assert all(torch.equal(again[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_two_processes_train_the_student_of_one(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    # ten rows a step are no divisor of the rows: a process gets empty ones at the end
    exact = ["student.dropout=0", "train.batch_size=10", "train.micro_batch_size=5"]
    more = ["train.max_steps=12", "train.eval_every=6", "train.class_weights={refund: 3}"]
    settings = recipe("multilabel", *exact, *more)
    expected = load_file(trained(settings, tmp_path) / "head.safetensors")
    (tmp_path / "run" / "train").rename(tmp_path / "one")
    path = tmp_path / "both.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")), encoding="utf-8")
    on_two_processes(DSBS, "train", str(path), "--out", str(tmp_path / "run"))
    ours = load_file(tmp_path / "run" / "train" / "finetune-gold-s0" / "head.safetensors")
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, atol=1e-5), name


def test_terms_compare_the_probability_of_each_label(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    teacher = trained(recipe("multilabel"), tmp_path)
    teacher.rename(tmp_path / "teacher")
    short = ["train.max_steps=2", "train.eval_every=2", "train.micro_batch_size=8"]
    settings = [*short, f"train.teachers=[{{model: {tmp_path / 'teacher'}}}]"]
    folder = trained(
        recipe(
            "multilabel",
            *settings,
            "train.terms=[{kind: response, temperature: 2.0}, {kind: feature}, {kind: relation}]",
            "train.methods=[finetune+response+feature+relation]",
        ),
        tmp_path,
    )
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = next(row for row in map(json.loads, lines) if "loss" in row)
    assert all(losses[f"{term}_loss"] > 0 for term in ("response", "feature", "relation"))
    for term, message in (
        ("{kind: labels, source: teachers}", "use kind: response"),
        ("{kind: response, top_k: 2}", "leave top_k out"),
    ):
        name = "labels" if "labels" in term else "response"
        refused = [f"train.terms=[{term}]", f"train.methods=[finetune+{name}]"]
        with pytest.raises(UserError, match=message):
            train(recipe("multilabel", *settings, *refused), out=tmp_path / "run")
    scored = trained(recipe("score", *short), tmp_path / "other")
    refused = ["train.terms=[{kind: response}]", "train.methods=[finetune+response]"]
    with pytest.raises(UserError, match="has other labels"):
        train(
            recipe("multilabel", *short, f"train.teachers=[{{model: {scored}}}]", *refused),
            out=tmp_path / "run",
        )


def test_a_teacher_of_another_vocabulary_needs_a_head_for_several_labels(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    def settings(start: str) -> Recipe:
        return recipe(
            "multilabel",
            f"train.teachers=[{{start: {start}, max_steps: 1}}]",
            "train.terms=[{kind: response}]",
            "train.methods=[finetune+response]",
            "train.max_steps=2",
            "train.eval_every=2",
        )

    encoder = save_encoder(tmp_path / "larger", layers=4, words=["zebra"])
    folder = trained(settings(encoder), tmp_path)
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert next(row for row in map(json.loads, lines) if "loss" in row)["response_loss"] > 0
    decoder = causal_models.save(tmp_path / "decoder")
    with pytest.raises(UserError, match="writes the labels of a row as one text"):
        train(settings(decoder), out=tmp_path / "run")


@pytest.mark.parametrize("form", ["onnx", "ct2"])
@pytest.mark.parametrize("kind", ["multilabel", "score"])
def test_exports_answer_as_the_student(
    recipe: Callable[..., Recipe], tmp_path: Path, form: str, kind: str
) -> None:
    folder = trained(recipe(kind), tmp_path)
    inputs = texts(kind, 12)
    expected = Student.load(folder).predict(inputs)
    exported = export(folder, form, quantize="float32", examples=inputs)
    actual = Student.load(exported.path).predict(inputs)
    done = subprocess.run(
        [sys.executable, str(exported.path / "predict.py")],
        input="".join(f"{text}\n" for text in inputs),
        capture_output=True,
        text=True,
        check=True,
    )
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    for theirs, ours, line in zip(expected, actual, printed, strict=True):
        assert ours.value == theirs.value == line["label"]
        assert ours.distribution == pytest.approx(theirs.distribution, abs=1e-4)
        assert line["distribution"] == pytest.approx(theirs.distribution, abs=1e-4)
        assert line["probability"] == pytest.approx(theirs.probability, abs=1e-4)
        assert line.get("expected_number") == pytest.approx(theirs.expected_number, abs=1e-3)
    if form == "ct2":  # the int8 graph of ONNX is that of the label heads' own tests
        small = export(folder, form, quantize="int8", examples=inputs)
        assert len(Student.load(small.path).predict(inputs)) == len(inputs)


@pytest.mark.parametrize("kind", ["multilabel", "score"])
def test_compressed_students_heal_and_choose_their_own_thresholds(
    recipe: Callable[..., Recipe], tmp_path: Path, kind: str
) -> None:
    folder = trained(recipe(kind, "eval.latency_calls=0"), tmp_path)
    result = compress(folder, ["prune-ff=0.5", "drop-layers=0.5"], heal_steps=4, max_drop=1.0)
    for compressed in result.folders:
        calibration = read_calibration(compressed)
        assert calibration is not None
        assert (calibration.label_thresholds is not None) == (kind == "multilabel")
    (folder,) = compress(folder, ["prune-ff=0.25"], heal_steps=0, max_drop=1.0).folders
    assert read_calibration(folder) is not None, "not healed: fitted on what the step made"


@pytest.mark.parametrize("kind", ["multilabel", "score", "extraction"])
@pytest.mark.parametrize(("model", "max_steps"), [("t5", 90), ("decoder", 150)])
def test_a_student_that_writes_answers_in_every_kind(
    tmp_path: Path, kind: str, model: str, max_steps: int
) -> None:
    student: dict[str, Any] = {"init": "scratch", "vocab_size": 200}
    if model == "decoder":
        student = {"model": causal_models.save(tmp_path / "decoder"), "template": "plain"}
    student |= {"max_input_tokens": 64, "max_target_tokens": 32}
    training = {"max_steps": max_steps, "eval_every": max_steps // 2, "learning_rate": 0.004}
    path = recipe_file(tmp_path, kind, student=student, eval={"max_label_tokens": 31})
    overrides = [f"train.{key}={value}" for key, value in training.items()]
    settings = load_recipe(path, [*overrides, "train.micro_batch_size=8"])
    folder = trained(settings, tmp_path)
    assert read_card(folder).head == "text"
    student_ = Student.load(folder)
    rows = ROWS[kind](12)
    answers = student_.predict([row["text"] for row in rows], max_label_tokens=31)
    readable = [answer for answer in answers if answer.label is not None]
    assert len(readable) >= 9, [answer.raw for answer in answers]
    for answer in readable:
        assert answer.value == student_.task.value(str(answer.label))
        if kind == "extraction":
            assert list(answer.field_probabilities or {}) == ["kind", "number"]
            assert answer.probability == min((answer.field_probabilities or {}).values())
            assert student_.confidence(answer, {}) == answer.probability
        else:
            assert answer.field_probabilities is None
    if kind == "extraction":
        fields_have_probabilities(settings, student_, folder, tmp_path)
    if kind == "score":
        assert student_.has_distribution
        (scored,) = student_.predict([rows[0]["text"]], score_labels=True)
        assert scored.expected_number is not None
    else:
        assert not student_.has_distribution
        with pytest.raises(UserError, match="no probability for every label"):
            student_.predict([rows[0]["text"]], score_labels=True)


def fields_have_probabilities(
    recipe: Recipe, student: Student, folder: Path, tmp_path: Path
) -> None:
    """From calibration and results to the tables of `dsbs predict` and an export."""
    import pyarrow.parquet as pq

    calibration = read_calibration(folder)
    assert calibration is not None and calibration.label_thresholds is None
    assert calibration.after.log_loss <= calibration.before.log_loss + 1e-9
    inputs = texts("extraction", 5)
    (raw,) = student.generate(inputs[:1], 31, 1, probabilities=True)
    assert math.fsum(value for _, value in raw.tokens) == pytest.approx(
        math.log(raw.probability or 0), abs=1e-6
    )
    before = student.field_probabilities(raw) or {}
    assert math.prod(before.values()) >= (raw.probability or 0) - 1e-9, "without the names"
    (result,) = evaluate(recipe, out=tmp_path / "run").systems
    for part in result.parts.values():
        assert part.ece is not None and 0 <= part.ece.value <= 1 and part.ece.n <= 16
    page = report(recipe, out=tmp_path / "run").read_text(encoding="utf-8")
    assert "AUROC" in page and "calibration error of the probabilities" in page
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "\n| field | right" in card and "| AUROC" in card and "\n| number | " in card
    rows = [(f"r{i}", {"text": text}) for i, text in enumerate(inputs)]
    for suffix in ("jsonl", "csv", "parquet"):
        predict_file(folder, lambda: rows, tmp_path / f"fields.{suffix}", Options(), source="rows")
    written = (tmp_path / "fields.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line)["field_probabilities"] for line in written]
    assert any(lines)
    with (tmp_path / "fields.csv").open(encoding="utf-8", newline="") as file:
        cells = [row["field_probabilities"] for row in csv.DictReader(file)]
    assert [json.loads(cell) if cell else None for cell in cells] == lines
    table = pq.read_table(tmp_path / "fields.parquet").to_pylist()
    pairs = [row["field_probabilities"] for row in table]
    assert [pair and dict(pair) for pair in pairs] == lines
    threshold = Threshold(
        student="", confidence="probability", temperature=calibration.temperature, threshold=0.5,
        of="agreement", target=0.9, level=0.95, bound=0.9, rows=9, coverage=0.5,
    )  # fmt: skip
    write_record(folder, threshold)
    exported = export(folder, "ct2", quantize="float32", examples=inputs).path
    assert read_threshold(exported) is None, "it is one of the least sure field"
    answer, *_ = Student.load(exported).predict(inputs)
    assert answer.field_probabilities is None and answer.probability is not None


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("extraction", [], "student.head: labels needs a closed set of labels"),
        ("score", ["eval.label_precision=0.9"], "label_precision is for label heads"),
        ("multilabel", ["train.class_weights={refunds: 2}"], "did you mean 'refund'"),
    ],
)
def test_what_a_head_cannot_learn_is_refused(
    recipe: Callable[..., Recipe], tmp_path: Path, kind: str, changes: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        train(recipe(kind, *changes), out=tmp_path / "run")
    if kind == "extraction":
        assert "student.head: text" in refusal.value.hint


@pytest.mark.parametrize(
    ("field", "method"),
    [("Answer", "rationale-then-label"), ("Because", "label-then-rationale")],
)
def test_a_field_named_as_the_mark_between_label_and_rationale_is_refused(
    tmp_path: Path, field: str, method: str
) -> None:
    path = recipe_file(tmp_path, "extraction", student={"init": "scratch"})
    fields = f"task.fields={{{field}: {{type: number}}}}"
    with pytest.raises(UserError, match="and a field has that name"):
        train(load_recipe(path, [fields, f"train.methods=[{method}]"]), out=tmp_path / "run")
