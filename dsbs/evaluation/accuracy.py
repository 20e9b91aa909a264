"""Accuracy as a local `evaluate` module: it works without a network. Importing it costs seconds: import it where it is used."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from dsbs.tasks.base import Task


class TaskAccuracy(evaluate.Metric):  # type: ignore[misc]
    """Share of predictions that the task holds to be correct: by label, by choice, or by an equation's value.

    ``predictions`` are canonical labels, "" where the output could not be read; ``references`` the gold labels. Returns
    ``{"accuracy": float in [0, 1], "correct": [bool, …]}``.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        super().__init__(keep_in_memory=True, hash=task.name)

    def _info(self) -> Any:
        return evaluate.MetricInfo(
            description="Accuracy by the task's own comparison",
            citation="Hsieh et al., 2023, section 4",
            inputs_description="predictions and references: canonical labels",
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, *, predictions: list[str], references: list[str]) -> dict[str, Any]:
        correct = [
            bool(p) and self._task.correct(p, g)
            for p, g in zip(predictions, references, strict=True)
        ]
        return {"accuracy": sum(correct) / len(correct), "correct": correct}
