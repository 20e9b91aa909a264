"""Local teachers: models on this machine that distillation terms compare a student with.

A teacher is a trained student's folder, or is trained first by the same recipe: with the base
method, labels and rows of its student, so that it knows the same prefixes and targets. It is kept,
resumed and set aside like a student, in ``train/teachers/<k>-<size>-<method>-<labels>/``. A teacher
that does not read the student's tokens reads the same texts in its own format.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbs.config import (
    LocalTeacherSection,
    StudentRecipe,
    TrainSection,
    base_of,
)
from dsbs.files import canonical_json, digest, expand_user
from dsbs.records import TrainedStudent
from dsbs.students.card import read_card
from dsbs.students.tokenizer import load_tokenizer, tokenizer_hash
from dsbs.students.weights import load_model, pretrained_arguments, weights_fingerprint
from dsbs.tasks import make_task
from dsbs.training.distillation.own_inputs import OwnInputs, on_own_inputs
from dsbs.training.distillation.teacher_source import (
    TeacherSource,
    check_teacher,
    teacher_section,
    teacher_source,
)
from dsbs.training.distributed import free_memory
from dsbs.training.grid import StudentSpec
from dsbs.training.methods import View

if TYPE_CHECKING:
    from dsbs.training.encode import PackedBatch
    from dsbs.training.packed import ForwardOutput

    TeacherRunner = Callable[[Mapping[str, PackedBatch]], ForwardOutput]

# The third argument: whether it reads the student's tokens.
TrainTeacher = Callable[[StudentRecipe, StudentSpec, bool], TrainedStudent]


@dataclass(slots=True)
class LocalTeacher:
    """A frozen model in evaluation mode, loaded on first use."""

    name: str
    folder: Path
    weight: float
    """Relative to the other teachers'."""
    fingerprint: str
    """Hash of what decides its weights and its inputs."""
    _model: Any = field(default=None, repr=False)
    _vocabulary: int | None = field(default=None, repr=False)
    own_inputs: OwnInputs | None = field(default=None, repr=False)
    """None: it reads the student's tokens."""
    has_several_labels: bool = False
    """Whether its label head gives a row any number of labels (`Task.has_several_labels`)."""

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
    def vocabulary(self) -> int:
        """The number of its vocabulary entries."""
        if self._vocabulary is None:
            from transformers import AutoConfig

            if self._model is not None:
                config = self._model.config
            else:
                config = AutoConfig.from_pretrained(**pretrained_arguments(str(self.folder)))
            self._vocabulary = int(config.vocab_size)
        return self._vocabulary

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
    scores_labels: bool = False,
) -> list[TeacherRunner]:
    """A forward runner for each teacher, on ``device``.

    ``label_ids`` are the label texts in the student's tokens; ``scores_labels``: whether teachers
    with own inputs score the labels.
    """
    return [
        _teacher_runner(
            teacher, views, section, device, hidden_states, label_ids, scores_labels=scores_labels
        )
        for teacher in teachers
    ]


def _teacher_runner(
    teacher: LocalTeacher,
    views: Sequence[View],
    section: TrainSection,
    device: Any,
    hidden_states: bool,
    label_ids: Sequence[Sequence[int]],
    *,
    scores_labels: bool,
) -> TeacherRunner:
    from dsbs.training.packed import ForwardRunner, is_decoder_only
    from dsbs.training.packed.decoder import DecoderRunner
    from dsbs.training.packed.label_head import LabelHeadRunner, has_label_head
    from dsbs.training.packed.t5 import is_t5

    own_inputs = teacher.own_inputs
    first_view = views[0].target
    if own_inputs is not None:
        views = (own_inputs.view,)
        label_ids = own_inputs.label_ids if scores_labels else ()
    model = teacher.model().to(device)
    without_padding = section.padding == "none"
    runner: TeacherRunner
    if has_label_head(model):
        runner = LabelHeadRunner(
            model,
            views,
            without_padding=without_padding,
            hidden_states=hidden_states,
            label_sets=() if teacher.has_several_labels else None,
        )
    else:
        runner_class = DecoderRunner if is_decoder_only(model) else ForwardRunner
        runner = runner_class(
            model,
            views,
            without_padding=without_padding and (is_t5(model) or is_decoder_only(model)),
            hidden_states=hidden_states,
            labels=label_ids,
        )
    return runner if own_inputs is None else on_own_inputs(runner, teacher.fingerprint, first_view)


def add_own_inputs(teachers: Sequence[LocalTeacher], packed: PackedBatch | None) -> None:
    """Put the inputs of teachers that do not read the student's tokens beside its first view's."""
    for teacher in teachers:
        if teacher.own_inputs is not None and packed is not None:
            packed.teacher_inputs[teacher.fingerprint] = teacher.own_inputs.of(packed)


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
        self._sources: dict[int, TeacherSource] = {}
        self.trained: list[TrainedStudent] = []

    def for_student(self, spec: StudentSpec) -> tuple[LocalTeacher, ...]:
        """A student's teachers, trained if need be. Raises UserError for one that does not fit."""
        if not _needs_teacher(self._recipe, spec):
            return ()
        teachers: list[LocalTeacher] = []
        for number, section in enumerate(self._recipe.train.teachers, 1):
            source = self._source(number, section)
            check_teacher(self._recipe, source, spec)
            if section.model:
                teachers.append(self._from_folder(number, section, source))
            else:
                teachers.append(self._trained_first(number, section, source, spec))
        return tuple(teachers)

    def _source(self, number: int, section: LocalTeacherSection) -> TeacherSource:
        if number not in self._sources:
            self._sources[number] = teacher_source(self._recipe, section, self._tokenizer)
        return self._sources[number]

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
            return expand_user(section.model)
        _, teacher = teacher_spec(self._recipe, number, section, spec)
        return teacher.path(self._train_folder)

    def _trained_first(
        self, number: int, section: LocalTeacherSection, source: TeacherSource, spec: StudentSpec
    ) -> LocalTeacher:
        recipe, teacher = teacher_spec(self._recipe, number, section, spec)
        folder = teacher.path(self._train_folder)
        key = (number, folder)
        if key not in self._teachers:
            record = self._train(recipe, teacher, source.difference is None)
            self.trained.append(record)
            self._teachers[key] = LocalTeacher(
                teacher.title,
                folder,
                section.weight,
                record.fingerprint,
                own_inputs=self._own_inputs(folder, source),
                has_several_labels=self._has_several_labels,
            )
        return self._teachers[key]

    def _from_folder(
        self, number: int, section: LocalTeacherSection, source: TeacherSource
    ) -> LocalTeacher:
        folder = Path(str(source.folder))
        key = (number, folder)
        if key not in self._teachers:
            card = read_card(folder)
            fingerprint = digest(*weights_fingerprint(str(folder)))
            own_inputs = self._own_inputs(folder, source)
            if own_inputs is not None:
                tokens = tokenizer_hash(load_tokenizer(str(folder)))
                fingerprint = digest(fingerprint, tokens, card.model_dump_json())
            self._teachers[key] = LocalTeacher(
                card.name,
                folder,
                section.weight,
                fingerprint,
                own_inputs=own_inputs,
                has_several_labels=self._has_several_labels,
            )
        return self._teachers[key]

    @property
    def _has_several_labels(self) -> bool:
        return make_task(self._recipe.task).has_several_labels

    def _own_inputs(self, folder: Path, source: TeacherSource) -> OwnInputs | None:
        if source.difference is None:
            return None
        return OwnInputs(str(folder), read_card(folder), make_task(self._recipe.task).head_labels)


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
    student = teacher_section(recipe, section)
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
