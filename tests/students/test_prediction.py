"""Files of predictions: streamed in order, continued after a kill, by processes and shards."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_dsbs, start_dsbs
from encoder_models import save_label_head, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from dsbs.errors import UserError
from dsbs.files import cut_torn_line
from dsbs.progress import NoProgress
from dsbs.students import prediction
from dsbs.students.prediction import Options, predict_file, predict_on_ray
from dsbs.students.student import Student
from dsbs.tasks.shards import Shard, ShardResult

ROWS = [(f"r{i}", {"text": text}) for i, text in enumerate(texts(50))]
OPTIONS = Options(batch_size=2, top=2)  # chunks of 16 rows


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_label_head(tmp_path_factory.mktemp("student"), num_hidden_layers=1)


def rows() -> Iterator[prediction.Row]:
    yield from ROWS


def predict(student: Path, out: Path, options: Options = OPTIONS, **arguments: Any) -> int:
    return predict_file(student, rows, out, options, source="rows.jsonl", **arguments)


@pytest.fixture(scope="module")
def whole_file(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a command that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "a.jsonl"
    assert predict(student, out) == 50
    return out


@pytest.fixture(scope="module")
def whole(whole_file: Path) -> bytes:
    return whole_file.read_bytes()


def test_each_row_has_its_likeliest_labels(student: Path, whole: bytes) -> None:
    predictions = [json.loads(line) for line in whole.splitlines()]
    assert [row["id"] for row in predictions] == [row_id for row_id, _ in ROWS]
    answers = Student.load(student).predict([fields for _, fields in ROWS], batch_size=50)
    for row, answer in zip(predictions, answers, strict=True):
        assert row["label"] == row["prediction"] == row["top"][0]["label"] == answer.label
        shares = [entry["probability"] for entry in row["top"]]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1), "there are two labels"
        assert row["probability"] == pytest.approx(answer.probability, abs=1e-5)


@given(kept=st.integers(0, 100), torn=st.binary(max_size=9).filter(lambda end: b"\n" not in end))
@settings(max_examples=12, deadline=None)
def test_a_file_that_was_cut_anywhere_is_completed_to_the_last_byte(
    student: Path,
    whole_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
    kept: int,
    torn: bytes,
) -> None:
    whole = whole_file.read_bytes()
    out = tmp_path_factory.mktemp("cut") / "a.jsonl"
    shutil.copy(f"{whole_file}.manifest.json", out.parent)
    out.write_bytes(whole[: len(whole) * kept // 100] + (torn if kept < 100 else b""))
    assert predict(student, out) == 50
    assert out.read_bytes() == whole


def test_a_killed_command_continues(student: Path, whole: bytes, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": row_id, **fields}) + "\n" for row_id, fields in ROWS),
        encoding="utf-8",
    )
    arguments = ["predict", str(student), "rows.jsonl", "--top", "2", "--batch-size", "2"]
    process = start_dsbs(*arguments, "--workers", "2", "--out", "out.jsonl", cwd=tmp_path)
    out = tmp_path / "out.jsonl"
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if out.exists() and out.stat().st_size:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    process.wait()
    done = run_dsbs(*arguments, "--out", "out.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert out.read_bytes() == whole


def test_tables_have_the_same_predictions(student: Path, whole: bytes, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    expected = [json.loads(line) for line in whole.splitlines()]
    for name in ("a.csv", "a.parquet"):
        assert predict(student, tmp_path / name) == 50
        assert predict(student, tmp_path / name) == 50, "it is complete already"
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        cells = list(csv.DictReader(file))
    assert [row["id"] for row in cells] == [row["id"] for row in expected]
    assert [json.loads(row["top"]) for row in cells] == [row["top"] for row in expected]
    table = pq.read_table(tmp_path / "a.parquet").to_pylist()  # type: ignore[no-untyped-call]
    assert table == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.csv", "a.csv.manifest.json", "a.parquet", "a.parquet.manifest.json",
    ]  # fmt: skip


def test_a_table_is_continued_from_its_partial_file(
    student: Path, whole: bytes, tmp_path: Path
) -> None:
    (tmp_path / ".a.csv.partial.jsonl").write_bytes(whole[:-7])
    assert predict(student, tmp_path / "a.csv") == 50
    with (tmp_path / "a.csv").open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 50


def test_shards_share_the_rows_and_ray_joins_them_in_order(
    student: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = []
    for shard in Shard.all(3):
        predict(student, tmp_path / f"{shard}.jsonl", shard=shard)
        lines = (tmp_path / f"{shard}.jsonl").read_text(encoding="utf-8").splitlines()
        ids += [json.loads(line)["id"] for line in lines]
    assert sorted(ids) == sorted(row_id for row_id, _ in ROWS)

    def in_this_process(work: Any, section: Any, **_: Any) -> list[Any]:
        return [ShardResult(shard, work(shard)) for shard in Shard.all(section.shards)]

    monkeypatch.setattr(prediction, "run_on_ray", in_this_process)
    out = tmp_path / "joined.jsonl"
    number = predict_on_ray(
        student, rows, out, OPTIONS, source="rows.jsonl", shards=3, progress=NoProgress()
    )
    assert number == 50
    joined = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    expected = [json.loads(line) for line in whole.splitlines()]
    assert [(row["id"], row["label"]) for row in joined] == [
        (row["id"], row["label"]) for row in expected
    ]
    assert not (tmp_path / "joined.jsonl.shards").exists()
    before = out.stat().st_mtime_ns
    arguments: dict[str, Any] = {"source": "rows.jsonl", "shards": 3, "progress": NoProgress()}
    assert predict_on_ray(student, rows, out, OPTIONS, **arguments) == 50
    assert out.stat().st_mtime_ns == before, "it is complete already"
    with pytest.raises(UserError, match="other rows than the input's"):
        predict_on_ray(student, lambda: ROWS[::-1], out, OPTIONS, **arguments)


def test_other_predictions_are_never_mixed(student: Path, whole: bytes, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    predict(student, out)
    with pytest.raises(UserError, match="another options"):
        predict(student, out, Options(batch_size=2, top=1))
    with pytest.raises(UserError, match="another shard"):
        predict(student, out, shard=Shard(1, 2))

    def others() -> Iterator[prediction.Row]:
        yield from ROWS[::-1]

    with pytest.raises(UserError, match="is not row 50 of the input"):
        predict_file(student, others, out, OPTIONS, source="rows.jsonl")
    table = tmp_path / "c.csv"
    table.write_text("id,label\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"is not from `dsbs predict`"):
        predict(student, table)
    with pytest.raises(UserError, match="not a file of predictions"):
        predict(student, tmp_path / "d.txt")
    assert out.read_bytes() == whole


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_a_file_of_other_texts_with_the_same_ids_is_refused(
    student: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"a.{suffix}"
    predict(student, out)
    before = out.read_bytes()
    edited = [(row_id, fields | {"text": "Where is it?"}) for row_id, fields in ROWS[:1]]
    more = [("r999", {"text": "One more."})]
    for other in ([*edited, *ROWS[1:]], ROWS[:-1], *([] if suffix == "jsonl" else [ROWS + more])):
        with pytest.raises(UserError, match=r"other rows than the input's|is not row 50"):
            predict_file(student, lambda rows=other: rows, out, OPTIONS, source="rows.jsonl")
    assert out.read_bytes() == before
    assert predict(student, out) == 50
    assert out.read_bytes() == before


def test_a_table_that_was_written_before_the_kill_is_completed(
    student: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.csv"

    def killed(path: Path, *arguments: Any, **options: Any) -> None:
        path.write_text("id,label\n", encoding="utf-8")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prediction, "write_table", killed)
        with pytest.raises(KeyboardInterrupt):
            predict(student, out)
    assert predict(student, out) == 50
    with out.open(encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == 50
    assert not (tmp_path / ".a.csv.partial.jsonl").exists()


def test_rows_are_read_as_they_are_needed(student: Path, tmp_path: Path) -> None:
    read = 0
    most_ahead = 0
    out = tmp_path / "a.jsonl"

    def counted() -> Iterator[prediction.Row]:
        nonlocal read, most_ahead
        for number in range(400):
            read += 1
            written = out.read_bytes().count(b"\n") if out.exists() else 0
            most_ahead = max(most_ahead, read - written)
            yield f"r{number}", {"text": ROWS[number % 50][1]["text"]}

    predict_file(student, counted, out, OPTIONS, source="many")
    assert most_ahead <= 16, "one chunk"


def test_a_student_that_writes_its_label_scores_the_others(tmp_path: Path) -> None:
    from exporting.tiny_t5 import make_student

    student = make_student(tmp_path)
    predict(student, tmp_path / "a.jsonl", Options(top=1))
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    answers = Student.load(student).predict([row["text"] for _, row in ROWS], score_labels=True)
    for row, answer in zip(rows, answers, strict=True):
        assert answer.distribution is not None
        likeliest = max(answer.distribution, key=answer.distribution.__getitem__)
        assert [entry["label"] for entry in row["top"]] == [likeliest]
    with pytest.raises(UserError, match="has no probability for every label"):
        both = make_student(tmp_path / "both", prefixes={"label-then-rationale": ""})
        predict(both, tmp_path / "b.jsonl", Options(top=1))


@pytest.mark.parametrize(
    ("content", "last"),
    [
        (b"", None),
        (b'{"id": 1', None),
        (b'{"id": 1}\n', 1),
        (b'{"id": 1}\n{"id": 2', 1),
        (b'{"id": 1}\n{"id": 2}', 1),
        (b'{"id": 1}\n\0\0\0\n', 1),
        (b'{"id": 1}\n' + b"x" * 200_000, 1),
    ],
)
def test_a_torn_line_is_cut_off(tmp_path: Path, content: bytes, last: int | None) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(content)
    row = cut_torn_line(path)
    assert (row or {}).get("id") == last
    assert path.read_bytes() == (b"" if last is None else b'{"id": 1}\n')
    assert cut_torn_line(tmp_path / "none.jsonl") is None


@pytest.mark.parametrize("content", ['{"id": "x"}\n{"id": "y"}', '[\n{"id": "x"}\n]\n', "id\nx\n"])
def test_a_file_of_the_users_own_is_refused_as_it_is(
    student: Path, tmp_path: Path, content: str
) -> None:
    for name in ("mine.jsonl", "mine.csv"):
        mine = tmp_path / name
        mine.write_text(content, encoding="utf-8")
        with pytest.raises(UserError, match=r"is not from `dsbs predict`"):
            predict(student, mine)
        assert mine.read_text(encoding="utf-8") == content


def test_predictions_of_earlier_weights_or_another_calibration_are_not_taken(
    student: Path, tmp_path: Path
) -> None:
    own = tmp_path / "student"
    shutil.copytree(student, own)
    for name in ("a.csv", "a.jsonl"):
        predict(own, tmp_path / name)
    (own / "calibration.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="another student"):
        predict(own, tmp_path / "a.csv")
    (own / "calibration.json").unlink()
    trained_again = Student.load(own)
    with torch.no_grad():
        trained_again.backend.model.classifier.bias += 1
    trained_again.save(own)
    for name in ("a.csv", "a.jsonl"):
        with pytest.raises(UserError, match="another student"):
            predict(own, tmp_path / name)
