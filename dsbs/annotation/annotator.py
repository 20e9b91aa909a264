"""One row: what to ask for next given the replies so far, and the annotation that they make. Nothing here sends or stores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dsbs.annotation.backends.base import Reply, Request
from dsbs.annotation.logprobs import label_logprob
from dsbs.annotation.prices import Price, price_of
from dsbs.annotation.quality import read_sample
from dsbs.annotation.vote import majority, still_needed
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.prompting import Prompt, PromptRenderer, load_prompt
from dsbs.records.rows import Annotation, Example, Provenance, Reason, Sample, TeacherName, Usage
from dsbs.tasks import make_task
from dsbs.tasks.base import Task
from dsbs.tasks.load import position, stream


@dataclass(frozen=True, slots=True)
class Shard:
    """The ``number``-th (from 1) of ``count`` parts of the rows, by a hash of their ids."""

    number: int
    count: int

    def has(self, row_id: str) -> bool:
        return int(position(row_id, "shard") * self.count) == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}-of-{self.count}"


@dataclass(slots=True)
class Answers:
    """What a row's requests have brought, in the order of asking; the hinted one is the last."""

    samples: list[Sample] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)
    key: str | None = None  # of the first reply

    @property
    def own(self) -> list[Sample]:
        return [sample for sample in self.samples if not sample.hinted]

    @property
    def hinted(self) -> Sample | None:
        return self.samples[-1] if self.samples and self.samples[-1].hinted else None


class Annotator:
    """A recipe's annotation of one row: the same for asking, deriving, planning and batches, so that all agree."""

    def __init__(self, recipe: Recipe, shard: Shard | None = None) -> None:
        self.recipe = recipe
        self.shard = shard
        self.task: Task = make_task(recipe.task)
        self.prompt: Prompt | None = (
            load_prompt(recipe, self.task) if recipe.teacher.is_prompted else None
        )
        self.price: Price | None = price_of(recipe.teacher, recipe.annotate.batch.price_factor)
        if recipe.annotate.max_usd is not None and self.price is None:
            raise UserError(
                f"annotate.max_usd is set, and the price of {recipe.teacher.model} is not known",
                hint="give teacher.price: {input: …, output: …} in US dollars for a million tokens",
            )
        self.renderer = PromptRenderer(self.prompt, self.task) if self.prompt is not None else None

    def examples(self, split: str) -> Iterator[Example]:
        """The split's rows, of this shard alone where there is one."""
        rows = stream(self.recipe, self.task, split)
        return rows if self.shard is None else (row for row in rows if self.shard.has(row.id))

    # --- asking

    def wanted(self, example: Example, answers: Answers) -> list[Request]:
        """The requests that are certainly needed next, all at once; none: the row is done."""
        section = self.recipe.annotate
        own = answers.own
        if answers.hinted is not None:
            return []
        if section.stop_early:
            more = still_needed(own, section.samples, self.task)
        else:
            more = section.samples - len(own)
        if more > 0:
            body = self._body(example, hint=False)
            return [Request(body, len(own) + i) for i in range(more)]
        if section.hint and self._deserves_hint(example, own):
            return [Request(self._body(example, hint=True), 0, hinted=True)]
        return []

    def _deserves_hint(self, example: Example, own: list[Sample]) -> bool:
        """Where the teacher answered, and not with the gold label (STaR, Zelikman et al., 2022, section 3.2)."""
        if example.label is None or all(sample.reason in ("refused", "no-reply") for sample in own):
            return False
        label = majority(own, self.task).label
        return label is None or not self.task.correct(label, example.label)

    def _body(self, example: Example, *, hint: bool) -> dict[str, Any]:
        assert self.renderer is not None and self.prompt is not None
        annotate, teacher = self.recipe.annotate, self.recipe.teacher
        body: dict[str, Any] = {
            "model": teacher.model,
            **self.renderer.render(example, hint=hint).body(teacher.endpoint),
            "max_tokens": annotate.max_tokens,
            "temperature": annotate.temperature,
        }
        if teacher.endpoint == "completions" and self.prompt.stop:
            body["stop"] = list(
                self.prompt.stop[:4]
            )  # the API takes four at most; the reader cuts at all of them
        if annotate.logprobs:
            body["logprobs"] = True if teacher.endpoint == "chat" else 1
        body |= teacher.extra_body
        return {name: value for name, value in body.items() if value is not None}

    # --- reading

    def add(
        self,
        example: Example,
        answers: Answers,
        request: Request | None,
        key: str | None,
        reply: Reply | Reason,
    ) -> None:
        """Read one reply (or the reason why there is none) into ``answers``. ``request`` is None for what lay on disk."""
        answers.key = answers.key or key
        hinted = request is not None and request.hinted
        if not isinstance(reply, Reply):
            answers.samples.append(Sample(text="", reason=reply, hinted=hinted))
            return
        answers.replies.append(reply)
        if self.prompt is None:
            unlabelled: Reason | None = "empty" if example.label is None else None
            answers.samples.append(
                Sample(
                    text=reply.text, label=example.label, rationale=reply.text, reason=unlabelled
                )
            )
            return
        assert self.renderer is not None
        sample = read_sample(
            reply.text,
            self.prompt,
            self.task,
            example.input,
            question=self.task.text(example.input),
            min_words=self.recipe.annotate.min_rationale_words,
            hint=self.renderer.hint(example).replace(str(example.label), "…") if hinted else None,
            finish_reason=reply.finish_reason,
            reasoning=reply.reasoning,
            rationale_from=self.recipe.annotate.rationale_from,
        )
        if self.recipe.annotate.logprobs and sample.label is not None:
            sample = sample.model_copy(
                update={"label_logprob": label_logprob(reply.raw, reply.text, self.prompt)}
            )
        answers.samples.append(sample)

    def annotation(self, example: Example, answers: Answers) -> Annotation:
        """One row of the output."""
        kind = self.recipe.teacher.kind
        provenance: Provenance = (
            "recorded" if kind == "recorded" else "human" if kind == "human" else "own"
        )
        vote = majority(answers.own, self.task)
        label, rationale, reason = vote.label, vote.rationale, vote.reason
        share, logprob = vote.share, vote.logprob
        hinted = answers.hinted
        if hinted is not None and example.label is not None:
            agrees = hinted.label is not None and self.task.correct(hinted.label, example.label)
            if agrees and hinted.reason is None:
                label, rationale, reason, provenance = (
                    example.label,
                    hinted.rationale,
                    None,
                    "hinted",
                )
                share, logprob = None, hinted.label_logprob  # the votes were for another label
            elif reason is not None and hinted.reason is not None:
                reason = hinted.reason
        return Annotation(
            id=example.id,
            input=example.input,
            gold=example.label,
            label=label if reason is None else None,
            own_label=vote.label,
            rationale=rationale if reason is None else None,
            provenance=provenance if reason is None else "none",
            samples=answers.samples,
            vote_share=share,
            label_logprob=logprob,
            accepted=reason is None,
            reject_reason=reason,
            usage=total_usage(answers.replies),
            usd=None
            if self.price is None
            else sum(self.price.usd(reply) for reply in answers.replies),
            teacher=TeacherName(kind=kind, model=self.recipe.teacher.model),
            request_key=answers.key,
        )


def total_usage(parts: Sequence[Reply | Usage]) -> Usage:
    """The tokens of several replies or rows; None where none of them was counted."""

    def total(values: Iterator[int | None]) -> int | None:
        known = [value for value in values if value is not None]
        return sum(known) if known else None

    return Usage(
        prompt_tokens=total(one.prompt_tokens for one in parts),
        completion_tokens=total(one.completion_tokens for one in parts),
        cached_tokens=total(one.cached_tokens for one in parts),
    )
