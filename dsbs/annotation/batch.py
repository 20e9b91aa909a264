"""The batch lane: requests in the OpenAI Batch format, uploaded and waited for, or written to a file for `vllm run-batch`.

Each batch is a folder ``annotate/batches/<number>/``: ``requests.jsonl`` as sent, ``keys.jsonl`` (which reply a line asks for),
``batch.json`` (how far it has come, written before and after the step that costs), and ``output.jsonl`` and
``errors.jsonl`` as they came. A kill at any moment costs no reply and submits nothing twice.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.annotation.annotator import Annotator, Answers
from dsbs.annotation.backends import identities
from dsbs.annotation.backends.base import Request, TransientError
from dsbs.annotation.backends.openai import api_key, error_of, read_reply
from dsbs.annotation.deriving import look_up, spent_before
from dsbs.annotation.store import ReplyStore, budget
from dsbs.annotation.summary import SplitSummary
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.files import atomic_write, canonical_json, open_text, read_jsonl, write_json
from dsbs.progress import Progress, running

_FILE_BYTES = 180 << 20  # of one batch file; providers take 200 MB
_ENDED = ("completed", "failed", "expired", "cancelled")
_REFUSED = (400, 413, 422)  # final answers to one request; other failures may heal in another batch


@dataclass(frozen=True, slots=True)
class Pending:
    """One request that the store has no reply to, and the key of the reply."""

    key: str
    request: Request


class PendingRequests:
    """What the rows lack, within the recipe's limits; a request that was ``tried`` is left to the next command."""

    def __init__(self, work: Annotator, store: ReplyStore, tried: set[str]) -> None:
        self.work, self.store, self.tried = work, store, tried
        self.left_over = 0
        self.stopped: PartialError | None = None

    def __iter__(self) -> Iterator[Pending]:
        work, limits = self.work, self.work.recipe.annotate
        names = identities(work.recipe)
        taken: set[str] = set()
        spent, sent = (
            spent_before(work, self.store) if limits.max_usd is not None else 0.0,
            len(self.tried),
        )
        self.left_over = 0
        for split in limits.splits:
            for example in work.examples(split):
                for one in self._of(example, names):
                    if one.key in taken:
                        continue
                    if one.key in self.tried:
                        self.left_over += 1
                        continue
                    cost = 0.0
                    if work.price is not None:
                        body = one.request.body
                        cost = work.price.of(
                            len(canonical_json(body)) // 4, budget(body), lane="batch"
                        )
                    if limits.max_requests is not None and sent >= limits.max_requests:
                        self.stopped = PartialError(
                            f"annotate.max_requests: {sent} requests were sent",
                            hint="run the same command for as many more",
                        )
                        return
                    if limits.max_usd is not None and spent + cost > limits.max_usd:
                        self.stopped = PartialError(
                            f"annotate.max_usd: {limits.max_usd:g} dollars would be passed by a batch of the rest",
                            hint="raise the limit and run again: what was bought is kept",
                        )
                        return
                    spent, sent = spent + cost, sent + 1
                    taken.add(one.key)
                    yield one

    def _of(self, example: Any, names: list[str]) -> Iterator[Pending]:
        """A row's next wave, as far as it is not there; what comes after it depends on it."""
        answers = Answers()
        while wave := self.work.wanted(example, answers):
            missing = False
            for request in wave:
                key, outcome = look_up(self.work, self.store, request, names)
                if outcome == "no-reply":
                    missing = True
                    yield Pending(key, request)
                else:
                    self.work.add(example, answers, request, key, outcome)
            if missing:
                return


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

    def note(self, **changes: Any) -> None:
        self.record |= changes
        write_json(self.folder / "batch.json", self.record)

    def asked_for(self) -> list[dict[str, Any]]:
        return [row for _, row in read_jsonl(self.folder / "keys.jsonl")]

    def take(self, path: Path, store: ReplyStore) -> tuple[int, int]:
        """Commit the replies of output lines. Returns how many there were, and how many failed in a way that may heal."""
        keys = self.asked_for()
        taken = failed = 0
        for line in _outputs(path):
            if line is None:
                failed += 1
                continue
            token, _, number = str(line.get("custom_id", "")).rpartition("-")
            if token != self.record["token"] or not number.isdigit() or int(number) >= len(keys):
                continue  # of another batch: a server may write all of its outputs into one file
            asked = keys[int(number)]
            response = line.get("response") or {}
            body, status = (
                response.get("body", response),
                response.get("status_code"),
            )  # older servers wrap nothing
            if status in (None, 200, 0) and isinstance(body, dict) and "choices" in body:
                try:
                    reply = read_reply(body, json.dumps(body), lane="batch")
                except TransientError:
                    failed += 1
                    continue
                store.put(
                    asked["key"],
                    asked["max_tokens"],
                    self.record["identity"],
                    asked["model"],
                    asked["sample"],
                    reply,
                )
                taken += 1
            elif status in _REFUSED and isinstance(
                body, dict
            ):  # without a body, it was the server's own accident
                store.refuse(asked["key"], f"HTTP {status}: {error_of(json.dumps(body))[0]}"[:300])
            else:
                failed += 1
        return taken, failed


def _outputs(path: Path) -> Iterator[dict[str, Any] | None]:
    """The lines of an output file; None for one that is no JSON object: its neighbours are paid for."""
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
    work: Annotator, gathering: Iterable[Pending], folder: Path, state: str = "prepared"
) -> list[Batch]:
    """Cut what is lacking into batch folders in the given state. One whose writing was cut short is begun anew."""
    made: list[Batch] = []
    rows = iter(gathering)
    one = next(rows, None)
    while one is not None:
        number = len(_folders(folder)) + 1
        here = folder / f"{number:04d}"
        token = f"dsbs-{uuid.uuid4().hex[:16]}"
        lines = written = 0
        with (
            atomic_write(here / "requests.jsonl") as requests,
            atomic_write(here / "keys.jsonl") as keys,
        ):
            while (
                one is not None
                and lines < work.recipe.annotate.batch.max_requests
                and written < _FILE_BYTES
            ):
                body = one.request.body
                text = canonical_json(
                    {
                        "custom_id": f"{token}-{lines}",
                        "method": "POST",
                        "url": _path(work),
                        "body": body,
                    }
                )
                requests.write(text + "\n")
                key = {
                    "key": one.key,
                    "sample": one.request.sample,
                    "max_tokens": budget(body),
                    "model": body.get("model"),
                }
                keys.write(canonical_json(key) + "\n")
                written += len(text.encode()) + 1
                lines += 1
                one = next(rows, None)
        write_json(
            here / "batch.json",
            {
                "state": state,
                "token": token,
                "requests": lines,
                "identity": identities(work.recipe)[0],
                "base_url": work.recipe.teacher.served_by[0].base_url,
                "file_id": None,
                "batch_id": None,
                "status": None,
            },
        )
        made.append(Batch(here))
    return made


def _folders(folder: Path) -> list[Path]:
    """The batch folders that were written to the end."""
    return sorted(path.parent for path in folder.glob("*/batch.json")) if folder.is_dir() else []


def _path(work: Annotator) -> str:
    return "/v1/chat/completions" if work.recipe.teacher.endpoint == "chat" else "/v1/completions"


# --- an endpoint that takes batches


def buy_batches(
    work: Annotator,
    store: ReplyStore,
    folder: Path,
    progress: Progress,
    summaries: Mapping[str, SplitSummary],
) -> PartialError | None:
    """Submit what the rows lack, wait, take the replies; again while replies call for more (samples, hints).

    Batches that an earlier command submitted are waited for first. What failed or expired is left to the next command, with
    ``--batch`` or without. Returns the reason where something is left over. Raises DsbsError.
    """
    _need_openai(work)
    provider = _Provider(work, progress)
    summary = next(iter(summaries.values()))
    began = time.monotonic()
    waiting = _still_open(folder, provider, progress)
    tried: set[str] = set()
    gathering = PendingRequests(work, store, tried)
    while True:
        if not waiting:
            waiting = write_batches(work, gathering, folder)
        if not waiting:
            break
        for batch in waiting:
            if batch.state == "prepared":
                provider.submit(batch)
        for batch in waiting:
            summary.requests += batch.record["requests"]
            tried.update(asked["key"] for asked in batch.asked_for())
            provider.wait(batch)
            _, failed = provider.collect(batch, store)
            if failed:
                summary.wasted["batch"] += failed
        waiting = []
    summary.wall_s += time.monotonic() - began
    if gathering.left_over and gathering.stopped is None:
        return PartialError(
            f"{gathering.left_over} requests came back from their batch without a reply (failed or expired)",
            hint="run with --batch for another batch of these alone, or without it to ask for them online",
        )
    return gathering.stopped


def _still_open(folder: Path, provider: _Provider, progress: Progress) -> list[Batch]:
    """The batches of earlier commands that the recipe's endpoint has and whose replies are not in yet."""
    waiting: list[Batch] = []
    for batch in map(Batch, _folders(folder)):
        if (
            batch.state == "prepared"
        ):  # the endpoint never had it: the recipe, the limits and the store have changed since
            batch.note(state="dropped")
        elif (
            batch.state in ("submitting", "submitted", "ended")
            and batch.record["base_url"] != provider.base_url
        ):
            progress.say(
                f"{batch.folder} waits at {batch.record['base_url']}, another endpoint than the recipe's: left alone"
            )
        elif batch.state == "submitting":
            provider.settle(batch)
        if batch.state in ("submitted", "ended") and batch.record["base_url"] == provider.base_url:
            waiting.append(batch)
    return waiting


class _Provider:
    """The endpoint's side: files and batches through the openai package."""

    def __init__(self, work: Annotator, progress: Progress) -> None:
        import openai

        self._section = work.recipe.annotate.batch
        self._path = _path(work)
        self._progress = progress
        endpoint = work.recipe.teacher.served_by[0]
        self.base_url = endpoint.base_url
        self._secret = api_key(work.recipe.teacher, endpoint)
        self._client = openai.OpenAI(
            base_url=self.base_url, api_key=self._secret or "none", max_retries=5, timeout=120.0
        )

    def submit(self, batch: Batch) -> None:
        """Upload, which costs nothing and may be repeated, and create, which is noted before and after."""
        with self._speaking(), (batch.folder / "requests.jsonl").open("rb") as file:
            found = self._client.files.create(
                file=(f"{batch.record['token']}.jsonl", file), purpose="batch"
            )
        batch.note(state="submitting", file_id=found.id)
        with self._speaking():
            made = self._client.batches.create(
                input_file_id=batch.record["file_id"],
                endpoint=self._path,  # type: ignore[arg-type]
                completion_window=self._section.completion_window,  # type: ignore[arg-type]
                metadata={"dsbs": batch.record["token"]},
                extra_headers={"Idempotency-Key": batch.record["token"]},
            )
        batch.note(state="submitted", batch_id=made.id)
        self._progress.say(f"batch {made.id}: {batch.record['requests']} requests submitted")

    def settle(self, batch: Batch) -> None:
        """Killed while it was submitted: did it arrive?"""
        there = self._find(batch)
        batch.note(state="submitted", batch_id=there) if there else batch.note(state="dropped")

    def _find(self, batch: Batch) -> str | None:
        with self._speaking():
            for one in self._client.batches.list(limit=100):
                if (one.metadata or {}).get("dsbs") == batch.record[
                    "token"
                ] or one.input_file_id == batch.record["file_id"]:
                    return str(one.id)
        return None

    def wait(self, batch: Batch) -> None:
        """Until the batch has ended, however. Raises UserError where the endpoint refuses it as a whole."""
        with running(self._progress, f"batch {batch.record['batch_id']}", batch.record["requests"]):
            while batch.state == "submitted":
                with self._speaking():
                    found = self._client.batches.retrieve(batch.record["batch_id"])
                if found.status in _ENDED:
                    errors = (
                        [str(e.message) for e in (found.errors.data or [])] if found.errors else []
                    )
                    batch.note(
                        state="failed" if found.status == "failed" else "ended",
                        status=found.status,
                        output_file_id=found.output_file_id,
                        error_file_id=found.error_file_id,
                        errors=errors[:20],
                    )
                    break
                done = found.request_counts.completed if found.request_counts else 0
                self._progress.update(done, str(found.status))
                time.sleep(self._section.poll_s)
        if batch.state == "failed":
            raise UserError(
                f"{self.base_url} refuses the batch: {'; '.join(batch.record['errors'][:3]) or 'it does not say why'}",
                hint=f"mend the recipe and run again, or ask online without --batch; what was sent is in {batch.folder}",
            )

    def collect(self, batch: Batch, store: ReplyStore) -> tuple[int, int]:
        """Download what there is, of a partial batch too, and commit it."""
        if batch.state != "ended":
            return 0, 0
        taken = failed = 0
        for name, file_id in (
            ("output", batch.record["output_file_id"]),
            ("errors", batch.record["error_file_id"]),
        ):
            if not file_id:
                continue
            path = batch.folder / f"{name}.jsonl"
            with self._speaking():
                text = self._client.files.content(file_id).text
            with atomic_write(path) as file:
                file.write(text if text.endswith("\n") or not text else text + "\n")
            more, bad = batch.take(path, store)
            taken, failed = taken + more, failed + bad
        batch.note(state="collected", taken=taken)
        self._progress.say(
            f"batch {batch.record['batch_id']} {batch.record['status']}: {taken} of {batch.record['requests']} replies"
        )
        return taken, batch.record["requests"] - taken if batch.record[
            "status"
        ] != "completed" else failed

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """The openai package's errors as ours."""
        import openai

        try:
            yield
        except openai.AuthenticationError:
            raise UserError(
                f"{self.base_url} does not accept the key (HTTP 401)",
                hint="check teacher.api_key_env",
            ) from None
        except (openai.NotFoundError, openai.UnprocessableEntityError) as error:
            raise UserError(
                f"{self.base_url} has no batches (HTTP {error.status_code})",
                hint="leave --batch out, or use --batch-export FILE for `vllm run-batch` and --batch-import its output",
            ) from None
        except openai.APIStatusError as error:
            said = self._clean(error.message)
            if error.status_code < 500 and error.status_code != 429:
                raise UserError(
                    f"{self.base_url} refuses (HTTP {error.status_code}: {said})",
                    hint="mend the recipe",
                ) from None
            raise PartialError(
                f"{self.base_url} fails (HTTP {error.status_code}: {said})", hint=_AGAIN
            ) from None
        except openai.APIConnectionError as error:
            said = self._clean(str(error.__cause__ or error))
            raise PartialError(f"cannot reach {self.base_url} ({said})", hint=_AGAIN) from None

    def _clean(self, text: str) -> str:
        shown = " ".join(text.split())
        return (shown.replace(self._secret, "[key]") if self._secret else shown)[:300]


_AGAIN = "run the same command again: what was submitted is not submitted twice"


# --- a file for a server that runs it elsewhere


def export(work: Annotator, store: ReplyStore, folder: Path, path: Path) -> int:
    """Write all that the rows lack to one file in the OpenAI Batch format. Returns the number of requests."""
    _need_openai(work)
    if path.exists():
        raise UserError(f"{path} is there already", hint="name another file, or move it away")
    gathering = PendingRequests(work, store, set())
    with atomic_write(path) as file:  # before anything else: it may not be possible there
        batches = write_batches(work, gathering, folder, "exported")
        for batch in batches:
            with (batch.folder / "requests.jsonl").open(encoding="utf-8", newline="\n") as lines:
                for line in lines:
                    file.write(line)
    if gathering.stopped is not None:
        raise gathering.stopped
    return sum(batch.record["requests"] for batch in batches)


def take_back(store: ReplyStore, folder: Path, path: Path) -> int:
    """Commit the replies of an output file to the requests exported before. Returns their number. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} does not exist", hint="give the output file of `vllm run-batch`")
    exported = [batch for batch in map(Batch, _folders(folder)) if batch.state == "exported"]
    taken = sum(batch.take(path, store)[0] for batch in exported)
    if not taken:
        raise DsbsError(
            f"{path} has no reply to a request that was exported from this run",
            hint="give the output file of `vllm run-batch` for the file that --batch-export wrote",
        )
    return taken


def _need_openai(work: Annotator) -> None:
    if work.recipe.teacher.kind != "openai":
        raise UserError(
            f"a {work.recipe.teacher.kind} teacher takes no batches", hint="leave --batch out"
        )
