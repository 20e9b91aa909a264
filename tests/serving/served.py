"""Servers for tests, over a tiny student: in a process of their own or in the test's event loop."""

from __future__ import annotations

import asyncio
import atexit
import json
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conftest import TEAMS, start_dsbs, toy_rows
from forked import Forked

from dsbs.config import DataSection, TaskSection
from dsbs.serving.app import HttpServer, Service, make_app
from dsbs.serving.cascade import Cascade
from dsbs.serving.model import Model
from dsbs.serving.settings import Settings
from dsbs.students.card import StudentCard, Target
from dsbs.students.student import Student
from dsbs.students.tokenizer import learn_vocabulary

RATIONALES = {
    "billing": "The message is about an invoice.",
    "shipping": "The message is about a parcel.",
}
TASK = TaskSection(
    name="classification",
    labels=TEAMS,
    columns={"label": "team"},
    data=DataSection(train="train.csv"),
)
CQA = TaskSection(name="cqa", data=DataSection(train="train.csv"))
BOTH: dict[Target, str] = {"label": "predict: ", "rationale": "explain: "}


def made(prefixes: dict[Target, str], task: TaskSection = TASK) -> Student:
    """A student with random weights, smaller than any that is trained for use."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    rows = toy_rows(80)
    tokenizer = learn_vocabulary(
        [*(row["text"] for row in rows), *TEAMS, *RATIONALES.values(), "Answer: predict: explain:"],
        200,
    )
    card = StudentCard(
        name="toy-student",
        method="step-by-step",
        labels="gold",
        seed=0,
        task=task,
        prefixes=prefixes,
        max_input_tokens=64,
        max_target_tokens=32,
    )
    shape = {
        "d_model": 64,
        "d_kv": 16,
        "num_heads": 4,
        "d_ff": 128,
        "num_layers": 1,
        "dropout_rate": 0.0,
    }
    marks = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": 0,
    }
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **shape, **marks))
    return Student.of(model, tokenizer, card)


@cache
def taught() -> Path:
    """The folder of a student that fits the toy rows. Removed when the process ends."""
    import torch

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    student = made(BOTH)
    model, tokenizer = student.backend.model, student.backend.tokenizer
    rows = toy_rows(16)
    texts = [f"predict: {row['text']}" for row in rows] + [
        f"explain: {row['text']}" for row in rows
    ]
    inputs = tokenizer(texts, padding=True, return_tensors="pt")
    targets = tokenizer(
        [row["team"] for row in rows] + [RATIONALES[row["team"]] for row in rows], padding=True
    )["input_ids"]
    wanted = torch.tensor(targets)
    wanted[wanted == tokenizer.pad_token_id] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(300):
        loss = model(**inputs, labels=wanted).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    student.save(folder)
    return folder


@contextmanager
def in_process(
    student: Path, *options: str, env: dict[str, str] | None = None
) -> Iterator[tuple[str, Forked]]:
    """`dsbs serve`: its URL and its process, killed at the end."""
    process = start_dsbs("serve", str(student), "--port", "0", "--json", *options, env=env)
    try:
        while "\n" not in process.stdout:
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        told = json.loads(process.stdout)
        assert told["pid"] == process.pid
        yield told["url"], process
    finally:
        process.kill()
        process.wait()


def stopped(process: Forked, number: signal.Signals = signal.SIGTERM) -> tuple[int | None, str]:
    """Exit code and stderr of a server that is told to stop."""
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    return process.returncode, said


class Here:
    """A server in this event loop."""

    def __init__(self, url: str, service: Service, server: HttpServer) -> None:
        self.url, self.service, self.server = url, service, server
        self.port = urlsplit(url).port or 0

    async def exchange(self, sent: bytes, *, slowly: float = 0.0) -> bytes:
        """Everything that comes back on a connection of its own, until the server closes it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        came: list[bytes] = []

        async def read() -> None:
            with suppress(ConnectionError):
                while part := await reader.read(65536):
                    came.append(part)

        reading = asyncio.create_task(
            read()
        )  # at once: what was said before a reset is lost to who reads later
        with suppress(ConnectionError):
            for piece in [sent[i : i + 1] for i in range(len(sent))] if slowly else [sent]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(slowly)
        await asyncio.wait_for(reading, 20)
        writer.close()
        return b"".join(came)


@asynccontextmanager
async def here(
    student: Student,
    token: str | None = None,
    *,
    local: bool = False,
    cascade: Cascade | None = None,
    **settings: Any,
) -> AsyncIterator[Here]:
    chosen = Settings(**settings)
    threshold = None if cascade is None else cascade.threshold
    service = Service(
        Model(student, chosen, threshold, finds_novel=cascade is not None), chosen, cascade
    )
    bound = socket.create_server(("127.0.0.1", 0))
    ready = asyncio.Event()
    server = HttpServer(make_app(service, token, local=local), service, ready.set)
    running = asyncio.create_task(server.serve(sockets=[bound]))
    try:
        await asyncio.wait(
            {running, asyncio.create_task(ready.wait())}, return_when=asyncio.FIRST_COMPLETED
        )
        yield Here(f"http://127.0.0.1:{bound.getsockname()[1]}", service, server)
    finally:
        server.should_exit = True
        await running
        bound.close()
