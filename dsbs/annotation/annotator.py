"""Annotator: decides what to request next for a row, and turns its replies into an annotation.

Everything here is a pure function of the recipe, the row and the replies; nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    total_usage,
)
from dsbs.annotation.backends.adaptation import reasoning_fields
from dsbs.annotation.json_answer import response_format
from dsbs.annotation.parse import label_logprob, read_sample
from dsbs.annotation.store import ReplyStore, Stored, request_key, token_budget
from dsbs.annotation.vote import Vote, majority, samples_needed
from dsbs.config import Recipe
from dsbs.errors import PartialError, UserError
from dsbs.files import canonical_json
from dsbs.formatting import count
from dsbs.prompting import Prompt, PromptRenderer, load_prompt
from dsbs.records import Annotation, Example, NextRounds, Reason, Sample, TeacherName
from dsbs.tasks import Task, make_task
from dsbs.tasks.data import stream
from dsbs.tasks.shards import Shard

CHARACTERS_PER_TOKEN = 4  # until the endpoint has counted
ASSUMED_TOKENS = 800  # of a reply with its reasoning, where the recipe sets no limit
_CHARACTERS_PER_TOKEN_AT_MOST = 9  # of a prompt that was read as a whole
_CHECKED_CHARACTERS = 4000  # shorter prompts are not checked
_MAX_STOPS = 4  # that the API accepts; the parser cuts at all of them


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a request: its reply, or the reason why there is none.

    ``detail`` is the endpoint's message, ``wasted`` what was billed for it without an answer.
    """

    key: str
    reply: Reply | None = None
    reason: Reason = "no-reply"
    detail: str | None = None
    wasted: tuple[Reply, ...] = ()


@dataclass(slots=True)
class RowReplies:
    """A row's replies and what was read in them, in the order of the requests; the hinted one last.

    ``key`` is that of the first reply. ``wasted`` are billed replies that hold no answer;
    ``details`` are the endpoint's messages about requests without a reply.
    """

    samples: list[Sample] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    wasted: list[Reply] = field(default_factory=list)
    details: dict[Reason, str] = field(default_factory=dict)
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

    def __init__(
        self, recipe: Recipe, shard: Shard | None = None, rounds: NextRounds | None = None
    ) -> None:
        self.recipe = recipe
        self.shard = shard
        self.rounds = rounds or NextRounds()
        self.task: Task = make_task(recipe.task)
        self.prompt: Prompt | None = None
        self.renderer: PromptRenderer | None = None
        if recipe.teacher.is_prompted:
            self.prompt = load_prompt(recipe, self.task)
            self.renderer = PromptRenderer(self.prompt, self.task)
        self.context_check = ContextCheck()
        self.price: Price | None = price_of(recipe.teacher, recipe.annotate.batch.price_factor)
        is_asked = teacher_class(recipe.teacher.kind).is_asked
        if is_asked and recipe.annotate.max_usd is not None and self.price is None:
            raise UserError(
                f"annotate.max_usd is set, and the price of {recipe.teacher.model} is not known",
                hint="set teacher.price: {input: …, output: …} in US dollars per million tokens",
            )

    @cached_property
    def identities(self) -> list[str]:
        """The identities of the teacher's endpoints, which are in the replies' keys."""
        return teacher_class(self.recipe.teacher.kind).identities(self.recipe)

    def examples(self, split: str) -> Iterator[Example]:
        """The split's rows, or the shard's part of them; of train, those that rounds chose."""
        for example in stream(self.recipe, self.task, split):
            is_chosen = split != "train" or self.rounds.has(example)
            if is_chosen and (self.shard is None or self.shard.has(example.id)):
                yield example

    # --- requests

    def first_replies(self, example: Example) -> RowReplies:
        """What a row brings: nothing, or its recorded completion (``annotate.use_recorded``)."""
        replies = RowReplies()
        if self.recipe.annotate.use_recorded and example.completion is not None:
            sample = self._sample(example, Reply(text=example.completion), hinted=False)
            if sample.reason is None:
                replies.samples.append(sample)
        return replies

    def next_requests(self, example: Example, replies: RowReplies) -> list[Request]:
        """The requests that are certainly needed next, all at once; empty when the row is done."""
        section = self.recipe.annotate
        samples = replies.unhinted
        if replies.hinted is not None:
            return []
        needed = section.samples - len(samples)
        if section.stop_early:
            needed = samples_needed(samples, section.samples, self.task, section.score_vote)
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
        label = self.vote(samples).label
        return label is None or not self.task.correct(label, example.label)

    def _body(self, example: Example, *, hint: bool) -> dict[str, Any]:
        assert self.renderer is not None
        assert self.prompt is not None
        annotate = self.recipe.annotate
        teacher = self.recipe.teacher
        body: dict[str, Any] = {
            "model": teacher.model,
            **self.renderer.render(example, hint=hint).body(teacher.endpoint),
            "max_tokens": reply_tokens(self.recipe, self.price),
            "temperature": annotate.temperature,
        }
        if teacher.endpoint == "completions" and self.prompt.stop:
            body["stop"] = list(self.prompt.stop[:_MAX_STOPS])
        if annotate.format == "json" and teacher.endpoint == "chat":
            body["response_format"] = response_format(self.task, self.prompt.order)
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
        outcome: Outcome,
    ) -> None:
        """Read a reply, or the reason why there is none, into ``replies``."""
        replies.key = replies.key or outcome.key
        if outcome.reply is not None:
            self.context_check.add(request.body, outcome.reply)
        self._add(example, replies, outcome, hinted=request.hinted)

    def annotate_reply(self, example: Example, reply: Reply | None) -> Annotation:
        """The annotation of a row whose single reply is on disk (None: there is none)."""
        replies = RowReplies()
        self._add(example, replies, Outcome("", reply), hinted=False)
        return self.annotation(example, replies)

    def _add(
        self, example: Example, replies: RowReplies, outcome: Outcome, *, hinted: bool
    ) -> None:
        replies.wasted += outcome.wasted
        if outcome.reply is not None:
            replies.replies.append(outcome.reply)
            replies.samples.append(self._sample(example, outcome.reply, hinted=hinted))
            return
        replies.samples.append(Sample(text="", reason=outcome.reason, hinted=hinted))
        if outcome.detail is not None:
            replies.details.setdefault(outcome.reason, outcome.detail)

    def _sample(self, example: Example, reply: Reply, *, hinted: bool) -> Sample:
        if self.prompt is None:  # people's rationales: the gold label is their answer
            reason: Reason | None = "empty" if example.label is None else None
            return Sample(text=reply.text, label=example.label, rationale=reply.text, reason=reason)
        assert self.renderer is not None
        section = self.recipe.annotate
        hint = None
        if hinted:
            hint = self.renderer.hint(example)
            hint = hint.replace(self.renderer.hinted_label(example), "…")
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
            logprob = label_logprob(reply.raw, reply.text, self.prompt, self.task)
            sample = sample.model_copy(update={"label_logprob": logprob})
        return sample

    def annotation(self, example: Example, replies: RowReplies) -> Annotation:
        """One row of the output."""
        teacher = self.recipe.teacher
        vote = self.vote(replies.unhinted)
        label = vote.label
        rationale = vote.rationale
        reason = vote.reason
        share = vote.share
        part_shares = vote.part_shares
        logprob = vote.logprob
        provenance = teacher_class(teacher.kind).provenance
        if replies.key is None and not replies.replies:  # nothing was asked
            provenance = "recorded"
        hinted = replies.hinted
        if hinted is not None and example.label is not None:
            agrees = hinted.label is not None and self.task.correct(hinted.label, example.label)
            if agrees and hinted.reason is None:
                label = example.label
                rationale = hinted.rationale
                reason = None
                provenance = "hinted"
                share = part_shares = None  # the votes were for another label
                logprob = hinted.label_logprob
            elif reason is not None and hinted.reason is not None:
                reason = hinted.reason
        billed = [*replies.replies, *replies.wasted]
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
            part_shares=part_shares,
            label_logprob=logprob,
            accepted=accepted,
            reject_reason=reason,
            reject_detail=None if reason is None else replies.details.get(reason),
            usage=total_usage(billed),
            usd=total_usd(self.price, billed),
            teacher=TeacherName(kind=teacher.kind, model=teacher.model),
            request_key=replies.key,
        )

    def vote(self, samples: Sequence[Sample]) -> Vote:
        """The vote of a row's samples without a hint."""
        return majority(samples, self.task, self.recipe.annotate.score_vote)

    # --- replies that are stored

    def look_up(self, store: ReplyStore | None, request: Request) -> Outcome:
        """A request's stored reply, or the reason why there is none."""
        if store is None:
            return Outcome(request_key(request.body, self.identities[0], request.sample))
        keys = store.keys(request, self.identities)
        return self.outcome(store.look_up(keys, token_budget(request.body), raw=self.reads_raw))

    @property
    def reads_raw(self) -> bool:
        """Whether a reply's raw body is read, beside its text."""
        return self.recipe.annotate.logprobs

    def outcome(self, stored: Stored) -> Outcome:
        """What is stored for a request, as its outcome."""
        reason: Reason = "no-reply" if stored.refusal is None else "refused"
        detail = stored.refusal or stored.failure
        return Outcome(stored.key, stored.reply, reason, detail, stored.wasted)

    def stored_replies(self, store: ReplyStore, example: Example) -> RowReplies:
        """A row's stored replies, gone through in the order in which they were requested."""
        replies = self.first_replies(example)
        while requests := self.next_requests(example, replies):
            for request in requests:
                self.add_reply(example, replies, request, self.look_up(store, request))
        return replies

    def derive(self, store: ReplyStore, examples: Iterable[Example]) -> Iterator[Annotation]:
        """One annotation per example, from the stored replies alone."""
        for example in examples:
            yield self.annotation(example, self.stored_replies(store, example))

    def usd_spent(self, store: ReplyStore) -> float:
        """US dollars that the stored replies to the recipe's rows cost.

        A reply whose tokens the endpoint did not count has cost the most that it may cost.
        """
        if self.price is None:
            return 0.0
        spent = 0.0
        # Rows with the same request share its replies; a hint is the gold label.
        keys: set[tuple[str | None, str | None]] = set()
        for split in self.recipe.annotate.splits:
            for example in self.examples(split):
                replies = self.stored_replies(store, example)
                key = (replies.key, None if replies.hinted is None else example.label)
                if key in keys:
                    continue
                keys.add(key)
                for reply in [*replies.replies, *replies.wasted]:
                    usd = self.price.usd(reply)
                    if usd is None:
                        body = self._body(example, hint=False)
                        usd = self.price.of(
                            estimated_tokens(body), token_budget(body), lane=reply.lane
                        )
                    spent += usd
        return spent


class ContextCheck:
    """Finds servers that cut prompts to their context window without an error, as Ollama does.

    The only trace is the number of prompt tokens
    (https://github.com/ollama/ollama/issues/3839): far below what was sent, or the same for prompts
    of very different length.
    """

    def __init__(self) -> None:
        self._lengths: dict[int, list[int]] = {}  # characters of prompts, by their counted tokens
        self._shortest_count: tuple[int, int] | None = None  # characters and counted tokens
        self._has_warned = False

    def add(self, body: Mapping[str, Any], reply: Reply) -> None:
        if not reply.prompt_tokens:
            return
        messages = body.get("messages") or [{"content": body.get("prompt")}]
        characters = sum(len(str(message["content"])) for message in messages)
        counted = reply.prompt_tokens
        if (reply.cached_tokens or 0) > counted:
            counted += reply.cached_tokens or 0  # some servers count them beside the others
        lengths = self._lengths.setdefault(counted, [])
        lengths[:] = [
            min([*lengths, characters]),
            max([*lengths, characters]),
            sum(lengths[2:]) + 1,
        ]
        if characters > max(_CHECKED_CHARACTERS, _CHARACTERS_PER_TOKEN_AT_MOST * counted):
            self._shortest_count = characters, counted

    def warning(self) -> str | None:
        """The warning, the first time it applies; None otherwise."""
        if self._has_warned or not self._lengths:
            return None
        largest = max(self._lengths)
        shortest, longest, prompts = self._lengths[largest]
        is_ceiling = prompts >= 3 and longest > max(_CHECKED_CHARACTERS, 1.3 * shortest)
        if self._shortest_count is not None:
            characters, counted = self._shortest_count
            trace = (
                f"{counted:,} prompt tokens were counted for a prompt of {characters:,} characters"
            )
        elif is_ceiling:
            trace = (
                f"{largest:,} prompt tokens were counted for each of {prompts} prompts of "
                f"{shortest:,} to {longest:,} characters"
            )
        else:
            return None
        self._has_warned = True
        return (
            f"{trace}: the server seems to cut what does not fit its context window. Enlarge the "
            "window (Ollama: OLLAMA_CONTEXT_LENGTH or num_ctx), or shorten the rows; set "
            "teacher.context_tokens to check prompts before they are sent"
        )


def total_usd(price: Price | None, replies: Sequence[Reply]) -> float | None:
    """US dollars for several replies. None: the price or a number of tokens is unknown."""
    if price is None:
        return None
    costs = [price.usd(reply) for reply in replies]
    return None if None in costs else sum(cost for cost in costs if cost is not None)


def expected_tokens(request: Request, recipe: Recipe) -> int:
    """What a request is expected to use, for rate limits: its prompt and its reply's limit, or an
    assumption where the recipe sets none.
    """
    tokens = token_budget(request.body)
    if recipe.annotate.max_tokens is None:
        tokens = min(tokens, ASSUMED_TOKENS)
    return estimated_tokens(request.body) + tokens


def estimated_tokens(body: dict[str, Any]) -> int:
    """A rough count of a request's prompt tokens."""
    return len(canonical_json(body)) // CHARACTERS_PER_TOKEN


def max_requests_reached(sent: int) -> PartialError:
    """The error for a run that annotate.max_requests ends."""
    return PartialError(
        f"annotate.max_requests: the limit of {count(sent, 'request')} is reached",
        hint="run the same command for as many more, or raise the limit: the replies so far are "
        "stored",
    )
