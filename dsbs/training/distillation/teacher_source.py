"""Sources of local teachers: whether a teacher fits its student, from cards and tokenizer files.

Nothing is loaded or trained here, so that a recipe is refused before any work is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.config import LocalTeacherSection, StudentRecipe, StudentSection
from dsbs.errors import UserError
from dsbs.files import expand_user
from dsbs.students.card import (
    Head,
    StudentCard,
    architecture_of,
    check_student,
    head_of,
    read_card,
)
from dsbs.students.formats import new_input_format
from dsbs.students.tokenizer import load_tokenizer, tokenizer_hash
from dsbs.tasks import Task, make_task
from dsbs.training.distillation import Term, terms_of
from dsbs.training.grid import StudentSpec
from dsbs.training.methods import views_of


@dataclass(frozen=True, slots=True)
class TeacherSource:
    """Where a local teacher comes from."""

    setting: str
    """Its entry in the recipe, for messages."""
    folder: Path | None
    """A trained student's folder. None: the teacher is trained first."""
    card: StudentCard | None
    difference: str | None
    """Why it does not read and write the student's tokens, e.g. "has a different vocabulary". None:
    it does."""
    head: Head = "text"


def teacher_section(recipe: StudentRecipe, section: LocalTeacherSection) -> StudentSection:
    """The student section that a teacher is trained from."""
    values: dict[str, Any] = {"model": section.start, "init": None, "size": section.size}
    student = recipe.student
    if section.start is not None and (student.template != "auto" or student.head == "text"):
        architecture = architecture_of(section.start)
        if architecture != "causal":
            values["template"] = "auto"
        if architecture == "encoder":
            values["head"] = "auto"
    return StudentSection(**student.model_dump() | values)


def teacher_source(
    recipe: StudentRecipe, section: LocalTeacherSection, tokenizer: Any
) -> TeacherSource:
    """A teacher compared with its student, whose tokenizer may not be known yet (None).

    Raises UserError for a folder that cannot teach.
    """
    student_kind = architecture_of(recipe.train.init or recipe.student.source)
    student_head = head_of(recipe.student, recipe.train.init)
    card: StudentCard | None = None
    folder: Path | None = None
    if section.model:
        setting = f"train.teachers: {section.model}"
        folder = expand_user(section.model)
        card = read_card(folder)
        if card.format != "transformers":
            raise UserError(
                f"{setting} is an export in the format {card.format}",
                hint="use the student that it was exported from, as `dsbs train` saved it",
            )
        kind = card.kind
        head = card.head
    elif section.start:
        setting = f"train.teachers: start: {section.start}"
        kind = architecture_of(section.start)
        head = head_of(teacher_section(recipe, section))
    elif student_kind == "seq2seq":
        return TeacherSource("train.teachers", None, None, None)
    else:
        raise UserError(
            "train.teachers: a teacher from scratch is a T5, and the student is "
            f"{_A_MODEL[student_kind]}",
            hint="add start: a larger model of the student's family, or model: a trained student",
        )
    difference = None
    if kind != student_kind:
        difference = f"is {_A_MODEL[kind]}, and the student {_A_MODEL[student_kind]}"
    elif head != student_head:
        difference = f"has head {head}, and the student {student_head}"
    elif tokenizer is not None:
        teacher_tokenizer = load_tokenizer(str(folder or section.start))
        if tokenizer_hash(teacher_tokenizer) != tokenizer_hash(tokenizer):
            difference = (
                "has a different vocabulary from the student's "
                f"({len(teacher_tokenizer):,} and {len(tokenizer):,} entries)"
            )
        elif card is not None:
            template = new_input_format(recipe.student, tokenizer, recipe.train.init).template
            if card.template != template:
                difference = f"has the template {card.template}, and the student {template}"
    return TeacherSource(setting, folder, card, difference, head)


_A_MODEL = {
    "seq2seq": "an encoder-decoder",
    "causal": "a decoder-only model",
    "encoder": "an encoder",
}


def check_teachers(
    recipe: StudentRecipe, task: Task, specs: Sequence[StudentSpec], tokenizer: Any
) -> None:
    """Raises UserError for a local teacher that does not fit; the student's tokenizer may be None:
    not known yet.
    """
    methods = {spec.method: spec for spec in specs}
    for section in recipe.train.teachers:
        source = teacher_source(recipe, section, tokenizer)
        for spec in methods.values():
            check_teacher(recipe, source, spec)
        if section.start:
            train = recipe.train.model_copy(update={"terms": ()})
            student = teacher_section(recipe, section)
            check_student(recipe.model_copy(update={"train": train, "student": student}), task)


def check_teacher(recipe: StudentRecipe, source: TeacherSource, spec: StudentSpec) -> None:
    """Raises UserError for a teacher from which a student of ``spec`` cannot learn its terms."""
    card = source.card
    terms = [term for term in terms_of(recipe.train, spec.method) if term.needs_teacher]
    if not terms:
        return
    task = make_task(recipe.task)
    is_head = card is not None and card.head == "labels"
    if card is not None and is_head and card.classes != task.head_labels:
        raise UserError(
            f"{source.setting} has other labels, or the same in another order",
            hint="use a teacher that was trained with this recipe's task.labels",
        )
    has_several = card is not None and make_task(card.task).has_several_labels
    if card is not None and is_head and has_several != task.has_several_labels:
        raise UserError(
            f"{source.setting} was trained for {card.task.name}, and this task is {task.name}",
            hint="use a teacher that was trained for this recipe's task",
        )
    if source.difference is not None:
        for term in terms:
            _check_own_inputs(recipe, task, source, term)
    elif card is not None:
        _check_prefixes(recipe, source, card, terms, spec)


def _check_own_inputs(recipe: StudentRecipe, task: Task, source: TeacherSource, term: Term) -> None:
    """Raises UserError where a teacher that reads other tokens cannot serve a term."""
    head = head_of(recipe.student, recipe.train.init)
    if head == "text" and term.compares_tokens:
        raise UserError(
            f"train.terms: {term.title} compares the distributions at every written token, and "
            f"{source.setting} {source.difference}",
            hint="use {kind: labels, source: teachers}, feature or relation, which do not compare "
            "tokens; or a teacher of the student's own family. Losses across vocabularies, and on "
            "texts that the student samples, are in trl (GOLDTrainer, GKDTrainer)",
        )
    scores_labels = term.needs_label_scores or (head == "labels" and term.compares_tokens)
    card = source.card
    if scores_labels and source.head == "text" and task.has_several_labels:
        raise UserError(
            f"train.terms: {term.title} compares the probability of each label, and "
            f"{source.setting} writes the labels of a row as one text",
            hint="use a teacher with student.head: labels, or feature or relation, which compare "
            "states",
        )
    if scores_labels and card is not None and card.head == "text" and not card.writes_label_alone:
        raise UserError(
            f"train.terms: {term.title} compares distributions over the labels, and "
            f"{source.setting} writes its label beside a rationale",
            hint="use a teacher that was trained with finetune, distill or step-by-step",
        )


def _check_prefixes(
    recipe: StudentRecipe,
    source: TeacherSource,
    card: StudentCard,
    terms: Sequence[Term],
    spec: StudentSpec,
) -> None:
    """Raises UserError where a teacher never saw the student's prefixes."""
    head = head_of(recipe.student, recipe.train.init)
    views = views_of(spec.method, recipe.train, head)
    needed = {name for term in terms for name in term.teacher_views(views)}
    if head == "labels":  # no term compares rationales
        needed = {"label"}
    for view in views:
        if view.target not in needed:
            continue
        prefix = card.prefixes.get(view.target)
        start = card.starts.get(view.target, "pad")
        if (prefix, start) != (view.prefix, view.start):
            learned = ", ".join(
                f"{target} with prefix {prefix!r}" for target, prefix in card.prefixes.items()
            )
            raise UserError(
                f"{source.setting} was not trained on the {view.target} with prefix "
                f"{view.prefix!r} (it was trained on {learned})",
                hint="use a teacher trained with the same base method as its student "
                f"(this one: {card.method}), or leave model out to train one by this recipe",
            )
