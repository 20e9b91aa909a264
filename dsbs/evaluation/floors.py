"""Floors: cheap systems that a student should beat, and their prediction files.

A floor is one `Floor` record, registered by its name in ``dsbs.config.registry.FLOORS``. Floors
that learn do so from the same rows as the students: one for each share of the train rows, from gold
labels, or from the teacher's where no train row has a gold label.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from dsbs.config import LabelSource, Recipe, StudentRecipe
from dsbs.config.registry import FLOORS, entry
from dsbs.errors import UserError
from dsbs.evaluation.metrics import score
from dsbs.evaluation.predictions import (
    FLOOR_MARK,
    fits_or_restore,
    is_correct,
    read_predictions,
    rounded,
)
from dsbs.evaluation.systems import System
from dsbs.files import canonical_json, digest, write_jsonl
from dsbs.progress import Progress
from dsbs.prompting import source_fingerprint
from dsbs.records import Annotation, Example, Prediction, Unreadable
from dsbs.records.reviews import apply_gold, apply_reviews
from dsbs.records.subsets import Subset, subset_indices, subset_rank, subset_suffix
from dsbs.run_folder import RunFolder
from dsbs.students.formats import PAIR_SEPARATOR
from dsbs.tasks import Task
from dsbs.tasks.data import (
    annotated_split,
    is_held_out,
    labels_by_row,
    load,
    stream,
    subset_order,
    validation_rows,
)

# tfidf's time grows with the characters of the train texts times the labels; so many take about 40
# seconds on two cores (9,003 rows of Banking77 with 77 labels: 35 s; 8,869 of e-SNLI with 3: 7 s).
_MAX_DEFAULT_COST = 60_000_000
_COST_OF_FEATURES = 20  # of extracting them, in labels


@dataclass(frozen=True, slots=True)
class FloorAnswer:
    """A floor's answer to a row.

    ``distribution``: the probability of each label; where a row has several labels, each of them
    has one of its own. None: it has none.
    """

    raw: str
    distribution: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class FloorInputs:
    """What a floor answers, and the labeled rows that it learns from and is tuned on."""

    recipe: StudentRecipe
    task: Task
    rows: Sequence[Example]
    only_field: str | None = None
    """The only input field to read. None: the student's input."""
    train: Sequence[tuple[Example, str]] = ()
    valid: Sequence[tuple[Example, str]] = ()

    def texts(self, row: Example) -> list[str]:
        """The student's input, or both texts of a pair, or the only field to read."""
        if self.only_field is None:
            return self.task.text(row.input).split(PAIR_SEPARATOR, 1)
        if self.only_field not in row.input:
            raise UserError(
                f"eval.floors: tfidf-{self.only_field}: row {row.id!r} has no such field "
                f"(fields: {', '.join(row.input)})",
                hint="name an input field of the task; task.columns renames columns",
            )
        return [str(row.input[self.only_field])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """A floor and all that is said of it in tables and reports."""

    title: str
    source: str
    """The definition in a sentence."""
    learns: bool
    """Whether it learns from the train rows, so that there is one for each subset of them."""
    reads_field: bool = False
    """Whether it can be limited to one input field: ``tfidf-hypothesis``."""
    needs_labels: bool = False
    """Whether it needs a closed set of labels, or labels that consist of parts."""
    asks_student: bool = False
    """Whether it asks the student's model, so that there is one for each student."""
    missing: Callable[[StudentRecipe], str | None] = lambda _recipe: None
    """Why a recipe's student does not have it. None: it does."""
    identity: Callable[[FloorInputs], str]
    """Everything that decides the answers, except the rows to answer."""
    predict: Callable[[FloorInputs], list[FloorAnswer]]


def floor_of(name: str) -> tuple[Floor, str | None]:
    """The record of a floor, and the input field that ``name`` limits it to, if any."""
    base, _, limited_to = name.partition("-")
    if name in FLOORS:
        base, limited_to = name, ""
    return entry(FLOORS, base), limited_to or None


def check_floors(recipe: Recipe, task: Task) -> None:
    """Raises UserError for floors and scores that the task cannot have."""
    if recipe.eval.score_labels and task.labels is None:
        raise UserError(
            f"eval.score_labels needs a closed set of labels, and {task.name} has none",
            hint="remove eval.score_labels",
        )
    for name in recipe.eval.floors or ():
        floor, limited_to = floor_of(name)
        if limited_to is not None and not floor.reads_field:
            raise UserError(
                f"eval.floors: {name}: only tfidf can be limited to an input field",
                hint=f"use {name.partition('-')[0]}, or tfidf-{limited_to}",
            )
        if floor.needs_labels and task.labels is None and not task.part_names:
            raise UserError(
                f"eval.floors: {name} needs a closed set of labels, and {task.name} has none",
                hint=f"remove {name} from eval.floors",
            )


# --- systems


def floor_systems(
    recipe: Recipe,
    task: Task,
    rows: Sequence[Example],
    run: RunFolder,
    training_rows: Mapping[Subset, int | None],
    progress: Progress,
    *,
    score_only: bool,
) -> list[System]:
    """The recipe's floors, those that learn for each subset of the train rows.

    ``training_rows`` are the rows of each subset that students learned from. Prediction files are
    made unless they are there. With ``score_only`` nothing is learned, and floors without a file
    are left out.
    """
    names = recipe.eval.floors
    labeled = None
    if names is None or any(floor_of(name)[0].learns for name in names):
        try:
            labeled = _labeled_rows(recipe, task, run)
        except UserError as error:
            if not score_only and names is not None:
                raise
            progress.say(f"no floors: {error.problem}")
            if not score_only:
                return []
    subsets = sorted(training_rows or {1.0: None}, key=subset_rank, reverse=True)
    systems = []
    for name in _floor_names(recipe, task, labeled, subsets):
        floor, limited_to = floor_of(name)
        for student, subset in _variants(floor, recipe, subsets):
            inputs = FloorInputs(student, task, rows, limited_to)
            reason = floor.missing(student)
            system = _new_system(name, floor, student, subset)
            if subset is not None:
                system.training_rows = training_rows.get(subset)
            if subset is not None and labeled is not None:
                inputs = replace(inputs, train=labeled.of_subset(subset), valid=labeled.valid)
                system.training_rows = system.training_rows or len(inputs.train)
                if not inputs.train:
                    reason = "no row of this subset has a label"
            path = run.predictions(system.name)
            if reason is None and not score_only:
                source = None if labeled is None or not floor.learns else labeled.source
                _make_predictions(floor, system.name, inputs, source, run, progress)
            elif reason is None and not path.is_file():
                reason = "it was not evaluated; run dsbs eval without --score-only"
            if reason is not None:
                progress.say(f"no floor {system.name}: {reason}")
                continue
            predictions = read_predictions(path)
            system.labels = next(iter(predictions.values())).model
            system.files.append(score(task, rows, predictions, system.name))
            systems.append(system)
    return systems


def _variants(
    floor: Floor, recipe: Recipe, subsets: Sequence[Subset]
) -> list[tuple[StudentRecipe, Subset | None]]:
    """The students that a floor asks, or the subsets of the train rows that it learns from."""
    students = list(recipe.students.values())
    if floor.asks_student:
        return [(student, None) for student in students]
    if floor.learns:
        return [(students[0], subset) for subset in subsets]
    return [(students[0], None)]


def _new_system(name: str, floor: Floor, student: StudentRecipe, subset: Subset | None) -> System:
    title = name if subset is None else name + subset_suffix(subset)
    start_of = student.student_name if floor.asks_student else None
    if start_of is not None:
        title = f"{start_of}-{title}"
    return System(title, "floor", [], floor=name, learned_subset=subset, start_of=start_of)


def _floor_names(
    recipe: Recipe, task: Task, labeled: _LabeledRows | None, subsets: Sequence[Subset]
) -> list[str]:
    """``eval.floors``, or its default: those that take less than a minute.

    ``labeled``: None where it is unknown, and no floor is made.
    """
    if recipe.eval.floors is not None:
        return list(recipe.eval.floors)
    if task.labels is None and not task.part_names:
        return []
    names = ["majority", "tfidf"]
    if labeled is not None:
        rows = sum(len(labeled.of_subset(subset)) for subset in subsets)
        cost = rows * labeled.mean_characters * (len(task.head_labels) + _COST_OF_FEATURES)
        if cost > _MAX_DEFAULT_COST:
            names.remove("tfidf")
    return [name for name in names if name not in recipe.eval.predictions]


def _make_predictions(
    floor: Floor,
    name: str,
    inputs: FloorInputs,
    labels: LabelSource | None,
    run: RunFolder,
    progress: Progress,
) -> None:
    """Write a floor's prediction file unless it is there."""
    path = run.predictions(name)
    questions = canonical_json([[row.id, row.input] for row in inputs.rows])
    fingerprint = FLOOR_MARK + digest(floor.title, floor.identity(inputs), questions)
    if fits_or_restore(path, fingerprint):
        return
    progress.say(f"predict {inputs.recipe.eval.split}: floor {name}")
    predictions = []
    for row, answer in zip(inputs.rows, floor.predict(inputs), strict=True):
        label = inputs.task.answer(answer.raw, row.input, answer.distribution)
        read = None if isinstance(label, Unreadable) else label
        probability = None
        if read is not None and answer.distribution is not None:
            probability = inputs.task.probability_of(read, answer.distribution)
        predictions.append(
            Prediction(
                id=row.id,
                input=row.input,
                gold=row.label,
                raw=answer.raw,
                prediction=read,
                correct=is_correct(inputs.task, read, row),
                probability=probability,
                distribution=rounded(answer.distribution),
                made_by=fingerprint,
                model=labels,
            )
        )
    write_jsonl(path, (prediction.model_dump_json(by_alias=True) for prediction in predictions))


# --- rows


@dataclass(frozen=True, slots=True)
class _LabeledRows:
    """The train rows with the labels that floors learn, and validation rows."""

    task: Task
    source: LabelSource
    rows: list[Example]
    order: list[int]
    labels: dict[str, str]
    valid: list[tuple[Example, str]]
    mean_characters: float
    """Of the train rows' texts."""

    def of_subset(self, subset: Subset) -> list[tuple[Example, str]]:
        """The labeled rows of a subset of the train rows, the same as a student's."""
        labels = [self.labels.get(row.id) for row in self.rows]
        classes = [() if label is None else self.task.classes(label) for label in labels]
        rows = [self.rows[i] for i in subset_indices(self.order, subset, classes)]
        return [(row, self.labels[row.id]) for row in rows if row.id in self.labels]


def _labeled_rows(recipe: Recipe, task: Task, run: RunFolder) -> _LabeledRows:
    """The rows that students learn from, with gold labels, or the teacher's if there are none.

    Raises UserError where no row has a label.
    """
    reviews = run.read_reviews("train")

    def annotations() -> dict[str, Annotation]:
        originals = run.load_annotations("train", source_fingerprint(recipe, task))
        return apply_reviews(originals, reviews, task)

    annotated = run.next_rounds().of(load(recipe, task, "train"))
    examples = apply_gold(annotated, reviews, task)
    rows = [row for row in examples if not is_held_out(recipe, row)]
    source, labels = labels_by_row(rows, annotations)
    if not labels:
        raise UserError("no train row has a label", hint="label some rows, or run dsbs annotate")
    valid_reviews = run.read_reviews(annotated_split(recipe, "valid"))
    valid_rows = apply_gold(stream(recipe, task, "valid"), valid_reviews, task)
    with_gold = [row for row in valid_rows if row.label is not None]
    valid = validation_rows(with_gold, recipe.train.valid_limit)
    return _LabeledRows(
        task=task,
        source=source,
        rows=rows,
        order=subset_order([row.id for row in rows]),
        labels=labels,
        valid=[(row, str(row.label)) for row in valid],
        mean_characters=statistics.fmean(len(task.text(row.input)) for row in rows),
    )


def learned_identity(inputs: FloorInputs) -> str:
    """The identity of a floor that learns."""
    rows = [[[row.input, label] for row, label in part] for part in (inputs.train, inputs.valid)]
    labels = inputs.task.labels or inputs.task.part_names or None
    return canonical_json([inputs.only_field, labels, rows])


# --- majority


def predict_majority(inputs: FloorInputs) -> list[FloorAnswer]:
    """The most frequent label, the first of the task's at a tie; its shares as distribution.

    A label of several parts is one answer.
    """
    counts = Counter(dict.fromkeys(inputs.task.labels or (), 0))
    counts.update(label for _, label in inputs.train)
    label = max(counts, key=counts.__getitem__)
    distribution = None
    if inputs.task.labels is not None:
        distribution = {name: number / counts.total() for name, number in counts.items()}
    return [FloorAnswer(label, distribution)] * len(inputs.rows)


MAJORITY = Floor(
    title="majority label",
    source="the most frequent label of the train rows",
    learns=True,
    identity=learned_identity,
    predict=predict_majority,
)
