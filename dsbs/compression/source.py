"""Source student: where a chain starts, how it was trained, fine-tuning with its rows, and the
comparison of its compressed copies with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from dsbs.compression.healing import (
    Healing,
    depths_of,
    healing_terms,
    original_as_teacher,
    taught_views,
    with_terms,
)
from dsbs.config import LabelSource, ResolvedTrainSection, StudentRecipe, base_of
from dsbs.config.load import read_recorded
from dsbs.errors import UserError
from dsbs.evaluation.latency import time_models, timing_budget
from dsbs.progress import Progress, running
from dsbs.records import TrainedStudent
from dsbs.records.results import (
    BATCH_SIZES,
    COMPRESSION_RECORD,
    HealFrom,
    Latency,
    Measurement,
    read_compression_record,
)
from dsbs.records.subsets import Subset
from dsbs.run_folder import RunFolder, read_student
from dsbs.students.calibration import write_record
from dsbs.students.card import read_card
from dsbs.students.formats import input_format_of, start_token
from dsbs.students.novelty import write_novelty
from dsbs.students.student import Student
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import weights_megabytes
from dsbs.tasks import make_task
from dsbs.training.distillation.local_teachers import LocalTeacher
from dsbs.training.encode import Encoded, Encoder, collate, pad, pad_prompts
from dsbs.training.grid import StudentSpec
from dsbs.training.methods import View, views_of
from dsbs.training.rows import Data, Row, gather, label_texts
from dsbs.training.student_run import StudentRun
from dsbs.training.tokens import Tokens
from dsbs.training.validation import calibrated, novelty_of

WORK = "work.json"  # the fingerprint of everything that made a compressed student
_IMPORTANCE_ROWS = 256
_BATCH_SIZE = 32
_DECODER_ROWS = 64  # of valid, which are read once for every layer
_DECODER_BATCH_SIZE = 8  # a decoder's logits cover the prompt as well
_EXPORT_EXAMPLES = 64  # texts on which an export is compared with its student
_VALIDATIONS = 4  # while a student heals


@dataclass(frozen=True, slots=True)
class SourceStudent:
    """The trained student of a chain, and the student that its next step starts from."""

    run: RunFolder
    recipe: StudentRecipe
    student: TrainedStudent
    start: Path  # the folder that the next step starts from
    chain: tuple[str, ...]  # the steps up to ``start``
    healed_by: tuple[HealFrom | None, ...]  # what each of them healed from
    fingerprint: str  # of ``start``

    @property
    def folder(self) -> Path:
        """The folder of the compressed students made of ``student``."""
        return self.run.compressed(self.student.name)


def find_source(student: str | Path) -> SourceStudent:
    """Read a student of a run: ``<run>/train/<name>``, or a compressed one. Raises UserError."""
    folder = Path(student).absolute()
    read_card(folder)
    run = RunFolder.containing(folder)
    if run is None:
        raise UserError(
            f"{student} is not part of a run, so there are no valid rows to compare it on",
            hint="give a folder such as runs/tickets/train/step-by-step-gold-s0",
        )
    if (folder / COMPRESSION_RECORD).is_file():
        record = read_compression_record(folder)
        trained = read_student(run.student(record.student))
        if trained.fingerprint != record.fingerprint:
            raise UserError(
                f"{student} was made from an earlier version of student {record.student}",
                hint=f"compress {trained.path} itself: its chains are then made again",
            )
        fingerprint = fingerprint_of(folder) or ""
        healed_by = record.healed_by or (None,) * len(record.chain)
        recipe = _read_recipe(run, trained)
        return SourceStudent(run, recipe, trained, folder, record.chain, healed_by, fingerprint)
    trained = read_student(folder)
    recipe = _read_recipe(run, trained)
    return SourceStudent(run, recipe, trained, folder, (), (), trained.fingerprint)


def fingerprint_of(folder: Path) -> str | None:
    """The fingerprint of what made a compressed student; None where there is none."""
    try:
        return str(json.loads((folder / WORK).read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read_recipe(run: RunFolder, student: TrainedStudent) -> StudentRecipe:
    recipe = read_recorded(run.manifest("train"))
    if recipe is None:
        raise UserError(
            f"{run.path}/train/manifest.json has no recipe that this version can read",
            hint="run `dsbs train` with its recipe again",
        )
    try:
        return recipe.students[student.student]
    except KeyError:
        raise UserError(
            f"{student.name} is of a student that {run.path}/train/manifest.json does not have",
            hint="run `dsbs train` with its recipe again",
        ) from None


class FineTuneData:
    """Rows and settings of the original's training. Raises UserError where they have changed.

    Healing trains all weights, without LoRA adapters and without the recipe's own terms.
    """

    def __init__(self, source: SourceStudent, progress: Progress, *, needs_train: bool) -> None:
        self._source = source
        self._progress = progress
        self._needs_train = needs_train
        student = source.student
        method = base_of(student.method)
        section = source.recipe.resolved_train.tuned(student.tuned)
        self.section: ResolvedTrainSection = section.model_copy(
            update={
                "methods": (method,),
                "lora": None,
                "terms": (),
                "teachers": (),
                "patience": None,
            }
        )
        labels: LabelSource = "teacher" if student.labels == "teacher" else "gold"
        self.spec = StudentSpec(
            method, labels, student.seed, self.section, student.subset, student=student.student
        )
        card = read_card(student.path)
        self._card = card
        self.views: tuple[View, ...] = views_of(method, self.section, card.head)
        self._classes = card.classes
        self._kind = card.kind
        if {view.target: view.prefix for view in self.views} != card.prefixes:
            raise UserError(
                f"{student.name} was trained on other views than the recipe in "
                f"{source.run.path}/train/manifest.json has",
                hint="run `dsbs train` with the recipe that trained it",
            )

    @cached_property
    def recipe(self) -> StudentRecipe:
        return self._source.recipe.model_copy(update={"train": self.section})

    @cached_property
    def data(self) -> Data:
        task = make_task(self.recipe.task)
        specs = [self.spec] if self._needs_train else []
        data = gather(self.recipe, task, self._source.run.path, specs)
        limit = self._card.max_text_tokens
        if limit is None:
            return data
        tokenizer = load_tokenizer(str(self._source.student.path))
        return data.shortened(tokenizer, limit, task.section.max_input)

    def _tokens(self, tokenizer: Any) -> Tokens:
        folder = self._source.run.stage("train") / "tokens"
        input_format = input_format_of(tokenizer, self._kind, self._card.template)
        return Tokens(tokenizer, folder, self._progress, input_format)

    def batches(
        self, model: Any, tokenizer: Any, split: Literal["train", "valid"] = "train"
    ) -> Iterator[Mapping[str, Any]]:
        """See ``Examples``: up to 256 rows, or 64 of valid for a
        decoder; of train, the first ones by a hash of their ids."""
        student = self.recipe.student
        chosen = self.data.valid[: _IMPORTANCE_ROWS if self._kind != "causal" else _DECODER_ROWS]
        views = self.views[:1]
        labels = self.data.valid_labels
        if split == "train":
            chosen = importance_rows(self.data, self.spec.subset)
            views = self.views
            labels = self.spec.labels
        task = make_task(self.recipe.task)
        targets = self._classes
        label_sets = None
        if targets and task.has_several_labels:
            targets = label_texts((chosen, labels))
            label_sets = [task.head_targets(label) for label in targets]
        encoder = Encoder(
            self._tokens(tokenizer),
            student.max_input_tokens,
            student.max_target_tokens,
            targets,
        )
        if targets:
            rows = encoder.rows(chosen, self.views[:1], labels)
            yield from self._class_batches(rows, label_sets)
            return
        rows = encoder.rows(chosen, views, labels)
        batch_size = _DECODER_BATCH_SIZE if self._kind == "causal" else _BATCH_SIZE
        for first in range(0, len(rows), batch_size):
            packed = collate(rows[first : first + batch_size])
            for view in views:
                if view.target not in packed:
                    continue
                if self._kind == "causal":
                    yield pad_prompts(packed[view.target], tokenizer.pad_token_id)
                else:
                    start = start_token(model.config, view.start)
                    yield pad(packed[view.target], tokenizer.pad_token_id, start)

    @staticmethod
    def _class_batches(
        rows: Sequence[Encoded], label_sets: Sequence[Sequence[int]] | None
    ) -> Iterator[Mapping[str, Any]]:
        """Batches of a label head: input_ids and attention_mask (B, S), labels (B,).

        With ``label_sets``, whose indices are the targets, labels (B, L) of 1 and 0.
        """
        import torch

        for first in range(0, len(rows), _BATCH_SIZE):
            packed = collate(rows[first : first + _BATCH_SIZE])
            batch = pad(packed["label"], 0, 0)
            targets = batch["labels"][:, 0]
            if label_sets is not None:
                targets = torch.tensor(label_sets)[targets]
            yield {
                "input_ids": batch["input_ids"],
                "attention_mask": batch["attention_mask"],
                "labels": targets,
            }

    def inputs(self) -> list[str]:
        """See ``Examples``."""
        return [row.text for row in self.data.valid[:_EXPORT_EXAMPLES]]

    def heal(self, start: Path, folder: Path, healing: Healing, title: str) -> Path:
        """Train the student in ``start`` further into ``folder``, which is returned.

        The step with the best validation is kept. An interrupted healing resumes.
        """
        steps = healing.steps
        section = self.section.model_copy(
            update={
                "init": str(start),
                "max_steps": steps,
                "max_epochs": None,
                "learning_rate": healing.learning_rate,
                "warmup_steps": min(self.section.warmup_steps, steps // 10),
                "eval_every": max(1, steps // _VALIDATIONS),
                "log_every": min(self.section.log_every, max(1, steps // 10)),
            }
        )
        teachers: list[LocalTeacher] = []
        without_targets: tuple[str, ...] = ()
        if healing.source != "rows":
            original = self._source.student
            terms = healing_terms(self._card, healing.layers, depths_of(original.path))
            section = with_terms(section, terms)
            teachers.append(original_as_teacher(original))
        if healing.source == "original":
            without_targets = taught_views(self._card)
        tokenizer = load_tokenizer(str(start))
        spec = replace(
            self.spec,
            method=section.methods[0],
            section=section,
            heading=title,
            directory=str(folder),
            keep_zeros=healing.keep_zeros,
            without_targets=without_targets,
        )
        recipe = self.recipe.model_copy(update={"train": section})
        train_folder = self._source.run.stage("train")
        student_run = StudentRun(
            recipe, spec, self.data, tokenizer, self._tokens(tokenizer), train_folder, teachers
        )
        student_run.run(self._progress)
        return folder


class Evaluator:
    """Measures students on the valid rows, by which the original's best step was chosen."""

    def __init__(
        self, recipe: StudentRecipe, original: Path, data: Data, progress: Progress
    ) -> None:
        self._recipe = recipe
        self._original_path = original
        self._progress = progress
        self._inputs = [data.fields[row.id] for row in data.valid]
        self._labels = [str(row.label(data.valid_labels)) for row in data.valid]
        self._data = data
        self._latencies_ms: list[float] = []  # of each row, in the last prediction
        self.n = len(self._labels)

    @cached_property
    def _original(self) -> Student:
        return Student.load(self._original_path)

    @cached_property
    def _original_labels(self) -> list[str | None]:
        return self._predict(self._original)

    def accuracy(self, folder: Path) -> float:
        return self._accuracy(self._predict(Student.load(folder)))

    def compare(
        self, student: Student, folder: Path, title: str
    ) -> tuple[Measurement, Measurement, float]:
        """Measurements of the original and of ``student``, which is in ``folder``, and their
        agreement.

        The agreement is the share of rows with the same label. Two outputs without a readable label
        count as the same.
        """
        labels = self._predict(student)
        original_latency, latency = self._latencies([self._original, student], title)
        original = self._measurement(
            self._original_path, self._original, self._original_labels, original_latency
        )
        compressed = self._measurement(folder, student, labels, latency)
        same_label = self._original.task.correct
        agreeing = [
            label == original_label
            or (
                label is not None
                and original_label is not None
                and same_label(label, original_label)
            )
            for label, original_label in zip(labels, self._original_labels, strict=True)
        ]
        return original, compressed, sum(agreeing) / self.n

    def fit_distributions(self, student: Student, folder: Path, view: View) -> None:
        """Write the student's own calibration and novelty into ``folder``, where it has them."""
        calibration = calibrated(student, self._recipe, self._data, view)
        if calibration is not None:
            write_record(folder, calibration)
        novelty = novelty_of(student, self._recipe, self._data, view)
        if novelty is not None:
            write_novelty(folder, novelty)

    def _measurement(
        self,
        folder: Path,
        student: Student,
        labels: Sequence[str | None],
        latency: list[Latency],
    ) -> Measurement:
        return Measurement(
            accuracy=self._accuracy(labels),
            megabytes=weights_megabytes(folder),
            parameters=student.backend.parameters,
            latency=latency,
        )

    def _latencies(self, students: list[Student], title: str) -> list[list[Latency]]:
        calls = self._recipe.eval.latency_calls
        if calls == 0:
            return [[] for _ in students]
        max_label_tokens = self._recipe.eval.max_label_tokens
        with running(self._progress, f"time {title}", calls * len(BATCH_SIZES)):
            budget_s = len(students) * timing_budget(self._latencies_ms)
            return time_models(
                students, self._inputs, calls, max_label_tokens, self._progress, budget_s
            )

    def _predict(self, student: Student) -> list[str | None]:
        section = self._recipe.eval
        answers = student.predict(
            self._inputs,
            batch_size=section.batch_size,
            max_label_tokens=section.max_label_tokens,
            canonical=True,
        )
        self._latencies_ms = [answer.latency_ms for answer in answers]
        return [answer.label for answer in answers]

    def _accuracy(self, labels: Sequence[str | None]) -> float:
        is_correct = self._original.task.correct
        correct = sum(
            label is not None and is_correct(label, gold)
            for label, gold in zip(labels, self._labels, strict=True)
        )
        return correct / self.n


def importance_rows(data: Data, subset: Subset) -> list[Row]:
    """Up to 256 of the rows that a student learned, the first ones by a hash of their ids."""
    learned = {row.id for row in data.subset(subset)}
    ordered = (data.train[i] for i in data.order)
    return list(islice((row for row in ordered if row.id in learned), _IMPORTANCE_ROWS))
