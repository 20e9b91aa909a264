"""Files: atomic writes, lines that end in \\n alone, folders locked by one process."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, write_jsonl

from dsbs import files
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.files import (
    atomic_write,
    canonical_json,
    digest,
    find_file,
    lock_folder,
    read_jsonl,
    write_json,
)

# --- atomic writes


def test_a_body_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")

    def rows():
        yield "new"
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        files.write_jsonl(path, rows())
    assert path.read_text() == "old\n"
    assert os.listdir(tmp_path) == ["rows.jsonl"]  # noqa: PTH208 - names, hidden ones too


def test_a_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "result.json"
    with atomic_write(path) as file:
        file.write("{}")
        assert not path.exists()
    assert path.read_text() == "{}"


def test_rows_are_counted_and_end_in_one_line_feed_each(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert files.write_jsonl(path, ['{"a": 1}', '{"a": "é"}']) == 2
    assert path.read_bytes() == '{"a": 1}\n{"a": "é"}\n'.encode()


def test_a_full_disk_is_partial_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")

    def rows():
        yield "new"
        raise OSError(28, "No space left on device")

    with pytest.raises(PartialError, match="No space left") as caught:
        files.write_jsonl(path, rows())
    assert caught.value.exit_code == 3
    assert path.read_text() == "old\n"


def test_a_folder_that_is_a_file_is_told_not_thrown(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(DsbsError, match="runs"):
        write_json(tmp_path / "runs" / "results.json", {})
    with pytest.raises(DsbsError, match="runs"), lock_folder(tmp_path / "runs"):
        pass


# --- reading


def test_rows_come_with_their_line_numbers_and_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"a": 2}')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    "line",
    [
        '{"a": ',
        "{'a': 1}",
        "[1]",
        '"text"',
        "3",
        "null",
        '{"a": 1} {"a": 2}',
        "[" * 100_000,
        '{"a": ' + "1" * 5000 + "}",
    ],
    ids=["cut", "python", "list", "text", "number", "null", "two", "too deep", "too many digits"],
)
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{{"a": 2}}\n{line}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:3: "):
        list(read_jsonl(path))


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\u000b", "\u000c", "\x1c"])
def test_other_separators_do_not_end_a_line(tmp_path: Path, separator: str) -> None:
    path = tmp_path / "rows.jsonl"
    text = f"one{separator}two"
    raw = (
        text if ord(separator) >= 0x80 else json.dumps(text)[1:-1]
    )  # JSON wants control characters escaped
    path.write_text(f'{{"a": "{raw}"}}\n{{"a": "x"}}\n', encoding="utf-8", newline="\n")
    assert list(read_jsonl(path)) == [(1, {"a": text}), (2, {"a": "x"})]


def test_what_is_written_reads_back_with_every_separator(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\r\nc\rd\x85e"}, {"text": "f"}]
    files.write_jsonl(
        tmp_path / "rows.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows)
    )
    assert [row for _, row in read_jsonl(tmp_path / "rows.jsonl")] == rows


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert list(read_jsonl(path)) == [(1, {"a": 1}), (2, {"a": 2})]


def test_gzipped_lines_are_read_alike(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "rows.jsonl", [{"a": "é\u2028"}, {"a": 2}])
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert list(read_jsonl(packed)) == list(read_jsonl(plain))


def damaged(kind: str) -> bytes:
    whole = gzip.compress("".join(f'{{"a": "{i * i}"}}\n' for i in range(2000)).encode())
    middle = len(whole) // 2
    return {
        "no gzip": b'{"a": 1}\n',
        "cut": whole[:middle],
        "bytes changed": whole[:middle]
        + bytes(b ^ 0xFF for b in whole[middle : middle + 64])
        + whole[middle + 64 :],
        "checksum": whole[:-8] + bytes(8),
    }[kind]


@pytest.mark.parametrize("kind", ["no gzip", "cut", "bytes changed", "checksum"])
def test_a_damaged_gzip_file_is_told_not_thrown(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damaged(kind))
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz"):
        list(read_jsonl(path))


def test_text_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "caf\xe9"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_jsonl(path))


# --- hashes


def test_parts_of_a_digest_do_not_run_together() -> None:
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("a") != digest("a", "")
    assert digest("half an emoji \ud83d")  # from a JSON escape: hashed, not thrown


def test_equal_values_have_one_canonical_text() -> None:
    assert (
        canonical_json({"b": [1, "é"], "a": None})
        == canonical_json({"a": None, "b": [1, "é"]})
        == '{"a":null,"b":[1,"é"]}'
    )


# --- holding a folder


def test_a_second_holder_is_refused_and_told_who_holds(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "run"):
        with (
            pytest.raises(
                DsbsError, match=rf"run is in use by process {os.getpid()} on "
            ) as caught,
            lock_folder(tmp_path / "run"),
        ):
            pass
        assert "run the same command" in caught.value.hint
    with lock_folder(tmp_path / "run"):
        pass  # free again


def test_another_process_that_holds_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    code = "import sys, pathlib; from dsbs.files import lock_folder\n"
    code += (
        "with lock_folder(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(DsbsError, match=f"process {other.pid} "), lock_folder(tmp_path):
            pass
    finally:
        other.kill()
        other.communicate()
    with lock_folder(tmp_path):
        pass


def test_a_folder_without_permission_to_write_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with pytest.raises(UserError, match="cannot write to the directory"), lock_folder(tmp_path):
        pass
    (tmp_path / ".lock").touch()
    assert not files.is_locked(tmp_path)
    (tmp_path / ".lock-holder").write_text("process 7 on another machine")
    assert files.is_locked(tmp_path)


def test_different_folders_are_held_side_by_side(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "a"), lock_folder(tmp_path / "b"):
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


# --- finding files


def test_a_file_is_looked_for_here_then_beside_then_among_what_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    recipes = tmp_path / "beside"
    for folder in (here, recipes):
        (folder / "prompts").mkdir(parents=True)
        (folder / "prompts" / "svamp.yaml").write_text(folder.name)
    monkeypatch.chdir(here)

    def found() -> str:
        return find_file("prompts/svamp.yaml", what="prompt", hint="-", folder=recipes).read_text()[
            :6
        ]

    assert found() == "here"
    (here / "prompts" / "svamp.yaml").unlink()
    assert found() == "beside"
    (recipes / "prompts" / "svamp.yaml").unlink()
    shipped = find_file("prompts/svamp.yaml", what="prompt", hint="-", folder=recipes)
    assert shipped.resolve() == ROOT / "prompts" / "svamp.yaml"


def test_only_what_ships_is_found_in_the_projects_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_file("data/support/train.csv", what="data file", hint="-").is_file()
    with pytest.raises(
        UserError, match=r"data file data/support/absent\.csv does not exist \(working directory: "
    ):
        find_file("data/support/absent.csv", what="data file", hint="-")


def test_an_absolute_path_is_taken_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.csv").write_text("")
    with pytest.raises(UserError, match="does not exist"):
        find_file(tmp_path / "x.csv", what="data file", hint="-", folder=tmp_path / "sub")


def test_a_folder_is_said_to_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory") as caught:
        find_file(tmp_path, what="recipe", hint="give a file")
    assert caught.value.hint == "give a file"
