"""Prompts: prompt files, rendering for an example, and the fingerprint of annotations.

A prompt is an instruction, exemplars and one question, in this order. Everything before the
question is the same in every request, byte for byte, so that a provider's prompt cache can serve
it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dsbs.config import Recipe
from dsbs.config.load import dotted, load_located
from dsbs.errors import UserError, needs_extra
from dsbs.files import canonical_json, digest, find_file
from dsbs.records import Example
from dsbs.run_folder import RunFolder
from dsbs.tasks import Task
from dsbs.tasks.templates import fields_of, render


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Order = Literal["rationale-first", "label-first"]

_MAX_PATTERN = 1000  # characters
_PATTERN_GROUPS = {"label", "rationale"}
# Keys that were added to a section or to the prompt file after runs existed: see _hashed.
_LATER_KEYS = {"format", "order", "pattern", "reasoning_effort", "score_vote", "use_recorded"}
_VARIABLE = re.compile(r"\{\{-?\s*(label|letter|rationale)\b")


def in_order(values: Mapping[str, Any], order: Order) -> dict[str, Any]:
    """The values of ``rationale`` and ``label`` in the order in which a reply has them."""
    names = ("label", "rationale") if order == "label-first" else ("rationale", "label")
    return {name: values[name] for name in names}


def _default_answer(values: Mapping[str, Any]) -> str:
    """The template of an answer in a prompt without one of its own."""
    if values.get("order") != "label-first":
        return "{{ rationale }}\nAnswer: {{ label }}"
    anchor = (values.get("anchor") or ("",))[0].strip()
    return f"{anchor} {{{{ label }}}}\n{{{{ rationale }}}}".lstrip()


def _hashed(settings: BaseModel, without_effect: Set[str] = frozenset()) -> dict[str, Any]:
    """The settings that a hash counts. A key of ``_LATER_KEYS`` counts where it differs from its
    default: earlier runs, which did not have it, are the same.
    """
    fields = type(settings).model_fields
    return {
        name: value
        for name, value in settings.model_dump(mode="json", exclude=set(without_effect)).items()
        if name not in _LATER_KEYS or getattr(settings, name) != fields[name].default
    }


class Exemplar(BaseModel):
    """A worked example shown to the teacher. ``input`` has the task's fields; ``label`` is text, a
    list (multilabel) or an object (extraction).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: dict[str, Any]
    rationale: str
    label: str | list[Any] | dict[str, Any]

    def gold(self, task: Task, fields: Mapping[str, Any], where: str) -> str:
        """The label in canonical form. Raises UserError where it is none of the task's."""
        value = task.gold_cell(self.label, "label", where)
        if value is None:
            raise UserError(f"{where}: no label", hint="give the exemplar a label")
        return task.gold(value, fields, where)


class Prompt(BaseModel):
    """One prompt file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction: str = ""
    """The system message, or the beginning of a single text."""
    template: str
    """Jinja template of a question."""
    order: Order = "rationale-first"
    """Which of the two a reply gives first."""
    anchor: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ("Answer:",)
    """Texts that precede the label in a reply; the first one found counts. label-first: empty where
    a reply begins with the label."""
    pattern: str | None = Field(None, max_length=_MAX_PATTERN)
    """A regular expression in RE2's syntax that reads a reply in place of the anchor, with a group
    ``label`` and, where replies explain it, a group ``rationale``."""
    answer: str = Field(default_factory=_default_answer)
    """Jinja template of an exemplar's answer, in the form that is read."""
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Texts with which a model begins an example of its own; the reply ends before them. A blank
    line, ``"\\n\\n"``, ends it soonest, and every rationale with it."""
    hint: str = (
        "(The right answer to the next one is: {{ label }}. Give the reasoning that leads there "
        "from what is asked alone, in the same form, and do not speak of this remark.)"
    )
    """Jinja template of the text before the question that gives the gold label away
    (annotate.hint)."""
    exemplars: tuple[Exemplar, ...] = Field((), max_length=64)
    format: Literal["text", "json"] = "text"
    """How replies are written and read: annotate.format of the recipe, not a key of the file."""

    @property
    def hash(self) -> str:
        """Hash of everything that is sent or decides how replies are read."""
        return digest(canonical_json(_hashed(self)))


@lru_cache(maxsize=16)
def compiled(pattern: str) -> Any:
    """A prompt's pattern, which matches in time linear in the text. Raises ValueError."""
    with needs_extra("re2", "pattern in a prompt file"):
        import re2
    options = re2.Options()
    options.log_errors = False
    try:
        expression = re2.compile(pattern, options)
    except UnicodeEncodeError:
        raise ValueError("it has a character that is not valid text") from None
    except re2.error as error:
        message = error.args[0].decode("utf-8", "replace")
        raise ValueError(f"{message}; the syntax is that of RE2, without lookaround") from None
    groups = set(expression.groupindex)
    if "label" not in groups or groups - _PATTERN_GROUPS:
        raise ValueError("its named groups must be label and, if there is one, rationale")
    return expression


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example's prompt: messages for a chat endpoint, the joined text for a completions
    endpoint.
    """

    messages: tuple[dict[str, str], ...]
    text: str

    def body(self, endpoint: Literal["chat", "completions"]) -> dict[str, Any]:
        """The part of a request body that holds the prompt."""
        if endpoint == "chat":
            return {"messages": list(self.messages)}
        return {"prompt": self.text}


class PromptRenderer:
    """Renders one prompt for many examples; instruction and exemplars are rendered once."""

    def __init__(self, prompt: Prompt, task: Task) -> None:
        self.prompt = prompt
        self.task = task
        messages: list[dict[str, str]] = []
        blocks: list[str] = []
        instruction = prompt.instruction.strip()
        if prompt.format == "json":
            form = _json_instruction(prompt.order, task)
            instruction = f"{instruction}\n\n{form}".strip()
        if instruction:
            messages.append({"role": "system", "content": instruction})
            blocks.append(instruction)
        for number, exemplar in enumerate(prompt.exemplars, 1):
            question, answer = self.exemplar(exemplar, number)
            messages += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            separator = "" if question.endswith("\n") else " "
            blocks.append(question + separator + answer)
        self._messages = tuple(messages)
        self._text = "".join(f"{block}\n\n" for block in blocks)

    def exemplar(self, exemplar: Exemplar, number: int) -> tuple[str, str]:
        """An exemplar's question and answer. Raises UserError if its fields do not fit the task."""
        where = f"prompt, exemplar {number}"
        fields = self.task.fields(exemplar.input, where)
        gold = exemplar.gold(self.task, fields, where)
        variables = self.task.template_variables(fields, gold)
        value = self.task.value(gold)
        if isinstance(value, str) and isinstance(exemplar.label, str):
            value = exemplar.label  # as the author spells it, not in canonical form
            variables["label"] = value
        question = render(self.prompt.template, variables, where=f"{where}: template").rstrip()
        if self.prompt.format == "json":
            texts = {"rationale": exemplar.rationale.strip(), "label": value}
            return question, json.dumps(in_order(texts, self.prompt.order), ensure_ascii=False)
        answer = render(
            self.prompt.answer,
            variables | {"rationale": exemplar.rationale.strip()},
            where=f"{where}: answer",
        )
        return question, answer.strip()

    def hint(self, example: Example) -> str:
        """The text that gives an example's gold label away."""
        variables = self.task.template_variables(example.input, example.label)
        variables["label"] = self.hinted_label(example)
        return render(self.prompt.hint, variables, where="prompt: hint").strip()

    def hinted_label(self, example: Example) -> str:
        """The gold label as a hint has it: within a sentence, lines of fields have no clear end."""
        label = str(example.label)
        if self.task.label_schema()["type"] == "object":
            return json.dumps(self.task.value(label), ensure_ascii=False)
        return label

    def render(self, example: Example, *, hint: bool = False) -> Rendered:
        """The prompt for an example; with ``hint``, one that gives its gold label away."""
        question = render(
            self.prompt.template,
            self.task.template_variables(example.input),
            where="prompt: template",
        ).rstrip()
        if hint:
            question = f"{self.hint(example)}\n\n{question}"
        return Rendered(
            (*self._messages, {"role": "user", "content": question}), self._text + question
        )


def _json_instruction(order: Order, task: Task) -> str:
    texts = {"rationale": "<your reasoning>", "label": task.json_placeholder()}
    return (
        "Write the reply as one JSON object and nothing else, in place of any other form: "
        + json.dumps(in_order(texts, order), ensure_ascii=False)
    )


def load_prompt(recipe: Recipe, task: Task) -> Prompt:
    """The recipe's prompt file, else the task's shipped one, else a zero-shot prompt. Raises
    UserError.
    """
    if recipe.annotate.prompt is not None:
        prompt = read_prompt(recipe.annotate.prompt, recipe.folder, recipe.annotate.order)
    elif task.has_prompt_file:
        prompt = read_prompt(f"prompts/{task.name}.yaml", None, recipe.annotate.order)
    else:
        prompt = zero_shot(recipe, task)
    return prompt.model_copy(update={"format": recipe.annotate.format})


def read_prompt(path: str, folder: Path | None, order: Order | None = None) -> Prompt:
    """Read a prompt file, which may be in the folder ``folder``; ``order`` replaces the file's.

    Raises UserError.
    """
    file = find_file(
        path,
        what="prompt file",
        hint="check annotate.prompt; shipped ones are prompts/<task>.yaml",
        folder=folder,
    )
    try:
        located = load_located(file.read_text(encoding="utf-8"))
        prompt = Prompt.model_validate(located.data)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({error})", hint="fix the prompt file") from None
    except ValidationError as error:
        problems = []
        for issue in error.errors():
            line = located.line(issue["loc"]) or 1
            problems.append(f"{path}:{line}: {dotted(issue['loc'])}: {issue['msg']}")
        raise UserError(
            "\n  ".join(problems),
            hint="a prompt has instruction, template, order, answer, anchor or pattern, stop, "
            "hint, exemplars",
        ) from None
    if located.problems:
        raise UserError(
            "\n  ".join(f"{path}:{line}: {problem}" for line, problem in located.problems),
            hint="keep one of the two",
        )
    if "format" in prompt.model_fields_set:
        raise UserError(
            f"{path}:{located.line(('format',)) or 1}: format is not a key of a prompt file",
            hint="set annotate.format in the recipe",
        )
    if order is not None:
        values = prompt.model_dump(exclude_unset=True)
        prompt = Prompt.model_validate(values | {"order": order})
    _check_form(prompt, path)
    return prompt


def _check_form(prompt: Prompt, path: str) -> None:
    """Raise UserError where answers in the prompt's own form could not be read."""
    if not fields_of(prompt.template, where=f"{path}: template"):
        raise UserError(
            f"{path}: template has no field of the row, so that every request would be the same",
            hint="write a field in double braces, e.g. template: 'Message: {{ text }}'",
        )
    needs_anchor = prompt.order == "rationale-first" and prompt.pattern is None
    has_blank = not all(anchor.strip() for anchor in prompt.anchor)
    has_blank |= not all(stop.strip(" \t") for stop in prompt.stop)  # a line break may be a stop
    if has_blank:
        raise UserError(
            f"{path}: an empty string in anchor or stop",
            hint="remove it, or give the words that precede the label, e.g. 'Answer:'",
        )
    if needs_anchor and not prompt.anchor:
        raise UserError(
            f"{path}: anchor is empty, so that the label after a rationale cannot be found",
            hint="give the words that precede the label, e.g. 'Answer:'; only with "
            "order: label-first may anchor be empty ([]), where replies begin with the label",
        )
    if prompt.pattern is not None:
        if "anchor" in prompt.model_fields_set:
            raise UserError(
                f"{path}: anchor and pattern are two ways to read a reply", hint="keep one of them"
            )
        if "answer" not in prompt.model_fields_set:
            raise UserError(
                f"{path}: pattern needs answer, a reply in the form that it reads",
                hint="e.g. answer: '{{ label }}. {{ rationale }}'; dsbs validate reads each label "
                "in this form",
            )
        try:
            compiled(prompt.pattern)
        except ValueError as error:
            raise UserError(
                f"{path}: pattern cannot be used: {error}",
                hint=r"e.g. pattern: '(?s)^(?P<label>[^.]+)\.\s+(?P<rationale>.+)$'",
            ) from None
    variables = _VARIABLE.findall(prompt.answer)
    if "rationale" in variables and len(variables) > 1:
        order = "rationale-first" if variables[0] == "rationale" else "label-first"
        if order != prompt.order:
            raise UserError(
                f"{path}: answer is {order}, and order is {prompt.order}",
                hint=f"set order: {order}, or change answer",
            )


def zero_shot(recipe: Recipe, task: Task) -> Prompt:
    """A chain-of-thought prompt without exemplars, for tasks without a prompt file."""
    goal, choice = _goal_and_choice(recipe, task)
    form = f"Answer: {task.answer_form()[1]}"
    order = recipe.annotate.order or "rationale-first"
    is_text = recipe.annotate.format == "text"
    lines = "lines of their own" if "\n" in form else "a {} line of its own"
    if order == "label-first":
        how = "Give the answer first, then explain it in one to three sentences that rest on the "
        how += "text. "
        if is_text:
            how += f"Write the answer on {lines.format('first')}, in this form:\n{form}"
    else:
        how = "First explain your reasoning in one to three sentences that rest on the text. "
        if is_text:
            how += f"Then write the answer on {lines.format('last')}, in this form:\n{form}"
    return Prompt(
        instruction=f"{goal}\n{choice}\n{how}",
        template="Text: {{ text }}",
        order=order,
        stop=("\nText:",),
    )


def direct_instruction(recipe: Recipe, task: Task) -> str:
    """What to decide, and the labels, for a model that answers without reasoning."""
    return "\n".join(_goal_and_choice(recipe, task))


def _goal_and_choice(recipe: Recipe, task: Task) -> tuple[str, str]:
    goal = "Answer the question or do what the text asks."
    if task.labels is not None:
        goal = "Decide which label fits the text."
    return recipe.task.description or task.goal or goal, task.answer_form()[0]


# Keys that do not change what the annotation of a row is. Every other key does.
_TEACHER_KEYS_WITHOUT_EFFECT = {
    "api_key_env",
    "rpm",
    "tpm",
    "timeout_s",
    "max_attempts",
    "price",
    "members",  # an ensemble's members count by their own fingerprints
    "context_tokens",
    "threads",
    "batch_size",
}
_ENDPOINT_KEYS_WITHOUT_EFFECT = {"weight", "api_key_env", "rpm", "tpm"}
_ANNOTATE_KEYS_WITHOUT_EFFECT = {
    "prompt",  # counts by its content, as does the order
    "order",
    "splits",
    "concurrency",
    "max_usd",
    "max_requests",
    "next",
    "batch",
    "engine",
    "ray",
}


def source_fingerprint(recipe: Recipe, task: Task) -> str:
    """Hash of everything in a recipe that decides what the annotation of a row is: teacher, prompt,
    sampling.
    """
    if recipe.teacher.kind == "ensemble":
        votes = []
        for member in recipe.teacher.members:
            manifest = RunFolder.of_member(recipe, member).manifest("annotate")
            votes.append([member.weight, manifest.get("source")])
        by_mean = ["mean"] if recipe.annotate.score_vote == "mean" else []
        return digest("ensemble", canonical_json(votes), *by_mean)
    teacher = _hashed(recipe.teacher, _TEACHER_KEYS_WITHOUT_EFFECT)
    for endpoint in teacher["endpoints"]:
        for name in _ENDPOINT_KEYS_WITHOUT_EFFECT:
            del endpoint[name]
    prompt_hash = load_prompt(recipe, task).hash if recipe.teacher.is_prompted else ""
    sampling = _hashed(recipe.annotate, _ANNOTATE_KEYS_WITHOUT_EFFECT)
    return digest(canonical_json(teacher), prompt_hash, canonical_json(sampling))


def learned_source(recipe: Recipe, task: Task) -> str:
    """Hash of everything in a recipe that decides which annotations a student learns from."""
    select = recipe.train.select.model_dump(mode="json")
    return digest(source_fingerprint(recipe, task), canonical_json(select))
