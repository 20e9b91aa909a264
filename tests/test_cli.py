"""The command line: mistakes give one message and the right exit code, and lose nothing."""

from __future__ import annotations

import errno
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, run_dsbs, toy_rows, write_csv, write_jsonl
from loopback import LoopbackServer

from dsbs import UserError, cli
from dsbs.cli import replace_unencodable
from dsbs.cli.common import print_json, read_rows
from dsbs.config import TaskSection
from dsbs.tasks import make_task


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but lock and manifest, which each command rewrites."""
    files = (
        p
        for p in folder.rglob("*")
        if p.is_file() and p.name not in (".lock", "manifest.json", "replies.sqlite-shm")
    )
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def jsonl(tmp_path: Path, *lines: str) -> str:
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return f"task.data.train={tmp_path / 'bad.jsonl'}"


GOOD = json.dumps({"text": "My parcel is late.", "team": "shipping"})
WRONG: dict[str, tuple[Callable[[Path], list[str]], int, str]] = {
    "unknown key": (lambda p: ["train.metods=finetune"], 2, "did you mean 'methods'"),
    "wrong type": (lambda p: ["train.max_steps=many"], 2, "train.max_steps"),
    "missing file": (lambda p: ["task.data.train=nowhere.csv"], 2, "nowhere.csv does not exist"),
    "empty file": (lambda p: [jsonl(p)], 2, "is empty"),
    "broken JSON on line 7": (
        lambda p: [jsonl(p, *[GOOD] * 6, '{"text": "x",')],
        2,
        "bad.jsonl:7: not valid JSON",
    ),
    "duplicate ids": (
        lambda p: [jsonl(p, *['{"id": "a", "text": "x", "team": "billing"}'] * 2)],
        2,
        "id 'a' occurs twice",
    ),
    "label outside the set": (
        lambda p: [jsonl(p, '{"text": "x", "team": "sales"}')],
        2,
        "'sales' is not one of billing",
    ),
    "text in place of a path": (
        lambda p: [f"annotate.prompt={'Which team is it? ' * 20}"],
        2,
        "does not exist",
    ),
    "missing column": (lambda p: ["task.columns={label: squad}"], 2, "no column 'squad'"),
    "no key": (lambda p: ["teacher.api_key_env=NO_SUCH_KEY"], 2, "NO_SUCH_KEY is not set"),
    "401": (lambda p: [], 2, "HTTP 401"),
    "unreachable host": (
        lambda p: ["teacher.base_url=http://127.0.0.1:9/v1", "teacher.max_attempts=1"],
        1,
        "does not answer",
    ),
    "unknown method": (lambda p: ["train.methods=[stepbystep]"], 2, "did you mean 'step-by-step'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_one_message_and_nothing_is_lost(
    case: str, toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(train=6, test=4)
    make, code, message = WRONG[case]
    with LoopbackServer(good_answer) as server:
        assert (
            run_dsbs(
                "annotate",
                str(path),
                f"teacher.base_url={server.url}",
                "--out",
                "run",
                cwd=tmp_path,
            ).returncode
            == 0
        )
    before = snapshot(tmp_path / "run")
    with LoopbackServer(
        lambda body, number: (401, {}, b'{"error": {"message": "wrong key"}}')
    ) as server:
        overrides = [f"teacher.base_url={server.url}", "teacher.model=another", *make(tmp_path)]
        result = run_dsbs("annotate", str(path), *overrides, "--out", "run", cwd=tmp_path)
    assert result.returncode == code, result.stderr
    assert message in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.count("dsbs: ") == 1 and "  try: " in result.stderr
    assert result.stdout == ""
    assert snapshot(tmp_path / "run") == before


def test_help_and_validate_import_no_torch(toy: Callable[..., Path], tmp_path: Path) -> None:
    for arguments in (["--help"], ["validate", str(toy())]):
        code = (
            "import sys; sys.argv = ['dsbs', *sys.argv[1:]]\nfrom dsbs.cli import main\n"
            "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
            "assert 'torch' not in sys.modules"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr


def test_json_is_the_only_thing_on_stdout_and_partial_work_exits_3(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def flaky(body: dict[str, object], number: int) -> object:
        return (503, {}, b"{}") if number == 3 else good_answer(body, number)  # type: ignore[arg-type]

    path = toy(train=6, test=4, teacher={"max_attempts": 1}, annotate={"concurrency": 1})
    with LoopbackServer(flaky) as server:  # type: ignore[arg-type]
        first = run_dsbs(
            "annotate",
            str(path),
            f"teacher.base_url={server.url}",
            "--json",
            "--out",
            "run",
            cwd=tmp_path,
        )
        second = run_dsbs(
            "annotate",
            str(path),
            f"teacher.base_url={server.url}",
            "--json",
            "--out",
            "run",
            cwd=tmp_path,
        )
    assert first.returncode == 3 and "1 row got no reply" in first.stderr
    assert json.loads(first.stdout)["splits"]["train"]["rejected"] == {"no-reply": 1}
    assert second.returncode == 0 and json.loads(second.stdout)["splits"]["train"]["rejected"] == {}


def test_a_dry_run_shows_the_prompt_and_sends_nothing(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        done = run_dsbs(
            "annotate", str(toy()), f"teacher.base_url={server.url}", "--dry-run", cwd=tmp_path
        )
        assert server.requests == 0
    assert (
        done.returncode == 0
        and "52 requests to send" in done.stdout
        and "invoice number 0" in done.stdout
    )
    assert not (tmp_path / "runs").exists()


def test_a_reader_that_leaves_early_is_no_crash(toy: Callable[..., Path], tmp_path: Path) -> None:
    write_csv(tmp_path / "more.csv", toy_rows(30))
    done = subprocess.run(
        f"{sys.executable} -m dsbs validate {toy()} | head -c 5",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_predicting_without_a_student_says_what_to_give(tmp_path: Path) -> None:
    done = run_dsbs("predict", "nowhere", cwd=tmp_path, input="x\n")
    assert done.returncode == 2 and "does not contain a student" in done.stderr


# --- rows to predict, and output that is not UTF-8


def rows_to_predict(file: str, name: str = "classification") -> list[tuple[str, Any]]:
    section: dict[str, Any] = {"name": name, "data": {"train": "x"}}
    if name == "classification":
        section |= {"labels": ["billing", "shipping"], "columns": {"text": "message", "id": "key"}}
    return list(read_rows(file, make_task(TaskSection.model_validate(section))))


@pytest.mark.parametrize("kind", ["CSV", "tsv", "jsonl", "parquet"])
def test_a_file_of_rows_is_predicted_as_data_are_read(tmp_path: Path, kind: str) -> None:
    rows = [{"key": "007", "message": "My parcel"}, {"key": "8", "message": "A bill"}]
    path = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        write_jsonl(path, rows)
    elif kind == "parquet":
        pytest.importorskip("pandas").DataFrame(rows).to_parquet(path)
    else:
        write_csv(path, rows)
        if kind == "tsv":
            path.write_text(path.read_text().replace(",", "\t"))
    expected = [("007", {"text": "My parcel"}), ("8", {"text": "A bill"})]
    assert rows_to_predict(str(path)) == expected


def test_lines_of_text_and_of_json_are_rows_with_their_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 'My parcel\n\n  {"message": "A bill"}\n{"key": 7, "message": "é"}\n'
    (tmp_path / "in.txt").write_bytes(lines.encode())
    expected = [("1", "My parcel"), ("3", {"text": "A bill"}), ("7", {"text": "é"})]
    assert rows_to_predict(str(tmp_path / "in.txt")) == expected
    stdin = io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="latin-1")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert rows_to_predict("-") == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é".encode("latin-1"))))
    with pytest.raises(UserError, match="stdin is not UTF-8"):
        rows_to_predict("-")


@pytest.mark.parametrize(
    ("name", "task", "text", "told"),
    [
        ("in.csv", "classification", "message\nhello\n nan\nnan\n", r"in\.csv:3: message is 'nan'"),
        ("in.txt", "classification", 'hello\n{"message": ""}\n', r"in\.txt:2: message is empty"),
        ("in.txt", "classification", 'hello\n{"message"\n', r"in\.txt:2: not valid JSON"),
        ("in.txt", "cqa", "hello\n", r"in\.txt:1: plain text, but cqa needs the fields of a row"),
    ],
)
def test_a_row_that_cannot_be_predicted_is_named(
    tmp_path: Path, name: str, task: str, text: str, told: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=told):
        rows_to_predict(str(tmp_path / name), task)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_json_is_whole_and_text_readable_in_every_encoding(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {"text": "é – 日本 \ud83d"}
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding=encoding))
    replace_unencodable()
    print("é – 日本 \ud83d")
    if encoding != "utf-8":
        print_json(value)
    sys.stdout.flush()
    first, *rest = output.getvalue().decode(encoding).splitlines()
    assert first == {"ascii": "? ? ?? ?", "latin-1": "é ? ?? ?", "cp1252": "é – ?? ?"}.get(
        encoding, "é – 日本 ?"
    )
    assert [json.loads(line) for line in rest] == [value] * (encoding != "utf-8")


def test_an_error_about_a_path_is_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused() -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "rows.csv")

    monkeypatch.setattr(cli, "app", refused)
    assert cli._exit_code() == 2
    shown = capsys.readouterr().err
    assert "rows.csv: Permission denied" in shown and "check the path" in shown


@pytest.mark.parametrize("flags", [["--batch"], ["--pilot", "2"], ["--dry-run"]])
def test_what_retries_refused_requests_is_not_combined(
    toy: Callable[..., Path], tmp_path: Path, flags: list[str]
) -> None:
    done = run_dsbs("annotate", str(toy()), "--retry-refused", *flags, cwd=tmp_path)
    assert done.returncode == 2 and f"--retry-refused and {flags[0]} exclude" in done.stderr
