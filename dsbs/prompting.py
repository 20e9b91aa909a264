"""Prompts: prompt files, rendering for an example, and the fingerprint of annotations.

A prompt is an instruction, exemplars and one question, in this order. Everything before the
question is the same in every request, byte for byte, so that a provider's prompt cache can serve
it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dsbs.config import Recipe
from dsbs.config.load import dotted, load_located
from dsbs.errors import UserError
from dsbs.files import canonical_json, digest, find_file
from dsbs.records import Example
from dsbs.run_folder import RunFolder
from dsbs.tasks import Task
from dsbs.tasks.templates import render

_AMBIGUOUS_IN_LIST = re.compile(r"[,;\n\r]|^\s|[\s.:]$")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


JSON_INSTRUCTION = (
    "Write the reply as one JSON object and nothing else, in place of any other form: "
    '{"rationale": "<your reasoning>", "label": "<the answer>"}'
)


class Exemplar(BaseModel):
    """A worked example shown to the teacher. ``input`` has the task's fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: dict[str, Any]
    rationale: str
    label: str


class Prompt(BaseModel):
    """One prompt file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction: str = ""
    """The system message, or the beginning of a single text."""
    template: str
    """Jinja template of a question."""
    answer: str = "{{ rationale }}\nAnswer: {{ label }}"
    """Jinja template of an exemplar's answer."""
    anchor: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ("Answer:",)
    """Texts that precede the label in a reply; the first one found counts."""
    stop: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = ()
    """Texts with which a model begins an example of its own; the reply ends before them."""
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
        values = self.model_dump(mode="json")
        if self.format == "text":
            del values["format"]  # earlier runs, which did not have it, are the same
        return digest(canonical_json(values))


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
            instruction = f"{instruction}\n\n{JSON_INSTRUCTION}".strip()
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
        view = self.task.view(fields, self.task.gold(exemplar.label, fields, where))
        view["label"] = exemplar.label  # as the author spells it, not in canonical form
        question = render(self.prompt.template, view, where=f"{where}: template").rstrip()
        if self.prompt.format == "json":
            texts = {"rationale": exemplar.rationale.strip(), "label": exemplar.label}
            return question, json.dumps(texts, ensure_ascii=False)
        answer = render(
            self.prompt.answer,
            view | {"rationale": exemplar.rationale.strip()},
            where=f"{where}: answer",
        )
        return question, answer.strip()

    def hint(self, example: Example) -> str:
        """The text that gives an example's gold label away."""
        return render(
            self.prompt.hint, self.task.view(example.input, example.label), where="prompt: hint"
        ).strip()

    def render(self, example: Example, *, hint: bool = False) -> Rendered:
        """The prompt for an example; with ``hint``, one that gives its gold label away."""
        question = render(
            self.prompt.template, self.task.view(example.input), where="prompt: template"
        ).rstrip()
        if hint:
            question = f"{self.hint(example)}\n\n{question}"
        return Rendered(
            (*self._messages, {"role": "user", "content": question}), self._text + question
        )


def load_prompt(recipe: Recipe, task: Task) -> Prompt:
    """The recipe's prompt file, else the task's shipped one, else a zero-shot prompt. Raises
    UserError.
    """
    if recipe.annotate.prompt is not None:
        prompt = read_prompt(recipe.annotate.prompt, recipe.folder)
    elif task.name in ("classification", "generation"):
        prompt = zero_shot(recipe, task)
    else:
        prompt = read_prompt(f"prompts/{task.name}.yaml", None)
    return prompt.model_copy(update={"format": recipe.annotate.format})


def read_prompt(path: str, beside: Path | None) -> Prompt:
    """Read a prompt file, which may lie in the folder ``beside``. Raises UserError."""
    file = find_file(
        path,
        what="prompt file",
        hint="check annotate.prompt; shipped ones are prompts/<task>.yaml",
        beside=beside,
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
            hint="a prompt has instruction, template, answer, anchor, stop, exemplars",
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
    if not prompt.anchor or not all(mark.strip() for mark in (*prompt.anchor, *prompt.stop)):
        raise UserError(
            f"{path}: an empty string in anchor or stop",
            hint="give the words that precede the label, e.g. 'Answer:'",
        )
    return prompt


def zero_shot(recipe: Recipe, task: Task) -> Prompt:
    """A chain-of-thought prompt without exemplars, for tasks without a prompt file."""
    goal, choice = _goal_and_choice(recipe, task)
    last = "Answer: <answer>" if task.labels is None else "Answer: <label>"
    instruction = (
        f"{goal}\n{choice}\n"
        "First explain your reasoning in one to three sentences that rest on the text. "
    )
    if recipe.annotate.format == "text":
        instruction += f"Then write the answer on a last line of its own, in this form:\n{last}"
    return Prompt(instruction=instruction, template="Text: {{ text }}", stop=("\nText:",))


def direct_instruction(recipe: Recipe, task: Task) -> str:
    """What to decide, and the labels, for a model that answers without reasoning."""
    return "\n".join(_goal_and_choice(recipe, task))


def _goal_and_choice(recipe: Recipe, task: Task) -> tuple[str, str]:
    description = recipe.task.description or task.goal
    if task.labels is not None:
        return description or "Decide which label fits the text.", _label_listing(task.labels)
    choice = "Give the final answer only, as short as it can be"
    choice += ", as a number." if recipe.task.numeric else "."
    return description or "Answer the question or do what the text asks.", choice


def _label_listing(labels: Sequence[str]) -> str:
    """The sentence that lists the labels; one per line where a list with commas is ambiguous."""
    if not any(_AMBIGUOUS_IN_LIST.search(label) for label in labels):
        return f"The label is exactly one of: {', '.join(labels)}."
    lines = "\n".join(f"- {' '.join(label.split())}" for label in labels)
    return f"The label is exactly one of these, each on a line of its own:\n{lines}"


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
    "prompt",  # counts by its content
    "splits",
    "concurrency",
    "max_usd",
    "max_requests",
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
        return digest("ensemble", canonical_json(votes))
    teacher = recipe.teacher.model_dump(mode="json", exclude=_TEACHER_KEYS_WITHOUT_EFFECT)
    if teacher["reasoning_effort"] is None:
        del teacher["reasoning_effort"]  # earlier runs, which did not have it, are the same
    for endpoint in teacher["endpoints"]:
        for name in _ENDPOINT_KEYS_WITHOUT_EFFECT:
            del endpoint[name]
    prompt_hash = load_prompt(recipe, task).hash if recipe.teacher.is_prompted else ""
    sampling = recipe.annotate.model_dump(mode="json", exclude=_ANNOTATE_KEYS_WITHOUT_EFFECT)
    if sampling["format"] == "text":
        del sampling["format"]
    return digest(canonical_json(teacher), prompt_hash, canonical_json(sampling))


def learned_source(recipe: Recipe, task: Task) -> str:
    """Hash of everything in a recipe that decides which annotations a student learns from."""
    select = recipe.train.select.model_dump(mode="json")
    return digest(source_fingerprint(recipe, task), canonical_json(select))
