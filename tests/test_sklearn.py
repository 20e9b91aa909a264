"""`dsbs.sklearn.DistilledClassifier`: scikit-learn's own checks, and what users do with one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import TEAMS, good_answer, toy_rows
from label_heads import save_encoder
from loopback import LoopbackServer
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator

from dsbs import UserError, load_recipe
from dsbs.sklearn import DistilledClassifier

TEXTS = [row["text"] for row in toy_rows(40)]
LABELS = [row["team"] for row in toy_rows(40)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    model = save_encoder(tmp_path_factory.mktemp("model") / "encoder")
    return {"model": str(model), "max_input_tokens": 24, "max_target_tokens": 12}


@pytest.fixture
def classifier(encoder: dict[str, Any]) -> Callable[..., DistilledClassifier]:
    def make(**changes: Any) -> DistilledClassifier:
        return DistilledClassifier(encoder, **{"max_steps": 1, "batch_size": 8, **changes})

    return make


@pytest.fixture(scope="module")
def fitted(encoder: dict[str, Any]) -> DistilledClassifier:
    model = DistilledClassifier(encoder, max_steps=30, batch_size=16, learning_rate=0.01)
    return model.fit(TEXTS, LABELS)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
def test_all_of_scikit_learns_checks_pass(classifier: Callable[..., DistilledClassifier]) -> None:
    """None is expected to fail. Their data are numbers, which are read as fields; what is learned
    from them is not checked (the tag poor_score)."""
    results = check_estimator(
        classifier(), expected_failed_checks={}, on_skip=None, on_fail="raise"
    )
    assert sum(result["status"] == "passed" for result in results) > 45


def test_it_learns_and_gives_probabilities_in_the_order_of_its_classes(
    fitted: DistilledClassifier,
) -> None:
    shares = fitted.predict_proba(np.array(TEXTS))
    assert fitted.classes_.tolist() == sorted(TEAMS) and shares.shape == (40, 2)
    assert shares.sum(axis=1) == pytest.approx(1)
    assert fitted.predict(pd.Series(TEXTS)).tolist() == LABELS
    assert fitted.classes_[shares.argmax(axis=1)].tolist() == LABELS
    assert fitted.score(TEXTS, LABELS) == 1


def test_a_pickle_has_the_student_and_a_clone_has_only_the_settings(
    fitted: DistilledClassifier, tmp_path: Path
) -> None:
    joblib.dump(fitted, tmp_path / "model.joblib")
    for copy in (pickle.loads(pickle.dumps(fitted)), joblib.load(tmp_path / "model.joblib")):
        assert copy.get_params() == fitted.get_params()
        assert copy.predict_proba(TEXTS) == pytest.approx(fitted.predict_proba(TEXTS), abs=1e-6)
    unfitted = clone(fitted)
    assert unfitted.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        pickle.loads(pickle.dumps(unfitted)).predict(TEXTS)


@pytest.mark.parametrize("state", [None, np.random.RandomState(3), np.int64(3)])
def test_the_random_state_is_what_scikit_learn_takes(
    classifier: Callable[..., DistilledClassifier], state: Any
) -> None:
    assert set(classifier(random_state=state).fit(TEXTS, LABELS).predict(TEXTS)) <= set(TEAMS)


def test_it_works_in_a_pipeline_in_cross_validation_and_in_a_search(
    classifier: Callable[..., DistilledClassifier],
) -> None:
    pipeline = make_pipeline(FunctionTransformer(lambda texts: [t.lower() for t in texts]))
    pipeline.steps.append(("model", classifier()))
    assert cross_val_score(pipeline, TEXTS, LABELS, cv=2).shape == (2,)
    search = GridSearchCV(pipeline, {"model__max_steps": [1, 2]}, cv=2).fit(TEXTS, LABELS)
    assert search.best_params_["model__max_steps"] in (1, 2)
    assert set(search.predict(TEXTS[:4])) <= set(TEAMS)


def test_rows_of_fields_and_numbers_as_classes(
    classifier: Callable[..., DistilledClassifier], tmp_path: Path
) -> None:
    frame = pd.DataFrame({"subject": TEXTS, "length": [len(text) for text in TEXTS]})
    classes = [TEAMS.index(label) + 7 for label in LABELS]
    model = classifier(
        out=tmp_path / "run", settings={"train.warmup_steps": 1, "task.description": "Which team?"}
    ).fit(frame, classes)
    predicted = model.predict(frame)
    assert predicted.dtype == np.array(classes).dtype and set(predicted) <= {7, 8}
    assert (model.predict_proba(frame.to_dict("records")) == model.predict_proba(frame)).all()
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert recipe.task.input == "subject: {{ subject }}\nlength: {{ length }}"
    assert (recipe.train.warmup_steps, recipe.task.description) == (1, "Which team?")
    assert classifier().fit(TEXTS, ["one"] * 40).predict(TEXTS[:2]).tolist() == ["one", "one"]


def test_a_teacher_labels_what_has_no_labels_and_is_asked_once(
    classifier: Callable[..., DistilledClassifier], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        teacher = {"model": "loopback", "base_url": server.url}
        model = classifier(teacher=teacher, labels=TEAMS, out=tmp_path / "run", method="distill")
        assert set(model.fit(TEXTS).predict(TEXTS)) <= set(TEAMS)
        model.fit(TEXTS)
        assert server.requests == 40
        with pytest.raises(ValueError, match="out is required"):
            classifier(teacher=teacher, labels=TEAMS).fit(TEXTS)
        with pytest.raises(ValueError, match="without y, labels is required"):
            classifier(teacher=teacher, out=tmp_path).fit(TEXTS)


def test_mistakes_are_explained(classifier: Callable[..., DistilledClassifier]) -> None:
    for arguments, y, message in (
        ({"labels": ["a", "b"]}, LABELS, "a label that is not in labels: billing"),
        ({}, LABELS[:3], "40 rows, and y has 3"),
        ({}, None, "requires y to be passed"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier(**arguments).fit(TEXTS, y)
    with pytest.raises(ValueError, match="no probabilities: use step-by-step"):
        classifier(method="rationale-then-label").fit(TEXTS, LABELS)
    with pytest.raises(ValueError, match="rename the column 'the text'"):
        classifier().fit(pd.DataFrame({"the text": TEXTS}), LABELS)
    with pytest.raises(UserError, match="unknown"):
        classifier(settings={"train.max_step": 3}).fit(TEXTS, LABELS)
