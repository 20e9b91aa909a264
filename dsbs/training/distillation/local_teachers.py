"""Local teachers: models on this machine that distillation terms compare a student with.

A teacher is a trained student's folder, or is trained first by the same recipe: with the base
method, labels and rows of its student, so that it knows the same prefixes and targets. It is kept,
resumed and set aside like a student, in ``train/teachers/<k>-<size>-<method>-<labels>/``. All
teachers have the student's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbs.config import (
    LocalTeacherSection,
    StudentRecipe,
    StudentSection,
    TrainSection,
    base_of,
)
from dsbs.errors import UserError
from dsbs.files import canonical_json, digest
from dsbs.records import TrainedStudent
from dsbs.students.card import Architecture, Head, architecture_of, head_of, read_card
from dsbs.students.tokenizer import load_tokenizer, tokenizer_hash
from dsbs.students.weights import load_model, weights_fingerprint
from dsbs.tasks import make_task
from dsbs.training.distillation import terms_of
from dsbs.training.distributed import free_memory
from dsbs.training.grid import StudentSpec
from dsbs.training.methods import View, views_of

if TYPE_CHECKING:
    from dsbs.training.encode import PackedBatch
    from dsbs.training.packed import ForwardOutput

    TeacherRunner = Callable[[Mapping[str, PackedBatch]], ForwardOutput]

TrainTeacher = Callable[[StudentRecipe, StudentSpec], TrainedStudent]


@dataclass(slots=True)
class LocalTeacher:
    """A frozen model in evaluation mode, loaded on first use."""

    name: str
    folder: Path
    weight: float
    """Relative to the other teachers'."""
    fingerprint: str
    """Hash of what decides its weights."""
    _model: Any = field(default=None, repr=False)

    @property
    def record(self) -> dict[str, Any]:
        """Its entry in a student's train.json."""
        return {
            "name": self.name,
            "path": str(self.folder),
            "weight": self.weight,
            "fingerprint": self.fingerprint,
        }

    def model(self) -> Any:
        if self._model is None:
            model = load_model(str(self.folder), labels=read_card(self.folder).outputs)
            self._model = model.eval().requires_grad_(False)
        return self._model

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    def release(self) -> None:
        """Drop the model; it is loaded again on its next use."""
        self._model = None


def teacher_runners(
    teachers: Sequence[LocalTeacher],
    views: Sequence[View],
    section: TrainSection,
    device: Any,
    *,
    hidden_states: bool = False,
    label_ids: Sequence[Sequence[int]] = (),
) -> list[TeacherRunner]:
    """A forward runner for each teacher, on ``device``."""
    from dsbs.training.packed import ForwardRunner
    from dsbs.training.packed.label_head import LabelHeadRunner, has_label_head
    from dsbs.training.packed.t5 import is_t5

    runners: list[TeacherRunner] = []
    for teacher in teachers:
        model = teacher.model().to(device)
        if has_label_head(model):
            head_runner = LabelHeadRunner(
                model,
                views,
                without_padding=section.padding == "none",
                hidden_states=hidden_states,
            )
            runners.append(head_runner)
            continue
        without_padding = section.padding == "none" and is_t5(model)
        runner = ForwardRunner(
            model,
            views,
            without_padding=without_padding,
            hidden_states=hidden_states,
            labels=label_ids,
        )
        runners.append(runner)
    return runners


class LocalTeachers:
    """The local teachers of a recipe; ``train`` trains one and returns its record."""

    def __init__(
        self, recipe: StudentRecipe, run: Path, tokenizer: Any, train: TrainTeacher
    ) -> None:
        self._recipe = recipe
        self._train_folder = run / "train"
        self._tokenizer = tokenizer
        self._train = train
        self._teachers: dict[tuple[int, Path], LocalTeacher] = {}
        self.trained: list[TrainedStudent] = []

    @cached_property
    def _head(self) -> Head:
        return head_of(self._recipe.student, self._recipe.train.init)

    @cached_property
    def _kind(self) -> Architecture:
        return architecture_of(self._recipe.train.init or self._recipe.student.source)

    def for_student(self, spec: StudentSpec) -> tuple[LocalTeacher, ...]:
        """A student's teachers, trained if need be. Raises UserError for one that does not fit."""
        terms = [term for term in terms_of(self._recipe.train, spec.method) if term.needs_teacher]
        if not terms:
            return ()
        views = views_of(spec.method, self._recipe.train, self._head)
        needed = {name for term in terms for name in term.teacher_views(views)}
        needed_views = [view for view in views if view.target in needed]
        teachers: list[LocalTeacher] = []
        for number, section in enumerate(self._recipe.train.teachers, 1):
            if section.model:
                teachers.append(self._from_folder(number, section, section.model, needed_views))
            else:
                teachers.append(self._trained_first(number, section, spec))
        return tuple(teachers)

    def release(self, later: Sequence[StudentSpec]) -> None:
        """Free the memory of the teachers that no student in ``later`` needs."""
        needed = {
            (number, self._folder(number, section, spec))
            for spec in later
            if _needs_teacher(self._recipe, spec)
            for number, section in enumerate(self._recipe.train.teachers, 1)
        }
        unneeded = [
            teacher
            for key, teacher in self._teachers.items()
            if teacher.is_loaded and key not in needed
        ]
        for teacher in unneeded:
            teacher.release()
        if unneeded:
            free_memory()

    def _folder(self, number: int, section: LocalTeacherSection, spec: StudentSpec) -> Path:
        if section.model:
            return Path(section.model).expanduser()
        _, teacher = teacher_spec(self._recipe, number, section, spec)
        return teacher.path(self._train_folder)

    def _trained_first(
        self, number: int, section: LocalTeacherSection, spec: StudentSpec
    ) -> LocalTeacher:
        if section.start is None and self._kind == "encoder":
            raise UserError(
                "train.teachers: an encoder's teacher starts from a pretrained one, as it has the "
                "student's vocabulary",
                hint="add start: a larger encoder of the same family, or model: a trained student",
            )
        recipe, teacher = teacher_spec(self._recipe, number, section, spec)
        folder = teacher.path(self._train_folder)
        key = (number, folder)
        if key not in self._teachers:
            if section.start is not None:
                self._check_vocabulary(section.start, f"train.teachers: start: {section.start}")
            record = self._train(recipe, teacher)
            self.trained.append(record)
            self._teachers[key] = LocalTeacher(
                teacher.title, folder, section.weight, record.fingerprint
            )
        return self._teachers[key]

    def _from_folder(
        self, number: int, section: LocalTeacherSection, model: str, views: Sequence[View]
    ) -> LocalTeacher:
        folder = Path(model).expanduser()
        card = read_card(folder)
        if (card.kind, card.format, card.head) != (self._kind, "transformers", self._head):
            raise UserError(
                f"train.teachers: {model} is a {card.kind} model with head {card.head} in the "
                f"format {card.format}",
                hint="a local teacher has its student's architecture and head: here it is a "
                f"{self._kind} model with head {self._head}, as `dsbs train` saves it",
            )
        if self._head == "labels" and card.classes != make_task(self._recipe.task).labels:
            raise UserError(
                f"train.teachers: {model} has other labels, or the same in another order",
                hint="use a teacher that was trained with this recipe's task.labels",
            )
        for view in views:
            prefix = card.prefixes.get(view.target)
            start = card.starts.get(view.target, "pad")
            if (prefix, start) != (view.prefix, view.start):
                learned = ", ".join(
                    f"{target} with prefix {prefix!r}" for target, prefix in card.prefixes.items()
                )
                raise UserError(
                    f"train.teachers: {model} was not trained on the {view.target} with prefix "
                    f"{view.prefix!r} (it was trained on {learned})",
                    hint="use a teacher trained with the same base method as its student "
                    f"(this one: {card.method}), or leave model out to train one by this recipe",
                )
        key = (number, folder)
        if key not in self._teachers:
            self._check_vocabulary(str(folder), f"train.teachers: {model}")
            weights = digest(*weights_fingerprint(str(folder)))
            self._teachers[key] = LocalTeacher(card.name, folder, section.weight, weights)
        return self._teachers[key]

    def _check_vocabulary(self, source: str, setting: str) -> None:
        if tokenizer_hash(load_tokenizer(source)) != tokenizer_hash(self._tokenizer):
            raise UserError(
                f"{setting} has a different vocabulary from the student's",
                hint="start both from the same family of models, train both from scratch on the "
                "same data, or leave model and start out: then a teacher with the student's "
                "vocabulary is trained",
            )


def _needs_teacher(recipe: StudentRecipe, spec: StudentSpec) -> bool:
    return any(term.needs_teacher for term in recipe.train.terms_of(spec.method))


def teacher_spec(
    recipe: StudentRecipe, number: int, section: LocalTeacherSection, spec: StudentSpec
) -> tuple[StudentRecipe, StudentSpec]:
    """The recipe and the spec that train a student's ``number``-th teacher (from 1).

    Where neither its section nor the recipe sets them, its learning rate and steps are the defaults
    of its own start (random weights or a pretrained model), not of the student's.
    """
    seed = recipe.train.seeds[0] if section.seed is None else section.seed
    system = replace(spec, method=base_of(spec.method)).system
    changes: dict[str, Any] = {}
    if section.learning_rate is not None:
        changes["learning_rate"] = section.learning_rate
    if section.max_steps is not None:
        changes |= {"max_steps": section.max_steps, "max_epochs": None}
    train = recipe.train.model_copy(
        update={
            "methods": (base_of(spec.method),),
            "seeds": (seed,),
            "terms": (),
            "teachers": (),
            "tune": None,
            "init": None,
            "lora": None,
            "class_weights": None,
            **changes,
        }
    )
    values = {"model": section.start, "init": None, "size": section.size}
    student = StudentSection(**recipe.student.model_dump() | values)
    teacher_recipe = recipe.model_copy(update={"train": train, "student": student})
    origin = Path(section.start).name if section.start else section.size
    name = f"{number}-{origin}-{system}"
    teacher = StudentSpec(
        base_of(spec.method),
        spec.labels,
        seed,
        train,
        spec.subset,
        alias=name,
        heading=f"teacher {name}",
        directory=f"teachers/{name}",
        student=spec.student,
    )
    return teacher_recipe, teacher


def planned_teachers(
    recipe: StudentRecipe, specs: Sequence[StudentSpec]
) -> list[tuple[StudentRecipe, StudentSpec]]:
    """Every teacher that must be trained for ``specs``, once each, in the order of training."""
    planned: dict[str, tuple[StudentRecipe, StudentSpec]] = {}
    for spec in specs:
        if not _needs_teacher(recipe, spec):
            continue
        for number, section in enumerate(recipe.train.teachers, 1):
            if section.model is None:
                teacher_recipe, teacher = teacher_spec(recipe, number, section, spec)
                planned.setdefault(teacher.name, (teacher_recipe, teacher))
    return list(planned.values())


def teachers_fingerprint(teachers: Sequence[LocalTeacher]) -> str:
    """Hash of all teachers' weights and of their shares."""
    return digest(canonical_json([[teacher.fingerprint, teacher.weight] for teacher in teachers]))
