"""dsbs doctor: every problem has a hint; no paid request, no key in the output, no traceback."""

from __future__ import annotations

import json
import threading
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_dsbs

from dsbs.project import machine
from dsbs.project.doctor import examine
from dsbs.project.machine import Check, run_check
from dsbs.students import weights

KEY = "sk-a-very-secret-key"


@contextmanager
def endpoint(status: int, body: Any) -> Iterator[tuple[str, list[str]]]:
    """A server that answers any GET with one reply: its base_url, and the requests that it got."""
    got: list[str] = []
    payload = body if isinstance(body, bytes) else json.dumps(body).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            got.append(f"{self.command} {self.path} {self.headers.get('Authorization')}")
            self.send_response(status)
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            self.wfile.write(payload)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", got
    finally:
        server.shutdown()
        server.server_close()


def models(*names: str) -> dict[str, Any]:
    return {"object": "list", "data": [{"id": name, "object": "model"} for name in names]}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips the probe of torch, which other tests cover."""
    monkeypatch.setattr(machine, "accelerators", lambda needs_bf16: iter(()))


def about(checks: list[Check], name: str) -> Check:
    (check,) = [check for check in checks if check.name == name]
    return check


def test_a_sound_machine_and_recipe_have_no_problem(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(teacher={"api_key_env": "THE_KEY"})
    with endpoint(200, models("other", "loopback")) as (url, got):
        done = run_dsbs(
            "doctor",
            str(path),
            f"teacher.base_url={url}",
            "--json",
            cwd=tmp_path,
            env={"THE_KEY": KEY},
        )
    assert done.returncode == 0, done.stdout
    report = json.loads(done.stdout)
    assert report["problems"] == 0
    messages = {check["name"]: check["said"] for check in report["checks"]}
    assert {
        "python",
        "versions",
        "cores",
        "memory",
        "disk",
        "task.data.train",
        "prompt",
        "student",
    } <= set(messages)
    assert messages["key"] == "THE_KEY is set" and messages["teacher.model"] == "loopback is listed"
    assert got == [f"GET /v1/models Bearer {KEY}"], "one free question"
    assert KEY not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


def test_problems_exit_1_with_a_line_and_a_way_out_each(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(teacher={"api_key_env": "NO_SUCH_KEY"})
    done = run_dsbs("doctor", str(path), "task.data.test=nowhere.csv", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("problem")]
    assert len(lines) == 2 and any("nowhere.csv does not exist" in line for line in lines)
    assert (
        any("NO_SUCH_KEY is not set" in line for line in lines)
        and "try: export NO_SUCH_KEY=<key>" in done.stdout
    )
    assert "dsbs: 2 problems: task.data.test, http://127.0.0.1:9/v1" in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "expected", "message"),
    [
        (
            401,
            {"error": {"message": f"Incorrect API key provided: {KEY}"}},
            "problem",
            "does not accept the key",
        ),
        (403, {}, "problem", "refuses access"),
        (301, b"", "problem", "redirects to"),
        (200, b"<html>Welcome</html>", "problem", "is not a list of models"),
        (200, {"data": [{"name": "x"}]}, "problem", "is not a list of models"),
        (404, b"not found", "warning", "has no list at"),
        (503, b"later", "warning", "HTTP 503"),
        (429, {"error": {"message": "slow down"}}, "warning", "HTTP 429"),
        (418, b"", "warning", "lists no models"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_an_endpoint_that_answers_otherwise_is_told_for_what_it_is(
    status: int,
    body: Any,
    expected: str,
    message: str,
    toy: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("THE_KEY", KEY)
    with endpoint(status, body) as (url, _):
        checks = examine(str(toy(teacher={"api_key_env": "THE_KEY"})), [f"teacher.base_url={url}"])
    check = about(checks, url)
    assert check.status == expected and message in check.message and check.hint
    assert not [check for check in checks if KEY in f"{check.message} {check.hint}"]
    assert not [check for check in checks if check.name == "teacher.model"], (
        "what is not known is not said"
    )


@pytest.mark.usefixtures("quick")
def test_an_endpoint_that_is_not_there_is_a_problem(toy: Callable[..., Path]) -> None:
    check = about(examine(str(toy())), "http://127.0.0.1:9/v1")
    assert (
        check.status == "problem"
        and "cannot reach" in check.message
        and "start the server" in str(check.hint)
    )


@pytest.mark.parametrize(
    ("model", "listed", "status"),
    [
        ("llama3.2", ["llama3.2:latest"], "ok"),
        ("gemini-2.0-flash", ["models/gemini-2.0-flash"], "ok"),
        ("gpt-4.1-mini", ["gpt-4.1", "gpt-4.1-nano"], "warning"),
        ("mini", ["gpt-4.1-mini"], "warning"),
        ("a", [], "warning"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_the_model_is_looked_for_among_those_listed(
    model: str, listed: list[str], status: str, toy: Callable[..., Path]
) -> None:
    with endpoint(200, models(*listed)) as (url, _):
        checks = examine(str(toy()), [f"teacher.base_url={url}", f"teacher.model={model}"])
    check = about(checks, "teacher.model")
    assert check.status == status
    assert status == "ok" or not listed or listed[0] in str(check.hint)


@pytest.mark.parametrize(
    ("entry", "end"),
    [
        # https://developers.openai.com/api/docs/deprecations
        ({"shutdown_date": "2027-01-14"}, "2027-01-14"),
        ({"shutdown_date": None}, None),
        # https://docs.mistral.ai/api/, models: deprecation and its replacement
        ({"deprecation": "2027-02-28T12:00:00Z", "deprecation_replacement_model": "next"}, "next"),
        # https://openrouter.ai/docs/api/api-reference/models/get-models
        ({"expiration_date": "2026-12-31"}, "2026-12-31"),
        # https://learn.microsoft.com/rest/api/azureopenai/models/list
        ({"deprecation": {"fine_tune": 1, "inference": 1798761600}}, "2027-01-01"),
        ({"deprecated": False, "created": 1798761600}, None),
    ],
)
@pytest.mark.usefixtures("quick")
def test_a_model_that_ends_is_a_warning(
    entry: dict[str, Any], end: str | None, toy: Callable[..., Path]
) -> None:
    with endpoint(200, {"data": [{"id": "m", "object": "model", **entry}]}) as (url, _):
        checks = examine(str(toy()), [f"teacher.base_url={url}", "teacher.model=m"])
    check = about(checks, "teacher.model")
    assert check.status == ("ok" if end is None else "warning")
    assert end is None or end in f"{check.message} {check.hint}"


@pytest.mark.usefixtures("quick")
def test_of_several_endpoints_each_is_asked(toy: Callable[..., Path]) -> None:
    path = toy()
    recipe = json.loads(path.read_text(encoding="utf-8"))
    del recipe["teacher"]["base_url"]
    with endpoint(200, models("loopback")) as (first, _), endpoint(404, b"") as (second, _):
        recipe["teacher"] |= {
            "endpoints": [{"base_url": first}, {"base_url": second}],
            "api_key_env": None,
        }
        path.write_text(json.dumps(recipe), encoding="utf-8")
        checks = examine(str(path))
    assert (about(checks, first).status, about(checks, second).status) == ("ok", "warning")


@pytest.mark.usefixtures("quick")
def test_a_recipe_that_cannot_be_read_is_a_line_beside_those_of_the_machine(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(
        "task: {nam: x}\nteacher: {kind: oracle}\n", encoding="utf-8"
    )
    checks = examine(str(tmp_path / "bad.yaml"))
    assert (
        about(checks, "recipe").status == "problem"
        and "task.nam: unknown key" in about(checks, "recipe").message
    )
    assert about(checks, "python").status == "ok"


@pytest.mark.usefixtures("quick")
def test_what_a_recipe_needs_beyond_the_base_is_looked_for(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "has_extra", lambda extra: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    changes = [
        "train.lora={}", "annotate.engine=ray", "report.trackers=[tensorboard, wandb]",
        "student.init=null", "student.model=some/model", "teacher.kind=llamacpp",
        "teacher.model=nowhere.gguf",
        "task.data.valid=hub://owner/name/valid", "eval.predictions.mine=mine.jsonl",
    ]  # fmt: skip
    checks = examine(str(toy()), changes)
    for extra in ("local", "lora", "ray", "tensorboard", "wandb"):
        lines = [check for check in checks if check.name == f"extra {extra}"]
        assert [check.status for check in lines] == [
            "ok",
            "problem",
        ] and f"'dsbs[{extra}]'" in str(lines[1].hint)
    assert (
        about(checks, "teacher").status == "problem"
        and "nowhere.gguf" in about(checks, "teacher").message
    )
    assert (
        about(checks, "student.model").status == "problem"
        and about(checks, "task.data.valid").status == "warning"
    )
    assert about(checks, "eval.predictions.mine").status == "problem"
    (tmp_path / "model").mkdir()
    local = examine(str(toy()), ["student.init=null", f"student.model={tmp_path / 'model'}"])
    assert "has no config.json" in about(local, "student.model").message
    assert (
        about(examine(str(toy()), [f"train.init={tmp_path / 'gone'}"]), "train.init").status
        == "problem"
    )


@pytest.mark.usefixtures("quick")
def test_a_file_here_that_hides_the_one_beside_the_recipe_is_a_warning(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "train.csv").write_text("text,team\nx,billing\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path / "elsewhere")
    checks = [
        check
        for check in examine(str(path), ["task.data.train=train.csv"])
        if check.name == "task.data.train"
    ]
    assert [check.status for check in checks] == [
        "ok",
        "warning",
    ] and "beside the recipe" in checks[1].message


def test_torch_that_cannot_be_imported_is_a_problem_and_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "torch.py").write_text(
        "raise ImportError('libcudart.so.12: cannot open shared object file')\n"
    )
    (check,) = machine.accelerators()
    assert check.status == "problem" and "libcudart.so.12" in check.message
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    (check,) = machine.accelerators()
    assert check.status == "problem" and "SIGILL" in check.message


def test_gpus_are_told_with_their_memory_and_a_recipe_that_wants_bf16_needs_one() -> None:
    gpu = {"name": "NVIDIA Made-Up", "free": 70e9, "total": 80e9}
    (check,) = machine.describe_gpus({"gpus": [gpu], "bf16": True, "cuda": "12.8"}, needs_bf16=True)
    assert check.message == "NVIDIA Made-Up, 70.0 of 80.0 GB free, CUDA 12.8, with bf16"
    _, lacking = machine.describe_gpus(
        {"gpus": [gpu], "bf16": False, "cuda": "12.8"}, needs_bf16=True
    )
    assert lacking.status == "problem" and lacking.name == "train.precision"
    none = list(machine.describe_gpus({"gpus": [], "bf16": False, "cuda": None}, needs_bf16=False))
    assert [check.status for check in none] == ["ok"]


def test_a_container_s_limits_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(weights, "CGROUP", tmp_path)
    (tmp_path / "cpu.max").write_text("50000 100000\n", encoding="ascii")
    (tmp_path / "memory.max").write_text("1000000000\n", encoding="ascii")
    cores, memory = machine.processor()
    assert (
        cores.message.startswith("1 of ")
        and memory.status == "warning"
        and "of 1.0 GB free" in memory.message
    )
    for text in ("max 100000\n", "", "?"):
        (tmp_path / "cpu.max").write_text(text, encoding="ascii")
        (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
        assert "of 1.0 GB" not in list(machine.processor())[1].message


def test_folders_that_cannot_be_written_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    (check,) = machine.disk(tmp_path / "file" / "run")
    assert check.status == "problem" and "is not writable" in check.message
    (check,) = machine.disk(tmp_path / "not" / "yet" / "there")
    assert check.status in ("ok", "warning") and not (tmp_path / "not").exists()
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "file" / "hf"))
    checks = {check.hint: check for check in machine.caches()}
    assert checks["export HF_HOME=<a writable folder>"].status == "warning"


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, status in ((0.1e9, "problem"), (1e9, "warning"), (100e9, "ok")):
        usage = type("Usage", (), {"free": free})
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path, usage=usage: usage)
        (check,) = machine.disk(tmp_path)
        assert check.status == status and (check.hint is None) == (status == "ok")


def test_packages_that_are_missing_or_too_old_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        machine.metadata,
        "requires",
        lambda name: ["numpy>=999", "not-there>=1", "x; extra == 'dev'", "rich"],
    )
    checks = {check.name: check for check in machine.packages()}
    assert (
        checks["packages"].status == "problem"
        and "not-there is missing" in checks["packages"].message
    )
    assert str(checks["packages"].hint).endswith("-m pip install 'numpy>=999' 'not-there>=1'")
    assert "torch" in checks["versions"].message


def test_a_check_that_breaks_is_a_line() -> None:
    def broken() -> Iterator[Check]:
        yield Check("first", "ok", "fine")
        raise RuntimeError("the driver has gone")

    first, second = run_check("second", broken)
    assert (
        first.status == "ok"
        and second.status == "problem"
        and "the driver has gone" in second.message
    )


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(machine.EXTRAS) == set(project["optional-dependencies"]) - {"dev", "docs"}
