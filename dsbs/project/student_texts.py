"""Texts as a student reads and writes them: lengths, unknown characters, labels read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsbs.config import StudentRecipe
from dsbs.errors import UserError
from dsbs.formatting import count, percent
from dsbs.project.machine import check_memory
from dsbs.records import Example, Unreadable
from dsbs.students.card import head_of, input_limit, new_head_warning
from dsbs.students.formats import InputFormat, new_input_format
from dsbs.students.targets import compose_target, split_target
from dsbs.students.tokenizer import new_tokenizer, vocabulary_warnings
from dsbs.tasks import Task
from dsbs.tasks.label_set import LabelSet
from dsbs.training.distillation.teacher_source import check_teachers
from dsbs.training.grid import grid
from dsbs.training.methods import method_of

SAMPLE_SIZE = 2000  # rows of each split that are tokenized
_MAX_LABELS = 5  # labels that an error names
RATIONALE = "The text says so."  # of a made-up answer

Splits = Mapping[str, Sequence[Example]]


@dataclass(frozen=True, slots=True)
class StudentTexts:
    """How a student reads the rows: its tokenizer and input format."""

    recipe: StudentRecipe
    task: Task
    tokenizer: Any
    input_format: InputFormat

    @property
    def chooses(self) -> bool:
        """Whether it has a label head, and writes no labels."""
        return head_of(self.recipe.student, self.recipe.train.init) == "labels"

    def check_teachers(self) -> None:
        """Raises UserError for local teachers that do not fit the student, or the memory."""
        # A learned vocabulary comes from annotations as well, which may be missing.
        is_learned = self.recipe.student.is_scratch and self.recipe.train.init is None
        tokenizer = None if is_learned else self.tokenizer
        try:
            check_teachers(self.recipe, self.task, grid(self.recipe.train), tokenizer)
            check_memory(self.recipe)
        except UserError as error:
            if self.recipe.student_name is None:
                raise
            raise UserError(self._named(error.problem), hint=error.hint) from None

    def label_warnings(self, splits: Splits) -> list[str]:
        """Warnings about labels that it cannot write, or of another label head that it starts from.

        Raises UserError for some of a closed set.
        """
        if self.chooses:
            warning = new_head_warning(self.recipe, self.task)
            return [] if warning is None else [self._named(warning)]
        if self.task.label_set is not None:
            check_student_labels(
                self.recipe, self.task.label_set, self.tokenizer, self.input_format
            )
            return []
        labels = [row.label for rows in splits.values() for row in rows if row.label is not None]
        warnings = vocabulary_warnings(self.recipe.student, self.tokenizer, labels, {})
        warnings += self._length_warnings(labels) if self.task.part_names else []
        return [self._named(warning) for warning in warnings]

    def _length_warnings(self, labels: Sequence[str]) -> list[str]:
        """A warning about labels of several parts that end before their last part."""
        limit = self.recipe.eval.max_label_tokens + 1  # and the end token
        lengths = [len(token_ids) for token_ids in self.input_format.write(labels)]
        too_long = sum(length > limit for length in lengths)
        if not too_long:
            return []
        return [
            f"{too_long} of {count(len(lengths), 'label')} are longer than eval.max_label_tokens "
            f"and can never be right: set it to {max(lengths)} or more"
        ]

    def figures(
        self, rows: Sequence[Example], figures: Mapping[str, dict[str, Any]]
    ) -> dict[str, Any]:
        """Lengths in tokens; with those of other students, by name, where students have names."""
        lengths = self._lengths(rows)
        name = self.recipe.student_name
        return lengths if name is None else {"students": {**figures, name: lengths}}

    def _lengths(self, rows: Sequence[Example]) -> dict[str, Any]:
        sample = rows[:SAMPLE_SIZE]
        section = self.recipe.student
        prefix = "" if self.chooses else "explain: "
        inputs = self.input_format.read([prefix + self.task.text(row.input) for row in sample])
        written = [text for row in sample for text in (row.label, row.rationale) if text]
        if self.chooses:
            written = [row.rationale for row in sample if row.rationale]
        targets = self.input_format.write(written) if written else []
        limit = input_limit(section, self.recipe.train.init)
        limit *= self.recipe.task.max_input.most_windows
        return {
            "inputs": _token_figures(self.tokenizer, inputs, limit),
            "targets": _token_figures(self.tokenizer, targets, section.max_target_tokens),
        }

    def warnings(
        self, split: str, rows: Sequence[Example], figures: Mapping[str, Any]
    ) -> list[str]:
        """Warnings about a split's texts that are cut, or that the vocabulary lacks."""
        name = self.recipe.student_name
        lengths = figures if name is None else figures["students"][name]
        warnings = []
        for texts, key in (("inputs", "max_input_tokens"), ("targets", "max_target_tokens")):
            if lengths[texts] and lengths[texts]["truncated"] > 0:
                share = percent(lengths[texts]["truncated"])
                warnings.append(
                    f"{split}: {share} of {texts} are longer than student.{key} and are truncated"
                )
        read = {
            "inputs": [self.task.text(row.input) for row in rows],
            "rationales": [row.rationale for row in rows if row.rationale],
        }
        warnings += [
            f"{split}: {warning}"
            for warning in vocabulary_warnings(self.recipe.student, self.tokenizer, [], read)
        ]
        return [self._named(warning) for warning in warnings]

    def _named(self, warning: str) -> str:
        name = self.recipe.student_name
        return warning if name is None else f"student {name}: {warning}"


def student_texts(recipe: StudentRecipe, task: Task, splits: Splits) -> StudentTexts:
    texts = [
        text
        for row in splits["train"]
        for text in (task.text(row.input), row.label, row.rationale)
        if text
    ]
    texts += sorted({*(task.labels or ())} - {row.label for row in splits["train"]})
    tokenizer = new_tokenizer(recipe.student, ["predict: explain: ", *texts], recipe.train.init)
    input_format = new_input_format(recipe.student, tokenizer, recipe.train.init)
    return StudentTexts(recipe, task, tokenizer, input_format)


def _token_figures(
    tokenizer: Any, sequences: Sequence[list[int]], limit: int
) -> dict[str, Any] | None:
    """Lengths in tokens, the share of texts over ``limit``, and the share of unknown tokens."""
    if not sequences:
        return None
    lengths = sorted(len(token_ids) for token_ids in sequences)
    unknown = sum(token_ids.count(tokenizer.unk_token_id) for token_ids in sequences)
    return {
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "truncated": sum(length > limit for length in lengths) / len(lengths),
        "unknown": unknown / max(1, sum(lengths)),
    }


def check_student_labels(
    recipe: StudentRecipe, label_set: LabelSet, tokenizer: Any, input_format: InputFormat
) -> None:
    """Raise UserError where a label that the student writes with its tokenizer reads as another
    one, or as none.
    """
    methods = dict.fromkeys(spec.method for spec in grid(recipe.train))
    views = [view for method in methods for view in method_of(method).views(recipe.train)]
    unreadable: list[tuple[str, str, str | None]] = []
    for target in {view.target: None for view in views if view.target != "rationale"}:
        limit = recipe.student.max_target_tokens
        if target == "label":
            limit = min(limit, recipe.eval.max_label_tokens + 1)  # and the end token
        texts = [compose_target(target, label, RATIONALE) or "" for label in label_set.labels]
        decoded = tokenizer.batch_decode(input_format.write(texts, limit), skip_special_tokens=True)
        for label, text in zip(label_set.labels, decoded, strict=True):
            reading = label_set.read(split_target(target, text.strip())[0])
            if isinstance(reading, Unreadable):
                unreadable.append((label, text, reading.reason))
            elif reading != label:
                unreadable.append((label, text, reading))
    if unreadable:
        raise unreadable_labels(
            "the student's tokenizer",
            unreadable,
            "rename it, raise student.max_target_tokens and eval.max_label_tokens where it is cut, "
            "or use a student.model with more characters",
        )


def unreadable_labels(
    writer: str, unreadable: Sequence[tuple[str, str, str | None]], hint: str
) -> UserError:
    """The error for labels that are not read back: (label, text as written, what it reads as)."""
    lines = [
        f"{label!r} is written {text.strip()!r:.120}, which reads as {reading!r}"
        for label, text, reading in unreadable[:_MAX_LABELS]
    ]
    if len(unreadable) > _MAX_LABELS:
        lines.append(f"and {len(unreadable) - _MAX_LABELS} more")
    return UserError(
        f"{writer}: {count(len(unreadable), 'label')} would not be read back\n  "
        + "\n  ".join(lines),
        hint=hint,
    )
