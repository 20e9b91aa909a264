"""Plan of a chain: its steps, what each of them heals from, and where its student is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from dsbs.compression import LayersBy, Step, WeightStep, read_step
from dsbs.compression.healing import Healing
from dsbs.compression.source import SourceStudent, fingerprint_of
from dsbs.errors import UserError
from dsbs.files import canonical_json, digest
from dsbs.records.results import COMPRESSION_RECORD, HealFrom, chain_name

_HEALING_STEPS_DIVISOR = 10  # healing takes a tenth of the original's steps
_HEALING_RATE_DIVISOR = 3  # and a third of its learning rate


@dataclass(frozen=True, slots=True)
class Options:
    """How the steps of a command are made and healed. See ``compress``."""

    heal_from: HealFrom | None = None
    heal_steps: int | None = None
    heal_learning_rate: float | None = None
    rounds: int = 1
    layers_by: LayersBy = "loss"


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """One step of the chain: its source, its target folder, and its healing."""

    step: Step
    chain: tuple[str, ...]
    healed_by: tuple[HealFrom | None, ...]
    source: Path
    folder: Path
    healing: Healing
    fingerprint: str

    @property
    def name(self) -> str:
        return chain_name(self.chain, self.healed_by)

    @property
    def work(self) -> Path:
        return self.folder.parent / "work" / f"{self.folder.name}-{self.fingerprint[:12]}"

    @property
    def done(self) -> bool:
        is_complete = (self.folder / COMPRESSION_RECORD).is_file()
        return is_complete and fingerprint_of(self.folder) == self.fingerprint


def plan(
    source: SourceStudent, methods: Sequence[str], valid: str, options: Options
) -> list[PlannedStep]:
    """The steps of the chain. ``valid`` is a hash of the valid rows.

    Raises UserError for an unknown step, or for one after quantization.
    """
    if not methods:
        raise UserError(
            "no compression step is given",
            hint="e.g. --method prune-ff=0.5 --method quantize=int8",
        )
    heal_steps, learning_rate = _healing_length(source, options)
    chain = source.chain
    healed_by = source.healed_by
    folder = source.start
    fingerprint = source.fingerprint
    sparse = any(text.startswith("magnitude=") for text in chain)
    steps = [(text.partition("=")[0], read_step(text)) for text in methods]
    last = chain[-1] if chain else ""
    planned = []
    for name, step in steps:
        text = f"{name}={step.value}"
        if last.startswith("quantize="):
            raise UserError(
                f"{text} comes after {last}, whose weights cannot be changed",
                hint="make quantize the last step",
            )
        if isinstance(step, WeightStep):
            step.rounds = options.rounds
            step.layers_by = options.layers_by
        last = text
        chain = (*chain, text)
        sparse = sparse or step.sparse
        heals = step.heals and heal_steps > 0
        healer = options.heal_from if heals else None
        healed_by = (*healed_by, healer)
        healing = Healing(heal_steps if heals else 0, learning_rate, sparse, healer)
        settings = [
            healing.steps,
            learning_rate if heals else None,
            source.recipe.eval.max_label_tokens,
        ]
        extras: list[Any] = [healer] if healer in ("original", "both") else []
        extras += [step.settings] if step.settings else []
        fingerprint = digest(fingerprint, text, canonical_json([*settings, *extras]), valid)
        target = source.folder / chain_name(chain, healed_by)
        planned.append(PlannedStep(step, chain, healed_by, folder, target, healing, fingerprint))
        folder = target
    return planned


def _healing_length(source: SourceStudent, options: Options) -> tuple[int, float]:
    """The steps of a healing and its learning rate. Raises UserError."""
    rate = options.heal_learning_rate
    if rate is not None and not 0 < rate < inf:  # nor NaN
        raise UserError(
            f"--heal-learning-rate {rate:g} would train nothing",
            hint="give a number above 0, or --heal-steps 0 for no healing",
        )
    section = source.recipe.resolved_train.tuned(source.student.tuned)
    steps = options.heal_steps
    if steps is None:
        trained_steps = section.max_steps
        if section.max_epochs is not None:
            trained_steps = source.student.steps
        steps = max(1, trained_steps // _HEALING_STEPS_DIVISOR)
    return steps, rate or section.learning_rate / _HEALING_RATE_DIVISOR
