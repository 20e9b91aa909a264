"""A run's rows: examples joined with their annotations, what each may teach, and how the data are parted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.config import LabelSource, Recipe
from dsbs.errors import UserError
from dsbs.records.rows import Annotation, Example
from dsbs.run_folder import annotation_file, load_annotations
from dsbs.students import Target, compose
from dsbs.tasks.base import Task
from dsbs.tasks.load import is_held_out, load, position
from dsbs.training.distillation.labels import vote_distribution
from dsbs.training.methods import Cell, method_of
from dsbs.training.select import select


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: the student's input without prefix, its targets (None, or no rationale: this row does not teach it)."""

    id: str
    text: str
    gold: str | None
    teacher: str | None
    rationales: tuple[str, ...] = ()
    hinted: bool = False  # the rationales lead to the gold label, not to the teacher's own
    votes: tuple[float, ...] | None = (
        None  # of the task's labels in the annotation's samples; None: not asked for, or unknown
    )

    def label(self, source: LabelSource) -> str | None:
        return self.gold if source == "gold" else self.teacher

    def targets(self, target: Target, source: LabelSource) -> list[str]:
        """What a view of this row is to write, in as many ways as there are; a rationale only beside the label it leads to."""
        usable = () if target == "label" else self.usable(source)
        texts = [compose(target, self.label(source), rationale) for rationale in usable or (None,)]
        return [text for text in texts if text]

    def usable(self, source: LabelSource) -> tuple[str, ...]:
        """The rationales that stand beside this source's label: a hinted one leads to the gold label alone."""
        return (
            ()
            if self.label(source) is None or (self.hinted and source == "teacher")
            else self.rationales
        )


@dataclass(frozen=True, slots=True)
class Data:
    """Training and validation rows of a run. ``valid_labels``: whose labels choose the best step."""

    train: list[Row]
    valid: list[Row]
    valid_labels: LabelSource
    fields: dict[
        str, dict[str, Any]
    ]  # of the validation rows by id: a label may be read by its row's choices
    order: list[
        int
    ]  # of the train rows by a hash of their ids: a part of them is the first so many
    teacher_words: list[
        str
    ]  # labels and rationales of all accepted annotations of train rows, selected or not

    def part(self, share: float) -> list[Row]:
        """A share of the train rows, in their own order; a smaller share's rows are among a larger one's."""
        chosen = sorted(self.order[: max(1, round(share * len(self.train)))])
        return [self.train[i] for i in chosen]


def gather(recipe: Recipe, task: Task, run: Path, cells: Sequence[Cell]) -> Data:
    """Join rows and annotations by id. Raises UserError where a method lacks the labels or rationales it learns from."""
    examples = load(recipe, task, "train")
    needs_teacher = any(cell.needs_teacher for cell in cells)
    annotations = _annotations(recipe, task, run, needed=needs_teacher)
    missing = [
        example.id for example in examples if needs_teacher and example.id not in annotations
    ]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(examples)} train rows have no annotation (first: {missing[0]})",
            hint="the data changed since: run `dsbs annotate` again, it asks for the new rows only",
        )
    known = [annotations[example.id] for example in examples if example.id in annotations]
    chosen = select(known, recipe.train.select, task)
    own_must_agree = recipe.train.select.agree_gold
    votes = any(cell.learns_votes for cell in cells)
    rows = [
        _row(
            task,
            example,
            chosen.get(example.id),
            recipe.train.rationales,
            own_must_agree=own_must_agree,
            votes=votes,
        )
        for example in examples
        if not is_held_out(recipe, example)
    ]

    held_out = load(recipe, task, "valid")
    source: LabelSource = (
        "gold" if any(example.label is not None for example in held_out) else "teacher"
    )
    if source == "teacher" and recipe.task.data.valid is not None:
        annotations = annotations | load_annotations(recipe, task, run, "valid")
    valid = [_row(task, example, annotations.get(example.id)) for example in held_out]
    valid = sorted(
        (row for row in valid if row.label(source)), key=lambda row: position(row.id, "valid-limit")
    )
    if not valid:
        raise UserError(
            "no validation row has a label", hint="give task.data.valid, or annotate more rows"
        )
    ids = {row.id for row in rows}
    words = [
        part
        for annotation in known
        if annotation.accepted and annotation.id in ids
        for part in (annotation.own_label, annotation.rationale)
        if part
    ]
    fields = {example.id: example.input for example in held_out}
    order = sorted(range(len(rows)), key=lambda i: position(rows[i].id, "subset"))
    data = Data(rows, valid[: recipe.train.valid_limit], source, fields, order, words)
    for cell in cells:
        _check_taught(data, cell)
    return data


def _check_taught(data: Data, cell: Cell) -> None:
    """Raises UserError where a student would find nothing of what its method learns in its part of the rows."""
    rows = data.part(cell.subset)
    of = (
        "train row"
        if cell.subset == 1
        else f"row of train.subset {cell.subset:g} ({len(rows)} rows)"
    )
    if not any(row.label(cell.labels) for row in rows):
        raise UserError(
            f"{cell.method} learns {cell.labels} labels, and no {of} has one",
            hint="leave the method out of train.methods"
            if cell.labels == "gold"
            else "look at the annotations' reject_reason, and at train.select",
        )
    if method_of(cell.method).needs_rationales and not taught_rationales(data, cell):
        raise UserError(
            f"{cell.method} learns rationales beside {cell.labels} labels, and no {of} has a usable one",
            hint="look at the annotations' reject_reason and provenance (hinted ones go with gold labels), and at train.select",
        )
    if cell.learns_votes and not any(row.votes and row.label(cell.labels) for row in rows):
        raise UserError(
            f"{cell.method} learns how sure the teacher was of its labels, and no {of} has a vote of it",
            hint="look at the annotations' reject_reason and provenance (a hinted answer is no vote), and at train.select",
        )


def taught_rationales(data: Data, cell: Cell) -> int:
    """How many rationales a student is taught in its part of the rows."""
    if not method_of(cell.method).needs_rationales:
        return 0
    return sum(len(row.usable(cell.labels)) for row in data.part(cell.subset))


def _annotations(recipe: Recipe, task: Task, run: Path, *, needed: bool) -> dict[str, Annotation]:
    """The train annotations; where no method needs them, what there is of this recipe's, for the vocabulary's sake."""
    if not needed and not annotation_file(run, "train").is_file():
        return {}
    try:
        return load_annotations(recipe, task, run, "train")
    except UserError:
        if needed:
            raise
        return {}


def _row(
    task: Task,
    example: Example,
    annotation: Annotation | None,
    which: str = "chosen",
    *,
    own_must_agree: bool = False,
    votes: bool = False,
) -> Row:
    if annotation is None or not annotation.accepted:
        return Row(example.id, task.text(example.input), example.label, None)
    own = annotation.own_label
    if own_must_agree and (
        own is None or example.label is None or not task.correct(own, example.label)
    ):
        own = None  # a hinted row passes select by its gold label; the teacher's own is another
    shares = vote_distribution(annotation, task.labels, task) if votes and task.labels else None
    return Row(
        id=example.id,
        text=task.text(example.input),
        gold=example.label,
        teacher=own,
        rationales=tuple(_rationales(annotation, task))[: 1 if which == "chosen" else None],
        hinted=annotation.provenance == "hinted",
        votes=tuple(shares) if shares else None,
    )


def _rationales(annotation: Annotation, task: Task) -> list[str]:
    """The annotation's rationale, then those of its other samples that came to the same label without a flaw, each once."""
    if annotation.rationale is None or annotation.label is None:
        return []
    found = {annotation.rationale: None}
    for sample in annotation.samples:
        if sample.rationale is None or sample.reason is not None or sample.label is None:
            continue
        if sample.hinted == (annotation.provenance == "hinted") and task.correct(
            sample.label, annotation.label
        ):
            found[sample.rationale] = None
    return list(found)


def vocabulary_text(data: Data) -> Iterator[str]:
    """The text that a scratch vocabulary is learned from: train rows and all that the teacher said of them.

    The same for every method, label source and selection, so that none of them changes another's student.
    """
    words, count = data.teacher_words, len(data.train)
    for i, row in enumerate(data.train):
        yield from (part for part in ("predict: explain: " + row.text, row.gold) if part)
        yield from words[
            i * len(words) // count : (i + 1) * len(words) // count
        ]  # side by side: learning may stop halfway
