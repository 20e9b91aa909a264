"""Training set: one student's views, terms, and rows as token ids; and whether a recipe's students
can learn what it asks for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

from dsbs.config import Recipe, StudentRecipe, unknown
from dsbs.errors import UserError
from dsbs.files import canonical_json, digest
from dsbs.formatting import count
from dsbs.records.subsets import rows_per_label
from dsbs.students.card import check_student, head_of, input_limit
from dsbs.students.tokenizer import tokenizer_hash
from dsbs.students.weights import weights_fingerprint
from dsbs.tasks import Task, make_task
from dsbs.training.distillation import check_terms, terms_of
from dsbs.training.distillation.local_teachers import LocalTeacher, teachers_fingerprint
from dsbs.training.encode import Encoder, encoded_hash, soft_labels_hash
from dsbs.training.grid import StudentSpec, grid
from dsbs.training.methods import View, views_of
from dsbs.training.rows import Data, label_texts
from dsbs.training.tokens import Tokens


class TrainingSet:
    """What the student of ``spec`` learns from."""

    def __init__(
        self,
        recipe: StudentRecipe,
        spec: StudentSpec,
        data: Data,
        tokens: Tokens,
        teachers: Sequence[LocalTeacher] = (),
    ) -> None:
        task = make_task(recipe.task)
        self._spec = spec
        self._start = recipe.train.init or recipe.student.source
        self._teachers = teachers
        self.head = head_of(recipe.student, recipe.train.init)
        self.scores_choices = self.head == "labels" and task.has_choices
        self.reads_windows = recipe.task.max_input.strategy == "windows"
        self.classes: tuple[str, ...] = ()
        if self.head == "labels":
            self.classes = task.head_labels
        self.views: tuple[View, ...] = views_of(spec.method, spec.section, self.head)
        self.terms = terms_of(spec.section, spec.method)
        self.max_input_tokens = input_limit(recipe.student, recipe.train.init)
        self.max_target_tokens = recipe.student.max_target_tokens
        rows = data.subset(spec.subset)
        targets = self.classes
        self.label_sets: list[tuple[int, ...]] | None = None
        if self.classes and task.has_several_labels:
            targets = label_texts((rows, spec.labels), (data.valid, data.valid_labels))
            self.label_sets = [task.head_targets(label) for label in targets]
        encoder = Encoder(
            tokens,
            self.max_input_tokens,
            self.max_target_tokens,
            targets,
            scores_choices=self.scores_choices,
            reads_windows=self.reads_windows,
        )
        self.rows = encoder.rows(rows, self.views, spec.labels)
        self.valid = encoder.rows(data.valid, self.views[:1], data.valid_labels)
        self.soft_labels = {}
        if spec.learns_votes:
            self.soft_labels = encoder.soft_labels(rows, self.views[0], spec.labels)
        own_inputs = [teacher.own_inputs for teacher in teachers if teacher.own_inputs is not None]
        if own_inputs:
            labeled = [row for row in rows if row.label(spec.labels) is not None]
            keys = encoder.input_keys(labeled, self.views[0])
            for teacher_inputs in own_inputs:
                teacher_inputs.add(keys, [row.text for row in labeled])
        self.label_ids: list[list[int]] = []
        if self.head == "text" and any(term.needs_label_scores for term in self.terms):
            self.label_ids = encoder.texts(task.labels or ())

    @property
    def outputs(self) -> int:
        """The outputs of a label head: one for each label, or one for a choice. 0: it has none."""
        return 1 if self.scores_choices else len(self.classes)

    @property
    def learns_rationales(self) -> bool:
        return any(view.target == "rationale" for view in self.views)

    @cached_property
    def class_weights(self) -> tuple[float, ...]:
        """The weight of each class in the label loss; empty: all have 1.

        Of several labels, that of the rows with the label against those without it.
        """
        setting = self._spec.section.class_weights
        if setting is None:
            return ()
        if isinstance(setting, dict):
            return tuple(setting.get(label, 1.0) for label in self.classes)
        counts = Counter(int(row["label"][0][1][0]) for row in self.rows if "label" in row)
        rows = counts.total()
        if self.label_sets is not None:
            with_label = [
                sum(number * self.label_sets[index][label] for index, number in counts.items())
                for label in range(len(self.classes))
            ]
            return tuple((rows - number) / number if number else 1.0 for number in with_label)
        return tuple(
            rows / (len(self.classes) * counts[index]) if counts[index] else 1.0
            for index in range(len(self.classes))
        )

    def fingerprint(self, training: str, tokenizer: Any) -> str:
        """Hash of all that decides the student's weights: equal fingerprint, equal student.

        ``training`` is the hash of the settings.
        """
        parts = [
            training,
            canonical_json(self._spec.identity),
            canonical_json([_view_fields(view) for view in self.views]),
            tokenizer_hash(tokenizer),
            encoded_hash(self.rows),
            encoded_hash(self.valid),
            *weights_fingerprint(self._start),
        ]
        if self._teachers:
            parts.append(teachers_fingerprint(self._teachers))
        if self.soft_labels:
            parts.append(soft_labels_hash(self.soft_labels))
        if self.classes:  # the rows have their indices alone
            parts.append(canonical_json([self.classes, self.label_sets]))
        return digest(*parts)


def checked_students(
    recipe: Recipe, task: Task
) -> Iterator[tuple[StudentRecipe, list[StudentSpec]]]:
    """The recipe of each of its students, and what is to be trained of it.

    Raises UserError, which names the student if it has a name, for settings that do not apply.
    """
    for name, student in recipe.students.items():
        specs = grid(student.train, name)
        try:
            check_student(student, task)
            head = head_of(student.student, student.train.init)
            check_terms(student.train, task, specs, head)
            check_class_weights(student, task.head_labels)
            check_label_precision(student, task)
        except UserError as error:
            if name is None:
                raise
            raise UserError(f"student {name}: {error.problem}", hint=error.hint) from None
        yield student, specs


def check_label_precision(recipe: StudentRecipe, task: Task) -> None:
    """Raises UserError where ``eval.label_precision`` is set and a row has one label."""
    if recipe.eval.label_precision is not None and not task.has_several_labels:
        raise UserError(
            "eval.label_precision is for label heads that give a row several labels (multilabel); "
            f"a row of {task.name} has one",
            hint="remove eval.label_precision",
        )


def check_class_weights(recipe: StudentRecipe, labels: Sequence[str]) -> None:
    """Raises UserError where ``train.class_weights`` does not apply or names an unknown label."""
    setting = recipe.train.class_weights
    if setting is None:
        return
    if head_of(recipe.student, recipe.train.init) != "labels":
        raise UserError(
            "train.class_weights is for label heads: a label that is written as text has a loss "
            "for each of its tokens",
            hint="use student.head: labels, or remove train.class_weights",
        )
    if not labels:
        raise UserError(
            f"train.class_weights needs a closed set of labels, and the choices of "
            f"{recipe.task.name} differ between rows",
            hint="remove train.class_weights",
        )
    for label in setting if isinstance(setting, dict) else ():
        if label not in labels:
            raise UserError(
                f"train.class_weights: {unknown('label', label, labels)}",
                hint="write the labels as task.labels does",
            )


def _view_fields(view: View) -> dict[str, Any]:
    """A view's fields under the names that fingerprints have always had."""
    fields = asdict(view)
    fields["taught"] = fields.pop("supervised")
    return fields


def check_subsets(recipe: Recipe, task: Task) -> None:
    """Raises UserError where ``train.subset`` counts rows per label and labels are free text."""
    if task.labels is not None or task.head_labels:
        return
    for subset in recipe.train.subset:
        if rows_per_label(subset) is not None:
            raise UserError(
                f"train.subset: {subset} needs a closed set of labels, and {task.name} has none",
                hint="use shares of the train rows, such as 0.25",
            )


def few_rows_warnings(recipe: Recipe, task: Task, data: Data) -> list[str]:
    """A warning for each subset for which some labels have too few train rows."""
    warnings = []
    counts = Counter(label for classes in data.classes for label in classes)
    for subset in recipe.train.subset:
        number = rows_per_label(subset)
        if number is None:
            continue
        few = [f"{label} ({counts[label]})" for label in task.head_labels if counts[label] < number]
        if few:
            listed = ", ".join(few[:5]) + (", …" if len(few) > 5 else "")
            warnings.append(
                f"train.subset: {subset} takes all rows of {count(len(few), 'label')} with fewer: "
                f"{listed}"
            )
    return warnings
