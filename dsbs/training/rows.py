"""Training rows: examples joined with their annotations, selected, held out and subset."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsbs.config import LabelSource, Recipe, SelectSection, StudentRecipe
from dsbs.config.task import MaxInputSection
from dsbs.errors import UserError
from dsbs.prompting import source_fingerprint
from dsbs.records import Annotation, Example, Sample
from dsbs.records.reviews import apply_gold, apply_reviews, reviews_mark
from dsbs.records.subsets import Subset, subset_indices, subset_text
from dsbs.run_folder import RunFolder
from dsbs.students.card import Target, head_of
from dsbs.students.long_texts import shortened
from dsbs.students.targets import compose_target
from dsbs.tasks import CHOICE_SEPARATOR, Task
from dsbs.tasks.data import (
    annotated_split,
    is_held_out,
    labels_by_row,
    load,
    position,
    subset_order,
    validation_rows,
)
from dsbs.training.grid import StudentSpec
from dsbs.training.methods import method_of


@dataclass(frozen=True, slots=True)
class Row:
    """One row: the student's input without prefix, and its targets (None or empty: it has none)."""

    id: str
    text: str
    gold: str | None
    teacher: str | None
    rationales: tuple[str, ...] = ()
    hinted: bool = False
    """True where the rationales lead to the gold label and not to the teacher's own."""
    votes: tuple[float, ...] | None = None
    """(L,) shares of the task's labels in the annotation's samples. None: unknown or not needed."""
    annotated: tuple[str, ...] | None = None
    """The classes of the annotation that the row learns from. None: from none."""
    choices: tuple[tuple[str, str], ...] = ()
    """A row's own choices and the input that scores each. Empty: the labels are the task's."""

    @property
    def label_text(self) -> str:
        """What a student reads to give a label."""
        return CHOICE_SEPARATOR.join(text for _, text in self.choices) or self.text

    def label(self, source: LabelSource) -> str | None:
        return self.gold if source == "gold" else self.teacher

    def targets(self, target: Target, source: LabelSource) -> list[str]:
        """Every text that a view may write for this row; a rationale only with its own label."""
        rationales: tuple[str | None, ...] = (None,)
        if target != "label":
            rationales = self.usable(source) or (None,)
        texts = [compose_target(target, self.label(source), rationale) for rationale in rationales]
        return [text for text in texts if text]

    def usable(self, source: LabelSource) -> tuple[str, ...]:
        """The rationales that go with this source's label; hinted ones go with gold labels only."""
        if self.label(source) is None or (self.hinted and source == "teacher"):
            return ()
        return self.rationales

    def without_annotation(self) -> Row:
        """This row with its gold label alone."""
        return Row(self.id, self.text, self.gold, None, choices=self.choices)


@dataclass(frozen=True, slots=True)
class Data:
    """Training and validation rows of a run."""

    train: list[Row]
    valid: list[Row]
    valid_labels: LabelSource
    """Whose labels choose the best step."""
    fields: dict[str, dict[str, Any]]
    """Inputs of the validation rows by id: a label may be read by its row's choices."""
    order: list[int]
    """Indices of the train rows by a hash of their ids: a subset is the first so many."""
    teacher_texts: list[str]
    """Labels and rationales of all accepted annotations of train rows, selected or not, before any
    review; and what people wrote with other characters."""
    max_per_label: int | None = None
    """``train.select.max_per_label``: annotations that a student learns from, per label."""
    classes: list[tuple[str, ...]] = field(default_factory=list)
    """Each train row's labels, by which a subset has so many rows per label."""
    max_text_tokens: int | None = None
    """The most tokens of a row's text, where ``task.max_input`` has cut longer ones."""
    reviews: str | None = None
    """Hash of the reviews that the rows follow. None: there are none."""

    def shortened(self, tokenizer: Any, limit: int, section: MaxInputSection) -> Data:
        """These rows with texts of at most ``limit`` tokens."""

        def short(rows: list[Row]) -> list[Row]:
            texts = shortened([row.text for row in rows], tokenizer, limit, section)
            return [replace(row, text=text) for row, text in zip(rows, texts, strict=True)]

        return replace(
            self, train=short(self.train), valid=short(self.valid), max_text_tokens=limit
        )

    def subset(self, subset: Subset) -> list[Row]:
        """A subset's rows, in their own order; a smaller subset's are among a larger one's.

        Annotations beyond ``max_per_label`` are left out: those rows keep their gold label. The
        annotations of a smaller maximum are among those of a larger one.
        """
        rows = [self.train[i] for i in subset_indices(self.order, subset, self.classes)]
        if self.max_per_label is None:
            return rows
        counts: Counter[str] = Counter()
        surplus = set()
        for row in sorted(rows, key=lambda row: position(row.id, "select")):
            if row.annotated is None:
                continue
            if all(counts[label] >= self.max_per_label for label in row.annotated):
                surplus.add(row.id)
            counts.update(row.annotated)
        return [row.without_annotation() if row.id in surplus else row for row in rows]


def gather(recipe: StudentRecipe, task: Task, run: Path, specs: Sequence[StudentSpec]) -> Data:
    """Join rows and annotations by id.

    Raises UserError where a student of ``specs`` lacks the labels or rationales it learns from.
    """
    run_folder = RunFolder(run)
    reviews = run_folder.read_reviews("train")
    annotated = run_folder.next_rounds().of(load(recipe, task, "train"))
    examples = apply_gold(annotated, reviews, task)
    needs_teacher = any(spec.needs_teacher for spec in specs)
    originals = _annotations(recipe, task, run, needed=needs_teacher)
    if needs_teacher:
        run_folder.check_inputs(originals, examples, "train")
    annotations = apply_reviews(originals, reviews, task)
    missing = [
        example.id for example in examples if needs_teacher and example.id not in annotations
    ]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(examples)} train rows have no annotation "
            f"(first: {missing[0]})",
            hint="the data changed: run `dsbs annotate` again, it requests only the new rows",
        )
    matched = [annotations[example.id] for example in examples if example.id in annotations]
    section = recipe.train.select
    selected = {row.id: row for row in select_annotations(matched, section, task)}
    with_votes = any(spec.learns_votes for spec in specs)
    with_choices = task.has_choices and head_of(recipe.student, recipe.train.init) == "labels"
    rows = [
        _row(
            task,
            example,
            selected.get(example.id),
            first_only=recipe.train.rationales == "chosen",
            agree_gold=section.agree_gold,
            with_votes=with_votes,
            with_choices=with_choices,
        )
        for example in examples
        if not is_held_out(recipe, example)
    ]
    valid, valid_labels, fields = _valid(recipe, task, run, annotations)
    ids = {row.id for row in rows}
    teacher_texts = _texts(originals[row.id] for row in matched if row.id in ids)
    # A vocabulary is all students' together: reviews change it only where it lacks a character.
    characters = set().union(*teacher_texts, *(row.text for row in rows))
    reviewed_texts = _texts(row for row in matched if row.id in ids)
    teacher_texts += [text for text in reviewed_texts if not characters.issuperset(text)]
    trainable = [example for example in examples if example.id in ids]
    _, labels = labels_by_row(trainable, lambda: annotations)
    data = Data(
        train=rows,
        valid=valid,
        valid_labels=valid_labels,
        fields=fields,
        order=subset_order([row.id for row in rows]),
        teacher_texts=teacher_texts,
        max_per_label=section.max_per_label,
        classes=[task.classes(labels[row.id]) if row.id in labels else () for row in rows],
        reviews=reviews_mark(reviews, RunFolder(run).read_reviews("valid")),
    )
    for spec in specs:
        _check_targets(data, spec)
    return data


def _valid(
    recipe: StudentRecipe, task: Task, run: Path, annotations: dict[str, Annotation]
) -> tuple[list[Row], LabelSource, dict[str, dict[str, Any]]]:
    """Validation rows in the order of a hash, whose labels they have, and their inputs by id."""
    folder = RunFolder(run)
    reviews = folder.read_reviews(annotated_split(recipe, "valid"))
    examples = apply_gold(load(recipe, task, "valid"), reviews, task)
    source: LabelSource = "teacher"
    if any(example.label is not None for example in examples):
        source = "gold"
    elif recipe.task.data.valid is not None:
        originals = folder.load_annotations("valid", source_fingerprint(recipe, task))
        annotations = annotations | apply_reviews(originals, reviews, task)
    ordered = validation_rows(examples, None)
    with_choices = task.has_choices and head_of(recipe.student, recipe.train.init) == "labels"
    rows = [
        _row(task, example, annotations.get(example.id), with_choices=with_choices)
        for example in ordered
    ]
    labeled = [row for row in rows if row.label(source)]
    if not labeled:
        raise UserError(
            "no validation row has a label", hint="give task.data.valid, or annotate more rows"
        )
    fields = {example.id: example.input for example in examples}
    return labeled[: recipe.train.valid_limit], source, fields


def _texts(annotations: Iterable[Annotation]) -> list[str]:
    """The labels and rationales of the accepted ones."""
    return [
        text
        for annotation in annotations
        if annotation.accepted
        for text in (annotation.own_label, annotation.rationale)
        if text
    ]


def _check_targets(data: Data, spec: StudentSpec) -> None:
    """Raises UserError where a student's rows have nothing of what its method learns."""
    rows = data.subset(spec.subset)
    kind = "train row"
    if spec.subset != 1:
        kind = f"row of train.subset {subset_text(spec.subset)} ({len(rows)} rows)"
    check = "check the annotations' reject_reason"
    if not any(row.label(spec.labels) for row in rows):
        hint = f"{check} and train.select"
        if spec.labels == "gold":
            hint = (
                "set task.columns.label if a column holds the labels, use train.labels: teacher, "
                "or leave the method out of train.methods"
            )
        raise UserError(
            f"{spec.method} learns {spec.labels} labels, and no {kind} has one", hint=hint
        )
    if method_of(spec.method).needs_rationales and not count_rationales(data, spec):
        raise UserError(
            f"{spec.method} learns rationales with {spec.labels} labels, and no {kind} has a "
            "usable one",
            hint=f"{check} and provenance (hinted ones go with gold labels), and train.select",
        )
    if spec.learns_votes and not any(row.votes and row.label(spec.labels) for row in rows):
        raise UserError(
            f"{spec.method} learns how sure the teacher was of its labels, and no {kind} has a "
            "vote",
            hint=f"{check} and provenance (a hinted answer does not vote), and train.select",
        )


def count_trainable(recipe: Recipe, task: Task, run: RunFolder) -> int:
    """The number of train rows that are not held out for validation."""
    examples = run.next_rounds().of(load(recipe, task, "train"))
    return sum(not is_held_out(recipe, example) for example in examples)


def count_rationales(data: Data, spec: StudentSpec) -> int:
    """The number of rationales that a student learns in its subset of the rows."""
    if not method_of(spec.method).needs_rationales:
        return 0
    return sum(len(row.usable(spec.labels)) for row in data.subset(spec.subset))


def select_annotations(
    annotations: Iterable[Annotation], section: SelectSection, task: Task
) -> Iterator[Annotation]:
    """The accepted annotations that pass ``train.select``, ``max_per_label`` aside.

    A filter applies at training time, so changing it costs no teacher call. Rows left out still
    have their gold label. What a person accepted or corrected passes all but ``agree_gold``: votes
    and log-probabilities say less of it. ``max_per_label`` is applied to a student's rows: see
    ``Data.subset``.
    """
    return (row for row in annotations if row.accepted and _passes(row, section, task))


def _passes(row: Annotation, section: SelectSection, task: Task) -> bool:
    if section.agree_gold and (
        row.gold is None or row.label is None or not task.correct(row.label, row.gold)
    ):
        return False
    if row.provenance == "reviewed":
        return True
    if section.min_vote is not None and (
        row.vote_share is None or row.vote_share < section.min_vote
    ):
        return False
    if section.min_logprob is not None and (
        row.label_logprob is None or row.label_logprob < section.min_logprob
    ):
        return False
    return section.provenance is None or row.provenance in section.provenance


def _annotations(
    recipe: StudentRecipe, task: Task, run: Path, *, needed: bool
) -> dict[str, Annotation]:
    """The train annotations; where no method needs them, those that exist, for the vocabulary."""
    folder = RunFolder(run)
    if not needed and not folder.annotations("train").is_file():
        return {}
    try:
        return folder.load_annotations("train", source_fingerprint(recipe, task))
    except UserError:
        if needed:
            raise
        return {}


def _row(
    task: Task,
    example: Example,
    annotation: Annotation | None,
    *,
    first_only: bool = True,
    agree_gold: bool = False,
    with_votes: bool = False,
    with_choices: bool = False,
) -> Row:
    text = task.text(example.input)
    choices = tuple(task.choice_texts(example.input).items()) if with_choices else ()
    if annotation is None or not annotation.accepted:
        return Row(example.id, text, example.label, None, choices=choices)
    label = annotation.own_label
    if agree_gold and (
        label is None or example.label is None or not task.correct(label, example.label)
    ):
        label = None  # a hinted row passes by its gold label; the teacher's own is another
    shares = None
    if with_votes and task.labels:
        shares = vote_distribution(annotation, task.labels, task)
    return Row(
        id=example.id,
        text=text,
        gold=example.label,
        teacher=label,
        rationales=tuple(_rationales(annotation, task))[: 1 if first_only else None],
        hinted=annotation.provenance == "hinted",
        votes=tuple(shares) if shares else None,
        annotated=task.classes(annotation.label) if annotation.label else ("",),
        choices=choices,
    )


def _rationales(annotation: Annotation, task: Task) -> list[str]:
    """The annotation's rationale, then each other one of an accepted sample with its label."""
    if annotation.rationale is None or annotation.label is None:
        return []
    rationales = {annotation.rationale: None}
    for sample in annotation.samples:
        if sample.rationale is None or sample.reason is not None or sample.label is None:
            continue
        if sample.hinted == (annotation.provenance == "hinted") and task.correct(
            sample.label, annotation.label
        ):
            rationales[sample.rationale] = None
    return list(rationales)


def label_texts(*sources: tuple[Sequence[Row], LabelSource]) -> tuple[str, ...]:
    """The distinct labels of rows, each with whose labels count, in alphabetical order."""
    labels = (row.label(source) for rows, source in sources for row in rows)
    return tuple(sorted({label for label in labels if label is not None}))


def vocabulary_text(data: Data, labels: Sequence[str] = ()) -> Iterator[str]:
    """The text that a scratch vocabulary is learned from: train rows, the teacher's texts and those
    of the task's ``labels`` that neither has.

    The same for every method, label source and selection, so that none changes another's student.
    """
    texts = data.teacher_texts
    total = len(data.train)
    for i, row in enumerate(data.train):
        yield "predict: explain: " + row.text
        if row.gold:
            yield row.gold
        # Spread over the rows: learning may stop halfway.
        yield from texts[i * len(texts) // total : (i + 1) * len(texts) // total]
    yield from sorted({*labels} - {*texts} - {row.gold for row in data.train})


def vote_distribution(
    annotation: Annotation, labels: Sequence[str], task: Task
) -> list[float] | None:
    """An annotation's distribution over ``labels``; None if no sample has one without a hint.

    Several samples of one annotator: each label's share of the readable, unhinted ones. A single
    sample: its label's probability if the endpoint returned one (otherwise 1), the rest evenly
    spread over the other labels. An ensemble: the mean of its members' distributions, by weight.
    """
    members: dict[str | None, list[tuple[int, Sample]]] = {}
    for sample in annotation.samples:
        index = _label_index(sample.label, labels, task)
        if not sample.hinted and index is not None:
            members.setdefault(sample.run, []).append((index, sample))
    if not members:
        return None
    if len(members) == 1:
        return _member_distribution(next(iter(members.values())), len(labels))
    weights = [math.fsum(sample.vote for _, sample in votes) for votes in members.values()]
    weighted = [
        [weight * share for share in _member_distribution(votes, len(labels))]
        for weight, votes in zip(weights, members.values(), strict=True)
    ]
    return [math.fsum(column) / math.fsum(weights) for column in zip(*weighted, strict=True)]


def _member_distribution(votes: Sequence[tuple[int, Sample]], labels: int) -> list[float]:
    """One annotator's distribution over ``labels`` labels from its (label index, sample) votes."""
    if len(votes) > 1 or labels == 1:
        total = math.fsum(sample.vote for _, sample in votes)
        return [
            math.fsum(sample.vote for voted, sample in votes if voted == label) / total
            for label in range(labels)
        ]
    [(voted, sample)] = votes
    confidence = 1.0
    if sample.label_logprob is not None:
        confidence = min(1.0, math.exp(sample.label_logprob))
    distribution = [(1 - confidence) / (labels - 1)] * labels
    distribution[voted] = confidence
    return distribution


def _label_index(text: str | None, labels: Sequence[str], task: Task) -> int | None:
    """The index of the first of ``labels`` that the task takes to be the same as ``text``."""
    if text is None:
        return None
    return next((index for index, label in enumerate(labels) if task.correct(text, label)), None)
