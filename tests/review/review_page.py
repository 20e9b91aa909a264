"""A run with annotations to review, and `dsbs review` over it in a process of its own."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from conftest import start_dsbs, write_jsonl
from forked import Forked

from dsbs.config import Recipe
from dsbs.prompting import source_fingerprint
from dsbs.records import Annotation, Sample, TeacherName
from dsbs.records.reviews import Review, current_reviews, read_reviews
from dsbs.run_folder import RunFolder
from dsbs.tasks import make_task

LABELS = ["billing", "shipping", "account"]
HOSTILE = {
    1: "<script>document.title = 'taken'</script><img src=x onerror=alert(1)>",
    2: "\u202egnp.exe\u202c and \u2067שלום\u2069, a zero\u200bwidth space, a bell \x07",
    3: "word " * 4000,
}


def classification(folder: Path, rows: int = 12) -> RunFolder:
    """Short messages, the first of them hostile. Every fourth label differs from gold."""
    annotations = []
    for number in range(rows):
        gold = LABELS[number % 3]
        label = LABELS[(number + 1) % 3] if number % 4 == 3 else gold
        text = HOSTILE.get(number, f"Message {number} is about {gold}.")
        annotations.append(annotation(number, text, label, gold, f"Reason {number}: {text}"))
    return write_run(folder, {"name": "classification", "labels": LABELS}, annotations)


def annotation(
    number: int, text: str, label: str, gold: str | None, rationale: str | None = "So it is."
) -> Annotation:
    return Annotation(
        id=f"r{number}",
        input={"text": text},
        gold=gold,
        label=label,
        own_label=label,
        rationale=rationale,
        provenance="own",
        samples=[Sample(text=label, label=label, rationale=rationale)],
        vote_share=1.0,
        accepted=True,
        teacher=TeacherName(kind="human"),
    )


def write_run(folder: Path, task: dict[str, Any], annotations: Sequence[Annotation]) -> RunFolder:
    """A run whose annotation is finished; all rows are train rows."""
    path = str(folder.with_suffix(".jsonl"))
    data = {"train": path, "valid": path, "test": path}
    recipe = Recipe.model_validate(
        {"name": "sample", "task": task | {"data": data}, "teacher": {"kind": "human"}}
    )
    value = make_task(recipe.task).value
    rows = [
        {"id": row.id, "text": row.input["text"], "label": row.gold and value(row.gold)}
        for row in annotations
    ]
    write_jsonl(Path(path), rows)
    run = RunFolder(folder)
    with run.record("annotate", recipe, {}) as manifest:
        manifest["source"] = source_fingerprint(recipe, make_task(recipe.task))
    lines = [row.model_dump(mode="json", by_alias=True) for row in annotations]
    write_jsonl(run.annotations("train"), lines)
    return run


def decisions(run: RunFolder, reviewer: str = "ann") -> dict[str, Review]:
    """A reviewer's current decisions by row, as they are on disk."""
    reviews = read_reviews(run.reviews("train"))
    current = {row_id: current_reviews(of_row).get(reviewer) for row_id, of_row in reviews.items()}
    return {row_id: review for row_id, review in current.items() if review is not None}


class Page:
    """A running `dsbs review`; ``url`` has the token."""

    def __init__(self, process: Forked, url: str) -> None:
        self.process = process
        self.url = url
        self.host = urlsplit(url).netloc
        self.token = parse_qs(urlsplit(url).query)["token"][0]

    def request(
        self, path: str, form: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str, dict[str, str]]:
        """Status, body and headers of a request; its headers are exactly ``headers``."""
        connection = http.client.HTTPConnection(self.host, timeout=30)
        method = "GET" if form is None else "POST"
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        body = b"" if form is None else json.dumps(form).encode()
        for name, value in ({"Host": self.host} | (headers or {})).items():
            connection.putheader(name, value)
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, text, dict(response.getheaders())

    def sent_by_the_page(self) -> dict[str, str]:
        """The headers of a page's own requests."""
        _, html, headers = self.request(f"/?token={self.token}")
        boot = html.partition('id="boot">')[2].partition("</script>")[0]
        return {
            "Cookie": headers["set-cookie"].partition(";")[0],
            "Origin": f"http://{self.host}",
            "X-Dsbs-Review": json.loads(boot)["csrf"],
        }


@contextmanager
def reviewing(run: RunFolder, *options: str) -> Iterator[Page]:
    """`dsbs review` of a run, killed at the end."""
    process = start_dsbs(
        "review", str(run.path), "--json", "--reviewer", "ann", "--order", "file", *options
    )
    try:
        while "\n" not in process.stdout:
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        yield Page(process, json.loads(process.stdout)["url"])
    finally:
        process.kill()
        process.wait()
