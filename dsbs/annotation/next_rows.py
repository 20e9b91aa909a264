"""Next rows: active learning chooses the unlabeled train rows to annotate.

A share of each round comes from a fixed random order of all rows. The beginning of that order is a
random sample whatever else is chosen, so estimates on it are unbiased. The other rows are chosen by
the newest student's uncertainty, by diversity, or by both:

    uncertainty  1 minus the margin of the two most likely labels (Scheffer et al., 2001)
    diversity    for each k-means cluster of the pooled states, the row nearest to its center
    both         diversity among the most uncertain rows, weighted by uncertainty (Zhdanov, 2019,
                 arXiv:1901.05954)

A round is written to ``annotate/next.json`` before its first request, so that the same command
continues it after a kill.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.annotation.annotator import Annotator
from dsbs.annotation.backends import teacher_class
from dsbs.annotation.store import open_store
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.files import now
from dsbs.formatting import count
from dsbs.progress import NoProgress, Progress, running
from dsbs.prompting import source_fingerprint
from dsbs.records import Example, NextRound, NextRounds, TrainedStudent
from dsbs.run_folder import RunFolder, read_annotations
from dsbs.students.formats import PAIR_SEPARATOR
from dsbs.students.student import Answer, Student
from dsbs.students.weights import EMBEDDED_ENCODER, device, expand_local
from dsbs.tasks import Task, make_task
from dsbs.tasks.data import comparable, is_held_out, load, position

Floats = NDArray[np.float32]
MAX_COMPARED = 20_000  # unlabeled rows, a random part of a larger pool
_UNCERTAIN = 10  # `both` chooses among this many times as many most uncertain rows
_TFIDF_DIMENSIONS = 128
_BATCH = 64


def choose(
    recipe: Recipe,
    number: int,
    *,
    out: str | Path | None = None,
    write: bool = True,
    progress: Progress | None = None,
) -> NextRounds:
    """Choose ``number`` train rows as the run's next round, which ``annotate`` then annotates.

    If the last round's rows are not all annotated, it is continued and nothing new is chosen. With
    ``write`` False nothing is stored. Returns all rounds, the new one last. Raises UserError if no
    row is left or the recipe's student does not exist.
    """
    progress = progress or NoProgress()
    if "train" not in recipe.annotate.splits:
        raise UserError(
            "--next chooses train rows, but annotate.splits does not include train",
            hint="add train to annotate.splits",
        )
    run = RunFolder.of(recipe, out)
    with run.lock("annotate") if write else nullcontext():
        rounds = run.next_rounds()
        if rounds.unfinished is not None:
            rows = count(len(rounds.unfinished.rows), "row")
            progress.say(f"next: continuing the last round of {rows}, which is not fully annotated")
            return rounds
        entries = list(rounds.rounds)
        if not entries:
            earlier = _annotated_before(recipe, run)
            if earlier:
                entries = [NextRound(by="earlier", rows=earlier, started=now(), done=True)]
        rounds = NextRounds(rounds=tuple(entries))
        entry = _Choice(recipe, run, rounds, progress).make(number)
        progress.say(_sentence(entry))
        rounds = NextRounds(rounds=(*entries, entry))
        if write:
            run.write_next_rounds(rounds)
    return rounds


def finish_round(run: RunFolder, *, is_complete: bool) -> None:
    """Mark the last round as done if its rows are annotated: ``choose`` then starts a new one."""
    rounds = run.next_rounds()
    if is_complete and rounds.unfinished is not None:
        last = rounds.unfinished.model_copy(update={"done": True})
        run.write_next_rounds(NextRounds(rounds=(*rounds.rounds[:-1], last)))


def remaining(recipe: Recipe, task: Task, rounds: NextRounds) -> int | None:
    """The number of rows that ``choose`` can still choose. None: there is no round."""
    if not rounds.rounds:
        return None
    return sum(not rounds.has(row) for rows in _choosable(recipe, task) for row in rows)


def _choosable(recipe: Recipe, task: Task) -> tuple[list[Example], list[Example]]:
    """The train rows, and the rows held out for validation if they need the teacher's labels.

    Served rows are in neither, as they are always annotated.
    """
    rows = [row for row in load(recipe, task, "train") if not row.is_served]
    held_out = [row for row in rows if is_held_out(recipe, row)]
    if any(row.label is not None for row in held_out):
        held_out = []  # validation uses their gold labels
    return [row for row in rows if not is_held_out(recipe, row)], held_out


def _annotated_before(recipe: Recipe, run: RunFolder) -> tuple[str, ...]:
    """The train rows that already have a reply, also from a pilot."""
    annotator = Annotator(recipe)
    rows = annotator.examples("train")
    if teacher_class(recipe.teacher.kind).is_asked:
        if not run.replies.is_file():
            return ()
        with open_store(run) as store:
            return tuple(
                row.id
                for row in rows
                if not row.is_served
                and any(
                    sample.reason != "no-reply"
                    for sample in annotator.stored_replies(store, row).samples
                )
            )
    path = run.annotations("train")
    fingerprint = source_fingerprint(recipe, annotator.task)
    if not path.is_file() or run.manifest("annotate").get("source") != fingerprint:
        return ()
    annotated = {row.id for row in read_annotations(path) if row.reject_reason != "no-reply"}
    return tuple(row.id for row in rows if row.id in annotated and not row.is_served)


def _sentence(entry: NextRound) -> str:
    """How many rows were chosen, and by which criteria."""
    random = len(set(entry.random) & set(entry.rows))
    text = f"next: {count(len(entry.rows), 'row')} of {entry.unlabeled:,} without an annotation"
    if entry.by == "random":
        return f"{text}, at random"
    by = "uncertainty and diversity" if entry.by == "both" else entry.by
    sources = []
    if entry.student is not None and entry.by != "diversity":
        sources.append(f"the answers of {entry.student}")
    if entry.states is not None:
        sources.append(f"the states of {entry.states}".replace("the states of TF-IDF", "TF-IDF"))
    text += f": {random:,} at random, {len(entry.rows) - random:,} by {by}"
    if sources:
        text += f" ({' and '.join(sources)})"
    if entry.student is None:
        text += "; the run has no student yet"
    return text


@dataclass(frozen=True, slots=True)
class _Student:
    """A student of the run and the uncertainty of its predictions."""

    record: TrainedStudent
    student: Student

    def uncertainty(self, rows: Sequence[Example]) -> Floats | None:
        """(rows,), in [0, 1]; None: its answers have no probability."""
        answers = self.student.predict(
            [row.input for row in rows],
            canonical=True,
            batch_size=_BATCH,
            score_labels=self.student.has_distribution,
        )
        confidences = [
            self._confidence(answer, row) for answer, row in zip(answers, rows, strict=True)
        ]
        if all(value is None for value in confidences):
            return None
        return np.array([1 - (value or 0.0) for value in confidences], dtype=np.float32)

    def _confidence(self, answer: Answer, row: Example) -> float | None:
        several = self.student.task.has_several_labels
        return self.student.confidence(answer, row.input, "probability" if several else "margin")


class _Choice:
    """One round's choice."""

    def __init__(
        self, recipe: Recipe, run: RunFolder, rounds: NextRounds, progress: Progress
    ) -> None:
        self._recipe = recipe
        self._section = recipe.annotate.next
        self._run = run
        self._progress = progress
        self._task: Task = make_task(recipe.task)
        train, valid = _choosable(recipe, self._task)
        self._train = self._in_order(train)
        self._valid = self._in_order(valid)
        self._annotated = frozenset(rounds.chosen)

    def _in_order(self, rows: list[Example]) -> list[Example]:
        """Rows in the fixed random order."""
        return sorted(rows, key=lambda row: position(row.id, f"next-{self._section.seed}"))

    def make(self, number: int) -> NextRound:
        """Choose ``number`` rows, or all that are left. Raises UserError if none is left."""
        unlabeled = {
            row.id for row in (*self._train, *self._valid) if row.id not in self._annotated
        }
        if not unlabeled:
            raise UserError(
                "every train row is annotated; --next has no row to choose",
                hint="add rows to task.data.train, or start a new run (--out)",
            )
        number = min(number, len(unlabeled))
        share = len(self._valid) / (len(self._valid) + len(self._train))
        to_train_on = sum(row.id in unlabeled for row in self._train)
        to_validate = max(round(share * number), number - to_train_on)
        valid, valid_sample = self._sample(self._valid, to_validate)
        rest = number - len(valid)
        by = self._section.by
        at_random = rest if by == "random" else math.ceil(self._section.random_share * rest)
        random, sample = self._sample(self._train, at_random)
        taken = self._annotated | {row.id for row in random}
        number -= len(valid) + len(random)
        pool = [row for row in self._train if row.id not in taken][: max(MAX_COMPARED, number)]
        chosen: list[Example] = []
        how: dict[str, Any] = {"by": by}
        if number and by != "random":
            chosen, how = self._most_useful(pool, min(number, len(pool)))
        return NextRound(
            rows=tuple(row.id for row in (*valid, *random, *chosen)),
            random=(*valid_sample, *sample),
            seed=self._section.seed,
            unlabeled=len(unlabeled),
            compared=len(pool) if chosen else 0,
            started=now(),
            **how,
        )

    def _sample(self, rows: Sequence[Example], number: int) -> tuple[list[Example], list[str]]:
        """The next ``number`` rows of the random order that are not annotated, and the ids of all
        rows up to the last of these, which are a random sample.
        """
        new: list[Example] = []
        ids = []
        for row in rows:
            if len(new) == number:
                break
            ids.append(row.id)
            if row.id not in self._annotated:
                new.append(row)
        return new, ids

    def _most_useful(
        self, pool: list[Example], number: int
    ) -> tuple[list[Example], dict[str, Any]]:
        """``number`` rows of ``pool``, and the round's fields on how they were chosen."""
        current = self._student()
        by = self._section.by
        uncertainty = None
        if current is not None and by != "diversity":
            with running(self._progress, "predicting with the student", None):
                uncertainty = current.uncertainty(pool)
            if uncertainty is None:
                self._progress.say(
                    f"next: the answers of {current.record.name} have no probability; the rows are "
                    "chosen by diversity"
                )
        how: dict[str, Any] = {"by": by if uncertainty is not None else "diversity"}
        if current is not None:
            how |= {"student": current.record.name, "fingerprint": current.record.fingerprint}
        if uncertainty is not None:
            pool, uncertainty = self._distinct(pool, uncertainty)
            if by == "uncertainty":
                return pool[:number], how
            if by == "both":
                pool = pool[: _UNCERTAIN * number]
        with running(self._progress, "clustering the rows", None):
            states, how["states"] = self._states(current, pool)
            weights = np.ones(len(pool), dtype=np.float32)
            if uncertainty is not None:
                weights = uncertainty[: len(pool)]
            indices = clustered(states, weights, number, self._section.seed)
        return [pool[index] for index in indices], how

    def _distinct(
        self, pool: Sequence[Example], uncertainty: Floats
    ) -> tuple[list[Example], Floats]:
        """The rows by decreasing uncertainty, with their uncertainty. Repeated inputs come last, so
        that no label is bought twice while there are other rows.
        """
        inputs: set[tuple[str, ...]] = set()
        repeated = np.zeros(len(pool), dtype=np.bool_)
        order = np.argsort(-uncertainty, kind="stable")
        for index in order:
            content = comparable(pool[index].input)
            repeated[index] = content in inputs
            inputs.add(content)
        order = np.lexsort((-uncertainty, repeated))
        return [pool[index] for index in order], uncertainty[order]

    def _student(self) -> _Student | None:
        """The student that the recipe names, or the run's newest; None: there is none."""
        name = self._section.student
        students = {record.name: record for record in self._run.students()}
        if name is not None and name not in students:
            names = ", ".join(students) or "none"
            raise UserError(
                f"annotate.next.student: {self._run.path} has no student {name} ({names})",
                hint="use a trained student, or leave the key out for the newest",
            )
        if name is None and students:
            name = max(students, key=lambda name: self._run.trained_at(students[name]))
        if name is None:
            return None
        record = students[name]
        return _Student(record, Student.load(record.path))

    def _states(self, current: _Student | None, rows: Sequence[Example]) -> tuple[Floats, str]:
        """States of unit length, (rows, D), and the name of their model."""
        if current is not None:
            states = current.student.pooled_states([row.input for row in rows], _BATCH)
            return _unit(states), current.record.name
        texts = [self._task.text(row.input).replace(PAIR_SEPARATOR, " ") for row in rows]
        try:
            return _unit(_encoder_states(texts)), EMBEDDED_ENCODER
        except UserError:  # it is not installed
            return _unit(_tfidf_states(texts, self._section.seed)), "TF-IDF"


# --- states


def _encoder_states(texts: Sequence[str]) -> Floats:
    """The mean states of the embedded encoder, (texts, D). Raises UserError where it is missing."""
    source = expand_local(EMBEDDED_ENCODER)
    import torch

    from dsbs.students.heads import load_body, mean_states
    from dsbs.students.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source)
    body = load_body(source).to(device()).eval()
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    states: dict[int, Floats] = {}
    for first in range(0, len(order), _BATCH):
        batch = order[first : first + _BATCH]
        encoded = tokenizer(
            [texts[index] for index in batch],
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        ).to(device())
        with torch.inference_mode():
            output = body(**encoded).last_hidden_state
            vectors = mean_states(output, encoded["attention_mask"]).float().cpu().numpy()
        states.update(zip(batch, vectors, strict=True))
    return np.stack([states[index] for index in range(len(texts))])


def _tfidf_states(texts: Sequence[str], seed: int) -> Floats:
    """TF-IDF of words, reduced to a few dimensions: (texts, D)."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    features = TfidfVectorizer(token_pattern=r"\w+|[^\w\s]", sublinear_tf=True).fit_transform(texts)
    if features.shape[1] <= _TFIDF_DIMENSIONS:
        return np.asarray(features.toarray(), dtype=np.float32)
    reduced = TruncatedSVD(_TFIDF_DIMENSIONS, random_state=seed).fit_transform(features)
    return np.asarray(reduced, dtype=np.float32)


def _unit(states: Floats) -> Floats:
    lengths = np.linalg.norm(states, axis=1, keepdims=True)
    return np.asarray(states / np.maximum(lengths, 1e-12), dtype=np.float32)


def clustered(states: Floats, weights: Floats, number: int, seed: int) -> list[int]:
    """Weighted k-means: for each of ``number`` clusters, the index of the row nearest to its
    center. ``states`` (rows, D), ``weights`` (rows,).
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if number == len(states):
        return list(range(number))
    model = KMeans(number, n_init=1, max_iter=20, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        model.fit(states, sample_weight=weights + 1e-6)
    distances = model.transform(states)
    indices: list[int] = []
    for cluster in range(number):
        column = distances[:, cluster].copy()
        column[indices] = np.inf  # each row once, also where a cluster is empty
        indices.append(int(column.argmin()))
    return indices
