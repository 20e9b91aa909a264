"""From rows and annotations to token ids: what each method's student reads and is to write."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from dsbs.annotations import annotation_file, load_annotations
from dsbs.artefacts import digest
from dsbs.errors import UserError
from dsbs.recipe import LabelSource, Recipe
from dsbs.records import Annotation, Example
from dsbs.student import Target, compose
from dsbs.tasks.base import Task
from dsbs.tasks.load import is_held_out, load, position
from dsbs.train.losses import IGNORED
from dsbs.train.methods import METHODS, Cell, View
from dsbs.train.select import select
from dsbs.train.tokens import Ids, Tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One training row: the student's input without prefix, its targets (None, or no rationale: this row does not teach it)."""

    id: str
    text: str
    gold: str | None
    teacher: str | None
    rationales: tuple[str, ...] = ()
    hinted: bool = False  # the rationales lead to the gold label, not to the teacher's own

    def label(self, source: LabelSource) -> str | None:
        return self.gold if source == "gold" else self.teacher

    def targets(self, target: Target, source: LabelSource) -> list[str]:
        """What a view of this row is to write, in as many ways as there are; a rationale only beside the label it leads to."""
        usable = () if target == "label" else self.usable(source)
        texts = [compose(target, self.label(source), rationale) for rationale in usable or (None,)]
        return [text for text in texts if text]

    def usable(self, source: LabelSource) -> tuple[str, ...]:
        """The rationales that stand beside this source's label: a hinted one leads to the gold label alone."""
        return () if self.label(source) is None or (self.hinted and source == "teacher") else self.rationales


@dataclass(frozen=True, slots=True)
class Data:
    """Training and validation rows of a run. ``valid_labels``: whose labels choose the best step."""

    train: list[Row]
    valid: list[Row]
    valid_labels: LabelSource
    fields: dict[str, dict[str, Any]]  # of the validation rows by id: a label may be read by its row's choices
    order: list[int]  # of the train rows by a hash of their ids: a part of them is the first so many
    teacher_words: list[str]  # labels and rationales of all accepted annotations of train rows, selected or not

    def part(self, share: float) -> list[Row]:
        """A share of the train rows, in their own order; a smaller share's rows are among a larger one's."""
        chosen = sorted(self.order[: max(1, round(share * len(self.train)))])
        return [self.train[i] for i in chosen]


def gather(recipe: Recipe, task: Task, run: Path, cells: Sequence[Cell]) -> Data:
    """Join rows and annotations by id. Raises UserError where a method lacks the labels or rationales it learns from."""
    examples = load(recipe, task, "train")
    needs_teacher = any(cell.needs_teacher for cell in cells)
    annotations = _annotations(recipe, task, run, needed=needs_teacher)
    missing = [example.id for example in examples if needs_teacher and example.id not in annotations]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(examples)} train rows have no annotation (first: {missing[0]})",
            hint="the data changed since: run `dsbs annotate` again, it asks for the new rows only",
        )
    known = [annotations[example.id] for example in examples if example.id in annotations]
    chosen = select(known, recipe.train.select, task)
    own_must_agree = recipe.train.select.agree_gold
    rows = [
        _row(task, example, chosen.get(example.id), recipe.train.rationales, own_must_agree=own_must_agree)
        for example in examples
        if not is_held_out(recipe, example)
    ]

    held_out = load(recipe, task, "valid")
    source: LabelSource = "gold" if any(example.label is not None for example in held_out) else "teacher"
    if source == "teacher" and recipe.task.data.valid is not None:
        annotations = annotations | load_annotations(recipe, task, run, "valid")
    valid = [_row(task, example, annotations.get(example.id)) for example in held_out]
    valid = sorted((row for row in valid if row.label(source)), key=lambda row: position(row.id, "valid-limit"))
    if not valid:
        raise UserError("no validation row has a label", hint="give task.data.valid, or annotate more rows")
    ids = {row.id for row in rows}
    words = [
        part
        for annotation in known
        if annotation.accepted and annotation.id in ids
        for part in (annotation.own_label, annotation.rationale)
        if part
    ]
    fields = {example.id: example.input for example in held_out}
    order = sorted(range(len(rows)), key=lambda i: position(rows[i].id, "subset"))
    data = Data(rows, valid[: recipe.train.valid_limit], source, fields, order, words)
    for cell in cells:
        _check_taught(data, cell)
    return data


def _check_taught(data: Data, cell: Cell) -> None:
    """Raises UserError where a student would find nothing of what its method learns in its part of the rows."""
    rows = data.part(cell.subset)
    of = "train row" if cell.subset == 1 else f"row of train.subset {cell.subset:g} ({len(rows)} rows)"
    if not any(row.label(cell.labels) for row in rows):
        raise UserError(
            f"{cell.method} learns {cell.labels} labels, and no {of} has one",
            hint="leave the method out of train.methods"
            if cell.labels == "gold"
            else "look at the annotations' reject_reason, and at train.select",
        )
    if METHODS[cell.method].needs_rationales and not taught_rationales(data, cell):
        raise UserError(
            f"{cell.method} learns rationales beside {cell.labels} labels, and no {of} has a usable one",
            hint="look at the annotations' reject_reason and provenance (hinted ones go with gold labels), and at train.select",
        )


def taught_rationales(data: Data, cell: Cell) -> int:
    """How many rationales a student is taught in its part of the rows."""
    if not METHODS[cell.method].needs_rationales:
        return 0
    return sum(len(row.usable(cell.labels)) for row in data.part(cell.subset))


def _annotations(recipe: Recipe, task: Task, run: Path, *, needed: bool) -> dict[str, Annotation]:
    """The train annotations; where no method needs them, what there is of this recipe's, for the vocabulary's sake."""
    if not needed and not annotation_file(run, "train").is_file():
        return {}
    try:
        return load_annotations(recipe, task, run, "train")
    except UserError:
        if needed:
            raise
        return {}


def _row(
    task: Task, example: Example, annotation: Annotation | None, which: str = "chosen", *, own_must_agree: bool = False
) -> Row:
    if annotation is None or not annotation.accepted:
        return Row(example.id, task.text(example.input), example.label, None)
    own = annotation.own_label
    if own_must_agree and (own is None or example.label is None or not task.correct(own, example.label)):
        own = None  # a hinted row passes select by its gold label; the teacher's own is another
    return Row(
        id=example.id,
        text=task.text(example.input),
        gold=example.label,
        teacher=own,
        rationales=tuple(_rationales(annotation, task))[: 1 if which == "chosen" else None],
        hinted=annotation.provenance == "hinted",
    )


def _rationales(annotation: Annotation, task: Task) -> list[str]:
    """The annotation's rationale, then those of its other samples that came to the same label without a flaw, each once."""
    if annotation.rationale is None or annotation.label is None:
        return []
    found = {annotation.rationale: None}
    for sample in annotation.samples:
        if sample.rationale is None or sample.reason is not None or sample.label is None:
            continue
        if sample.hinted == (annotation.provenance == "hinted") and task.correct(sample.label, annotation.label):
            found[sample.rationale] = None
    return list(found)


def vocabulary_text(data: Data) -> Iterator[str]:
    """The text that a scratch vocabulary is learned from: train rows and all that the teacher said of them.

    The same for every method, label source and selection, so that none of them changes another's student.
    """
    words, count = data.teacher_words, len(data.train)
    for i, row in enumerate(data.train):
        yield from (part for part in ("predict: explain: " + row.text, row.gold) if part)
        yield from words[i * len(words) // count : (i + 1) * len(words) // count]  # side by side: learning may stop halfway


Encoded = dict[str, list[tuple[Ids, Ids]]]  # target of a view -> (input ids, target ids), as many as it may write


@dataclass(frozen=True, slots=True)
class Taught:
    """What one view is taught: ``pairs`` (P, 2), places of inputs' and targets' tokens; row i has ends[i] to ends[i + 1]."""

    pairs: NDArray[np.int32]
    ends: NDArray[np.int64]


class EncodedRows(Sequence[Encoded]):
    """A student's rows: those that teach at least one view."""

    def __init__(self, tokens: Tokens, views: Mapping[str, Taught]) -> None:
        self._tokens, self._views = tokens, views
        counts = sum(np.diff(taught.ends) for taught in views.values())
        self._rows = np.flatnonzero(counts)

    def __len__(self) -> int:
        return len(self._rows)

    def lengths(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each view, the numbers of tokens of its inputs and of its targets, in no order."""
        pairs = {name: taught.pairs for name, taught in self._views.items()}
        return {name: (self._tokens.lengths(pair[:, 0]), self._tokens.lengths(pair[:, 1])) for name, pair in pairs.items()}

    @overload
    def __getitem__(self, row: int) -> Encoded: ...
    @overload
    def __getitem__(self, row: slice) -> list[Encoded]: ...
    def __getitem__(self, row: int | slice) -> Encoded | list[Encoded]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        i = self._rows[row]
        found = {name: taught.pairs[taught.ends[i] : taught.ends[i + 1]] for name, taught in self._views.items()}
        return {
            name: [(self._tokens[source], self._tokens[target]) for source, target in pairs]
            for name, pairs in found.items()
            if len(pairs)
        }


class Encoder:
    """Makes rows into what one student's views read and write."""

    def __init__(self, tokens: Tokens, max_input_tokens: int, max_target_tokens: int) -> None:
        self._tokens = tokens
        self._max_input, self._max_target = max_input_tokens, max_target_tokens

    def rows(self, rows: Sequence[Row], views: Sequence[View], labels: LabelSource) -> EncodedRows:
        """Rows that teach at least one view. A view whose target is missing from a row is left out of it."""
        taught: dict[str, Taught] = {}
        for view in views:
            targets = [row.targets(view.target, labels) for row in rows]
            # without the label that it explains, a rationale teaches the wrong task; with λ = 0 it teaches nothing
            chosen = [i for i, texts in enumerate(targets) if texts and rows[i].label(labels) and view.taught]
            counts = np.zeros(len(rows), np.int64)
            counts[chosen] = [len(targets[i]) for i in chosen]
            inputs = self._tokens.places(view.prefix, [rows[i].text for i in chosen], self._max_input)
            outputs = self._tokens.places("", [text for i in chosen for text in targets[i]], self._max_target)
            pairs = np.stack([np.repeat(inputs, counts[chosen]), outputs], axis=1)
            taught[view.target] = Taught(pairs, np.concatenate([[0], np.cumsum(counts)]))
        return EncodedRows(self._tokens, taught)

    def cut(self, rows: EncodedRows) -> Iterator[str]:
        """Warnings of inputs and targets that are as long as they may be: what was longer is cut."""
        for name, (sources, targets) in rows.lengths().items():
            for what, lengths, limit, key in (
                ("inputs", sources, self._max_input, "max_input_tokens"),
                (f"{name} targets", targets, self._max_target, "max_target_tokens"),
            ):
                share = float((lengths >= limit).mean()) if len(lengths) else 0.0
                if share > 0:
                    lost = ", and with their end the label" if name == "rationale-then-label" and what != "inputs" else ""
                    yield f"{100 * share:.1f} % of the {what} reach student.{key} ({limit}): what is longer is cut{lost}"


class Drawn:
    """Rows of which each view that may write several targets writes one, drawn anew in each epoch.

    The draw depends on seed, epoch and row alone, so that a resumed training draws as an undisturbed one.
    """

    def __init__(self, rows: Sequence[Encoded], seed: int) -> None:
        self._rows, self._seed = rows, seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Encoded:
        draw = int(digest(f"{self._seed}:{self.epoch}:{i}")[:15], 16)
        return {name: [pairs[draw % len(pairs)]] for name, pairs in self._rows[i].items()}


def encoded_hash(rows: Sequence[Encoded]) -> str:
    state = hashlib.sha256()
    for row in rows:
        for name, pairs in sorted(row.items()):
            plain = [(np.asarray(source).tolist(), np.asarray(target).tolist()) for source, target in pairs]
            state.update(repr((name, plain)).encode())
        state.update(b";")
    return state.hexdigest()


# source (N,) and target (M,) ids of B rows one after another, source_lengths, target_lengths and rows (B,): places in the batch
Flat = dict[str, Any]


def collate(rows: Sequence[Encoded]) -> dict[str, Flat]:
    """Rows -> ``{target: Flat}`` of the views that they teach, without padding; B differs between views.

    Where a row has several targets, all rows' first ones come first, then their second ones.
    """
    import torch

    batch = {}
    for name in sorted({name for row in rows for name in row}):
        most = max(len(row.get(name, ())) for row in rows)
        here = [(k, i) for k in range(most) for i, row in enumerate(rows) if k < len(row.get(name, ()))]
        pairs = [rows[i][name][k] for k, i in here]
        batch[name] = {
            "rows": torch.tensor([i for _, i in here]),
            "source": torch.from_numpy(np.concatenate([source for source, _ in pairs]).astype(np.int64)),
            "source_lengths": torch.tensor([len(source) for source, _ in pairs]),
            "target": torch.from_numpy(np.concatenate([target for _, target in pairs]).astype(np.int64)),
            "target_lengths": torch.tensor([len(target) for _, target in pairs]),
        }
    return batch


def pad(flat: Flat, pad_id: int, start: int) -> dict[str, Any]:
    """Flat rows -> input_ids and attention_mask (B, S), labels and decoder_input_ids (B, T), as transformers' models take them.

    ``start`` is the token that the decoder begins with.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    sources = list(torch.split(flat["source"], flat["source_lengths"].tolist()))
    targets = list(torch.split(flat["target"], flat["target_lengths"].tolist()))
    labels = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    shifted = labels.roll(1, dims=1)
    shifted[shifted == IGNORED] = pad_id
    shifted[:, 0] = start
    return {
        "input_ids": pad_sequence(sources, batch_first=True, padding_value=pad_id),
        "attention_mask": pad_sequence([torch.ones_like(ids) for ids in sources], batch_first=True),
        "decoder_input_ids": shifted,
        "labels": labels,
    }
