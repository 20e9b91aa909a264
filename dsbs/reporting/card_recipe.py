"""What a student's card has from the recipe: what it reads, where its rows and its weights came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs.config import StudentSection, TaskSection, TrainSection
from dsbs.errors import UserError
from dsbs.reporting.gather import Run
from dsbs.students.gguf import is_gguf
from dsbs.tasks import make_task
from dsbs.tasks.own import OwnDataTask
from dsbs.tasks.templates import fields_of


@dataclass(frozen=True, slots=True)
class Sections:
    """Of a run's recipe what a card speaks of."""

    task: TaskSection
    student: StudentSection
    train: TrainSection
    teacher_kind: str
    teacher_model: str | None
    max_label_tokens: int


def sections(run: Run) -> Sections:
    try:
        return Sections(
            TaskSection.model_validate(run.recipe["task"]),
            StudentSection.model_validate(run.recipe["student"]),
            TrainSection.model_validate(run.recipe["train"]),
            str(run.recipe["teacher"]["kind"]),
            run.recipe["teacher"]["model"] or _members(run),
            int(run.recipe["eval"]["max_label_tokens"]),
        )
    except (KeyError, ValidationError) as error:
        path, said = run.path / "eval" / "manifest.json", str(error).splitlines()[0]
        raise UserError(
            f"{path} holds no recipe of this version ({said})",
            hint="run `dsbs eval` again: predictions that fit are kept",
        ) from None


def _members(run: Run) -> str | None:
    """The models of an ensemble, whose recipe names runs; None: it is none."""
    return " + ".join(one["model"] for one in run.annotated.get("members", ())) or None


def source_of(recipe: Sections, split: str) -> str:
    """Where a split's rows come from: a held-out one from train's."""
    return getattr(recipe.task.data, split) or recipe.task.data.train


def hub_source(source: str) -> tuple[str, str | None, str] | None:
    """Repository, configuration and split of rows from the Hub; None: they come from files."""
    if not source.startswith("hub://"):
        return None
    repository, _, split = source.removeprefix("hub://").rpartition("/")
    repository, _, config = repository.partition(":")
    return (repository, config or None, split) if _is_hub_id(repository) else None


def hub_model(recipe: Sections) -> str | None:
    """The Hub id of the model that training started from; None: a local folder, a GGUF file, or random weights."""
    start = recipe.train.init or recipe.student.model
    return start if start is not None and not is_gguf(start) and _is_hub_id(start) else None


def _is_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).expanduser().exists()


def placeholder(recipe: Sections) -> str | dict[str, Any]:
    """An item for ``Student.predict`` with the columns of the recipe's data, each holding its own name."""
    section = recipe.task
    task = make_task(section)
    if isinstance(task, OwnDataTask):
        if section.input is None:
            return "<text>"
        names = sorted(fields_of(section.input, where="task.input"))
    else:
        names = [name for name in task.inputs if name not in task.optional]
    item: dict[str, Any] = {section.columns.get(name, name): f"<{name}>" for name in names}
    if task.needs_fields:  # a question with its own choices
        item[section.columns.get("choices", "choices")] = ["<first choice>", "<second choice>"]
    return item


def input_text(recipe: Sections) -> str | None:
    """The student's input, without prefix, for ``placeholder``; None where the template does more than place its fields."""
    item, task = placeholder(recipe), make_task(recipe.task)
    try:
        return task.text({"text": item} if isinstance(item, str) else task.fields(item, "card"))
    except UserError:
        return None
