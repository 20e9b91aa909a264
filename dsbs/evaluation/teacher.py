"""Predictions of the teacher, read from its annotations of the evaluated split."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.predictions import is_correct
from dsbs.files import canonical_json, digest, write_jsonl
from dsbs.formatting import count
from dsbs.prompting import source_fingerprint
from dsbs.records.rows import Annotation, Example, Prediction, Sample
from dsbs.run_folder import RunFolder
from dsbs.tasks.base import Task

TEACHER = "teacher"  # the system's name


def predict_teacher(
    recipe: Recipe, task: Task, rows: Sequence[Example], run: RunFolder, *, required: bool
) -> bool:
    """Write the teacher's prediction file; returns False if it did not annotate the split.

    With ``required`` (a student learned from the teacher), missing annotations raise UserError if
    ``annotate.splits`` names the split.
    """
    split = recipe.eval.split
    if split not in recipe.annotate.splits or recipe.teacher.kind == "human":
        return False
    if not run.annotations(split).is_file() and not required:
        return False
    annotations = run.load_annotations(split, source_fingerprint(recipe, task))
    missing = [row.id for row in rows if row.id not in annotations]
    if missing:
        raise UserError(
            f"{count(len(missing), f'{split} row')} without an annotation (first: {missing[0]})",
            hint="the data changed since: run `dsbs annotate` again",
        )
    prompt = run.manifest("annotate").get("prompt")
    prompt_hash = None
    if prompt is not None:
        prompt_hash = digest(canonical_json(prompt))
    predictions = (_prediction(annotations[row.id], row, task, prompt_hash) for row in rows)
    write_jsonl(
        run.predictions(TEACHER),
        (prediction.model_dump_json(by_alias=True) for prediction in predictions),
    )
    return True


def _prediction(
    annotation: Annotation, row: Example, task: Task, prompt_hash: str | None
) -> Prediction:
    """The label that the teacher gave without a hint, and its rationale for that label."""
    label = annotation.own_label
    teacher = annotation.teacher
    is_hinted = annotation.provenance == "hinted"
    return Prediction(
        id=row.id,
        input=row.input,
        gold=row.label,
        raw=label or "",
        prediction=label,
        correct=is_correct(task, label, row),
        probability=_probability(annotation, task),
        truncated=_truncated(annotation),
        rationale=None if is_hinted else annotation.rationale,
        made_by=f"teacher:{teacher.kind}:{teacher.model}",
        model=f"{teacher.kind}:{teacher.model}" if teacher.model else teacher.kind,
        prompt=prompt_hash,
    )


def _probability(annotation: Annotation, task: Task) -> float | None:
    """The probability of the teacher's own label: from its token log-probabilities if known, else
    its share of several samples.

    An ensemble's is the members' weighted share: log-probabilities are known only of the members
    that voted for the label.
    """
    label = annotation.own_label
    samples = _unhinted(annotation)
    if label is None:
        return None
    logprob = annotation.label_logprob
    share = annotation.vote_share
    if annotation.provenance == "hinted":  # logprob and share are of the label given in the hint
        read = [sample for sample in samples if sample.label is not None]
        votes = [sample for sample in read if task.correct(str(sample.label), label)]
        logprobs = [sample.label_logprob for sample in votes if sample.label_logprob is not None]
        logprob = statistics.fmean(logprobs) if logprobs else None
        share = len(votes) / len(read)
    if annotation.teacher.kind == "ensemble":
        return share
    if logprob is not None:
        return min(1.0, math.exp(logprob))
    return share if len(samples) > 1 else None


def _truncated(annotation: Annotation) -> bool | None:
    """Whether the token limit ended the output before a label; None if nothing was requested."""
    samples = _unhinted(annotation)
    if not samples:
        return None
    cut = samples[0].reason in ("truncated", "spent-on-reasoning")
    return annotation.own_label is None and cut


def _unhinted(annotation: Annotation) -> list[Sample]:
    return [sample for sample in annotation.samples if not sample.hinted]
