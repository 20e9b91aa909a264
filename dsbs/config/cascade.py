"""Cascade section of a recipe: a student in front of its teacher, with a guaranteed threshold."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dsbs.config.sections import Section


class CascadeSection(Section):
    """A student in front of its teacher: it answers where it is sure, and its teacher answers the
    other requests. A threshold of the confidence is chosen that keeps the target.
    """

    target: float | None = Field(None, gt=0, lt=1)
    """The smallest acceptable share. Of agreement: of all requests, those on which the answer does
    not differ from the teacher's. Of accuracy: those that the cascade answers correctly. None: 0.98
    of agreement, or ``margin``."""
    of: Literal["agreement", "accuracy"] = "agreement"
    """agreement: compare with the teacher's answers; accuracy: compare with gold labels."""
    margin: float | None = Field(None, gt=0, lt=1)
    """Of accuracy, in place of ``target``: the largest acceptable loss of accuracy against the
    teacher alone."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """The probability, over draws of calibration rows, that the chosen threshold keeps the
    target."""
    calibration: Literal["valid"] | Annotated[float, Field(gt=0, lt=1)] = 0.5
    """The rows that the threshold is chosen on, which no student was trained or selected with: a
    share of the split's rows, which then do not count as test rows of the cascade; or valid: the
    validation rows beyond ``train.valid_limit``."""

    @model_validator(mode="after")
    def _one_goal(self) -> CascadeSection:
        if self.margin is not None and self.of == "agreement":
            raise ValueError("eval.cascade.margin is for of: accuracy; agreement has a target")
        if self.margin is not None and self.target is not None:
            raise ValueError("eval.cascade: target and margin exclude each other")
        if self.of == "accuracy" and self.target is None and self.margin is None:
            raise ValueError(
                "eval.cascade: accuracy needs a target or a margin, e.g. margin: 0.01 for at most "
                "one point less than the teacher alone"
            )
        return self

    @property
    def risk(self) -> float:
        """The largest acceptable share of bad answers, or the margin."""
        if self.margin is not None:
            return self.margin
        assert self.goal is not None
        return round(1 - self.goal, 12)

    @property
    def goal(self) -> float | None:
        """The target, 0.98 where none is given. None: there is a margin in its place."""
        if self.margin is not None:
            return None
        return 0.98 if self.target is None else self.target
