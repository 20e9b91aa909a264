"""What a student's card says of its teachers, of the further terms of its loss, and of the local teachers behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsbs.config.terms import TermSettings, base_of, names_of_terms
from dsbs.records.rows import TrainedStudent
from dsbs.reporting.card_recipe import Sections
from dsbs.run_folder import read_manifest


def terms_of(recipe: Sections, student: TrainedStudent) -> list[TermSettings]:
    """The further terms of its loss, in the order of its method's name."""
    by_name = {term.title: term for term in recipe.train.terms}
    return [by_name[name] for name in names_of_terms(student.method) if name in by_name]


def said_of(term: TermSettings) -> str:
    """A sentence with its source."""
    source = f": {term.citation}" if term.citation else ""
    return f"{term.description}{source}."


def setting(term: TermSettings) -> str:
    """As a table of settings has it."""
    return term.summary


def local_teachers(recipe: Sections, student: TrainedStudent) -> list[str]:
    """A sentence on the models of this machine whose outputs it learned."""
    if not any(term.needs_teacher for term in terms_of(recipe, student)):
        return []
    named = []
    for one in recipe.train.teachers:
        began = f"random weights ({one.size})" if one.start is None else Path(one.start).name
        named.append(
            f"one that began with {began}"
            if one.model is None
            else f"the student {Path(one.model).name}"
        )
    return [f"Its further terms compared it with local teachers: {', '.join(named)}."]


def explains(student: TrainedStudent) -> bool:
    """Whether it learned rationales."""
    return base_of(student.method) not in ("finetune", "distill")


def outputs_learned(recipe: Sections, student: TrainedStudent) -> list[str]:
    """What of a teacher a student learned; local teachers are apart."""
    votes = any(term.learns_votes for term in terms_of(recipe, student))
    return [
        *["labels"] * (student.labels == "teacher"),
        *["rationales"] * explains(student),
        *["label distributions"] * votes,
    ]


def is_governed(recipe: Sections, student: TrainedStudent, record: Mapping[str, Any]) -> bool:
    """Whether it learned a model's outputs, itself or by way of a local teacher."""
    return (
        bool(outputs_learned(recipe, student)) and recipe.teacher_kind != "human"
    ) or is_taught_by_way_of(record)


def annotator(recipe: Sections, student: TrainedStudent) -> str:
    """A sentence on who made the labels and rationales that it learned."""
    learned, model = outputs_learned(recipe, student), recipe.teacher_model
    if not learned:
        words = (
            " Its vocabulary was learned from all text of the run's training."
            if recipe.student.is_scratch
            else ""
        )
        return f"It learned no teacher's labels or rationales.{words}"
    if recipe.teacher_kind == "human":
        return f"Its {' and '.join(learned)} are those of people, as they stand in the data."
    if recipe.teacher_kind == "ensemble":
        return f"Its {' and '.join(learned)} were chosen by the vote of {model or 'models that the run does not name'}."
    if model is not None and (model.endswith(".gguf") or Path(model).expanduser().exists()):
        model = Path(model).name
    who = model or "a model that the recipe does not name"
    return f"Its {' and '.join(learned)} were written by {who} ({recipe.teacher_kind})."


def is_taught_by_way_of(record: Mapping[str, Any]) -> bool:
    """Whether a local teacher in a student's record learned a model's labels or rationales, which it may have handed on."""
    return any(
        _learned_from_model(Path(str(teacher["path"]))) for teacher in record.get("teachers", ())
    )


def _learned_from_model(folder: Path) -> bool:
    try:
        record = json.loads((folder / "train.json").read_text(encoding="utf-8"))
        source = record["student"].get("source")
    except (OSError, ValueError, KeyError):
        return True  # what is not known any more is better read about than passed over
    if is_taught_by_way_of(record):
        return True
    runs = (
        read_manifest(place).get("recipe", {}) for place in (folder.parent, folder.parent.parent)
    )  # or train/teachers/
    kinds = {run["teacher"]["kind"] for run in runs if run}
    return source is not None and kinds != {"human"}
