"""Prompts: read a prompt file, render it for an example, hash it.

A prompt is an instruction, exemplars and one question, in a fixed order: all that precedes the question is the same byte
for byte in every request, so that a provider's prompt cache can serve it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from dsbs.config import Recipe
from dsbs.config.load import dotted, load_located
from dsbs.errors import UserError
from dsbs.files import canonical_json, digest, find_file
from dsbs.records.rows import Example
from dsbs.run_folder import RunFolder
from dsbs.tasks.base import Task
from dsbs.tasks.templates import render


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Exemplar(BaseModel):
    """A worked example shown to the teacher. ``input`` has the task's fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: dict[str, Any]
    rationale: str
    label: str


class Prompt(BaseModel):
    """One prompt file. ``template`` renders a question, ``answer`` an exemplar's rationale and label after it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction: str = ""
    template: str
    answer: str = "{{ rationale }}\nAnswer: {{ label }}"
    anchor: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = (
        "Answer:",
    )  # precedes the label; first found wins
    stop: Annotated[
        tuple[str, ...], BeforeValidator(_as_list)
    ] = ()  # where an invented next example begins
    hint: str = (  # stands before the question where the gold label is given away (annotate.hint)
        "(The right answer to the next one is: {{ label }}. Give the reasoning that leads there from what is asked alone, in "
        "the same form, and do not speak of this remark.)"
    )
    exemplars: tuple[Exemplar, ...] = Field((), max_length=64)

    @property
    def hash(self) -> str:
        """Of all that may be sent or that decides how replies are read."""
        return digest(canonical_json(self.model_dump(mode="json")))


@dataclass(frozen=True, slots=True)
class Rendered:
    """One example's prompt: messages for a chat endpoint, the joined text for a completions endpoint."""

    messages: tuple[dict[str, str], ...]
    text: str

    def body(self, endpoint: Literal["chat", "completions"]) -> dict[str, Any]:
        return {"messages": list(self.messages)} if endpoint == "chat" else {"prompt": self.text}


class PromptRenderer:
    """Renders one prompt for many examples; instruction and exemplars are rendered once."""

    def __init__(self, prompt: Prompt, task: Task) -> None:
        self.prompt = prompt
        self.task = task
        system = (
            [{"role": "system", "content": prompt.instruction.strip()}]
            if prompt.instruction.strip()
            else []
        )
        turns: list[dict[str, str]] = []
        blocks = [prompt.instruction.strip()] if prompt.instruction.strip() else []
        for number, exemplar in enumerate(prompt.exemplars, 1):
            question, answer = self.exemplar(exemplar, number)
            turns += [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            blocks.append(
                f"{question} {answer}" if not question.endswith("\n") else question + answer
            )
        self._messages = (*system, *turns)
        self._text = "".join(f"{block}\n\n" for block in blocks)

    def exemplar(self, exemplar: Exemplar, number: int) -> tuple[str, str]:
        """Question and answer of an exemplar. Raises UserError where its fields do not fit the task."""
        where = f"prompt, exemplar {number}"
        fields = self.task.fields(exemplar.input, where)
        view = self.task.view(fields, self.task.gold(exemplar.label, fields, where))
        view["label"] = (
            exemplar.label
        )  # as the author spells it: equations have more than one spelling
        question = render(self.prompt.template, view, where=f"{where}: template").rstrip()
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
        question = render(
            self.prompt.template, self.task.view(example.input), where="prompt: template"
        ).rstrip()
        if hint:
            question = f"{self.hint(example)}\n\n{question}"
        return Rendered(
            (*self._messages, {"role": "user", "content": question}), self._text + question
        )


def load_prompt(recipe: Recipe, task: Task) -> Prompt:
    """The recipe's prompt file, else the task's shipped one, else a zero-shot prompt. Raises UserError."""
    if recipe.annotate.prompt is not None:
        return read_prompt(recipe.annotate.prompt, recipe.folder)
    if task.name in ("classification", "generation"):
        return zero_shot(recipe, task)
    return read_prompt(f"prompts/{task.name}.yaml", None)


def read_prompt(path: str, beside: Path | None) -> Prompt:
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
        raise UserError(f"{path}: not valid YAML ({error})", hint="mend the prompt file") from None
    except ValidationError as error:
        issues = [
            f"{path}:{located.line(i['loc']) or 1}: {dotted(i['loc'])}: {i['msg']}"
            for i in error.errors()
        ]
        raise UserError(
            "\n  ".join(issues),
            hint="a prompt has instruction, template, answer, anchor, stop, exemplars",
        ) from None
    if located.problems:
        raise UserError(
            "\n  ".join(f"{path}:{line}: {said}" for line, said in located.problems),
            hint="keep one of the two",
        )
    if not prompt.anchor or not all(mark.strip() for mark in (*prompt.anchor, *prompt.stop)):
        raise UserError(
            f"{path}: an empty text in anchor or stop",
            hint="give the words that precede the label, e.g. 'Answer:'",
        )
    return prompt


def zero_shot(recipe: Recipe, task: Task) -> Prompt:
    """A chain-of-thought prompt without exemplars, ending in ``Answer: …``, for tasks that bring no prompt file."""
    if task.labels is not None:
        what = recipe.task.description or "Decide which label fits the text."
        choice = f"The label is exactly one of: {', '.join(task.labels)}."
        last = "Answer: <label>"
    else:
        what = recipe.task.description or "Answer the question or do what the text asks."
        choice = "Give the final answer only, as short as it can be" + (
            ", as a number." if recipe.task.numeric else "."
        )
        last = "Answer: <answer>"
    instruction = (
        f"{what}\n{choice}\nFirst explain your reasoning in one to three sentences that rest on the text. "
        f"Then write the answer on a last line of its own, in this form:\n{last}"
    )
    return Prompt(instruction=instruction, template="Text: {{ text }}", stop=("\nText:",))


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
    """Hash of everything in a recipe that decides what the annotation of a row is: teacher, prompt, sampling."""
    if recipe.teacher.kind == "ensemble":
        votes = []
        for member in recipe.teacher.members:
            manifest = RunFolder.of_member(recipe, member).manifest("annotate")
            votes.append([member.weight, manifest.get("source")])
        return digest("ensemble", canonical_json(votes))
    teacher = recipe.teacher.model_dump(mode="json", exclude=_TEACHER_KEYS_WITHOUT_EFFECT)
    for endpoint in teacher["endpoints"]:
        for name in _ENDPOINT_KEYS_WITHOUT_EFFECT:
            del endpoint[name]
    prompt_hash = load_prompt(recipe, task).hash if recipe.teacher.is_prompted else ""
    sampling = recipe.annotate.model_dump(mode="json", exclude=_ANNOTATE_KEYS_WITHOUT_EFFECT)
    return digest(canonical_json(teacher), prompt_hash, canonical_json(sampling))


def learned_source(recipe: Recipe, task: Task) -> str:
    """Hash of everything in a recipe that decides which annotations a student learns from."""
    select = recipe.train.select.model_dump(mode="json")
    return digest(source_fingerprint(recipe, task), canonical_json(select))
