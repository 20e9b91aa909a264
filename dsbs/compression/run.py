"""The chain: each step made, healed, held against the original, and kept; the first one that loses too much ends it.

A step's student appears under ``<run>/compress/<student>/<chain>/`` when it is whole. Until then it is made in ``work/``, from
which a killed command goes on. A student of that name that no longer fits is set aside, and comes back when it fits again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

from dsbs.compression.base import Step, read_step
from dsbs.compression.healing import FineTuneData
from dsbs.compression.measurement import Evaluator
from dsbs.compression.source import WORK, SourceStudent, find_origin, fingerprint_of
from dsbs.compression.table import frontier
from dsbs.errors import GateError, UserError
from dsbs.files import (
    atomic_write,
    canonical_json,
    digest,
    full_disk_as_partial,
    write_json,
)
from dsbs.progress import NoProgress, Progress
from dsbs.records.compression import RECORD, Compressed, Measurement, read_record
from dsbs.run_folder import RunFolder
from dsbs.students import CARD, read_card

MAX_DROP = 0.02
_HEALING_SHARE = 10  # of the original's steps a healing has one in so many
_SLOWER = 3  # and its learning rate's peak is that much lower
_ROUNDING = 1e-9  # shares of rows that are equal may differ by less than this
_HEALING = (
    "train.json",
    "work.json",
    "checkpoints",
    "tensorboard",
)  # what healing leaves beside a student


@dataclass(frozen=True, slots=True)
class CompressResult:
    """The closing summary of ``dsbs compress``: a record for each step of the chain, to the first that is refused."""

    origin: SourceStudent
    steps: list[Compressed]

    @property
    def folders(self) -> list[Path]:
        return [self.origin.folder / record.name for record in self.steps]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.origin.run),
            "student": self.origin.student.name,
            "steps": [
                record.model_dump(mode="json", by_alias=True) | {"path": str(folder)}
                for record, folder in zip(self.steps, self.folders, strict=True)
            ],
        }

    def refusal(self) -> GateError | None:
        """None where every step was accepted."""
        last = self.steps[-1]
        if last.accepted:
            return None
        lost = 100 * (last.original.accuracy - last.compressed.accuracy)
        hint = f"a smaller share, --max-drop {lost / 100 + 0.001:.2g}" + (
            ", more --heal-steps" if last.healing_steps else ""
        )
        return GateError(
            f"{last.name} is refused: on {last.n} rows of valid it has {100 * last.compressed.accuracy:.1f} % and the original "
            f"{100 * last.original.accuracy:.1f} %, {lost:.1f} points lost of at most {100 * last.max_drop:g}",
            hint=f"{hint}; {self.folders[-1]} keeps the refused student",
        )


@dataclass(frozen=True, slots=True)
class Planned:
    """One step of the chain: what it makes of which folder, where, by how much healing."""

    step: Step
    chain: tuple[str, ...]
    source: Path
    folder: Path
    healing_steps: int
    learning_rate: float
    keep_zeros: bool
    fingerprint: str

    @property
    def work(self) -> Path:
        return self.folder.parent / "work" / f"{self.folder.name}-{self.fingerprint[:12]}"

    @property
    def done(self) -> bool:
        return fingerprint_of(self.folder) == self.fingerprint and (self.folder / RECORD).is_file()


def plan(
    origin: SourceStudent,
    methods: Sequence[str],
    valid: str,
    heal_steps: int | None = None,
    heal_learning_rate: float | None = None,
) -> list[Planned]:
    """The chain's steps. ``valid`` is a hash of valid's rows. Raises UserError for a step that cannot be, or stand there."""
    if not methods:
        raise UserError(
            "no step is named", hint="e.g. --method prune-ff=0.5 --method quantize=int8"
        )
    if heal_learning_rate is not None and not 0 < heal_learning_rate < inf:  # nor NaN
        raise UserError(
            f"--heal-learning-rate {heal_learning_rate:g} trains nothing",
            hint="give a number above 0, or --heal-steps 0 to leave the healing out",
        )
    section = origin.recipe.resolved_train.tuned(origin.student.tuned)
    healing = max(1, section.max_steps // _HEALING_SHARE) if heal_steps is None else heal_steps
    rate = section.learning_rate / _SLOWER if heal_learning_rate is None else heal_learning_rate
    chain, source, made_by = origin.chain, origin.start, origin.fingerprint
    steps = [(text.partition("=")[0], read_step(text)) for text in methods]
    sparse = any(text.startswith("magnitude=") for text in chain)
    last = chain[-1] if chain else ""
    found = []
    for name, step in steps:
        if last.startswith("quantize="):
            raise UserError(
                f"{name}={step.value} comes after {last}, whose weights cannot be changed any more",
                hint="quantize last",
            )
        last = f"{name}={step.value}"
        chain = (*chain, last)
        sparse = sparse or step.sparse
        count = healing if step.heals else 0
        settings = [count, rate if count else None, origin.recipe.eval.max_label_tokens]
        made_by = digest(made_by, last, canonical_json(settings), valid)
        folder = origin.folder / "+".join(chain)
        found.append(Planned(step, chain, source, folder, count, rate, sparse, made_by))
        source = folder
    return found


def compress(
    student: str | Path,
    methods: Sequence[str],
    *,
    max_drop: float = MAX_DROP,
    heal_steps: int | None = None,
    heal_learning_rate: float | None = None,
    progress: Progress | None = None,
) -> CompressResult:
    """Make smaller students of a trained one, a step at a time; see ``dsbs compress``.

    ``student`` is a folder ``<run>/train/<name>``, or a compressed one of the run, whose chain goes on. ``max_drop`` is the
    accuracy on valid, in [0, 1], that may be lost against the original. None: heal for a tenth of the original's steps, and
    by a third of its learning rate. Writes ``<run>/compress/<student>/<chain>/`` and ``frontier.md`` beside them. Raises
    UserError for a student, a step or a run that this cannot be done with.
    """
    progress = progress or NoProgress()
    origin = find_origin(student)
    lessons, steps = prepared(origin, methods, heal_steps, heal_learning_rate, progress)
    yardstick = Evaluator(lessons.recipe, Path(origin.student.path), lessons.data, progress)
    if origin.student.settings != origin.recipe.training:
        progress.say(
            f"warning: {origin.student.name} was trained by other settings than its run's last recipe, which it heals by"
        )
    found: list[Compressed] = []
    run, stage = RunFolder(origin.run), f"compress/{origin.student.name}"
    with (
        run.lock(stage),
        run.record(stage, origin.recipe, {"valid": valid_hash(lessons)}),
    ):
        for step in steps:
            _make_room(step)
            if step.done:
                progress.say(f"{'+'.join(step.chain)}: finished before, kept")
                found.append(_judged(step.folder, max_drop))
            else:
                with full_disk_as_partial(
                    origin.folder,
                    "free some space, then run the same command: it goes on where it stood",
                ):
                    found.append(_make(step, origin, lessons, yardstick, max_drop, progress))
            shutil.rmtree(step.work, ignore_errors=True)
            with atomic_write(origin.folder / "frontier.md") as file:
                file.write(frontier(origin.folder))
            if not found[-1].accepted:
                break
    return CompressResult(origin, found)


def prepared(
    origin: SourceStudent,
    methods: Sequence[str],
    heal_steps: int | None,
    heal_learning_rate: float | None,
    progress: Progress,
) -> tuple[FineTuneData, list[Planned]]:
    """The chain and the rows that it needs, none of it made yet. Raises UserError as ``compress`` does."""
    needs_train = any(
        one.healing_steps or one.step.learns_from_rows
        for one in plan(origin, methods, "", heal_steps)
    )
    lessons = FineTuneData(origin, progress, needs_train=needs_train)
    return lessons, plan(origin, methods, valid_hash(lessons), heal_steps, heal_learning_rate)


def valid_hash(lessons: FineTuneData) -> str:
    data = lessons.data
    return digest(
        *(
            canonical_json([row.id, data.fields[row.id], row.label(data.valid_labels)])
            for row in data.valid
        )
    )


def _make(
    step: Planned,
    origin: SourceStudent,
    lessons: FineTuneData,
    yardstick: Evaluator,
    max_drop: float,
    progress: Progress,
) -> Compressed:
    """Make a step's student in ``work/`` and put it where it belongs, its record with it."""
    name = "+".join(step.chain)
    began = time.monotonic()
    start = step.work / "start"
    if not start.is_dir():
        progress.say(f"{name}: compress {step.source.name}")
        partial = _empty(step.work / "partial")
        step.step.make(step.source, partial, lessons)
        partial.rename(start)
    made, before = start, None
    if step.healing_steps:
        before = yardstick.accuracy(start)
        progress.say(f"{name}: {100 * before:.1f} % on valid; heal for {step.healing_steps} steps")
        healed = lessons.heal(
            start, step.work / "healed", title=f"heal {name}", steps=step.healing_steps,
            learning_rate=step.learning_rate, keep_zeros=step.keep_zeros,
        )  # fmt: skip
        # the start is one of the looks: a healing that only harmed is none
        made = healed if yardstick.accuracy(healed) >= before else start
    original, compressed, agreement = yardstick.standings(made, name)
    record = Compressed(
        student=origin.student.name,
        fingerprint=origin.student.fingerprint,
        chain=step.chain,
        n=yardstick.n,
        original=original,
        compressed=compressed,
        agreement=agreement,
        before_healing=before,
        healing_steps=step.healing_steps,
        max_drop=max_drop,
        accepted=_within(max_drop, original, compressed),
        seconds=round(time.monotonic() - began, 2),
    )
    whole = _empty(
        step.work / "whole"
    )  # a copy: what healing knows itself by stays where a second try looks for it
    shutil.copytree(made, whole, ignore=shutil.ignore_patterns(*_HEALING), dirs_exist_ok=True)
    card = read_card(made).model_copy(
        update={"name": f"{origin.student.name}+{name}", "method": origin.student.method}
    )
    write_json(whole / CARD, card.model_dump(mode="json"))
    write_json(whole / WORK, {"fingerprint": step.fingerprint})
    write_json(whole / RECORD, record.model_dump(mode="json", by_alias=True))
    whole.rename(step.folder)
    return record


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)  # what a kill left half-written
    folder.mkdir(parents=True)
    return folder


def _judged(folder: Path, max_drop: float) -> Compressed:
    """A finished step's record by this command's ``max_drop``, which an earlier command may have set otherwise."""
    record = read_record(folder)
    accepted = _within(max_drop, record.original, record.compressed)
    judged = record.model_copy(update={"max_drop": max_drop, "accepted": accepted})
    if judged != record:
        write_json(folder / RECORD, judged.model_dump(mode="json", by_alias=True))
    return judged


def _within(max_drop: float, original: Measurement, compressed: Measurement) -> bool:
    return original.accuracy - compressed.accuracy <= max_drop + _ROUNDING


def _make_room(step: Planned) -> None:
    """What lies under the step's name and is another student's moves aside; ours comes back if it was aside."""
    if step.folder.exists() and not step.done:
        RunFolder.set_aside(step.folder, fingerprint_of(step.folder))
    if not step.folder.exists():
        RunFolder.take_back(step.folder, step.fingerprint, fingerprint_of)
