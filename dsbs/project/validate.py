"""Validation of a recipe against its data: lengths, labels, prompt. No model, request or torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dsbs.annotation.backends import make_teacher, price_of, reply_tokens, teacher_class
from dsbs.annotation.parse import parse_reply
from dsbs.config import Recipe
from dsbs.errors import UserError
from dsbs.evaluation.cascade import check_cascade, rows_warning
from dsbs.evaluation.floors import check_floors
from dsbs.formatting import count
from dsbs.project.leakage import Overlap, find_overlaps
from dsbs.project.student_texts import (
    RATIONALE,
    SAMPLE_SIZE,
    Splits,
    StudentTexts,
    student_texts,
    unreadable_labels,
)
from dsbs.prompting import Prompt, PromptRenderer, in_order, load_prompt
from dsbs.records import Example
from dsbs.tasks import Fields, Task, make_task
from dsbs.tasks.data import is_held_out, load, survey
from dsbs.tasks.templates import render
from dsbs.training.training_set import check_subsets, checked_students

NGRAM = 8  # an exemplar and a row that share so many words in a row do not do so by chance
_WORD = re.compile(r"\w+")
_LIST_COMMA = r"[\w)], *"
_MAX_IDS = 3  # row ids that a warning names
_MAX_POINTS = 10  # of a scale that a warning names
_SHOWN_LABELS = 8  # labels without a row in one warning


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
        warnings += written_gold_warnings(task, prompt, splits["train"])
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
    if task.head_labels:
        counts = Counter(name for label in labels for name in task.classes(label))
        figures["labels"] = dict(counts.most_common())
        if task.has_order:
            figures["labels"] = {name: counts[name] for name in task.head_labels if counts[name]}
    if task.has_several_labels and labels:
        sizes = [len(task.value(label)) for label in labels]
        figures["labels_per_row"] = sum(sizes) / len(sizes)
    fields = task.part_figures(rows)
    if fields:
        figures["fields"] = fields
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
    if task.head_labels and with_gold:
        warnings += _label_count_warnings(task, split, figures)
    if "fields" in figures and with_gold:
        warnings += _field_warnings(split, figures["fields"])
    warnings += [warning for reader in readers for warning in reader.warnings(split, rows, figures)]
    if recipe.eval.split == split and with_gold < len(rows):
        unlabeled = count(len(rows) - with_gold, "row")
        warnings.append(f"{split}: {unlabeled} without a gold label, left out of the comparison")
    return warnings


def _label_count_warnings(task: Task, split: str, figures: dict[str, Any]) -> list[str]:
    warnings = []
    missing = [label for label in task.head_labels if label not in figures["labels"]]
    if task.has_order and len(missing) > _MAX_POINTS:
        points = f"{len(missing)} of the scale's {len(task.head_labels)} points"
        warnings.append(f"{split}: {points} have no row; consider a larger task.step")
    elif missing:
        names = ", ".join(missing[:_SHOWN_LABELS])
        if len(missing) > _SHOWN_LABELS:
            names += f" and {len(missing) - _SHOWN_LABELS} more"
        warnings.append(f"{split}: no row is labeled {names}")
    if task.has_several_labels and figures["with_gold"] > 1:
        always = [
            label
            for label in task.head_labels
            if figures["labels"].get(label) == figures["with_gold"]
        ]
        if always:
            warnings.append(
                f"{split}: every row is labeled {', '.join(always)}: there is nothing to learn"
            )
    return warnings


def _field_warnings(split: str, fields: dict[str, dict[str, Any]]) -> list[str]:
    warnings = []
    for name, field in fields.items():
        if not field["filled"]:
            warnings.append(f"{split}: no row has a value for {name}")
            continue
        unused = [label for label, number in field.get("labels", {}).items() if not number]
        if unused:
            warnings.append(f"{split}: no row has {name} {', '.join(unused)}")
        ids = field.get("not_in_input", [])
        if ids:
            more = f" and {len(ids) - _MAX_IDS} more" if len(ids) > _MAX_IDS else ""
            warnings.append(
                f"{split}: {name} is verbatim, but in {count(len(ids), 'row')} its gold value does "
                f"not occur in the input: {', '.join(ids[:_MAX_IDS])}{more}"
            )
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
    labeled = [(label, example.input) for label in task.written_labels()]
    unreadable = _not_read_back(task, prompt, labeled)
    if unreadable:
        hint = "rename it, or change the prompt's anchor, pattern and stop"
        raise unreadable_labels("the teacher's answer", unreadable, hint)


def written_gold_warnings(task: Task, prompt: Prompt, rows: Sequence[Example]) -> list[str]:
    """A warning about gold labels of several parts that the prompt's form cannot state."""
    if not task.part_names:
        return []
    labeled = [(row.label, row.input) for row in rows[:SAMPLE_SIZE] if row.label is not None]
    unreadable = _not_read_back(task, prompt, labeled)
    # a gold value that the input lacks has a warning of its own
    unreadable = [entry for entry in unreadable if entry[2] != "not-in-input"]
    if not unreadable:
        return []
    label, _, reading = unreadable[0]
    return [
        f"prompt: {len(unreadable)} of {count(len(labeled), 'gold label')} would not be read back "
        f"from the teacher's answer: {label!r:.120} reads as {reading!r:.120}"
    ]


def _not_read_back(
    task: Task, prompt: Prompt, labeled: Iterable[tuple[str, Fields]]
) -> list[tuple[str, str, str | None]]:
    """The labels that read as another one or as none, as ``unreadable_labels`` has them."""
    template = prompt.answer
    has_own_form = prompt.exemplars or prompt.pattern is not None or prompt.order == "label-first"
    if prompt.format == "json":
        texts = {name: f"{{{{ {name} | tojson }}}}" for name in ("rationale", "label")}
        pairs = (f'"{name}": {text}' for name, text in in_order(texts, prompt.order).items())
        template = f"{{{', '.join(pairs)}}}"
    elif not has_own_form:
        template = f"{{{{ rationale }}}}\n{prompt.anchor[0]} {{{{ label }}}}"
    unreadable: list[tuple[str, str, str | None]] = []
    for label, fields in labeled:
        variables = task.template_variables(fields, label) | {"rationale": RATIONALE}
        if prompt.format == "json":
            variables["label"] = task.value(label)
        answer = render(template, variables, where="prompt: answer")
        sample = parse_reply(answer, prompt, task, fields, "stop")
        if sample.label != label:
            unreadable.append((label, answer, sample.label or sample.reason))
        elif sample.rationale is None and RATIONALE in answer:
            raise UserError(
                f"the teacher's answer {answer!r:.120} is read without its rationale",
                hint="change the prompt's answer, anchor or pattern so that they fit each other",
            )
    return unreadable


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
    for label in task.head_labels:
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
    if not task.head_labels or not prompt.exemplars:
        return []
    counts = Counter(
        label
        for exemplar in prompt.exemplars
        for label in task.classes(exemplar.gold(task, exemplar.input, "prompt"))
    )
    missing = [label for label in task.head_labels if not counts[label]]
    if task.has_order:
        low, *_, high = task.head_labels
        missing = [label for label in missing if label in (low, high)]
    if missing:
        return [
            f"prompt: no exemplar is labeled {', '.join(missing)}; "
            "a teacher rarely gives a label that it was not shown"
        ]
    is_balanced = max(counts.values()) <= 2 * min(counts.values())
    if not is_balanced and not task.has_several_labels:
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
    tokens = reply_tokens(recipe, price_of(recipe.teacher, 1.0))
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
