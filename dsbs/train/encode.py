"""From rows and annotations to token ids: what each method's student reads and is to write."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsbs.annotations import load_annotations
from dsbs.errors import UserError
from dsbs.recipe import LabelSource, Recipe
from dsbs.records import Annotation, Example
from dsbs.tasks.base import Task
from dsbs.tasks.load import is_held_out, load, position
from dsbs.train.losses import IGNORED
from dsbs.train.methods import METHODS, Cell, View
from dsbs.train.select import select


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: the student's input without prefix, its targets (None: this row does not teach it)."""

    id: str
    text: str
    gold: str | None
    teacher: str | None
    rationale: str | None
    hinted: bool = False  # the rationale leads to the gold label, not to the teacher's own

    def label(self, source: LabelSource) -> str | None:
        return self.gold if source == "gold" else self.teacher

    def target(self, target: str, source: LabelSource) -> str | None:
        """What a view of this row is to write; a rationale only beside the label that it leads to."""
        if target == "label":
            return self.label(source)
        return None if self.hinted and source == "teacher" else self.rationale


@dataclass(frozen=True, slots=True)
class Data:
    """Training and validation rows of a run. ``valid_labels``: whose labels choose the best step."""

    train: list[Row]
    valid: list[Row]
    valid_labels: LabelSource
    fields: dict[str, dict[str, Any]]  # of the validation rows by id: a label may be read by its row's choices


def gather(recipe: Recipe, task: Task, run: Path, cells: Sequence[Cell]) -> Data:
    """Join rows and annotations by id. Raises UserError where a method lacks the labels or rationales it learns from."""
    examples = load(recipe, task, "train")
    needs_teacher = any(cell.needs_teacher for cell in cells)
    annotations = load_annotations(recipe, task, run, "train") if needs_teacher else {}
    missing = [example.id for example in examples if needs_teacher and example.id not in annotations]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(examples)} train rows have no annotation (first: {missing[0]})",
            hint="the data changed since: run `dsbs annotate` again, it asks for the new rows only",
        )
    chosen = select((annotations[e.id] for e in examples if e.id in annotations), recipe.train.select, task)
    rows = [_row(task, example, chosen.get(example.id)) for example in examples if not is_held_out(recipe, example)]

    held_out = load(recipe, task, "valid")
    use_gold = all(example.label is not None for example in held_out)
    if not use_gold and recipe.task.data.valid is not None:
        annotations = annotations | load_annotations(recipe, task, run, "valid")
    valid = [_row(task, example, annotations.get(example.id)) for example in held_out]
    source: LabelSource = "gold" if use_gold else "teacher"
    valid = sorted((row for row in valid if row.label(source)), key=lambda row: position(row.id, "valid-limit"))
    if not valid:
        raise UserError("no validation row has a label", hint="give task.data.valid, or annotate more rows")
    for cell in cells:
        if not any(row.label(cell.labels) for row in rows):
            raise UserError(
                f"{cell.method} learns {cell.labels} labels, and no train row has one",
                hint="leave the method out of train.methods"
                if cell.labels == "gold"
                else "look at the annotations' reject_reason, and at train.select",
            )
        if METHODS[cell.method].needs_rationales and not any(row.rationale for row in rows):
            raise UserError(
                "no train row has a usable rationale", hint="look at the annotations' reject_reason, and at train.select"
            )
    return Data(rows, valid[: recipe.train.valid_limit], source, {example.id: example.input for example in held_out})


def _row(task: Task, example: Example, annotation: Annotation | None) -> Row:
    usable = annotation is not None and annotation.accepted
    return Row(
        id=example.id,
        text=task.text(example.input),
        gold=example.label,
        teacher=annotation.own_label if annotation is not None and usable else None,
        rationale=annotation.rationale if annotation is not None and usable else None,
        hinted=annotation is not None and annotation.provenance == "hinted",
    )


def vocabulary_text(data: Data) -> Iterator[str]:
    """The text that a scratch vocabulary is learned from: train rows only, the same for every method."""
    for row in data.train:
        yield from (part for part in ("predict: explain: " + row.text, row.gold, row.teacher, row.rationale) if part)


Encoded = dict[str, tuple[list[int], list[int]]]  # target of a view -> (input ids, target ids)


class Encoder:
    """Tokenises rows for one student's views, each text once."""

    def __init__(self, tokenizer: Any, max_input_tokens: int, max_target_tokens: int) -> None:
        self._tokenizer = tokenizer
        self._max_input, self._max_target = max_input_tokens, max_target_tokens

    def rows(self, rows: Sequence[Row], views: Sequence[View], labels: LabelSource) -> list[Encoded]:
        """Rows that teach at least one view. A view whose target is missing from a row is left out of it."""
        encoded: list[Encoded] = [{} for _ in rows]
        for view in views:
            targets = [row.target(view.target, labels) for row in rows]
            # without the label that it explains, a rationale teaches the wrong task; with λ = 0 it teaches nothing
            chosen = [i for i, t in enumerate(targets) if t and rows[i].label(labels) and view.weight > 0]
            inputs = self._ids([view.prefix + rows[i].text for i in chosen], self._max_input)
            outputs = self._ids([str(targets[i]) for i in chosen], self._max_target)
            for i, source, target in zip(chosen, inputs, outputs, strict=True):
                encoded[i][view.target] = (source, target)
        return [row for row in encoded if row]

    def _ids(self, texts: list[str], limit: int) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        return ids


def encoded_hash(rows: Sequence[Encoded]) -> str:
    state = hashlib.sha256()
    for row in rows:
        state.update(repr(sorted(row.items())).encode())
    return state.hexdigest()


class Collator:
    """Rows -> ``{view: {input_ids (B, S), attention_mask (B, S), labels (B, T)}}``, padded; B differs between views."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[Encoded]) -> dict[str, dict[str, Any]]:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        batch = {}
        for target in ("label", "rationale"):
            pairs = [row[target] for row in rows if target in row]
            if not pairs:
                continue
            inputs = [torch.tensor(source) for source, _ in pairs]
            ids = pad_sequence(inputs, batch_first=True, padding_value=self._pad_id)
            mask = pad_sequence([torch.ones_like(i) for i in inputs], batch_first=True)
            labels = pad_sequence([torch.tensor(t) for _, t in pairs], batch_first=True, padding_value=IGNORED)
            batch[target] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return batch
