"""Batch API: submits requests with the OpenAI Batch API and collects their replies.

If the process is killed, no reply is lost and nothing is submitted twice.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dsbs.annotation.annotator import Annotator
from dsbs.annotation.backends import TransientError
from dsbs.annotation.backends.faults import error_body
from dsbs.annotation.backends.openai import OpenAIEndpoint, api_key
from dsbs.annotation.batch_files import (
    Batch,
    Output,
    PendingRequests,
    batch_folders,
    batches_folder,
    check_teacher,
    url_path,
    write_batches,
)
from dsbs.annotation.store import ReplyStore
from dsbs.annotation.summary import SplitSummary
from dsbs.errors import DsbsError, PartialError, UserError
from dsbs.files import atomic_write
from dsbs.formatting import count
from dsbs.progress import Progress, running
from dsbs.run_folder import RunFolder

_ENDED = ("completed", "failed", "expired", "cancelled")
_SUBMITTED = ("submitted", "ended")
_SHOWN_ERRORS = 3
_TRY_AGAIN = "run the same command again: what was submitted is not submitted twice"


def buy_batches(
    annotator: Annotator,
    store: ReplyStore,
    run: RunFolder,
    summaries: Mapping[str, SplitSummary],
    progress: Progress,
) -> DsbsError | None:
    """Submit what the rows need, wait, and store the replies; repeat while replies call for more.

    Batches that an earlier command submitted are waited for first. What failed or expired is left
    to the next command, with ``--batch`` or without. Returns the reason where something is left, a
    batch that failed among them: what the others brought is stored. Raises DsbsError.
    """
    check_teacher(annotator)
    folder = batches_folder(run)
    client = BatchClient(annotator, progress)
    store.adapt(client.endpoint, annotator.recipe.teacher.model, progress.say)
    summary = next(iter(summaries.values()))
    started = time.monotonic()
    tried: set[str] = set()
    pending = PendingRequests(annotator, store, tried)
    batches = _open_batches(folder, client, progress) or write_batches(annotator, pending, folder)
    error: DsbsError | None = None
    while batches and error is None:
        submitted, error = _submit(batches, client)
        for batch in submitted:
            summary.requests += batch.record["requests"]
            tried.update(row["key"] for row in batch.rows())
            failure = client.wait(batch)
            form = client.endpoint.adaptation.changes
            output = client.collect(batch, store)
            if client.endpoint.adaptation.changes != form:  # ask again, in the form it takes
                tried.difference_update(row["key"] for row in batch.rows())
            if output.failures:
                summary.wasted["batch"] += output.failures
            error = error or failure or output.error
        if error is None:
            batches = write_batches(annotator, pending, folder)
    summary.wall_s += time.monotonic() - started
    if error is not None:
        return error
    if pending.left_over and pending.stopped is None:
        return PartialError(
            f"{count(pending.left_over, 'request')} came back from the batch without a reply "
            "(failed or expired)",
            hint="run with --batch for another batch of these alone, or without it to send them "
            "online",
        )
    return pending.stopped


def _submit(batches: list[Batch], client: BatchClient) -> tuple[list[Batch], DsbsError | None]:
    """The batches that are at the endpoint now, and why the others are not."""
    submitted: list[Batch] = []
    for batch in batches:
        if batch.state == "prepared":
            try:
                client.submit(batch)
            except DsbsError as error:
                if not submitted:
                    raise
                return submitted, error
        submitted.append(batch)
    return submitted, None


def _open_batches(folder: Path, client: BatchClient, progress: Progress) -> list[Batch]:
    """Earlier commands' batches that the recipe's endpoint has, with replies not yet stored."""
    batches: list[Batch] = []
    for batch in map(Batch, batch_folders(folder)):
        if batch.state == "prepared":
            # never submitted: the recipe, the limits and the store may have changed since
            batch.update(state="dropped")
        if batch.state != "submitting" and batch.state not in _SUBMITTED:
            continue
        if batch.record["base_url"] != client.base_url:
            progress.say(
                f"{batch.folder} is waiting at {batch.record['base_url']}, not at the recipe's "
                "endpoint: skipped"
            )
            continue
        if batch.state == "submitting":
            client.confirm_submission(batch)
        if batch.state in _SUBMITTED:
            batches.append(batch)
    return batches


class BatchClient:
    """Files and batches at the recipe's endpoint, through the openai package."""

    def __init__(self, annotator: Annotator, progress: Progress) -> None:
        import openai

        teacher = annotator.recipe.teacher
        section = teacher.served_by[0]
        key = api_key(teacher, section)
        self._section = annotator.recipe.annotate.batch
        self._url_path = url_path(annotator)
        self._progress = progress
        self.base_url = section.base_url
        self.endpoint = OpenAIEndpoint(teacher, section, key, annotator.identities[0])
        self._openai = openai.OpenAI(
            base_url=self.base_url, api_key=key or "none", max_retries=5, timeout=120.0
        )

    def submit(self, batch: Batch) -> None:
        """Upload the file, which is free and may be repeated, and create the batch.

        The state is written before and after the batch is created.
        """
        token = batch.record["token"]
        with self._translated_errors(), (batch.folder / "requests.jsonl").open("rb") as file:
            uploaded = self._openai.files.create(file=(f"{token}.jsonl", file), purpose="batch")
        batch.update(state="submitting", file_id=uploaded.id)
        with self._translated_errors():
            created = self._openai.batches.create(
                input_file_id=uploaded.id,
                endpoint=self._url_path,  # type: ignore[arg-type]
                completion_window=self._section.completion_window,  # type: ignore[arg-type]
                metadata={"dsbs": token},
                extra_headers={"Idempotency-Key": token},
            )
        batch.update(state="submitted", batch_id=created.id)
        requests = count(batch.record["requests"], "request")
        self._progress.say(f"batch {created.id}: {requests} submitted")

    def confirm_submission(self, batch: Batch) -> None:
        """Find out whether a batch arrived whose submission was interrupted."""
        batch_id = self._find(batch)
        if batch_id is None:
            batch.update(state="dropped")
        else:
            batch.update(state="submitted", batch_id=batch_id)

    def _find(self, batch: Batch) -> str | None:
        record = batch.record
        with self._translated_errors():
            for candidate in self._openai.batches.list(limit=100):
                token = (candidate.metadata or {}).get("dsbs")
                if token == record["token"] or candidate.input_file_id == record["file_id"]:
                    return str(candidate.id)
        return None

    def wait(self, batch: Batch) -> DsbsError | None:
        """Wait until the batch has ended. Returns the error for one that failed as a whole."""
        batch_id = batch.record["batch_id"]
        with running(self._progress, f"batch {batch_id}", batch.record["requests"]):
            while batch.state == "submitted":
                with self._translated_errors():
                    status = self._openai.batches.retrieve(batch_id)
                if status.status in _ENDED:
                    errors = []
                    if status.errors is not None:
                        errors = [
                            {"code": error.code, "message": str(error.message)}
                            for error in status.errors.data or []
                        ]
                    batch.update(
                        state="failed" if status.status == "failed" else "ended",
                        status=status.status,
                        output_file_id=status.output_file_id,
                        error_file_id=status.error_file_id,
                        errors=errors[:20],
                    )
                    break
                completed = status.request_counts.completed if status.request_counts else 0
                self._progress.update(completed, str(status.status))
                time.sleep(self._section.poll_s)
        if batch.state != "failed":
            return None
        errors = batch.record["errors"][:_SHOWN_ERRORS]
        for error in errors:
            cause = self.endpoint.error(None, error_body({"error": error}), {})
            if isinstance(cause, PartialError):  # the account's queue or credit
                return cause
        messages = [error["message"] for error in errors] or ["without a reason"]
        return UserError(
            f"{self.base_url} refuses the batch: {'; '.join(messages)}",
            hint="fix the recipe and run again, or run without --batch; the requests are in "
            f"{batch.folder}",
        )

    def collect(self, batch: Batch, store: ReplyStore) -> Output:
        """Download and commit the replies, of a partial batch too."""
        total = Output()
        if batch.state != "ended":
            return total
        record = batch.record
        for name, file_id in (
            ("output", record["output_file_id"]),
            ("errors", record["error_file_id"]),
        ):
            if not file_id:
                continue
            path = batch.folder / f"{name}.jsonl"
            with self._translated_errors():
                text = self._openai.files.content(file_id).text
            if text and not text.endswith("\n"):
                text += "\n"
            with atomic_write(path) as file:
                file.write(text)
            output = batch.store_replies(path, store, self.endpoint)
            total.replies += output.replies
            total.failures += output.failures
            total.error = total.error or output.error
        batch.update(state="collected", taken=total.replies)
        self._progress.say(
            f"batch {record['batch_id']} {record['status']}: {total.replies} of "
            f"{record['requests']} replies"
        )
        if record["status"] != "completed":
            total.failures = int(record["requests"]) - total.replies
        return total

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        """Raise the openai package's errors as the endpoint's own."""
        import openai

        try:
            yield
        except (openai.NotFoundError, openai.UnprocessableEntityError) as error:
            raise UserError(
                f"{self.base_url} has no batches (HTTP {error.status_code})",
                hint="run without --batch, or use --batch-export FILE for `vllm run-batch` and "
                "--batch-import its output",
            ) from None
        except openai.APIStatusError as error:
            response = error.response
            translated = self.endpoint.status_error(
                response.status_code, response.content, response.headers
            )
            raise self._final(translated) from None
        except openai.APIConnectionError as error:
            raise self._final(self.endpoint.connection_error(error.__cause__ or error)) from None

    def _final(self, error: Exception) -> DsbsError:
        """The error that ends the command: the package has retried already."""
        error = getattr(error, "stop", None) or error
        if isinstance(error, DsbsError):
            return error
        if isinstance(error, TransientError):
            return PartialError(f"{self.base_url}: {error}", hint=_TRY_AGAIN)
        return UserError(f"{self.base_url} refuses the batch ({error})", hint="fix the recipe")
