"""A loopback OpenAI-compatible server for tests: scripted, counting, and never mocked."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Scripted = tuple[int, dict[str, str], bytes]  # status, headers, body


def completion(text: str, *, finish_reason: str = "stop", chat: bool = True) -> dict[str, Any]:
    """The body of a 200 reply."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": "reply",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": "loopback",
        "choices": [choice],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    }


def question(body: dict[str, Any]) -> str:
    """The row's text in a request: the last message, or the whole prompt."""
    return str(body["messages"][-1]["content"] if "messages" in body else body["prompt"])


def read_rows(run: Path, split: str = "train") -> list[dict[str, Any]]:
    """The annotations that a run wrote."""
    path = run / "annotate" / f"{split}.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")]


class LoopbackServer:
    """``answer(body, number)`` returns the reply's text, or (status, headers, body) for another.

    ``received`` counts all requests by prompt, ``completed`` those whose 200 reply was written
    completely.
    """

    def __init__(
        self, answer: Callable[[dict[str, Any], int], str | Scripted], latency_s: float = 0.0
    ) -> None:
        self.received: Counter[str] = Counter()
        self.completed: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two packets

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(data) if data.startswith(b"{") else {"prompt": "an upload"}
                chat = "messages" in body
                prompt = json.dumps(body["messages"]) if chat else body["prompt"]
                with server._lock:
                    server.received[prompt] += 1
                    number = sum(server.received.values())
                    server.bodies.append(body)
                    server.keys.append(self.headers.get("Authorization"))
                time.sleep(latency_s)
                scripted = answer(body, number)
                if isinstance(scripted, str):
                    scripted = (200, {}, json.dumps(completion(scripted, chat=chat)).encode())
                status, headers, payload = scripted
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)
                self.wfile.flush()
                if status == 200:
                    with server._lock:
                        server.completed[prompt] += 1

            def log_message(self, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A killed client is not a failure."""

        self._server = Server(("127.0.0.1", 0), Handler)
        # It looks every 10 ms whether it is to stop; by default, every half second.
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def requests(self) -> int:
        return sum(self.received.values())

    def __enter__(self) -> LoopbackServer:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
