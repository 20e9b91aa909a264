"""The stage: ask for what the store does not have, then derive one annotation per row from what it has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.annotate.asking import Asking
from dsbs.annotate.parse import parse_reply
from dsbs.annotate.prices import price_of
from dsbs.annotate.store import ReplyStore, budget, request_key
from dsbs.annotate.summary import AnnotateResult, SplitSummary
from dsbs.annotate.teachers import is_asked, make_teacher
from dsbs.annotate.teachers.base import Archive, Reply, Request, Teacher
from dsbs.annotate.vote import majority
from dsbs.annotations import annotation_file, run_folder, source_fingerprint
from dsbs.artefacts import hold, manifest, write_jsonl
from dsbs.errors import PartialError, UserError
from dsbs.progress import Meter, Silent, running
from dsbs.prompts import Prompt, PromptRenderer, load_prompt
from dsbs.recipe import Recipe
from dsbs.records import Annotation, Example, Provenance, Reason, Sample, TeacherName, Usage
from dsbs.tasks import make_task
from dsbs.tasks.base import Task
from dsbs.tasks.load import data_hash, stream


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would send: the first prompt, the requests, and a rough token count (four characters a token)."""

    first_prompt: str
    rows: int
    requests: int
    cached: int
    prompt_tokens: int
    max_completion_tokens: int
    usd: float | None  # at most, by these tokens; None: the price is not known


class Annotator:
    """One recipe's annotation: task, prompt, teacher and run folder, shared by asking, deriving and planning."""

    def __init__(self, recipe: Recipe, out: str | Path | None = None) -> None:
        self.recipe = recipe
        self.run = run_folder(recipe, out)
        self.task: Task = make_task(recipe.task)
        human = recipe.teacher.kind == "human"
        self.prompt: Prompt | None = None if human else load_prompt(recipe, self.task)
        self.price = price_of(recipe.teacher)
        if recipe.annotate.max_usd is not None and self.price is None:
            raise UserError(
                f"annotate.max_usd is set, and the price of {recipe.teacher.model} is not known",
                hint="give teacher.price: {input: …, output: …} in US dollars for a million tokens",
            )
        self.renderer = PromptRenderer(self.prompt, self.task) if self.prompt is not None else None

    @property
    def store_path(self) -> Path:
        return self.run / "annotate" / "replies.sqlite"

    def requests(self, example: Example) -> Iterator[Request]:
        """The requests of one row, one for each sample."""
        assert self.renderer is not None and self.prompt is not None
        annotate, teacher = self.recipe.annotate, self.recipe.teacher
        body: dict[str, Any] = {
            "model": teacher.model,
            **self.renderer.render(example).body(teacher.endpoint),
            "max_tokens": annotate.max_tokens,
            "temperature": annotate.temperature,
        }
        if teacher.endpoint == "completions" and self.prompt.stop:
            body["stop"] = list(self.prompt.stop[:4])  # the API takes four at most; the reader cuts at all of them
        body |= teacher.extra_body
        body = {name: value for name, value in body.items() if value is not None}
        for sample in range(annotate.samples):
            yield Request(body, sample)

    def annotation(self, example: Example, replies: list[tuple[str | None, Reply | None]], refused: bool) -> Annotation:
        """One row of the output from the row's replies (with their keys)."""
        kind = self.recipe.teacher.kind
        provenance: Provenance = "recorded" if kind == "recorded" else "human" if kind == "human" else "own"
        samples: list[Sample] = []
        for _, reply in replies:
            if reply is None:
                samples.append(Sample(text="", reason="refused" if refused else "no-reply"))
            elif self.prompt is None:
                unlabelled: Reason | None = "empty" if example.label is None else None
                samples.append(Sample(text=reply.text, label=example.label, rationale=reply.text, reason=unlabelled))
            else:
                samples.append(
                    parse_reply(
                        reply.text,
                        self.prompt,
                        self.task,
                        example.input,
                        reply.finish_reason,
                        reasoning=reply.reasoning,
                        rationale_from=self.recipe.annotate.rationale_from,
                    )
                )
        vote = majority(samples, self.task)
        bought = [reply for _, reply in replies if reply is not None]
        return Annotation(
            id=example.id,
            input=example.input,
            gold=example.label,
            label=vote.label,
            rationale=vote.rationale,
            provenance=provenance if vote.reason is None else "none",
            samples=samples,
            vote_share=vote.share,
            accepted=vote.reason is None,
            reject_reason=vote.reason,
            usage=Usage(
                prompt_tokens=_total(reply.prompt_tokens for reply in bought),
                completion_tokens=_total(reply.completion_tokens for reply in bought),
            ),
            usd=None if self.price is None else sum(self.price.usd(r.prompt_tokens, r.completion_tokens) for r in bought),
            teacher=TeacherName(kind=kind, model=self.recipe.teacher.model),
            request_key=replies[0][0] if replies else None,
        )


def annotate(recipe: Recipe, *, out: str | Path | None = None, meter: Meter | None = None) -> AnnotateResult:
    """Annotate the splits that the recipe names into ``annotate/<split>.jsonl``, one row for every input row.

    Replies that the run's store already has are not bought again. Raises UserError for what the user can mend and, once the
    rows are written, PartialError where a limit or the endpoint ended the run early (rows without a reply say so).
    """
    meter = meter or Silent()
    work = Annotator(recipe, out)
    hashes: dict[str, str] = {split: data_hash(stream(recipe, work.task, split)) for split in recipe.annotate.splits}
    teacher = make_teacher(recipe)  # before anything is written: a missing key leaves no trace
    with (
        hold(work.run / "annotate"),
        manifest(work.run / "annotate" / "manifest.json", recipe.model_dump(mode="json"), hashes) as record,
    ):
        record["prompt"] = work.prompt.model_dump(mode="json") if work.prompt is not None else None
        record["source"] = source_fingerprint(recipe, work.task)
        stopped: PartialError | None = None
        if is_asked(recipe.teacher.kind):
            summaries, stopped = asyncio.run(_asked(work, teacher, meter))
        else:
            summaries = _recalled(work, teacher, meter)
        record["splits"] = {name: summary.as_json() for name, summary in summaries.items()}
        if stopped is not None:
            raise stopped
        result = AnnotateResult(work.run, summaries, reportable=recipe.task.limit is None)
        missing = sum(summary.rejected["no-reply"] for summary in summaries.values())
        if missing:
            record["status"] = "partial"
        return result


def plan(recipe: Recipe, out: str | Path | None = None) -> Plan:
    """What ``annotate`` would send, without sending it or writing anything."""
    work = Annotator(recipe, out)
    if not is_asked(recipe.teacher.kind):
        raise UserError(f"a {recipe.teacher.kind} teacher sends nothing", hint="run without --dry-run: it costs nothing")
    assert work.renderer is not None
    store = ReplyStore(work.store_path) if work.store_path.is_file() else None
    identity = _identity(recipe)
    first, rows, requests, cached, characters = "", 0, 0, 0, 0
    for split in recipe.annotate.splits:
        for example in stream(recipe, work.task, split):
            rows += 1
            text = work.renderer.render(example).text
            first = first or text
            for request in work.requests(example):
                if store is not None and store.get(request_key(request, identity), budget(request.body)) is not None:
                    cached += 1
                    continue
                requests += 1
                characters += len(text)
    if store is not None:
        store.close()
    prompt_tokens, completion_tokens = characters // 4, requests * recipe.annotate.max_tokens
    usd = None if work.price is None else work.price.usd(prompt_tokens, completion_tokens)
    return Plan(first, rows, requests, cached, prompt_tokens, completion_tokens, usd)


def _identity(recipe: Recipe) -> str:
    """The endpoint's identity without connecting to it."""
    if recipe.teacher.kind == "openai":
        return f"{recipe.teacher.base_url}#{recipe.teacher.endpoint}"
    from dsbs.annotate.teachers.llamacpp import fingerprint, gguf_file

    return f"llamacpp:{fingerprint(gguf_file(str(recipe.teacher.model), recipe.folder))}#{recipe.teacher.endpoint}"


# --- the two ways to replies


async def _asked(work: Annotator, teacher: Teacher, meter: Meter) -> tuple[dict[str, SplitSummary], PartialError | None]:
    """Ask, then derive from what there is; a run that stopped early leaves rows that say so, and the reason it stopped."""
    store = ReplyStore(work.store_path)
    asking = Asking(work, teacher, store, meter)
    summaries = {split: SplitSummary() for split in map(str, work.recipe.annotate.splits)}
    stopped: PartialError | None = None
    try:
        for split, summary in summaries.items():
            total = sum(1 for _ in stream(work.recipe, work.task, split)) * work.recipe.annotate.samples
            try:
                await asking.split(split, total, summary)
            except PartialError as error:
                stopped = error
                break
        for split, summary in summaries.items():
            _derive(work, split, summary, lambda example: _kept(work, store, teacher.identity, asking.refused, example))
    finally:
        await teacher.close()
        store.close()
    return summaries, stopped


Replies = tuple[list[tuple[str | None, Reply | None]], bool]


def _kept(work: Annotator, store: ReplyStore, identity: str, refused: set[str], example: Example) -> Replies:
    found: list[tuple[str | None, Reply | None]] = []
    for request in work.requests(example):
        key = request_key(request, identity)
        found.append((key, store.get(key, budget(request.body))))
    return found, any(key in refused for key, _ in found)


# --- deriving


def _recalled(work: Annotator, archive: Archive, meter: Meter) -> dict[str, SplitSummary]:
    summaries: dict[str, SplitSummary] = {}
    for split in work.recipe.annotate.splits:
        summary = summaries[split] = SplitSummary()
        started = time.monotonic()
        with running(meter, f"read {split}", None):
            _derive(work, split, summary, lambda example: ([(None, archive.recall(example))], False))
        summary.wall_s = time.monotonic() - started
    recalled = sum(summary.rows - summary.rejected["no-reply"] for summary in summaries.values())
    if not recalled:
        where = "teacher.completion in the rows, or the file teacher.completions"
        what = "rationale column" if work.recipe.teacher.kind == "human" else where
        raise UserError(f"the data has no {what} for any row", hint="check teacher.kind and task.columns")
    return summaries


def _derive(work: Annotator, split: str, summary: SplitSummary, replies_of: Callable[[Example], Replies]) -> None:
    """Write ``annotate/<split>.jsonl`` and count what is in it."""

    def rows() -> Iterator[str]:
        for example in stream(work.recipe, work.task, split):
            replies, refused = replies_of(example)
            annotation = work.annotation(example, replies, refused)
            summary.add(annotation, work.task)
            yield annotation.model_dump_json(by_alias=True)  # keys in the schema's order: equal rows are equal bytes

    write_jsonl(annotation_file(work.run, split), rows())


def _total(values: Iterator[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
