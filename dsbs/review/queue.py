"""Review queue: likely mistakes first, with random rows in between."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.floors import FloorInputs
from dsbs.evaluation.predictions import best_student, predict_student, read_predictions
from dsbs.evaluation.reviewed import random_order, random_sample
from dsbs.files import canonical_json, digest, write_json
from dsbs.formatting import percent, sentence_list
from dsbs.progress import NoProgress, Progress
from dsbs.project.leakage import near_pairs
from dsbs.prompting import source_fingerprint
from dsbs.records import Annotation, Example, Prediction
from dsbs.records.reviews import Reviews, current_reviews, deciding_review, proposal
from dsbs.run_folder import RunFolder, read_student
from dsbs.tasks import Task, make_task
from dsbs.tasks.data import load

Order = Literal["mistakes", "random", "file"]
RANDOM_EVERY = 5  # every fifth row is a random one
_FOLDS = 5  # of the cross-validation
_SURE = 0.5  # a student is sure of a label with at least this probability
_LOW_VOTE = 0.75
# Characters times labels up to which confident learning runs: about three minutes on two cores.
_MAX_COST = 300_000_000
# Weights of signs of a mistake. Where a sign has a probability, that is its weight.
_GOLD_DIFFERS = 0.8
_DUPLICATE_DIFFERS = 0.6


@dataclass(frozen=True, slots=True)
class ReviewRow:
    """A row as a reviewer sees it. None: unknown or absent."""

    id: str
    input: dict[str, Any]
    text: str
    """The input as one text."""
    label: str | None
    rationale: str | None
    gold: str | None
    annotation: Annotation
    student: str | None = None
    """The name of the student that predicted ``student_label``."""
    student_label: str | None = None
    student_probability: float | None = None
    """Of ``student_label``, in [0, 1]."""
    learned_label: str | None = None
    """The label that cross-validated models predict, where confident learning considers the row's
    label a mistake."""
    label_quality: float | None = None
    """The probability of the row's label according to these models."""
    alike: tuple[tuple[str, str], ...] = ()
    """(id, label) of near-duplicates with another label."""
    alike_agreeing: int = 0
    """The number of near-duplicates with the same label."""

    @property
    def is_accepted(self) -> bool:
        return self.annotation.accepted

    @property
    def vote_share(self) -> float | None:
        return self.annotation.vote_share


@dataclass(frozen=True, slots=True)
class QueueItem:
    """A row's place in the queue."""

    row: ReviewRow
    sampled: bool
    """Whether it is in its place as a random row."""
    reasons: list[str] = field(default_factory=list)
    """Why its label may be wrong, as sentences."""


def load_rows(
    recipe: Recipe,
    run: RunFolder,
    split: str = "train",
    *,
    with_student: bool = True,
    progress: Progress | None = None,
) -> list[ReviewRow]:
    """The annotated rows of a split in file order, with all signs of mistakes.

    The run's best student, if there is one, predicts all rows; its predictions are stored. Raises
    UserError where the split is not annotated with this recipe.
    """
    progress = progress or NoProgress()
    task = make_task(recipe.task)
    annotations = run.load_annotations(split, source_fingerprint(recipe, task))
    examples = [row for row in load(recipe, task, split) if row.id in annotations]
    run.check_inputs(annotations, examples, split)
    rows = []
    for example in examples:
        annotation = annotations[example.id]
        label, rationale = proposal(annotation, task)
        text = task.text(example.input)
        rows.append(
            ReviewRow(example.id, example.input, text, label, rationale, example.label, annotation)
        )
    if with_student:
        rows = _with_student(recipe, run, split, rows, examples, progress)
    stored = _signs_of(recipe, task, run.review_signs(split), rows, examples, progress)
    return _with_alike(task, _with_learned_labels(rows, stored.learned), stored.pairs)


def _with_student(
    recipe: Recipe,
    run: RunFolder,
    split: str,
    rows: list[ReviewRow],
    examples: Sequence[Example],
    progress: Progress,
) -> list[ReviewRow]:
    """The rows with the answers of the student with the highest validation accuracy."""
    try:
        student = read_student(run.student(best_student(recipe, run.path).rpartition("/")[2]))
    except UserError:
        return rows
    predictions: dict[str, Prediction] = {}
    path = run.predictions(student.name)
    if split == recipe.eval.split and path.is_file():
        predictions = {
            row_id: prediction
            for row_id, prediction in read_predictions(path).items()
            if prediction.model == student.fingerprint
        }
    if any(row.id not in predictions for row in rows):
        options = recipe.eval.model_copy(update={"rationales": False})
        asking = recipe.model_copy(update={"eval": options})
        path = predict_student(asking, student, examples, run, progress, kind="review")
        predictions = read_predictions(path)
    return [
        replace(
            row,
            student=student.name,
            student_label=predictions[row.id].prediction,
            student_probability=predictions[row.id].probability,
        )
        for row in rows
    ]


class _Signs(BaseModel):
    """Signs of mistakes that take minutes to compute on thousands of rows."""

    mark: str
    """Hash of the rows and settings that they were computed from."""
    learned: dict[str, tuple[str, float, bool]]
    """By id: the label that cross-validated models predict, the probability that they give the
    row's own label, and whether that label is likely a mistake."""
    pairs: list[tuple[int, int]]
    """Indices of near-duplicate rows."""


def _signs_of(
    recipe: Recipe,
    task: Task,
    path: Path,
    rows: Sequence[ReviewRow],
    examples: Sequence[Example],
    progress: Progress,
) -> _Signs:
    """The signs stored in ``path`` if they are of these rows and labels; otherwise new ones."""
    has_cleanlab = importlib.util.find_spec("cleanlab") is not None
    content = [[row.id, row.input, row.label] for row in rows]
    settings = recipe.task.model_dump(mode="json", exclude={"data"})
    mark = digest("1", canonical_json(settings), canonical_json(content), str(has_cleanlab))
    with suppress(OSError, ValueError):
        stored = _Signs.model_validate_json(path.read_text(encoding="utf-8"))
        if stored.mark == mark:
            return stored
    learned = {}
    if has_cleanlab:
        learned = _learned_labels(recipe, task, rows, examples, progress)
    else:
        progress.say("confident learning is skipped: it needs `pip install 'dsbs[review]'`")
    new = _Signs(mark=mark, learned=learned, pairs=near_pairs(examples, task))
    write_json(path, new.model_dump())
    return new


def _learned_labels(
    recipe: Recipe,
    task: Task,
    rows: Sequence[ReviewRow],
    examples: Sequence[Example],
    progress: Progress,
) -> dict[str, tuple[str, float, bool]]:
    """Empty for tasks without a closed label set, and where it would take too long."""
    from dsbs.evaluation.tfidf import learned_labels

    pairs = [
        (example, row.label)
        for example, row in zip(examples, rows, strict=True)
        if row.label is not None
    ]
    if not task.head_labels or len({label for _, label in pairs}) < 2:
        return {}
    if sum(len(row.text) for row in rows) * (len(task.head_labels) + 20) > _MAX_COST:
        progress.say("confident learning is skipped: too many rows and labels")
        return {}
    progress.say(f"cross-validating the labels of {len(pairs):,} rows to find likely mistakes")
    student = next(iter(recipe.students.values()))
    return learned_labels(FloorInputs(student, task, [], train=pairs), _FOLDS)


def _with_learned_labels(
    rows: Sequence[ReviewRow], learned: Mapping[str, tuple[str, float, bool]]
) -> list[ReviewRow]:
    return [
        replace(
            row,
            learned_label=learned[row.id][0] if learned[row.id][2] else None,
            label_quality=learned[row.id][1],
        )
        if row.id in learned
        else row
        for row in rows
    ]


def _with_alike(
    task: Task, rows: Sequence[ReviewRow], pairs: Iterable[tuple[int, int]]
) -> list[ReviewRow]:
    alike: dict[int, list[tuple[str, str]]] = {}
    agreeing: Counter[int] = Counter()
    for first, second in pairs:
        label, other = rows[first].label, rows[second].label
        if label is None or other is None:
            continue
        if task.correct(label, other):
            agreeing.update((first, second))
            continue
        alike.setdefault(first, []).append((rows[second].id, other))
        alike.setdefault(second, []).append((rows[first].id, label))
    return [
        replace(row, alike=tuple(alike[index]), alike_agreeing=agreeing[index])
        if index in alike
        else row
        for index, row in enumerate(rows)
    ]


# --- signs of mistakes


def signs(row: ReviewRow, task: Task) -> list[tuple[float, str]]:
    """Why a row's label may be wrong: (weight in (0, 1], sentence), by decreasing weight."""
    weighted = []
    label = row.label
    if _gold_differs(row, task):
        weighted.append((_GOLD_DIFFERS, f"gold is {row.gold}"))
    own_label = row.annotation.own_label
    if label is not None and own_label is not None and not task.correct(own_label, label):
        sentence = f"the teacher said {own_label} before it was given the gold label"
        weighted.append((_GOLD_DIFFERS, sentence))
    if label is not None and _student_differs(row, task):
        probability = row.student_probability
        sure = "" if probability is None else f" ({percent(probability)} sure)"
        weighted.append(
            (
                _SURE if probability is None else probability,
                f"the student says {row.student_label}{sure}",
            )
        )
    if row.learned_label is not None and row.label_quality is not None:
        sentence = f"rows like it are {row.learned_label}"
        if label is not None and task.correct(row.learned_label, label):
            sentence = "rows like it have other labels"
        sentence += f"; {label} has a probability of {percent(row.label_quality)}"
        weighted.append((1 - row.label_quality, sentence))
    share = row.vote_share
    if share is not None and share < _LOW_VOTE:
        weighted.append((1 - share, f"only {percent(share)} of the teacher's votes"))
    if row.alike:
        names = [f"{row_id} ({other})" for row_id, other in row.alike[:3]]
        share = len(row.alike) / (len(row.alike) + row.alike_agreeing)
        sentence = f"nearly the same text as {sentence_list(names)}"
        weighted.append((_DUPLICATE_DIFFERS * share, sentence))
    return sorted(weighted, key=lambda sign: -sign[0])


def _student_differs(row: ReviewRow, task: Task) -> bool:
    """Whether the student predicts another label and is sure of it."""
    if row.student_label is None or row.label is None:
        return False
    if row.student_probability is not None and row.student_probability < _SURE:
        return False
    return not task.correct(row.student_label, row.label)


# --- filters and order


def _gold_differs(row: ReviewRow, task: Task) -> bool:
    return row.gold is not None and row.label is not None and not task.correct(row.label, row.gold)


FILTERS: dict[str, tuple[str, Callable[[ReviewRow, Task], bool]]] = {
    "gold-differs": ("the label is not the gold label", _gold_differs),
    "student-differs": ("the student is sure of another label", _student_differs),
    "unlikely": (
        "confident learning considers the label a mistake",
        lambda row, _: row.learned_label is not None,
    ),
    "low-vote": (
        "the teacher's replies disagree",
        lambda row, _: row.vote_share is not None and row.vote_share < _LOW_VOTE,
    ),
    "duplicates": ("nearly the same text has another label", lambda row, _: bool(row.alike)),
    "not-accepted": ("the annotation is not used", lambda row, _: not row.is_accepted),
}
"""By name: which rows pass, as a phrase and as a function."""


def ordered(
    rows: Sequence[ReviewRow],
    task: Task,
    *,
    order: Order = "mistakes",
    only: Iterable[str] = (),
    label: str | None = None,
    reviews: Reviews | None = None,
    reviewer: str | None = None,
) -> list[QueueItem]:
    """The rows in the order in which they are reviewed; decided ones are at the end.

    ``mistakes``: by the sum of the weights of their ``signs``; every fifth row is the next one of
    the random sample, from which the teacher's accuracy is estimated. ``random``: the random
    sample, then the other rows at random. ``only``: names of ``FILTERS``, all of which a row must
    pass; ``label``: the label that it must have. With either, no row counts as random: it would be
    random among the selected rows only. ``reviewer``: whose decisions count, skipped rows included.
    None: anybody's.
    """
    for name in only:
        if name not in FILTERS:
            raise UserError(f"no filter {name!r}", hint=f"use {', '.join(FILTERS)}")
    selected = [
        row
        for row in rows
        if all(FILTERS[name][1](row, task) for name in only)
        and (label is None or (row.label is not None and task.correct(row.label, label)))
    ]
    is_selection = bool(only) or label is not None
    decided = {row.id for row in selected if _is_decided(row.id, reviews or {}, reviewer)}
    by_id = {row.id: row for row in selected}
    rank = {row_id: number for number, row_id in enumerate(random_order(by_id))}
    weighted = {row.id: signs(row, task) for row in selected}
    sample = random_sample(row.annotation for row in selected)
    random_ids = [row_id for row_id in sample if by_id[row_id].label is not None]
    waiting = [row.id for row in selected if row.id not in decided]
    sampled: set[str] = set()
    if order == "random":
        labeled = [row_id for row_id in rank if by_id[row_id].label is not None]
        positions = {i: n for n, i in enumerate(dict.fromkeys([*random_ids, *labeled]))}
        waiting.sort(key=lambda row_id: positions.get(row_id, len(positions)))
        sampled = set() if is_selection else set(random_ids)
    elif order == "mistakes":
        weights = {
            row_id: sum(weight for weight, _ in of_row) for row_id, of_row in weighted.items()
        }
        waiting.sort(key=lambda row_id: (-weights[row_id], rank[row_id]))
        if not is_selection:
            still = set(waiting)
            waiting, sampled = _mixed(waiting, [i for i in random_ids if i in still])
    waiting += [row.id for row in selected if row.id in decided]
    return [
        QueueItem(by_id[row_id], row_id in sampled, [sentence for _, sentence in weighted[row_id]])
        for row_id in waiting
    ]


def _mixed(likely: Sequence[str], random_ids: Sequence[str]) -> tuple[list[str], set[str]]:
    """``likely`` with every fifth place given to the next random row, and the rows of these."""
    mixed: dict[str, None] = {}
    sampled = set()
    next_likely, next_random = iter(likely), iter(random_ids)
    while len(mixed) < len(likely):
        is_random = len(mixed) % RANDOM_EVERY == RANDOM_EVERY - 1
        source = next_random if is_random else next_likely
        row_id = next((i for i in source if i not in mixed), None)
        if row_id is None:  # no random row is left: not every row is one
            row_id = next(i for i in next_likely if i not in mixed)
            is_random = False
        mixed[row_id] = None
        if is_random:
            sampled.add(row_id)
    return list(mixed), sampled


def _is_decided(row_id: str, reviews: Reviews, reviewer: str | None) -> bool:
    of_row = reviews.get(row_id, ())
    if reviewer is None:
        return deciding_review(of_row) is not None
    return reviewer in current_reviews(of_row)
