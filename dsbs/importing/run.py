"""Import of a log: rows with the teacher's completions, a prompt file and a recipe."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs.config import TeacherSection
from dsbs.errors import UserError
from dsbs.files import atomic_write, digest, expand_user
from dsbs.formatting import count, listing
from dsbs.importing.bodies import Message
from dsbs.importing.calls import Call, CallStore, Tally
from dsbs.importing.formats import TITLES
from dsbs.importing.prompts import SAMPLE, find_form, prompt_groups
from dsbs.importing.recipe import ImportedFiles, Job
from dsbs.importing.redaction import Redactor, count_private
from dsbs.progress import NoProgress, Progress

_SUFFIXES = (".jsonl", ".json", ".ndjson", ".log", ".txt", ".gz")
_MAX_PROMPTS = 20  # that are listed
_MIN_GOLD = 0.9  # of the rows, for gold labels to be learned
_PROGRESS_EVERY = 500  # calls


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What to import, and how.

    ``model`` and ``prompt`` (from 1) choose among those of the log; None: the most frequent.
    ``test_fraction``: the share of test rows. ``base_url``: an OpenAI-compatible endpoint that the
    recipe asks where the log has no reply: calls that ended with an error are then rows too.
    """

    model: str | None = None
    base_url: str | None = None
    prompt: int = 1
    limit: int | None = None
    test_fraction: float = 0.2
    redact: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass(slots=True)
class ImportResult:
    """What a log has, and what was written."""

    tally: Tally
    models: dict[str, int]
    model: str
    prompts: list[dict[str, Any]]
    prompt: int
    instruction: str
    exemplars: int
    template: str
    fields: tuple[str, ...]
    first_row: dict[str, Any]
    task: dict[str, Any]
    labels: dict[str, int]
    reply_form: str
    rows: dict[str, int] = field(default_factory=dict)
    read: int = 0
    unanswered: int = 0
    """Train rows of calls that ended with an error, whose reply is asked for later."""
    unread: dict[str, int] = field(default_factory=dict)
    private: dict[str, int] = field(default_factory=dict)
    redacted: dict[str, int] = field(default_factory=dict)
    gold: int = 0
    files: dict[str, str] = field(default_factory=dict)
    next: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        tally = self.tally
        return {
            "entries": tally.entries,
            "formats": dict(tally.formats),
            "skipped": dict(tally.skipped),
            "first_skipped": tally.first_skipped,
            "tokens": {"prompt": tally.prompt_tokens, "completion": tally.completion_tokens},
            **{part.name: getattr(self, part.name) for part in fields(self)[1:]},
        }


def import_log(
    sources: Sequence[str | Path],
    out: str | Path,
    options: ImportOptions | None = None,
    *,
    progress: Progress | None = None,
) -> ImportResult:
    """Turn a log of calls to a large model into rows and a recipe.

    ``sources`` are files or folders: JSON lines, JSON documents, each also gzipped; their formats
    are recognized by content. Writes ``out`` (train rows, ``.jsonl``) and beside it
    ``<stem>-test.jsonl``, ``<stem>-prompt.yaml`` and the recipe ``<stem>.yaml``. Raises UserError
    where there is nothing to import, and where a file exists (see ``options.overwrite``).
    """
    options = options or ImportOptions()
    progress = progress or NoProgress()
    files = ImportedFiles.beside(Path(out))
    if files.train.suffix != ".jsonl":
        raise UserError(f"{out}: rows are written as JSON lines", hint="use --out rows.jsonl")
    if not options.dry_run and files.train.exists() and not options.overwrite:
        raise _exists(files.train)
    logs = source_files(sources, progress)
    outputs = (files.train, files.test, files.recipe, files.prompt)
    written = {path.resolve() for path in outputs}
    for log in logs:
        if log.resolve() in written:
            raise UserError(
                f"{log} is a log to read, and the import would write over it",
                hint="give another --out",
            )
    redactor = Redactor() if options.redact else None
    store = CallStore()
    try:
        store.read(logs, progress)
        importer = _Importer(store, options, redactor, files)
        return importer.run(progress)
    finally:
        store.close()


def source_files(sources: Sequence[str | Path], progress: Progress) -> list[Path]:
    """The files of ``sources``, each a file or a folder, of which those are read that are named
    like logs. Raises UserError where there are none.
    """
    files: list[Path] = []
    for source in sources:
        path = expand_user(source)
        if path.is_dir():
            every = sorted(p for p in path.rglob("*") if p.is_file())
            inner = [p for p in every if p.suffix in _SUFFIXES]
            if inner and len(inner) < len(every):
                first = next(p for p in every if p.suffix not in _SUFFIXES)
                progress.say(
                    f"{path}: {count(len(every) - len(inner), 'file')} not read (first: "
                    f"{first.name}): a log's name ends in {', '.join(_SUFFIXES)}; name other files"
                )
            if not inner:
                raise UserError(
                    f"{path} has no log files ({', '.join(_SUFFIXES)})", hint="name the files"
                )
            files += inner
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(
                f"log {source} does not exist (working directory: {Path.cwd()})",
                hint="give a file or a directory with the log's files",
            )
    return list(dict.fromkeys(files))


def _exists(path: Path) -> UserError:
    return UserError(
        f"{path} exists already", hint="use another --out, or --overwrite to replace it"
    )


class _Importer:
    """One import: chooses model and prompt, recognizes the job, and writes its rows."""

    def __init__(
        self,
        store: CallStore,
        options: ImportOptions,
        redactor: Redactor | None,
        files: ImportedFiles,
    ) -> None:
        self._store = store
        self._options = options
        self._redactor = redactor
        self._files = files
        self._contexts: dict[int, list[Message]] = {}
        self._private: Counter[str] = Counter()
        models = store.models()
        if not models:
            raise _no_calls(store.tally)
        self._model = _chosen_model(models, options.model)
        if options.base_url is not None:
            _check_endpoint(self._model, options.base_url)
        groups = prompt_groups(store, self._model)
        if not 1 <= options.prompt <= len(groups):
            raise UserError(
                f"--prompt {options.prompt}: the calls have {len(groups)} different prompts",
                hint="run the command with --dry-run to see them",
            )
        self._form = find_form(store, self._model, *groups[options.prompt - 1])
        sample = list(store.calls(self._model, self._form.contexts, SAMPLE))
        completions = [self._clean(call.completion) for call in sample]
        reasoned = sum(call.reasoning is not None for call in sample)
        self._job = Job(
            self._form, completions, self._clean, has_reasoning=2 * reasoned > len(sample)
        )
        count_private(self._form.constant_text(), self._private)
        self._result = ImportResult(
            tally=store.tally,
            models=models,
            model=self._model,
            prompts=[self._described(*group) for group in groups[:_MAX_PROMPTS]],
            prompt=options.prompt,
            instruction=self._job.prompt.instruction,
            exemplars=len(self._job.prompt.exemplars),
            template=self._job.prompt.template,
            fields=self._form.fields,
            first_row={},
            task=self._job.reply_form.task,
            labels=self._job.reply_form.labels,
            reply_form=self._job.reply_form.description,
        )

    def _described(self, contexts: tuple[int, ...], calls: int) -> dict[str, Any]:
        """One of the log's prompts, by its first message."""
        messages = self._store.context(contexts[0])
        text = messages[0][1] if messages else ""
        return {"calls": calls, "begins": self._clean(" ".join(text.split())[:120])}

    def _clean(self, value: Any) -> Any:
        """A text, or a value with all its texts, redacted if that is wanted."""
        return value if self._redactor is None else self._redactor.value(value)

    # --- rows

    def _rows(self, progress: Progress) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each row with its split; the result is up to date when they end."""
        result = self._result
        unread: Counter[str] = Counter()
        rows: Counter[str] = Counter()
        progress.start("writing rows", self._form.calls)
        for number, call in enumerate(self._store.calls(self._model, self._form.contexts)):
            if self._options.limit is not None and rows.total() >= self._options.limit:
                break
            values = self._form.values(self._context(call.context), call.question)
            if values is None:
                result.tally.skip("another template")
                continue
            identity = json.dumps([call.id, values, call.completion], sort_keys=True)
            if call.id is not None and self._store.times_seen("call", identity) > 1:
                result.tally.skip("repeated entry")
                continue
            self._is_new_input(values)
            split, row, reason = self._row(call, values)
            result.first_row = result.first_row or row
            rows[split] += 1
            if reason is None:
                result.read += 1
            else:
                unread[reason] += 1
            if number % _PROGRESS_EVERY == 0:
                progress.update(number)
            yield split, row
        if self._options.base_url is not None:
            for row in self._unanswered_rows():
                if self._options.limit is not None and rows.total() >= self._options.limit:
                    break
                rows["train"] += 1
                result.unanswered += 1
                yield "train", row
        progress.finish()
        result.rows = dict(rows)
        result.unread = dict(unread.most_common())

    def _row(self, call: Call, values: dict[str, Any]) -> tuple[str, dict[str, Any], str | None]:
        """A call's split, its row, and why its reply is not read (None: it is)."""
        for text in (*map(str, values.values()), call.completion):
            count_private(text, self._private)
        values = self._clean(values)
        completion = self._clean(self._job.completion(call))
        row_id = (
            self._clean(call.id)
            or f"row-{digest(json.dumps(values, sort_keys=True), completion)[:16]}"
        )
        split = "test" if _position(values) < self._options.test_fraction else "train"
        row: dict[str, Any] = {"id": self._unique(row_id), "input": values}
        sample = self._job.sample(completion, values)
        label = self._job.gold(call.gold, values)
        if label is not None:
            self._result.gold += 1
        elif split == "test" and sample.label is not None:
            label = self._job.task.value(sample.label)
            row["meta"] = {"label_from": "teacher"}
        if label is not None:
            row["label"] = self._clean(label)
        row["teacher"] = {"model": call.model or "unknown", "completion": completion}
        return split, row, sample.reason

    def _unanswered_rows(self) -> Iterator[dict[str, Any]]:
        """Train rows without a reply: the calls that ended with an error, but for those that were
        repeated.
        """
        for context, question in self._store.failed(self._model):
            values = self._form.values(self._context(context), question)
            if values is None or not self._is_new_input(values):
                continue
            for text in map(str, values.values()):
                count_private(text, self._private)
            values = self._clean(values)
            key = digest("unanswered", json.dumps(values, sort_keys=True))[:16]
            yield {"id": self._unique(f"row-{key}"), "input": values}

    def _unique(self, row_id: str) -> str:
        times = self._store.times_seen("id", row_id)
        return row_id if times == 1 else f"{row_id}~{times}"

    def _is_new_input(self, values: dict[str, Any]) -> bool:
        return self._store.times_seen("input", json.dumps(values, sort_keys=True)) == 1

    def _context(self, context: int) -> list[Message]:
        if context not in self._contexts:
            if len(self._contexts) > 1000:
                self._contexts.clear()
            self._contexts[context] = self._store.context(context)
        return self._contexts[context]

    # --- files

    def run(self, progress: Progress) -> ImportResult:
        """Write everything, or with ``dry_run`` only look at it. Raises UserError where no call
        gives a row.
        """
        result = self._result
        if self._redactor is not None:
            self._redactor.counts.clear()  # the sample is redacted again
        if self._options.dry_run:
            for _ in self._rows(progress):
                pass
            self._check_rows()
        else:
            self._write(progress)
        result.private = {name: number for name, number in self._private.items() if number}
        if self._redactor is not None:
            result.redacted = dict(self._redactor.counts)
        stages = ("validate", "annotate", "train", "eval", "report")
        result.next = [f"dsbs {stage} {self._files.recipe}" for stage in stages]
        return result

    def _check_rows(self) -> None:
        if not self._result.rows:
            reasons = listing(self._result.tally.skipped)
            raise UserError(
                f"no call of the log gives a row ({reasons})",
                hint="choose other calls with --model or --prompt",
            )

    def _write(self, progress: Progress) -> None:
        """The train rows last: where they are, all is written."""
        files = self._files
        result = self._result
        with atomic_write(files.train) as train:
            with atomic_write(files.test) as test:
                for split, row in self._rows(progress):
                    file = train if split == "train" else test
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                self._check_rows()
                texts = self._texts()
                self._check_free(texts)
                for path, text in texts.items():
                    with atomic_write(path) as file:
                        file.write(text)
            if not result.rows.get("test"):
                files.test.unlink()
        written = {"rows": files.train, "recipe": files.recipe, "prompt": files.prompt}
        if result.rows.get("test"):
            written["test rows"] = files.test
        result.files = {name: str(path) for name, path in written.items()}

    def _texts(self) -> dict[Path, str]:
        """The recipe and the prompt file."""
        result = self._result
        recipe = self._job.recipe_text(
            self._files,
            formats=", ".join(TITLES[name] for name in result.tally.formats),
            model=self._model,
            base_url=self._options.base_url,
            rows=result.rows,
            has_gold=result.gold >= _MIN_GOLD * sum(result.rows.values()),
        )
        return {self._files.recipe: recipe, self._files.prompt: self._job.prompt_text()}

    def _check_free(self, texts: dict[Path, str]) -> None:
        """Raise UserError where a file would be replaced by another. An import that was killed may
        have left the same recipe.
        """
        if self._options.overwrite:
            return
        is_same = {
            path: path.exists() and path.read_text(encoding="utf-8", errors="replace") == text
            for path, text in texts.items()
        }
        for path in (*texts, self._files.test):
            if path.exists() and not is_same.get(path, is_same[self._files.recipe]):
                raise _exists(path)


def _no_calls(tally: Tally) -> UserError:
    reasons = ", ".join(f"{name} {number:,}" for name, number in tally.skipped.most_common())
    hint = "import the log of calls that succeeded"
    if tally.skipped.get("no prompt in the log"):
        hint = (
            "replies alone are no calls: add the file with the requests (a batch's input file, the "
            "messages of stored completions)"
        )
    return UserError(f"the log has no complete call ({reasons})", hint=hint)


def _chosen_model(models: dict[str, int], model: str | None) -> str:
    if model is None:
        return next(iter(models))
    if model not in models:
        names = ", ".join(name or "(not named)" for name in models)
        raise UserError(f"the log has no model {model!r}", hint=f"use --model with one of: {names}")
    return model


def _check_endpoint(model: str, base_url: str) -> None:
    """Raise UserError where a recipe could not ask this model there."""
    if not model:
        raise UserError(
            "the log does not name its model, which --base-url needs",
            hint="import without --base-url, then set teacher.model and teacher.base_url",
        )
    try:
        TeacherSection(model=model, base_url=base_url)
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(
            f"--base-url: {message}", hint="give the endpoint, e.g. https://api.openai.com/v1"
        ) from None


def _position(values: dict[str, Any]) -> float:
    """A row's position in [0, 1) by its input: copies of an input are in the same split."""
    text = " ".join(json.dumps(values, sort_keys=True, ensure_ascii=False).casefold().split())
    return int(hashlib.sha256(f"test:{text}".encode()).hexdigest()[:13], 16) / 16**13
