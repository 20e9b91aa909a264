"""Compression: make, heal and evaluate each step of a chain; stop at the first that loses too much.

A step's student appears in ``<run>/compress/<student>/<chain>/`` once it is complete. Until then it
is made in ``work/``, from which an interrupted command resumes. A student of that name that no
longer fits is set aside, and is restored when it fits again.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from dsbs.compression import LayersBy
from dsbs.compression.healing import choose_source
from dsbs.compression.layers import LAYERS_FILE, dropped_layers
from dsbs.compression.planning import Options, PlannedStep, plan
from dsbs.compression.source import (
    WORK,
    Evaluator,
    FineTuneData,
    SourceStudent,
    find_source,
    fingerprint_of,
)
from dsbs.errors import GateError, UserError
from dsbs.files import canonical_json, digest, full_disk_as_partial, move, write_json
from dsbs.formatting import (
    count,
    milliseconds_number,
    percent,
    percent_number,
    points_number,
)
from dsbs.progress import NoProgress, Progress
from dsbs.records.results import (
    BATCH_SIZES,
    COMPRESSION_RECORD,
    Compressed,
    HealFrom,
    Measurement,
    read_compression_record,
)
from dsbs.run_folder import TRAINING_RECORD, RunFolder
from dsbs.students.card import CARD, read_card
from dsbs.students.student import Student

MAX_DROP = 0.02
_ROUNDING_ERROR = 1e-9  # two equal shares of rows may differ by less than this
_HEALING_FILES = (TRAINING_RECORD, WORK, LAYERS_FILE, "checkpoints", "tensorboard")
TABLE_HEADINGS = (
    "steps",
    "healed by",
    "accuracy, %",
    "change, points",
    "recovered, %",
    "MB",
    "of original",
    *(text for size in BATCH_SIZES for text in (f"ms at {size}", "of original")),
    "agreement, %",
    "accepted",
)


@dataclass(frozen=True, slots=True)
class CompressResult:
    """Summary of ``dsbs compress``: a record per step, up to the first that is refused."""

    source: SourceStudent
    steps: list[Compressed]

    @property
    def folders(self) -> list[Path]:
        return [self.source.folder / record.name for record in self.steps]

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.source.run.path),
            "student": self.source.student.name,
            "steps": [
                record.model_dump(mode="json", by_alias=True) | {"path": str(folder)}
                for record, folder in zip(self.steps, self.folders, strict=True)
            ],
        }

    def table(self) -> list[list[str]]:
        """Rows under ``TABLE_HEADINGS``: the original, then each step."""
        original = self.steps[-1].original
        latency = [
            text for size in BATCH_SIZES for text in (_milliseconds(original.median_ms(size)), "")
        ]
        first = ["original", "", percent_number(original.accuracy), "", ""]
        first += [f"{original.megabytes:.2f}", "", *latency, "", ""]
        return [first, *(_table_row(record) for record in self.steps)]

    def refusal(self) -> GateError | None:
        """The error of a refused last step; None where every step was accepted."""
        last = self.steps[-1]
        if last.accepted:
            return None
        loss = last.original.accuracy - last.compressed.accuracy
        hint = f"use a smaller share, --max-drop {loss + 0.001:.2g}"
        if last.healing_steps:
            hint += ", or more --heal-steps"
        return GateError(
            f"{last.name} is refused: on {count(last.n, 'row')} of valid its accuracy is "
            f"{percent(last.compressed.accuracy)} and the original's "
            f"{percent(last.original.accuracy)}; the limit is a loss of "
            f"{100 * last.max_drop:g} points, the loss {100 * loss:.1f}",
            hint=f"{hint}; {self.folders[-1]} keeps the refused student",
        )


def _table_row(record: Compressed) -> list[str]:
    before = record.original
    after = record.compressed
    row = [
        record.name,
        record.healer or "",
        percent_number(after.accuracy),
        points_number(after.accuracy - before.accuracy),
        _recovered(record),
        f"{after.megabytes:.2f}",
        f"{after.megabytes / before.megabytes:.2f}",
    ]
    for size in BATCH_SIZES:
        before_ms = before.median_ms(size)
        after_ms = after.median_ms(size)
        row.append(_milliseconds(after_ms))
        if before_ms is None or after_ms is None:
            row.append("")
        else:
            row.append(f"{after_ms / before_ms:.2f}")
    return [*row, percent_number(record.agreement), "yes" if record.accepted else "no"]


def _recovered(record: Compressed) -> str:
    if record.recovered is not None:
        return f"{100 * record.recovered:.0f}"
    return "" if record.before_healing is None else "no loss"


def _milliseconds(time_ms: float | None) -> str:
    return "" if time_ms is None else milliseconds_number(time_ms)


def compress(
    student: str | Path,
    methods: Sequence[str],
    *,
    max_drop: float = MAX_DROP,
    heal_from: HealFrom | None = None,
    heal_steps: int | None = None,
    heal_learning_rate: float | None = None,
    rounds: int = 1,
    layers_by: LayersBy = "loss",
    progress: Progress | None = None,
) -> CompressResult:
    """Make smaller students of a trained one, one step after another. See ``dsbs compress``.

    ``student`` is a folder ``<run>/train/<name>``, or a compressed student of a run, whose chain
    continues. ``max_drop`` is the largest acceptable loss of accuracy on valid, in [0, 1].
    ``heal_from`` None: the original where it fits in memory beside its copy, else the rows;
    ``heal_steps`` None: a tenth of the original's steps; ``heal_learning_rate`` None: a third of
    its learning rate. ``rounds``: in how many parts a share is removed. Writes
    ``<run>/compress/<student>/<chain>/``. Raises UserError for a student, step or run that cannot
    be compressed.
    """
    progress = progress or NoProgress()
    source = find_source(student)
    options = Options(heal_from, heal_steps, heal_learning_rate, rounds, layers_by)
    data, steps = prepare(source, methods, options, progress)
    evaluator = Evaluator(data.recipe, Path(source.student.path), data.data, progress)
    if source.student.settings != source.recipe.training:
        progress.say(
            f"warning: {source.student.name} was trained with other settings than the last recipe "
            "of its run, which healing uses"
        )
    records: list[Compressed] = []
    stage = f"compress/{source.student.name}"
    with (
        source.run.lock(stage),
        source.run.record(stage, source.recipe, {"valid": _valid_hash(data)}),
    ):
        for step in steps:
            _restore_or_set_aside(step)
            if step.done:
                progress.say(f"{step.name}: already done")
                records.append(_apply_max_drop(step.folder, max_drop))
            else:
                with full_disk_as_partial(
                    source.folder, "free some space, then run the same command: it resumes"
                ):
                    records.append(_make(step, source, data, evaluator, max_drop, progress))
            shutil.rmtree(step.work, ignore_errors=True)
            if not records[-1].accepted:
                break
    return CompressResult(source, records)


def prepare(
    source: SourceStudent, methods: Sequence[str], options: Options, progress: Progress
) -> tuple[FineTuneData, list[PlannedStep]]:
    """The chain and the rows it needs; makes nothing. Raises UserError like ``compress``."""
    if options.rounds < 1:
        raise UserError("--rounds counts from 1", hint="e.g. --rounds 3")
    for name, value, values in (
        ("--heal-from", options.heal_from, (None, *get_args(HealFrom))),
        ("--layers-by", options.layers_by, get_args(LayersBy)),
    ):
        if value not in values:
            choices = [str(allowed) for allowed in values if allowed]
            raise UserError(f"{name} {value}: not a choice", hint=f"use {', '.join(choices)}")
    steps = plan(source, methods, "", options)
    if any(step.healing.steps for step in steps):
        heal_from = choose_source(
            options.heal_from, source.student, source.recipe.train.optimizer, progress
        )
        options = replace(options, heal_from=heal_from)
    needs_train = any(step.healing.steps or step.step.learns_from_rows for step in steps)
    data = FineTuneData(source, progress, needs_train=needs_train)
    return data, plan(source, methods, _valid_hash(data), options)


def _valid_hash(data: FineTuneData) -> str:
    rows = data.data
    return digest(
        *(
            canonical_json([row.id, rows.fields[row.id], row.label(rows.valid_labels)])
            for row in rows.valid
        )
    )


def _make(
    step: PlannedStep,
    source: SourceStudent,
    data: FineTuneData,
    evaluator: Evaluator,
    max_drop: float,
    progress: Progress,
) -> Compressed:
    """Make a step's student in ``work/``, then move it to its folder together with its record."""
    started = time.monotonic()
    start = step.work / "start"
    if not start.is_dir():
        progress.say(f"{step.name}: compress {step.source.name}")
        partial = _empty(step.work / "partial")
        step.step.make(step.source, partial, data)
        # Before any measurement: the answers of several labels and of a scale depend on it.
        evaluator.fit_distributions(Student.load(partial), partial, data.views[0])
        move(partial, start)
    cut = dropped_layers(step.source, start)
    best = start
    before_healing = None
    if step.healing.steps:
        before_healing = evaluator.accuracy(start)
        learned = {"both": "rows and original"}.get(str(step.healing.source), step.healing.source)
        progress.say(
            f"{step.name}: {percent(before_healing)} on valid; "
            f"healing for {count(step.healing.steps, 'step')} from the {learned}"
        )
        healing = replace(step.healing, layers=cut["layers"])
        healed = data.heal(start, step.work / "healed", healing, f"heal {step.name}")
        if evaluator.accuracy(healed) >= before_healing:
            best = healed
    student = Student.load(best)
    original, compressed, agreement = evaluator.compare(student, best, step.name)
    record = Compressed(
        student=source.student.name,
        fingerprint=source.student.fingerprint,
        chain=step.chain,
        healed_by=step.healed_by,
        n=evaluator.n,
        original=original,
        compressed=compressed,
        agreement=agreement,
        before_healing=before_healing,
        healing_steps=step.healing.steps,
        max_drop=max_drop,
        accepted=_is_within(max_drop, original, compressed),
        seconds=round(time.monotonic() - started, 2),
        **cut,
        **step.step.settings,
    )
    # A copy: an interrupted command looks for the healing's own records in ``work/``.
    complete = _empty(step.work / "whole")
    shutil.copytree(
        best, complete, ignore=shutil.ignore_patterns(*_HEALING_FILES), dirs_exist_ok=True
    )
    card = read_card(best).model_copy(
        update={"name": f"{source.student.name}+{step.name}", "method": source.student.method}
    )
    write_json(complete / CARD, card.model_dump(mode="json"))
    write_json(complete / WORK, {"fingerprint": step.fingerprint})
    write_json(complete / COMPRESSION_RECORD, record.model_dump(mode="json", by_alias=True))
    move(complete, step.folder)
    return record


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)  # left half-written by an interrupted command
    folder.mkdir(parents=True)
    return folder


def _apply_max_drop(folder: Path, max_drop: float) -> Compressed:
    """The record of a finished step, judged by this command's ``max_drop``."""
    record = read_compression_record(folder)
    accepted = _is_within(max_drop, record.original, record.compressed)
    updated = record.model_copy(update={"max_drop": max_drop, "accepted": accepted})
    if updated != record:
        write_json(folder / COMPRESSION_RECORD, updated.model_dump(mode="json", by_alias=True))
    return updated


def _is_within(max_drop: float, original: Measurement, compressed: Measurement) -> bool:
    return original.accuracy - compressed.accuracy <= max_drop + _ROUNDING_ERROR


def _restore_or_set_aside(step: PlannedStep) -> None:
    """Set another student with the step's name aside, and take the step's own back."""
    if step.folder.exists() and not step.done:
        RunFolder.set_aside(step.folder, fingerprint_of(step.folder))
    if not step.folder.exists():
        RunFolder.restore(step.folder, step.fingerprint, fingerprint_of)
