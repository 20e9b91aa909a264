"""Recipe: the whole file, and its sections ``eval`` and ``report``."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from dsbs.config.cascade import CascadeSection
from dsbs.config.registry import FLOORS, METHODS
from dsbs.config.sections import Section, as_tuple, folder_in, unknown
from dsbs.config.student import NamedStudentSection, Students, StudentSection
from dsbs.config.task import TaskSection
from dsbs.config.teacher import AnnotateSection, TeacherSection
from dsbs.config.terms import base_of
from dsbs.config.train import ResolvedTrainSection, TrainSection
from dsbs.files import FILE_NAME, canonical_json, check_file_name, digest

Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]


class EvalSection(Section):
    """The systems to compare, and how."""

    split: Literal["valid", "test"] = "test"
    """The rows that systems are compared on."""
    batch_size: int = Field(64, gt=0)
    """Rows decoded together."""
    max_label_tokens: int = Field(64, gt=0)
    """Maximum tokens generated for a label."""
    baseline: Annotated[tuple[str, ...], BeforeValidator(as_tuple)] = ("finetune", "distill")
    """Methods, or names in ``predictions``, that every system is compared with, on the same share
    of the train rows."""
    cluster: str | None = None
    """An input field. Rows with equal values are resampled together. None: every row by itself."""
    rationales: bool = False
    """Also decode and measure the rationales of students that learned them."""
    latency_calls: int = Field(50, ge=0)
    """Maximum timed calls at batch size 1 and at 64, for each system's first student. 0: no timing.
    """
    floors: Annotated[tuple[str, ...] | None, BeforeValidator(as_tuple)] = None
    """Cheap systems that a student should beat: majority (the most frequent label), tfidf (logistic
    regression on words and characters; ridge for scores, the nearest row for fields),
    ``tfidf-FIELD`` (on one input field, as tfidf-hypothesis) and untrained (the pretrained
    student's answer before training). None: majority and tfidf where the task has a closed set of
    labels, or fields, and they take less than a minute."""
    score_labels: bool = False
    """Also score every label of a closed set with students that write their label, so that they
    have a distribution over the labels. An unreadable label becomes the most likely one."""
    label_precision: float | None = Field(None, gt=0, le=1)
    """multilabel with a label head: the precision that each label must reach on valid. None:
    the probability with the highest F1 on valid. A student is not trained again for it."""
    cascade: CascadeSection | None = None
    """A student in front of its teacher, on test rows (``split: test``). None: no threshold is
    chosen; {}: with its defaults."""
    predictions: dict[str, str] = {}
    """External systems: a name for each file of id and prediction (.jsonl, .csv, .tsv,
    .parquet)."""

    @field_validator("predictions")
    @classmethod
    def _names_are_file_names(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value:
            check_file_name(name)
            if name == "teacher":
                raise ValueError("teacher: this name is the recipe's own teacher")
        return value

    @field_validator("floors")
    @classmethod
    def _known_floors(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in value or ():
            if name not in FLOORS and name.partition("-")[0] not in FLOORS:
                raise ValueError(unknown("floor", name, FLOORS))
            check_file_name(name)
        if value is not None and len(set(value)) < len(value):
            raise ValueError("a floor is given twice")
        return value

    @model_validator(mode="after")
    def _names_differ(self) -> EvalSection:
        for name in self.floors or ():
            if name in self.predictions:
                raise ValueError(
                    f"{name} is both in eval.floors and eval.predictions: rename the predictions"
                )
        return self


class ReportSection(Section):
    """Additional outputs."""

    trackers: Annotated[tuple[Tracker, ...], BeforeValidator(as_tuple)] = ()
    """Where training curves go besides metrics.jsonl. tensorboard writes event files beside every
    student. mlflow, wandb and trackio get one run per student from transformers, and are set up by
    their own environment variables (MLFLOW_TRACKING_URI, WANDB_MODE, …). Each needs its package."""
    tensorboard_samples: int = Field(4, ge=0)
    """Validation rows whose predictions TensorBoard shows at every validation. 0: none."""
    tensorboard_graph: bool = False
    """Also write the graph of the student's model for TensorBoard."""

    @model_validator(mode="after")
    def _graph_needs_tensorboard(self) -> ReportSection:
        if self.tensorboard_graph and "tensorboard" not in self.trackers:
            raise ValueError(
                "report.tensorboard_graph is for TensorBoard; set report.trackers: [tensorboard] "
                "as well"
            )
        return self


# Keys of `train` that do not change a student's weights, or that `training` and `training_of` add
# where they do.
_TRAIN_KEYS_WITHOUT_EFFECT = {
    "methods",
    "labels",
    "seeds",
    "subset",
    "log_every",
    "select",  # counts by the annotations' source
    "micro_batch_size",  # unless loss_mean is micro, or a term relates the rows of one pass
    "gradient_checkpointing",
    "padding",
    "terms",  # for the methods that name them
    "teachers",
    "ensemble",
}


_NEW_TUNE_KEYS = ("max_epochs", "rationale_weight")  # students from before them have no such keys


class Recipe(Section):
    """One experiment: one YAML file, of which every command reads its own sections."""

    name: str = Field(pattern=f"^{FILE_NAME}$")
    """The name of the run folder. Default: the file's name."""
    task: TaskSection
    """The task to learn, and its data."""
    teacher: TeacherSection
    """The large model that annotates, or the name of a file with this section."""
    annotate: AnnotateSection = AnnotateSection()
    """How the teacher is called."""
    student: Students = StudentSection()
    """The small model before training; or several, as a mapping of names to sections."""
    train: TrainSection = TrainSection()
    """The methods, their loss, and the training settings."""
    eval: EvalSection = EvalSection()
    """The systems to compare, and how."""
    report: ReportSection = ReportSection()
    """Additional outputs."""

    _folder: Path | None = PrivateAttr(None)

    def model_post_init(self, context: Any) -> None:
        self._folder = folder_in(context)

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, value: str) -> str:
        check_file_name(value)
        return value

    @model_validator(mode="before")
    @classmethod
    def _empty_sections_are_defaults(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        required = ("name", "task", "teacher")
        return {
            name: value for name, value in data.items() if value is not None or name in required
        }

    @model_validator(mode="after")
    def _students_can_be_trained(self) -> Recipe:
        if isinstance(self.student, StudentSection):
            _check_lora(self.student, self.train)
            return self
        problems = []
        for name, section in self.student.items():
            checks = {
                ("student", name): partial(_check_name, name, self.student),
                ("student", name, "train"): partial(self._check_train, section),
            }
            for path, check in checks.items():
                try:
                    check()
                except ValueError as error:
                    problems.append(_problem(error, path))
        if problems:
            raise ValidationError.from_exception_data("Recipe", problems)
        return self

    def _check_train(self, section: NamedStudentSection) -> None:
        """Raises ValueError where a student's settings do not fit those of ``train``."""
        train = self.train.with_settings_of(section.train)
        try:
            TrainSection.model_validate(dict(train))
        except ValidationError as error:
            raise ValueError(_first_message(error)) from None
        _check_lora(section, train)

    @model_validator(mode="after")
    def _score_vote_needs_a_scale(self) -> Recipe:
        if self.annotate.score_vote != "median" and self.task.range is None:
            raise ValueError(f"annotate.score_vote belongs to score, not to {self.task.name}")
        return self

    @model_validator(mode="after")
    def _baselines_exist(self) -> Recipe:
        names = (*METHODS, *self.eval.predictions)
        for name in self.eval.baseline:
            if name in names:
                continue
            if base_of(name) not in METHODS:
                raise ValueError("eval.baseline: " + unknown("method", name, names))
            try:
                self.train.check_method(name)
            except ValueError as error:
                raise ValueError(f"eval.baseline: {error}") from None
        return self

    @property
    def folder(self) -> Path | None:
        """The folder of the recipe's file, where relative paths are found too. None for a recipe
        made in code.
        """
        return self._folder

    @property
    def students(self) -> dict[str | None, StudentRecipe]:
        """This recipe for each of its students, by name; the name is None for a single section."""
        if isinstance(self.student, StudentSection):
            return {None: self._for_student(None, self.student, self.train)}
        return {
            name: self._for_student(
                name, section.section, self.train.with_settings_of(section.train)
            )
            for name, section in self.student.items()
        }

    def _for_student(
        self, name: str | None, section: StudentSection, train: TrainSection
    ) -> StudentRecipe:
        values = dict(self) | {"student": section, "train": train}
        recipe = StudentRecipe.model_construct(**values)
        recipe._folder = self._folder
        recipe._student_name = name
        return recipe


class StudentRecipe(Recipe):
    """A recipe with one student, and the train section as this student is trained."""

    student: StudentSection = StudentSection()
    """The small model before training."""

    _student_name: str | None = PrivateAttr(None)

    @property
    def student_name(self) -> str | None:
        """The student's name in the recipe. None: it is the only one, without a name."""
        return self._student_name

    @property
    def students(self) -> dict[str | None, StudentRecipe]:
        return {self._student_name: self}

    @property
    def resolved_train(self) -> ResolvedTrainSection:
        """The train section with the defaults that depend on the student filled in."""
        return self.train.resolved(is_scratch=self.student.is_scratch)

    @property
    def training(self) -> str:
        """Hash of everything that decides a student except its data, its method with its terms, and
        its seed.
        """
        exclude: dict[str, Any] = dict.fromkeys(_TRAIN_KEYS_WITHOUT_EFFECT, True)
        tune = self.train.tune
        if tune is None:
            exclude["tune"] = True
        else:  # tuning replaces the recipe's own values
            exclude |= {name: True for name, values in tune if values is not None}
            exclude["tune"] = {name for name in _NEW_TUNE_KEYS if getattr(tune, name) is None}
        if self.train.loss_mean == "micro":
            del exclude["micro_batch_size"]
        # None follows from other keys, or is what students had before the key existed.
        new = ("head_learning_rate", "class_weights", "max_epochs")
        exclude |= {name: True for name in new if getattr(self.train, name) is None}
        if self.train.counts_epochs:
            exclude["max_steps"] = True
        return digest(
            canonical_json(self.resolved_train.model_dump(mode="json", exclude=exclude)),
            canonical_json(self.student.settings),
            str(
                self.eval.max_label_tokens
            ),  # validation, which chooses the best step, decodes labels
        )

    def training_of(self, method: str) -> str:
        """``training`` and the terms that ``method`` names; other methods' terms do not count."""
        terms = self.train.terms_of(method)
        if not terms:
            return self.training
        settings = [canonical_json([term.model_dump(mode="json") for term in terms])]
        if any(term.is_of_one_pass for term in terms):
            settings.append(str(self.train.micro_batch_size))
        if any(term.needs_teacher for term in terms):
            teachers = [teacher.model_dump(mode="json") for teacher in self.train.teachers]
            settings += [canonical_json(teachers), self.train.ensemble]
        return digest(self.training, *settings)


# --- checks


def _check_lora(student: StudentSection, train: TrainSection) -> None:
    if train.lora and student.is_scratch and not train.init:
        raise ValueError(
            "train.lora adapts pretrained weights, and a student from scratch has random ones; "
            "set student.model or train.init, or leave train.lora out"
        )


def _check_name(name: str, names: Iterable[str]) -> None:
    """Raises ValueError for a student's name that makes no names of folders of its own."""
    check_file_name(name)
    for other in names:
        if other != name and other.casefold() == name.casefold():
            raise ValueError(
                f"{name} and {other} differ only in case, and some file systems ignore case"
            )


def _problem(error: ValueError, path: tuple[str, ...]) -> InitErrorDetails:
    kind = PydanticCustomError("value_error", "{message}", {"message": str(error)})
    return InitErrorDetails(type=kind, loc=path, input=None)


def _first_message(error: ValidationError) -> str:
    return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
