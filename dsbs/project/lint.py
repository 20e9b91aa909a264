"""The prompt linter: what is wrong with a prompt can be seen before a single reply is paid for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from dsbs.annotation.parse import parse_reply
from dsbs.config import Recipe
from dsbs.prompting import Prompt, PromptRenderer
from dsbs.records.rows import Example
from dsbs.tasks.base import Task, fold

NGRAM = 8  # words in a row that an exemplar and a row of the data share by more than chance (shorter texts: all their words)
_WORD = re.compile(r"\w+")
_SHOWN = 3


def lint(
    recipe: Recipe, prompt: Prompt, task: Task, parts: Mapping[str, Sequence[Example]]
) -> list[str]:
    """Warnings about a prompt's exemplars: unreadable, leaked from the data, unbalanced, too long for the context."""
    renderer = PromptRenderer(prompt, task)
    return [
        *_unreadable(prompt, task, renderer),
        *_leaks(prompt, task, parts),
        *_imbalance(prompt, task),
        *_overflow(recipe, renderer, (row for rows in parts.values() for row in rows)),
    ]


def _unreadable(prompt: Prompt, task: Task, renderer: PromptRenderer) -> list[str]:
    """An exemplar is what the teacher is to imitate: its own answer must be read back as its own label."""
    found = []
    for number, exemplar in enumerate(prompt.exemplars, 1):
        fields = task.fields(exemplar.input, f"prompt, exemplar {number}")
        _, answer = renderer.exemplar(exemplar, number)
        read = parse_reply(answer, prompt, task, fields, "stop")
        gold = task.gold(exemplar.label, fields, f"prompt, exemplar {number}")
        if read.label is None:
            found.append(
                f"prompt: exemplar {number} does not parse ({read.reason}): what imitates it will be rejected"
            )
        elif not task.correct(read.label, gold):
            found.append(
                f"prompt: exemplar {number} says {exemplar.label!r} and is read as {read.label!r}"
            )
        if not exemplar.rationale.strip():
            found.append(
                f"prompt: exemplar {number} has no rationale: the teacher will give none either"
            )
    return found


def _leaks(prompt: Prompt, task: Task, parts: Mapping[str, Sequence[Example]]) -> list[str]:
    """Exemplars that share a run of words with a row: in test they flatter the teacher, in train they copy themselves."""
    runs: dict[tuple[str, ...], int] = {}
    shorts: dict[tuple[str, ...], int] = {}
    for number, exemplar in enumerate(prompt.exemplars, 1):
        words = _words(task.text(task.fields(exemplar.input, f"prompt, exemplar {number}")))
        if len(words) <= NGRAM:
            shorts.setdefault(tuple(words), number)
        for i in range(len(words) - NGRAM + 1):
            runs.setdefault(tuple(words[i : i + NGRAM]), number)
    found = []
    for split, rows in parts.items():
        hits: dict[int, list[str]] = {}
        for row in rows:
            words = _words(task.text(row.input))
            numbers = {
                runs[run]
                for i in range(len(words) - NGRAM + 1)
                if (run := tuple(words[i : i + NGRAM])) in runs
            }
            if tuple(words) in shorts:
                numbers.add(shorts[tuple(words)])
            for number in numbers:
                hits.setdefault(number, []).append(row.id)
        for number, ids in sorted(hits.items()):
            if len(ids) > max(10, len(rows) // 2):
                continue  # the frame of a template, which every row has
            more = f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else ""
            found.append(
                f"prompt: exemplar {number} shares {NGRAM} words in a row with {split}: {', '.join(ids[:_SHOWN])}{more}"
            )
    return found


def _imbalance(prompt: Prompt, task: Task) -> list[str]:
    if task.labels is None or not prompt.exemplars:
        return []
    by_fold = {fold(label): label for label in task.labels}
    counts = Counter(
        by_fold.get(fold(exemplar.label), exemplar.label) for exemplar in prompt.exemplars
    )
    missing = [label for label in task.labels if not counts[label]]
    if missing:
        return [
            f"prompt: no exemplar is labelled {', '.join(missing)}; a teacher seldom says what it was not shown"
        ]
    most, least = max(counts.values()), min(counts.values())
    if most > 2 * least:
        shown = ", ".join(f"{label} {count}" for label, count in counts.most_common())
        return [
            f"prompt: the exemplars are unbalanced over the labels ({shown}); a teacher leans to the frequent one"
        ]
    return []


def _overflow(recipe: Recipe, renderer: PromptRenderer, rows: Iterable[Example]) -> list[str]:
    """Prompts that with their reply exceed the context, at four characters a token."""
    context = recipe.teacher.context_tokens or (2048 if recipe.teacher.kind == "llamacpp" else None)
    if context is None:
        return []
    budget = context - recipe.annotate.max_tokens
    over = count = longest = 0
    for row in rows:
        tokens = len(renderer.render(row).text) // 4
        count, over, longest = count + 1, over + (tokens > budget), max(longest, tokens)
    if not over:
        return []
    return [
        f"prompt: {over} of {count} prompts (the longest has about {longest} tokens) and annotate.max_tokens "
        f"{recipe.annotate.max_tokens} do not fit a context of {context} tokens"
    ]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
