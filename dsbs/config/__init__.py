"""The recipe: one YAML file is one experiment, and every command reads its own sections of the same file.

Precedence: defaults < recipe < ``key=value`` overrides. A recipe is closed (unknown keys are mistakes) and frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from dsbs.config.evaluate import EvalSection, ReportSection
from dsbs.config.registry import METHODS
from dsbs.config.sections import LabelSource, Section, unknown
from dsbs.config.student import StudentSection
from dsbs.config.task import DataSection, TaskSection
from dsbs.config.teacher import (
    AnnotateSection,
    EndpointSection,
    MemberSection,
    PriceSection,
    TeacherSection,
)
from dsbs.config.terms import LocalTeacherSection, TermSettings, base_of
from dsbs.config.train import LoraSection, SelectSection, TrainSection
from dsbs.files import canonical_json, digest

__all__ = [
    "AnnotateSection",
    "DataSection",
    "EndpointSection",
    "EvalSection",
    "LabelSource",
    "LocalTeacherSection",
    "LoraSection",
    "MemberSection",
    "PriceSection",
    "Recipe",
    "ReportSection",
    "Section",
    "SelectSection",
    "StudentSection",
    "TaskSection",
    "TeacherSection",
    "TermSettings",
    "TrainSection",
    "base_of",
    "unknown",
]

# Where the student starts from random weights; the section's own defaults are the paper's, for pretrained ones.
SCRATCH_DEFAULTS = {"learning_rate": 1.0e-3, "max_steps": 1000}


class Recipe(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
    )  # of the run folder; default: the file's name
    task: TaskSection  # what is to be learned, and where its rows are
    teacher: (
        TeacherSection  # the large model that is asked, or the name of a file with this section
    )
    annotate: AnnotateSection = AnnotateSection()  # how the teacher is asked
    student: StudentSection = StudentSection()  # the small model before it is trained
    train: TrainSection = TrainSection()  # methods, their objective, and how they are trained
    eval: EvalSection = EvalSection()  # what is compared, and with what
    report: ReportSection = ReportSection()  # what is shown

    _folder: Path | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Sections left empty are defaults; a student without pretraining learns faster and for less long."""
        if not isinstance(data, dict):
            return data
        data = {
            name: value
            for name, value in data.items()
            if value is not None or name in ("name", "task", "teacher")
        }
        student, train = data.get("student", {}), data.get("train", {})
        model = (
            student.get("model") if isinstance(student, dict) else getattr(student, "model", None)
        )
        if not model and isinstance(train, dict):
            data["train"] = SCRATCH_DEFAULTS | train
        elif not model and isinstance(train, TrainSection):
            unset = {
                key: value
                for key, value in SCRATCH_DEFAULTS.items()
                if key not in train.model_fields_set
            }
            data["train"] = train.model_copy(update=unset)
        return data

    @model_validator(mode="after")
    def _adapters_have_something_to_adapt(self) -> Recipe:
        if self.train.lora and self.student.is_scratch and not self.train.init:
            raise ValueError(
                "train.lora adapts weights that know something, and a student from scratch has random ones; "
                "name a student.model or train.init, or leave train.lora out"
            )
        return self

    @model_validator(mode="after")
    def _baselines_are_there(self) -> Recipe:
        known = (*METHODS, *self.eval.predictions)
        for name in self.eval.baseline:
            if name in known:
                continue
            if base_of(name) not in METHODS:
                raise ValueError("eval.baseline: " + unknown("method", name, known))
            try:
                self.train.check_method(name)
            except ValueError as error:
                raise ValueError(f"eval.baseline: {error}") from None
        return self

    @property
    def training(self) -> str:
        """Hash of all that decides a student apart from its data, its method with its terms, and its seed."""
        apart = {
            "methods",
            "labels",
            "seeds",
            "subset",
            "log_every",
            "select",
            "micro_batch_size",
            "gradient_checkpointing",
            "padding",
            *(
                "terms",
                "teachers",
                "ensemble",
            ),  # of those methods alone that name them: see training_of
        }
        # what tuning decides is not the recipe's own any more
        apart |= (
            {"tune"}
            if self.train.tune is None
            else {name for name, values in self.train.tune if values is not None}
        )
        if (
            self.train.loss_mean == "micro"
        ):  # elsewhere the objective is the same however a step is cut
            apart.discard("micro_batch_size")
        return digest(
            canonical_json(self.train.model_dump(mode="json", exclude=apart)),
            canonical_json(self.student.settings),
            str(self.eval.max_label_tokens),  # of the looks at valid that choose the best step
        )

    def training_of(self, method: str) -> str:
        """``training`` and the terms that this method names: another method's terms decide nothing."""
        terms = self.train.terms_of(method)
        if not terms:
            return self.training
        parts = [canonical_json([term.model_dump(mode="json") for term in terms])]
        if any(term.is_of_one_pass for term in terms):
            parts.append(str(self.train.micro_batch_size))
        if any(term.needs_teacher for term in terms):
            parts += [
                canonical_json(
                    [teacher.model_dump(mode="json") for teacher in self.train.teachers]
                ),
                self.train.ensemble,
            ]
        return digest(self.training, *parts)

    @property
    def folder(self) -> Path | None:
        """The folder of the recipe's file: its relative paths are looked for there too. None for a recipe made in code."""
        return self._folder

    @model_validator(mode="after")
    def _task_is_complete(self) -> Recipe:
        task = self.task
        if task.name == "classification" and task.labels is None:
            raise ValueError(
                "task.labels is needed for classification, e.g. labels: [billing, shipping]"
            )
        if task.name != "classification" and task.labels is not None:
            raise ValueError(
                f"task.labels belongs to classification; the labels of {task.name} are fixed or free"
            )
        if task.name not in ("classification", "generation") and task.input is not None:
            raise ValueError(
                f"task.input belongs to classification and generation; {task.name} has its own input"
            )
        if task.numeric and task.name != "generation":
            raise ValueError("task.numeric belongs to generation")
        return self
