"""Distilling Step-by-Step: from examples and a teacher's URL to a compared, deployable small student.

    recipe = dsbs.load_recipe("recipes/demo.yaml", ["train.max_steps=100"])
    dsbs.annotate(recipe)
    dsbs.train(recipe)
    results = dsbs.evaluate(recipe)
    print({system.name: system.accuracy for system in results.systems})
    student = dsbs.Student.load("runs/demo/train/step-by-step-gold-s0")
    print(student.predict(["My parcel never came."])[0].label)

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The stages' packages are imported before the functions of the same names are defined, so that `dsbs.annotate` stays the
# function: importing a submodule of a package that is already loaded sets no attribute here.
import dsbs.annotate
import dsbs.compress
import dsbs.export
import dsbs.report
import dsbs.train  # noqa: F401
from dsbs.errors import DsbsError, PartialError, UserError

if TYPE_CHECKING:
    from dsbs.annotate.summary import AnnotateResult
    from dsbs.check import Validation
    from dsbs.compress.engine import CompressResult
    from dsbs.export.exported import Exported
    from dsbs.progress import Meter
    from dsbs.recipe import Recipe
    from dsbs.results import Results
    from dsbs.student import Student
    from dsbs.train.loop import TrainResult

__version__ = "0.1.0"
__all__ = [
    "DsbsError",
    "PartialError",
    "Student",
    "UserError",
    "annotate",
    "compress",
    "evaluate",
    "export",
    "load_recipe",
    "report",
    "report_runs",
    "train",
    "validate",
]


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file with ``key=value`` overrides. Raises UserError naming every mistake with its line."""
    from dsbs.recipe_file import load_recipe as load

    return load(path, overrides)


def validate(recipe: Recipe) -> Validation:
    """Check a recipe against its data without any model or call. Raises UserError. See ``dsbs validate``."""
    from dsbs.check import validate as run

    return run(recipe)


def annotate(recipe: Recipe, *, out: str | Path | None = None, meter: Meter | None = None) -> AnnotateResult:
    """Ask the teacher for a rationale and a label of every row. See ``dsbs annotate``."""
    from dsbs.annotate.engine import annotate as run

    return run(recipe, out=out, meter=meter)


def train(recipe: Recipe, *, out: str | Path | None = None, meter: Meter | None = None) -> TrainResult:
    """Train every student of the recipe's grid. See ``dsbs train``."""
    from dsbs.train.loop import train as run

    return run(recipe, out=out, meter=meter)


def evaluate(recipe: Recipe, *, out: str | Path | None = None, meter: Meter | None = None, score_only: bool = False) -> Results:
    """Predict, score and compare; with ``score_only`` from the prediction files alone. See ``dsbs eval``."""
    from dsbs.eval.compare import evaluate as run

    return run(recipe, out=out, meter=meter, score_only=score_only)


def compress(
    student: str | Path,
    methods: Sequence[str],
    *,
    max_drop: float = 0.02,
    heal_steps: int | None = None,
    heal_learning_rate: float | None = None,
    meter: Meter | None = None,
) -> CompressResult:
    """Make smaller students of a run's, a step of ``methods`` at a time. See ``dsbs compress``."""
    from dsbs.compress.engine import compress as run

    return run(student, methods, max_drop=max_drop, heal_steps=heal_steps, heal_learning_rate=heal_learning_rate, meter=meter)


def export(
    student: str | Path,
    format: str,
    *,
    quantize: str | None = None,
    out: str | Path | None = None,
    examples: Sequence[str] | None = None,
    meter: Meter | None = None,
) -> Exported:
    """Write a student in a format that runs without dsbs, and compare it with the student. See ``dsbs export``."""
    from dsbs.export.run import export as run

    return run(student, format, quantize=quantize, out=out, examples=examples, meter=meter)


def report(recipe: Recipe, *, out: str | Path | None = None) -> Path:
    """Write the run's ``report.html`` and return its path. See ``dsbs report``."""
    from dsbs.report.page import report as run

    return run(recipe, out=out)


def report_runs(runs: Sequence[str | Path], *, out: str | Path | None = None) -> Path:
    """Write one page that joins several run folders, into ``out`` or ``runs/report-<names>``, and return its path.

    See ``dsbs report``.
    """
    from dsbs.report.page import report_runs as run

    return run(runs, out=out).page


def __getattr__(name: str) -> Any:
    if name == "Student":
        from dsbs.student import Student

        return Student
    raise AttributeError(f"module 'dsbs' has no attribute {name!r}")
