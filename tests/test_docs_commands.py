"""Documentation: every command of every page runs, on a small run in place of the page's own."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from conftest import (
    ROOT,
    TEAMS,
    good_answer,
    run_dsbs,
    run_python,
    start_dsbs,
    toy_rows,
    write_csv,
    write_jsonl,
)
from encoder_models import encoder, word_tokenizer
from forked import Forked
from loopback import LoopbackServer

DOCS = ROOT / "docs"
FLAGS = re.MULTILINE | re.DOTALL
BLOCK = re.compile(r"^```sh\n(.*?)^```", FLAGS)
PORT = "8000"  # of the servers that the pages start
# A tiny encoder, which learns the rows in seconds.
STUDENT = {"model": "encoder", "max_input_tokens": 32, "max_target_tokens": 16}
TRAINING = {"learning_rate": 0.01, "batch_size": 8, "max_steps": 40, "eval_every": 20}
# Commands that are not run here, by how they begin, and why.
NOT_RUN = {
    "tensorboard ": "serves until it is stopped",
    "torchrun ": "several processes; tests/training runs two",
    "accelerate launch": "several processes; tests/training runs two",
    "dsbs annotate recipes/svamp.yaml": "its rows are not here; tests/test_real_data.py reads them",
    "make ": "installs, or runs for minutes; `make demo` and `make test` are run on a clean clone",
    "docker ": "needs Docker; tests/serving/test_image.py checks the file",
    "pip install": "installs",
    "python benchmarks/": "tests/test_benchmarks.py runs every benchmark",
    "dsbs predict STUDENT rows.jsonl --engine ray": "tests/students runs it on a local cluster",
    "MLFLOW_TRACKING_URI=": "needs a server; tests/training has a tracker of its own",
    "dsbs push runs/tickets/train/step-by-step-gold-s0/export": "uploads; its dry run is run",
    "mkdir ": "the test has a folder of its own",
    "cp ../prompts": "the test's recipe needs no prompt",
    "(cat ../data": "the test's rows are in its folder",
    ". .venv": "the test has its Python",
}


def commands(page: Path) -> list[str]:
    """The commands of a page's shell blocks, without comments."""
    lines = "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))
    joined = lines.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip(" \t#")]


PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if commands(page)]


@dataclass
class Desk:
    """A folder with the files that the pages name, and a teacher on loopback."""

    folder: Path
    port: str
    servers: list[Forked] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)

    def run(self, command: str) -> None:
        """Run one line: ``[NAME=VALUE] [echo TEXT |] program ARGUMENTS [> FILE]``."""
        words = shlex.split(command, comments=True)
        words = [self._with_names(word) for word in words]
        if words[0] == "export":
            return  # the keys of the test's environment are set already
        if words[0] == "curl":
            self._fetch(words)
            return
        text = ""
        if "|" in words:
            bar = words.index("|")
            assert words[0] == "echo", command
            text, words = words[1] + "\n", words[bar + 1 :]
        output = None
        if ">" in words:
            output, words = self.folder / words[-1], words[: words.index(">")]
        assert words[0] == "dsbs", f"write down how to run it: {command}"
        if words[1] == "import":  # beside the recipe of the desk
            words = [word.replace("tickets.jsonl", "imported.jsonl") for word in words]
            words.append("--overwrite")
        if words[1] in ("serve", "review") and "csv" not in command:
            self._start(words[1:])
            return
        ended = run_dsbs(*words[1:], cwd=self.folder, env=self.env, input=text)
        passed = (0, 4) if "--min-" in command else (0,)  # 4: below a gate
        assert ended.returncode in passed, f"{command}\n{ended.stderr[-2000:]}"
        if words[1] == "import":
            self.run("dsbs validate imported.yaml")
        if output is not None:
            output.write_text(ended.stdout, encoding="utf-8")

    def write_blocks(self, page: Path) -> None:
        """The recipes and prompts that a page shows whole, by the name that they give."""
        for text in re.findall(r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), FLAGS):
            if name := re.match(r"name: (\S+)\n|# (\S+)\.yaml", text):
                shown = yaml.safe_load(text.replace(f":{PORT}", f":{self.port}"))
                if "task" in shown:
                    shown |= {"student": STUDENT, "train": shown.get("train", {}) | TRAINING}
                path = self.folder / f"{name[1] or name[2]}.yaml"
                path.write_text(yaml.safe_dump(shown), encoding="utf-8")

    def stop(self) -> None:
        for server in self.servers:
            server.kill()
            server.wait(10)
        self.servers.clear()

    def _with_names(self, word: str) -> str:
        student = "runs/tickets/train/step-by-step-gold-s0"
        word = re.sub(r"\bSTUDENT\b", student, word).replace(f":{PORT}", f":{self.port}")
        return word.replace("runs/demo", "runs/tickets")

    def _start(self, words: list[str]) -> None:
        self.stop()
        words = [word for word in words if word not in ("--port", PORT)]
        server = start_dsbs(*words, "--port", self.port, cwd=self.folder, env=self.env)
        self.servers.append(server)
        while True:
            assert server.poll() is None, server.stderr
            try:
                socket.create_connection(("127.0.0.1", int(self.port)), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        if words[0] == "serve":  # somebody uses it
            row = json.dumps({"inputs": ["My parcel is here."]})
            self._fetch([f"http://127.0.0.1:{self.port}/predict", "-d", row])

    def _fetch(self, words: list[str]) -> None:
        url = next(word for word in words if word.startswith("http"))
        data = words[words.index("-d") + 1].encode() if "-d" in words else None
        request = urllib.request.Request(
            url, data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def small_recipe(teacher: str) -> dict[str, object]:
    """The recipe `tickets`."""
    return {
        "task": {
            "name": "classification",
            "labels": list(TEAMS),
            "columns": {"label": "team"},
            "data": {"train": "tickets.csv", "test_fraction": 0.3},
        },
        "teacher": {"model": "large", "base_url": teacher, "price": {"input": 1, "output": 1}},
        "student": STUDENT,
        "train": TRAINING,
        "eval": {"latency_calls": 1, "cascade": {"target": 0.9}},
    }


def write_recipes(folder: Path, teacher: str) -> None:
    """The recipes that commands name: `tickets`, those of the pages, and those that are shipped."""
    (folder / "tickets.yaml").write_text(yaml.safe_dump(small_recipe(teacher)), encoding="utf-8")
    shutil.copy(folder / "tickets.yaml", folder / "recipe.yaml")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for path in (folder / "recipes" / "teachers").glob("*.yaml"):
        section = yaml.safe_load(path.read_text(encoding="utf-8"))
        section["teacher"] |= {"base_url": teacher, "api_key_env": "OPENAI_API_KEY"}
        path.write_text(yaml.safe_dump(section), encoding="utf-8")


def write_data(folder: Path) -> None:
    rows = toy_rows(60)
    calls = [
        {"model": "large", "messages": [{"role": "user", "content": row["text"]},
                      {"role": "assistant", "content": good_answer({"prompt": row["text"]}, 0)}]}
        for row in rows
    ]  # fmt: skip
    for name in ("calls", "batch_input", "batch_output"):
        write_jsonl(folder / f"{name}.jsonl", calls)
    (folder / "logs").mkdir()
    write_jsonl(folder / "logs" / "calls.jsonl", calls)
    write_csv(folder / "tickets.csv", rows)
    inputs = [{"id": row["id"], "input": {"text": row["text"]}} for row in rows]
    write_csv(folder / "rows.csv", rows[:5])
    write_jsonl(folder / "rows.jsonl", inputs[:5])
    datasets = importlib.import_module("pyarrow.parquet")
    arrow = importlib.import_module("pyarrow")
    datasets.write_table(arrow.Table.from_pylist(rows[:5]), folder / "rows.parquet")
    write_jsonl(folder / "test.jsonl", inputs)
    write_jsonl(folder / "tickets-unlabeled.jsonl", inputs[:40])
    labels = [{**row, "label": toy["team"]} for row, toy in zip(inputs, rows, strict=True)]
    write_jsonl(folder / "tickets-test.jsonl", labels[40:])
    tokenizer = word_tokenizer("The message is about an invoice. a parcel.")
    tokenizer.save_pretrained(folder / "encoder")
    encoder("bert", len(tokenizer)).save_pretrained(folder / "encoder")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """The run `tickets`, all stages done, with the files that the pages' commands name."""
    folder = tmp_path_factory.mktemp("desk")
    write_data(folder)
    with LoopbackServer(good_answer) as teacher:
        write_recipes(folder, teacher.url)
        made = Desk(folder, free_port(), env={"OPENAI_API_KEY": "sk-none", "HF_TOKEN": "none"})
        made.run("dsbs run tickets.yaml")
        made.run("dsbs annotate recipe.yaml")
        yield made
        made.stop()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs(page: Path, desk: Desk) -> None:
    desk.write_blocks(page)
    desk.run("dsbs run tickets.yaml")  # an earlier page may have left another teacher or data
    for command in commands(page):
        if not any(command.startswith(start) for start in NOT_RUN):
            desk.run(command)
    desk.stop()


@pytest.mark.parametrize("name", ["importing", "reviewing"])
def test_the_python_of_a_page_runs(name: str, desk: Desk, tmp_path: Path) -> None:
    desk.run("dsbs run tickets.yaml")
    folder = desk.folder
    if name == "importing":  # into a folder without the desk's recipe
        folder = tmp_path
        shutil.copytree(desk.folder / "logs", folder / "logs")
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, FLAGS)
    (folder / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    ended = run_python("page.py", cwd=folder, env=desk.env | {"PYTHONPATH": str(ROOT)})
    assert blocks and ended.returncode == 0, ended.stderr


def test_what_is_not_run_is_still_on_a_page() -> None:
    lines = [command for page in PAGES for command in commands(page)]
    unused = [start for start in NOT_RUN if not any(line.startswith(start) for line in lines)]
    assert unused == []
