"""The recipe: one YAML file is one experiment, and every command reads its own sections of the same
file.

Precedence: defaults < recipe < ``key=value`` overrides. A recipe is closed (an unknown key is an
error) and frozen.
"""

from __future__ import annotations

from dsbs.config.cascade import CascadeSection
from dsbs.config.recipe import EvalSection, Recipe, ReportSection, StudentRecipe
from dsbs.config.sections import LabelSource, Section, unknown
from dsbs.config.student import NamedStudentSection, StudentSection
from dsbs.config.task import DataSection, FieldSection, TaskSection
from dsbs.config.teacher import (
    AnnotateSection,
    EndpointSection,
    MemberSection,
    PriceSection,
    ScoreVote,
    TeacherSection,
)
from dsbs.config.terms import BalanceSection, LocalTeacherSection, TermSettings, base_of
from dsbs.config.train import (
    LoraSection,
    ResolvedTrainSection,
    SelectSection,
    StudentTrainSection,
    TrainSection,
)

__all__ = [
    "AnnotateSection",
    "BalanceSection",
    "CascadeSection",
    "DataSection",
    "EndpointSection",
    "EvalSection",
    "FieldSection",
    "LabelSource",
    "LocalTeacherSection",
    "LoraSection",
    "MemberSection",
    "NamedStudentSection",
    "PriceSection",
    "Recipe",
    "ReportSection",
    "ResolvedTrainSection",
    "ScoreVote",
    "Section",
    "SelectSection",
    "StudentRecipe",
    "StudentSection",
    "StudentTrainSection",
    "TaskSection",
    "TeacherSection",
    "TermSettings",
    "TrainSection",
    "base_of",
    "unknown",
]
