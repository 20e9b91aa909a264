"""The stage: every student of the grid, each resumed where it stood, the best step on valid saved."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.files import hold, manifest
from dsbs.progress import NoProgress, Progress
from dsbs.records.rows import TrainedStudent
from dsbs.run_folder import run_folder
from dsbs.students import check_student, new_input_format, new_tokenizer
from dsbs.students.vocabulary import lost_in
from dsbs.tasks import make_task
from dsbs.tasks.base import Task
from dsbs.tasks.load import stream, survey
from dsbs.training.cell import CellTraining
from dsbs.training.distillation.base import check_terms
from dsbs.training.distillation.local_teachers import LocalTeachers, planned_teachers
from dsbs.training.distributed import is_main_process, world_size
from dsbs.training.encode import Encoder
from dsbs.training.methods import grid, method_of
from dsbs.training.rows import Data, gather, taught_rationales, vocabulary_text
from dsbs.training.tokens import Tokens
from dsbs.training.tune import RECORD, Job, Tuner, trial_jobs


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The closing summary of ``dsbs train``."""

    run: Path
    students: list[TrainedStudent]
    teachers: list[TrainedStudent]  # local ones that were trained, or kept, to teach them
    reportable: bool

    def as_json(self) -> dict[str, Any]:
        return {
            "run": str(self.run),
            "reportable": self.reportable,
            "students": [student.model_dump() for student in self.students],
            "teachers": [teacher.model_dump() for teacher in self.teachers],
        }


def train(
    recipe: Recipe, *, out: str | Path | None = None, progress: Progress | None = None
) -> TrainResult:
    """Train every student of the recipe's grid into ``train/<method>-<labels>-s<seed>/``.

    Finished students that fit the recipe and the data are kept, an interrupted one continues from its last checkpoint.
    Raises UserError where the run lacks what a method learns from.
    """
    progress = (progress if is_main_process() else None) or NoProgress()
    run = run_folder(recipe, out)
    task = make_task(recipe.task)
    cells = grid(recipe.train)
    check_terms(recipe.train, task, cells)
    data = gather(recipe, task, run, cells)
    _check_precision(recipe)
    _check_processes(recipe)
    check_student(recipe)
    hashes: dict[str, str] = {
        split: survey(stream(recipe, task, split)).hash for split in ("train", "valid")
    }
    with ExitStack() as stack:
        record: dict[str, Any] = {}
        if is_main_process():
            stack.enter_context(hold(run / "train"))
            resolved = recipe.model_dump(mode="json")
            record = stack.enter_context(
                manifest(run / "train" / "manifest.json", resolved, hashes)
            )
        tokenizer = new_tokenizer(recipe.student, vocabulary_text(data), recipe.train.init)
        wording = new_input_format(recipe.student, tokenizer, recipe.train.init)
        tokens = Tokens(tokenizer, run / "train" / "tokens", progress, wording)
        if is_main_process():
            for warning in _warnings(recipe, task, data, tokenizer, tokens):
                progress.say(f"warning: {warning}")
        teachers = LocalTeachers(
            recipe,
            run,
            tokenizer,
            lambda taught, job: CellTraining(taught, job, data, tokenizer, tokens).run(progress),
        )

        def student(job: Job) -> TrainedStudent:
            told = teachers.of(job.cell)
            return CellTraining(
                recipe, job, data, tokenizer, tokens, told, run / "train" / "logprobs"
            ).run(progress)

        tuner = Tuner(recipe, run, student)
        students = []
        for number, cell in enumerate(cells, 1):
            students.append(student(tuner.job(cell)))
            teachers.release(cells[number:])
        record["students"] = [student.name for student in students]
        if is_main_process():
            tokens.sweep()
    return TrainResult(run, students, teachers.trained, reportable=recipe.task.limit is None)


def _warnings(recipe: Recipe, task: Task, data: Data, tokenizer: Any, tokens: Tokens) -> list[str]:
    """What the students of this recipe will not be able to read or to write, each told once and before hours are spent."""
    cells = grid(recipe.train)
    sources = {cell.labels for cell in cells}
    labels = {
        label
        for source in sources
        for row in data.train
        if (label := row.label(source)) is not None
    }
    said = {"inputs": [row.text for row in data.train]}
    if any(method_of(cell.method).needs_rationales for cell in cells):
        said["rationales"] = [rationale for row in data.train for rationale in row.rationales]
    found = lost_in(recipe.student, tokenizer, labels.union(task.labels or ()), said)
    encoder = Encoder(tokens, recipe.student.max_input_tokens, recipe.student.max_target_tokens)
    part = data.part(max(recipe.train.subset))
    systems = dict.fromkeys((cell.method, cell.labels) for cell in cells)
    for method, source in systems:
        found += encoder.cut(encoder.rows(part, method_of(method).views(recipe.train), source))
    return list(dict.fromkeys(found))


def planned(recipe: Recipe, out: str | Path | None = None) -> list[dict[str, Any]]:
    """What ``train`` would do, for --dry-run: a line for every student."""
    run = run_folder(recipe, out)
    cells = grid(recipe.train)
    task = make_task(recipe.task)
    check_terms(recipe.train, task, cells)
    check_student(recipe)
    data = gather(recipe, task, run, cells)
    lines = []
    for teacher, job in planned_teachers(recipe, cells, run / "train"):
        lines.append(
            {
                "name": f"teacher {job.name}",
                "rows": len(
                    [row for row in data.part(job.cell.subset) if row.label(job.cell.labels)]
                ),
                "rationales": taught_rationales(data, job.cell),
                "valid": len(data.valid),
                "trials": 0,
                "steps": teacher.train.max_steps,
                "done": _is_done(teacher.training, job.folder / RECORD),
            }
        )
    for cell in cells:
        taught = [row for row in data.part(cell.subset) if row.label(cell.labels)]
        lines.append(
            {
                "name": cell.name,
                "rows": len(taught),
                "rationales": taught_rationales(data, cell),
                "valid": len(data.valid),
                "trials": len(trial_jobs(recipe.train, cell, run))
                if cell.seed == recipe.train.seeds[0]
                else 0,
                "steps": max(
                    (recipe.train.tune and recipe.train.tune.max_steps) or (recipe.train.max_steps,)
                ),
                "done": _is_done(
                    recipe.training_of(cell.method), run / "train" / cell.name / RECORD
                ),
            }
        )
    return lines


def _is_done(wanted: str, record: Path) -> bool:
    """Whether there is a finished student of these settings (its data are compared when training)."""
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))["student"]["settings"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(settings == wanted)


def _check_processes(recipe: Recipe) -> None:
    sizes = (recipe.train.tune and recipe.train.tune.batch_size) or (recipe.train.batch_size,)
    uneven = [size for size in sizes if size % world_size()]
    if uneven:
        raise UserError(
            f"train.batch_size {uneven[0]} cannot be shared among {world_size()} processes",
            hint="make it a multiple of their number: it counts the examples of a step over all of them",
        )


def _check_precision(recipe: Recipe) -> None:
    if recipe.train.precision == "bf16":
        import torch

        if not (torch.cuda.is_available() and torch.cuda.is_bf16_supported()):
            raise UserError(
                "train.precision: bf16 needs a GPU that has it; on some processors it ends in an illegal instruction",
                hint="use train.precision: auto",
            )
