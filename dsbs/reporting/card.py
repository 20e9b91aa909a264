"""Model card: ``README.md`` beside every student, with the Hugging Face Hub's metadata."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from dsbs.config import Recipe, registry
from dsbs.config.load import read_recorded
from dsbs.config.terms import base_of
from dsbs.errors import UserError
from dsbs.files import atomic_write
from dsbs.formatting import (
    ABSENT,
    confidence_interval,
    count,
    escape_markdown,
    integer,
    interval,
    markdown_table,
    percent,
)
from dsbs.records.measures import Measure
from dsbs.records.results import SystemResult
from dsbs.records.summary import system_sentences
from dsbs.reporting.labels import part_cells, part_columns
from dsbs.reporting.runs import EvaluatedRun
from dsbs.reporting.tables import measure_cell
from dsbs.run_folder import read_student
from dsbs.students.card import StudentCard, read_card
from dsbs.tasks import Task, make_task
from dsbs.tasks.templates import fields_of

_MAX_RECALLS = 20  # labels whose recall a card lists
_SIGNATURE = re.compile(r"<!-- dsbs wrote this card, sha256 ([0-9a-f]{64}): .*? -->\n\Z")


class _Markdown(str):
    """Text that the template does not escape."""


def write_cards(run: EvaluatedRun) -> list[Path]:
    """Write a card for each student in the results. A README.md that a person edited is kept."""
    paths = []
    for system in run.results.systems:
        for name in (name for name in run.members(system) if name in run.students):
            path = run.folder.student(name) / "README.md"
            if is_own_card(path):
                with atomic_write(path) as file:
                    file.write(model_card(run, system, name))
                paths.append(path)
            else:
                logging.getLogger(__name__).warning("%s was edited by hand and is kept", path)
    return paths


def is_own_card(path: Path) -> bool:
    """Whether a card may be written: there is none, or an unchanged one of ours."""
    text = path.read_bytes().decode("utf-8", "replace") if path.exists() else ""
    signature = _SIGNATURE.search(text)
    return not text or bool(signature and signature[1] == _sha256(text[: signature.start()]))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model_card(run: EvaluatedRun, system: SystemResult, name: str) -> str:
    """A student's card. Raises UserError for a recipe or record of another version."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, PackageLoader

    folder = run.folder.student(name)
    student = read_student(folder)
    run_recipe = read_recorded({"recipe": run.recipe})
    recipe = None if run_recipe is None else run_recipe.students.get(student.student)
    if recipe is None:
        raise UserError(
            f"{run.folder.path}: its recipe is from another version of dsbs",
            hint="run `dsbs eval` again",
        )
    card = read_card(folder)
    base_model = recipe.train.init or recipe.student.model
    data_id = _hub_id(recipe.task.data.train)
    metadata = ModelCardData(  # https://huggingface.co/docs/hub/model-cards
        license="unknown",  # a person has to set it
        library_name="transformers" if card.head == "text" else None,
        pipeline_tag=_pipeline_tag(card),
        base_model=_hub_id(base_model),
        datasets=[data_id] if data_id else None,
        tags=["dsbs", "distillation", *student.method.split("+"), "arxiv:2305.02301"],
    )
    terms = recipe.train.terms_of(student.method)
    parts = part_table(system, make_task(recipe.task))
    environment = Environment(  # escapes Markdown instead of HTML
        loader=PackageLoader("dsbs.reporting"),
        finalize=_escape,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {f.__name__: f for f in (confidence_interval, count, integer, percent)}
    body = environment.get_template("card.md").render(
        run=run,
        recipe=recipe,
        system=system,
        student=student,
        card=card,
        record=run.students[name],
        train=recipe.resolved_train.tuned(student.tuned),
        terms=terms,
        kinds=[
            registry.entry(registry.METHODS, base_of(student.method)),
            *(registry.entry(registry.TERMS, term.kind) for term in terms),
        ],
        reportable=run.results.reportable and student.reportable,
        accuracies=dict(zip(system.seeds, system.accuracy_per_seed, strict=False)),
        sentences=system_sentences(run.results, system),
        metrics=system.metrics | _recalls(system, has_table=bool(parts)),
        parts=_Markdown(parts),
        labels=make_task(recipe.task).labels,
        base_model=_public_name(base_model),
        data=_public_name(recipe.task.data.train),
        annotator=_annotator(run, recipe),
        loading=_Markdown(loading_text(card, _example_item(recipe))),
    )
    text = f"---\n{metadata.to_yaml()}\n---\n\n{body.strip()}\n\n"
    return f"{text}<!-- dsbs wrote this card, sha256 {_sha256(text)}: an edited card is kept -->\n"


def part_table(system: SystemResult, task: Task) -> str:
    """A table of each label of several, each field, or each point of a scale; else empty."""
    if system.parts:
        with_confidence = any(part.ece is not None for part in system.parts.values())
        columns = part_columns(with_confidence=with_confidence)
        kind = "label" if task.has_several_labels else "field"
        headings = [kind, *(column.heading for column in columns)]
        rows = [
            [escape_markdown(name), *part_cells(part, with_confidence=with_confidence)]
            for name, part in system.parts.items()
        ]
    elif task.has_order and system.recall:
        headings = ["score", "recall,\u00a0%", "95% CI", "rows"]
        rows = [
            [point, measure_cell(of) or ABSENT, interval(of.ci95) if of.ci95 else ABSENT, str(of.n)]
            for point, of in system.recall.items()
        ]
    else:
        return ""
    return "\n".join(markdown_table(headings, rows))


def _recalls(system: SystemResult, *, has_table: bool) -> dict[str, Measure]:
    """The recall of each label, where there are few, and no table has it."""
    if len(system.recall) > _MAX_RECALLS or has_table:
        return {}
    return {f"recall of {label}": measure for label, measure in system.recall.items()}


def _pipeline_tag(card: StudentCard) -> str:
    if card.head == "labels":
        return "multiple-choice" if card.scores_choices else "text-classification"
    return "text-generation" if card.kind == "causal" else "text2text-generation"


def _escape(value: object) -> str:
    return value if isinstance(value, _Markdown) else escape_markdown(str(value))


def fenced(text: str, language: str) -> str:
    """A code block. Its fence is longer than any in the text."""
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", text))]))
    return _Markdown(f"{fence}{language}\n{text}\n{fence}")


def loading_text(card: StudentCard, item: str | dict[str, Any] = "<text>") -> str:
    """How to load a student and answer ``item``; for a label head, what its files hold."""
    task = make_task(card.task)
    answer = "label" if task.label_schema().get("type") == "string" else "value"
    code = [
        "import dsbs",
        "",
        f'student = dsbs.Student.load("{card.name}")',
        f"(answer,) = student.predict([{json.dumps(item, ensure_ascii=False)}])",
        f"print(answer.{answer})",
    ]
    if card.explains and not (card.head == "labels" and card.format != "transformers"):
        code[-2] = code[-2].removesuffix(")") + ", rationale=True)"
    if card.head == "labels":
        code[-1] = f"print(answer.{answer}, answer.distribution)"
    text = fenced("\n".join(code), "python")
    text += (
        "\n\n`dsbs.Student.load` reads a folder; "
        '`huggingface_hub.snapshot_download("OWNER/NAME")` downloads one.'
    )
    if card.head != "labels" or card.format != "transformers":
        return text
    pooled = "the last token's state"
    if card.kind != "causal":
        pooled = "the mean of the encoder's states over the input's tokens"
    text += (
        " `transformers` alone loads the pretrained model in this folder without the label head, "
        "which is in `head.safetensors`: `weight` (labels, states) and `bias` (labels), applied to "
        f"{pooled}. The order of the labels is `classes` in `student.json`."
    )
    if task.has_several_labels:
        text += (
            " A sigmoid of each output is the probability of its label; `calibration.json` has the "
            "temperature that divides the outputs, and the threshold of each label's probability."
        )
    if card.kind == "encoder" and card.explains:
        text += " `rationale_decoder/` writes rationales; labels do not need it."
    return text


def _hub_id(source: str | None) -> str | None:
    """The Hub repository of a model or of hub:// rows; None for local files."""
    match = re.fullmatch(r"(?:hub://)?([\w.-]+/[\w.-]+)(:[\w.-]+)?(/[\w.-]+)?", source or "")
    return None if match is None or Path(match[1]).exists() else match[1]


def _public_name(source: str | None) -> str:
    """A source without the path of a local file or folder."""
    return _hub_id(source) or Path(source or "random weights").name


def _annotator(run: EvaluatedRun, recipe: Recipe) -> str:
    members = [member["model"] for member in run.manifests["annotate"].get("members", ())]
    name = _public_name(recipe.teacher.model or " and ".join(members) or "no named model")
    return f"{name} ({recipe.teacher.kind})"


def _example_item(recipe: Recipe) -> str | dict[str, Any]:
    """An item for ``Student.predict``, with each column's name as its value."""
    task = make_task(recipe.task)
    names = [name for name in task.inputs if name not in task.optional]
    if recipe.task.input:
        names = sorted(fields_of(recipe.task.input, where="task.input"))
    item = {recipe.task.columns.get(name, name): f"<{name}>" for name in names}
    return item or "<text>"
