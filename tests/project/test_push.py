"""Uploads to the Hugging Face Hub: which files go there, and into which repositories."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TEAMS
from typer.testing import CliRunner

from dsbs.cli import app
from dsbs.config import TaskSection
from dsbs.errors import DsbsError, UserError
from dsbs.files import write_json
from dsbs.project.push import plan_upload, push
from dsbs.students.card import StudentCard

TOKEN = "hf_notarealtoken"
LOCAL_FILES = ("train.json", "work.json", "metrics.jsonl", "golden.jsonl", ".env", "optimizer.pt")


def make_student(folder: Path, name: str = "step-by-step-gold-s0", **changes: Any) -> Path:
    """A finished student's folder, with files that must stay where they are."""
    task = {
        "name": "classification",
        "labels": list(TEAMS),
        "data": {
            "train": "/home/me/secret-client/tickets.csv",
            "served": "/home/me/secret-client/serve/rows.jsonl",
            "test": "hub://owner/rows/test",
        },
    }
    card = StudentCard(
        name=name,
        method="step-by-step",
        labels="gold",
        seed=0,
        task=TaskSection.model_validate(task),
        prefixes={"label": "predict: "},
        max_input_tokens=64,
        max_target_tokens=32,
        **changes,
    )
    student = folder / "runs" / "tickets" / "train" / name
    write_json(student / "student.json", card.model_dump(mode="json"))
    for file in ("config.json", "tokenizer.json", *LOCAL_FILES):
        (student / file).write_text(f"of {file}", encoding="utf-8")
    (student / "model.safetensors").write_bytes(bytes(3000))
    for local in ("checkpoints/checkpoint-5/model.safetensors", "tensorboard/events.1"):
        (student / local).parent.mkdir(parents=True)
        (student / local).write_text("local")
    return student


class FakeHub:
    """The calls of huggingface_hub.HfApi that dsbs makes, on repositories in memory."""

    endpoint = "https://hub.test"
    repositories: dict[str, dict[str, Any]]
    error: Exception | None = None

    def model_info(self, repository: str) -> Any:
        from huggingface_hub.errors import RepositoryNotFoundError

        if self.error is not None:
            raise self.error
        if repository not in self.repositories:
            raise RepositoryNotFoundError("404", response=self.response(404))
        files = self.repositories[repository]["files"]
        return SimpleNamespace(
            private=self.repositories[repository]["private"],
            siblings=[SimpleNamespace(rfilename=name) for name in files],
        )

    @staticmethod
    def response(status: int) -> Any:
        return SimpleNamespace(status_code=status, headers={}, request=None, text="")

    def create_repo(self, repository: str, *, repo_type: str, private: bool) -> None:
        self.repositories[repository] = {"private": private, "files": {}}

    def hf_hub_download(
        self, repository: str, name: str, *, repo_type: str, local_dir: str
    ) -> None:
        (Path(local_dir) / name).write_bytes(self.repositories[repository]["files"][name])

    def create_commit(
        self, repository: str, operations: list[Any], *, commit_message: str, repo_type: str
    ) -> Any:
        files = self.repositories[repository]["files"]
        for operation in operations:
            if not hasattr(operation, "path_or_fileobj"):
                del files[operation.path_in_repo]
                continue
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        return SimpleNamespace(oid="c0ffee")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    monkeypatch.setattr(FakeHub, "repositories", {}, raising=False)
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    return FakeHub


def test_a_student_is_uploaded_privately_with_its_card_and_nothing_else(
    tmp_path: Path, hub: type[FakeHub]
) -> None:
    student = make_student(tmp_path)
    ended = CliRunner().invoke(app, ["push", str(student), "me/tickets", "--json"])
    assert ended.exit_code == 0, ended.output
    result = json.loads(ended.stdout)
    assert result["private"] and result["new"] and result["url"] == "https://hub.test/me/tickets"
    repository = hub.repositories["me/tickets"]
    assert repository["private"]
    files = repository["files"]
    names = ["README.md", "config.json", "model.safetensors", "student.json", "tokenizer.json"]
    assert sorted(files) == sorted(result["files"]) == names
    assert {*LOCAL_FILES, "checkpoints", "tensorboard"} == set(result["skipped"])
    assert {name: len(content) for name, content in files.items()} == result["files"]
    assert files["README.md"].startswith(b"---\n") and b"dsbs" in files["README.md"]
    card = json.loads(files["student.json"])
    assert card["task"]["data"]["train"] == "tickets.csv"
    assert card["task"]["data"]["test"] == "hub://owner/rows/test"
    assert b"secret-client" not in files["student.json"]
    StudentCard.model_validate(card)


def test_the_report_s_model_card_is_uploaded_as_it_is(tmp_path: Path, hub: type[FakeHub]) -> None:
    student = make_student(tmp_path)
    (student / "README.md").write_text("# Tickets, 92%\n", encoding="utf-8")
    push(plan_upload(student), "me/tickets")
    assert hub.repositories["me/tickets"]["files"]["README.md"] == b"# Tickets, 92%\n"


def test_exports_and_compressed_students_are_students(tmp_path: Path, hub: type[FakeHub]) -> None:
    export = make_student(tmp_path, "ct2", format="ct2")
    (export / "model.safetensors").rename(export / "model.bin")
    for name in ("export.json", "shared_vocabulary.json", "predict.py", "wording.json"):
        (export / name).write_text("{}")
    assert {"model.bin", "export.json", "shared_vocabulary.json", "predict.py", "wording.json"} < {
        *plan_upload(export).names
    }
    compressed = make_student(tmp_path, "pruned")
    (compressed / "train.json").unlink()
    (compressed / "compress.json").write_text("{}")
    assert "compress.json" not in plan_upload(compressed).names


def test_a_label_head_goes_with_its_rationale_decoder(tmp_path: Path, hub: type[FakeHub]) -> None:
    student = make_student(tmp_path, head="labels", classes=TEAMS, kind="encoder")
    (student / "head.safetensors").write_bytes(b"head")
    decoder = student / "rationale_decoder"
    decoder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors", "optimizer.pt"):
        (decoder / name).write_text("{}")
    upload = plan_upload(student)
    push(upload, "me/tickets")
    files = hub.repositories["me/tickets"]["files"]
    expected = {"config.json", "generation_config.json", "model.safetensors"}
    assert {name for name in files if "/" in name} == {f"rationale_decoder/{n}" for n in expected}
    assert files["head.safetensors"] == b"head" and "rationale_decoder" not in upload.skipped
    readme = files["README.md"].decode()
    assert "`head.safetensors`" in readme and "library_name" not in readme
    assert 'dsbs.Student.load("step-by-step-gold-s0")' in readme

    for name in expected:
        (decoder / name).unlink()
    removed = push(plan_upload(student), "me/tickets").removed
    assert sorted(removed) == sorted(f"rationale_decoder/{name}" for name in expected)


def test_a_dry_run_shows_files_and_sizes_and_never_asks_the_hub(
    tmp_path: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", None)
    student = make_student(tmp_path)
    command = ["push", str(student), "me/tickets", "--dry-run"]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    assert "3,000  model.safetensors" in ended.stdout and "private: 5 files" in ended.stdout
    assert "golden.jsonl" in ended.stdout.partition("not uploaded")[2]
    as_json = json.loads(CliRunner().invoke(app, [*command, "--public", "--json"]).stdout)
    assert as_json["dry_run"] and not as_json["private"]
    assert as_json["files"]["model.safetensors"] == 3000


def test_the_same_student_is_updated_and_files_that_it_lost_are_removed(
    tmp_path: Path, hub: type[FakeHub]
) -> None:
    student = make_student(tmp_path)
    (student / "tokenizer_config.json").write_text("{}")
    push(plan_upload(student), "me/tickets", public=True)
    hub.repositories["me/tickets"]["files"]["notes.txt"] = b"by hand"
    (student / "tokenizer_config.json").unlink()
    (student / "model.safetensors").write_bytes(b"trained again")
    again = push(plan_upload(student), "me/tickets", public=True)
    assert not again.is_new and not again.is_private
    assert again.removed == ["tokenizer_config.json"]
    files = hub.repositories["me/tickets"]["files"]
    assert files["model.safetensors"] == b"trained again" and files["notes.txt"] == b"by hand"


def test_another_student_s_repository_needs_force(tmp_path: Path, hub: type[FakeHub]) -> None:
    push(plan_upload(make_student(tmp_path)), "me/tickets")
    other = plan_upload(make_student(tmp_path, "finetune-gold-s0"))
    with pytest.raises(UserError, match="me/tickets holds another student"):
        push(other, "me/tickets")
    push(other, "me/tickets", force=True)
    stored = json.loads(hub.repositories["me/tickets"]["files"]["student.json"])
    assert stored["name"] == "finetune-gold-s0"


def test_a_repository_of_something_else_needs_force_and_an_empty_one_does_not(
    tmp_path: Path, hub: type[FakeHub]
) -> None:
    upload = plan_upload(make_student(tmp_path))
    hub.repositories["me/empty"] = {"private": True, "files": {".gitattributes": b""}}
    hub.repositories["me/bert"] = {"private": True, "files": {"pytorch_model.bin": b"weights"}}
    push(upload, "me/empty")
    with pytest.raises(UserError, match="does not hold a student"):
        push(upload, "me/bert")
    assert hub.repositories["me/bert"]["files"] == {"pytorch_model.bin": b"weights"}


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_of_the_other_visibility_is_refused(
    tmp_path: Path, hub: type[FakeHub], private: bool
) -> None:
    hub.repositories["me/tickets"] = {"private": private, "files": {}}
    with pytest.raises(UserError, match=f"exists and is {'private' if private else 'public'}"):
        push(plan_upload(make_student(tmp_path)), "me/tickets", public=private, force=True)
    assert hub.repositories["me/tickets"]["files"] == {}


@pytest.mark.parametrize("lost", ["student.json", "model.safetensors", "train.json"])
def test_a_folder_that_is_no_finished_student_is_refused(
    tmp_path: Path, hub: type[FakeHub], lost: str
) -> None:
    student = make_student(tmp_path)
    (student / lost).unlink()
    with pytest.raises(UserError):
        plan_upload(student)
    assert CliRunner().invoke(app, ["push", str(student), "me/tickets"]).exit_code != 0
    assert not hub.repositories


@pytest.mark.parametrize("repository", ["tickets", "me/tickets/main", "https://hub/me/x", "a b/c"])
def test_a_repository_is_an_owner_and_a_name(tmp_path: Path, repository: str) -> None:
    with pytest.raises(UserError, match="give OWNER/NAME"):
        push(plan_upload(make_student(tmp_path)), repository)


class HubHandler(BaseHTTPRequestHandler):
    """The Hub's answers to the requests of huggingface_hub, one repository in memory."""

    files: dict[str, bytes]
    requests: list[tuple[str, Any, str | None]]

    def do_GET(self) -> None:
        self.requests.append((self.path, None, self.headers["Authorization"]))
        self.reply(404, {"error": "Repository not found"}, "RepoNotFound")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        lines = [json.loads(line) for line in body.splitlines()]
        self.requests.append((self.path, lines[0], self.headers["Authorization"]))
        url = f"http://{self.headers['Host']}/me/tickets"
        answer: dict[str, Any] = {"url": url, "commitUrl": f"{url}/commit/abc", "commitOid": "abc"}
        if self.path.endswith("/validate-yaml"):
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            names = [file["path"] for file in lines[0]["files"]]
            answer = {
                "files": [
                    {"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names
                ]
            }
        elif "/commit/" in self.path:
            for line in lines[1:]:
                content = base64.b64decode(line["value"]["content"])
                self.files[line["value"]["path"]] = content
        self.reply(200, answer)

    def reply(self, status: int, answer: dict[str, Any], code: str = "") -> None:
        payload = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.send_header("X-Error-Code", code)
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        pass


def test_the_hub_s_own_client_understands_the_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HubHandler, "files", {}, raising=False)
    monkeypatch.setattr(HubHandler, "requests", [], raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        pushed = push(plan_upload(make_student(tmp_path)), "me/tickets")
    finally:
        server.shutdown()
        server.server_close()
    assert pushed.url == f"{url}/me/tickets" and pushed.commit == "abc"
    bodies = {path: body for path, body, _ in HubHandler.requests}
    assert bodies["/api/repos/create"]["visibility"] == "private"
    assert HubHandler.requests[-1][2] == f"Bearer {TOKEN}"
    assert HubHandler.files["model.safetensors"] == bytes(3000)
    assert not {*LOCAL_FILES} & set(HubHandler.files)


def test_errors_of_the_hub_say_what_to_do_and_never_show_a_token(
    tmp_path: Path, hub: type[FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    upload = plan_upload(make_student(tmp_path))

    def failure(error: Exception) -> DsbsError:
        monkeypatch.setattr(FakeHub, "error", error)
        with pytest.raises(DsbsError) as caught:
            push(upload, "me/tickets")
        assert TOKEN not in str(caught.value)
        return caught.value

    forbidden = HfHubHTTPError(f"403 {TOKEN}", response=FakeHub.response(403))
    for error in (forbidden, LocalTokenNotFoundError("no token")):
        assert "HF_TOKEN" in failure(error).hint
    assert failure(ConnectionError(f"refused for {TOKEN}")).exit_code == 1
    assert failure(HfHubHTTPError("503", response=FakeHub.response(503))).exit_code == 1
