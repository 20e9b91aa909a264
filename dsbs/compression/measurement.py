"""A compressed student held against the original: on the rows of valid, on one machine, in turns."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from dsbs.config import Recipe
from dsbs.evaluation.latency import time_models, timing_budget
from dsbs.progress import Progress, running
from dsbs.records.compression import Measurement
from dsbs.records.results import BATCH_SIZES, Latency
from dsbs.students import Student, megabytes
from dsbs.training.rows import Data


class Evaluator:
    """The original and the rows. ``data`` has the rows of valid that the original's best step was chosen by."""

    def __init__(self, recipe: Recipe, original: Path, data: Data, progress: Progress) -> None:
        self._recipe, self._path, self._progress = recipe, original, progress
        self._inputs = [data.fields[row.id] for row in data.valid]
        self._labels = [str(row.label(data.valid_labels)) for row in data.valid]
        self.n = len(self._labels)
        self._latencies_ms: list[float] = []  # of each row, in the last prediction

    @cached_property
    def _original(self) -> Student:
        return Student.load(self._path)

    @cached_property
    def _said(self) -> list[str | None]:
        return self._answers(self._original)

    def accuracy(self, folder: Path) -> float:
        return self._share(self._answers(Student.load(folder)))

    def standings(self, folder: Path, title: str) -> tuple[Measurement, Measurement, float]:
        """Of the original and of the student in ``folder``, and the share of rows to which both say the same.

        Two outputs in which no label can be read count as the same.
        """
        student = Student.load(folder)
        said = self._answers(student)
        timings = self._timings([self._original, student], title)
        same = self._original.task.correct
        agree = [
            a == b or (a is not None and b is not None and same(a, b))
            for a, b in zip(said, self._said, strict=True)
        ]
        ours, theirs = (
            Measurement(
                accuracy=self._share(answers),
                megabytes=megabytes(path),
                parameters=model.engine.parameters,
                latency=latency,
            )
            for path, model, answers, latency in (
                (self._path, self._original, self._said, timings[0]),
                (folder, student, said, timings[1]),
            )
        )
        return ours, theirs, sum(agree) / self.n

    def _timings(self, models: list[Student], title: str) -> list[list[Latency]]:
        calls, most = self._recipe.eval.latency_calls, self._recipe.eval.max_label_tokens
        if calls == 0:
            return [[] for _ in models]
        with running(self._progress, f"time {title}", calls * len(BATCH_SIZES)):
            budget_s = len(models) * timing_budget(self._latencies_ms)
            return time_models(models, self._inputs, calls, most, self._progress, budget_s)

    def _answers(self, student: Student) -> list[str | None]:
        evaluation = self._recipe.eval
        answers = student.predict(
            self._inputs,
            batch_size=evaluation.batch_size,
            max_label_tokens=evaluation.max_label_tokens,
            canonical=True,
        )
        self._latencies_ms = [answer.latency_ms for answer in answers]
        return [answer.label for answer in answers]

    def _share(self, said: list[str | None]) -> float:
        correct = self._original.task.correct
        return (
            sum(
                a is not None and correct(a, gold)
                for a, gold in zip(said, self._labels, strict=True)
            )
            / self.n
        )
