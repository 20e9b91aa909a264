"""Leakage-adjusted simulatability (LAS; Hase et al., 2020, Findings of EMNLP, arXiv:2010.04119).

Does a rationale help another model to tell which label its system gave, beyond giving that label away? The other model is
a small simulator, trained from the recipe's own student start to name the system's label from the input x, the rationale e,
or both. It is cross-fitted: each half of the rows is simulated by a model trained on the other half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.bootstrap import Clusters
from dsbs.evaluation.metrics import mean_over_rows
from dsbs.evaluation.score import Scored
from dsbs.evaluation.stats import counts_interval
from dsbs.files import canonical_json, digest, read_jsonl, write_jsonl
from dsbs.progress import Progress, running
from dsbs.records.results import Measure
from dsbs.students import new_model, new_tokenizer, start_hash
from dsbs.tasks.base import Task

SCHEMA = "dsbs.simulated/1"
FOLDS = 2
STEPS = 300  # a few minutes for a nano student on one core: the same for all systems, so that they compare
BATCH = 32  # the published code's 36, for e-SNLI, as a power of two
LEARNING_RATE = 1e-4  # the published code's, for T5
SCRATCH_LEARNING_RATE = 1e-3  # random weights have further to go
MAX_GRADIENT_NORM = 1.0
# Shares of a training batch whose rationale or whose input is left out, as for e-SNLI in the published code
WITHOUT_RATIONALE, WITHOUT_INPUT = 0.4, 0.2
FEWEST = 16  # rows to train on: fewer teach no vocabulary and nothing else
SEED = 20201008
PREDICT_BATCH = 128

VIEWS = ("x", "e", "xe")


@dataclass(frozen=True, slots=True)
class _Row:
    id: str
    text: str
    rationale: str
    label: str
    is_label: Callable[[str], bool]  # whether a text says the label
    fold: int


def simulated_file(run: Path, member: str) -> Path:
    return run / "eval" / "simulated" / f"{member}.jsonl"


def simulate(
    recipe: Recipe, task: Task, member: str, scored: Scored, run: Path, progress: Progress
) -> None:
    """Write ``eval/simulated/<member>.jsonl``, a line {id, fold, x, e, xe} for each row with a label and a rationale.

    x, e and xe say whether the simulator named the system's own label from the input, the rationale, and both. A file that
    was made of the same predictions by the same settings is kept. Too few rows are told of, and nothing is written.
    """
    path = simulated_file(run, member)
    rows = _rows(task, scored, recipe.eval.cluster)
    of = _content(scored)
    made_by = _settings(recipe, of, rows)
    there = _lines(path)
    if there and there[0].get("made_by") == made_by:
        return
    parts = [[row for row in rows if row.fold == fold] for fold in range(FOLDS)]
    if min(map(len, parts)) < FEWEST:
        progress.say(
            f"simulator of {member}: {len(rows)} rows have a label and a rationale, too few to learn from"
        )
        return
    found: dict[str, dict[str, bool]] = {row.id: {} for row in rows}
    for fold, part in enumerate(parts):
        others = [row for row in rows if row.fold != fold]
        with running(
            progress, f"simulate {member} {fold + 1}/{FOLDS}", STEPS, worth=(BATCH, "rows")
        ):
            simulator = _Simulator(recipe, others, SEED + fold, progress)
        for view in VIEWS:
            for row, said in zip(
                part, simulator.answer([_source(row, view) for row in part]), strict=True
            ):
                found[row.id][view] = row.is_label(said)
    lines = (
        {
            "schema": SCHEMA,
            "id": row.id,
            "fold": row.fold,
            **found[row.id],
            "of": of,
            "made_by": made_by,
        }
        for row in rows
    )
    write_jsonl(path, (canonical_json(line) for line in lines))


def simulatability(
    run: Path, members: Sequence[str], scored: Sequence[Scored], clusters: Clusters = None
) -> dict[str, Measure]:
    """``las`` and what belongs to it, from the files of one system's ``members`` (its seeds; ``scored`` goes along with them).

    Empty where a member has no file, or one of other predictions. Where ``simulator_accuracy`` is not above
    ``simulator_majority``, the simulator learned nothing and ``las`` says nothing.
    """
    kinds, majority = [], []
    for member, file in zip(members, scored, strict=True):
        lines = {str(line.get("id")): line for line in _lines(simulated_file(run, member))}
        if not lines or next(iter(lines.values())).get("of") != _content(file):
            return {}
        told = [lines.get(row.id) for row in file.rows]
        kinds.append(
            np.array(
                [
                    ABSENT if line is None else kind_of(line["x"], line["e"], line["xe"])
                    for line in told
                ]
            )
        )
        majority.append(_is_majority(file.labels, told))
    stacked = np.array(kinds)
    measured = leakage_adjusted(stacked, clusters)
    if measured is None:
        return {}

    def share(which: NDArray[np.bool_]) -> Measure | None:
        return mean_over_rows(np.where(stacked == ABSENT, np.nan, which), clusters)

    found = {
        "las": measured,
        "leaking": share(stacked & 2 > 0),
        "simulator_accuracy": share(stacked & 4 > 0),
        "simulator_majority": mean_over_rows(majority, clusters),
    }
    return {name: measure for name, measure in found.items() if measure is not None}


# --- the measure


ABSENT = 8  # the kind of a row that has no label or no rationale


def kind_of(x: bool, e: bool, xe: bool) -> int:
    """One of eight kinds of row: which views of it let the simulator name the label."""
    return x + 2 * e + 4 * xe


def leakage_adjusted(kinds: NDArray[np.int64], clusters: Clusters = None) -> Measure | None:
    """LAS, its mean over seeds, and the bootstrap interval over rows. kinds (seeds, rows); None where every row is absent."""
    told = (kinds != ABSENT).any(axis=0)
    if not told.any():
        return None
    # with all that a row could have been, so that rows without a difference leave room for one
    possible = np.tile(np.arange(ABSENT), (len(kinds), 1))
    outcomes, at = np.unique(np.hstack([possible, kinds[:, told]]), axis=1, return_inverse=True)
    at, cells = at.ravel()[ABSENT:], outcomes.shape[1]
    statistic = las_of_counts(outcomes)
    interval = counts_interval(
        at, statistic, None if clusters is None else clusters[told], cells=cells
    )
    value = statistic(np.bincount(at, minlength=cells)[None])[0]
    return Measure(value=float(value), ci95=interval, n=int(told.sum()))


def las_of_counts(outcomes: NDArray[np.int64]) -> Callable[[NDArray[Any]], NDArray[np.float64]]:
    """LAS as a function of how often each kind of row occurs. outcomes (seeds, kinds).

    The function takes counts (resamples, kinds) and gives (resamples,). The paper's definition: 1[xe right] - 1[x right], its
    mean over leaking rows (e alone gives the label) and its mean over the others, and the mean of the two. Where one group has
    no rows, the other one speaks alone.
    """
    gain = (outcomes >> 2 & 1) - (outcomes & 1)  # (seeds, kinds)
    there, leaks = outcomes != ABSENT, (outcomes >> 1 & 1).astype(bool)

    def statistic(counts: NDArray[Any]) -> NDArray[np.float64]:
        per_seed = []
        for seed in range(len(outcomes)):
            groups = [there[seed] & leaks[seed], there[seed] & ~leaks[seed]]
            sizes = np.array(
                [counts @ group for group in groups], dtype=np.float64
            )  # (2, resamples)
            gains = np.array([counts @ (group * gain[seed]) for group in groups], dtype=np.float64)
            with np.errstate(invalid="ignore"):
                per_seed.append(_mean_of_numbers(gains / sizes))
        return _mean_of_numbers(np.array(per_seed))

    return statistic


def _mean_of_numbers(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(parts, resamples) -> (resamples,): the mean over parts that are numbers; NaN where none is."""
    is_number = ~np.isnan(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(is_number, values, 0.0).sum(axis=0) / is_number.sum(axis=0))


def _is_majority(
    labels: Sequence[str | None], told: Sequence[dict[str, Any] | None]
) -> NDArray[np.float64]:
    """Whether a row's label is the most frequent one of the rows that its simulator was trained on; NaN where none was."""
    names, at = np.unique([str(label) for label in labels], return_inverse=True)
    folds = np.array([-1 if line is None else line["fold"] for line in told])
    found = np.full(len(folds), np.nan)
    for fold in range(FOLDS):
        mine, others = folds == fold, (folds >= 0) & (folds != fold)
        if others.any():
            found[mine] = at[mine] == np.bincount(at[others], minlength=len(names)).argmax()
    return found


# --- the rows


def _rows(task: Task, scored: Scored, cluster: str | None = None) -> list[_Row]:
    """Rows with a label and a rationale. Those that are equal in the input field ``cluster`` are in one fold."""
    rows = []
    for row, given, label in zip(scored.rows, scored.predictions, scored.labels, strict=True):
        rationale = " ".join((given.rationale or "").split())
        if label is None or not rationale:
            continue

        def says(text: str, label: str = label, fields: Any = row.input) -> bool:
            read = task.read_label(text, fields)
            return isinstance(read, str) and task.correct(read, label)

        fold = int(digest(row.id if cluster is None else str(row.input[cluster]))[:8], 16) % FOLDS
        rows.append(_Row(row.id, task.text(row.input), rationale, label, says, fold))
    return rows


def _source(row: _Row, view: str) -> str:
    """What the simulator reads. The rationale comes first: what is cut off an input that is too long is never the rationale."""
    rationale, text = f"rationale: {row.rationale}", f"input: {row.text}"
    return {"x": text, "e": rationale, "xe": f"{rationale} {text}"}[view]


def _content(scored: Scored) -> str:
    """Hash of the labels and rationales that are to be simulated."""
    pairs = zip(scored.rows, scored.predictions, scored.labels, strict=True)
    return digest(canonical_json([[row.id, given.rationale, label] for row, given, label in pairs]))


def _settings(recipe: Recipe, of: str, rows: Sequence[_Row]) -> str:
    start = recipe.train.init or recipe.student.model
    found = recipe.train.init or recipe.student.source
    constants = [
        STEPS,
        BATCH,
        LEARNING_RATE,
        SCRATCH_LEARNING_RATE,
        WITHOUT_RATIONALE,
        WITHOUT_INPUT,
        SEED,
    ]
    return digest(
        of,
        canonical_json([[row.text, row.fold] for row in rows]),
        canonical_json(recipe.student.settings),
        canonical_json([start, *start_hash(found), *constants]),
    )


def _lines(path: Path) -> list[dict[str, Any]]:
    """What was written before; nothing where it cannot be read, since it can be made again."""
    try:
        return [line for _, line in read_jsonl(path)]
    except (FileNotFoundError, UserError):
        return []


# --- the model


class _Simulator:
    """A student from the recipe's start, trained on ``rows`` to write their labels. Seeded, and in float32."""

    def __init__(self, recipe: Recipe, rows: Sequence[_Row], seed: int, progress: Progress) -> None:
        import torch

        section, init = recipe.student, recipe.train.init
        texts = (text for row in rows for text in (_source(row, "xe"), row.label))
        self._tokenizer = new_tokenizer(section, texts, init)
        self._longest = section.max_input_tokens
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = new_model(section, self._tokenizer, seed, init)
            if not model.config.is_encoder_decoder:
                raise UserError(
                    f"eval.simulator starts from the student's weights, and {init or section.model} is decoder-only",
                    hint="leave eval.simulator out: simulators are T5s",
                )
            self._model = model.to("cuda") if torch.cuda.is_available() else model
            self._label_tokens = max(
                map(len, self._tokenizer([row.label for row in rows])["input_ids"])
            )
            rate = SCRATCH_LEARNING_RATE if section.is_scratch and not init else LEARNING_RATE
            self._learn(rows, rate, np.random.default_rng(seed), progress)

    def _learn(
        self, rows: Sequence[_Row], rate: float, rng: np.random.Generator, progress: Progress
    ) -> None:
        import torch

        optimizer = torch.optim.AdamW(self._model.parameters(), lr=rate)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=STEPS)
        self._model.train()
        for step, chosen in enumerate(_batches(len(rows), rng)):
            draws = rng.random(len(chosen))
            sources = [_source(rows[i], _view(draw)) for i, draw in zip(chosen, draws, strict=True)]
            batch = self._encode(sources)
            targets = self._tokenizer(
                [rows[i].label for i in chosen], padding=True, return_tensors="pt"
            ).input_ids
            targets[targets == self._tokenizer.pad_token_id] = -100
            loss = self._model(**batch, labels=targets.to(self._model.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.update(step + 1, f"loss {loss.item():.3f}")

    def answer(self, sources: Sequence[str]) -> list[str]:
        """What it writes for each, greedily."""
        import torch

        self._model.eval()
        said = [""] * len(sources)
        order = sorted(range(len(sources)), key=lambda i: -len(sources[i]))
        for first in range(0, len(order), PREDICT_BATCH):
            chosen = order[first : first + PREDICT_BATCH]
            with torch.inference_mode():
                ids = self._model.generate(
                    **self._encode([sources[i] for i in chosen]),
                    max_new_tokens=self._label_tokens,
                    num_beams=1,
                    do_sample=False,
                )
            for i, text in zip(
                chosen, self._tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True
            ):
                said[i] = text.strip()
        return said

    def _encode(self, sources: list[str]) -> Any:
        batch = self._tokenizer(
            sources, padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        return batch.to(self._model.device)


def _view(draw: float) -> str:
    if draw < WITHOUT_RATIONALE:
        return "x"
    return "e" if draw < WITHOUT_RATIONALE + WITHOUT_INPUT else "xe"


def _batches(rows: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """STEPS batches of row numbers, each row once before any comes again."""
    left: list[int] = []
    for _ in range(STEPS):
        while len(left) < min(BATCH, rows):
            left += rng.permutation(rows).tolist()
        yield left[:BATCH]
        left = left[BATCH:]
