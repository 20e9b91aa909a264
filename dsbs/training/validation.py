"""Validation: label accuracy and label loss, and how often they are measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsbs.config import EvalSection, ResolvedTrainSection, StudentRecipe
from dsbs.progress import Progress
from dsbs.records import Unreadable
from dsbs.students.backends.label_head import LabelHeadBackend
from dsbs.students.calibration import (
    Calibration,
    calibrate,
    calibrate_each,
    log_losses,
    rationale_agreement,
    read_calibration,
    write_record,
    yes_and_no,
)
from dsbs.students.card import StudentCard, read_card
from dsbs.students.formats import start_token
from dsbs.students.novelty import Novelty, fit_novelty
from dsbs.students.student import Student
from dsbs.students.targets import split_target
from dsbs.training.encode import Encoded, EncodedRows, PackedBatch, collate, pad
from dsbs.training.methods import View
from dsbs.training.rows import Data, Row

_MAX_SHARE = 0.2  # of a training's time, unless train.eval_every is set
_MAX_COUNT = 20
# Cost of a token that is generated, in tokens of a forward pass: measured on CPUs.
_DECODING = 16
_SMALLEST = 1e-30  # a probability that counts in a loss
_BACKWARD = 2  # cost of a backward pass, in forward passes


def validation_interval(
    section: ResolvedTrainSection, train: EncodedRows, valid: EncodedRows, max_new_tokens: int
) -> int:
    """Optimizer steps between validations: ``train.eval_every``, or None's value for this data.

    A training has twenty validations, or fewer where they would take more than a fifth of its time,
    and always one at its last step. The time is estimated from the numbers of rows and tokens, not
    measured, so that the best step is the same on every machine. Of a training, only the first view
    counts: with a rationale beside the label, a method has no more steps to choose from.
    """
    if section.eval_every is not None:
        return section.eval_every
    train_inputs, train_targets = next(iter(train.lengths().values()))
    tokens = train_inputs.sum() + train_targets.sum()
    step_cost = (1 + _BACKWARD) * section.batch_size * tokens / len(train)
    inputs, targets = next(iter(valid.lengths().values()))
    # A student in training often writes on after its label.
    generated = min(max_new_tokens, 2 * int(targets.max(initial=1)))
    # Inputs are read twice: to generate labels, and for the loss.
    validation_cost = 2 * inputs.sum() + targets.sum() + _DECODING * generated * len(valid)
    budget = _MAX_SHARE / (1 - _MAX_SHARE) * section.max_steps * step_cost
    count = min(_MAX_COUNT, max(1, int(budget / validation_cost)))
    return math.ceil(section.max_steps / count)


def validate(
    student: Student, recipe: StudentRecipe, data: Data, rows: Sequence[Encoded], view: View
) -> dict[str, float]:
    """Accuracy on valid, label loss in nats per token, and the score that chooses the best step.

    ``rows`` are valid's, encoded for ``view``. ``selection`` orders steps by accuracy and, among
    equals, by lower loss, which counts for less than half a row.
    """
    if student.card.head == "labels":
        accuracy, loss = _choose(student, recipe, data, view)
    else:
        accuracy = _accuracy(student, recipe, data, view)
        loss = _label_loss(student, recipe.eval.batch_size, rows, view)
    return {
        "accuracy": accuracy,
        "label_loss": loss,
        "selection": accuracy + 0.5 / len(data.valid) / (1.0 + loss),
    }


def calibrated(
    student: Student, recipe: StudentRecipe, data: Data, view: View
) -> Calibration | None:
    """The calibration of a finished student on valid. None: it has no distribution over labels.

    Students that write their label have one where ``eval.score_labels`` is set, or where they write
    fields.
    """
    if student.card.writes_label_alone and student.card.task.fields is not None:
        return _calibrated_fields(student, recipe, data, view)
    if student.card.head == "text":
        if not recipe.eval.score_labels or not student.has_distribution:
            return None
        inputs = [view.prefix + row.text for row in data.valid]
        distributions = student.label_distributions(inputs, recipe.eval.batch_size)
    else:
        distributions = _distributions(student, recipe, data, view)
    agreements = None
    if recipe.eval.rationales and "rationale" in student.card.prefixes:
        agreements = _rationale_agreements(student, recipe, data, distributions)
    task = student.task
    if task.has_several_labels:
        return calibrate_each(
            np.array(distributions, dtype=np.float64),
            _head_targets(student, data) == 1,
            data.valid_labels,
            student.card.classes,
            precision=recipe.eval.label_precision,
            agreements=agreements,
        )
    choose = None
    if student.card.classes:
        classes = student.card.classes

        def choose(shares: Sequence[float]) -> int:
            return classes.index(task.choose(classes, shares))

    right = _right_classes(student, data)
    return calibrate(distributions, right, data.valid_labels, agreements, choose)


def _calibrated_fields(
    student: Student, recipe: StudentRecipe, data: Data, view: View
) -> Calibration | None:
    """The calibration of the fields of readable answers. None: no answer is readable."""
    task = student.task
    inputs = [view.prefix + row.text for row in data.valid]
    tokens = max_new_tokens(recipe, view)
    generated = student.generate(inputs, tokens, recipe.eval.batch_size, probabilities=True)
    shares, is_right = [], []
    for output, row in zip(generated, data.valid, strict=True):
        label = task.read_label(output.text, data.fields[row.id])
        probabilities = student.field_probabilities(output)
        if not isinstance(label, Unreadable) and probabilities is not None:
            shares.append(list(probabilities.values()))
            correct = task.correct_parts(label, str(row.label(data.valid_labels)))
            is_right.append(list(correct.values()))
    if not shares:
        return None
    return calibrate_each(np.array(shares), np.array(is_right), data.valid_labels, None)


def follow_eval_section(
    folder: Path, recipe: StudentRecipe, data: Data, view: View, progress: Progress
) -> None:
    """Calibrate a finished student anew if a key of ``eval`` that decides it has changed."""
    key = _changed_key(read_card(folder), read_calibration(folder), recipe.eval)
    if key is None:
        return
    student = Student.load(folder)
    new = calibrated(student, recipe, data, view)
    if new is not None:
        progress.say(f"{student.card.name}: calibrated again for {key}")
        write_record(folder, new)


def _changed_key(
    card: StudentCard, calibration: Calibration | None, section: EvalSection
) -> str | None:
    if calibration is None:
        scores_labels = section.score_labels and card.writes_label_alone
        return "eval.score_labels" if scores_labels else None
    thresholds = calibration.label_thresholds
    if thresholds is not None and thresholds.precision != section.label_precision:
        return "eval.label_precision"
    compares_rationales = section.rationales and "rationale" in card.prefixes
    if compares_rationales and card.task.fields is None and "views" not in calibration.aurc:
        return "eval.rationales"
    return None


def novelty_of(student: Student, recipe: StudentRecipe, data: Data, view: View) -> Novelty | None:
    """How far inputs may be from the valid rows. None: a row has no pooled states of its own."""
    backend = student.backend
    if not isinstance(backend, LabelHeadBackend) or student.card.scores_choices:
        return None
    inputs = [view.prefix + row.label_text for row in data.valid]
    states = [
        backend.pooled_states(inputs[first : first + recipe.eval.batch_size]).cpu().double().numpy()
        for first in range(0, len(inputs), recipe.eval.batch_size)
    ]
    return fit_novelty(np.concatenate(states))


def _rationale_agreements(
    student: Student, recipe: StudentRecipe, data: Data, distributions: Sequence[tuple[float, ...]]
) -> list[float]:
    """Whether each valid row's rationale states the student's label."""
    card = student.card
    inputs = [card.prefixes["rationale"] + row.text for row in data.valid]
    start = card.starts.get("rationale", "pad")
    written = student.generate(inputs, card.max_target_tokens, recipe.eval.batch_size, start)
    agreements = []
    for row, rationale, distribution in zip(data.valid, written, distributions, strict=True):
        label = student.task.choose(_choices(student, row), distribution)
        fields = data.fields[row.id]
        agreements.append(rationale_agreement(label, rationale.text, student.task, fields))
    return agreements


def _choices(student: Student, row: Row) -> Sequence[str]:
    """The labels that a row's distribution is over, in its order."""
    classes = student.card.classes or student.task.head_labels
    return classes or [choice for choice, _ in row.choices]


def _choose(student: Student, recipe: StudentRecipe, data: Data, view: View) -> tuple[float, float]:
    """A label head's accuracy and mean cross-entropy of the classes, in nats.

    Of several labels, those with a probability of 0.5 count as given, and the loss is their mean.
    """
    distributions = _distributions(student, recipe, data, view)
    correct = sum(
        student.task.choose(_choices(student, row), distribution) == row.label(data.valid_labels)
        for row, distribution in zip(data.valid, distributions, strict=True)
    )
    if student.task.has_several_labels:
        shares = yes_and_no(np.array(distributions, dtype=np.float64))
        is_given = _head_targets(student, data).ravel()
        return correct / len(data.valid), float(log_losses(shares, 1 - is_given).mean())
    loss = 0.0
    for distribution, right in zip(distributions, _right_classes(student, data), strict=True):
        loss -= math.log(max(distribution[right], _SMALLEST))
    return correct / len(data.valid), loss / len(data.valid)


def _head_targets(student: Student, data: Data) -> NDArray[np.int64]:
    """(rows, L): 1 for each label that a valid row has, else 0."""
    labels = [str(row.label(data.valid_labels)) for row in data.valid]
    return np.array([student.task.head_targets(label) for label in labels])


def _distributions(
    student: Student, recipe: StudentRecipe, data: Data, view: View
) -> list[tuple[float, ...]]:
    """A label head's distributions on valid, not calibrated."""
    inputs = [view.prefix + row.label_text for row in data.valid]
    answers = student.generate(inputs, 0, recipe.eval.batch_size)
    return [answer.distribution or () for answer in answers]


def _right_classes(student: Student, data: Data) -> list[int]:
    """The index of each valid row's label in its distribution."""
    return [_choices(student, row).index(str(row.label(data.valid_labels))) for row in data.valid]


def max_new_tokens(recipe: StudentRecipe, view: View) -> int:
    """The most tokens that a student generates for a label."""
    if view.target == "rationale-then-label":  # the label comes last
        return recipe.student.max_target_tokens
    return recipe.eval.max_label_tokens


def _accuracy(student: Student, recipe: StudentRecipe, data: Data, view: View) -> float:
    task = student.task
    inputs = [view.prefix + row.text for row in data.valid]
    generations = student.generate(inputs, max_new_tokens(recipe, view), recipe.eval.batch_size)
    correct = 0
    for generation, row in zip(generations, data.valid, strict=True):
        label = task.read_label(split_target(view.target, generation.text)[0], data.fields[row.id])
        if not isinstance(label, Unreadable):
            correct += task.correct(label, str(row.label(data.valid_labels)))
    return correct / len(data.valid)


def _label_loss(student: Student, batch_size: int, rows: Sequence[Encoded], view: View) -> float:
    """Mean token cross-entropy of valid's labels, in nats."""
    import torch

    from dsbs.training.losses import summed_nll
    from dsbs.training.packed import is_decoder_only
    from dsbs.training.packed.decoder import summed_losses

    model = student.backend.model
    total = 0.0
    tokens = 0
    ordered = sorted(rows, key=lambda row: len(row[view.target][0][0]))
    with torch.inference_mode():
        for first in range(0, len(ordered), batch_size):
            packed = collate(ordered[first : first + batch_size])[view.target]
            tokens += len(packed.target)
            if is_decoder_only(model):
                batch: dict[str, PackedBatch] = {view.target: packed.to(model.device)}
                losses = summed_losses(model, batch, without_padding=False)
                total += float(losses[view.target])
                continue
            padded = pad(packed, model.config.pad_token_id, start_token(model.config, view.start))
            inputs = {name: tensor.to(model.device) for name, tensor in padded.items()}
            total += float(summed_nll(model(**inputs).logits, inputs["labels"]))
    return total / tokens
