"""Prediction files: their rows, when they are kept, and when they are made again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import run_dsbs, write_jsonl
from made_students import make_student, rows_of

from dsbs import UserError, load_recipe
from dsbs.config import Recipe
from dsbs.evaluation import predictions
from dsbs.evaluation.metrics import score
from dsbs.evaluation.predictions import (
    loader,
    predict_student,
    read_predictions,
    student_predictions,
)
from dsbs.evaluation.recorded import check_replies, predict_teacher
from dsbs.progress import NoProgress
from dsbs.prompting import load_prompt, source_fingerprint
from dsbs.records import Annotation, Sample, TeacherName, TrainedStudent
from dsbs.run_folder import RunFolder
from dsbs.students.student import Student
from dsbs.tasks import make_task


@pytest.fixture
def recipe(toy: Callable[..., Path]) -> Recipe:
    return load_recipe(toy())


def asking(recipe: Recipe, **changes: Any) -> Recipe:
    return recipe.model_copy(update={"eval": recipe.eval.model_copy(update=changes)})


def predicted(recipe: Recipe, student: TrainedStudent, run: Path) -> list[dict[str, Any]]:
    path = predict_student(recipe, student, rows_of(recipe), RunFolder(run), NoProgress())
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def no_loading(path: str) -> Student:
    raise AssertionError(f"{path} was loaded")


def as_first_version(path: Path) -> None:
    """Rewrite a prediction file as it was before it had inputs, probabilities and hashes."""
    old = ("id", "gold", "raw", "prediction", "correct", "rationale", "latency_ms", "made_by")
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    write_jsonl(
        path,
        [{"schema": "dsbs.prediction/1"} | {key: row[key] for key in old} for row in rows],
    )


def test_scored_labels_are_kept_and_made_anew_when_asked_for(
    recipe: Recipe, tmp_path: Path
) -> None:
    student = make_student(recipe, tmp_path)
    plain = predicted(recipe, student, tmp_path)
    scored = predicted(asking(recipe, score_labels=True), student, tmp_path)
    for before, after in zip(plain, scored, strict=True):
        assert "distribution" not in before and before["made_by"] != after["made_by"]
        assert sum(after["distribution"].values()) == pytest.approx(1, abs=1e-5)
        assert after["raw"] == before["raw"] and after["prediction"] in after["distribution"]
    # Scoring reads the label as prediction did.
    task, rows = make_task(recipe.task), rows_of(recipe)
    read = read_predictions(RunFolder(tmp_path).predictions(student.name))
    assert score(task, rows, read, student.name).labels == [row["prediction"] for row in scored]


def test_a_row_has_input_output_probability_and_model(recipe: Recipe, tmp_path: Path) -> None:
    student, rows = make_student(recipe, tmp_path), rows_of(recipe)
    lines = predicted(recipe, student, tmp_path)
    answers = Student.load(student.path).predict(
        [row.input for row in rows], max_label_tokens=8, canonical=True
    )
    assert [line["id"] for line in lines] == [row.id for row in rows]
    for line, row, answer in zip(lines, rows, answers, strict=True):
        assert (
            line["schema"] == "dsbs.prediction/2"
            and line["model"] == "made"
            and len(line["prompt"]) == 64
        )
        assert (line["input"], line["gold"], line["raw"]) == (row.input, row.label, answer.raw)
        assert (
            line["probability"] == pytest.approx(answer.probability, abs=1e-5)
            and 0 <= line["probability"] <= 1
        )
        assert line["truncated"] is answer.truncated and line["latency_ms"] > 0
        assert line["correct"] is (line["prediction"] == row.label)
        assert line["rationale"] is None and line["rationale_truncated"] is None


@pytest.mark.parametrize("change", [{"max_label_tokens": 3}, {"rationales": True}])
def test_predictions_are_kept_until_what_they_depend_on_changes_and_then_set_aside(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    student = make_student(recipe, tmp_path, "step-by-step")
    before = predicted(recipe, student, tmp_path)
    other = predicted(asking(recipe, **change), student, tmp_path)
    assert other[0]["made_by"] != before[0]["made_by"]
    assert len(list((tmp_path / "eval" / "predictions" / "aside").iterdir())) == 1
    monkeypatch.setattr(Student, "load", no_loading)
    assert predicted(recipe, student, tmp_path) == before, "taken back from aside"
    assert predicted(recipe, student, tmp_path) == before
    assert predicted(asking(recipe, **change), student, tmp_path) == other


def test_rationales_are_decoded_where_they_are_asked_for_and_the_student_has_them(
    recipe: Recipe, tmp_path: Path
) -> None:
    without_rationales, with_rationales = recipe, asking(recipe, rationales=True)
    student = make_student(recipe, tmp_path, "step-by-step")
    without, with_them = (
        predicted(without_rationales, student, tmp_path),
        predicted(with_rationales, student, tmp_path),
    )
    assert all(
        line["rationale"] is None and line["rationale_truncated"] is None for line in without
    )
    assert all(
        isinstance(line["rationale"], str) and line["rationale_truncated"] is not None
        for line in with_them
    )
    for name in ("raw", "probability", "truncated", "prompt"):
        assert [line[name] for line in with_them] == [line[name] for line in without], (
            "the label is the same"
        )


@pytest.mark.parametrize(
    ("method", "anew"),
    [("finetune", False), ("rationale-then-label", False), ("label-then-rationale", True)],
)
def test_asking_for_rationales_makes_predictions_anew_only_where_it_changes_them(
    recipe: Recipe, tmp_path: Path, method: str, anew: bool
) -> None:
    student = make_student(recipe, tmp_path, method)
    before = predicted(recipe, student, tmp_path)
    after = predicted(asking(recipe, rationales=True), student, tmp_path)
    assert (after[0]["made_by"] != before[0]["made_by"]) is anew
    if method != "finetune":
        assert all(
            line["rationale"] is not None and line["probability"] is None for line in before + after
        )


def test_a_file_of_the_first_version_is_read_and_kept_where_it_fits(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, rows = make_student(recipe, tmp_path), rows_of(recipe)
    path = predict_student(recipe, student, rows, RunFolder(tmp_path), NoProgress())
    as_first_version(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(Student, "load", no_loading)
        predict_student(recipe, student, rows, RunFolder(tmp_path), NoProgress())
    assert path.read_bytes() == before
    loaded_predictions = student_predictions(
        recipe, RunFolder(tmp_path).predictions(student.name), student
    )
    assert list(loaded_predictions) == [row.id for row in rows]
    assert all(
        prediction.probability is None and prediction.truncated is None and prediction.model is None
        for prediction in loaded_predictions.values()
    )

    lines = predicted(asking(recipe, max_label_tokens=3), student, tmp_path)
    assert all(
        line["schema"] == "dsbs.prediction/2" and line["probability"] is not None for line in lines
    )
    (aside,) = (tmp_path / "eval" / "predictions" / "aside").iterdir()
    assert aside.read_bytes() == before


def test_the_hash_of_the_first_versions_files_is_still_the_same(
    recipe: Recipe, tmp_path: Path
) -> None:
    from dsbs.files import canonical_json, digest

    student = make_student(recipe, tmp_path)
    data = canonical_json([[row.id, row.input] for row in rows_of(recipe)])
    assert predicted(recipe, student, tmp_path)[0]["made_by"] == digest("made", data, "8"), (
        "else hours of predictions are lost"
    )


def test_an_interrupted_prediction_leaves_no_half_file_and_loses_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(recipe, tmp_path)
    before, folder = predicted(recipe, student, tmp_path), tmp_path / "eval" / "predictions"
    later = student.model_copy(update={"fingerprint": "another"})
    correct, calls = predictions.is_correct, iter(range(100))

    def fails(*arguments: Any) -> bool | None:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return correct(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(predictions, "is_correct", fails)
        predicted(recipe, later, tmp_path)
    assert [path.name for path in folder.iterdir()] == ["aside"], (
        "neither half a file nor its beginnings"
    )
    assert [
        json.loads(line) for line in next((folder / "aside").iterdir()).open(encoding="utf-8")
    ] == before
    assert predicted(recipe, later, tmp_path)[0]["model"] == "another"


def test_a_student_is_loaded_when_it_is_needed_and_then_once(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, loaded = make_student(recipe, tmp_path), []
    really = Student.load
    monkeypatch.setattr(Student, "load", lambda path: loaded.append(path) or really(path))
    load = loader(student)
    assert not loaded
    predict_student(recipe, student, rows_of(recipe), RunFolder(tmp_path), NoProgress(), load)
    assert load() is load() and loaded == [student.path]


def test_rescoring_says_which_predictions_are_missing_or_of_another_student(
    recipe: Recipe, tmp_path: Path
) -> None:
    student = make_student(recipe, tmp_path)
    with pytest.raises(UserError, match=r"finetune-gold-s0.jsonl does not exist") as missing:
        student_predictions(recipe, RunFolder(tmp_path).predictions(student.name), student)
    assert missing.value.hint == "run dsbs eval without --score-only"
    predicted(recipe, student, tmp_path)
    assert (
        len(student_predictions(recipe, RunFolder(tmp_path).predictions(student.name), student))
        == 12
    )
    with pytest.raises(UserError, match="earlier student of that name") as other:
        student_predictions(
            recipe,
            RunFolder(tmp_path).predictions(student.name),
            student.model_copy(update={"fingerprint": "another"}),
        )
    assert other.value.hint == "run dsbs eval without --score-only"
    scores_labels = recipe.eval.model_copy(update={"score_labels": True})
    with pytest.raises(UserError, match=r"another calibration or eval\.score_labels than now"):
        student_predictions(
            recipe.model_copy(update={"eval": scores_labels}),
            RunFolder(tmp_path).predictions(student.name),
            student,
        )


@pytest.mark.parametrize(("missing", "is_refused"), [(2, False), (3, True)])
def test_rows_without_a_reply_are_not_the_teachers_mistakes(missing: int, is_refused: bool) -> None:
    annotations = [
        Annotation(
            id=f"r{number}",
            input={},
            teacher=TeacherName(kind="openai"),
            reject_reason="no-reply" if number < missing else "unparsed",
        )
        for number in range(200)
    ]
    if not is_refused:
        check_replies(annotations, "test row")
        return
    with pytest.raises(UserError, match="3 of 200 test rows have no reply") as error:
        check_replies(annotations, "test row")
    assert "run `dsbs annotate` again" in (error.value.hint or "")


def test_a_damaged_prediction_file_is_reported_with_its_line(tmp_path: Path) -> None:
    good = {"schema": "dsbs.prediction/2", "id": "a", "raw": "x", "made_by": "y"}
    for bad, message in (
        ({"id": "b"}, "not a prediction"),
        (good, "occurs twice"),
        (good | {"schema": "no/9"}, "not a prediction"),
    ):
        path = write_jsonl(tmp_path / "p.jsonl", [good, bad])
        with pytest.raises(UserError, match=rf"p\.jsonl:2: .*{message}"):
            read_predictions(path)


def annotated(recipe: Recipe, run: Path, *rows: dict[str, Any], prompt: bool = True) -> None:
    """Write annotations of the split: ``rows`` for the first, without samples for the others."""
    task = make_task(recipe.task)
    lines = []
    for i, row in enumerate(rows_of(recipe)):
        fields = {
            "teacher": TeacherName(kind="openai", model="m"),
            "id": row.id,
            "input": row.input,
            "gold": row.label,
        }
        lines.append(
            Annotation(**fields | (rows[i] if i < len(rows) else {})).model_dump(
                mode="json", by_alias=True
            )
        )
    (run / "annotate").mkdir(parents=True)
    write_jsonl(run / "annotate" / "test.jsonl", lines)
    manifest: dict[str, Any] = {"status": "done", "source": source_fingerprint(recipe, task)}
    manifest["prompt"] = load_prompt(recipe, task).model_dump(mode="json") if prompt else None
    (run / "annotate" / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def teacher_file(recipe: Recipe, run: Path) -> Path:
    """The teacher's prediction file, made of the annotations."""
    task = make_task(recipe.task)
    assert predict_teacher(recipe, task, rows_of(recipe), RunFolder(run), required=True)
    return RunFolder(run).predictions("teacher")


def samples(
    *labels: str | None, hinted: str | None = None, logprob: float | None = None
) -> list[Sample]:
    unhinted = [Sample(text="t", label=label, label_logprob=logprob) for label in labels]
    return unhinted + [Sample(text="t", label=hinted, hinted=True, label_logprob=-0.01)] * (
        hinted is not None
    )


def test_the_teachers_row_has_its_own_labels_probability_and_whether_it_was_cut(
    recipe: Recipe, tmp_path: Path
) -> None:
    cut, spent, unread = (
        Sample(text="t", reason=reason)
        for reason in ("truncated", "spent-on-reasoning", "unparsed")
    )
    mine: dict[str, Any] = {"own_label": "billing", "label": "billing", "provenance": "own"}
    hinted: dict[str, Any] = {
        "own_label": "billing",
        "label": "shipping",
        "provenance": "hinted",
        "rationale": "given away",
    }
    hinted["label_logprob"] = -0.01
    cases: list[tuple[dict[str, Any], float | None, bool | None]] = [
        # its annotation, its probability, whether it was cut
        (
            mine
            | {"samples": samples("billing"), "label_logprob": math.log(0.7), "vote_share": 1.0},
            0.7,
            False,
        ),
        (
            mine | {"samples": samples("billing"), "label_logprob": 1e-7, "vote_share": 1.0},
            1.0,
            False,
        ),
        (mine | {"samples": samples("billing"), "vote_share": 1.0}, None, False),
        (
            mine | {"samples": samples("billing", "shipping", "billing"), "vote_share": 2 / 3},
            2 / 3,
            False,
        ),
        (mine | {"samples": [cut, *samples("billing", "billing")], "vote_share": 1.0}, 1.0, False),
        ({"samples": [cut], "reject_reason": "truncated"}, None, True),
        ({"samples": [spent], "reject_reason": "spent-on-reasoning"}, None, True),
        ({"samples": [unread], "reject_reason": "unparsed"}, None, False),
        ({}, None, None),
        # the answer given away, nothing of which is the teacher's own
        (
            hinted | {"samples": samples("billing", hinted="shipping", logprob=math.log(0.4))},
            0.4,
            False,
        ),
        (
            hinted | {"samples": samples("billing", "billing", "shipping", hinted="shipping")},
            2 / 3,
            False,
        ),
        (hinted | {"own_label": None, "samples": [cut, *samples(hinted="shipping")]}, None, True),
    ]
    annotated(recipe, tmp_path, *(row for row, _, _ in cases))
    task = make_task(recipe.task)
    rows = rows_of(recipe)
    by_id = read_predictions(teacher_file(recipe, tmp_path))
    for row, (annotation, probability, truncated) in zip(rows, cases, strict=True):
        prediction = by_id[row.id]
        assert prediction.probability == (
            None if probability is None else pytest.approx(probability)
        ), annotation
        assert prediction.truncated is truncated, annotation
        assert prediction.prediction == annotation.get("own_label") and prediction.rationale is None
        assert (
            prediction.schema_ == "dsbs.prediction/2"
            and prediction.input == row.input
            and prediction.model == "openai:m"
        )
        assert prediction.prompt == load_prompt(recipe, task).hash


def test_an_ensembles_probability_is_the_weighted_share_of_those_that_voted_for_its_label(
    recipe: Recipe, tmp_path: Path
) -> None:
    row: dict[str, Any] = {
        "teacher": TeacherName(kind="ensemble", model="a, b"),
        "own_label": "billing",
        "label": "billing",
    }
    row |= {
        "provenance": "own",
        "samples": samples("billing", "shipping", logprob=-0.1),
        "label_logprob": -0.1,
    }
    annotated(recipe, tmp_path, row | {"vote_share": 0.75})
    path = teacher_file(recipe, tmp_path)
    assert next(iter(read_predictions(path).values())).probability == 0.75


def test_a_teacher_without_a_prompt_or_a_models_name_has_none_in_its_rows(
    recipe: Recipe, tmp_path: Path
) -> None:
    annotated(recipe, tmp_path, *[{"teacher": TeacherName(kind="recorded")}] * 12, prompt=False)
    path = teacher_file(recipe, tmp_path)
    prediction = next(iter(read_predictions(path).values()))
    assert (prediction.model, prediction.prompt) == ("recorded", None)


def test_the_command_prints_the_students_probability(recipe: Recipe, tmp_path: Path) -> None:
    student = make_student(recipe, tmp_path)
    done = run_dsbs(
        "predict",
        student.path,
        "--max-label-tokens",
        "2",
        cwd=tmp_path,
        input="My parcel is late.\n",
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    (answer,) = Student.load(student.path).predict(["My parcel is late."], max_label_tokens=2)
    assert (
        row["probability"] == pytest.approx(answer.probability, abs=1e-5)
        and row["truncated"] is answer.truncated
    )
