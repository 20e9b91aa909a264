"""Local teachers: trained first by the same recipe, or loaded from a student's folder; all have the student's vocabulary.

One that is trained learns by the base method, the labels and the rows of the student that it teaches, so that it knows the same
prefixes and targets. It is kept, resumed and set aside like a student, in ``train/teachers/<k>-<size>-<method>-<labels>/``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsbs.config import (
    SCRATCH_DEFAULTS,
    LocalTeacherSection,
    Recipe,
    StudentSection,
    TrainSection,
    base_of,
)
from dsbs.errors import UserError
from dsbs.files import canonical_json, digest
from dsbs.records.rows import TrainedStudent
from dsbs.students import load_model, load_tokenizer, read_card, start_hash, tokenizer_hash
from dsbs.training import memory
from dsbs.training.methods import Cell, View, method_of, term_views
from dsbs.training.tune import Job

Train = Callable[[Recipe, Job], TrainedStudent]


@dataclass(slots=True)
class LocalTeacher:
    """A model that terms compare with; it is loaded when it is first asked."""

    name: str
    folder: Path
    weight: float  # relative to the others'
    fingerprint: str  # of all that decides its weights
    _model: Any = field(default=None, repr=False)

    @property
    def said(self) -> dict[str, Any]:
        """What a student's record says of it."""
        return {
            "name": self.name,
            "path": str(self.folder),
            "weight": self.weight,
            "fingerprint": self.fingerprint,
        }

    def model(self) -> Any:
        """Its weights stand still and nothing is dropped out."""
        if self._model is None:
            self._model = load_model(str(self.folder)).eval().requires_grad_(False)
        return self._model

    @property
    def is_loaded(self) -> bool:
        return self._model is not None

    def release(self) -> None:
        """Hold the model no longer: it is loaded anew when it is asked again."""
        self._model = None


class LocalTeachers:
    """The local teachers of a recipe; ``train`` trains one and returns its record."""

    def __init__(self, recipe: Recipe, run: Path, tokenizer: Any, train: Train) -> None:
        self._recipe, self._folder, self._tokenizer, self._train = (
            recipe,
            run / "train" / "teachers",
            tokenizer,
            train,
        )
        self._made: dict[tuple[int, Path], LocalTeacher] = {}
        self.trained: list[TrainedStudent] = []

    def of(self, cell: Cell) -> tuple[LocalTeacher, ...]:
        """A cell's teachers, after those that are to be trained have been. Raises UserError for one that cannot teach it."""
        terms = self._recipe.train.terms_of(cell.method)
        if not any(term.needs_teacher for term in terms):
            return ()
        views = method_of(cell.method).views(self._recipe.train)
        asked = [term for term in terms if term.needs_teacher]
        wanted: set[str] = {view.target for view in views}
        if all(term.kind in ("response", "labels") for term in asked):
            own = [
                term_views(term, views) if term.kind == "response" else [views[0].target]
                for term in asked
            ]
            wanted = {name for names in own for name in names}
        return tuple(
            self._loaded(number, section, [view for view in views if view.target in wanted])
            if section.model
            else self._own(number, section, cell)
            for number, section in enumerate(self._recipe.train.teachers, 1)
        )

    def release(self, later: Sequence[Cell]) -> None:
        """Give back the memory of the models that none of the cells still to come compares with."""
        needed = {
            (
                number,
                Path(section.model).expanduser()
                if section.model
                else self._job(number, section, cell)[1].folder,
            )
            for cell in later
            if any(term.needs_teacher for term in self._recipe.train.terms_of(cell.method))
            for number, section in enumerate(self._recipe.train.teachers, 1)
        }
        held = [
            teacher
            for key, teacher in self._made.items()
            if teacher.is_loaded and key not in needed
        ]
        for teacher in held:
            teacher.release()
        if held:
            memory.free()

    def _job(self, number: int, section: LocalTeacherSection, cell: Cell) -> tuple[Recipe, Job]:
        return teacher_job(self._recipe, number, section, cell, self._folder.parent)

    def _own(self, number: int, section: LocalTeacherSection, cell: Cell) -> LocalTeacher:
        recipe, job = self._job(number, section, cell)
        if (number, job.folder) not in self._made:
            if section.start is not None:
                self._check_vocabulary(section.start, f"train.teachers: start: {section.start}")
            record = self._train(recipe, job)
            self.trained.append(record)
            self._made[number, job.folder] = LocalTeacher(
                job.title, job.folder, section.weight, record.fingerprint
            )
        return self._made[number, job.folder]

    def _loaded(
        self, number: int, section: LocalTeacherSection, views: Sequence[View]
    ) -> LocalTeacher:
        folder = Path(str(section.model)).expanduser()
        card = read_card(folder)
        if (card.kind, card.format) != ("seq2seq", "transformers"):
            raise UserError(
                f"train.teachers: {section.model} is a {card.kind} model in the format {card.format}",
                hint="a local teacher is a T5 as `dsbs train` leaves it",
            )
        for view in views:
            if (
                card.prefixes.get(view.target) != view.prefix
                or card.starts.get(view.target, "pad") != view.start
            ):
                has = ", ".join(
                    f"{name} after {prefix!r}" for name, prefix in card.prefixes.items()
                )
                raise UserError(
                    f"train.teachers: {section.model} never learned the {view.target} after {view.prefix!r} (it has {has})",
                    hint=f"name a student of the method {card.method}'s kind that its pupils learn by, or leave model out: "
                    "then one is trained by this recipe",
                )
        if (number, folder) not in self._made:
            self._check_vocabulary(str(folder), f"train.teachers: {section.model}")
            weights = digest(*start_hash(str(folder)))
            self._made[number, folder] = LocalTeacher(card.name, folder, section.weight, weights)
        return self._made[number, folder]

    def _check_vocabulary(self, source: str, what: str) -> None:
        if tokenizer_hash(load_tokenizer(source)) != tokenizer_hash(self._tokenizer):
            raise UserError(
                f"{what} has another vocabulary than the student",
                hint="its tokens must be the student's: start both from one family of models, train both on the same data from "
                "scratch, or leave model and start out: then one is trained with the student's vocabulary",
            )


def teacher_job(
    recipe: Recipe, number: int, section: LocalTeacherSection, cell: Cell, train: Path
) -> tuple[Recipe, Job]:
    """The recipe and the job that train a cell's ``number``-th teacher (from 1); ``train`` is the run's folder of students.

    Where neither its section nor the recipe sets them, its learning rate and steps are the defaults of its own start, random
    weights or a pretrained model, and not of the student's.
    """
    seed = section.seed if section.seed is not None else recipe.train.seeds[0]
    own = replace(cell, method=base_of(cell.method), seed=seed, learns_votes=False)
    changes = {}
    for key, at_random in SCRATCH_DEFAULTS.items():
        pretrained = TrainSection.model_fields[key].default
        given, ours = getattr(section, key), getattr(recipe.train, key)
        # by value, since a recipe that was written out in full has every key
        is_unset = ours == (at_random if recipe.student.is_scratch else pretrained)
        if given is not None or is_unset:
            changes[key] = (
                given if given is not None else (at_random if section.start is None else pretrained)
            )
    learning = recipe.train.model_copy(
        update={
            "methods": (own.method,), "seeds": (seed,), "terms": (), "teachers": (), "tune": None, "init": None, "lora": None,
            **changes,
        }
    )  # fmt: skip
    student = recipe.student.model_dump() | {
        "model": section.start,
        "init": None,
        "size": section.size,
    }
    taught = recipe.model_copy(update={"train": learning, "student": StudentSection(**student)})
    what = Path(section.start).name if section.start else section.size
    name = f"{number}-{what}-{own.system}"
    return taught, Job(own, learning, train / "teachers" / name, f"teacher {name}", name=name)


def planned_teachers(
    recipe: Recipe, cells: Sequence[Cell], train: Path
) -> list[tuple[Recipe, Job]]:
    """Every teacher that the cells need trained, once each and in the order of their training."""
    found: dict[Path, tuple[Recipe, Job]] = {}
    for cell in cells:
        if any(term.needs_teacher for term in recipe.train.terms_of(cell.method)):
            for number, section in enumerate(recipe.train.teachers, 1):
                if section.model is None:
                    taught, job = teacher_job(recipe, number, section, cell, train)
                    found.setdefault(job.folder, (taught, job))
    return list(found.values())


def teachers_fingerprint(teachers: Sequence[LocalTeacher]) -> str:
    return digest(canonical_json([[teacher.fingerprint, teacher.weight] for teacher in teachers]))
