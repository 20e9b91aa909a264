"""A loopback server with the OpenAI Batch API: files, batches and their failures."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loopback import completion

Line = dict[str, Any]


class BatchServer:
    """``answer(body)`` returns a request's text, or (status, body) for a failure.

    A batch is done after it was polled ``polls`` times. ``expire`` selects requests that expire;
    ``refuse`` is the reason with which every batch fails. ``requests`` counts batched requests,
    ``online`` the others.
    """

    def __init__(
        self, answer: Callable[[dict[str, Any]], Any], polls: int = 1, refuse: str | None = None
    ) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.poll_counts: dict[str, int] = {}
        self.requests = 0
        self.online = 0
        self.expire: Callable[[dict[str, Any]], bool] = lambda body: False
        self._answer = answer
        self._polls = polls
        self._refuse = refuse
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path.endswith("/files"):
                    boundary = re.search(r"boundary=(\S+)", self.headers["Content-Type"])
                    assert boundary is not None
                    parts = data.split(b"--" + boundary.group(1).strip('"').encode())
                    content = next(
                        p.split(b"\r\n\r\n", 1)[1][:-2] for p in parts if b'name="file"' in p
                    )
                    name = f"file-{len(server.files)}"
                    server.files[name] = content
                    self.respond(
                        {
                            "id": name,
                            "object": "file",
                            "bytes": len(content),
                            "created_at": 0,
                            "filename": "f",
                            "purpose": "batch",
                        }
                    )
                elif self.path.endswith("/batches"):
                    self.respond(server.create(json.loads(data)))
                else:
                    server.online += 1
                    self.respond(completion(server._answer(json.loads(data))))

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path.endswith("/content"):
                    self.respond(server.files[path.split("/")[-2]])
                elif path.endswith("/batches"):
                    self.respond(
                        {"object": "list", "data": list(server.batches.values()), "has_more": False}
                    )
                else:
                    self.respond(server.poll(path.rpartition("/")[2]))

            def respond(self, value: Any) -> None:
                payload = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args: Any) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    def create(self, options: dict[str, Any]) -> dict[str, Any]:
        name = f"batch-{len(self.batches)}"
        self.poll_counts[name] = 0
        self.batches[name] = {
            "id": name, "object": "batch",
            "endpoint": options["endpoint"], "input_file_id": options["input_file_id"],
            "completion_window": options["completion_window"], "metadata": options.get("metadata"),
            "created_at": 0,
            "status": "in_progress", "errors": None, "output_file_id": None, "error_file_id": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }  # fmt: skip
        return self.batches[name]

    def poll(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        self.poll_counts[name] += 1
        if self.poll_counts[name] >= self._polls and batch["status"] == "in_progress":
            self.finish(name, batch)
        return batch

    def finish(self, name: str, batch: dict[str, Any]) -> None:
        if self._refuse:
            batch |= {
                "status": "failed",
                "errors": {"object": "list", "data": [{"message": self._refuse, "line": 1}]},
            }
            return
        done = []
        failed = []
        status = "completed"
        for line in map(json.loads, self.files[batch["input_file_id"]].decode().splitlines()):
            self.requests += 1
            if self.expire(line["body"]):
                failed.append(
                    {
                        "custom_id": line["custom_id"],
                        "response": None,
                        "error": {"code": "batch_expired"},
                    }
                )
                status = "expired"
                continue
            answer = self._answer(line["body"])
            code, body = (200, completion(answer)) if isinstance(answer, str) else answer
            target = done if code == 200 else failed
            target.append(
                {
                    "custom_id": line["custom_id"],
                    "response": {"status_code": code, "body": body},
                    "error": None,
                }
            )
        done.reverse()  # the order of the output is not that of the input
        for kind, lines in (("output", done), ("error", failed)):
            if lines:
                self.files[f"{name}-{kind}"] = "".join(
                    json.dumps(line) + "\n" for line in lines
                ).encode()
                batch[f"{kind}_file_id"] = f"{name}-{kind}"
        batch["status"] = status

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> BatchServer:
        self._thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self._server.shutdown()
        self._server.server_close()
