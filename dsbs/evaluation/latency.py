"""How long a student takes: timed once for a device, and kept, because what is timed again never comes out the same."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.predict import Loader
from dsbs.files import device_name, write_json
from dsbs.progress import Progress, running
from dsbs.records.results import BATCH_SIZES, Latency
from dsbs.records.rows import Example, TrainedStudent
from dsbs.students import Student

_WARM_UP = 3  # calls of each batch size that are not counted: the first ones pay for start-up


class LatencyMeasurement(BaseModel):
    """A student timed on one device; ``latency`` has a line for each batch size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str  # of the student
    max_label_tokens: int
    latency: list[Latency]

    def fits(self, recipe: Recipe, student: TrainedStudent) -> bool:
        """Whether it is of this student and of what the recipe asks for, on whatever device."""
        calls = recipe.eval.latency_calls
        return (
            self.fingerprint == student.fingerprint
            and self.max_label_tokens == recipe.eval.max_label_tokens
            and [(one.batch_size, one.calls) for one in self.latency]
            == [(size, calls) for size in BATCH_SIZES]
        )


class LatencyFile(BaseModel):
    """``eval/latency/<student>.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    schema_: Literal["dsbs.latency/1"] = Field("dsbs.latency/1", alias="schema")
    measurements: list[LatencyMeasurement] = []  # the oldest first


def latency_file(run: Path, student: TrainedStudent) -> Path:
    return run / "eval" / "latency" / f"{student.name}.json"


def measure_latency(
    recipe: Recipe,
    student: TrainedStudent,
    rows: Sequence[Example],
    run: Path,
    progress: Progress,
    load: Loader | None = None,
) -> list[Latency]:
    """Milliseconds that a call takes, from a row's fields to its label read, at each of `BATCH_SIZES`; [] for no calls.

    What has been timed on this device stays; what was timed elsewhere, or otherwise, stays beside it. ``rows`` are not empty;
    ``load`` is the student's `loader` where others use the model too. Raises UserError for a file that cannot be read.
    """
    calls, most = recipe.eval.latency_calls, recipe.eval.max_label_tokens
    if calls == 0:
        return []
    device = device_name()
    there = _read(latency_file(run, student))
    for one in there:
        if one.fits(recipe, student) and one.latency[0].device == device:
            return one.latency
    model = load() if load is not None else Student.load(student.path)
    with running(progress, f"time {student.name}", calls * len(BATCH_SIZES)):
        (latency,) = timed([model], [row.input for row in rows], calls, most, progress)
    new = LatencyMeasurement(
        fingerprint=student.fingerprint, max_label_tokens=most, latency=latency
    )
    write_json(
        latency_file(run, student),
        LatencyFile(measurements=[*there, new]).model_dump(mode="json", by_alias=True),
    )
    return latency


def timed(
    models: Sequence[Student],
    inputs: Sequence[dict[str, Any]],
    calls: int,
    max_label_tokens: int,
    progress: Progress,
) -> list[list[Latency]]:
    """Each model's latencies at `BATCH_SIZES` on rows of the task's own fields; ``calls`` of each move ``progress``.

    Several models are called in turns, so that what slows the machine down for a while slows all of them.
    """
    inputs = list(inputs)
    random.Random(0).shuffle(inputs)
    device = device_name()
    found: list[list[Latency]] = [[] for _ in models]
    for part, size in enumerate(BATCH_SIZES):
        took: list[list[float]] = [[] for _ in models]
        for call in range(_WARM_UP + calls):
            items = [inputs[(call * size + i) % len(inputs)] for i in range(size)]
            for model, times in zip(models, took, strict=True):
                began = time.perf_counter()
                model.predict(
                    items, batch_size=size, max_label_tokens=max_label_tokens, canonical=True
                )
                times.append(1000 * (time.perf_counter() - began))
            progress.update(calls * part + max(0, call + 1 - _WARM_UP))
        for times, lines in zip(took, found, strict=True):
            p50, p95 = (round(float(at), 4) for at in np.percentile(times[_WARM_UP:], (50, 95)))
            lines.append(
                Latency(batch_size=size, calls=calls, p50_ms=p50, p95_ms=p95, device=device)
            )
    return found


def read_latency(run: Path, student: TrainedStudent, recipe: Recipe) -> list[Latency]:
    """What was timed of the student as the recipe asks for it, the last time on whatever device; [] where nothing was."""
    fitting = [one for one in _read(latency_file(run, student)) if one.fits(recipe, student)]
    return fitting[-1].latency if fitting else []


def _read(path: Path) -> list[LatencyMeasurement]:
    """The measurements of a file; none where there is no file."""
    try:
        return LatencyFile.model_validate_json(path.read_text(encoding="utf-8")).measurements
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, ValidationError):
        raise UserError(
            f"{path} is not a file of latencies", hint="remove it: the student is timed again"
        ) from None
