"""Annotator: decides what to request next for a row, and turns its replies into an annotation.

Everything here is a pure function of the recipe, the row and the replies; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dsbs.annotation.backends import (
    Price,
    Reply,
    Request,
    price_of,
    reply_tokens,
    teacher_class,
)
from dsbs.annotation.backends.adaptation import reasoning_fields
from dsbs.annotation.json_answer import response_format
from dsbs.annotation.parse import label_logprob, read_sample
from dsbs.annotation.shards import Shard
from dsbs.annotation.store import ReplyStore, request_key, token_budget
from dsbs.annotation.vote import majority, samples_needed
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.prompting import Prompt, PromptRenderer, load_prompt
from dsbs.records import Annotation, Example, Reason, Sample, TeacherName, Usage
from dsbs.tasks import Task, make_task
from dsbs.tasks.data import stream

_MAX_STOPS = 4  # that the API accepts; the parser cuts at all of them


@dataclass(slots=True)
class RowReplies:
    """A row's replies and what was read in them, in the order of the requests; the hinted one last.

    ``key`` is that of the first reply.
    """

    samples: list[Sample] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    key: str | None = None

    @property
    def unhinted(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.hinted]

    @property
    def hinted(self) -> Sample | None:
        if self.samples and self.samples[-1].hinted:
            return self.samples[-1]
        return None


class Annotator:
    """A recipe's annotation of one row.

    Buying, deriving, planning and batches all use it, so that they agree on what a row needs.
    """

    def __init__(self, recipe: Recipe, shard: Shard | None = None) -> None:
        self.recipe = recipe
        self.shard = shard
        self.task: Task = make_task(recipe.task)
        self.prompt: Prompt | None = None
        self.renderer: PromptRenderer | None = None
        if recipe.teacher.is_prompted:
            self.prompt = load_prompt(recipe, self.task)
            self.renderer = PromptRenderer(self.prompt, self.task)
        self.price: Price | None = price_of(recipe.teacher, recipe.annotate.batch.price_factor)
        if recipe.annotate.max_usd is not None and self.price is None:
            raise UserError(
                f"annotate.max_usd is set, and the price of {recipe.teacher.model} is not known",
                hint="set teacher.price: {input: …, output: …} in US dollars per million tokens",
            )

    @cached_property
    def identities(self) -> list[str]:
        """The identities of the teacher's endpoints, which are in the replies' keys."""
        return teacher_class(self.recipe.teacher.kind).identities(self.recipe)

    def examples(self, split: str) -> Iterator[Example]:
        """The split's rows, or the shard's part of them."""
        for example in stream(self.recipe, self.task, split):
            if self.shard is None or self.shard.has(example.id):
                yield example

    # --- requests

    def next_requests(self, example: Example, replies: RowReplies) -> list[Request]:
        """The requests that are certainly needed next, all at once; empty when the row is done."""
        section = self.recipe.annotate
        samples = replies.unhinted
        if replies.hinted is not None:
            return []
        needed = section.samples - len(samples)
        if section.stop_early:
            needed = samples_needed(samples, section.samples, self.task)
        if needed > 0:
            body = self._body(example, hint=False)
            return [Request(body, len(samples) + i) for i in range(needed)]
        if section.hint and self._deserves_hint(example, samples):
            return [Request(self._body(example, hint=True), 0, hinted=True)]
        return []

    def _deserves_hint(self, example: Example, samples: list[Sample]) -> bool:
        """Whether the teacher answered with another label than the gold one.

        Source: STaR, Zelikman et al., 2022, section 3.2.
        """
        no_answer = ("refused", "no-reply")
        if example.label is None or all(sample.reason in no_answer for sample in samples):
            return False
        label = majority(samples, self.task).label
        return label is None or not self.task.correct(label, example.label)

    def _body(self, example: Example, *, hint: bool) -> dict[str, Any]:
        assert self.renderer is not None
        assert self.prompt is not None
        annotate = self.recipe.annotate
        teacher = self.recipe.teacher
        body: dict[str, Any] = {
            "model": teacher.model,
            **self.renderer.render(example, hint=hint).body(teacher.endpoint),
            "max_tokens": reply_tokens(self.recipe),
            "temperature": annotate.temperature,
        }
        if teacher.endpoint == "completions" and self.prompt.stop:
            body["stop"] = list(self.prompt.stop[:_MAX_STOPS])
        if annotate.format == "json" and teacher.endpoint == "chat":
            body["response_format"] = response_format(self.task)
        if annotate.logprobs:
            body["logprobs"] = {"chat": True, "completions": 1}[teacher.endpoint]
        body |= reasoning_fields(teacher.reasoning_effort, teacher.served_by[0].base_url)
        body |= teacher.extra_body
        if annotate.max_tokens is None and "max_completion_tokens" in teacher.extra_body:
            body["max_tokens"] = None
        return {name: value for name, value in body.items() if value is not None}

    # --- replies

    def add_reply(
        self,
        example: Example,
        replies: RowReplies,
        request: Request,
        key: str,
        reply: Reply | Reason,
    ) -> None:
        """Read a reply, or the reason why there is none, into ``replies``."""
        replies.key = replies.key or key
        self._add(example, replies, reply, hinted=request.hinted)

    def annotate_reply(self, example: Example, reply: Reply | None) -> Annotation:
        """The annotation of a row whose single reply is on disk (None: there is none)."""
        replies = RowReplies()
        self._add(example, replies, "no-reply" if reply is None else reply, hinted=False)
        return self.annotation(example, replies)

    def _add(
        self, example: Example, replies: RowReplies, reply: Reply | Reason, *, hinted: bool
    ) -> None:
        if isinstance(reply, Reply):
            replies.replies.append(reply)
            replies.samples.append(self._sample(example, reply, hinted=hinted))
        else:
            replies.samples.append(Sample(text="", reason=reply, hinted=hinted))

    def _sample(self, example: Example, reply: Reply, *, hinted: bool) -> Sample:
        if self.prompt is None:  # people's rationales: the gold label is their answer
            reason: Reason | None = "empty" if example.label is None else None
            return Sample(text=reply.text, label=example.label, rationale=reply.text, reason=reason)
        assert self.renderer is not None
        section = self.recipe.annotate
        hint = None
        if hinted:
            hint = self.renderer.hint(example).replace(str(example.label), "…")
        sample = read_sample(
            reply.text,
            self.prompt,
            self.task,
            example.input,
            min_words=section.min_rationale_words,
            hint=hint,
            finish_reason=reply.finish_reason,
            reasoning=reply.reasoning,
            rationale_from=section.rationale_from,
        )
        if section.logprobs and sample.label is not None:
            logprob = label_logprob(reply.raw, reply.text, self.prompt)
            sample = sample.model_copy(update={"label_logprob": logprob})
        return sample

    def annotation(self, example: Example, replies: RowReplies) -> Annotation:
        """One row of the output."""
        teacher = self.recipe.teacher
        vote = majority(replies.unhinted, self.task)
        label = vote.label
        rationale = vote.rationale
        reason = vote.reason
        share = vote.share
        logprob = vote.logprob
        provenance = teacher_class(teacher.kind).provenance
        hinted = replies.hinted
        if hinted is not None and example.label is not None:
            agrees = hinted.label is not None and self.task.correct(hinted.label, example.label)
            if agrees and hinted.reason is None:
                label = example.label
                rationale = hinted.rationale
                reason = None
                provenance = "hinted"
                share = None  # the votes were for another label
                logprob = hinted.label_logprob
            elif reason is not None and hinted.reason is not None:
                reason = hinted.reason
        usd = None
        if self.price is not None:
            usd = sum(self.price.usd(reply) for reply in replies.replies)
        accepted = reason is None
        return Annotation(
            id=example.id,
            input=example.input,
            gold=example.label,
            label=label if accepted else None,
            own_label=vote.label,
            rationale=rationale if accepted else None,
            provenance=provenance if accepted else "none",
            samples=replies.samples,
            vote_share=share,
            label_logprob=logprob,
            accepted=accepted,
            reject_reason=reason,
            usage=total_usage(replies.replies),
            usd=usd,
            teacher=TeacherName(kind=teacher.kind, model=teacher.model),
            request_key=replies.key,
        )

    # --- replies that are stored

    def look_up(self, store: ReplyStore | None, request: Request) -> tuple[str, Reply | Reason]:
        """A request's key with its stored reply, or the reason why there is none."""
        if store is None:
            return request_key(request.body, self.identities[0], request.sample), "no-reply"
        keys = store.keys(request, self.identities)
        tokens = token_budget(request.body)
        stored = store.find(keys.all, tokens, raw=self.recipe.annotate.logprobs)
        if stored is not None:
            return stored
        return keys.now[0], "refused" if store.is_refused(keys.now) else "no-reply"

    def stored_replies(self, store: ReplyStore, example: Example) -> RowReplies:
        """A row's stored replies, gone through in the order in which they were requested."""
        replies = RowReplies()
        while requests := self.next_requests(example, replies):
            for request in requests:
                key, reply = self.look_up(store, request)
                self.add_reply(example, replies, request, key, reply)
        return replies

    def derive(self, store: ReplyStore, examples: Iterable[Example]) -> Iterator[Annotation]:
        """One annotation per example, from the stored replies alone."""
        for example in examples:
            yield self.annotation(example, self.stored_replies(store, example))

    def usd_spent(self, store: ReplyStore) -> float:
        """US dollars that the stored replies to the recipe's rows cost."""
        if self.price is None:
            return 0.0
        return sum(
            self.price.usd(reply)
            for split in self.recipe.annotate.splits
            for example in self.examples(split)
            for reply in self.stored_replies(store, example).replies
        )


def total_usage(usages: Sequence[Reply | Usage]) -> Usage:
    """The tokens of several replies or rows; None where none of them was counted."""
    return Usage(
        prompt_tokens=_total(usage.prompt_tokens for usage in usages),
        completion_tokens=_total(usage.completion_tokens for usage in usages),
        cached_tokens=_total(usage.cached_tokens for usage in usages),
    )


def _total(counts: Iterable[int | None]) -> int | None:
    counted = [count for count in counts if count is not None]
    if not counted:
        return None
    return sum(counted)
