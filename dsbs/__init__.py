"""Distilling Step-by-Step: train a small student from a large teacher, and compare it fairly.

    recipe = dsbs.load_recipe("recipes/demo.yaml", ["train.max_steps=100"])
    dsbs.annotate(recipe)
    dsbs.train(recipe)
    results = dsbs.evaluate(recipe)
    print({system.name: system.accuracy for system in results.systems})
    student = dsbs.Student.load("runs/demo/train/minilm-step-by-step-gold-s0")
    print(student.predict(["My parcel never came."])[0].label)

Every name is imported when it is first used: ``import dsbs`` loads nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsbs.annotation.run import annotate
    from dsbs.compression.run import compress
    from dsbs.config.load import load_recipe
    from dsbs.errors import DsbsError, PartialError, UserError
    from dsbs.evaluation.run import evaluate
    from dsbs.exporting.run import export
    from dsbs.importing.run import ImportOptions, import_log
    from dsbs.project.validate import validate
    from dsbs.reporting.run import report, report_runs
    from dsbs.students.student import Student
    from dsbs.training.run import train

__version__ = "0.2.0"
__all__ = [
    "DsbsError",
    "ImportOptions",
    "PartialError",
    "Student",
    "UserError",
    "annotate",
    "compress",
    "evaluate",
    "export",
    "import_log",
    "load_recipe",
    "report",
    "report_runs",
    "train",
    "validate",
]
_MODULES = {
    "DsbsError": "dsbs.errors",
    "ImportOptions": "dsbs.importing.run",
    "PartialError": "dsbs.errors",
    "Student": "dsbs.students.student",
    "UserError": "dsbs.errors",
    "annotate": "dsbs.annotation.run",
    "compress": "dsbs.compression.run",
    "evaluate": "dsbs.evaluation.run",
    "export": "dsbs.exporting.run",
    "import_log": "dsbs.importing.run",
    "load_recipe": "dsbs.config.load",
    "report": "dsbs.reporting.run",
    "report_runs": "dsbs.reporting.run",
    "train": "dsbs.training.run",
    "validate": "dsbs.project.validate",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'dsbs' has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
