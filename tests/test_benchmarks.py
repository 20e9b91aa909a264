"""Benchmarks and tools: every script runs on tiny input."""

from __future__ import annotations

import json
import string
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, SHARED, TEAMS, toy_rows, write_jsonl
from forked import Forked

from dsbs.config import DataSection, StudentSection, TaskSection
from dsbs.students.card import StudentCard
from dsbs.students.student import Student
from dsbs.students.tokenizer import learn_vocabulary
from dsbs.students.weights import new_model

PEERS = ROOT / "benchmarks" / "peers"
HAS_DATA = (SHARED / "esnli").is_dir()
needs_data = pytest.mark.skipif(
    not HAS_DATA, reason="real data is not beside this checkout (../shared/data)"
)

# Arguments of each script in benchmarks/, and a text that its output contains.
RUNS = [
    pytest.param(
        "train.py",
        "--terms --tiny --runs 1",
        "kept top-k / plain",
        id="terms",
        marks=pytest.mark.slow,
    ),
    pytest.param("scale.py", "--rows 50", "50 rows:", id="scale"),
    pytest.param(
        "shapes_rows.py", "--out OUT", "score/train.jsonl: 818", id="shapes", marks=needs_data
    ),
    pytest.param("scale.py", "--rows 50 --file", "50 rows:", id="scale-file"),
    pytest.param(
        "rescore.py", "--rows 30 --systems 3 --runs 1", "30 rows, 3 systems", id="rescore"
    ),
    pytest.param("cascade.py", "--made 400 --splits 2", "| 98.0% | guaranteed |", id="cascade"),
    pytest.param(
        "annotate.py",
        "--rows 12 --concurrency 4 --latency fixed --mean 0.01 --runs 1",
        "aiohttp alone",
        id="annotate",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "compress.py",
        "--sizes nano --calls 1",
        "prune-ff=0.5",
        id="compress",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "next_rows.py",
        "--out OUT --datasets banking77 --seeds 0 --sizes 4 8 --pool 40 --test 4 --steps 1",
        "| both | 8 |",
        id="next-rows",
        marks=[needs_data, pytest.mark.slow],
    ),
    pytest.param(
        "students.py",
        "--tiny --runs 1 --variants ct2-int8",
        "| ct2-int8 |",
        id="students",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        "predict.py",
        "--random t5-small --variants torch-int8 --rows 4 --rounds 1 --tokens 2",
        "torch-int8",
        id="predict",
        marks=[needs_data, pytest.mark.slow],
    ),
    pytest.param(
        "prune.py",
        "benchmarks/prune-minilm.yaml --out OUT --heal-steps 1 --rows 8 task.limit=60 "
        "train.subset=1 train.seeds=0 train.max_epochs=null train.max_steps=1 eval.latency_calls=0",
        "| original |",
        id="prune",
        marks=[needs_data, pytest.mark.slow],
    ),
    pytest.param(
        "svamp_folds.py",
        "student.model=null student.init=scratch student.size=nano student.template=auto "
        "train.max_epochs=null train.max_steps=1 --out OUT --folds 0 --teachers gpt-4",
        "| gpt-4 | – |",
        id="svamp-folds",
        marks=[needs_data, pytest.mark.slow],
    ),
]


def run_script(path: Path, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return Forked([str(path), *arguments], cwd=cwd).completed(300)


@pytest.mark.parametrize(("script", "arguments", "expected"), RUNS)
def test_a_benchmark_runs(script: str, arguments: str, expected: str, tmp_path: Path) -> None:
    arguments = arguments.replace("OUT", str(tmp_path))
    done = run_script(ROOT / "benchmarks" / script, *arguments.split())
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout


def test_the_speed_benchmark_prints_median_and_range() -> None:
    done = run_script(ROOT / "benchmarks" / "train.py", "--tiny", "--runs", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    plain, exact = (float(word) for word in lines[1].replace(",", "").split() if "." in word)
    assert abs(plain - exact) < 1e-4, "both train the same objective"
    rows = [line.split() for line in lines if line.startswith("tiny")]
    assert [row[1] for row in rows] == ["16", "64"]
    assert all(row[3].startswith("(") and "–" in row[3] for row in rows)


@pytest.mark.slow
def test_the_memory_benchmark_prints_a_line_with_and_without_checkpointing() -> None:
    done = run_script(ROOT / "benchmarks" / "memory.py", "--tiny", "--runs", "1")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if "tiny" in line]
    assert [row[3] for row in rows] == ["yes", "no"]


@pytest.mark.slow
def test_the_load_test_of_the_server_runs(tmp_path: Path) -> None:
    rows = toy_rows(8)
    alphabet = " ".join(string.ascii_letters + string.digits)
    tokenizer = learn_vocabulary([alphabet, *(row["text"] for row in rows)], 200)
    data = DataSection(train="train.csv")
    task = TaskSection(name="classification", labels=TEAMS, columns={"label": "team"}, data=data)
    card = StudentCard(
        name="toy-student",
        method="finetune",
        labels="gold",
        seed=0,
        task=task,
        prefixes={"label": ""},
        max_input_tokens=64,
        max_target_tokens=4,
    )
    student = tmp_path / "student"
    Student.of(new_model(StudentSection(), tokenizer, 0), tokenizer, card).save(student)
    inputs = write_jsonl(tmp_path / "rows.jsonl", [{"text": row["text"]} for row in rows])
    done = run_script(
        ROOT / "benchmarks" / "serve.py",
        str(student),
        str(inputs),
        *("--clients", "2", "--seconds", "1"),
    )
    # Whether the memory levels off cannot be seen in one second.
    assert "requests failed" not in done.stdout
    assert "the shutdown was not clean" not in done.stdout
    assert "times the requests per second" in done.stdout, done.stderr


@needs_data
@pytest.mark.slow
def test_rounds_of_served_rows_and_a_drifting_teacher_run(tmp_path: Path) -> None:
    sizes = "--rounds 2 --first 60 --serve 40 --steps 2 --limit 400 --target 0.4 --port 0"
    rounds = ROOT / "benchmarks" / "rounds.py"
    done = run_script(rounds, "--out", str(tmp_path), *sizes.split())
    assert done.returncode == 0, done.stderr
    first, second = json.loads((tmp_path / "rounds.json").read_text(encoding="utf-8"))
    assert first["train rows"] == 60
    assert first["served"]["failed"] == second["served"]["failed"] == 0
    deferred = round(40 * first["served"]["deferred"])
    assert 60 + deferred <= second["train rows"] <= 100, "with those audited"
    again = run_script(rounds, "--out", str(tmp_path), *sizes.split())
    assert "dsbs" not in again.stderr, "nothing is repeated"
    assert again.stdout.splitlines()[-4:] == done.stdout.splitlines()[-4:]
    drift = run_script(
        ROOT / "benchmarks" / "drift.py",
        str(tmp_path),
        *("--before", "20", "--after", "20", "--servers", "1"),
    )
    assert drift.returncode == 0, drift.stderr
    assert "expected: median" in drift.stdout and "server 1:" in drift.stdout


def test_every_benchmark_has_a_test() -> None:
    tested = {run.values[0] for run in RUNS}
    tested |= {"train.py", "memory.py", "serve.py", "rounds.py", "drift.py"}  # below
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} == tested


@pytest.mark.parametrize(
    "script",
    [
        "train.py",
        "memory.py",
        "compress.py",
        "predict.py",
        "prune.py",
        "students.py",
        "next_rows.py",
    ],
)
def test_benchmarks_that_start_torch_use_passive_waiting(script: str) -> None:
    text = (ROOT / "benchmarks" / script).read_text(encoding="utf-8")
    setting = text.index('os.environ.setdefault("OMP_WAIT_POLICY", "passive")')
    starts = [text.find(line) for line in ("import torch", "from dsbs import")]
    assert setting < min(position for position in starts if position >= 0)


@pytest.mark.parametrize("peer", sorted(PEERS.glob("*.py")), ids=lambda peer: peer.stem)
def test_a_peer_stands_alone(peer: Path) -> None:
    """It runs in an environment of its own, which does not contain dsbs."""
    text = peer.read_text(encoding="utf-8")
    compile(text, str(peer), "exec")
    assert "import dsbs" not in text
    assert "from dsbs" not in text


def test_published_rows_pairs_rows_with_completions(tmp_path: Path) -> None:
    source = tmp_path / "datasets" / "esnli"
    (source / "llm").mkdir(parents=True)
    for split in ("train", "valid", "test"):
        row = {"premise": "A dog runs.", "hypothesis": "It moves.", "label": "entailment"}
        (source / f"esnli_{split}.json").write_text(json.dumps(row) + "\n", encoding="utf-8")
        completions = json.dumps(["Running is moving. So the answer is entailment."])
        (source / "llm" / f"{split}_CoT_0.json").write_text(completions, encoding="utf-8")
    script = ROOT / "tools" / "published_rows.py"
    done = run_script(script, "esnli", "datasets", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out" / "train.jsonl").read_text(encoding="utf-8"))
    assert row["teacher"]["completion"].startswith("Running is moving.")


def test_published_rows_rejects_unpaired_completions(tmp_path: Path) -> None:
    source = tmp_path / "datasets" / "esnli"
    source.mkdir(parents=True)
    (source / "esnli_train.json").write_text('{"label": "entailment"}\n', encoding="utf-8")
    script = ROOT / "tools" / "published_rows.py"
    done = run_script(script, "esnli", "datasets", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "1 train rows but 0 completions" in done.stderr
