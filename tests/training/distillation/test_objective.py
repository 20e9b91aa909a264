"""Distillation loss: forward outputs, division by the step's counts, and the effect on students."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import label_heads
import numpy as np
import pytest
import torch
from tiny_training import (
    CASES,
    ENTRIES,
    LABEL_IDS,
    ROWS,
    TEXT_KINDS,
    VIEWS,
    distillation_loss,
    local_teacher,
    rows_of_kind,
    step_totals,
    tiny_model,
    tiny_t5,
    train_steps,
    views_of_kind,
)
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5

from dsbs.config import TrainSection
from dsbs.errors import UserError
from dsbs.training.distillation import StepTotals
from dsbs.training.distillation.feature import FeatureTerm
from dsbs.training.distillation.objective import PROJECTIONS, DistillationLoss
from dsbs.training.distillation.relation import RelationTerm
from dsbs.training.encode import Encoded, collate
from dsbs.training.methods import View
from dsbs.training.packed import ForwardRunner
from dsbs.training.packed.label_head import LabelHeadRunner, patch_label_head
from dsbs.training.trainer import patch_forward

# A relation depends on the rows of one forward pass.
EXACT = [(kind, title) for kind, title in CASES if title != "relation"]


@pytest.fixture(scope="module")
def student_without_terms(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_steps(tmp_path_factory.mktemp("plain"), None, steps=40)[0]


def patch(
    model: Any, kind: str, *, without_padding: bool, terms: DistillationLoss | None = None
) -> None:
    """Let a student's forward take packed batches, as the trainer does."""
    views = views_of_kind(kind)
    if kind in TEXT_KINDS:
        patch_forward(model, views, without_padding=without_padding, terms=terms)
        return
    hidden_states = terms is not None and terms.hidden_states
    runner = LabelHeadRunner(
        model, views, without_padding=without_padding, hidden_states=hidden_states
    )
    patch_label_head(model, runner, terms)


def own_loss(losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The losses of the student's views, added."""
    return sum((losses[view] for view in ("label", "rationale") if view in losses), torch.zeros(()))


def gradients(
    kind: str, title: str, *, without_padding: bool, weight: float = 1.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """A term on all rows; gradients of the student's own losses plus ``weight`` times the term."""
    model = tiny_model(kind)
    section = TrainSection(padding="none" if without_padding else "batch")
    terms = distillation_loss([title], section, kind)
    terms.attach_projections(model, seed=0)
    batch = terms.collate(rows_of_kind(kind))
    patch(model, kind, without_padding=without_padding, terms=terms)
    losses = model(batch=batch, step=step_totals(terms, batch))
    (own_loss(losses) + weight * losses[title]).backward()
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


@pytest.mark.parametrize(("kind", "title"), CASES)
def test_padding_changes_neither_a_term_nor_its_gradients(kind: str, title: str) -> None:
    packed, packed_gradients = gradients(kind, title, without_padding=True)
    padded, padded_gradients = gradients(kind, title, without_padding=False)
    assert packed > 0
    assert packed == pytest.approx(padded, rel=1e-4)
    assert set(packed_gradients) == set(padded_gradients)
    for name, gradient in packed_gradients.items():
        assert torch.allclose(gradient, padded_gradients[name], rtol=1e-3, atol=1e-4), name


@pytest.mark.parametrize(("kind", "title"), CASES)
def test_a_term_of_weight_0_leaves_the_students_own_gradients(kind: str, title: str) -> None:
    model = tiny_model(kind)
    patch(model, kind, without_padding=True)
    own_loss(model(batch=collate(rows_of_kind(kind)))).backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    for weight, is_equal in ((1e-9, True), (10.0, False)):
        with_term = gradients(kind, title, without_padding=True, weight=weight)[1]
        close = [
            torch.allclose(with_term[name], gradient, rtol=1e-4, atol=1e-5)
            for name, gradient in plain.items()
            if gradient is not None
        ]
        assert all(close) == is_equal, weight


@pytest.mark.parametrize(("kind", "title"), EXACT)
def test_steps_are_equal_for_every_micro_batch_size(tmp_path: Path, kind: str, title: str) -> None:
    expected, expected_lines = train_steps(
        tmp_path, distillation_loss([title], kind=kind), kind=kind
    )
    first = expected_lines[0]
    assert first[f"{title}_loss"] > 0
    student_losses = [first[f"{view.target}_loss"] for view in views_of_kind(kind)]
    student_loss = sum(student_losses) / len(student_losses)
    assert first["loss"] == pytest.approx(student_loss + first[f"{title}_loss"], rel=1e-3)
    for micro_batch in (4, 2):
        terms = distillation_loss([title], kind=kind)
        model, lines = train_steps(tmp_path, terms, micro_batch=micro_batch, kind=kind)
        assert [line[f"{title}_loss"] for line in lines] == pytest.approx(
            [line[f"{title}_loss"] for line in expected_lines], rel=1e-3
        )
        for name, weights in expected.state_dict().items():
            assert torch.allclose(weights, model.state_dict()[name], atol=1e-5), name


# --- independent formulas


def plain_pass(kind: str, model: Any, source: Any, target: Any) -> tuple[Any, Any, Any]:
    """One row alone: logits of its targets, and states by layer of its input and its targets."""
    ids = torch.tensor([source])
    options: dict[str, Any] = {"output_hidden_states": True}
    if kind == "t5":
        decoder_ids = torch.tensor([[0, *target[:-1]]])
        output = model(input_ids=ids, decoder_input_ids=decoder_ids, **options)
        states = [
            [layer[0] for layer in layers[1:]]
            for layers in (output.encoder_hidden_states, output.decoder_hidden_states)
        ]
        return output.logits[0], *states
    if kind == "decoder":
        output = model(input_ids=torch.tensor([[*source, *target]]), **options)
        layers = [layer[0] for layer in output.hidden_states[1:]]
        predicts = slice(len(source) - 1, -1)
        inputs = [layer[: len(source)] for layer in layers]
        return output.logits[0, predicts], inputs, [layer[predicts] for layer in layers]
    if kind == "encoder":
        end = source.index(label_heads.SEPARATOR) + 1
        segments = torch.tensor([[0] * end + [1] * (len(source) - end)])
        layers = model.body(input_ids=ids, token_type_ids=segments, **options).hidden_states
        pooled = layers[-1][0].mean(0)
    else:
        layers = model.body.model(input_ids=ids, **options).hidden_states
        pooled = layers[-1][0, -1]
    logits = model.classifier.weight @ pooled + model.classifier.bias
    return logits[None], [layer[0] for layer in layers[1:]], []


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(teacher ‖ student) of each row of logits, from their probabilities."""
    p = torch.exp(teacher / temperature) / torch.exp(teacher / temperature).sum(-1, keepdim=True)
    q = torch.exp(student / temperature) / torch.exp(student / temperature).sum(-1, keepdim=True)
    return temperature**2 * (p * (p / q).log()).sum(-1)


def huber(difference: float) -> float:
    return difference**2 / 2 if abs(difference) <= 1 else abs(difference) - 0.5


def relation_of(student: np.ndarray[Any, Any], teacher: np.ndarray[Any, Any]) -> float:
    """Park et al. 2019, equations 3 to 6, in loops; distances weigh 1 and angles 2."""
    count = len(student)
    pairs = [(i, j) for i in range(count) for j in range(i)]
    lengths = [
        np.array([np.linalg.norm(points[i] - points[j]) for i, j in pairs])
        for points in (student, teacher)
    ]
    relative = [values / values.mean() for values in lengths]
    distance = float(np.mean([huber(d) for d in relative[0] - relative[1]]))
    angles = []
    for i, j, k in itertools.product(range(count), repeat=3):
        if j in (i, k) or i == k:
            continue
        cosines = []
        for points in (student, teacher):
            one_arm, other_arm = points[i] - points[j], points[k] - points[j]
            norms = np.linalg.norm(one_arm) * np.linalg.norm(other_arm)
            cosines.append(one_arm @ other_arm / norms)
        angles.append(huber(cosines[0] - cosines[1]))
    return distance + 2 * float(np.mean(angles))


def expected_term(kind: str, title: str, model: Any, teacher: Any, projections: Any) -> float:
    """A term over all rows, from plain passes over single rows."""
    rows = rows_of_kind(kind)
    passes = {
        view.target: [
            [plain_pass(kind, each, source, target) for each in (model, teacher)]
            for row in rows
            for source, target in row.get(view.target, ())
            if kind in TEXT_KINDS or view.target == "label"
        ]
        for view in views_of_kind(kind)
    }
    if title in ("response", "reverse"):
        means = []
        for view, outputs in passes.items():
            logits = [torch.cat([row[i][0] for row in outputs]) for i in (0, 1) if outputs]
            if title == "response" and outputs:
                means.append(divergence(logits[0], logits[1], 2.0).mean())
            elif view == "rationale" and outputs:
                means.append(divergence(logits[1], logits[0], 1.0).mean())
        return float(torch.stack(means).mean())
    if title in ("labels", "from-teachers"):
        scores: list[torch.Tensor] = []
        for each in (model, teacher):
            for row in rows:
                [(source, _)] = row["label"]
                if kind not in TEXT_KINDS:
                    scores.append(plain_pass(kind, each, source, ())[0][0])
                    continue
                texts = [
                    plain_pass(kind, each, source, ids)[0].log_softmax(-1) for ids in LABEL_IDS
                ]
                pairs = zip(texts, LABEL_IDS, strict=True)
                scores.append(
                    torch.stack([text[range(len(ids)), ids].sum() for text, ids in pairs])
                )
        student, target = torch.stack(scores).log_softmax(-1).chunk(2)
        if title == "labels":
            student = student[:6]
            target = torch.tensor([[0.7, 0.2, 0.1]] * 6, dtype=torch.float32).double().log()
        return float(divergence(student, target, 1.0).mean())
    if title == "relation":
        points = [
            np.stack([row[i][1][-1].mean(0).detach().numpy() for row in passes["label"]])
            for i in (0, 1)
        ]
        return relation_of(points[0], points[1])
    stacks = {"encoder": 1, "decoder": 2} if kind in TEXT_KINDS else {"encoder": 1}
    squares: dict[str, list[float]] = {}
    for stack, part in stacks.items():
        outputs = [row for view in passes.values() for row in view]
        depths = [len(outputs[0][i][part]) for i in (0, 1)]
        for layer in range(1, depths[0] + 1):
            taught = math.ceil(layer * depths[1] / depths[0])
            linear = projections[f"feature-1-{stack}-{layer}-{taught}"]
            student = torch.cat([row[0][part][layer - 1] for row in outputs])
            target = torch.cat([row[1][part][taught - 1] for row in outputs])
            squared = (student @ linear.weight.T + linear.bias - target) ** 2
            squares.setdefault(stack, []).append(float(squared.mean(-1).mean()))
    return float(np.mean([np.mean(values) for values in squares.values()]))


def norm_in_double(self: Any, states: torch.Tensor) -> torch.Tensor:
    """RMSNorm without transformers' pass through float32."""
    variance = states.square().mean(-1, keepdim=True)
    normed: torch.Tensor = self.weight * states * torch.rsqrt(variance + self.variance_epsilon)
    return normed


@pytest.mark.parametrize(("kind", "title"), CASES)
def test_a_term_equals_its_formula_over_single_rows_and_its_gradient_finite_differences(
    monkeypatch: pytest.MonkeyPatch, kind: str, title: str
) -> None:
    monkeypatch.setattr(modeling_t5.T5LayerNorm, "forward", norm_in_double)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm_in_double)
    model = tiny_model(kind).double()
    teacher = local_teacher(kind=kind)
    teacher.model().double()
    terms = distillation_loss([title], kind=kind, teachers=[teacher])
    terms.attach_projections(model, seed=0)
    model.double()
    batch = terms.collate(rows_of_kind(kind))
    patch(model, kind, without_padding=True, terms=terms)

    def loss() -> torch.Tensor:
        value: torch.Tensor = model(batch=batch, step=step_totals(terms, batch))[title]
        return value

    with torch.no_grad():
        expected = expected_term(
            kind, title, model, teacher.model(), getattr(model, PROJECTIONS, None)
        )
    value = loss()
    assert float(value.detach()) == pytest.approx(expected, rel=1e-6)
    value.backward()
    torch.manual_seed(3)
    moved = [(weights, torch.randn_like(weights)) for weights in model.parameters()]
    slope = sum(
        float((weights.grad * step).sum()) for weights, step in moved if weights.grad is not None
    )
    values = []
    with torch.no_grad():
        for size in (1e-6, -2e-6):
            for weights, step in moved:
                weights.add_(size * step)
            values.append(float(loss()))
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-4, abs=1e-6)


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
        assert terms.counts(batch)["relation"] == 6
        step = StepTotals(
            {"rationale-then-label": 18.0 * times, "relation": 6}, {"rationale-then-label": 1.0}
        )
        losses.append(float(model(batch=batch, step=step)["relation"].detach()))
    assert losses[0] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
