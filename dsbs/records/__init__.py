"""Records: the rows and student records that stages exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from dsbs.records.subsets import Subset

Reason = Literal[
    "unparsed",  # the answer anchor is missing, or what follows it cannot be read
    "empty",  # no text, no rationale, or nothing after the anchor
    "truncated",  # the token budget ended before the answer did
    "spent-on-reasoning",  # the token budget ended in hidden reasoning text, before any answer
    "label-outside-set",  # a readable answer that is not one of the task's labels or choices
    "not-in-input",  # a value that must occur in the input does not (task.fields: verbatim)
    "several-answers",  # two or more different answers
    "refused",  # the endpoint rejected the request, or the model declined
    "contradicts-rationale",  # the rationale concludes with another answer than the one given
    "copies-exemplar",  # the rationale is an exemplar's, word for word
    "too-short",  # the rationale has fewer words than annotate.min_rationale_words
    "hint-leaked",  # a rationale written with the answer as a hint mentions the hint
    "no-reply",  # every attempt failed; the next run tries again
    "rejected-in-review",  # by a person: see dsbs.records.reviews; never in the annotation file
]
Provenance = Literal["own", "hinted", "recorded", "human", "reviewed", "none"]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Text in which no label can be read, and why. Never an empty answer in disguise."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One input row."""

    id: str
    input: dict[str, Any]
    """The task's canonical fields."""
    label: str | None = None
    """The gold label. None: unlabeled."""
    rationale: str | None = None
    """A rationale in the data set."""
    completion: str | None = None
    """A teacher's raw text recorded with the row."""
    line: int | None = field(default=None, compare=False)
    """Where it is in its file: the line, or the number of the row. None: unknown."""
    copy_of: str | None = field(default=None, compare=False)
    """The id of the file's first row with the same input, if that is another row."""
    is_served: bool = field(default=False, compare=False)
    """Whether it is a row of ``task.data.served``, which is only ever trained on."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Usage(_Record):
    """Token counts as the endpoint reports them. None: not reported."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    """Prompt tokens served from the provider's prompt cache."""


def _is_none(value: object) -> bool:
    return value is None


class Sample(_Record):
    """One parsed reply: raw text, and the label and rationale in it, or why it is not used.

    A readable label is kept even if the rationale is rejected (``reason``). ``run`` and ``weight``
    are those of an ensemble, and left out of the file elsewhere.
    """

    text: str
    label: str | None = None
    rationale: str | None = None
    reason: Reason | None = None
    finish_reason: str | None = None
    hinted: bool = False
    """Whether the request gave the answer away."""
    label_logprob: float | None = None
    """The log-probability of the label's tokens, in nats."""
    run: str | None = Field(None, exclude_if=_is_none)
    """The ensemble's member that the sample is from, as the recipe names it."""
    weight: float | None = Field(None, exclude_if=_is_none)
    """The weight of its vote: the member's, divided among its readable samples of the row."""

    @property
    def vote(self) -> float:
        """The weight of its vote; 1 outside an ensemble."""
        return 1.0 if self.weight is None else self.weight


Criterion = Literal["both", "uncertainty", "diversity", "random"]
"""How the next rows to annotate are chosen."""


class TeacherName(_Record):
    """The teacher's kind and model."""

    kind: str
    model: str | None = None


class Annotation(_Record):
    """One line of ``annotate/<split>.jsonl``: one for every input row, accepted or not."""

    schema_: Literal["dsbs.annotation/1"] = Field("dsbs.annotation/1", alias="schema")
    id: str
    input: dict[str, Any]
    gold: str | None = None
    label: str | None = None
    """The label of the rationale. None: the row is rejected. Gold if the provenance is hinted."""
    own_label: str | None = None
    """The teacher's answer without a hint, rejected or not; its accuracy is measured on it."""
    rationale: str | None = None
    provenance: Provenance = "none"
    samples: list[Sample] = []
    vote_share: float | None = None
    """The winning label's share of the readable samples, in [0, 1]; where labels consist of parts,
    the smallest of ``part_shares``."""
    part_shares: dict[str, float] | None = Field(None, exclude_if=_is_none)
    """The share of each winning part: a possible label, or a field. None: labels have no parts."""
    label_logprob: float | None = None
    """The mean over the winning samples, in nats."""
    accepted: bool = False
    reject_reason: Reason | None = None
    reject_detail: str | None = Field(None, exclude_if=_is_none)
    """Why there is no reply, in the endpoint's words."""
    usage: Usage = Usage()
    usd: float | None = None
    """US dollars for the row's replies. None: the price or a number of tokens is unknown."""
    teacher: TeacherName
    request_key: str | None = None
    chosen_by: Criterion | None = Field(None, exclude_if=_is_none)
    """How `dsbs annotate --next` chose the row. random: it is in the random sample. None: it did
    not choose it."""

    @property
    def has_reply(self) -> bool:
        """Whether the teacher has replied, or has refused to; otherwise the row is unfinished."""
        return self.reject_reason != "no-reply"


class NextRound(_Record):
    """One round of ``dsbs annotate --next``: the train rows it chose, and by what."""

    by: Criterion | Literal["earlier"]
    """earlier: the rows that were annotated before the first round."""
    rows: tuple[str, ...]
    """The ids of the rows to annotate."""
    random: tuple[str, ...] = ()
    """Ids that this round adds to the random sample; earlier rounds may have chosen some."""
    seed: int = 0
    unlabeled: int = 0
    """Rows that could be chosen."""
    compared: int = 0
    """Those of them that were compared by uncertainty or diversity."""
    states: str | None = None
    """Whose states measured diversity: a student, minilm-l6 or TF-IDF. None: nobody's."""
    student: str | None = None
    """The student that was asked. None: there was none, or none was needed."""
    fingerprint: str | None = None
    """The student's."""
    started: str = ""
    done: bool = False
    """Whether its rows are annotated. Until then, the same command continues the round."""


class NextRounds(_Record):
    """``annotate/next.json``: the rounds of ``dsbs annotate --next`` in a run.

    Once there is a round, the run's train rows are those that rounds have chosen.
    """

    schema_: Literal["dsbs.next/1"] = Field("dsbs.next/1", alias="schema")
    rounds: tuple[NextRound, ...] = ()

    @property
    def unfinished(self) -> NextRound | None:
        """The round whose rows are not annotated yet: always the last one."""
        if self.rounds and not self.rounds[-1].done:
            return self.rounds[-1]
        return None

    @cached_property
    def chosen(self) -> dict[str, Criterion | Literal["earlier"]]:
        """How each row was chosen, by its id; rows of the random sample are ``random``."""
        chosen = {row: entry.by for entry in self.rounds for row in entry.rows}
        return chosen | {row: "random" for entry in self.rounds for row in entry.random}

    def has(self, row: Example) -> bool:
        """Whether a train row is annotated and trained on. Without rounds, every row is."""
        return not self.rounds or row.is_served or row.id in self.chosen

    def of(self, rows: Sequence[Example]) -> list[Example]:
        """The train rows that are annotated and trained on."""
        return [row for row in rows if self.has(row)]

    def marked(self, annotation: Annotation) -> Annotation:
        """A train row's annotation with how the row was chosen."""
        by = self.chosen.get(annotation.id, "earlier")
        if by == "earlier":
            return annotation
        return annotation.model_copy(update={"chosen_by": by})


class Prediction(_Record):
    """One line of ``eval/predictions/<system>.jsonl``. None: unknown."""

    schema_: Literal["dsbs.prediction/1", "dsbs.prediction/2"] = Field(
        "dsbs.prediction/2", alias="schema"
    )
    id: str
    input: dict[str, Any] | None = None
    gold: str | None = None
    raw: str
    """The text as generated."""
    prediction: str | None = None
    """The label that the task reads in ``raw``. None: unreadable."""
    correct: bool | None = None
    probability: float | None = None
    """The system's probability, in [0, 1]: of ``prediction`` where there is a distribution, else of
    ``raw``."""
    distribution: dict[str, float] | None = Field(None, exclude_if=_is_none)
    """The probability of each label. None: the system has none, as where a label is written and
    labels are not scored."""
    field_probabilities: dict[str, float] | None = Field(None, exclude_if=_is_none)
    """The probability of each field's value; ``probability`` is the smallest. None: there are no
    fields, or they have none."""
    truncated: bool | None = None
    """Whether the token budget ended the text."""
    rationale: str | None = None
    rationale_truncated: bool | None = None
    latency_ms: float | None = None
    """The batch's wall time, divided by its rows."""
    made_by: str
    """Hash of the model, the rows and the decoding; the teacher's name."""
    model: str | None = None
    """Hash of the student; the teacher's kind and name."""
    prompt: str | None = None
    """Hash of the teacher's prompt, or of the student's prefixes."""
    calibration: str | None = Field(None, exclude_if=_is_none)
    """Hash of what a student's probabilities depend on beside the model: temperature, thresholds of
    labels, ``eval.score_labels``. None: not a student's, or of an earlier version."""


class TrainingCost(_Record):
    """Training cost: time, tokens and memory, summed over interruptions.

    Steps that a kill lost and that were repeated count once. ``tokens`` are the input and target
    tokens of every view in all steps, without padding; ``tokens_per_s`` leaves out validating and
    saving, which ``wall_s`` includes. ``peak_memory_of``: the process's resident
    set, or PyTorch's tensors on the first GPU.
    """

    device: str
    processes: int
    wall_s: float
    tokens: int
    tokens_per_s: float
    peak_memory_mb: float
    peak_memory_of: Literal["process", "gpu"]

    @model_validator(mode="before")
    @classmethod
    def _drop_energy(cls, data: Any) -> Any:
        """Records of earlier versions have energy counters, which were removed."""
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if not name.startswith("energy_")}
        return data


class TrainedStudent(_Record):
    """A finished student, as ``train/<name>/train.json`` records it."""

    name: str
    method: str
    labels: str
    seed: int
    path: str
    valid_accuracy: float
    """Validation accuracy at the saved step, in [0, 1]."""
    best_step: int
    steps: int
    examples_per_s: float
    """While stepping: without validating and saving, which ``wall_s`` includes."""
    wall_s: float
    parameters: int
    """Those that predicting a label needs: a rationale decoder is not counted."""
    trainable_parameters: int | None = None
    """LoRA's adapters, or all, a rationale decoder included. None: not recorded."""
    fingerprint: str
    """Hash of everything that decides the weights."""
    subset: Subset = 1.0
    """The train rows: a share of them, or rows per label."""
    settings: str = ""
    """Hash of the recipe's settings: ``StudentRecipe.training_of``."""
    tuned: dict[str, Any] = {}
    """The settings that train.tune chose."""
    source: str | None = None
    """Hash of the source of its annotations. None: it needs none."""
    reportable: bool = True
    """False: trained on limited data."""
    cost: TrainingCost | None = None
    """None: trained before costs were recorded."""
    student: str | None = Field(None, exclude_if=_is_none)
    """The name of its section in the recipe. None: it is the only one."""
    reviews: str | None = Field(None, exclude_if=_is_none)
    """Hash of the reviews that its rows follow. None: there were none."""

    @property
    def system(self) -> str:
        """The name without the seed, which the students of all seeds share."""
        return self.name.rpartition("-s")[0]
