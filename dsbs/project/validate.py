"""Validation of a recipe against its data: lengths, labels, prompt. No model, request or torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dsbs.annotation.backends import make_teacher, reply_tokens, teacher_class
from dsbs.annotation.parse import parse_reply
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.cascade import check_cascade, rows_warning
from dsbs.evaluation.floors import check_floors
from dsbs.formatting import count
from dsbs.project.leakage import Overlap, find_overlaps
from dsbs.project.student_texts import (
    RATIONALE,
    Splits,
    StudentTexts,
    student_texts,
    unreadable_labels,
)
from dsbs.prompting import Prompt, PromptRenderer, in_order, load_prompt
from dsbs.records import Example
from dsbs.tasks import Task, make_task
from dsbs.tasks.data import is_held_out, load, survey
from dsbs.tasks.templates import render
from dsbs.training.rows import check_subsets
from dsbs.training.training_set import checked_students

NGRAM = 8  # an exemplar and a row that share so many words in a row do not do so by chance
_WORD = re.compile(r"\w+")
_LIST_COMMA = r"[\w)], *"
_MAX_IDS = 3  # row ids that a warning names


@dataclass(frozen=True, slots=True)
class Validation:
    """The figures of each split, the first prompt, warnings, and rows that repeat others."""

    splits: dict[str, dict[str, Any]]
    first_prompt: str | None
    warnings: list[str]
    overlaps: list[Overlap]

    def as_json(self) -> dict[str, Any]:
        return {
            "splits": self.splits,
            "first_prompt": self.first_prompt,
            "warnings": self.warnings,
            "overlaps": [overlap.as_json() for overlap in self.overlaps],
        }


def validate(recipe: Recipe) -> Validation:
    """Check a recipe against its data. Raises UserError for what would stop a later command."""
    task = make_task(recipe.task)
    students = [student for student, _ in checked_students(recipe, task)]
    check_subsets(recipe, task)
    check_floors(recipe, task)
    check_cascade(recipe)
    splits = {split: load(recipe, task, split) for split in ("train", "valid", "test")}
    first_prompt = None
    warnings: list[str] = []
    if recipe.teacher.is_prompted:
        prompt = load_prompt(recipe, task)
        first_prompt = PromptRenderer(prompt, task).render(splits["train"][0]).text
        warnings += check_prompt(recipe, prompt, task, splits)
        check_written_labels(task, prompt, splits["train"][0])
    if recipe.teacher.kind == "ensemble":
        warnings += _ensemble_warnings(recipe, splits)
    readers = [student_texts(student, task, splits) for student in students]
    for reader in readers:
        reader.check_teachers()
    # First: a label that the student cannot write is the worst problem.
    warnings[:0] = [warning for reader in readers for warning in reader.label_warnings(splits)]
    figures = {}
    for split, rows in splits.items():
        figures[split] = _split_figures(task, rows)
        for reader in readers:
            figures[split] |= reader.figures(rows, figures[split].get("students", {}))
        warnings += _split_warnings(recipe, task, split, rows, figures[split], readers)
    few_rows = rows_warning(recipe, len(splits["test"]))
    warnings += [few_rows] if few_rows else []
    overlaps = find_overlaps(_distinct_splits(recipe, splits), task)
    warnings += [overlap.warning() for overlap in overlaps]
    return Validation(figures, first_prompt, warnings, overlaps)


def _ensemble_warnings(recipe: Recipe, splits: Splits) -> list[str]:
    """Warnings about the members' votes. Raises what `dsbs annotate` would raise."""
    teacher = make_teacher(recipe)
    warnings = []
    for split in recipe.annotate.splits:
        votes = sum(1 for _ in teacher.annotations(splits[split], split))
        warnings += teacher.warnings(split, votes)
    return warnings


def _split_figures(task: Task, rows: Sequence[Example]) -> dict[str, Any]:
    """Counts of rows and labels."""
    labels = [row.label for row in rows if row.label is not None]
    figures: dict[str, Any] = {
        "rows": len(rows),
        "with_gold": len(labels),
        "hash": survey(rows).hash,
    }
    if task.labels is not None:
        figures["labels"] = dict(Counter(labels).most_common())
    return figures


def _split_warnings(
    recipe: Recipe,
    task: Task,
    split: str,
    rows: Sequence[Example],
    figures: dict[str, Any],
    readers: Sequence[StudentTexts],
) -> list[str]:
    warnings = []
    with_gold = figures["with_gold"]
    if split == "train" and not with_gold and recipe.train.labels != ("teacher",):
        warnings.append(
            "train: no row has a label; if a column holds it, set task.columns: {label: <column>}; "
            "to learn the teacher's labels, set train.labels: teacher"
        )
    if task.labels is not None and with_gold:
        missing = [label for label in task.labels if label not in figures["labels"]]
        if missing:
            warnings.append(f"{split}: no row is labeled {', '.join(missing)}")
    warnings += [warning for reader in readers for warning in reader.warnings(split, rows, figures)]
    if recipe.eval.split == split and with_gold < len(rows):
        unlabeled = count(len(rows) - with_gold, "row")
        warnings.append(f"{split}: {unlabeled} without a gold label, left out of the comparison")
    return warnings


def _distinct_splits(recipe: Recipe, splits: Splits) -> Splits:
    """The splits without the validation rows in train, from which they are held out."""
    train = [row for row in splits["train"] if not is_held_out(recipe, row)]
    return {**splits, "train": train}


# --- labels that are read back


def check_written_labels(task: Task, prompt: Prompt, example: Example) -> None:
    """Raise UserError where a label that the teacher writes in the prompt's form reads as another
    one or as none, or its rationale as none.
    """
    template = prompt.answer
    has_own_form = prompt.exemplars or prompt.pattern is not None or prompt.order == "label-first"
    if prompt.format == "json":
        texts = {name: f"{{{{ {name} | tojson }}}}" for name in ("rationale", "label")}
        pairs = (f'"{name}": {text}' for name, text in in_order(texts, prompt.order).items())
        template = f"{{{', '.join(pairs)}}}"
    elif not has_own_form:
        template = f"{{{{ rationale }}}}\n{prompt.anchor[0]} {{{{ label }}}}"
    unreadable: list[tuple[str, str, str | None]] = []
    for label in task.labels or ():
        variables = task.template_variables(example.input, label) | {"rationale": RATIONALE}
        answer = render(template, variables, where="prompt: answer")
        sample = parse_reply(answer, prompt, task, example.input, "stop")
        if sample.label != label:
            unreadable.append((label, answer, sample.label or sample.reason))
        elif sample.rationale is None and RATIONALE in answer:
            raise UserError(
                f"the teacher's answer {answer!r:.120} is read without its rationale",
                hint="change the prompt's answer, anchor or pattern so that they fit each other",
            )
    if unreadable:
        hint = "rename it, or change the prompt's anchor, pattern and stop"
        raise unreadable_labels("the teacher's answer", unreadable, hint)


# --- the prompt


def check_prompt(recipe: Recipe, prompt: Prompt, task: Task, splits: Splits) -> list[str]:
    """Warnings about exemplars: unreadable, in the data, unbalanced, or too long for the context.

    All of it is visible before a reply is paid for.
    """
    renderer = PromptRenderer(prompt, task)
    rows = (row for rows in splits.values() for row in rows)
    return [
        *_parse_warnings(prompt, task, renderer),
        *_listing_warnings(recipe, prompt, task),
        *_leak_warnings(prompt, task, splits),
        *_balance_warnings(prompt, task),
        *_context_warnings(recipe, renderer, rows),
    ]


def _parse_warnings(prompt: Prompt, task: Task, renderer: PromptRenderer) -> list[str]:
    """The teacher imitates an exemplar, so its answer must be parsed as its own label."""
    warnings = []
    for number, exemplar in enumerate(prompt.exemplars, 1):
        name = f"prompt: exemplar {number}"
        fields = task.fields(exemplar.input, f"prompt, exemplar {number}")
        _, answer = renderer.exemplar(exemplar, number)
        parsed = parse_reply(answer, prompt, task, fields, "stop")
        gold = exemplar.gold(task, fields, f"prompt, exemplar {number}")
        if parsed.label is None:
            warnings.append(
                f"{name} does not parse ({parsed.reason}): replies in its format will be rejected"
            )
        elif not task.correct(parsed.label, gold):
            warnings.append(f"{name} says {exemplar.label!r} but is read as {parsed.label!r}")
        if not exemplar.rationale.strip():
            warnings.append(f"{name} has no rationale, so the teacher will give none")
        elif parsed.label is not None and parsed.rationale is None:
            warnings.append(f"{name} is read without its rationale")
    return warnings


def _listing_warnings(recipe: Recipe, prompt: Prompt, task: Task) -> list[str]:
    """A prompt file that lists labels with commas, where a label has commas of its own."""
    if recipe.annotate.prompt is None:
        return []
    for label in task.labels or ():
        if "," not in label:
            continue
        pattern = rf"{_LIST_COMMA}{re.escape(label)}(?!\w)|(?<!\w){re.escape(label)}, *\w"
        if re.search(pattern, prompt.instruction + "\n" + prompt.template):
            return [
                f"prompt: labels are listed with commas, but {label!r} has a comma itself; "
                "write each label on a line of its own, or in quotes"
            ]
    return []


def _leak_warnings(prompt: Prompt, task: Task, splits: Splits) -> list[str]:
    """Exemplars that share words with rows: in test the teacher looks better than it is."""
    by_ngram: dict[tuple[str, ...], int] = {}
    by_text: dict[tuple[str, ...], int] = {}  # of texts too short for an n-gram
    for number, exemplar in enumerate(prompt.exemplars, 1):
        words = _words(task.text(task.fields(exemplar.input, f"prompt, exemplar {number}")))
        if len(words) <= NGRAM:
            by_text.setdefault(words, number)
        for ngram in _ngrams(words):
            by_ngram.setdefault(ngram, number)
    warnings = []
    for split, rows in splits.items():
        ids: dict[int, list[str]] = {}
        for row in rows:
            words = _words(task.text(row.input))
            numbers = {by_ngram[ngram] for ngram in _ngrams(words) if ngram in by_ngram}
            if words in by_text:
                numbers.add(by_text[words])
            for number in numbers:
                ids.setdefault(number, []).append(row.id)
        for number, row_ids in sorted(ids.items()):
            if len(row_ids) > max(10, len(rows) // 2):
                continue  # a template's words, which every row has
            more = ""
            if len(row_ids) > _MAX_IDS:
                more = f" and {len(row_ids) - _MAX_IDS} more"
            warnings.append(
                f"prompt: exemplar {number} shares {NGRAM} consecutive words with {split}: "
                f"{', '.join(row_ids[:_MAX_IDS])}{more}"
            )
    return warnings


def _words(text: str) -> tuple[str, ...]:
    return tuple(_WORD.findall(text.casefold()))


def _ngrams(words: tuple[str, ...]) -> Iterable[tuple[str, ...]]:
    return (words[i : i + NGRAM] for i in range(len(words) - NGRAM + 1))


def _balance_warnings(prompt: Prompt, task: Task) -> list[str]:
    if task.labels is None or not prompt.exemplars:
        return []
    counts = Counter(exemplar.gold(task, exemplar.input, "prompt") for exemplar in prompt.exemplars)
    missing = [label for label in task.labels if not counts[label]]
    if missing:
        return [
            f"prompt: no exemplar is labeled {', '.join(missing)}; "
            "a teacher rarely gives a label that it was not shown"
        ]
    if max(counts.values()) > 2 * min(counts.values()):
        numbers = ", ".join(f"{label} {number}" for label, number in counts.most_common())
        return [
            f"prompt: the exemplars are unbalanced over the labels ({numbers}); "
            "a teacher prefers the frequent one"
        ]
    return []


def _context_warnings(
    recipe: Recipe, renderer: PromptRenderer, rows: Iterable[Example]
) -> list[str]:
    """Prompts that exceed the context together with their reply, at four characters a token."""
    context = recipe.teacher.context_tokens
    if context is None:
        context = teacher_class(recipe.teacher.kind).default_context_tokens
    if context is None:
        return []
    tokens = reply_tokens(recipe)
    budget = context - tokens
    lengths = [len(renderer.render(row).text) // 4 for row in rows]
    too_long = sum(length > budget for length in lengths)
    if not too_long:
        return []
    return [
        f"prompt: {too_long} of {count(len(lengths), 'prompt')} (the longest has about "
        f"{max(lengths)} tokens) and annotate.max_tokens {tokens} "
        f"do not fit a context of {context} tokens"
    ]
