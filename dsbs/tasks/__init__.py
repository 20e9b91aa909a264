"""Tasks: what an input is, what a label is, how text is read as a label, when two labels are the same.

Import what a task needs where it is used; this registry names them without importing them.
"""

from __future__ import annotations

from importlib import import_module

from dsbs.config import TaskSection, unknown
from dsbs.errors import UserError
from dsbs.tasks.base import Task

TASKS = {
    "classification": "dsbs.tasks.classification:Classification",
    "generation": "dsbs.tasks.generation:Generation",
    "svamp": "dsbs.tasks.svamp:Svamp",
    "cqa": "dsbs.tasks.cqa:Cqa",
    "anli": "dsbs.tasks.nli:Anli",
    "esnli": "dsbs.tasks.nli:Esnli",
}


def make_task(section: TaskSection) -> Task:
    """The task that a recipe's ``task`` section names."""
    if section.name not in TASKS:
        raise UserError(unknown("task", section.name, TASKS), hint="set task.name to one of them")
    module, _, name = TASKS[section.name].partition(":")
    task: Task = getattr(import_module(module), name)(section)
    return task
