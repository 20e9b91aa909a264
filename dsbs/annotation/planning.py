"""Planning: what an annotation would send and cost (`--dry-run`), and a pilot on a few rows."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.annotation.annotator import ASSUMED_TOKENS, CHARACTERS_PER_TOKEN, Annotator
from dsbs.annotation.backends import Lane, make_teacher, price_of, reply_tokens, teacher_class
from dsbs.annotation.backends.adaptation import DEFAULT_REPLY_TOKENS
from dsbs.annotation.requester import send_requests
from dsbs.annotation.store import ReplyStore, open_store
from dsbs.annotation.summary import (
    RowsToRequest,
    SplitSummary,
    rationale_methods,
    rounded_interval,
    write_annotations,
)
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.files import canonical_json
from dsbs.formatting import count
from dsbs.progress import NoProgress, Progress
from dsbs.records import Example, NextRounds
from dsbs.records.measures import Rate, wilson
from dsbs.run_folder import RunFolder
from dsbs.tasks.data import position
from dsbs.tasks.shards import Shard

ASSUMED_SECONDS = 3.0  # of a reply, until one has been timed


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would send at most, with a rough token count (four characters to a token).

    ``usd`` is the most that the tokens may cost (None: the price is not known), ``likely_usd`` the
    cost at ``tokens_per_reply``: the mean of earlier replies, else the recipe's limit or, where it
    sets none, an assumption. ``seconds`` is the time at the recipe's and the teacher's concurrency
    and rate caps. ``seconds_per_reply`` is the mean of earlier replies where ``is_timed``, else an
    assumption.
    """

    first_prompt: str
    rows: int
    requests: int
    cached: int
    prompt_tokens: int
    max_completion_tokens: int
    usd: float | None
    tokens_per_reply: int
    likely_usd: float | None
    seconds: float
    seconds_per_reply: float
    is_timed: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "cached": self.cached,
            "rows": self.rows,
            "prompt_tokens": self.prompt_tokens,
            "max_completion_tokens": self.max_completion_tokens,
            "max_usd": self.usd,
            "tokens_per_reply": self.tokens_per_reply,
            "likely_usd": self.likely_usd,
            "seconds": round(self.seconds, 1),
            "seconds_per_reply": round(self.seconds_per_reply, 3),
            "is_timed": self.is_timed,
            "first_prompt": self.first_prompt,
        }


def plan(
    recipe: Recipe,
    out: str | Path | None = None,
    shard: Shard | None = None,
    *,
    batch: bool = False,
    rounds: NextRounds | None = None,
) -> Plan:
    """What ``annotate`` would send; nothing is sent or written. Hints are not foreseen.

    ``rounds`` None: those of the run.
    """
    run = RunFolder.of(recipe, out)
    annotator = Annotator(recipe, shard, rounds or run.next_rounds())
    if not teacher_class(recipe.teacher.kind).is_asked:
        raise UserError(
            f"no requests are sent to a teacher of kind {recipe.teacher.kind}",
            hint="run without --dry-run: it costs nothing",
        )
    assert annotator.renderer is not None
    store = _existing_store(run, shard)
    first_prompt = ""
    rows = 0
    requests = 0
    cached = 0
    characters = 0
    for split in recipe.annotate.splits:
        for example in annotator.examples(split):
            rows += 1
            first_prompt = first_prompt or annotator.renderer.render(example).text
            replies = annotator.first_replies(example)
            while wave := annotator.next_requests(example, replies):
                for request in wave:
                    outcome = annotator.look_up(store, request)
                    cached += outcome.reply is not None
                    if outcome.reply is None and outcome.reason == "no-reply":
                        requests += 1
                        characters += len(canonical_json(request.body))
                    annotator.add_reply(example, replies, request, outcome)
    mean_seconds = None
    mean_tokens = None
    if store is not None:
        mean_tokens = store.mean_completion_tokens(annotator.identities, recipe.teacher.model)
        mean_seconds = store.mean_seconds(annotator.identities, recipe.teacher.model)
        store.close()
    prompt_tokens = characters // CHARACTERS_PER_TOKEN
    limit = reply_tokens(recipe, annotator.price)
    completion_tokens = requests * limit
    tokens_per_reply = limit
    if mean_tokens is not None:
        tokens_per_reply = min(limit, round(mean_tokens))
    elif recipe.annotate.max_tokens is None:
        tokens_per_reply = min(limit, ASSUMED_TOKENS)
    usd = None
    likely_usd = None
    if annotator.price is not None:
        lane: Lane = "batch" if batch else "online"
        usd = annotator.price.of(prompt_tokens, completion_tokens, lane=lane)
        likely_usd = annotator.price.of(prompt_tokens, requests * tokens_per_reply, lane=lane)
    seconds_per_reply = ASSUMED_SECONDS if mean_seconds is None else mean_seconds
    return Plan(
        first_prompt=first_prompt,
        rows=rows,
        requests=requests,
        cached=cached,
        prompt_tokens=prompt_tokens,
        max_completion_tokens=completion_tokens,
        usd=usd,
        tokens_per_reply=tokens_per_reply,
        likely_usd=likely_usd,
        seconds=_seconds(
            recipe, requests, prompt_tokens + requests * tokens_per_reply, seconds_per_reply
        ),
        seconds_per_reply=seconds_per_reply,
        is_timed=mean_seconds is not None,
    )


def _existing_store(run: RunFolder, shard: Shard | None) -> ReplyStore | None:
    """The run's or the shard's store; None where there is none, since opening would make one."""
    if shard is None:
        return open_store(run) if run.replies.is_file() else None
    shard_run = run.shard(str(shard))
    if shard_run.replies.is_file() or run.replies.is_file():
        return open_store(shard_run, run)
    return None


def _seconds(recipe: Recipe, requests: int, tokens: int, seconds_per_reply: float) -> float:
    """Seconds for this many requests: the longest of what concurrency, rpm and tpm allow."""
    if requests == 0:
        return 0.0
    max_in_flight = teacher_class(recipe.teacher.kind).max_in_flight(recipe)
    width = min(max_in_flight, recipe.annotate.concurrency)
    times = [max(seconds_per_reply, requests * seconds_per_reply / width)]
    endpoints = recipe.teacher.served_by
    for units, caps in (
        (requests, [endpoint.rpm for endpoint in endpoints]),
        (tokens, [endpoint.tpm for endpoint in endpoints]),
    ):
        per_minute = [cap for cap in caps if cap is not None]
        if len(per_minute) == len(caps):
            times.append(60 * units / sum(per_minute))
    return max(times)


@dataclass(frozen=True, slots=True)
class PilotResult:
    """The result of annotating a sample of the train rows, and the cost of all ``rows`` at that
    rate.
    """

    summary: SplitSummary
    path: Path
    rows: int
    projected_usd: float | None
    projected_seconds: float

    @property
    def acceptance_rate(self) -> Rate | None:
        """The share of rows with a readable label and a sound rationale."""
        return wilson(self.summary.accepted, self.summary.rows)

    def as_json(self) -> dict[str, Any]:
        rate = self.acceptance_rate
        return {
            **self.summary.as_json(),
            "acceptance_rate": None if rate is None else round(rate.value, 4),
            "acceptance_rate_ci95": rounded_interval(rate),
            "path": str(self.path),
            "projected": {
                "rows": self.rows,
                "usd": self.projected_usd,
                "seconds": round(self.projected_seconds, 1),
            },
        }


def pilot(
    recipe: Recipe, rows: int, *, out: str | Path | None = None, progress: Progress | None = None
) -> PilotResult:
    """Annotate a stratified sample of the train rows into ``annotate/pilot.jsonl``.

    A later run does not buy its replies again; no other file of the run is changed. Raises what
    ``annotate`` raises.
    """
    if not teacher_class(recipe.teacher.kind).is_asked:
        raise UserError(
            f"a teacher of kind {recipe.teacher.kind} costs nothing", hint="run without --pilot"
        )
    progress = progress or NoProgress()
    annotator = Annotator(recipe)
    first_split, *other_splits = recipe.annotate.splits
    sample, total = stratified(
        annotator.examples(first_split), rows, closed=annotator.task.labels is not None
    )
    for split in other_splits:
        total += sum(1 for _ in annotator.examples(split))
    run = RunFolder.of(recipe, out)
    path = run.annotations("pilot")
    summary, mean_seconds = annotate_sample(annotator, sample, run, path, progress)
    warnings = summary.warnings("pilot", rationale_methods(recipe))
    for warning in [*warnings, *_reasoning_advice(recipe, summary)]:
        progress.say(f"warning: {warning}")
    usd = None
    if summary.usd is not None and summary.rows:
        usd = summary.usd / summary.rows * total
    requests = total * recipe.annotate.samples
    usage = summary.usage
    tokens = (usage.prompt_tokens or 0) + (usage.completion_tokens or 0)
    tokens = tokens * total // max(1, summary.rows)
    seconds_per_reply = ASSUMED_SECONDS if mean_seconds is None else mean_seconds
    seconds = _seconds(recipe, requests, tokens, seconds_per_reply)
    return PilotResult(summary, path, total, usd, seconds)


def _reasoning_advice(recipe: Recipe, summary: SplitSummary) -> list[str]:
    """What to set where replies ended in their reasoning."""
    spent = summary.rejected["spent-on-reasoning"]
    if not spent:
        return []
    limit = reply_tokens(recipe, price_of(recipe.teacher, 1.0))
    advice = f"annotate.max_tokens: {4 * limit}"
    if recipe.annotate.max_tokens is not None and limit < DEFAULT_REPLY_TOKENS:
        advice = "annotate.max_tokens: null"
    return [
        f"{spent} of {count(summary.rows, 'row')} spent all {limit:,} tokens of the reply on "
        f"reasoning: set {advice}, or teacher.reasoning_effort: low (none, where the model can "
        "answer without reasoning); only these rows are requested again"
    ]


def annotate_sample(
    annotator: Annotator, sample: list[Example], run: RunFolder, path: Path, progress: Progress
) -> tuple[SplitSummary, float | None]:
    """Annotate some rows into a file of their own, through the run's store.

    Returns their figures and the mean seconds of a reply (None: none was timed). Raises
    PartialError where a limit or the endpoint ended it early; the file is written nevertheless.
    """
    recipe = annotator.recipe
    summary = SplitSummary()
    teacher = make_teacher(recipe)
    if not teacher.is_asked:
        annotations = teacher.annotations(sample, recipe.annotate.splits[0])
        write_annotations(path, annotations, annotator.task, summary)
        return summary, None
    with run.lock("annotate"), open_store(run) as store:
        rows = RowsToRequest(path.stem, lambda: sample, len(sample), summary)
        stopped = send_requests(annotator, teacher, store, [rows], progress)
        write_annotations(path, annotator.derive(store, sample), annotator.task, summary)
        mean_seconds = store.mean_seconds(annotator.identities, recipe.teacher.model)
    if stopped is not None:
        raise stopped
    return summary, mean_seconds


def stratified(
    examples: Iterable[Example], size: int, *, closed: bool
) -> tuple[list[Example], int]:
    """A sample with each gold label in its proportion, and the number of all examples.

    Rows are chosen by a hash of their ids. Without a closed set of labels there is one stratum. One
    pass; no more than ``size`` rows of a stratum are held in memory.
    """
    heaps: dict[str | None, list[tuple[float, int, Example]]] = {}
    counts: dict[str | None, int] = {}
    total = 0
    for total, example in enumerate(examples, 1):
        stratum = example.label if closed else None
        counts[stratum] = counts.get(stratum, 0) + 1
        heap = heaps.setdefault(stratum, [])
        heapq.heappush(heap, (-position(example.id, "pilot"), total, example))
        if len(heap) > size:
            heapq.heappop(heap)
    sizes = _stratum_sizes(counts, min(size, total), total)
    entries = [
        entry
        for stratum, heap in heaps.items()
        for entry in sorted(heap, reverse=True)[: sizes[stratum]]
    ]
    return [example for _, _, example in sorted(entries, key=lambda entry: entry[1])], total


def _stratum_sizes(counts: dict[str | None, int], size: int, total: int) -> dict[str | None, int]:
    """Divide ``size`` over the strata in proportion to their counts, by the largest remainders."""
    exact = {stratum: size * count / total for stratum, count in counts.items()}
    sizes = {stratum: int(share) for stratum, share in exact.items()}
    by_remainder = sorted(exact, key=lambda s: (sizes[s] - exact[s], str(s)))
    for stratum in by_remainder[: size - sum(sizes.values())]:
        sizes[stratum] += 1
    return sizes
