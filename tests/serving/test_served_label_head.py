"""A student with a label head, served: distributions, completions and log-probabilities."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from encoder_models import label_head_student
from served import BOTH, here, made
from serving.test_serve_predict import post

TEXT = "My parcel"


def answers(student: Any, *requests: tuple[str, dict[str, Any]], **settings: Any) -> list[Any]:
    async def main() -> list[Any]:
        async with here(student, **settings) as server:
            return [await post(f"{server.url}{path}", body) for path, body in requests]

    return asyncio.run(main())


def test_every_route_gives_the_distribution() -> None:
    student = label_head_student()
    expected = student.predict([TEXT])[0]
    assert expected.distribution is not None
    message = [{"role": "user", "content": TEXT}]
    predicted, completed, chatted = answers(
        student,
        ("/predict", {"inputs": [TEXT]}),
        ("/v1/completions", {"prompt": TEXT, "logprobs": 2}),
        ("/v1/chat/completions", {"messages": message, "logprobs": True, "top_logprobs": 1}),
    )
    assert predicted[1]["predictions"][0]["distribution"] == pytest.approx(expected.distribution)
    choice = completed[1]["choices"][0]
    assert choice["text"] == expected.label
    logprobs = {label: math.log(share) for label, share in expected.distribution.items()}
    assert choice["logprobs"]["top_logprobs"][0] == pytest.approx(logprobs, abs=1e-4)
    assert choice["logprobs"]["tokens"] == [expected.label]
    content = chatted[1]["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == [expected.label]
    assert len(content[0]["top_logprobs"]) == 1
    assert content[0]["logprob"] == pytest.approx(max(logprobs.values()), abs=1e-4)


def test_a_student_that_writes_its_label_scores_every_label_on_request() -> None:
    student = made(BOTH)
    (expected,) = student.predict([TEXT], score_labels=True)
    assert expected.distribution is not None
    plain, scored, completed = answers(
        student,
        ("/predict", {"inputs": [TEXT]}),
        ("/predict", {"inputs": [TEXT], "distribution": True}),
        ("/v1/completions", {"prompt": TEXT, "logprobs": 2}),
    )
    assert "distribution" not in plain[1]["predictions"][0]
    prediction = scored[1]["predictions"][0]
    assert prediction["distribution"] == pytest.approx(expected.distribution)
    assert prediction["label"] == expected.label
    logprobs = {label: math.log(share) for label, share in expected.distribution.items()}
    top = completed[1]["choices"][0]["logprobs"]["top_logprobs"][0]
    assert top == pytest.approx(logprobs, abs=1e-4)

    ((status, body),) = answers(
        made({"label-then-rationale": ""}), ("/predict", {"inputs": [TEXT], "distribution": True})
    )
    assert status == 400 and body["error"]["code"] == "no_distribution"


def test_without_a_request_there_are_no_log_probabilities() -> None:
    completed, chatted = answers(
        label_head_student(),
        ("/v1/completions", {"prompt": [TEXT, "An invoice"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": TEXT}]}),
    )
    assert [choice["logprobs"] for choice in completed[1]["choices"]] == [None, None]
    assert chatted[1]["choices"][0]["logprobs"] is None


def test_a_text_that_is_more_than_the_label_has_no_log_probabilities() -> None:
    request = ("/v1/completions", {"prompt": TEXT, "logprobs": 1})
    for student in (made(BOTH), label_head_student()):
        ((status, body),) = answers(student, request, anchor="Answer:")
        assert status == 400 and "logprobs" in body["error"]["message"]
