"""Model card: ``README.md`` beside every student, with the Hugging Face Hub's metadata."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dsbs import formatting
from dsbs.config import Recipe, registry
from dsbs.config.load import read_recorded
from dsbs.config.terms import base_of, names_of_terms
from dsbs.errors import UserError
from dsbs.files import atomic
from dsbs.records.results import SystemResult
from dsbs.records.rows import TrainedStudent
from dsbs.records.summary import system_sentences
from dsbs.reporting.runs import EvaluatedRun
from dsbs.students import read_card
from dsbs.tasks import make_task
from dsbs.tasks.templates import fields_of

_SIGNATURE = re.compile(r"<!-- dsbs wrote this card, sha256 ([0-9a-f]{64}): .*? -->\n\Z")


class _Markdown(str):
    """Text that the template does not escape."""


def write_cards(run: EvaluatedRun) -> list[Path]:
    """Write a card for each student in the results and return their paths.

    A README.md that a person wrote or edited is kept, with a warning.
    """
    paths = []
    for system in run.results.systems:
        for name in run.members(system):
            path = run.path / "train" / name / "README.md"
            if name not in run.students:
                continue
            if not is_own_card(path):
                logging.getLogger(__name__).warning("%s was edited by hand and is kept", path)
                continue
            with atomic(path) as file:
                file.write(model_card(run, system, name))
            paths.append(path)
    return paths


def is_own_card(path: Path) -> bool:
    """Whether a card may be written: there is none, or an unchanged one of ours."""
    if not path.exists():
        return True
    text = path.read_bytes().decode("utf-8", "replace")
    signature = _SIGNATURE.search(text)
    return signature is not None and signature[1] == _sha256(text[: signature.start()])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def model_card(run: EvaluatedRun, system: SystemResult, name: str) -> str:
    """A student's card. Raises UserError for a recipe or record of another version."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    recipe = read_recorded({"recipe": run.recipe})
    if recipe is None:
        raise UserError(
            f"the recipe in {run.path / 'eval'} is not of this version",
            hint="run `dsbs eval` again: predictions that fit are kept",
        )
    try:
        student = TrainedStudent.model_validate(run.students[name].get("student"))
    except ValidationError:
        raise UserError(
            f"{run.path / 'train' / name / 'train.json'} is not a student's record",
            hint="train that student again",
        ) from None
    reportable = run.results.reportable and student.reportable
    environment = Environment(
        loader=PackageLoader("dsbs.reporting"),
        finalize=_escape,  # of Markdown, so there is no autoescape of HTML
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    body = environment.get_template("card.md").render(
        **vars(formatting),
        run=run,
        recipe=recipe,
        system=system,
        student=student,
        record=run.students[name],
        card=read_card(run.path / "train" / name),
        train=recipe.train.tuned(student.tuned),
        labels=make_task(recipe.task).labels,
        kinds=_kinds(recipe, student),
        base_model=_public_name(recipe.train.init or recipe.student.model),
        data=_public_name(recipe.task.data.train),
        teacher=_teacher(run, recipe),
        sentences=system_sentences(system),
        metrics=system.metrics | {f"recall of {name}": m for name, m in system.recall.items()},
        own_accuracy=dict(zip(system.seeds, system.accuracy_per_seed, strict=False)).get(student.seed),
        reportable=reportable,
        item=json.dumps(_example_item(recipe), ensure_ascii=False),
        fenced=fenced,
    )
    metadata = _metadata(run, recipe, system, student, reportable=reportable)
    text = f"---\n{metadata}\n---\n\n{body.strip()}\n\n"
    return f"{text}<!-- dsbs wrote this card, sha256 {_sha256(text)}: edit it and it is kept -->\n"


def _escape(value: Any) -> str:
    return value if isinstance(value, _Markdown) else formatting.escape_markdown(str(value))


def fenced(text: str, language: str = "") -> str:
    """A code block. Its fence is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return _Markdown(f"{fence}{language}\n{text}\n{fence}")


def _metadata(
    run: EvaluatedRun,
    recipe: Recipe,
    system: SystemResult,
    student: TrainedStudent,
    *,
    reportable: bool,
) -> str:
    """YAML as in https://huggingface.co/docs/hub/model-cards. A person has to set the licence."""
    from huggingface_hub import EvalResult, ModelCardData

    data = recipe.task.data
    source = getattr(data, run.results.split) or data.train
    pipeline = "text2text-generation"
    if read_card(run.path / "train" / student.name).kind == "causal":
        pipeline = "text-generation"
    results = EvalResult(
        task_type=pipeline,
        task_name=run.results.task,
        dataset_type=_hub_id(source) or run.results.task,
        dataset_name=_hub_id(source) or run.results.name,
        dataset_split=run.results.split,
        metric_type="accuracy",
        metric_name="accuracy, mean over seeds",
        metric_value=round(system.accuracy, 6),
    )
    train_id = _hub_id(data.train)
    return ModelCardData(
        license="unknown",
        library_name="transformers",
        pipeline_tag=pipeline,
        base_model=_hub_id(recipe.train.init or recipe.student.model or ""),
        datasets=[train_id] if train_id and data.train.startswith("hub://") else None,
        tags=["dsbs", "distillation", *student.method.split("+"), "arxiv:2305.02301"],
        model_name=student.name if reportable else None,
        eval_results=[results] if reportable else None,
    ).to_yaml()
