"""Exports do what the student does, and are whole or not there."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import run_dsbs, start_dsbs, toy_rows
from tiny_t5 import SHALLOW, V1_0, V1_1, make_student, texts

from dsbs.errors import DsbsError, UserError
from dsbs.exporting import Equivalence, Exported, ct2, read_exported
from dsbs.exporting.golden import check_float32
from dsbs.exporting.run import export
from dsbs.students.backends.ctranslate2 import CTranslate2Backend
from dsbs.students.student import Student

ROWS = texts(20)
BOTH = pytest.mark.parametrize("shape", [V1_0, V1_1 | SHALLOW], ids=["v1.0", "v1.1"])


def golden(folder: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for line in (folder / "golden.jsonl").read_text(encoding="utf-8").splitlines()
    ]


@BOTH
@pytest.mark.parametrize("form", ["ct2", "onnx", "torch"])
def test_a_float_export_writes_and_scores_as_transformers_does(
    tmp_path: Path, shape: dict[str, Any], form: str
) -> None:
    student = make_student(tmp_path, shape)
    done = export(student, form, quantize="float32", examples=ROWS)
    found = done.equivalence
    assert found.rows == 20 + 12  # the label's prefix and the rationale's
    assert found.greedy_agreement == 1.0
    assert found.score_difference is not None and found.score_difference < 1e-3
    assert found.beam_agreement == (None if form == "onnx" else 1.0)
    mine, theirs = (
        Student.load(path).predict(ROWS, rationale=True, batch_size=7, max_label_tokens=12)
        for path in (done.path, student)
    )
    assert len({answer.raw for answer in theirs}) > 3, "the rows tell nothing apart"
    for one, other in zip(mine, theirs, strict=True):
        assert (one.raw, one.rationale, one.truncated, one.rationale_truncated) == (
            other.raw, other.rationale, other.truncated, other.rationale_truncated,
        )  # fmt: skip
        assert one.probability == pytest.approx(other.probability, rel=1e-3)
    outputs = Student.load(done.path).generate(ROWS[:3], 6, 2, probabilities=True)
    expected = Student.load(student).generate(ROWS[:3], 6, 2, probabilities=True)
    for output, like in zip(outputs, expected, strict=True):
        logs = dict(output.tokens), dict(like.tokens)
        assert logs[0] == ({} if form == "ct2" else pytest.approx(logs[1], abs=1e-3)) and logs[1]
    if form == "ct2":
        with pytest.raises(UserError, match="seq2seq students in ct2 format cannot score labels"):
            Student.load(done.path).predict(ROWS[:1], score_labels=True)
    else:
        assert_scores_labels_alike(Student.load(done.path), Student.load(student))
    assert_saves_what_it_loads(Student.load(done.path), tmp_path / "copy")


def assert_scores_labels_alike(ours: Student, theirs: Student) -> None:
    """With labels of several lengths, and more of them than are scored together."""
    labels = ["billing", "shipping", "a much longer label than that"]
    for ours_row, theirs_row in zip(
        ours.backend.score(ROWS[:5], labels),  # type: ignore[attr-defined]
        theirs.backend.score(ROWS[:5], labels),  # type: ignore[attr-defined]
        strict=True,
    ):
        assert ours_row == pytest.approx(theirs_row, abs=2e-2, rel=1e-3)


def test_the_converters_own_scale_would_be_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ctranslate2.converters.transformers import T5Loader

    student = make_student(tmp_path, V1_1)
    monkeypatch.setattr(ct2, "_t5_loader", T5Loader)
    monkeypatch.setattr(CTranslate2Backend, "_decode", _with_its_own_start)
    with pytest.raises(DsbsError, match="log-probabilities differ"):
        export(student, "ct2", quantize="float32", examples=ROWS)
    assert not (student / "export" / "ct2").exists()


def _with_its_own_start(
    engine: Any, inputs: list[str], most: int, start: str, beams: int, scores: bool
) -> Any:
    """As the engine decodes, by a model whose converter has written the start token down."""
    import math

    from dsbs.students.backends import GeneratedText

    pieces = [
        [engine._pieces[index] for index in one.ids]
        for one in engine.tokenizer.encode_batch(inputs)
    ]
    found = engine.model.translate_batch(
        pieces,
        beam_size=beams,
        max_decoding_length=most,
        min_decoding_length=0,
        length_penalty=0,
        return_scores=True,
        return_end_token=True,
    )
    ids = [
        [engine.tokenizer.token_to_id(piece) or 0 for piece in one.hypotheses[0]] for one in found
    ]
    decoded = engine.tokenizer.decode_batch(ids)
    return [
        GeneratedText(text.strip(), False, math.exp(one.scores[0]))
        for text, one in zip(decoded, found, strict=True)
    ]


@pytest.mark.parametrize("form", ["ct2", "onnx", "torch"])
def test_a_decoder_that_begins_with_its_end_token_does_so_in_every_format(
    tmp_path: Path, form: str
) -> None:
    student = make_student(
        tmp_path, SHALLOW, prefixes={"label": "", "rationale": ""}, starts={"rationale": "eos"}
    )
    done = export(student, form, quantize="float32", examples=ROWS)
    assert done.equivalence.greedy_agreement == 1.0
    rows = golden(done.path)
    assert {row["start"] for row in rows} == {"pad", "eos"}
    by_start = [
        {row["input"]: row["greedy"] for row in rows if row["start"] == start}
        for start in ("pad", "eos")
    ]
    assert any(by_start[0][text] != by_start[1][text] for text in by_start[1]), (
        "the start changes nothing"
    )


@pytest.mark.parametrize("form", ["ct2", "onnx", "torch"])
@pytest.mark.slow
def test_an_int8_export_is_smaller_and_says_how_often_it_agrees(tmp_path: Path, form: str) -> None:
    student = make_student(tmp_path)
    plain = export(student, form, quantize="float32", examples=ROWS)
    small = export(student, form, quantize="int8", examples=ROWS)
    assert small.path != plain.path
    assert small.megabytes < plain.megabytes
    assert 0.0 < small.equivalence.greedy_agreement <= 1.0
    # random weights sharpen every difference, token after token: their first tokens are compared
    first, same = (
        [said.text for said in Student.load(path).backend.generate(ROWS, 1)]
        for path in (small.path, student)
    )
    assert sum(one == other for one, other in zip(first, same, strict=True)) / len(ROWS) > 0.6


def test_an_int8_torch_export_counts_every_parameter_once(tmp_path: Path) -> None:
    student = make_student(tmp_path)
    done = export(student, "torch", quantize="int8", examples=ROWS)
    model = Student.load(student).backend.model
    head = model.lm_head.weight.numel()  # tied in the student, a matrix of its own where quantized
    assert (
        Student.load(done.path).backend.parameters
        == sum(p.numel() for p in model.parameters()) + head
    )


@pytest.mark.parametrize("form", ["ct2", "torch"])
def test_an_engine_saves_what_it_loads(tmp_path: Path, form: str) -> None:
    """In int8; for float32, see test_a_float_export_writes_and_scores_as_transformers_does."""
    done = export(make_student(tmp_path), form, quantize="int8", examples=ROWS)
    assert_saves_what_it_loads(Student.load(done.path), tmp_path / "copy")


def assert_saves_what_it_loads(student: Student, copy: Path) -> None:
    copy.mkdir()
    student.save(copy)
    answers = Student.load(copy).predict(ROWS)
    assert [one.raw for one in answers] == [one.raw for one in student.predict(ROWS)]


def test_rows_come_from_the_runs_valid_split_and_else_from_the_vocabulary(tmp_path: Path) -> None:
    made = export(make_student(tmp_path), "ct2")
    assert (made.equivalence.source, made.quantize) == ("made", "int8")
    assert len({row["input"] for row in golden(made.path)}) > 40
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"id": row["id"], "text": row["text"], "label": row["team"]}) + "\n"
            for row in toy_rows(90)
        )
    )
    recipe = {
        "name": "r",
        "task": {
            "name": "classification",
            "labels": ["billing", "shipping"],
            "data": {"train": str(data)},
        },
    }
    (tmp_path / "manifest.json").write_text(
        json.dumps({"recipe": recipe | {"teacher": {"kind": "recorded"}}})
    )
    found = export(tmp_path / "student", "ct2", quantize="float32")
    assert found.equivalence.source == "valid"
    assert all("number" in row["input"] for row in golden(found.path))


def test_an_export_that_fits_is_kept_and_another_one_moves_aside(tmp_path: Path) -> None:
    student = make_student(tmp_path)
    first = export(student, "ct2", examples=ROWS)
    before = (first.path / "model.bin").stat().st_mtime_ns
    assert export(student, "ct2") == first
    assert (first.path / "model.bin").stat().st_mtime_ns == before
    config = json.loads((student / "student.json").read_text())
    (student / "student.json").write_text(json.dumps(config | {"max_target_tokens": 11}))
    second = export(student, "ct2", examples=ROWS)
    assert second.fingerprint != first.fingerprint
    aside = read_exported(student / "export" / "aside" / f"ct2-int8-{first.fingerprint[:12]}")
    assert aside is not None and aside.fingerprint == first.fingerprint
    assert sorted(path.name for path in (student / "export").iterdir()) == ["aside", "ct2-int8"]


def test_an_export_that_has_lost_its_weights_is_made_again(tmp_path: Path) -> None:
    student = make_student(tmp_path)
    first = export(student, "ct2", examples=ROWS)
    whole = (first.path / "model.bin").read_bytes()
    for left in (whole[:-1], None):
        (first.path / "model.bin").unlink() if left is None else (
            first.path / "model.bin"
        ).write_bytes(left)
        assert export(student, "ct2", examples=ROWS) == first
        assert (first.path / "model.bin").read_bytes() == whole


def test_a_folder_that_is_no_export_is_left_alone(tmp_path: Path) -> None:
    student = make_student(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="is not an export"):
        export(student, "ct2", out=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_an_export_that_another_process_finished_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = make_student(tmp_path)
    load, others = Student.load, []

    def slow(path: Path) -> Student:
        if not others:
            others.append(None)
            others.append(export(student, "ct2", examples=ROWS))
        return load(path)

    monkeypatch.setattr(Student, "load", slow)
    with pytest.raises(DsbsError, match="another process has written"):
        export(student, "ct2", examples=ROWS)
    assert read_exported(student / "export" / "ct2-int8") == others[1]


@pytest.mark.parametrize("out", [".", "a-link"])
def test_a_place_that_nothing_can_be_moved_to_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    student = make_student(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    if out != ".":
        Path(out).symlink_to("nowhere")
    with pytest.raises(UserError, match=f"--out {re.escape(out)}:"):
        export(student, "ct2", out=out)


def test_an_export_killed_while_it_writes_leaves_nothing_and_runs_again(tmp_path: Path) -> None:
    student = make_student(tmp_path)
    partial = student / "export" / ".ct2-int8.partial" / "export"
    child = start_dsbs("export", str(student), "--format", "ct2")
    deadline = time.monotonic() + 200
    while (
        not (partial / "model.bin").exists()
        and child.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert child.returncode == -signal.SIGKILL
    assert partial.exists() and not (student / "export" / "ct2-int8").exists()
    done = export(student, "ct2", examples=ROWS)
    assert Student.load(done.path).predict(["My parcel"])[0].raw is not None
    assert [path.name for path in (student / "export").iterdir()] == ["ct2-int8"]
    assert not list(done.path.glob(".*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "tflite"], "unknown export format 'tflite'"),
        (["--format", "gguf"], "a seq2seq model, which the format gguf does not support"),
        (["--quantize", "int4"], "has no quantization 'int4'"),
        (["--examples", "nothing.txt"], "nothing.txt does not exist"),
    ],
)
def test_a_wrong_option_is_one_message(tmp_path: Path, arguments: list[str], words: str) -> None:
    student = make_student(tmp_path)
    found = run_dsbs("export", str(student), *arguments, cwd=tmp_path)
    assert found.returncode == 2
    assert words in found.stderr and "try:" in found.stderr and "Traceback" not in found.stderr


def test_a_folder_without_a_student_and_an_export_itself_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not contain a student"):
        export(tmp_path, "ct2")
    done = export(make_student(tmp_path), "ct2", examples=ROWS)
    with pytest.raises(UserError, match="is already an export"):
        export(done.path, "onnx")


@pytest.mark.parametrize(
    ("form", "package"), [("ct2", "ctranslate2"), ("onnx", "onnxruntime"), ("onnx", "onnxscript")]
)
def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, package: str
) -> None:
    student = make_student(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=package) as caught:
        export(student, form, quantize="float32")
    assert f"dsbs[{form}]" in caught.value.hint


def test_the_command_predicts_with_an_export_as_with_a_student(tmp_path: Path) -> None:
    student = make_student(tmp_path)
    examples = tmp_path / "rows.txt"
    examples.write_text("\n".join(ROWS[:10]))
    told = run_dsbs(
        "export",
        str(student),
        "--quantize",
        "float32",
        "--examples",
        str(examples),
        "--json",
        cwd=tmp_path,
    )
    assert told.returncode == 0, told.stderr
    record = json.loads(told.stdout)
    assert record["schema"] == "dsbs.export/1" and record["equivalence"]["source"] == "examples"
    answers = [
        run_dsbs("predict", path, str(examples), cwd=tmp_path)
        for path in (record["path"], str(student))
    ]
    rows = [[json.loads(line)["raw"] for line in answer.stdout.splitlines()] for answer in answers]
    assert rows[0] == rows[1] and len(rows[0]) == 10


def test_the_readme_keeps_the_students_card_and_adds_what_was_measured(tmp_path: Path) -> None:
    student = make_student(tmp_path)
    (student / "README.md").write_text(
        "# Mine\n\nA word of my own.\n\n<!-- dsbs wrote this card, sha256 00: x -->\n"
    )
    text = (export(student, "ct2", examples=ROWS).path / "README.md").read_text()
    assert text.startswith("# Mine\n\nA word of my own.\n\n## Export")
    assert "32 given texts" in text and "ctranslate2" in text and "wrote this card" not in text


def test_a_float_export_that_disagrees_is_an_error() -> None:
    good = {
        "rows": 40,
        "source": "made",
        "greedy_agreement": 1.0,
        "beam_agreement": 1.0,
        "score_difference": 1e-5,
    }
    check_float32(Equivalence.model_validate(good), "s")
    for wrong in ({"greedy_agreement": 0.9}, {"beam_agreement": 0.9}, {"score_difference": 0.01}):
        with pytest.raises(DsbsError, match="differs from the student"):
            check_float32(Equivalence.model_validate(good | wrong), "s")
    with pytest.raises(DsbsError, match=r"allowed: 0\.005"):
        check_float32(Equivalence.model_validate(good | {"score_difference": 0.006}), "s", "causal")


def test_a_record_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    assert read_exported(tmp_path) is None
    (tmp_path / "export.json").write_text('{"schema": "dsbs.export/9"}')
    assert read_exported(tmp_path) is None


def test_the_record_names_no_place(tmp_path: Path) -> None:
    done = export(make_student(tmp_path), "ct2", examples=ROWS)
    assert (
        isinstance(done, Exported) and str(tmp_path) not in (done.path / "export.json").read_text()
    )
