"""A new kind of term, registered in one place: validate, train, eval and report with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import pytest
from pydantic import Field
from tiny_training import loss_lines

from dsbs import UserError, evaluate, load_recipe, report, train, validate
from dsbs.config.registry import TERMS
from dsbs.training.distillation import Term, TermInputs

if TYPE_CHECKING:
    from torch import Tensor


class ConfidenceTerm(Term):
    """Penalize confident token predictions (Pereyra et al., 2017)."""

    exponent: float = Field(1.0, gt=0)
    """Of the token's highest probability."""

    description: ClassVar[str] = "It was also kept from confident predictions."
    citation: ClassVar[str] = "Pereyra et al., 2017, arXiv:1701.06548"

    def loss(self, inputs: TermInputs) -> Tensor | float:
        view = inputs.views[0].target
        if view not in inputs.batch:
            return 0.0
        probabilities = inputs.student.logits[view].float().softmax(dim=-1)
        summed = probabilities.amax(dim=-1).pow(self.exponent).sum()
        return summed / inputs.step.counts[view]


TERM = (
    "train.methods=[finetune, finetune+confidence]",
    "train.terms=[{kind: confidence, exponent: 2.0, weight: 0.5}]",
)


@pytest.fixture
def recipe_path(toy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(TERMS, "confidence", f"{__name__}:ConfidenceTerm")
    return toy()


def test_a_registered_term_works_in_all_stages(recipe_path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_path, TERM)
    run = tmp_path / "run"
    validate(recipe)
    train(recipe, out=run)
    student = run / "train" / "finetune+confidence-gold-s0"
    lines = loss_lines(student)
    for line in lines:
        assert 0 < line["confidence_loss"] < 1
        expected = line["label_loss"] + 0.5 * line["confidence_loss"]
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
    results = evaluate(recipe, out=run).as_json()
    systems = {system["name"]: system for system in results["systems"]}
    assert "finetune-gold" in systems["finetune+confidence-gold"]["versus"]
    report(recipe, out=run)
    assert "finetune+confidence" in (run / "report.html").read_text(encoding="utf-8")
    card = (student / "README.md").read_text(encoding="utf-8")
    assert "It was also kept from confident predictions." in card
    assert "Pereyra et al., 2017" in card


def test_a_registered_terms_keys_are_checked(recipe_path: Path) -> None:
    with pytest.raises(UserError, match="exponent: input should be greater than 0"):
        load_recipe(recipe_path, ["train.terms=[{kind: confidence, exponent: 0}]"])
    with pytest.raises(UserError, match="exponent belongs to confidence, not to labels"):
        load_recipe(recipe_path, ["train.terms=[{kind: labels, exponent: 2.0}]"])
