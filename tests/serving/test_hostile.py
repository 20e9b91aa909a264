"""Hostile bodies, headers and clients: each gets a 4xx, and the server keeps serving."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import aiohttp
import pytest
from served import Here, here, made

from dsbs.serving.model import GenerationOptions, Item, Outcome
from dsbs.students.student import Student

GIGABYTE = 1 << 30
PLACES = ["/predict", "/v1/completions", "/v1/chat/completions"]


@pytest.fixture(scope="module")
def student() -> Student:
    return made({"label": ""})


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        "Connection: close",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


async def lives(server: Here) -> None:
    """It answers, and holds nothing of those that came before."""
    assert status(await server.exchange(post("/predict", b'{"inputs": ["a"]}'))) == 200
    assert server.service.body_reader.bytes_in_flight == 0 and server.service.batcher.depth == 0


DEEP = b'{"inputs": [' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"]}"
BAD: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 400),
    "no JSON": (b"inputs=a", 400),
    "half of it": (b'{"inputs": ["a"', 400),
    "no UTF-8": (b'{"inputs": ["\xff\xfe"]}', 400),
    "half a surrogate pair": (b'{"inputs": ["a\xed\xa0\x80b"]}', 400),
    "UTF-16": ('{"inputs": ["a"]}'.encode("utf-16"), 400),
    "a number": (b"5", 400),
    "not a number": (b'{"inputs": [NaN], "prompt": NaN, "messages": NaN}', 400),
    "a number of 50,000 digits": (b'{"inputs": [' + b"9" * 50_000 + b"]}", 400),
    "deeper than is of use": (DEEP, 400),
    "deeper than Python's stack": (b"[" * 16_000, 400),
    "deep objects": (b'{"a":' * 10_000, 400),
    "more values than text": (
        b'{"inputs": [' + b"[],[],[],[],[],[],[],[],[],[]," * 12_000 + b"[]]}",
        413,
    ),
    "larger than allowed": (b'{"inputs": ["' + b"a" * 600_000 + b'"]}', 413),
}


@pytest.mark.parametrize("path", PLACES)
def test_a_hostile_body_gets_its_status_and_the_server_goes_on(student: Student, path: str) -> None:
    async def main() -> dict[str, tuple[int, Any]]:
        async with here(student, max_body_kb=512) as server:
            found = {}
            for name, (body, _) in BAD.items():
                answer = await server.exchange(post(path, body))
                found[name] = (status(answer), json.loads(answer.partition(b"\r\n\r\n")[2]))
            await lives(server)
            return found

    found = asyncio.run(main())
    assert {name: got for name, (got, _) in found.items()} == {
        name: expected for name, (_, expected) in BAD.items()
    }
    assert all(body["error"]["message"] and body["error"]["code"] for _, body in found.values())


def test_a_text_may_hold_commas_and_brackets_at_will(student: Student) -> None:
    texts = ['[,{"\\' * 500, '\\"' + "," * 4000, '"\\"' + "{" * 2000]

    async def main() -> tuple[int, int]:
        async with here(student, max_rows=3) as server:
            sent = [
                json.dumps({"inputs": texts}).encode(),
                b'{"inputs": ["a"], "rest": [' + b"1," * 300 + b"1]}",
            ]
            answered, refused = [await server.exchange(post("/predict", body)) for body in sent]
            return status(answered), status(refused)

    assert asyncio.run(main()) == (200, 413)


@pytest.mark.parametrize("row", ["a" * 4097, {"text": "a" * 4097}])
def test_a_text_far_longer_than_the_student_reads_is_refused(student: Student, row: Any) -> None:
    async def main() -> tuple[bytes, int]:
        async with here(student) as server:
            long = await server.exchange(
                post("/predict", json.dumps({"inputs": ["a", row]}).encode())
            )
            return long, status(
                await server.exchange(
                    post("/predict", json.dumps({"inputs": ["a" * 4096]}).encode())
                )
            )

    long, longest = asyncio.run(main())
    assert status(long) == 413 and b"inputs.1 has 4097 characters; the limit is 4096" in long
    assert longest == 200


def test_a_body_whose_headers_came_before_the_stop_is_answered(student: Student) -> None:
    sent = post("/predict", b'{"inputs": ["a"]}')

    async def main() -> tuple[int, int]:
        async with here(student) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(sent[:-1])
            while not server.service.body_reader.bytes_in_flight:
                await asyncio.sleep(0.005)
            server.service.is_stopping = True
            writer.write(sent[-1:])
            before = await asyncio.wait_for(reader.read(), 20)
            writer.close()
            return status(before), status(await server.exchange(sent))

    assert asyncio.run(main()) == (200, 503)


def test_a_gigabyte_is_refused_without_being_read_whole(student: Student) -> None:
    async def main() -> list[tuple[int, int]]:
        async with here(student, max_body_kb=64) as server:
            found = []
            for chunked in (False, True):
                sent = 0

                async def gigabyte() -> AsyncIterator[bytes]:
                    nonlocal sent
                    while sent < GIGABYTE:
                        yield b"a" * 65536
                        sent += 65536

                length = {} if chunked else {"Content-Length": str(GIGABYTE)}
                async with (
                    aiohttp.ClientSession() as session,
                    session.post(
                        f"{server.url}/predict", data=gigabyte(), headers=length
                    ) as response,
                ):
                    found.append((response.status, sent))
            await lives(server)
            return found

    for got, sent in asyncio.run(main()):
        assert got == 413 and sent < 64 << 20


def test_a_length_that_lies_gets_a_4xx(student: Student) -> None:
    short = (
        b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 17\r\n\r\n{"inputs": ["a"]}'
        + b"x" * 100_000
    )
    long = b'POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{"inputs": ["a"]}'
    no_number = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n"
    two = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"

    async def main() -> list[list[int]]:
        async with here(student, body_s=0.2) as server:
            answers = [await server.exchange(sent) for sent in (short, long, no_number, two)]
            await lives(server)
            return [
                [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] for answer in answers
            ]

    # of the first, what follows the body is a request of its own, and none that can be read
    assert asyncio.run(main()) == [[200, 400], [408], [400], [400]]


def test_headers_that_are_too_long_or_never_end_close_the_connection(student: Student) -> None:
    async def main() -> tuple[bytes, bytes, bytes]:
        async with here(student, header_s=0.3) as server:
            long = await server.exchange(
                b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 40_000
            )
            slow = await server.exchange(
                b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-Slow: a\r\n" * 20, slowly=0.01
            )
            silent = await server.exchange(b"")
            await lives(server)
            return long, slow, silent

    long, slow, silent = asyncio.run(main())
    assert status(long) == 400
    assert slow == silent == b""


def test_a_slow_body_gets_a_408_while_others_are_answered(student: Student) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 400\r\n\r\n"

    async def main() -> tuple[bytes, bool]:
        async with here(student, body_s=0.5) as server:
            slow = asyncio.create_task(server.exchange(head + b" " * 300, slowly=0.01))
            await asyncio.sleep(0.1)
            await asyncio.wait_for(server.exchange(post("/predict", b'{"inputs": ["a"]}')), 10)
            return await slow, server.service.body_reader.bytes_in_flight == 0

    answer, free = asyncio.run(main())
    assert status(answer) == 408 and free


def test_a_client_that_takes_no_answer_is_dropped(student: Student) -> None:
    requests = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100

    async def main() -> tuple[int, int]:
        async with here(student, send_s=0.5) as server:
            connections = server.server.server_state.connections
            most, deadline = 0, time.monotonic() + 10
            with socket.create_connection(
                ("127.0.0.1", server.port)
            ) as deaf:  # which asks and never reads
                deaf.setblocking(False)
                while (not most or connections) and time.monotonic() < deadline:
                    with suppress(BlockingIOError, ConnectionError):
                        deaf.send(requests)
                    await asyncio.sleep(0.005)
                    most = max(most, len(connections))
                return most, len(connections)

    assert asyncio.run(main()) == (1, 0)


def test_all_bodies_together_take_no_more_than_their_room(student: Student) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n"

    async def main() -> tuple[int, list[int]]:
        async with here(student, max_body_kb=64, bodies_kb=64, body_s=1.0) as server:
            first = asyncio.create_task(server.exchange(head + b" " * 50_000))
            while server.service.body_reader.bytes_in_flight < 50_000:
                await asyncio.sleep(0.005)
            second = await server.exchange(post("/predict", b" " * 60_000))
            return status(second), [status(await first), server.service.body_reader.bytes_in_flight]

    assert asyncio.run(main()) == (429, [408, 0])


def test_of_a_body_that_waits_nothing_is_kept_that_the_student_does_not_read(
    student: Student,
) -> None:
    rows = json.dumps({"inputs": [{"text": "a", "more": [[] for _ in range(7_000)]}]}).encode()

    async def main() -> int:
        async with here(student) as server:
            go_on, model = threading.Event(), server.service.batcher

            def answer(items: Sequence[Item], how: GenerationOptions) -> list[Outcome]:
                go_on.wait(20)
                return server.service.model.answer(items, how)

            model._answer = answer
            gc.collect()
            before = len(gc.get_objects())
            waiting = [
                asyncio.create_task(server.exchange(post("/predict", rows))) for _ in range(4)
            ]
            while model.depth < 3:  # the first one is with the model
                await asyncio.sleep(0.01)
            kept = len(gc.get_objects()) - before
            go_on.set()
            assert [status(await one) for one in waiting] == [200] * 4
            return kept

    assert asyncio.run(main()) < 10_000


def test_without_the_token_nothing_but_health_is_answered(student: Student) -> None:
    async def main() -> dict[str, int]:
        async with here(student, token="correct-horse") as server:
            body = b'{"inputs": ["a"]}'
            sent = {
                "none": post("/predict", body),
                "another": post("/predict", body, "Authorization: Bearer wrong-horse"),
                "a beginning": post("/predict", body, "Authorization: Bearer correct"),
                "another kind": post("/predict", body, "Authorization: Basic correct-horse"),
                "not ASCII": post("/predict", body, "Authorization: Bearer \u00e9"),
                "metrics": b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
                "no such path": b"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
                "health": b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
                "the token": post("/predict", body, "Authorization: Bearer correct-horse"),
                "the token, shouted": post("/predict", body, "AUTHORIZATION: BEARER correct-horse"),
            }
            return {name: status(await server.exchange(one)) for name, one in sent.items()}

    found = asyncio.run(main())
    good = {name for name, got in found.items() if got == 200}
    assert good == {"health", "the token", "the token, shouted"}
    assert {got for name, got in found.items() if name not in good} == {401}


ELSEWHERE = {
    "Host: localhost": 200,
    "Host: LocalHost:8000": 200,
    "Host: 127.0.0.1:8000": 200,
    "Host: [::1]:8000": 200,
    "Host: localhost\r\nOrigin: http://127.0.0.1:3000": 200,
    "Host: evil.example": 403,
    "Host: localhost.evil.example:8000": 403,
    "Host: [::1": 403,
    "Host: 10.0.0.1": 403,
    "Host: localhost\r\nOrigin: https://evil.example": 403,
    "Host: localhost\r\nOrigin: null": 403,
}


def test_without_a_token_on_loopback_no_web_page_of_another_host_is_answered(
    student: Student,
) -> None:
    body = b'{"inputs": ["a"]}'

    async def main(local: bool) -> dict[str, int]:
        async with here(student, local=local) as server:
            sent = {
                name: post("/predict", body).replace(b"Host: x", name.encode())
                for name in ELSEWHERE
            }
            return {name: status(await server.exchange(one)) for name, one in sent.items()}

    assert asyncio.run(main(True)) == ELSEWHERE
    assert set(asyncio.run(main(False)).values()) == {200}


NOT_HERE = {
    "GET /nothing": 404,
    "GET /predict/": 404,
    "GET /redoc": 404,
    "GET /predict": 405,
    "DELETE /v1/models": 405,
    "POST /health": 405,
}


@pytest.mark.parametrize(("request_line", "expected"), NOT_HERE.items())
def test_an_unknown_path_is_a_404_and_a_wrong_method_a_405(
    student: Student, request_line: str, expected: int
) -> None:
    async def main() -> tuple[bytes, str]:
        async with here(student) as server:
            answer = await server.exchange(
                f"{request_line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
            )
            return answer, server.service.metrics.page(queued_rows=0, body_bytes=0, ready=True)

    answer, metrics = asyncio.run(main())
    assert (
        status(answer) == expected
        and json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    )
    assert "nothing" not in metrics and "redoc" not in metrics, (
        "clients must not make lines of metrics"
    )


def test_a_full_queue_is_a_429_that_says_when_to_come_back(student: Student) -> None:
    async def main() -> bytes:
        async with here(student, queue=3, max_rows=3, max_wait_ms=300.0) as server:
            first = asyncio.create_task(
                server.exchange(post("/predict", b'{"inputs": ["a", "b"]}'))
            )
            while server.service.batcher.depth < 2:
                await asyncio.sleep(0.005)
            refused = await server.exchange(post("/predict", b'{"inputs": ["a", "b"]}'))
            assert status(await first) == 200
            return refused

    refused = asyncio.run(main())
    assert status(refused) == 429 and b"retry-after: 1" in refused.lower()
