"""``dsbs validate``: load the data, render the prompt, tokenise and measure. No model, no call, no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsbs.annotation.backends import make_teacher
from dsbs.config import Recipe
from dsbs.project.lint import lint
from dsbs.prompting import PromptRenderer, load_prompt
from dsbs.records.rows import Example
from dsbs.students import InputFormat, check_student, new_input_format, new_tokenizer
from dsbs.students.tokenizer import vocabulary_warnings
from dsbs.tasks import make_task
from dsbs.tasks.base import Task
from dsbs.tasks.data import load, survey
from dsbs.training.distillation.base import check_terms
from dsbs.training.grid import grid

_SAMPLE = 2000  # rows tokenised of each split


@dataclass(frozen=True, slots=True)
class Validation:
    """What a look at a recipe found: the splits' figures, the first prompt, and what deserves attention."""

    splits: dict[str, dict[str, Any]]
    first_prompt: str | None
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        return {"splits": self.splits, "first_prompt": self.first_prompt, "warnings": self.warnings}


def validate(recipe: Recipe) -> Validation:
    """Check a recipe against its data. Raises UserError for what would stop a later command."""
    task = make_task(recipe.task)
    check_terms(recipe.train, task, grid(recipe.train))
    check_student(recipe)
    parts = {split: load(recipe, task, split) for split in ("train", "valid", "test")}
    first_prompt = None
    warnings: list[str] = []
    if recipe.teacher.is_prompted:
        prompt = load_prompt(recipe, task)
        first_prompt = PromptRenderer(prompt, task).render(parts["train"][0]).text
        warnings += lint(recipe, prompt, task, parts)
    if recipe.teacher.kind == "ensemble":
        warnings += _members(recipe, parts)
    texts = [
        part
        for row in parts["train"]
        for part in (task.text(row.input), row.label, row.rationale)
        if part
    ]
    tokenizer = new_tokenizer(recipe.student, ["predict: explain: ", *texts], recipe.train.init)
    wording = new_input_format(recipe.student, tokenizer, recipe.train.init)
    labels = [row.label for rows in parts.values() for row in rows if row.label is not None]
    warnings[:0] = vocabulary_warnings(
        recipe.student, tokenizer, [*labels, *(task.labels or ())], {}
    )  # nothing outweighs these
    splits = {
        split: _look(recipe, task, tokenizer, wording, split, rows, warnings)
        for split, rows in parts.items()
    }
    warnings += _overlaps(parts)
    return Validation(splits, first_prompt, warnings)


def _members(recipe: Recipe, parts: dict[str, list[Example]]) -> list[str]:
    """Puts the members' annotations to the vote and throws the result away: what `dsbs annotate` would stop at is told now."""
    teacher = make_teacher(recipe)
    lacks = []
    for split in recipe.annotate.splits:
        votes = sum(1 for _ in teacher.annotations(parts[split], split))
        lacks += teacher.warnings(split, votes)
    return lacks


def _look(
    recipe: Recipe,
    task: Task,
    tokenizer: Any,
    wording: InputFormat,
    split: str,
    rows: Sequence[Example],
    warnings: list[str],
) -> dict[str, Any]:
    sample = rows[:_SAMPLE]
    limit, target_limit = recipe.student.max_input_tokens, recipe.student.max_target_tokens
    read = wording.read(["explain: " + task.text(row.input) for row in sample])
    written = wording.write([part for row in sample for part in (row.label, row.rationale) if part])
    inputs, targets = _tokens(tokenizer, read, limit), _tokens(tokenizer, written, target_limit)
    with_gold = [row.label for row in rows if row.label is not None]
    found: dict[str, Any] = {
        "rows": len(rows),
        "with_gold": len(with_gold),
        "hash": survey(rows).hash,
    }
    if task.labels is not None:
        found["labels"] = dict(Counter(with_gold).most_common())
        missing = [label for label in task.labels if with_gold and label not in found["labels"]]
        if missing:
            warnings.append(f"{split}: no row is labelled {', '.join(missing)}")
    found["inputs"], found["targets"] = inputs, targets
    for what, part, key in (
        ("inputs", inputs, "max_input_tokens"),
        ("targets", targets, "max_target_tokens"),
    ):
        if part and part["truncated"] > 0:
            warnings.append(
                f"{split}: {100 * part['truncated']:.1f} % of {what} are longer than student.{key} and are cut"
            )
    said = {
        "inputs": [task.text(row.input) for row in rows],
        "rationales": [row.rationale for row in rows if row.rationale],
    }
    warnings += [
        f"{split}: {warning}"
        for warning in vocabulary_warnings(recipe.student, tokenizer, [], said)
    ]
    if recipe.eval.split == split and len(with_gold) < len(rows):
        warnings.append(
            f"{split}: {len(rows) - len(with_gold)} rows have no gold label and are left out of the comparison"
        )
    return found


def _tokens(tokenizer: Any, rows: Sequence[list[int]], limit: int) -> dict[str, Any] | None:
    """Lengths in tokens, the share of texts over ``limit``, and the share of unknown tokens."""
    if not rows:
        return None
    lengths = sorted(len(ids) for ids in rows)
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in rows)
    return {
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
        "truncated": sum(length > limit for length in lengths) / len(lengths),
        "unknown": unknown / max(1, sum(lengths)),
    }


def _overlaps(parts: dict[str, list[Example]]) -> list[str]:
    """Warnings for inputs that stand in train and in valid or test as well (a held-out valid part is part of train)."""
    warnings = []
    ids = {split: {row.id for row in rows} for split, rows in parts.items()}
    inputs = {
        split: {str(sorted(row.input.items())) for row in rows} for split, rows in parts.items()
    }
    for split in ("valid", "test"):
        if split == "valid" and ids["valid"] <= ids["train"]:
            continue
        shared = len(inputs["train"] & inputs[split])
        if shared:
            warnings.append(
                f"{split}: {shared} inputs also stand in train; accuracy there is flattered"
            )
    return warnings
