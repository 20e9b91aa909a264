"""Before the money is spent: what a run would send, and a pilot that tells what it would bring."""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.annotation.annotator import Annotator, Answers, Shard
from dsbs.annotation.backends import identities, in_flight, is_asked, make_teacher
from dsbs.annotation.backends.base import Reply
from dsbs.annotation.deriving import derive, kept, look_up, recalled, write
from dsbs.annotation.run import buy_online, open_store, shard_folder, store_file, wait_for
from dsbs.annotation.summary import SplitSummary
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.files import canonical_json
from dsbs.progress import NoProgress, Progress
from dsbs.records.intervals import Rate, wilson
from dsbs.records.rows import Example
from dsbs.run_folder import RunFolder, run_folder
from dsbs.tasks.load import position

ASSUMED_SECONDS = 3.0  # of a reply, while none has been timed


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run would send at most: the first prompt, requests, and a rough token count (four characters a token)."""

    first_prompt: str
    rows: int
    requests: int
    cached: int
    prompt_tokens: int
    max_completion_tokens: int
    usd: float | None  # at most, by these tokens; None: the price is not known
    seconds: float  # at the recipe's concurrency, the teacher's own and caps
    seconds_a_reply: float
    is_timed: bool  # whether that is the mean of earlier replies; else it is assumed

    def as_json(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "cached": self.cached,
            "rows": self.rows,
            "prompt_tokens": self.prompt_tokens,
            "max_completion_tokens": self.max_completion_tokens,
            "max_usd": self.usd,
            "seconds": round(self.seconds, 1),
            "seconds_a_reply": round(self.seconds_a_reply, 3),
            "is_timed": self.is_timed,
            "first_prompt": self.first_prompt,
        }


def plan(
    recipe: Recipe,
    out: str | Path | None = None,
    shard: Shard | None = None,
    *,
    batch: bool = False,
) -> Plan:
    """What ``annotate`` would send, without sending it or writing anything. Hints for wrong rows are not foreseen."""
    work = Annotator(recipe, shard)
    if not is_asked(recipe.teacher.kind):
        raise UserError(
            f"a teacher of kind {recipe.teacher.kind} sends nothing",
            hint="run without --dry-run: it costs nothing",
        )
    assert work.renderer is not None
    whole = run_folder(recipe, out)
    run = whole if shard is None else shard_folder(whole, shard)
    there = store_file(run).is_file() or (shard is not None and store_file(whole).is_file())
    store = open_store(run, None if shard is None else whole) if there else None
    names = identities(recipe)
    first, rows, requests, cached, characters = "", 0, 0, 0, 0
    for split in recipe.annotate.splits:
        for example in work.examples(split):
            rows += 1
            first = first or work.renderer.render(example).text
            answers = Answers()
            while wave := work.wanted(example, answers):
                for request in wave:
                    key, outcome = look_up(work, store, request, names)
                    cached += isinstance(outcome, Reply)
                    if outcome == "no-reply":
                        requests += 1
                        characters += len(canonical_json(request.body))
                    work.add(example, answers, request, key, outcome)
    timed = store.typical_seconds(names, recipe.teacher.model) if store is not None else None
    if store is not None:
        store.close()
    prompt_tokens, completion_tokens = characters // 4, requests * recipe.annotate.max_tokens
    each = ASSUMED_SECONDS if timed is None else timed
    return Plan(
        first_prompt=first,
        rows=rows,
        requests=requests,
        cached=cached,
        prompt_tokens=prompt_tokens,
        max_completion_tokens=completion_tokens,
        usd=None
        if work.price is None
        else work.price.of(prompt_tokens, completion_tokens, lane="batch" if batch else "online"),
        seconds=_seconds(recipe, requests, prompt_tokens + completion_tokens, each),
        seconds_a_reply=each,
        is_timed=timed is not None,
    )


def _seconds(recipe: Recipe, requests: int, tokens: int, each: float) -> float:
    """How long so many requests take: the slowest of what the teacher answers side by side, rpm and tpm decides."""
    found = [requests * each / in_flight(recipe)]
    endpoints = recipe.teacher.served_by
    for units, caps in (
        (requests, [one.rpm for one in endpoints]),
        (tokens, [one.tpm for one in endpoints]),
    ):
        known = [cap for cap in caps if cap is not None]
        if len(known) == len(caps):
            found.append(60 * units / sum(known))
    return max(found)


@dataclass(frozen=True, slots=True)
class PilotResult:
    """What a sample of the train rows brought, and what all of them would cost at that rate."""

    summary: SplitSummary
    path: Path
    rows: int  # that the whole run has
    projected_usd: float | None
    projected_seconds: float

    @property
    def parse_rate(self) -> Rate | None:
        """The share of rows with a readable label and a sound rationale."""
        return wilson(self.summary.accepted, self.summary.rows)

    def as_json(self) -> dict[str, Any]:
        rate = self.parse_rate
        return {
            **self.summary.as_json(),
            "parse_rate": None if rate is None else round(rate.value, 4),
            "parse_rate_ci95": None if rate is None else [round(x, 4) for x in rate.ci95],
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
    """Annotate a stratified sample of the train rows into ``annotate/pilot.jsonl``; a later run finds its replies bought.

    Raises what ``annotate`` raises; no other file of the run is touched.
    """
    if not is_asked(recipe.teacher.kind):
        raise UserError(
            f"a teacher of kind {recipe.teacher.kind} costs nothing", hint="run without --pilot"
        )
    work = Annotator(recipe)
    split = recipe.annotate.splits[0]
    sample, total = stratified(work.examples(split), rows, closed=work.task.labels is not None)
    for other in recipe.annotate.splits[1:]:
        total += sum(1 for _ in work.examples(other))
    path = run_folder(recipe, out) / "annotate" / "pilot.jsonl"
    summary, each = annotate_sample(
        work, sample, run_folder(recipe, out), path, progress or NoProgress()
    )
    each = ASSUMED_SECONDS if each is None else each
    usd = None if summary.usd is None or not summary.rows else summary.usd / summary.rows * total
    requests = total * recipe.annotate.samples
    tokens = (summary.prompt_tokens + summary.completion_tokens) * total // max(1, summary.rows)
    return PilotResult(summary, path, total, usd, _seconds(recipe, requests, tokens, each))


def annotate_sample(
    work: Annotator, sample: list[Example], run: Path, path: Path, progress: Progress
) -> tuple[SplitSummary, float | None]:
    """Annotate some rows into a file of their own, by the run's store. Returns their figures and the mean seconds of a reply.

    Raises PartialError where a limit or the endpoint ended it early; the file is written all the same.
    """
    recipe, summary = work.recipe, SplitSummary()
    teacher = make_teacher(recipe)
    if not is_asked(recipe.teacher.kind):
        write(work, recalled(work, teacher, sample, recipe.annotate.splits[0]), path, summary)
        return summary, None
    with RunFolder(run).lock("annotate"), open_store(run) as store:
        title = path.stem
        stopped = wait_for(
            buy_online(
                work,
                teacher,
                store,
                progress,
                {title: len(sample)},
                {title: summary},
                lambda _: sample,
            )
        )
        derive(work, sample, path, summary, kept(work, store))
        seconds = store.typical_seconds(identities(recipe), recipe.teacher.model)
    if stopped is not None:
        raise stopped
    return summary, seconds


def stratified(
    examples: Iterable[Example], size: int, *, closed: bool
) -> tuple[list[Example], int]:
    """``size`` of the examples, each gold label in its proportion, chosen by id hash; and how many examples there are.

    Where labels are no closed set there is one stratum. One pass, and no more than ``size`` rows of a stratum are held.
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
    size = min(size, total)
    exact = {stratum: size * count / total for stratum, count in counts.items()}
    chosen = {stratum: int(share) for stratum, share in exact.items()}
    for stratum in sorted(exact, key=lambda s: (chosen[s] - exact[s], str(s)))[
        : size - sum(chosen.values())
    ]:
        chosen[stratum] += 1  # largest remainders first
    found = [
        entry
        for stratum, heap in heaps.items()
        for entry in sorted(heap, reverse=True)[: chosen[stratum]]
    ]
    return [example for _, _, example in sorted(found, key=lambda entry: entry[1])], total
