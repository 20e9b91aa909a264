"""predict.py of an export runs where there is no dsbs, no torch and no transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from forked import Forked
from tiny_t5 import SHALLOW, make_student, texts

from dsbs.exporting.run import export

# Put before a script: whatever it imports beside these is refused, however it is asked for.
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
ROWS = texts(12)
NOT_NEEDED = (
    "torch",
    "transformers",
    "dsbs",
    "sentencepiece",
    "huggingface_hub",
    "onnx",
    "onnxscript",
)


def golden(folder: Path) -> list[tuple[str, str]]:
    """Inputs without the label's prefix, and what transformers wrote to them."""
    rows = [
        json.loads(line)
        for line in (folder / "golden.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return [
        (row["input"].removeprefix("predict: "), row["greedy"])
        for row in rows
        if row["target"] == "label"
    ]


def said(command: list[str], rows: list[tuple[str, str]], folder: Path) -> list[str]:
    lines = "".join(text + "\n" for text, _ in rows)
    done = subprocess.run(
        command, input=lines, capture_output=True, text=True, check=False, cwd=folder, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def said_by_fork(script: Path, texts: list[str], folder: Path) -> list[str]:
    """In a process that has imported torch already: what else the script needs is not tested."""
    lines = "".join(text + "\n" for text in texts)
    done = Forked([str(script)], cwd=folder, input=lines).completed(300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("form", "refused"),
    [
        ("ct2", (*NOT_NEEDED, "onnxruntime")),
        ("onnx", (*NOT_NEEDED, "ctranslate2")),
        ("torch", ("dsbs", "ctranslate2")),
    ],
)
def test_the_script_writes_what_transformers_wrote_without_the_rest(
    tmp_path: Path, form: str, refused: tuple[str, ...]
) -> None:
    done = export(make_student(tmp_path, SHALLOW), form, quantize="float32", examples=ROWS)
    script = str(done.path / "predict.py")
    rows = golden(done.path)
    assert len(rows) == 12
    command = [sys.executable, "-I", "-c", BLOCK.format(refused=refused, script=script)]
    assert said(command, rows, tmp_path) == [text for _, text in rows]


def test_the_int8_script_of_torch_writes_what_the_engine_writes(tmp_path: Path) -> None:
    from dsbs.students.student import Student

    done = export(make_student(tmp_path), "torch", quantize="int8", examples=ROWS)
    answers = [
        answer.raw
        for answer in Student.load(done.path).predict(ROWS, batch_size=1, max_label_tokens=12)
    ]  # its scales are a batch's
    assert said_by_fork(done.path / "predict.py", ROWS, tmp_path) == answers


def test_a_prefix_with_quotes_and_backslashes_stays_text(tmp_path: Path) -> None:
    prefix = "a'\"\\n{x}: "
    done = export(
        make_student(tmp_path, prefixes={"label": prefix}), "ct2", quantize="float32", examples=ROWS
    )
    rows = [
        json.loads(line)
        for line in (done.path / "golden.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    pairs = [(row["input"].removeprefix(prefix), row["greedy"]) for row in rows]
    assert said([sys.executable, "-I", str(done.path / "predict.py")], pairs, tmp_path) == [
        text for _, text in pairs
    ]


def test_a_script_reads_and_writes_utf8_whatever_the_code_page(tmp_path: Path) -> None:
    umlauts = ["Überweisung größer", "naïve café"]
    done = export(make_student(tmp_path), "ct2", quantize="float32", examples=umlauts)
    command = [sys.executable, str(done.path / "predict.py")]
    ran = subprocess.run(
        command,
        input=("\ufeff" + "".join(text + "\n" for text in umlauts)).encode(),
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )
    assert ran.stdout.decode().splitlines() == [text for _, text in golden(done.path)]


@pytest.mark.slow
def test_a_ct2_export_runs_in_a_fresh_environment(tmp_path: Path) -> None:
    done = export(make_student(tmp_path), "ct2", quantize="float32", examples=ROWS)
    venv.create(tmp_path / "fresh", with_pip=True)
    python = str(tmp_path / "fresh" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "ctranslate2", "tokenizers"]
    found = subprocess.run(install, capture_output=True, text=True, check=False, timeout=500)
    if found.returncode:
        pytest.skip(f"no package index is reachable: {found.stderr[-200:]}")
    rows = golden(done.path)
    assert said([python, str(done.path / "predict.py")], rows, tmp_path) == [
        text for _, text in rows
    ]
