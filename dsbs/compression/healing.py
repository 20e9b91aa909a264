"""Healing: what a compressed student learns from while it is trained further.

From the rows of the original's training, from the original itself (Muralidharan et al., 2024,
arXiv:2407.14679: prune, then distil), or from both. The original is then a local teacher, and its
token or label distributions and its hidden states are the targets of the same loss terms as in
training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dsbs.config import ResolvedTrainSection
from dsbs.errors import UserError
from dsbs.formatting import count
from dsbs.progress import Progress
from dsbs.records import TrainedStudent
from dsbs.records.results import HealFrom
from dsbs.students.card import StudentCard, read_card
from dsbs.students.weights import BYTES_IN_TRAINING, BYTES_OF_WEIGHT
from dsbs.tasks import make_task
from dsbs.training.distillation import Term
from dsbs.training.distillation.feature import FeatureTerm, depth_of
from dsbs.training.distillation.local_teachers import LocalTeacher
from dsbs.training.distillation.response import ResponseTerm
from dsbs.training.distributed import device_memory

Stack = Literal["encoder", "decoder"]


@dataclass(frozen=True, slots=True)
class Healing:
    """The training of a compressed student."""

    steps: int
    learning_rate: float
    keep_zeros: bool
    source: HealFrom | None
    """What it learns from; None: no healing."""
    layers: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """By stack, the original's layer, from 1, that each layer was; {}: nothing is known of it."""


def choose_source(
    requested: HealFrom | None,
    original: TrainedStudent,
    optimizer: str,
    progress: Progress,
) -> HealFrom:
    """What to heal from: as requested, or the original where it fits in memory beside its copy.

    Raises UserError where the request does not fit.
    """
    trained_bytes = BYTES_IN_TRAINING[optimizer]
    needed = original.parameters * (BYTES_OF_WEIGHT + trained_bytes)
    available = device_memory()
    if requested == "rows" or needed <= available:
        return requested or "original"
    problem = (
        f"the original and a copy of it in training need about {_gigabytes(needed)} "
        f"({count(original.parameters, 'weight')}, {BYTES_OF_WEIGHT} and {trained_bytes} bytes "
        f"each), and this machine has {_gigabytes(available)}"
    )
    if requested is not None:
        raise UserError(f"--heal-from {requested}: {problem}", hint="use --heal-from rows")
    progress.say(f"healing from the rows alone: {problem}")
    return "rows"


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB"


def original_as_teacher(original: TrainedStudent) -> LocalTeacher:
    folder = Path(original.path)
    has_several = make_task(read_card(folder).task).has_several_labels
    return LocalTeacher(
        original.name, folder, 1.0, original.fingerprint, has_several_labels=has_several
    )


def healing_terms(
    card: StudentCard, layers: Mapping[str, Sequence[int]], depths: Mapping[str, int]
) -> tuple[Term, ...]:
    """The terms by which the original teaches its smaller copy.

    Its distribution over tokens, or over the labels of a label head, and the directions of its
    hidden states. ``depths`` are the original's numbers of layers by stack.
    """
    terms: list[Term] = [ResponseTerm(kind="response")]
    if card.kind == "seq2seq":
        stacks: tuple[Stack, ...] = ("encoder", "decoder")
        terms += [_feature(stack, (stack,), layers, depths, weight=0.5) for stack in stacks]
    elif card.kind == "encoder":
        terms.append(_feature("encoder", ("encoder",), layers, depths))
    else:  # its one stack reads prompts and writes targets
        terms.append(_feature("decoder", ("encoder", "decoder"), layers, depths))
    return tuple(terms)


def _feature(
    stack: Stack,
    compared: tuple[Stack, ...],
    layers: Mapping[str, Sequence[int]],
    depths: Mapping[str, int],
    *,
    weight: float = 1.0,
) -> FeatureTerm:
    """The term for the layers of one stack."""
    return FeatureTerm(
        kind="feature",
        name=f"{stack}-feature",
        weight=weight,
        compare="directions",
        stacks=compared,
        layers=implied_layer_map(layers.get(stack, ()), depths[stack]) or "uniform",
    )


def depths_of(original: str) -> dict[str, int]:
    """The numbers of layers of a student by stack; a single stack has both names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(original, trust_remote_code=False)
    return {stack: depth_of(config, stack) for stack in ("encoder", "decoder")}


def implied_layer_map(layers: Sequence[int], depth: int) -> dict[int, int]:
    """Which layer of the original each layer of a copy is compared with, both from 1.

    The layer that it was; the copy's last layer is compared with the original's last one
    (``depth``), as the same output layer reads the states of both.
    """
    pairs = dict(enumerate(layers, 1))
    if pairs:
        pairs[len(pairs)] = depth
    return pairs


def taught_views(card: StudentCard) -> tuple[str, ...]:
    """The views whose targets the original's distributions can replace.

    A label head's rationales have no such distribution: they keep their own loss.
    """
    if card.head == "labels":
        return ("label",)
    return tuple(card.prefixes)


def with_terms(section: ResolvedTrainSection, terms: Sequence[Term]) -> ResolvedTrainSection:
    """The section of a method that learns ``terms`` as well."""
    (method,) = section.methods
    name = "+".join([method, *(term.title for term in terms)])
    return section.model_copy(update={"methods": (name,), "terms": tuple(terms)})
