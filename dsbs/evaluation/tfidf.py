"""The floor `tfidf`: a linear model, or the nearest neighbor, on words and characters.

Its regularization is the best of a few on valid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.bootstrap import Floats
from dsbs.evaluation.floors import (
    Floor,
    FloorAnswer,
    FloorInputs,
    learned_identity,
    predict_majority,
)
from dsbs.records import Example
from dsbs.tasks import Task
from dsbs.tasks.data import position

# Inverse strengths of the regularization, the strongest first.
_STRENGTHS = (0.1, 1.0, 10.0, 100.0)
_DEFAULT_STRENGTH = 1.0  # without labels to choose by
_THRESHOLD = 0.5  # of the probability of one of several labels
_ROWS_TOGETHER = 10_000  # answered in one matrix


def _predict(inputs: FloorInputs) -> list[FloorAnswer]:
    """Logistic regression, one for each label where a row has several; ridge regression for scores;
    the answer to the nearest train row for fields.
    """
    task = inputs.task
    if len({label for _, label in inputs.train}) < 2:
        return predict_majority(inputs)
    if task.has_several_labels:
        return list(_several_labels(inputs))
    if task.has_order:
        return list(_scores(inputs))
    if task.part_names:
        return list(_nearest(inputs))
    return list(_classes(inputs))


def _classes(inputs: FloorInputs) -> Iterator[FloorAnswer]:
    """Multinomial logistic regression."""
    labels = [label for _, label in inputs.train]
    features = _Features(inputs)
    best = _best_on_valid(
        features,
        inputs,
        lambda train, strength: _logistic(train, labels, strength),
        lambda model, valid, gold: float(model.score(valid, gold)),
    )
    classes = best.classes_.tolist()
    for texts in _row_batches(inputs):
        for shares in best.predict_proba(features.of(texts)).tolist():
            distribution = dict.fromkeys(inputs.task.labels or (), 0.0)
            distribution |= dict(zip(classes, shares, strict=True))
            yield FloorAnswer(max(distribution, key=distribution.__getitem__), distribution)


def _several_labels(inputs: FloorInputs) -> Iterator[FloorAnswer]:
    """A logistic regression for each label; the labels with a probability of at least .5.

    The strength with the highest share of right parts on valid. A label that all train rows have,
    or none, keeps that share of 1 or 0.
    """
    names = inputs.task.head_labels
    gold = _label_matrix(inputs, [label for _, label in inputs.train])
    features = _Features(inputs)

    def quality(models: list[Any], valid: Any, labels: Sequence[str]) -> float:
        is_chosen = _probabilities(models, valid) >= _THRESHOLD
        return float((is_chosen == _label_matrix(inputs, labels)).mean())

    models = _best_on_valid(
        features,
        inputs,
        lambda train, strength: _one_for_each(train, gold, strength),
        quality,
    )
    for rows in _row_batches(inputs):
        for shares in _probabilities(models, features.of(rows)):
            distribution = dict(zip(names, shares.tolist(), strict=True))
            yield FloorAnswer(inputs.task.choose(names, shares.tolist()), distribution)


def _one_for_each(train: Any, gold: NDArray[np.bool_], strength: float) -> list[Any]:
    """A model for each label, or the share of the rows with it where that is 0 or 1."""
    return [
        float(column[0]) if column.min() == column.max() else _logistic(train, column, strength)
        for column in gold.T
    ]


def _label_matrix(inputs: FloorInputs, labels: Sequence[str]) -> NDArray[np.bool_]:
    """(rows, labels): whether a row has a label."""
    return np.array([inputs.task.head_targets(label) for label in labels], dtype=np.bool_)


def _probabilities(models: Sequence[Any], features: Any) -> Floats:
    """(rows, labels)"""
    columns = [
        np.full(features.shape[0], model)
        if isinstance(model, float)
        else model.predict_proba(features)[:, list(model.classes_).index(True)]
        for model in models
    ]
    return np.stack(columns, axis=1)


def _scores(inputs: FloorInputs) -> Iterator[FloorAnswer]:
    """Ridge regression, rounded to the nearest point of the scale."""
    from sklearn.linear_model import Ridge

    task = inputs.task
    labels = list(task.labels or ())
    points = np.array([task.number(label) for label in labels], dtype=np.float64)
    targets = np.array([task.number(label) for _, label in inputs.train], dtype=np.float64)
    features = _Features(inputs)

    def fit(train: Any, strength: float) -> Any:
        return Ridge(alpha=1 / strength).fit(train, targets)

    def quality(model: Any, valid: Any, gold: Sequence[str]) -> float:
        numbers = np.array([task.number(label) for label in gold], dtype=np.float64)
        return -float(np.abs(model.predict(valid) - numbers).mean())

    model = _best_on_valid(features, inputs, fit, quality)
    for rows in _row_batches(inputs):
        numbers = model.predict(features.of(rows))
        for nearest in np.abs(numbers[:, None] - points).argmin(axis=1):
            yield FloorAnswer(labels[nearest])


def _nearest(inputs: FloorInputs) -> Iterator[FloorAnswer]:
    """The label of the train row with the highest cosine of TF-IDF, the first at a tie."""
    from sklearn.preprocessing import normalize

    features = _Features(inputs)
    train = normalize(features.fit([row for row, _ in inputs.train]))
    for rows in _row_batches(inputs, 500):
        similarities = (normalize(features.of(rows)) @ train.T).toarray()
        for nearest in similarities.argmax(axis=1):
            yield FloorAnswer(inputs.train[nearest][1])


def cross_validated(inputs: FloorInputs, folds: int) -> Floats:
    """(train rows, labels): the probability of each label according to models that did not learn
    from the row, in the order of ``inputs.task.head_labels``.

    Logistic regression of the default strength; where a row has several labels, one for each.
    """
    task = inputs.task
    names = list(task.head_labels)
    shares = np.zeros((len(inputs.train), len(names)))
    features = _Features(inputs).fit([row for row, _ in inputs.train])  # which use no labels
    fold_of = np.array([int(position(row.id, "fold") * folds) for row, _ in inputs.train])
    for fold in range(folds):
        rest = np.flatnonzero(fold_of != fold)
        held_out = np.flatnonzero(fold_of == fold)
        labels = [inputs.train[index][1] for index in rest.tolist()]
        if not len(held_out) or len(set(labels)) < 2:
            continue
        train = features[rest]
        if task.has_several_labels:
            models = _one_for_each(train, _label_matrix(inputs, labels), _DEFAULT_STRENGTH)
            shares[held_out] = _probabilities(models, features[held_out])
        else:
            model = _logistic(train, labels, _DEFAULT_STRENGTH)
            columns = np.array([names.index(name) for name in model.classes_])
            shares[held_out[:, None], columns] = model.predict_proba(features[held_out])
    return shares


def learned_labels(inputs: FloorInputs, folds: int) -> dict[str, tuple[str, float, bool]]:
    """Confident learning (Northcutt, Jiang and Chuang, 2021) on the train rows, cross-validated.

    By id: the label of models that did not learn from the row, the probability that they give the
    row's own label, and whether that label is likely a mistake. Needs cleanlab.
    """
    task = inputs.task
    shares = cross_validated(inputs, folds)
    issues, quality = _label_issues(task, [label for _, label in inputs.train], shares)
    return {
        row.id: (task.choose(task.head_labels, of_row.tolist()), float(probability), bool(is_issue))
        for (row, _), of_row, probability, is_issue in zip(
            inputs.train, shares, quality, issues, strict=True
        )
    }


def _label_issues(task: Task, labels: Sequence[str], shares: Any) -> tuple[Any, Any]:
    """(rows,) whether a label is likely wrong, and (rows,) how likely it is right."""
    if task.has_several_labels:
        from cleanlab.multilabel_classification import get_label_quality_scores
        from cleanlab.multilabel_classification.filter import find_label_issues as issues_of_sets

        sets = [np.flatnonzero(task.head_targets(label)).tolist() for label in labels]
        issues = issues_of_sets(sets, shares, n_jobs=1)
        return issues, get_label_quality_scores(sets, shares)
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores as quality_scores

    used = sorted(set(labels), key=task.head_labels.index)
    columns = [task.head_labels.index(name) for name in used]
    shares = np.clip(shares[:, columns], 1e-6, None)
    shares /= shares.sum(axis=1, keepdims=True)
    numbers = np.array([used.index(label) for label in labels])
    issues = find_label_issues(numbers, shares, n_jobs=1)
    return issues, quality_scores(numbers, shares)


def _best_on_valid(
    features: _Features,
    inputs: FloorInputs,
    fit: Callable[[Any, float], Any],
    quality: Callable[[Any, Any, Sequence[str]], float],
) -> Any:
    """Fit on the train rows with each strength; the model of the highest quality on valid."""
    train = features.fit([row for row, _ in inputs.train])
    if not inputs.valid:
        return fit(train, _DEFAULT_STRENGTH)
    models = [fit(train, strength) for strength in _STRENGTHS]
    valid = features.of([row for row, _ in inputs.valid])
    gold = [label for _, label in inputs.valid]
    return max(models, key=lambda model: quality(model, valid, gold))


def _row_batches(inputs: FloorInputs, size: int = _ROWS_TOGETHER) -> Iterator[Sequence[Example]]:
    for first in range(0, len(inputs.rows), size):
        yield inputs.rows[first : first + size]


class _Features:
    """Words and pairs of words, and sequences of two to four characters within words.

    The texts of a pair have features of their own: a word of the hypothesis is not that of the
    premise.
    """

    def __init__(self, inputs: FloorInputs) -> None:
        self._inputs = inputs
        self._is_pair = all(len(inputs.texts(row)) > 1 for row, _ in inputs.train)
        self._unions: list[Any] = []  # one for each text of a row

    def fit(self, rows: Sequence[Example]) -> Any:
        """Learn the features of ``rows``, and return them: (rows, features), sparse."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.pipeline import make_union

        self._unions = [
            make_union(
                TfidfVectorizer(
                    token_pattern=r"\w+|[^\w\s]", ngram_range=(1, 2), sublinear_tf=True
                ),
                TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True),
            ).fit(column)
            for column in self._columns(rows)
        ]
        return self.of(rows)

    def of(self, rows: Sequence[Example]) -> Any:
        """The features of ``rows``, (rows, features), sparse."""
        from scipy.sparse import hstack

        columns = self._columns(rows)
        parts = [
            union.transform(column) for union, column in zip(self._unions, columns, strict=True)
        ]
        return hstack(parts).tocsr()

    def _columns(self, rows: Sequence[Example]) -> list[list[str]]:
        """The texts of all rows: their first and second ones, or both joined."""
        texts = [self._inputs.texts(row) for row in rows]
        if not self._is_pair:
            return [[" ".join(parts) for parts in texts]]
        return [[parts[0] for parts in texts], [" ".join(parts[1:]) for parts in texts]]


def _logistic(features: Any, labels: Sequence[str] | NDArray[np.bool_], strength: float) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # its accuracy has long settled
        return LogisticRegression(C=strength, tol=1e-3, max_iter=200).fit(features, labels)


TFIDF = Floor(
    title="TF-IDF with logistic regression",
    source="logistic regression on TF-IDF of words, pairs of words and 2 to 4 characters (one for "
    "each label where a row has several, ridge regression for scores, the nearest train row's "
    "answer for fields); its regularization is chosen on valid",
    learns=True,
    reads_field=True,
    needs_labels=True,
    identity=learned_identity,
    predict=_predict,
)
