"""Pictures of the commands' output for the documentation: docs/images/{import,validate,…}.svg.

    python tools/terminal_images.py [docs/images]

Goes from a log of calls to a trained student with the rows of data/support, in a temporary folder.
The log's replies are made here: the team that the data give, and a sentence for it. Most calls have
one; a server on this machine answers for the others. Takes about two minutes on two cores.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
COLUMNS = 130
LINES = 34  # of a picture; what is longer is cut
SYSTEM = (
    "You route messages of an online shop to a team: billing, shipping, technical or account. "
    "Explain in one sentence, then write Answer: and the team."
)
REASONS = {
    "billing": "The customer asks about money that was charged.",
    "shipping": "The customer asks about a parcel.",
    "technical": "Something does not work.",
    "account": "The customer wants to change or open an account.",
}
WITHOUT_REPLY = 12  # every so many rows
STEPS = ["train.max_epochs=4", "train.methods=distill"]
SHOWN = {
    "import": ["import", "calls.jsonl", "--out", "tickets.jsonl"],
    "validate": ["validate", "tickets.yaml"],
    "annotate": ["annotate", "tickets.yaml"],
    "train": ["train", "tickets.yaml"],
    "eval": ["eval", "tickets.yaml", "eval.cascade.target=0.95"],
}


def support_rows() -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for split in ("train", "valid", "test"):
        with (ROOT / "data" / "support" / f"{split}.csv").open(encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


def completion(number: int, team: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": f"{REASONS[team]}\nAnswer: {team}"}
    return {
        "id": f"chatcmpl-{number:03}",
        "object": "chat.completion",
        "model": "gpt-6-luna",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 60, "completion_tokens": 15, "total_tokens": 75},
    }


def write_log(path: Path, rows: list[dict[str, str]]) -> None:
    """One object a call, as a program logs them."""
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(rows):
            messages = [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"Message: {row['text']}"},
            ]
            call = {
                "request": {"model": "gpt-6-luna", "messages": messages},
                "response": completion(number, row["team"]),
            }
            file.write(json.dumps(call) + "\n")


class Teacher(BaseHTTPRequestHandler):
    """Answers with the team of the message that a request contains."""

    teams: dict[str, str]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"].removeprefix("Message: ")
        data = json.dumps(completion(0, self.teams[text])).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_args: Any) -> None:
        pass


def without_some_replies(path: Path) -> None:
    """Take the reply from some rows, as if the log had lacked them."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows[::WITHOUT_REPLY]:
        del row["teacher"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(arguments: list[str], folder: Path) -> str:
    """The output of a command. Raises CalledProcessError."""
    env = os.environ | {"COLUMNS": str(COLUMNS), "OPENAI_API_KEY": "none"}
    ended = subprocess.run(
        [sys.executable, "-m", "dsbs", *arguments],
        cwd=folder,
        env=env,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ended.stdout


def draw(command: list[str], output: str, path: Path) -> None:
    """Write the end of a command's output as a picture of a terminal."""
    lines = [line for line in output.splitlines() if "about" not in line or " left" not in line]
    shown = [f"$ dsbs {' '.join(command)}", *lines[:LINES]]
    if len(lines) > LINES:
        shown.append("…")
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text("\n".join(shown)))
    svg = console.export_svg(title="", unique_id=path.stem)
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # fonts of another host
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    images = Path(arguments[0]) if arguments else IMAGES
    rows = support_rows()
    Teacher.teams = {row["text"]: row["team"] for row in rows}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Teacher)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hidden = ["--base-url", f"http://127.0.0.1:{server.server_port}/v1"]
    more = {"import": hidden, "train": STEPS, "eval": STEPS}  # not in the pictures
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder / "calls.jsonl", rows)
        for image, command in SHOWN.items():
            output = run([*command, *more.get(image, [])], folder)
            draw(command, output.replace(name, "."), images / f"{image}.svg")
            print(images / f"{image}.svg")
            if image == "import":
                without_some_replies(folder / "tickets.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
