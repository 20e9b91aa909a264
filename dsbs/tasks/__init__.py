"""Tasks: inputs and labels, how labels are parsed from text, and when two labels are equal."""

from __future__ import annotations

from dsbs.config import TaskSection, unknown
from dsbs.config.registry import TASKS, entry
from dsbs.errors import UserError
from dsbs.tasks.base import Task


def make_task(section: TaskSection) -> Task:
    """The task that a recipe's ``task`` section names."""
    if section.name not in TASKS:
        raise UserError(unknown("task", section.name, TASKS), hint="set task.name to one of them")
    task: Task = entry(TASKS, section.name)(section)
    return task
