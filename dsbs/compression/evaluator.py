"""Evaluator: compares compressed students with the original on the valid rows, on one machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from dsbs.config import Recipe
from dsbs.evaluation.latency import time_models, timing_budget
from dsbs.progress import Progress, running
from dsbs.records.compression import Measurement
from dsbs.records.results import BATCH_SIZES, Latency
from dsbs.students import Student, weights_megabytes
from dsbs.training.rows import Data


class Evaluator:
    """Measures students on the valid rows, by which the original's best step was chosen."""

    def __init__(self, recipe: Recipe, original: Path, data: Data, progress: Progress) -> None:
        self._recipe = recipe
        self._original_path = original
        self._progress = progress
        self._inputs = [data.fields[row.id] for row in data.valid]
        self._labels = [str(row.label(data.valid_labels)) for row in data.valid]
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

    def compare(self, folder: Path, title: str) -> tuple[Measurement, Measurement, float]:
        """Measurements of the original and of the student in ``folder``, and their agreement.

        The agreement is the share of rows with the same label. Two outputs without a readable label
        count as the same.
        """
        student = Student.load(folder)
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
