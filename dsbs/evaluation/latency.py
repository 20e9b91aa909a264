"""Latency of students: timed once per device and kept, because no timing repeats exactly.

A timing stops at a budget of seconds, so that it takes less time than predicting the split did.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.predictions import StudentLoader, read_predictions
from dsbs.files import write_json
from dsbs.progress import Progress, running
from dsbs.records import Example, TrainedStudent
from dsbs.records.results import BATCH_SIZES, Latency
from dsbs.run_folder import RunFolder
from dsbs.students.student import Student
from dsbs.students.weights import device_name

MIN_CALLS = 2  # of each batch size, whatever the budget
_WARM_UP = 3  # at most so many first calls of each batch size do not count
_BUDGET_SHARE = 0.5  # of the time that predicting took
_MIN_BUDGET_S = 0.5


class LatencyMeasurement(BaseModel):
    """The latency of a student on one device, with an entry for each batch size."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fingerprint: str
    """Of the student."""
    max_label_tokens: int
    max_calls: int | None = None
    """``eval.latency_calls``; None: timed without a budget, with exactly so many calls."""
    latency: list[Latency]

    def fits(self, recipe: Recipe, student: TrainedStudent) -> bool:
        """Whether it is of this student and the recipe's settings, on any device."""
        limits = {self.max_calls or measured.calls for measured in self.latency}
        return (
            self.fingerprint == student.fingerprint
            and self.max_label_tokens == recipe.eval.max_label_tokens
            and limits == {recipe.eval.latency_calls}
            and tuple(measured.batch_size for measured in self.latency) == BATCH_SIZES
        )


class LatencyFile(BaseModel):
    """``eval/latency/<student>.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["dsbs.latency/1"] = Field("dsbs.latency/1", alias="schema")
    measurements: list[LatencyMeasurement] = []  # the oldest first


def latency_file(run: RunFolder, student: TrainedStudent) -> Path:
    return run.stage("eval") / "latency" / f"{student.name}.json"


def measure_latency(
    recipe: Recipe,
    student: TrainedStudent,
    rows: Sequence[Example],
    run: RunFolder,
    progress: Progress,
    load: StudentLoader | None = None,
) -> list[Latency]:
    """Milliseconds of a call, from a row's fields to its label, at each of `BATCH_SIZES`.

    The student's prediction file has to exist: it sets the budget. A fitting measurement on this
    device is returned as it is; those of other devices or settings stay in the file. Empty if
    ``eval.latency_calls`` is 0. ``rows`` are not empty; ``load`` is the student's loader, if the
    model is used elsewhere too. Raises UserError for a file that cannot be read.
    """
    max_calls = recipe.eval.latency_calls
    if max_calls == 0:
        return []
    device = device_name()
    measurements = _read(latency_file(run, student))
    for measurement in measurements:
        if measurement.fits(recipe, student) and measurement.latency[0].device == device:
            return measurement.latency
    predictions = read_predictions(run.predictions(student.name)).values()
    budget_s = timing_budget(prediction.latency_ms for prediction in predictions)
    model = Student.load(student.path) if load is None else load()
    max_label_tokens = recipe.eval.max_label_tokens
    inputs = [row.input for row in rows]
    with running(progress, f"time {student.name}", max_calls * len(BATCH_SIZES)):
        (latency,) = time_models([model], inputs, max_calls, max_label_tokens, progress, budget_s)
    new = LatencyMeasurement(
        fingerprint=student.fingerprint,
        max_label_tokens=max_label_tokens,
        max_calls=max_calls,
        latency=latency,
    )
    content = LatencyFile(measurements=[*measurements, new])
    write_json(latency_file(run, student), content.model_dump(mode="json", by_alias=True))
    return latency


def timing_budget(latencies_ms: Iterable[float | None]) -> float:
    """Seconds that a timing may take: half of what predicting took, by each row's latency."""
    predicting_s = sum(latency or 0.0 for latency in latencies_ms) / 1000
    return max(_MIN_BUDGET_S, _BUDGET_SHARE * predicting_s)


def time_models(
    models: Sequence[Student],
    inputs: Sequence[dict[str, Any]],
    max_calls: int,
    max_label_tokens: int,
    progress: Progress,
    budget_s: float,
) -> list[list[Latency]]:
    """Time each model at `BATCH_SIZES` on ``inputs``, rows of the task's own fields.

    Models are called in turns, so that a disturbance of the machine slows all of them. A batch size
    gets an equal part of the budget that is left, and at least `MIN_CALLS` and at most
    ``max_calls`` calls that count. ``progress`` counts calls per model.
    """
    inputs = list(inputs)
    random.Random(0).shuffle(inputs)
    device = device_name()
    latencies: list[list[Latency]] = [[] for _ in models]
    end_of_budget = perf_counter() + budget_s
    for i, batch_size in enumerate(BATCH_SIZES):
        now = perf_counter()
        deadline = now + (end_of_budget - now) / (len(BATCH_SIZES) - i)
        times_ms: list[list[float]] = [[] for _ in models]
        for call in range(_WARM_UP + max_calls):
            if call >= MIN_CALLS and perf_counter() >= deadline:
                break
            batch = [inputs[(call * batch_size + j) % len(inputs)] for j in range(batch_size)]
            for model, model_times_ms in zip(models, times_ms, strict=True):
                start = perf_counter()
                model.predict(
                    batch, batch_size=batch_size, max_label_tokens=max_label_tokens, canonical=True
                )
                model_times_ms.append(1000 * (perf_counter() - start))
            progress.update(i * max_calls + max(0, call + 1 - _WARM_UP))
        progress.update((i + 1) * max_calls)
        for model_times_ms, model_latencies in zip(times_ms, latencies, strict=True):
            model_latencies.append(_latency(model_times_ms, max_calls, batch_size, device))
    return latencies


def _latency(times_ms: list[float], max_calls: int, batch_size: int, device: str) -> Latency:
    """The percentiles of a model's calls, without the warm-up: a quarter of few calls, else 3."""
    warm_up = max(len(times_ms) - max_calls, min(_WARM_UP, len(times_ms) // 4))
    counted = times_ms[warm_up:]
    p50, p95 = np.percentile(counted, (50, 95))
    return Latency(
        batch_size=batch_size,
        calls=len(counted),
        p50_ms=round(float(p50), 4),
        p95_ms=round(float(p95), 4),
        device=device,
    )


def read_latency(run: RunFolder, student: TrainedStudent, recipe: Recipe) -> list[Latency]:
    """The newest measurement that fits student and recipe, on any device; empty: none."""
    measurements = [m for m in _read(latency_file(run, student)) if m.fits(recipe, student)]
    return measurements[-1].latency if measurements else []


def _read(path: Path) -> list[LatencyMeasurement]:
    """The measurements of a file; none if it does not exist."""
    try:
        return LatencyFile.model_validate_json(path.read_text(encoding="utf-8")).measurements
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, ValidationError):
        raise UserError(
            f"{path} is not a latency file", hint="remove it: the student is timed again"
        ) from None
