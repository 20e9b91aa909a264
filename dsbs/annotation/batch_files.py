"""Batch files: requests in the OpenAI Batch format, and the replies in their output files.

Each batch is a folder ``annotate/batches/<number>/``: ``requests.jsonl`` as sent, ``keys.jsonl``
(which reply each line requests), ``batch.json`` (the batch's state, written before and after the
step that costs money), and ``output.jsonl`` and ``errors.jsonl`` as received.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsbs.annotation.annotator import (
    Annotator,
    estimated_tokens,
    max_requests_reached,
)
from dsbs.annotation.backends import (
    RejectedError,
    Reply,
    Request,
    TransientError,
    teacher_class,
)
from dsbs.annotation.backends.faults import error_body
from dsbs.annotation.backends.openai import OpenAIEndpoint
from dsbs.annotation.store import ReplyStore, RequestKeys, token_budget
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.files import atomic_write, canonical_json, open_text, read_jsonl, write_json
from dsbs.formatting import dollars
from dsbs.progress import Progress
from dsbs.records import Example
from dsbs.run_folder import RunFolder

_FILE_BYTES = 180 << 20  # of one batch file; providers accept 200 MB
_REFUSED_ALIKE = 16  # unclear refusals of one output, after which they are not taken as the rows'


@dataclass(frozen=True, slots=True)
class Pending:
    """A request without a stored reply, the key of its reply, and the body in the form in which the
    endpoint takes it.
    """

    key: str
    request: Request
    body: dict[str, Any]


class PendingRequests:
    """The requests that the rows still need, within the recipe's limits.

    Iterating may be repeated as replies arrive. A key in ``tried`` is left to the next command and
    counted in ``left_over``; ``stopped`` is the limit that ended the last iteration.
    """

    def __init__(self, annotator: Annotator, store: ReplyStore, tried: set[str]) -> None:
        self.annotator = annotator
        self.store = store
        self.tried = tried
        self.left_over = 0
        self.stopped: PartialError | None = None

    def __iter__(self) -> Iterator[Pending]:
        limits = self.annotator.recipe.annotate
        taken: set[str] = set()
        sent = len(self.tried)
        spent = 0.0
        if limits.max_usd is not None:
            spent = self.annotator.usd_spent(self.store)
        self.left_over = 0
        for split in limits.splits:
            for example in self.annotator.examples(split):
                for pending in self._of_row(example):
                    if pending.key in taken:
                        continue
                    if pending.key in self.tried:
                        self.left_over += 1
                        continue
                    cost = self._cost(pending)
                    if limits.max_requests is not None and sent >= limits.max_requests:
                        self.stopped = max_requests_reached(sent)
                        return
                    if limits.max_usd is not None and spent + cost > limits.max_usd:
                        self.stopped = PartialError(
                            "annotate.max_usd: a batch of the remaining requests might pass "
                            f"{dollars(limits.max_usd)}",
                            hint="raise the limit and run again: the replies so far are stored",
                        )
                        return
                    spent += cost
                    sent += 1
                    taken.add(pending.key)
                    yield pending

    def _cost(self, pending: Pending) -> float:
        """US dollars at most; 0 where the price is not known."""
        if self.annotator.price is None:
            return 0.0
        body = pending.request.body
        return self.annotator.price.of(estimated_tokens(body), token_budget(body), lane="batch")

    def _of_row(self, example: Example) -> Iterator[Pending]:
        """The missing requests of a row's next wave; later waves depend on its replies."""
        replies = self.annotator.first_replies(example)
        model = self.annotator.recipe.teacher.model
        adaptation = self.store.adaptation(self.annotator.identities[0], model)
        while requests := self.annotator.next_requests(example, replies):
            is_complete = True
            for request in requests:
                outcome = self.annotator.look_up(self.store, request)
                if outcome.reply is None and outcome.reason == "no-reply":
                    is_complete = False
                    yield Pending(outcome.key, request, adaptation.apply(request.body))
                else:
                    self.annotator.add_reply(example, replies, request, outcome)
            if not is_complete:
                return


@dataclass(slots=True)
class Output:
    """The contents of an output file: replies, failures that may not recur, and refusals.

    ``unclear`` are refusals that may be about all requests, by key. ``error`` is the first one that
    is about the account or the recipe.
    """

    replies: int = 0
    failures: int = 0
    unclear: dict[str, str] = field(default_factory=dict)
    error: DsbsError | None = None


class Batch:
    """One batch folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.record: dict[str, Any] = json.loads(
            (folder / "batch.json").read_text(encoding="utf-8")
        )

    @property
    def state(self) -> str:
        return str(self.record["state"])

    def update(self, **changes: Any) -> None:
        self.record |= changes
        write_json(self.folder / "batch.json", self.record)

    def rows(self) -> list[dict[str, Any]]:
        """What each line requests."""
        return [row for _, row in read_jsonl(self.folder / "keys.jsonl")]

    def _first_body(self) -> dict[str, Any]:
        with (self.folder / "requests.jsonl").open(encoding="utf-8") as lines:
            body: dict[str, Any] = json.loads(next(lines, '{"body": {}}'))["body"]
        return body

    def store_replies(self, path: Path, store: ReplyStore, endpoint: OpenAIEndpoint) -> Output:
        """Commit what is in an output file."""
        rows = self.rows()
        output = Output()
        sent = self._first_body()
        for line in _output_lines(path):
            if line is None:
                output.failures += 1
                continue
            token, _, number = str(line.get("custom_id", "")).rpartition("-")
            if token != self.record["token"] or not number.isdigit() or int(number) >= len(rows):
                continue  # of another batch: a server may write all outputs into one file
            self._store_outcome(_outcome(line, endpoint, sent), rows[int(number)], store, output)
        self._settle(output, store, rows[0]["model"] if rows else None)
        return output

    def _store_outcome(
        self, outcome: Reply | Exception, row: dict[str, Any], store: ReplyStore, output: Output
    ) -> None:
        """Commit a line's reply, refusal or failure, and count it in ``output``."""
        key = row["key"]
        if isinstance(outcome, Reply) and store.has_reply(key, outcome.raw):  # read again
            output.replies += outcome.failure is None
            output.failures += outcome.failure is not None
            return
        if isinstance(outcome, Reply) and outcome.failure is not None:
            failure = outcome.failure
            is_empty = isinstance(failure, TransientError) and failure.kind == "empty"
            if is_empty and store.look_up(RequestKeys([key], []), row["max_tokens"]).wasted:
                outcome = replace(outcome, failure=None)  # for the second time: that is the answer
            else:
                store.waste(key, str(failure), outcome)
                outcome = failure
        if isinstance(outcome, Reply):
            output.replies += 1
            store.put(
                key,
                row["max_tokens"],
                self.record["identity"],
                row["model"],
                row["sample"],
                outcome,
            )
        elif isinstance(outcome, RejectedError):
            if outcome.blame in ("row", "content"):
                store.refuse(key, str(outcome))
            else:
                output.unclear[key] = str(outcome)
        else:
            output.failures += 1
            store.fail(key, str(outcome))
            if isinstance(outcome, DsbsError):
                output.error = output.error or outcome

    def _settle(self, output: Output, store: ReplyStore, model: str | None) -> None:
        """Keep the unclear refusals as the rows' if they are few, and others were answered."""
        messages = list(output.unclear.values())
        has_answers = output.replies > 0 or store.has_replies([self.record["identity"]], model)
        if has_answers and len(messages) < _REFUSED_ALIKE:
            for key, message in output.unclear.items():
                store.refuse(key, message)
            return
        output.failures += len(messages)
        for key, message in output.unclear.items():
            store.fail(key, message)
        if messages and output.error is None:
            output.error = PartialError(
                f"{len(messages)} requests of the batch were refused: {messages[-1]}",
                hint="they were not kept as refused: run the same command again when that is "
                "settled, or without --batch to learn which rows are at fault",
            )


def _outcome(
    line: dict[str, Any], endpoint: OpenAIEndpoint, sent: dict[str, Any]
) -> Reply | Exception:
    """A line's reply, or the error that it stands for; ``sent`` has the parameters of all lines."""
    response = line.get("response") or {}
    body = response.get("body", response)  # older servers do not wrap the body
    status = response.get("status_code")
    if not body:
        return endpoint.error(status or None, error_body(line.get("error")), {})
    text = body if isinstance(body, str) else json.dumps(body)
    if isinstance(status, int) and status >= 300:
        if endpoint.adaptation.learn(status, text.encode(), sent, sent):
            return TransientError("a parameter was refused and is adapted", "server error")
        return endpoint.status_error(status, text, {})
    try:
        return endpoint.read_reply(text, {}, lane="batch")
    except (TransientError, RejectedError, DsbsError) as error:
        return error


def _output_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines of an output file; None for one that is not a JSON object: the rest is paid for."""
    with open_text(path) as file:
        for text in file:
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            yield line if isinstance(line, dict) else None


def write_batches(
    annotator: Annotator, requests: Iterable[Pending], folder: Path, state: str = "prepared"
) -> list[Batch]:
    """Write requests into batch folders with the given state.

    A folder whose writing was interrupted has no batch.json, and is written again.
    """
    batches: list[Batch] = []
    rows = iter(requests)
    first = next(rows, None)
    while first is not None:
        batch_folder = folder / f"{len(batch_folders(folder)) + 1:04d}"
        first = _write_batch(annotator, first, rows, batch_folder, state)
        batches.append(Batch(batch_folder))
    return batches


def _write_batch(
    annotator: Annotator, first: Pending, rows: Iterator[Pending], folder: Path, state: str
) -> Pending | None:
    """Write one batch; returns the first request that does not fit into it, or None."""
    teacher = annotator.recipe.teacher
    token = f"dsbs-{uuid.uuid4().hex[:16]}"
    lines = 0
    size = 0
    pending: Pending | None = first
    with (
        atomic_write(folder / "requests.jsonl") as requests,
        atomic_write(folder / "keys.jsonl") as keys,
    ):
        while pending is not None:
            if lines >= annotator.recipe.annotate.batch.max_requests or size >= _FILE_BYTES:
                break
            text = canonical_json(
                {
                    "custom_id": f"{token}-{lines}",
                    "method": "POST",
                    "url": url_path(annotator),
                    "body": pending.body,
                }
            )
            requests.write(text + "\n")
            row = {
                "key": pending.key,
                "sample": pending.request.sample,
                "max_tokens": token_budget(pending.request.body),
                "model": pending.request.body.get("model"),
            }
            keys.write(canonical_json(row) + "\n")
            size += len(text.encode()) + 1
            lines += 1
            pending = next(rows, None)
    record = {
        "state": state,
        "token": token,
        "requests": lines,
        "identity": annotator.identities[0],
        "base_url": teacher.served_by[0].base_url,
        "file_id": None,
        "batch_id": None,
        "status": None,
    }
    write_json(folder / "batch.json", record)
    return pending


def batches_folder(run: RunFolder) -> Path:
    return run.stage("annotate") / "batches"


def batch_folders(folder: Path) -> list[Path]:
    """The batch folders that were written completely."""
    return sorted(path.parent for path in folder.glob("*/batch.json"))


def url_path(annotator: Annotator) -> str:
    if annotator.recipe.teacher.endpoint == "chat":
        return "/v1/chat/completions"
    return "/v1/completions"


# --- a file for a server that runs it elsewhere


def export(annotator: Annotator, store: ReplyStore, run: RunFolder, path: Path) -> int:
    """Write all requests that the rows need to one file in the OpenAI Batch format.

    Returns the number of requests. Raises UserError, and PartialError where a limit ends it early.
    """
    check_teacher(annotator)
    if path.exists():
        raise UserError(f"{path} exists already", hint="name another file, or move it away")
    pending = PendingRequests(annotator, store, set())
    with atomic_write(path) as file:  # first, because the path may not be writable
        batches = write_batches(annotator, pending, batches_folder(run), "exported")
        for batch in batches:
            with (batch.folder / "requests.jsonl").open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    file.write(line)
    if pending.stopped is not None:
        raise pending.stopped
    return sum(batch.record["requests"] for batch in batches)


def import_output(
    annotator: Annotator, store: ReplyStore, run: RunFolder, path: Path, progress: Progress
) -> Output:
    """Commit the replies in an output file to the requests exported before.

    Raises UserError, and DsbsError where there is none.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist", hint="give the output file of `vllm run-batch`")
    batches = map(Batch, batch_folders(batches_folder(run)))
    exported = [batch for batch in batches if batch.state == "exported"]
    teacher = annotator.recipe.teacher
    endpoint = OpenAIEndpoint(teacher, teacher.served_by[0], None, annotator.identities[0])
    store.adapt(endpoint, teacher.model, progress.say)
    total = Output()
    for batch in exported:
        output = batch.store_replies(path, store, endpoint)
        total.replies += output.replies
        total.failures += output.failures
        total.error = total.error or output.error
    if not total.replies:
        raise total.error or DsbsError(
            f"{path} has no reply to a request that was exported from this run",
            hint="give the output file of `vllm run-batch` for the file that --batch-export wrote",
        )
    return total


def check_teacher(annotator: Annotator) -> None:
    kind = annotator.recipe.teacher.kind
    if not teacher_class(kind).takes_batches:
        raise UserError(f"a {kind} teacher does not support batches", hint="run without --batch")
