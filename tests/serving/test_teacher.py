"""A served student as a teacher: the OpenAI client, and `dsbs annotate`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml
from conftest import ROOT, run_dsbs, toy_rows, write_jsonl
from served import BOTH, CQA, RATIONALES, here, in_process, made, stopped, taught

from dsbs import annotate, load_recipe
from dsbs.config import DataSection, TaskSection
from dsbs.prompting import Prompt, PromptRenderer
from dsbs.records import Example
from dsbs.students.student import Student
from dsbs.tasks import make_task

TEXT = toy_rows(1, start=300)[0]["text"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with in_process(taught(), "--reply", "step-by-step", "--max-wait-ms", "2") as (url, _):
        yield url


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.load(taught())


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_the_openai_client_gets_the_students_rationale_and_label(
    url: str, student: Student
) -> None:
    own = student.predict([TEXT], rationale=True)[0]
    expected = f"{own.rationale}\nAnswer: {own.label}"
    with client(url) as asked:
        made = asked.completions.create(model="any", prompt=TEXT, max_tokens=64, temperature=0)
        said = asked.chat.completions.create(
            model="any",
            messages=[
                {"role": "system", "content": "Route it."},
                {"role": "user", "content": TEXT},
            ],
        )
        assert made.choices[0].text == said.choices[0].message.content == expected
        assert made.model == said.model == "toy-student"
        assert made.choices[0].finish_reason == said.choices[0].finish_reason == "stop"
        assert (
            made.usage is not None
            and made.usage.total_tokens == made.usage.prompt_tokens + made.usage.completion_tokens
        )
        assert made.usage.completion_tokens == len(
            student.backend.tokenizer(expected, add_special_tokens=False)["input_ids"]
        )
        assert [one.id for one in asked.models.list()] == ["toy-student"]


def test_the_label_stands_alone_where_the_server_is_told_so(student: Student) -> None:
    async def main(**settings: Any) -> list[str]:
        async with (
            here(student, **settings) as server,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as asked,
        ):
            made = await asked.completions.create(
                model="any", prompt=[TEXT, TEXT.replace("invoice", "parcel")]
            )
            return [choice.text for choice in made.choices]

    assert asyncio.run(main()) == ["billing", "shipping"]
    assert asyncio.run(main(anchor="So it is")) == ["So it is billing", "So it is shipping"]


def test_a_completion_ends_at_max_tokens_and_before_a_stop(url: str) -> None:
    with client(url) as asked:
        cut = asked.completions.create(model="any", prompt=TEXT, max_tokens=3)
        assert cut.choices[0].finish_reason == "length"
        assert cut.usage is not None and cut.usage.completion_tokens == 3
        ended = asked.completions.create(model="any", prompt=TEXT, stop=["\nAnswer:", "never"])
        assert (
            ended.choices[0].text == RATIONALES["billing"]
            and ended.choices[0].finish_reason == "stop"
        )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"n": 2}, "n: "),
        ({"stream": True}, "stream"),
        ({"logprobs": 1}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"presence_penalty": 1.0}, "presence_penalty"),
        ({"stop": ""}, "stop"),
        ({"prompt": [1, 2, 3]}, "prompt"),
        ({"prompt": []}, "prompt is empty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"response_format": {"type": "json_object"}}}, "response_format"),
    ],
)
def test_what_a_student_cannot_do_is_refused_in_the_openai_shape(
    url: str, asked: dict[str, Any], says: str
) -> None:
    with client(url) as openai_client, pytest.raises(openai.BadRequestError) as refused:
        openai_client.completions.create(**{"model": "any", "prompt": TEXT} | asked)
    assert says in refused.value.message and refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "system", "content": "Route it."}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
    ],
)
def test_a_chat_is_one_user_message_since_a_student_reads_no_examples(
    url: str, messages: Any
) -> None:
    with client(url) as asked, pytest.raises(openai.BadRequestError, match="one user message"):
        asked.chat.completions.create(model="any", messages=messages)


@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
        {"tool_choice": "required"},
        {"functions": [{"name": "f", "parameters": {}}]},
        {"function_call": {"name": "f"}},
    ],
)
def test_a_chat_that_asks_for_more_than_text_is_refused(url: str, asked: dict[str, Any]) -> None:
    (name,) = asked
    with client(url) as openai_client, pytest.raises(openai.BadRequestError, match=name):
        openai_client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": TEXT}], **asked
        )


def test_a_chat_that_asks_for_text_and_no_tool_is_answered(url: str) -> None:
    with client(url) as asked:
        said = asked.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": TEXT}],
            response_format={"type": "text"},
            tool_choice="none",
        )
        assert said.choices[0].message.content


def test_completions_of_other_lengths_share_a_batch(student: Student) -> None:
    async def main() -> tuple[list[Any], str]:
        async with here(student, batch_size=4, max_wait_ms=500.0, reply="step-by-step") as server:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as asked:
                limits = (1, 3, 10**9, None)
                made = [
                    asked.completions.create(model="any", prompt=TEXT, max_tokens=most)
                    for most in limits
                ]
                answers = await asyncio.gather(*made)
            return answers, server.service.metrics.page(queued_rows=0, body_bytes=0, ready=True)

    answers, metrics = asyncio.run(main())
    assert [one.usage.completion_tokens for one in answers[:2]] == [1, 3]
    assert (
        answers[2].choices == answers[3].choices and answers[3].choices[0].finish_reason == "stop"
    )
    assert "dsbs_batch_rows_count 1\n" in metrics and "dsbs_batch_rows_sum 4\n" in metrics


def test_an_export_counts_and_cuts_as_its_student_does(tmp_path: Path) -> None:
    from dsbs.exporting.run import export

    long = " ".join([TEXT] * 20)  # more than the 64 tokens that are read
    done = export(taught(), "ct2", quantize="float32", out=tmp_path / "ct2", examples=[TEXT])

    async def main(student: Student) -> list[Any]:
        async with here(student, reply="step-by-step") as server:
            async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as asked:
                limits = (3, 200)
                made = [
                    await asked.completions.create(model="any", prompt=long, max_tokens=most)
                    for most in limits
                ]
            return [(one.choices, one.usage) for one in made]

    own, exported = (asyncio.run(main(Student.load(folder))) for folder in (taught(), done.path))
    assert own == exported
    assert own[0][1].prompt_tokens > 100 and own[0][1].completion_tokens == 3


def test_a_row_of_a_task_with_fields_is_given_as_json() -> None:
    row = {"question": "Where do fish live?", "choices": ["water", "sand"]}

    async def main() -> list[str]:
        async with (
            here(made(BOTH, CQA)) as server,
            openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x") as asked,
        ):
            completion = await asked.completions.create(model="any", prompt=json.dumps(row))
            with pytest.raises(openai.BadRequestError, match="as a JSON object"):
                await asked.completions.create(model="any", prompt="Where do fish live?")
            return [choice.text for choice in completion.choices]

    own = made(BOTH, CQA).predict([row])[0]
    assert asyncio.run(main()) == [own.raw if own.label is None else own.label]


ROWS: dict[str, dict[str, Any]] = {
    "generation": {"text": "Write a title."},
    "esnli": {"premise": "A man's dog runs.", "hypothesis": 'It "runs" <fast>.'},
    "anli": {"premise": "A dog runs.", "hypothesis": "An animal moves."},
    "svamp": {"body": "Tom has 3 apples.", "question": "How many has he?"},
    "cqa": {"question": 'Where do "fish" live?', "choices": ["a man's <sea>", "sand & stone"]},
}


@pytest.mark.parametrize("name", ROWS)
def test_the_templates_in_the_guide_give_what_the_student_reads(name: str) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    (template,) = re.findall(rf"^- (?:\w+, )?{name}(?:, \w+)?: `(.+)`$", page, re.MULTILINE)
    task = make_task(TaskSection(name=name, data=DataSection(train="train.csv")))
    fields = task.fields(ROWS[name], "row")
    example = Example(id="1", input=fields, label=None)
    text = PromptRenderer(Prompt(template=template.replace("\\n", "\n")), task).render(example).text
    asked = json.loads(text) if task.needs_fields else text
    assert asked == (fields if task.needs_fields else task.text(fields))


def recipe_of(tmp_path: Path, url: str, endpoint: str) -> Path:
    """What docs/serving.md shows, over toy rows without gold labels."""
    rows = [{"id": row["id"], "text": row["text"]} for row in toy_rows(60, start=400)]
    gold = [
        {"id": row["id"], "text": row["text"], "label": row["team"]}
        for row in toy_rows(10, start=700)
    ]
    prompt = tmp_path / "student.yaml"
    prompt.write_text('template: "{{ text }}"\n', encoding="utf-8")
    recipe = {
        "name": "second",
        "task": {
            "name": "classification",
            "labels": list(RATIONALES),
            "data": {
                "train": str(write_jsonl(tmp_path / "train.jsonl", rows)),
                "test": str(write_jsonl(tmp_path / "test.jsonl", gold)),
            },
        },
        "teacher": {
            "model": "toy-student",
            "base_url": f"{url}/v1",
            "endpoint": endpoint,
            "timeout_s": 60,
        },
        "annotate": {"prompt": str(prompt), "splits": ["train"], "concurrency": 16},
        "student": {
            "init": "scratch",
            "vocab_size": 200,
            "max_input_tokens": 64,
            "max_target_tokens": 32,
        },
        "train": {
            "methods": ["step-by-step"],
            "labels": "teacher",
            "batch_size": 8,
            "max_steps": 2,
            "eval_every": 2,
        },
    }
    path = tmp_path / "second.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_a_student_is_trained_from_the_labels_and_rationales_of_a_served_student(
    tmp_path: Path, url: str, student: Student
) -> None:
    path = recipe_of(tmp_path, url, "completions")
    done = run_dsbs("annotate", str(path), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["splits"]["train"]
    assert told["rows"] == 60 and told["accepted"] >= 57
    lines = (
        (tmp_path / "runs" / "second" / "annotate" / "train.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    rows = [row for row in map(json.loads, lines) if row["accepted"]]
    own = student.predict([row["input"]["text"] for row in rows], rationale=True)
    assert [(row["label"], row["rationale"]) for row in rows] == [
        (one.label, one.rationale) for one in own
    ]
    trained = run_dsbs("train", str(path), "--json", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    (second,) = json.loads(trained.stdout)["students"]
    assert (
        Student.load(tmp_path / second["path"]).predict([TEXT], rationale=True)[0].rationale
        is not None
    )


def test_annotate_reads_a_served_student_through_the_chat_endpoint_too(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = annotate(load_recipe(recipe_of(tmp_path, url, "chat")))
    assert told.splits["train"].accepted >= 57


def test_a_server_on_loopback_without_a_token_answers_to_no_other_name(url: str) -> None:
    import urllib.error
    import urllib.request

    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(
            urllib.request.Request(f"{url}/health", headers={"Host": "student.example"}), timeout=30
        )


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_server_that_is_told_to_stop_answers_what_is_in_flight_and_ends(
    number: signal.Signals, code: int
) -> None:
    import threading
    import urllib.request

    # alone in a batch of 64, it waits for a second: the signal comes while it does
    with in_process(taught(), "--max-wait-ms", "1000") as (url, process):
        found: list[Any] = []

        def ask() -> None:
            body = json.dumps({"inputs": [TEXT]}).encode()
            with urllib.request.urlopen(f"{url}/predict", data=body, timeout=30) as answer:
                found.append(json.load(answer))

        asking = threading.Thread(target=ask)
        asking.start()
        while (
            "dsbs_queue_rows 1"
            not in urllib.request.urlopen(f"{url}/metrics", timeout=30).read().decode()
        ):
            assert asking.is_alive()
        ended, said = stopped(process, number)
        asking.join()
    assert ended == code and "Traceback" not in said
    assert found[0]["predictions"][0]["label"] == "billing"
    assert TEXT not in said


def test_the_token_comes_from_the_environment_and_is_never_shown(tmp_path: Path) -> None:
    import urllib.request

    with in_process(taught(), "--token-env", "TOY_TOKEN", env={"TOY_TOKEN": "correct-horse"}) as (
        url,
        process,
    ):
        by_another_name = urllib.request.Request(
            f"{url}/health", headers={"Host": "student.example"}
        )
        assert urllib.request.urlopen(by_another_name, timeout=30).status == 200
        asked = openai.OpenAI(base_url=f"{url}/v1", api_key="correct-horse", max_retries=0)
        assert asked.completions.create(model="any", prompt=TEXT).choices[0].text == "billing"
        with pytest.raises(openai.AuthenticationError):
            client(url).completions.create(model="any", prompt=TEXT)
        assert urllib.request.urlopen(f"{url}/health", timeout=30).status == 200
        assert "correct-horse" not in stopped(process)[1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--token-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE is not set"),
        (["--token-env", "sk-1234567890"], "not a valid environment variable name"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
        (["--host", "10..1"], "--host 10..1: not a valid host name"),
        (["--max-rows", "100", "--queue", "10"], "--max-rows 100 is more than --queue 10"),
    ],
)
def test_a_mistake_in_the_options_is_told_before_anything_is_loaded(
    tmp_path: Path, options: list[str], says: str
) -> None:
    done = run_dsbs("serve", str(tmp_path), "--port", "0", *options, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr
    assert "sk-1234567890" not in done.stderr


def test_a_server_for_all_to_reach_says_that_it_asks_for_no_token() -> None:
    with in_process(taught(), "--host", "0.0.0.0") as (url, process):
        assert url.startswith("http://0.0.0.0:")
        assert "without authentication" in stopped(process)[1]
    with in_process(
        taught(), "--host", "0.0.0.0", "--token-env", "PATH_TOKEN", env={"PATH_TOKEN": "a"}
    ) as (_, process):
        assert "token" not in stopped(process)[1]
    assert "PATH_TOKEN" not in os.environ
