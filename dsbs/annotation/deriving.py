"""From replies to annotations: one row of output for every example, whatever came of it. Sends nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from dsbs.annotation.annotator import Annotator, Answers
from dsbs.annotation.backends import identities
from dsbs.annotation.backends.base import Archive, Reply, Request
from dsbs.annotation.backends.ensemble import EnsembleTeacher
from dsbs.annotation.store import ReplyStore, budget, request_keys
from dsbs.annotation.summary import SplitSummary
from dsbs.files import write_jsonl
from dsbs.progress import Progress
from dsbs.records.rows import Annotation, Example, Reason


def look_up(
    work: Annotator, store: ReplyStore | None, request: Request, names: Sequence[str]
) -> tuple[str, Reply | Reason]:
    """The kept reply to a request with its key, or the reason why there is none."""
    keys = request_keys(request, names)
    found = (
        None
        if store is None
        else store.find(keys, budget(request.body), raw=work.recipe.annotate.logprobs)
    )
    if found is not None:
        return found
    return keys[0], "refused" if store is not None and store.is_refused(keys) else "no-reply"


def kept(work: Annotator, store: ReplyStore) -> Callable[[Example], Answers]:
    """What the store has for a row, walked in the order in which it was asked for."""
    names = identities(work.recipe)

    def answers_of(example: Example) -> Answers:
        answers = Answers()
        while wave := work.wanted(example, answers):
            for request in wave:
                work.add(example, answers, request, *look_up(work, store, request, names))
        return answers

    return answers_of


def spent_before(work: Annotator, store: ReplyStore) -> float:
    """US dollars for the replies that the store has for the rows by now."""
    if work.price is None:
        return 0.0
    answers_of = kept(work, store)
    rows = (example for split in work.recipe.annotate.splits for example in work.examples(split))
    return sum(work.price.usd(reply) for example in rows for reply in answers_of(example).replies)


def derive(
    work: Annotator,
    examples: Iterable[Example],
    path: Path,
    summary: SplitSummary,
    answers_of: Callable[[Example], Answers],
    progress: Progress | None = None,
) -> None:
    """Write one annotation for every example to ``path`` and count what is in it."""
    write(
        work,
        (work.annotation(example, answers_of(example)) for example in examples),
        path,
        summary,
        progress,
    )


def write(
    work: Annotator,
    annotations: Iterable[Annotation],
    path: Path,
    summary: SplitSummary,
    progress: Progress | None = None,
) -> None:
    """Write annotations to ``path`` and count what is in them."""

    def rows() -> Iterator[str]:
        for annotation in annotations:
            summary.add(annotation, work.task)
            if progress is not None and summary.rows % 1024 == 0:
                progress.update(summary.rows)
            yield annotation.model_dump_json(
                by_alias=True
            )  # keys in the schema's order: equal rows are equal bytes

    write_jsonl(path, rows())


def recalled(
    work: Annotator, archive: Archive | EnsembleTeacher, examples: Iterable[Example], split: str
) -> Iterator[Annotation]:
    """One annotation for every example, from what lies on disk. Raises UserError where that does not fit the rows."""
    if isinstance(archive, EnsembleTeacher):
        yield from archive.annotations(examples, split)
        return
    for example in examples:
        answers = Answers()
        reply = archive.recall(example)
        work.add(example, answers, None, None, "no-reply" if reply is None else reply)
        yield work.annotation(example, answers)
