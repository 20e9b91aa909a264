"""How often a cascade misses its target, with a guaranteed threshold and with two naive ones.

    python benchmarks/cascade.py runs/esnli --student distill-teacher-s0
    python benchmarks/cascade.py --made 2000

Takes a run's test rows with the student's predictions and the teacher's annotations, splits them at
random into calibration and test rows, and chooses a threshold on the calibration rows in three
ways. Prints Markdown: the splits in which the test rows' agreement is below the target, those in
which it is clearly below (an exact test at 5%: test rows have chance of their own), the share of
the requests that the student answers, and its agreement where it answers, with the splits in which
that is below the target.

``--export FOLDER`` writes the rows and the splits for benchmarks/peers/tracer_peer.py; give its
output with ``--peer FILE`` to have it in the table.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsbs.evaluation.thresholds import agreement_threshold
from dsbs.files import read_jsonl
from dsbs.formatting import markdown_table, percent
from dsbs.students.calibration import confidence_of, read_calibration
from dsbs.students.card import read_card
from dsbs.tasks import make_task

Split = tuple[NDArray[np.int64], NDArray[np.int64]]

LEVEL = 0.95
NAIVE_PROBABILITY = 0.9


@dataclass(frozen=True, slots=True)
class Rows:
    """Test rows; all (rows,)."""

    ids: list[str]
    probability: NDArray[np.float64]
    confidence: NDArray[np.float64]
    differs: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A threshold on the test rows of one split."""

    coverage: float
    agreement: float
    """Of all test rows; those that the teacher answers agree."""
    n: int
    answered_agreement: float | None
    """Of the rows that the student answers; None: it answers none."""


def read_rows(run: Path, student: str) -> Rows:
    """The test rows of a run with a label of the teacher, and the student's answers."""
    labels = {row["id"]: row["own_label"] for _, row in read_jsonl(run / "annotate" / "test.jsonl")}
    calibration = read_calibration(run / "train" / student)
    task = make_task(read_card(run / "train" / student).task)
    kind = "probability" if calibration is None else calibration.confidence
    predictions = [
        row
        for _, row in read_jsonl(run / "eval" / "predictions" / f"{student}.jsonl")
        if labels.get(row["id"]) is not None
    ]
    confidence = [
        confidence_of(kind, row["probability"], row.get("distribution")) for row in predictions
    ]

    def agrees(row: dict[str, Any]) -> bool:
        # As the task compares them: "8" and "( 3.0 + 5.0 )" are one answer.
        prediction = row["prediction"]
        return prediction is not None and task.correct(prediction, labels[row["id"]])

    print(f"{run.name}, {student}: {len(predictions):,} rows, confidence by {kind}")
    return Rows(
        [row["id"] for row in predictions],
        np.array([row["probability"] for row in predictions], dtype=np.float64),
        np.array(confidence, dtype=np.float64),
        np.array([not agrees(row) for row in predictions]),
    )


def made_rows(number: int) -> Rows:
    """Rows of an overconfident student, without a run."""
    rng = np.random.default_rng(0)
    probability = rng.beta(5, 1, number)
    differs = rng.random(number) < 1.2 * (1 - probability) + 0.02
    return Rows([str(i) for i in range(number)], probability, probability, differs)


def point_estimate(rows: Rows, chosen: NDArray[np.int64], target: float) -> float:
    """The loosest threshold with an agreement of at least the target on the calibration rows."""
    order = chosen[np.argsort(-rows.confidence[chosen], kind="stable")]
    agreement = 1 - rows.differs[order].cumsum() / len(order)
    holds = np.flatnonzero(agreement >= target)
    return float(rows.confidence[order[holds[-1]]]) if len(holds) else np.inf


def guaranteed(rows: Rows, chosen: NDArray[np.int64], target: float) -> float:
    choice = agreement_threshold(
        rows.confidence[chosen], rows.differs[chosen], round(1 - target, 12), LEVEL
    )
    return np.inf if choice.threshold is None else choice.threshold


def test(rows: Rows, test_rows: NDArray[np.int64], answered: NDArray[np.bool_]) -> Outcome:
    """``answered`` (test rows,)"""
    differs = rows.differs[test_rows] & answered
    coverage = float(answered.mean())
    agrees = None
    if answered.any():
        agrees = 1 - float(differs.sum() / answered.sum())
    return Outcome(coverage, 1 - float(differs.mean()), len(differs), agrees)


def random_splits(n: int, number: int, share: float) -> list[Split]:
    """The calibration rows and the test rows of each split."""
    splits = []
    for seed in range(number):
        order = np.random.default_rng(seed).permutation(n)
        size = round(share * n)
        splits.append((np.sort(order[:size]), np.sort(order[size:])))
    return splits


def is_clearly_below(outcome: Outcome, target: float) -> bool:
    from scipy.stats import binom

    differs = round((1 - outcome.agreement) * outcome.n)
    return bool(binom.sf(differs - 1, outcome.n, 1 - target) < 0.05)


def table_row(method: str, target: float, outcomes: list[Outcome]) -> list[str]:
    below = sum(outcome.agreement < target for outcome in outcomes)
    clearly = sum(is_clearly_below(outcome, target) for outcome in outcomes)
    agreement = [outcome.agreement for outcome in outcomes]
    coverage = [outcome.coverage for outcome in outcomes]
    answered = [o.answered_agreement for o in outcomes if o.answered_agreement is not None]
    below_answered = sum(agreement < target for agreement in answered)
    return [
        percent(target),
        method,
        f"{below} of {len(outcomes)}",
        str(clearly),
        f"{percent(mean(agreement))} ({percent(min(agreement))})",
        f"{percent(mean(coverage))} ({percent(min(coverage))}–{percent(max(coverage))})",
        f"{percent(mean(answered))} ({below_answered})" if answered else "–",
    ]


def compare(rows: Rows, targets: list[float], splits: int, share: float) -> list[list[str]]:
    lines = []
    for target in targets:
        outcomes: dict[str, list[Outcome]] = {}
        for calibration, test_rows in random_splits(len(rows.ids), splits, share):
            thresholds = {
                "guaranteed": guaranteed(rows, calibration, target),
                "point estimate": point_estimate(rows, calibration, target),
            }
            for method, threshold in thresholds.items():
                answered = rows.confidence[test_rows] >= threshold
                outcomes.setdefault(method, []).append(test(rows, test_rows, answered))
            answered = rows.probability[test_rows] >= NAIVE_PROBABILITY
            name = f"probability ≥ {NAIVE_PROBABILITY:g}"
            outcomes.setdefault(name, []).append(test(rows, test_rows, answered))
        lines += [table_row(method, target, found) for method, found in outcomes.items()]
    return lines


def peer_rows(path: Path) -> list[list[str]]:
    """The lines of a peer, which were tested on the same rows."""
    groups: dict[tuple[str, float], list[Outcome]] = {}
    for _, row in read_jsonl(path):
        values = (row["coverage"], row["agreement"], row["n"], row["answered_agreement"])
        outcome = Outcome(*values)
        groups.setdefault((row["method"], row["target"]), []).append(outcome)
    return [table_row(method, target, outcomes) for (method, target), outcomes in groups.items()]


def embed(texts: list[str]) -> NDArray[np.float32]:
    """Normalized sentence embeddings of all-MiniLM-L6-v2: the mean of its states."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch
    from transformers import AutoModel, AutoTokenizer

    from dsbs.students.weights import expand_local

    source = expand_local("minilm-l6")
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    result = np.zeros((len(texts), model.config.hidden_size), dtype=np.float32)
    with torch.inference_mode():
        for first in range(0, len(texts), 128):
            batch = order[first : first + 128]
            encoded = tokenizer(
                [texts[i] for i in batch], padding=True, truncation=True, return_tensors="pt"
            )
            mask = encoded["attention_mask"][..., None]
            states = (model(**encoded).last_hidden_state * mask).sum(1) / mask.sum(1)
            result[batch] = torch.nn.functional.normalize(states, dim=1).numpy()
    return result


def embed_words(texts: list[str]) -> NDArray[np.float32]:
    """Normalized sentence embeddings without a model: 300 directions of TF-IDF."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import normalize

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2).fit_transform(texts)
    return np.asarray(normalize(TruncatedSVD(300, random_state=0).fit_transform(words)), np.float32)


EMBEDDINGS = {"minilm": embed, "tfidf": embed_words}


def export(rows: Rows, run: Path, folder: Path, splits: int, share: float, embeddings: str) -> None:
    """Write the texts, labels, embeddings and splits that a peer needs."""
    folder.mkdir(parents=True, exist_ok=True)
    annotations = {row["id"]: row for _, row in read_jsonl(run / "annotate" / "test.jsonl")}
    train = [row for _, row in read_jsonl(run / "annotate" / "train.jsonl") if row["own_label"]]
    lines = train + [annotations[row_id] for row_id in rows.ids]
    texts = [" </s> ".join(map(str, row["input"].values())) for row in lines]
    records = [
        {"input": text, "teacher": row["own_label"]} for text, row in zip(texts, lines, strict=True)
    ]
    (folder / "rows.json").write_text(json.dumps(records), encoding="utf-8")
    np.save(folder / "embeddings.npy", EMBEDDINGS[embeddings](texts))
    (folder / "splits.json").write_text(
        json.dumps(
            [
                [(part + len(train)).tolist() for part in split]
                for split in random_splits(len(rows.ids), splits, share)
            ]
        ),
        encoding="utf-8",
    )
    print(f"{len(train):,} train rows and {len(rows.ids):,} test rows in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--student")
    parser.add_argument("--made", type=int, help="so many made rows in place of a run")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--share", type=float, default=0.5, help="of calibration rows")
    parser.add_argument("--export", type=Path, help="write the rows for a peer and stop")
    parser.add_argument("--embeddings", choices=EMBEDDINGS, default="minilm", help="of --export")
    parser.add_argument("--peer", type=Path, nargs="*", default=[])
    args = parser.parse_args()
    if args.made is None and (args.run is None or args.student is None):
        parser.error("give a run and --student, or --made")
    rows = made_rows(args.made) if args.made else read_rows(args.run, args.student)
    if args.export is not None:
        export(rows, args.run, args.export, args.splits, args.share, args.embeddings)
        return
    lines = compare(rows, args.targets, args.splits, args.share)
    for path in args.peer:
        lines += peer_rows(path)
    lines.sort(key=lambda line: float(line[0].rstrip("%")))
    headings = ["target", "threshold", "below target", "clearly", "agreement, mean (lowest)"]
    headings += ["coverage, mean (range)", "where the student answers (splits below)"]
    print("\n".join(["", *markdown_table(headings, lines)]))


if __name__ == "__main__":
    main()
