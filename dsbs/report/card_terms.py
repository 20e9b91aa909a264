"""What a student's card says of the further terms of its loss, and of the local teachers behind them."""

from __future__ import annotations

from pathlib import Path

from dsbs.recipe.terms import TermSection, names_of_terms
from dsbs.records import TrainedStudent
from dsbs.report.card_recipe import Sections

_SAID = {  # by its kind
    "response": "It also learned the token probabilities of a local teacher: Hinton et al., 2015, arXiv:1503.02531.",
    "labels": "It also learned a distribution over the labels, not one alone: Hinton et al., 2015, arXiv:1503.02531.",
    "feature": "Its hidden states were also drawn towards those of a local teacher: Romero et al., 2015, arXiv:1412.6550.",
    "relation": "Distances and angles between its examples were also drawn towards those of a local teacher: "
    "Park et al., 2019, arXiv:1904.05068.",
    "mutual-information": "The mutual information of its two tasks was also raised, an experimental term: "
    "Chen et al., 2024, arXiv:2403.03348.",
    "consistency": "Its answers beside several rationales of one row were also drawn together, an experimental term: "
    "Chen et al., 2023, arXiv:2310.14747.",
}


def terms_of(recipe: Sections, student: TrainedStudent) -> list[TermSection]:
    """The further terms of its loss, in the order of its method's name."""
    by_name = {term.title: term for term in recipe.train.terms}
    return [by_name[name] for name in names_of_terms(student.method) if name in by_name]


def said_of(term: TermSection) -> str:
    """A sentence with its source."""
    return _SAID[term.kind]


def setting(term: TermSection) -> str:
    """As a table of settings has it."""
    heat = f", temperature {term.temperature:g}" if term.kind in ("response", "labels") else ""
    return f"{term.kind}, weight {term.weight:g}{heat}"


def local_teachers(recipe: Sections, student: TrainedStudent) -> list[str]:
    """A sentence on the models of this machine whose outputs it learned."""
    if not any(term.needs_teacher for term in terms_of(recipe, student)):
        return []
    named = []
    for one in recipe.train.teachers:
        began = f"random weights ({one.size})" if one.start is None else Path(one.start).name
        named.append(f"one that began with {began}" if one.model is None else f"the student {Path(one.model).name}")
    return [f"Its further terms compared it with local teachers: {', '.join(named)}."]
