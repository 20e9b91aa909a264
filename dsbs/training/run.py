"""Training: every student of the grid, each resumed from its last checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsbs.config import Recipe, StudentRecipe
from dsbs.errors import UserError
from dsbs.progress import NoProgress, Progress
from dsbs.records import TrainedStudent
from dsbs.records.subsets import Subset, rows_per_label, subset_rank
from dsbs.run_folder import TRAINING_RECORD, RunFolder
from dsbs.students.card import head_of, input_limit, new_head_warning
from dsbs.students.formats import new_input_format
from dsbs.students.long_texts import text_limit
from dsbs.students.tokenizer import new_tokenizer, vocabulary_warnings
from dsbs.students.weights import supports_bf16
from dsbs.tasks import Task, make_task
from dsbs.tasks.data import stream, survey
from dsbs.training.distillation.local_teachers import LocalTeachers, planned_teachers
from dsbs.training.distillation.teacher_source import check_teachers
from dsbs.training.distributed import free_memory, is_main_process, world_size
from dsbs.training.encode import Encoder
from dsbs.training.grid import DivergedError, StudentSpec, Trial, Tuner, trial_specs
from dsbs.training.methods import method_of, views_of
from dsbs.training.rows import (
    Data,
    count_rationales,
    count_trainable,
    gather,
    vocabulary_text,
)
from dsbs.training.student_run import StudentRun
from dsbs.training.tokens import Tokens
from dsbs.training.training_set import check_subsets, checked_students, few_rows_warnings


@dataclass(frozen=True, slots=True)
class TrainResult:
    """The students of a training run."""

    run: Path
    students: list[TrainedStudent]
    teachers: list[TrainedStudent]
    """Local teachers that were trained, or kept."""
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
    """Train every student of the recipe's grid into ``train/<method>-<labels>-s<seed>/``;
    the name of a named student stands before the method.

    Finished students that fit the recipe and the data are kept; an interrupted one continues from
    its last checkpoint. Raises UserError where the run lacks what a method learns from.
    """
    progress = (progress if is_main_process() else None) or NoProgress()
    run_folder = RunFolder.of(recipe, out)
    task = make_task(recipe.task)
    checked = list(checked_students(recipe, task))
    check_subsets(recipe, task)
    grids = [
        StudentGrid(student, specs, gather(student, task, run_folder.path, specs))
        for student, specs in checked
    ]
    if recipe.report.trackers:
        from dsbs.training.callbacks import check_trackers

        check_trackers(recipe)
    for student_grid in grids:
        _check_precision(student_grid.recipe)
        _check_processes(student_grid.recipe)
    hashes: dict[str, str] = {
        split: survey(stream(recipe, task, split)).hash for split in ("train", "valid")
    }
    students: list[TrainedStudent] = []
    teachers: list[TrainedStudent] = []
    with ExitStack() as stack:
        record: dict[str, Any] = {}
        if is_main_process():
            stack.enter_context(run_folder.lock("train"))
            record = stack.enter_context(run_folder.record("train", recipe, hashes))
        tokens = [student_grid.tokens(run_folder, progress) for student_grid in grids]
        if is_main_process():
            warnings = few_rows_warnings(recipe, task, grids[0].data)
            for student_grid, texts in zip(grids, tokens, strict=True):
                warnings += student_grid.warnings(texts)
            for warning in warnings:
                progress.say(f"warning: {warning}")
        for whole_grid, texts in zip(grids, tokens, strict=True):
            student_grid = whole_grid.with_short_texts(texts)
            trained = student_grid.train(run_folder, texts, progress)
            students += trained.students
            teachers += trained.teachers
        record["students"] = [student.name for student in students]
        if is_main_process():
            used = frozenset[str]().union(*(texts.used for texts in tokens))
            tokens[0].sweep(used)
    return TrainResult(run_folder.path, students, teachers, reportable=recipe.task.limit is None)


@dataclass(frozen=True, slots=True)
class _Trained:
    students: list[TrainedStudent]
    teachers: list[TrainedStudent]


@dataclass(frozen=True, slots=True)
class StudentGrid:
    """The students to train for one section of ``student``: one for each method, share and seed."""

    recipe: StudentRecipe
    specs: list[StudentSpec]
    data: Data

    def tokens(self, run: RunFolder, progress: Progress) -> Tokens:
        """The tokenizer of these students, with its cache in the run."""
        recipe = self.recipe
        task = make_task(recipe.task)
        vocabulary = vocabulary_text(self.data, task.head_labels)
        tokenizer = new_tokenizer(recipe.student, vocabulary, recipe.train.init)
        check_teachers(recipe, task, self.specs, tokenizer)
        input_format = new_input_format(recipe.student, tokenizer, recipe.train.init)
        return Tokens(tokenizer, run.stage("train") / "tokens", progress, input_format)

    def with_short_texts(self, tokens: Tokens) -> StudentGrid:
        """These students on texts of which ``task.max_input`` has cut the longer ones."""
        recipe = self.recipe
        section = recipe.task.max_input
        head = head_of(recipe.student, recipe.train.init)
        methods = {spec.method for spec in self.specs}
        views = [view for name in methods for view in views_of(name, recipe.train, head)]
        prefixes = {view.prefix for view in views}
        max_tokens = input_limit(recipe.student, recipe.train.init)
        limit = text_limit(section.strategy, tokens.input_format, prefixes, max_tokens)
        if limit is None:
            return self
        return replace(self, data=self.data.shortened(tokens.tokenizer, limit, section))

    def warnings(self, tokens: Tokens) -> list[str]:
        """Warnings of text that the students cannot read or write, each once."""
        warnings = _warnings(self.recipe, self.specs, self.data, tokens)
        name = self.recipe.student_name
        return warnings if name is None else [f"{name}: {warning}" for warning in warnings]

    def train(self, run: RunFolder, tokens: Tokens, progress: Progress) -> _Trained:
        """Train the students of the grid, in its order."""
        recipe = self.recipe
        folder = run.stage("train")
        tokenizer = tokens.tokenizer

        def train_teacher(
            teacher_recipe: StudentRecipe, spec: StudentSpec, shares_tokens: bool
        ) -> TrainedStudent:
            read = tokens if shares_tokens else _tokens_of_teacher(teacher_recipe, progress)
            teacher = StudentRun(teacher_recipe, spec, self.data, read.tokenizer, read, folder)
            return teacher.run(progress)

        teachers = LocalTeachers(recipe, run.path, tokenizer, train_teacher)

        def student_run(spec: StudentSpec) -> StudentRun:
            return StudentRun(
                recipe, spec, self.data, tokenizer, tokens, folder, teachers.for_student(spec)
            )

        def run_trial(spec: StudentSpec) -> Trial | None:
            trial = student_run(spec)
            try:
                trial.run(progress)
            except DivergedError as error:
                progress.say(f"{error.problem}; the setting is left out")
                free_memory()
                return None
            return trial.trial()

        tuner = Tuner(recipe.train.seeds, run_trial)
        students = []
        for number, spec in enumerate(self.specs, 1):
            students.append(student_run(tuner.tuned(spec)).run(progress))
            teachers.release(self.specs[number:])
        return _Trained(students, teachers.trained)


def _tokens_of_teacher(recipe: StudentRecipe, progress: Progress) -> Tokens:
    """The tokens of a local teacher that has another vocabulary than its student."""
    tokenizer = new_tokenizer(recipe.student, ())
    return Tokens(tokenizer, None, progress, new_input_format(recipe.student, tokenizer))


def _warnings(
    recipe: StudentRecipe, specs: Sequence[StudentSpec], data: Data, tokens: Tokens
) -> list[str]:
    task = make_task(recipe.task)
    tokenizer = tokens.tokenizer
    labels = {
        label
        for source in {spec.labels for spec in specs}
        for row in data.train
        if (label := row.label(source)) is not None
    }
    texts = {"inputs": [row.text for row in data.train]}
    if any(method_of(spec.method).needs_rationales for spec in specs):
        texts["rationales"] = [rationale for row in data.train for rationale in row.rationales]
    head = head_of(recipe.student, recipe.train.init)
    written = labels.union(task.head_labels)
    if head == "labels":
        written = set()
    warnings = [*filter(None, [new_head_warning(recipe, task)])]
    warnings += vocabulary_warnings(recipe.student, tokenizer, written, texts)
    classes: Sequence[str] = ()
    if head == "labels":
        classes = sorted(labels) if task.has_several_labels else task.head_labels
    windows = recipe.task.max_input.most_windows
    encoder = Encoder(
        tokens,
        windows * input_limit(recipe.student, recipe.train.init),
        recipe.student.max_target_tokens,
        classes,
        scores_choices=head == "labels" and task.has_choices,
    )
    rows = data.subset(max(recipe.train.subset, key=subset_rank))
    systems = dict.fromkeys((spec.method, spec.labels) for spec in specs)
    for method, source in systems:
        encoded = encoder.rows(rows, views_of(method, recipe.train, head), source)
        warnings += encoder.truncation_warnings(encoded, windows)
    return list(dict.fromkeys(warnings))


def planned(
    recipe: Recipe, out: str | Path | None = None, *, annotated: bool = True
) -> list[dict[str, Any]]:
    """The plan of ``--dry-run``: one entry for every student.

    Without annotations (``annotated`` False) "rows" is an upper bound and "rationales" is None.
    """
    run_folder = RunFolder.of(recipe, out)
    folder = run_folder.stage("train")
    task = make_task(recipe.task)
    checked = list(checked_students(recipe, task))
    check_subsets(recipe, task)
    plan = []
    for student, specs in checked:
        data: Data | int = count_trainable(recipe, task, run_folder)
        if annotated:
            data = gather(student, task, run_folder.path, specs)
        for teacher_recipe, spec in planned_teachers(student, specs):
            entry = _plan(teacher_recipe, task, spec, data, folder)
            plan.append(entry | {"name": spec.title})
        for spec in specs:
            entry = _plan(student, task, spec, data, folder)
            if spec.seed == student.train.seeds[0]:
                entry["trials"] = len(trial_specs(spec))
            plan.append(entry)
    return plan


def _plan(
    recipe: StudentRecipe, task: Task, spec: StudentSpec, data: Data | int, folder: Path
) -> dict[str, Any]:
    """``data``: the rows, or their number where they are not annotated yet."""
    settings = recipe.training_of(spec.method)
    rationales = None
    valid = None
    if isinstance(data, int):
        rows = _most_rows(spec.subset, data, task)
    else:
        rows = sum(bool(row.label(spec.labels)) for row in data.subset(spec.subset))
        rationales = count_rationales(data, spec)
        valid = len(data.valid)
    named = {} if spec.student is None else {"student": spec.student}
    return {
        "name": spec.name,
        **named,
        "rows": rows,
        "rationales": rationales,
        "valid": valid,
        "trials": 0,
        "steps": _most_steps(recipe, rows),
        "done": _is_done(settings, spec.path(folder) / TRAINING_RECORD),
    }


def _most_rows(subset: Subset, rows: int, task: Task) -> int:
    """The rows of a subset of ``rows`` rows at most."""
    number = rows_per_label(subset)
    if number is None:
        return max(1, round(float(subset) * rows))
    # a row without any of several labels is of a class of its own
    return min(rows, number * (len(task.head_labels) + task.has_several_labels))


def _most_steps(recipe: StudentRecipe, rows: int) -> int:
    """Optimizer steps of a student with ``rows`` rows, or of its longest trial."""
    tune = recipe.train.tune
    settings = tune.settings if tune else [{}]
    is_scratch = recipe.student.is_scratch
    return max(recipe.train.tuned(values).steps(rows, is_scratch=is_scratch) for values in settings)


def _is_done(settings: str, record: Path) -> bool:
    """Whether a student of these settings is finished (its data are compared when training)."""
    try:
        student = json.loads(record.read_text(encoding="utf-8"))["student"]
    except (OSError, ValueError, KeyError):
        return False
    return bool(student.get("settings") == settings)


def _check_processes(recipe: StudentRecipe) -> None:
    sizes = (recipe.train.tune and recipe.train.tune.batch_size) or (recipe.train.batch_size,)
    uneven = [size for size in sizes if size % world_size()]
    if uneven:
        raise UserError(
            f"train.batch_size {uneven[0]} cannot be divided among {world_size()} processes",
            hint="make it a multiple of their number: it counts a step's examples over all of them",
        )


def _check_precision(recipe: StudentRecipe) -> None:
    if recipe.train.precision == "bf16" and not supports_bf16():
        raise UserError(
            "train.precision: bf16 needs an NVIDIA GPU that supports it; on some CPUs it ends in "
            "an illegal instruction",
            hint="use train.precision: auto",
        )
