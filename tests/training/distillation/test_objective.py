"""Distillation loss: forward outputs, division by the step's counts, and the effect on students."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_training import (
    ENTRIES,
    LABEL_IDS,
    ROWS,
    VIEWS,
    distillation_loss,
    local_teacher,
    step_totals,
    tiny_t5,
    train_steps,
)

from dsbs.config import TrainSection
from dsbs.errors import UserError
from dsbs.training.distillation import StepTotals
from dsbs.training.distillation.feature import FeatureTerm
from dsbs.training.distillation.objective import PROJECTIONS, DistillationLoss
from dsbs.training.distillation.relation import RelationTerm
from dsbs.training.encode import Encoded, collate
from dsbs.training.methods import View
from dsbs.training.packed import ForwardRunner
from dsbs.training.trainer import patch_forward

EXACT = [title for title in ENTRIES if title != "relation"]  # it relates one forward pass's rows


@pytest.fixture(scope="module")
def student_without_terms(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_steps(tmp_path_factory.mktemp("plain"), None, steps=40)[0]


def gradients(
    title: str, *, without_padding: bool, weight: float = 1.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """A term on all rows; gradients of the student's own losses plus ``weight`` times the term."""
    model = tiny_t5()
    section = TrainSection(padding="none" if without_padding else "batch")
    terms = distillation_loss([title], section)
    terms.attach_projections(model, seed=0)
    batch = terms.collate(ROWS)
    patch_forward(model, VIEWS, without_padding=without_padding, terms=terms)
    losses = model(batch=batch, step=step_totals(terms, batch))
    (losses["label"] + losses["rationale"] + weight * losses[title]).backward()
    return float(losses[title].detach()), {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def test_packed_and_padded_passes_have_equal_outputs() -> None:
    two_targets: Encoded = {"label": [([3, 3], [9, 1]), ([3, 3], [2])]}
    for rows in (ROWS, [*ROWS, two_targets]):
        batch = collate(rows)
        packed, padded = (
            ForwardRunner(
                tiny_t5(),
                VIEWS,
                without_padding=without_padding,
                hidden_states=True,
                labels=LABEL_IDS,
            )(batch)
            for without_padding in (True, False)
        )
        for view in VIEWS:
            logits = packed.logits[view.target]
            assert logits.shape == (len(batch[view.target].target), 40)
            assert torch.allclose(logits, padded.logits[view.target], atol=1e-5)
        assert len(packed.encoder_states) == len(padded.encoder_states) == 2
        assert len(packed.decoder_states) == len(padded.decoder_states) == 1
        for ours, theirs in zip(
            [*packed.encoder_states, *packed.decoder_states],
            [*padded.encoder_states, *padded.decoder_states],
            strict=True,
        ):
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=1e-5)
        assert packed.label_scores is not None
        assert padded.label_scores is not None
        assert torch.allclose(packed.label_scores, padded.label_scores, atol=1e-5)


def test_a_label_score_is_the_log_probability_of_its_text() -> None:
    model = tiny_t5()
    runner = ForwardRunner(model, VIEWS, without_padding=True, labels=LABEL_IDS)
    scores = runner(collate(ROWS)).label_scores
    assert scores is not None
    assert scores.shape == (8, 3)
    for row, row_scores in zip(ROWS, scores.tolist(), strict=True):
        for label, score in zip(LABEL_IDS, row_scores, strict=True):
            ids = torch.tensor([row["label"][0][0]])
            loss = model(input_ids=ids, labels=torch.tensor([label])).loss
            assert score == pytest.approx(-float(loss.detach()) * len(label), rel=1e-4)


@pytest.mark.parametrize("title", ENTRIES)
def test_padding_changes_neither_a_term_nor_its_gradients(title: str) -> None:
    packed, packed_gradients = gradients(title, without_padding=True)
    padded, padded_gradients = gradients(title, without_padding=False)
    assert packed > 0
    assert packed == pytest.approx(padded, rel=1e-4)
    assert set(packed_gradients) == set(padded_gradients)
    for name, gradient in packed_gradients.items():
        assert torch.allclose(gradient, padded_gradients[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize("title", ENTRIES)
def test_a_term_of_weight_0_leaves_the_students_own_gradients(title: str) -> None:
    model = tiny_t5()
    patch_forward(model, VIEWS, without_padding=True)
    losses = model(batch=collate(ROWS))
    (losses["label"] + losses["rationale"]).backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    for weight, is_equal in ((1e-9, True), (10.0, False)):
        with_term = gradients(title, without_padding=True, weight=weight)[1]
        close = [
            torch.allclose(with_term[name], gradient, rtol=1e-4, atol=1e-5)
            for name, gradient in plain.items()
            if gradient is not None
        ]
        assert all(close) == is_equal, weight


@pytest.mark.parametrize("title", EXACT)
def test_steps_are_equal_for_every_micro_batch_size(tmp_path: Path, title: str) -> None:
    expected, expected_lines = train_steps(tmp_path, distillation_loss([title]))
    first = expected_lines[0]
    assert first[f"{title}_loss"] > 0
    student_loss = (first["label_loss"] + first["rationale_loss"]) / 2
    assert first["loss"] == pytest.approx(student_loss + first[f"{title}_loss"], rel=1e-3)
    for micro_batch in (4, 2):
        model, lines = train_steps(tmp_path, distillation_loss([title]), micro_batch=micro_batch)
        assert [line[f"{title}_loss"] for line in lines] == pytest.approx(
            [line[f"{title}_loss"] for line in expected_lines], rel=1e-3
        )
        for name, weights in expected.state_dict().items():
            assert torch.allclose(weights, model.state_dict()[name], atol=1e-5), name


def measured(model: Any, title: str) -> float:
    """A term's value for a trained student, with the projections that it learned, if any."""
    terms = distillation_loss([title])
    copy = tiny_t5()
    terms.attach_projections(copy, seed=0)
    copy.load_state_dict(model.state_dict(), strict=False)
    batch = terms.collate(ROWS)
    patch_forward(copy.eval(), VIEWS, without_padding=True, terms=terms)
    with torch.no_grad():
        return float(copy(batch=batch, step=step_totals(terms, batch))[title])


@pytest.mark.parametrize("title", ENTRIES)
def test_a_term_decreases_in_training_and_below_that_of_a_student_without_it(
    tmp_path: Path, student_without_terms: Any, title: str
) -> None:
    student, lines = train_steps(tmp_path, distillation_loss([title]), steps=40)
    assert lines[-1][f"{title}_loss"] < lines[0][f"{title}_loss"]
    assert measured(student, title) < measured(student_without_terms, title)


def test_published_means_are_taken_over_each_micro_batch(tmp_path: Path) -> None:
    section = TrainSection(loss_mean="micro")
    terms = distillation_loss(["response"], section)
    _, lines = train_steps(tmp_path, terms, micro_batch=4, steps=1, loss_mean="micro")
    _, step_lines = train_steps(tmp_path, distillation_loss(["response"]), steps=1)
    assert lines[0]["response_loss"] > 0
    assert lines[0]["response_loss"] != pytest.approx(step_lines[0]["response_loss"], rel=1e-4)


@pytest.mark.parametrize("title", ENTRIES)
def test_published_means_allow_micro_batches_without_a_view(tmp_path: Path, title: str) -> None:
    terms = distillation_loss([title], TrainSection(loss_mean="micro"))
    _, lines = train_steps(tmp_path, terms, micro_batch=1, steps=2, loss_mean="micro")
    assert all(np.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("title", ["response", "from-teachers", "relation"])
def test_a_second_teacher_of_weight_0_changes_nothing(tmp_path: Path, title: str) -> None:
    def first_loss(*second: float) -> float:
        teachers = [local_teacher()]
        teachers += [local_teacher("second", weight, seed=9) for weight in second]
        _, lines = train_steps(tmp_path, distillation_loss([title], teachers=teachers), steps=1)
        return float(lines[0][f"{title}_loss"])

    assert first_loss(1e-12) == pytest.approx(first_loss(), rel=1e-4)
    assert first_loss(1.0) != pytest.approx(first_loss(), rel=1e-4)


def test_a_layer_that_does_not_exist_is_reported_before_training() -> None:
    term = FeatureTerm(kind="feature", layers={2: 4})
    terms = DistillationLoss([term], TrainSection(), VIEWS, teachers=[local_teacher()])
    with pytest.raises(UserError, match=r"the encoder's layers: .*the teacher has layers 1 to 3"):
        terms.attach_projections(tiny_t5(), seed=0)


def test_projections_depend_on_the_seed_only_and_leave_torchs_generator_as_it_was() -> None:
    weights: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        model = tiny_t5()
        terms = distillation_loss(["feature"])
        before = torch.get_rng_state()
        terms.attach_projections(model, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        parameters = getattr(model, PROJECTIONS).parameters()
        weights.append(torch.cat([parameter.flatten() for parameter in parameters]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_relation_counts_an_example_once_however_many_targets_it_has() -> None:
    views = (View("rationale-then-label", "", 1.0),)
    pairs = [([3 + i] * (2 + i % 3), [10 + i, 9, 1]) for i in range(6)]
    losses: list[float] = []
    for times in (1, 3):
        rows: list[Encoded] = [{"rationale-then-label": [pair] * times} for pair in pairs]
        term = RelationTerm(kind="relation")
        terms = DistillationLoss([term], TrainSection(), views, teachers=[local_teacher()])
        model = tiny_t5()
        batch = terms.collate(rows)
        patch_forward(model, views, without_padding=True, terms=terms)
        assert terms.counts(batch) == {"relation": 6}
        step = StepTotals(
            {"rationale-then-label": 18.0 * times, "relation": 6}, {"rationale-then-label": 1.0}
        )
        losses.append(float(model(batch=batch, step=step)["relation"].detach()))
    assert losses[0] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
