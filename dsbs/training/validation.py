"""A look at valid: how often a student's label is right there, and what its label costs it."""

from __future__ import annotations

from collections.abc import Sequence

from dsbs.config import Recipe
from dsbs.records.rows import Unread
from dsbs.students import Student, start_token, take_apart
from dsbs.training.encode import Encoded, collate, pad
from dsbs.training.methods import View
from dsbs.training.rows import Data


def look(
    student: Student, recipe: Recipe, data: Data, rows: Sequence[Encoded], view: View
) -> dict[str, float]:
    """Accuracy on valid, the label loss there (nats per token), and what the best step is chosen by.

    ``rows`` are valid's as ``view`` reads and writes them. ``selection`` orders steps by accuracy and, among equals, by lower
    loss: half a row's worth at most.
    """
    accuracy = _accuracy(student, recipe, data, view)
    loss = _loss(student, recipe.eval.batch_size, rows, view)
    return {
        "accuracy": accuracy,
        "label_loss": loss,
        "selection": accuracy + 0.5 / len(data.valid) / (1.0 + loss),
    }


def _accuracy(student: Student, recipe: Recipe, data: Data, view: View) -> float:
    task = student.task
    whole = view.target == "rationale-then-label"  # the label comes last
    most = recipe.student.max_target_tokens if whole else recipe.eval.max_label_tokens
    written = student.generate(
        [view.prefix + row.text for row in data.valid], most, recipe.eval.batch_size
    )
    right = 0
    for one, row in zip(written, data.valid, strict=True):
        label = task.read_label(take_apart(view.target, one.text)[0], data.fields[row.id])
        right += not isinstance(label, Unread) and task.correct(
            label, str(row.label(data.valid_labels))
        )
    return right / len(data.valid)


def _loss(student: Student, size: int, rows: Sequence[Encoded], view: View) -> float:
    import torch

    from dsbs.training.losses import summed_nll
    from dsbs.training.packed import decoder as causal

    model = student.engine.model
    total, tokens = 0.0, 0
    ordered = sorted(rows, key=lambda row: len(row[view.target][0][0]))
    with torch.inference_mode():
        for first in range(0, len(ordered), size):
            flat = collate(ordered[first : first + size])[view.target]
            tokens += len(flat.target)
            if causal.is_decoder_only(model):
                there = flat.to(model.device)
                total += float(
                    causal.summed_losses(model, {view.target: there}, without_padding=False)[
                        view.target
                    ]
                )
                continue
            padded = pad(flat, model.config.pad_token_id, start_token(model.config, view.start))
            batch = {k: v.to(model.device) for k, v in padded.items()}
            total += float(summed_nll(model(**batch).logits, batch["labels"]))
    return total / tokens
