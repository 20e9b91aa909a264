"""scikit-learn classifier: a small model, trained on a teacher's labels or on yours.

    from dsbs.sklearn import DistilledClassifier

    model = DistilledClassifier(max_epochs=5).fit(texts, labels)
    model.predict(["My parcel never came."])
    cross_val_score(model, texts, labels)

``fit`` writes rows and a recipe into a folder and runs ``annotate`` (if there is a teacher) and
``train`` there. This is the only module that imports scikit-learn at the top.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from dsbs.annotation.run import annotate
from dsbs.config.load import load_recipe
from dsbs.files import atomic_write
from dsbs.students.card import SECOND_PART
from dsbs.students.student import Student
from dsbs.training.run import train

Item = str | dict[str, Any]


class DistilledClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A small text classifier, fine-tuned on labels or distilled from a teacher.

    ``X`` is a list, a 1-D array or a Series of texts, or rows of fields: a data frame, a list of
    mappings, or a 2-D array, whose fields are x0, x1, ….
    """

    classes_: NDArray[Any]
    """The labels, sorted; columns of ``predict_proba`` are in this order."""
    student_: Student | None
    """The trained student. None: all rows had one label."""

    def __init__(
        self,
        student: str | Mapping[str, Any] = "minilm-l6",
        *,
        teacher: Mapping[str, Any] | None = None,
        labels: Sequence[Any] | None = None,
        description: str | None = None,
        method: str | None = None,
        max_epochs: float = 10,
        max_steps: int | None = None,
        batch_size: int = 32,
        learning_rate: float | None = None,
        rationale_weight: float = 1.0,
        validation_fraction: float = 0.1,
        settings: Mapping[str, Any] | None = None,
        out: str | Path | None = None,
        random_state: Any = 0,
    ) -> None:
        """The recipe's settings that are tuned most.

        ``student`` is ``student.model`` or the whole section. ``teacher`` is the recipe's section:
        ``{"model": …, "base_url": …, "api_key_env": …}``; None: learn from ``y`` alone. ``labels``
        are the possible labels (None: those in ``y``); ``description`` tells the teacher what to
        decide. ``method`` None: step-by-step with a teacher, finetune without.
        ``max_steps`` overrides ``max_epochs``. ``settings`` are further keys of the recipe
        by their dotted names: ``{"train.warmup_steps": 10}``. ``out`` is the run folder, which
        keeps replies and students (None: a temporary one; a teacher needs one that stays).
        """
        self.student = student
        self.teacher = teacher
        self.labels = labels
        self.description = description
        self.method = method
        self.max_epochs = max_epochs
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.rationale_weight = rationale_weight
        self.validation_fraction = validation_fraction
        self.settings = settings
        self.out = out
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True  # not one_d_array, which means numbers
        tags.input_tags.dict = True
        tags.input_tags.allow_nan = False
        tags.target_tags.required = self.teacher is None
        tags.classifier_tags.poor_score = True  # numbers as texts: the checks' data are clouds
        return tags

    def fit(self, X: Any, y: Any = None) -> Self:  # noqa: N803
        """Annotate ``X`` if there is a teacher, and train on ``y`` or else on its labels.

        Raises ValueError for input that scikit-learn would refuse, UserError for settings that the
        stages refuse, and PartialError where annotation ended early: with ``out``, the same call
        continues.
        """
        items = self._items(X, is_new=True)
        targets = self._targets(y, len(items))
        self.student_ = None
        if len(self.classes_) < 2:
            return self
        if self.method in SECOND_PART:
            raise ValueError(
                f"method {self.method!r} writes label and rationale as one text, which gives the "
                "classes no probabilities: use step-by-step"
            )
        if self.teacher is not None and self.out is None:
            raise ValueError("with a teacher, out is required: a folder for its paid replies")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary if self.out is None else self.out).absolute()
            recipe_file = self._write(folder, items, targets)
            recipe = load_recipe(recipe_file)
            if self.teacher is not None:
                error = annotate(recipe, out=folder).error()
                if error is not None:
                    raise error
            [trained] = train(recipe, out=folder).students
            self.student_ = Student.load(trained.path)
        return self

    def predict(self, X: Any) -> NDArray[Any]:  # noqa: N803
        """The likeliest class of each row, (rows,)."""
        best = self.predict_proba(X).argmax(axis=1)
        classes: NDArray[Any] = self.classes_[best]
        return classes

    def predict_proba(self, X: Any) -> NDArray[np.float64]:  # noqa: N803
        """The probability of each class, (rows, classes), calibrated on the validation rows."""
        check_is_fitted(self, "classes_")
        items = self._items(X)
        if self.student_ is None:
            return np.ones((len(items), 1))
        answers = self.student_.predict(items, score_labels=True)
        names = [_name(label) for label in self.classes_]
        rows = [answer.distribution or {} for answer in answers]
        return np.array([[row[name] for name in names] for row in rows], dtype=np.float64)

    # --- input

    def _items(self, X: Any, *, is_new: bool = False) -> list[Item]:  # noqa: N803
        """Each row as a text or a mapping of fields, ready for JSON. Raises ValueError."""
        if _is_texts(X):
            return [str(text) for text in X]
        if isinstance(X, Sequence) and len(X) and all(isinstance(row, Mapping) for row in X):
            return [{str(name): _cell(value) for name, value in row.items()} for row in X]
        rows = validate_data(self, X, dtype=None, reset=is_new)
        columns = [name for name in getattr(X, "columns", ()) if isinstance(name, str)]
        if len(columns) < rows.shape[1]:
            columns = [f"x{index}" for index in range(rows.shape[1])]
        wrong = [name for name in columns if not name.isidentifier()]
        if wrong:
            raise ValueError(f"rename the column {wrong[0]!r}: a field name must be an identifier")
        return [
            {name: _cell(value) for name, value in zip(columns, row, strict=True)} for row in rows
        ]

    def _targets(self, y: Any, rows: int) -> list[str] | None:
        """The rows' labels as text, and ``classes_``. None: the teacher labels them."""
        if y is None:
            if self.teacher is None:
                raise ValueError(
                    "This DistilledClassifier estimator requires y to be passed, but the target y "
                    "is None; y is optional only with a teacher and labels"
                )
            if self.labels is None:
                raise ValueError("without y, labels is required: the possible labels")
            self.classes_ = np.unique(np.asarray(self.labels))
            return None
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if len(y) != rows:
            raise ValueError(f"X has {rows} rows, and y has {len(y)}")
        self.classes_ = np.unique(y if self.labels is None else np.asarray(self.labels))
        unknown = set(y.tolist()) - set(self.classes_.tolist())
        if unknown:
            raise ValueError(f"y has a label that is not in labels: {min(map(str, unknown))}")
        return [_name(label) for label in y]

    # --- the run

    def _write(self, folder: Path, items: list[Item], targets: list[str] | None) -> Path:
        """Write the rows and the recipe; returns its path."""
        rows: list[dict[str, Any]] = [
            {"input": {"text": item} if isinstance(item, str) else item} for item in items
        ]
        for row, label in zip(rows, targets or (), strict=targets is not None):
            row["label"] = label
        seed = self.random_state
        if not isinstance(seed, int | np.integer):  # None, or a source of random numbers
            seed = check_random_state(seed).randint(2**31 - 1)
        train_rows, valid_rows = self._split(rows, targets, int(seed))
        for split, part in (("train", train_rows), ("valid", valid_rows)):
            with atomic_write(folder / "data" / f"{split}.jsonl") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in part)
        recipe = self._recipe(folder, items[0], has_labels=targets is not None, seed=int(seed))
        for key, value in (self.settings or {}).items():
            *sections, last = key.split(".")
            section = recipe
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value
        with atomic_write(folder / "recipe.yaml") as file:
            json.dump(recipe, file, indent=1)  # JSON is YAML
        return folder / "recipe.yaml"

    def _split(
        self, rows: list[Any], targets: list[str] | None, seed: int
    ) -> tuple[list[Any], list[Any]]:
        """Train rows, and validation rows that select the best step and the temperature.

        If the validation rows would be fewer than the labels, both are all rows.
        """
        held_out = round(self.validation_fraction * len(rows))
        if held_out < len(self.classes_):
            return rows, rows
        counts = np.unique(targets or [""], return_counts=True)[1]
        train_rows, valid_rows = train_test_split(
            rows,
            test_size=held_out,
            random_state=seed,
            stratify=targets if counts.min() > 1 else None,
        )
        return train_rows, valid_rows

    def _recipe(self, folder: Path, item: Item, *, has_labels: bool, seed: int) -> dict[str, Any]:
        student = self.student
        task: dict[str, Any] = {
            "name": "classification",
            "labels": [_name(label) for label in self.classes_],
            "data": {
                "train": str(folder / "data" / "train.jsonl"),
                "valid": str(folder / "data" / "valid.jsonl"),
                "test": str(folder / "data" / "valid.jsonl"),
            },
        }
        if self.description is not None:
            task["description"] = self.description
        if not isinstance(item, str):
            task["input"] = "\n".join(f"{name}: {{{{ {name} }}}}" for name in item)
        return {
            "name": "classifier",
            "task": task,
            "teacher": {"kind": "human"} if self.teacher is None else dict(self.teacher),
            "annotate": {"splits": ["train"] if has_labels else ["train", "valid"]},
            "student": {"model": student} if isinstance(student, str) else dict(student),
            "train": {
                "methods": [
                    self.method or ("finetune" if self.teacher is None else "step-by-step")
                ],
                "labels": ["gold" if has_labels else "teacher"],
                "seeds": [seed],
                "max_steps": self.max_steps,
                "max_epochs": None if self.max_steps else self.max_epochs,
                "batch_size": self.batch_size,
                "learning_rate": self.learning_rate,
                "rationale_weight": self.rationale_weight,
            },
            "eval": {"split": "valid"},
        }

    # --- pickle: the student as the files that it is saved in

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        student = state.pop("student_", None)
        if student is not None:
            with tempfile.TemporaryDirectory() as folder:
                student.save(Path(folder))
                state["_student_files"] = {
                    str(path.relative_to(folder)): path.read_bytes()
                    for path in sorted(Path(folder).rglob("*"))
                    if path.is_file()
                }
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        files = state.pop("_student_files", None)
        super().__setstate__(state)
        if "classes_" in state:
            self.student_ = None if files is None else _load(files)


def _load(files: Mapping[str, bytes]) -> Student:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return Student.load(folder)


def _is_texts(values: Any) -> bool:
    """Whether ``X`` is one text for each row. A single text is not."""
    is_row = getattr(values, "ndim", 1) == 1 and hasattr(values, "__len__")
    if isinstance(values, str) or not is_row:
        return False
    return len(values) > 0 and all(isinstance(value, str) for value in values)


def _cell(value: Any) -> Any:
    """A field's value as JSON has it."""
    return value.item() if isinstance(value, np.generic) else value


def _name(label: Any) -> str:
    """A class as the recipe's label."""
    return str(_cell(label))
