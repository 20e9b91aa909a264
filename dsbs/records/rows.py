"""The rows that stages hand to one another: Example, Annotation, Prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Reason = Literal[
    "unparsed",  # the answer anchor is missing, or what follows it cannot be read
    "empty",  # no text, no rationale, or nothing after the anchor
    "truncated",  # the token budget ended before the answer did
    "spent-on-reasoning",  # the token budget ended in a reasoning model's hidden text: nothing was said
    "label-outside-set",  # a readable answer that is not one of the task's labels or choices
    "several-answers",  # two or more different answers where one was asked for
    "refused",  # the endpoint rejected this one request, or the model declined
    "contradicts-rationale",  # the rationale concludes with another answer than the one given
    "copies-exemplar",  # the rationale is an exemplar's, word for word
    "too-short",  # the rationale has fewer words than annotate.min_rationale_words
    "hint-leaked",  # a rationale written with the answer as a hint speaks of the hint
    "no-reply",  # every attempt failed; the next run asks again
]
Provenance = Literal["own", "hinted", "recorded", "human", "none"]


@dataclass(frozen=True, slots=True)
class Unread:
    """Text that could not be turned into a label, and why. Never an empty answer in disguise."""

    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One input row.

    ``input`` holds the task's canonical fields, ``label`` the gold label (None: unlabelled), ``rationale`` one that the
    data set brings along, ``completion`` a teacher's raw text recorded with the row.
    """

    id: str
    input: dict[str, Any]
    label: str | None = None
    rationale: str | None = None
    completion: str | None = None


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Usage(_Row):
    """Tokens as the endpoint counted them; None where it did not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = (
        None  # of the prompt tokens, those served from the provider's prompt cache
    )


def _is_none(value: object) -> bool:
    return value is None


class Sample(_Row):
    """One reply read: raw text, and the label and rationale found in its first turn, or the reason why it is not used.

    A readable label stands here even where the rationale has a flaw (``reason``). ``hinted``: the answer was given away in the
    request. ``label_logprob`` is the log-probability of the label's tokens, in nats.

    Of an ensemble alone, and left out of the file elsewhere: ``run`` is the member that the sample is from, as the recipe names
    it, and ``weight`` what its vote counts: the member's weight, divided among its readable samples of the row.
    """

    text: str
    label: str | None = None
    rationale: str | None = None
    reason: Reason | None = None
    finish_reason: str | None = None
    hinted: bool = False
    label_logprob: float | None = None
    run: str | None = Field(None, exclude_if=_is_none)
    weight: float | None = Field(None, exclude_if=_is_none)

    @property
    def vote(self) -> float:
        """What its label counts in a vote: 1 outside an ensemble."""
        return 1.0 if self.weight is None else self.weight


class TeacherName(_Row):
    kind: str
    model: str | None = None


class Annotation(_Row):
    """One line of ``annotate/<split>.jsonl``: exactly one for every input row, accepted or not.

    ``own_label`` is the teacher's answer without any hint, rejected or not: its accuracy is measured on that alone. ``label``
    goes with the rationale: None where the row is rejected, the gold one where the provenance is ``hinted``. ``vote_share`` is
    the majority label's share of the readable samples, in [0, 1]; ``label_logprob`` the mean of the winning samples', in nats;
    ``usd`` is None without prices.
    """

    schema_: Literal["dsbs.annotation/1"] = Field("dsbs.annotation/1", alias="schema")
    id: str
    input: dict[str, Any]
    gold: str | None = None
    label: str | None = None
    own_label: str | None = None
    rationale: str | None = None
    provenance: Provenance = "none"
    samples: list[Sample] = []
    vote_share: float | None = None
    label_logprob: float | None = None
    accepted: bool = False
    reject_reason: Reason | None = None
    usage: Usage = Usage()
    usd: float | None = None
    teacher: TeacherName
    request_key: str | None = None

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Prediction(_Row):
    """One line of ``eval/predictions/<system>.jsonl``.

    ``raw`` is the text as generated, ``prediction`` what the task read in it (None: unreadable), ``probability`` what the
    system gave that text, in [0, 1], ``latency_ms`` the batch's wall time divided by its rows. ``truncated`` says that it
    ended with its token budget and not by itself. None is what is not known.
    """

    schema_: Literal["dsbs.prediction/1", "dsbs.prediction/2"] = Field(
        "dsbs.prediction/2", alias="schema"
    )
    id: str
    input: dict[str, Any] | None = None
    gold: str | None = None
    raw: str
    prediction: str | None = None
    correct: bool | None = None
    probability: float | None = None
    truncated: bool | None = None
    rationale: str | None = None
    rationale_truncated: bool | None = None
    latency_ms: float | None = None
    made_by: str  # hash of the model, the rows and the decoding, or the teacher's name
    model: str | None = None  # hash of the student; the teacher's kind and name
    prompt: str | None = (
        None  # hash of the prompt that the teacher was asked with, or of the student's prefixes
    )

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class TrainingCost(_Row):
    """Training cost: time, tokens and memory, summed over interruptions.

    Steps that a kill lost and that were repeated count once. ``tokens`` are the input and target
    tokens of every view in all steps, without padding. ``peak_memory_of``: the process's resident
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


class TrainedStudent(_Row):
    """What ``train/<name>/train.json`` says of a finished student.

    ``valid_accuracy`` is that of the saved step, ``fingerprint`` changes with anything that changes the weights.
    """

    name: str
    method: str
    labels: str
    seed: int
    path: str
    valid_accuracy: float
    best_step: int
    steps: int
    examples_per_s: float
    wall_s: float
    parameters: int
    trainable_parameters: int | None = (
        None  # those that training moved, LoRA's adapters or all; None: not written down
    )
    fingerprint: str
    subset: float = 1.0  # the share of the train rows
    settings: str = ""  # hash of the recipe's part in it: see Recipe.training
    tuned: dict[str, Any] = {}  # what train.tune chose
    source: str | None = None  # of the annotations that it learned from; None: it needed none
    reportable: bool = True  # False: trained on limited data
    cost: TrainingCost | None = None  # None: trained before it was recorded

    @property
    def system(self) -> str:
        """What the students of one method, label source and share are called together: the name without the seed."""
        return self.name.rpartition("-s")[0]
