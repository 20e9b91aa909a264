"""POST /predict returns the student's own answers, whatever the batch."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from typing import Any

import aiohttp
import pytest
from conftest import toy_rows
from served import BOTH, CQA, here, made, taught

from dsbs import UserError
from dsbs.serving.model import Model
from dsbs.serving.settings import Settings
from dsbs.students.student import Student


@pytest.fixture(scope="module")
def student() -> Student:
    return Student.load(taught())


async def post(url: str, body: Any, **kwargs: Any) -> tuple[int, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url, json=body, **kwargs) as response,
    ):
        return response.status, await response.json()


def test_clients_at_the_same_time_get_what_predict_says_of_their_own_rows(student: Student) -> None:
    texts = [row["text"] for row in toy_rows(24, start=200)]
    own = student.predict(texts, rationale=True)
    assert {one.label for one in own} == {"billing", "shipping"}

    async def main() -> tuple[list[Any], str]:
        async with here(student, batch_size=8) as server:
            rows = [[text, {"text": text}] for text in texts]
            asked = [
                post(f"{server.url}/predict", {"inputs": row, "rationale": i % 2 == 0})
                for i, row in enumerate(rows)
            ]
            answers = await asyncio.gather(*asked)
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"{server.url}/metrics") as response,
            ):
                return answers, await response.text()

    answers, metrics = asyncio.run(main())
    for i, ((status, body), one) in enumerate(zip(answers, own, strict=True)):
        assert status == 200 and body["student"] == "toy-student"
        for prediction in body["predictions"]:
            assert prediction.pop("probability") == pytest.approx(one.probability, abs=1e-5)
            expected = {"label": one.label, "raw": one.raw, "truncated": False}
            explained = (
                {"rationale": one.rationale, "rationale_is_causal": False} if i % 2 == 0 else {}
            )
            assert prediction == expected | explained
    assert 'dsbs_requests_total{path="/predict",status="200"} 24' in metrics
    assert "dsbs_batch_rows_sum 48\n" in metrics
    batches = int(re.findall(r"dsbs_batch_rows_count (\d+)", metrics)[0])
    assert 6 <= batches < 24, "requests shared no batches"


def test_a_label_has_no_more_tokens_than_the_request_allows(student: Student) -> None:
    text = toy_rows(1)[0]["text"]

    async def main() -> list[Any]:
        async with here(student) as server:
            url = f"{server.url}/predict"
            return [
                await post(url, {"inputs": [text], "max_label_tokens": tokens})
                for tokens in (1, 10**9)
            ]

    (_, short), (_, whole) = asyncio.run(main())
    assert short["predictions"][0]["truncated"] is True
    assert whole["predictions"][0]["label"] == "billing"


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ([], 400, "not a JSON object"),
        ({}, 400, "inputs: Field required"),
        ({"inputs": "text"}, 400, "inputs: Input should be a valid list"),
        ({"inputs": []}, 400, "inputs is empty"),
        ({"inputs": [5]}, 400, "inputs.0 is neither a text nor a row"),
        ({"inputs": ["fine", "  "]}, 400, "inputs.1 is empty"),
        ({"inputs": [{"subject": 1, "body": 2}]}, 400, "inputs.0: no column 'text'"),
        ({"inputs": ["a"], "rationale": "perhaps"}, 400, "rationale: "),
        ({"inputs": ["a"], "max_label_tokens": 0}, 400, "max_label_tokens: "),
        ({"inputs": ["a"], "max_lable_tokens": 5}, 400, "max_lable_tokens: "),
        ({"inputs": ["a"] * 9}, 413, "inputs has 9 rows; the limit is 8"),
        ({"inputs": ["half \ud800 a character"]}, 400, "surrogate"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    student: Student, body: Any, status: int, says: str
) -> None:
    async def main() -> tuple[int, Any]:
        async with here(student, max_rows=8) as server:
            return await post(f"{server.url}/predict", body)

    got, answer = asyncio.run(main())
    assert got == status and says in answer["error"]["message"], answer


UNREADABLE: list[Any] = [
    "plain text",
    '{"question": 1',
    "[1]",
    {"question": "q"},
    {"question": "q", "choices": [{}, 3]},
    {"question": [], "choices": 5},
]


@pytest.mark.parametrize("row", UNREADABLE)
def test_a_row_that_a_task_with_fields_cannot_read_is_refused_and_a_good_one_beside_it_answered(
    row: Any,
) -> None:
    good = {"question": "Where do fish live?", "choices": ["water", "sand"]}

    async def main() -> list[Any]:
        async with here(made(BOTH, CQA)) as server:
            url = f"{server.url}/predict"
            return [
                await post(url, {"inputs": [row]}),
                await post(url, {"inputs": [good, '{"question": "q", "choices": ["a", "b"]}']}),
            ]

    (status, refused), (fine, answered) = asyncio.run(main())
    assert status == 400 and "inputs.0" in refused["error"]["message"]
    assert fine == 200 and len(answered["predictions"]) == 2


def test_a_student_without_rationales_says_so() -> None:
    plain = made({"label": ""})

    async def main() -> tuple[int, Any]:
        async with here(plain) as server:
            return await post(f"{server.url}/predict", {"inputs": ["a"], "rationale": True})

    status, body = asyncio.run(main())
    assert status == 400 and "without rationales" in body["error"]["message"]
    with pytest.raises(UserError, match="without rationales"):
        Model(plain, Settings(reply="step-by-step"))


def test_health_is_ready_until_the_server_is_told_to_stop_and_then_nothing_new_is_taken(
    student: Student,
) -> None:
    async def main() -> list[int]:
        found = []
        async with here(student) as server, aiohttp.ClientSession() as session:
            for stops in (False, True):
                server.service.is_stopping = stops
                async with session.get(f"{server.url}/health") as response:
                    found.append(response.status)
                async with session.post(
                    f"{server.url}/predict", json={"inputs": ["a"]}
                ) as response:
                    found.append(response.status)
                    assert ("Retry-After" in response.headers) is stops
        return found

    assert asyncio.run(main()) == [200, 200, 503, 503]


def test_a_client_that_goes_away_frees_its_rows(student: Student) -> None:
    async def main() -> tuple[int, str]:
        async with here(student, max_wait_ms=5000.0) as server:
            body = b'{"inputs": ["a", "b", "c"]}'
            head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head + body)
            while server.service.batcher.depth < 3:
                await asyncio.sleep(0.005)
            # closed with a reset, as a killed client's connection is
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.close()
            for _ in range(400):
                if server.service.batcher.depth == 0:
                    break
                await asyncio.sleep(0.005)
            depth = server.service.batcher.depth
            page = server.service.metrics.page(
                queued_rows=depth, body_bytes=server.service.body_reader.bytes_in_flight, ready=True
            )
            return depth, page

    depth, page = asyncio.run(main())
    assert depth == 0
    assert "dsbs_dropped_rows_total 3\n" in page and "dsbs_batch_rows_count 0\n" in page
    assert "dsbs_body_bytes 0\n" in page
