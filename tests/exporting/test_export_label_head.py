"""Exports of label heads give the distribution of transformers, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from encoder_models import label_head_student, save_label_head, texts

from dsbs.errors import UserError
from dsbs.exporting import export_format
from dsbs.exporting.run import export
from dsbs.students.calibration import (
    Threshold,
    calibrate,
    read_calibration,
    read_threshold,
    write_record,
)
from dsbs.students.student import Student

ROWS = texts(20)
THRESHOLD = Threshold(
    student="f",
    confidence="margin",
    temperature=1.0,
    threshold=0.8,
    of="agreement",
    target=0.98,
    level=0.95,
    bound=0.982,
    rows=500,
    coverage=0.6,
)
BLOCK = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {refused!r}:
            raise ImportError(f"{{name}} is refused")
sys.meta_path.insert(0, Refuse())
sys.argv = [{script!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("family", "form"),
    [
        *((family, "onnx") for family in ("bert", "deberta-v2", "t5")),
        *(
            pytest.param(family, "onnx", marks=pytest.mark.slow)
            for family in ("roberta", "distilbert", "modernbert")
        ),
        *((family, "ct2") for family in ("bert", "roberta", "distilbert")),
    ],
)
def test_a_float_export_gives_the_students_distribution(
    tmp_path: Path, family: str, form: str
) -> None:
    folder = save_label_head(tmp_path, family, num_hidden_layers=2)
    write_record(folder, THRESHOLD)
    exported = export(folder, form, quantize="float32", examples=ROWS)
    assert read_threshold(exported.path) == THRESHOLD, "its answers are the student's"
    assert exported.equivalence.greedy_agreement == 1.0
    assert exported.equivalence.score_difference is not None
    assert exported.equivalence.score_difference < 1e-3
    expected = Student.load(folder).predict(ROWS)
    student = Student.load(exported.path)
    actual = student.predict(ROWS, batch_size=7)
    assert len({answer.probability for answer in expected}) > 5, "the rows tell nothing apart"
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.label == theirs.label
        assert ours.distribution == pytest.approx(theirs.distribution, abs=1e-5)
        margin = student.confidence(ours, {}, THRESHOLD.confidence)
        likeliest = sorted(ours.distribution.values())
        assert margin == pytest.approx(likeliest[-1] - likeliest[-2], abs=2e-6)
        assert THRESHOLD.is_sure(margin) == (likeliest[-1] - likeliest[-2] >= 0.8)
    assert not THRESHOLD.is_sure(None)
    (tmp_path / "copy").mkdir()
    student.save(tmp_path / "copy")
    copied = Student.load(tmp_path / "copy").predict(ROWS[:3], batch_size=7)
    assert [answer.label for answer in copied] == [answer.label for answer in expected[:3]]
    with pytest.raises(UserError, match="export of a label head, which has no rationales"):
        student.predict(ROWS[:1], rationale=True)


@pytest.mark.parametrize("form", ["onnx", "ct2"])
def test_int8_is_smaller_and_the_script_prints_what_the_backend_gives(
    tmp_path: Path, form: str
) -> None:
    folder = tmp_path / "student"
    student = label_head_student("bert", prefix="it's: ")
    uncalibrated = student.predict(ROWS[:1])[0].distribution
    student.calibration = calibrate([(0.9, 0.1)] * 20, [0, 1] * 10, "gold")
    assert student.temperature > 5
    assert student.predict(ROWS[:1])[0].distribution != pytest.approx(uncalibrated, abs=1e-3)
    student.save(folder)
    write_record(folder, THRESHOLD)
    exported = export(folder, form, quantize="int8", examples=ROWS)
    assert read_calibration(exported.path) == student.calibration
    assert read_threshold(exported.path) is None, "quantized weights answer otherwise"
    script = (exported.path / "predict.py").read_text(encoding="utf-8")
    assert len(script.splitlines()) <= 15
    other = "ctranslate2" if form == "onnx" else "onnxruntime"
    refused = ("torch", "transformers", "dsbs", other)
    command = BLOCK.format(refused=refused, script=str(exported.path / "predict.py"))
    done = subprocess.run(
        [sys.executable, "-I", "-c", command],
        input="".join(f"{row}\n" for row in ROWS),
        capture_output=True,
        text=True,
        check=True,
    )
    answers: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    expected = Student.load(exported.path).predict(ROWS, batch_size=1)
    for ours, theirs in zip(answers, expected, strict=True):
        assert ours["distribution"] == pytest.approx(theirs.distribution, abs=1e-5)
        assert ours["label"] == theirs.label
        assert ours["probability"] == pytest.approx(theirs.probability, abs=1e-5)


def test_what_a_format_lacks_is_refused_with_another(tmp_path: Path) -> None:
    folder = save_label_head(tmp_path, "modernbert")
    with pytest.raises(UserError, match="cannot be exported") as refusal:
        export(folder, "ct2", examples=ROWS)
    assert "--format onnx" in refusal.value.hint
    with pytest.raises(UserError, match="has a label head, which the format torch"):
        export(folder, "torch", examples=ROWS)
    student = label_head_student("bert")
    student.backend.tokenizer.sep_token = None
    for form in ("onnx", "ct2"):
        with pytest.raises(UserError, match="has no separator token"):
            export_format(form).check(student, "float32")
