"""Windows and macOS, as far as Linux can show: what only POSIX has is hidden, and files and GPUs
behave as they do there.
"""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, toy_rows

from dsbs import files
from dsbs.config.load import load_recipe
from dsbs.errors import PartialError, UserError
from dsbs.students import weights

# Runs before anything of dsbs is imported. Other packages ask for the platform and find Linux, so
# they keep some modules of it.
WITHOUT_POSIX = """
import asyncio, builtins, os, signal, sys
import multiprocessing.util, subprocess

for name in ("fcntl", "grp", "pwd"):
    sys.modules[name] = None
from transformers import Seq2SeqTrainer  # torch and accelerate with it

import_module = builtins.__import__

def without_posix(name, globals=None, *arguments, **kwargs):
    importer = (globals or {}).get("__name__", "")
    if importer.startswith("dsbs") and name in ("resource", "termios", "tty", "pty", "posix"):
        raise ModuleNotFoundError(name)
    return import_module(name, globals, *arguments, **kwargs)

builtins.__import__ = without_posix
for name in (
    "posix_fallocate", "posix_fadvise", "statvfs", "fstatvfs", "sched_getaffinity", "getuid",
    "geteuid", "getgid", "getegid", "getloadavg", "killpg", "getpgid", "setsid", "mkfifo",
    "chown", "fchown", "lchown", "O_DIRECTORY", "O_CLOEXEC", "nice", "getpriority", "sync",
):
    if hasattr(os, name):
        delattr(os, name)
for name in ("SIGKILL", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "alarm",
             "setitimer", "pthread_kill", "sigwait"):
    delattr(signal, name)

def not_implemented(*arguments):
    raise NotImplementedError

asyncio.SelectorEventLoop.add_signal_handler = not_implemented
"""


def recorded_recipe(folder: Path, toy: Callable[..., Path]) -> Path:
    completions = [
        {"id": row["id"], "completion": f"It says so.\nAnswer: {row['team']}"}
        for row in toy_rows(40)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in completions)
    (folder / "completions.jsonl").write_text(lines, encoding="utf-8")
    source = str(folder / "completions.jsonl")
    return toy(teacher={"kind": "recorded", "completions": source})


def test_every_module_is_imported_and_annotates_where_posix_is_missing(
    tmp_path: Path, toy: Callable[..., Path]
) -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sorted((ROOT / "dsbs").rglob("*.py"))
        if path.name != "__main__.py"
    ]
    recipe = recorded_recipe(tmp_path, toy)
    script = f"""{WITHOUT_POSIX}
import importlib
for module in {modules!r}:
    importlib.import_module(module.removesuffix(".__init__"))
from dsbs.cli import app
app(["annotate", {str(recipe)!r}, "--out", {str(tmp_path / "run")!r}, "--json",
     "annotate.splits=[train]"])
"""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    splits = json.loads(ended.stdout)["splits"]
    assert splits["train"]["accepted"] == splits["train"]["rows"] > 0
    assert not (tmp_path / "run" / "annotate" / ".lock").exists(), "a lock by existence alone"


def test_modules_that_only_posix_has_are_never_imported_at_the_top() -> None:
    posix = {"fcntl", "grp", "pwd", "resource", "termios", "tty", "pty", "syslog", "posix"}
    for path in sorted((ROOT / "dsbs").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = {alias.name for alias in getattr(node, "names", ())}
            assert not names & posix and getattr(node, "module", None) not in posix, path


# --- files


def test_text_is_utf_8_whatever_the_system_s_encoding_is() -> None:
    for path in sorted((ROOT / "dsbs").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            keywords = {keyword.arg for keyword in node.keywords}
            is_text = node.func.attr in ("read_text", "write_text")
            if node.func.attr == "open" and len(node.args) < 2:
                mode = node.args[0] if node.args else ast.Constant("r")
                is_text = isinstance(mode, ast.Constant) and "b" not in str(mode.value)
            assert not is_text or keywords & {"encoding", None}, f"{path}:{node.lineno}"


def test_a_file_that_another_program_has_open_is_replaced_when_that_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []
    replace = Path.replace

    def busy(path: Path, target: Path) -> Path:
        attempts.append(target)
        if len(attempts) < 3:
            raise PermissionError(13, "Access is denied")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    files.write_json(tmp_path / "results.json", {"a": 1})
    assert len(attempts) == 3
    assert json.loads((tmp_path / "results.json").read_text()) == {"a": 1}


def test_a_file_that_stays_open_elsewhere_is_named_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(path: Path, target: Path) -> Path:
        raise PermissionError(13, "Access is denied")

    (tmp_path / "results.json").write_text("old")
    monkeypatch.setattr(Path, "replace", busy)
    monkeypatch.setattr(files, "_IS_WINDOWS", True)
    monkeypatch.setattr(files, "_MOVE_WAIT_S", 0.0)
    with pytest.raises(UserError, match=r"results\.json cannot be replaced: another program"):
        files.write_json(tmp_path / "results.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "old"


def test_a_moved_folder_replaces_an_empty_one_and_no_other(tmp_path: Path) -> None:
    for name in ("source", "empty", "full"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError):
        files.move(tmp_path / "source", tmp_path / "full")
    files.move(tmp_path / "source", tmp_path / "empty")
    assert (tmp_path / "empty" / "file").read_text() == "source"
    assert (tmp_path / "full" / "file").read_text() == "full"


@pytest.mark.parametrize("allocates", [True, False, "not here"])
def test_disk_space_is_allocated_with_and_without_the_call_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allocates: bool | str
) -> None:
    def unsupported(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    if not allocates:
        monkeypatch.delattr(os, "posix_fallocate")
    if allocates == "not here":
        monkeypatch.setattr(os, "posix_fallocate", unsupported)
    files.allocate(tmp_path / "reserve", 3_000_000)
    assert (tmp_path / "reserve").stat().st_size == 3_000_000


@pytest.mark.parametrize("name", ["con", "NUL", "com1", "aux.v2", "tickets.", "a:b", "a b", "a/b"])
def test_a_name_that_windows_refuses_is_no_name_of_a_run(
    toy: Callable[..., Path], name: str
) -> None:
    with pytest.raises(UserError, match="name"):
        load_recipe(toy(), [f"name={json.dumps(name)}"])


@pytest.mark.parametrize("name", ["console", "com", "v1.5", "nul-2"])
def test_other_names_are_taken(toy: Callable[..., Path], name: str) -> None:
    assert load_recipe(toy(), [f"name={json.dumps(name)}"]).name == name


def test_a_full_disk_is_known_by_the_words_of_windows() -> None:
    with (
        pytest.raises(PartialError),
        files.full_disk_as_partial(Path("run"), "free some space"),
    ):
        raise RuntimeError("There is not enough space on the disk. (os error 112)")


# --- Apple GPUs


@pytest.fixture
def apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 3_000_000)


def test_an_apple_gpu_is_used_in_float32(apple_gpu: None, tmp_path: Path) -> None:
    assert weights.device() == "mps"
    assert not weights.supports_bf16()
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: Apple M9\n")
    assert weights.device_name(cpuinfo) == "Apple M9 GPU"


def test_students_are_loaded_to_the_apple_gpu(
    apple_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsbs.students.backends import transformers

    class Model:
        device = "cpu"

        def to(self, name: str) -> Model:
            self.device = name
            return self

    class Card:
        max_input_tokens = 8

    monkeypatch.setattr(transformers, "load_model", lambda path: Model())
    monkeypatch.setattr(transformers, "load_tokenizer", lambda path: None)
    card: Any = Card()
    assert transformers.TransformersBackend.load(Path("student"), card).model.device == "mps"


def test_training_measures_the_apple_gpu_and_knows_when_its_memory_is_full(
    apple_gpu: None,
) -> None:
    from dsbs.training.callbacks import peak_memory
    from dsbs.training.distributed import is_out_of_memory

    assert peak_memory() == (3.0, "gpu")
    message = "MPS backend out of memory (MPS allocated: 9.05 GB, max allowed: 9.07 GB)"
    assert is_out_of_memory(RuntimeError(message))


def test_the_device_is_chosen_in_one_place() -> None:
    for path in sorted((ROOT / "dsbs").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        chooses = "is_bf16_supported" in text or ".is_available()" in text
        assert not chooses or path.name in ("weights.py", "machine.py"), path


# --- signals


def test_ctrl_c_reaches_a_loop_without_signal_handlers(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    from dsbs.annotation.requester import Requester
    from dsbs.progress import NoProgress

    class StopSignal:
        is_set = False

        def stop(self) -> None:
            self.is_set = True

    requester = object.__new__(Requester)
    requester.progress = NoProgress()
    stop: Any = StopSignal()
    requester.stop_signal = stop

    async def interrupted() -> bool:
        before = signal.getsignal(signal.SIGINT)
        with requester._interruptible():
            signal.raise_signal(signal.SIGINT)
            await asyncio.sleep(0)
        assert signal.getsignal(signal.SIGINT) is before
        return bool(stop.is_set)

    monkeypatch.delattr(asyncio.SelectorEventLoop, "add_signal_handler", raising=False)
    assert asyncio.run(interrupted())
