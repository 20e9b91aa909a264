"""Terms in training: what a forward pass leaves for them, how a step divides them, what they do to a student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

from dsbs.config import TermSection, TrainSection
from dsbs.errors import UserError
from dsbs.training.distillation.local_teachers import LocalTeacher
from dsbs.training.distillation.objective import PROJECTIONS, DistillationLoss, StepTotals
from dsbs.training.encode import Encoded, collate
from dsbs.training.methods import View, method_of
from dsbs.training.packed.forward import ForwardRunner
from dsbs.training.trainer import StepTrainer, patch_forward

VIEWS = method_of("step-by-step").views(TrainSection())
LABELS = [[5, 1], [6, 7, 1], [8, 1]]
ROWS: list[Encoded] = [
    {
        "label": [([3 + i] * (2 + i % 3), LABELS[i % 3])],
        **(
            {"rationale": [([4 + i] * (1 + i % 4), [10 + i] * (1 + 2 * i % 7) + [1])]}
            if i not in (1, 4)
            else {}
        ),
    }
    for i in range(8)
]
SOFT = {
    np.array(row["label"][0][0], np.int64).tobytes(): np.array([0.7, 0.2, 0.1], np.float32)
    for row in ROWS[:6]
}
TERMS: dict[str, dict[str, Any]] = {
    "response": {"kind": "response", "temperature": 2.0},
    "reverse": {
        "kind": "response",
        "name": "reverse",
        "divergence": "reverse",
        "targets": "rationale",
    },
    "labels": {"kind": "labels"},
    "from-teachers": {"kind": "labels", "name": "from-teachers", "source": "teachers"},
    "feature": {"kind": "feature"},
    "relation": {"kind": "relation"},
}
CUT_ALIKE = [
    name for name in TERMS if name != "relation"
]  # that one is of the examples of one forward pass


def t5(width: int = 16, layers: int = 2, seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 40, "d_model": width, "d_kv": 8, "d_ff": 32, "num_layers": layers, "num_decoder_layers": layers - 1,
        "num_heads": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0,
    }  # fmt: skip
    return T5ForConditionalGeneration(T5Config(**shape | changes))


def teacher(name: str = "one", weight: float = 1.0, **shape: Any) -> LocalTeacher:
    model = t5(**{"width": 24, "layers": 3, "seed": 7} | shape).eval().requires_grad_(False)
    return LocalTeacher(name, Path(name), weight, name, model)


def distilling(
    names: list[str], section: TrainSection | None = None, **changes: Any
) -> DistillationLoss:
    terms = [TermSection(**TERMS[name]) for name in names]
    made: dict[str, Any] = {"teachers": [teacher()], "labels": LABELS, "soft": SOFT}
    return DistillationLoss(terms, section or TrainSection(), VIEWS, **made | changes)


def gradients(
    name: str, *, without_padding: bool, weight: float = 1.0
) -> tuple[float, dict[str, torch.Tensor]]:
    """A term's value on all rows and its gradients, times ``weight``, added to the student's own."""
    model, terms = (
        t5(),
        distilling([name], TrainSection(padding="none" if without_padding else "batch")),
    )
    terms.attach(model, seed=0)
    batch = terms.collate(ROWS)
    counts = {view.target: float(len(batch[view.target].target)) for view in VIEWS} | terms.tally(
        batch
    )
    patch_forward(model, VIEWS, without_padding=without_padding, terms=terms)
    found = model(batch=batch, step=StepTotals(counts, {"label": 1.0, "rationale": 1.0}))
    (found["label"] + found["rationale"] + weight * found[name]).backward()
    return float(found[name].detach()), {
        n: p.grad for n, p in model.named_parameters() if p.grad is not None
    }


def test_a_padded_and_an_unpadded_pass_leave_the_same() -> None:
    for rows in (ROWS, [*ROWS, {"label": [([3, 3], [9, 1]), ([3, 3], [2])]}]):
        batch = collate(rows)
        made = [
            ForwardRunner(t5(), VIEWS, without_padding=way, hidden_states=True, labels=LABELS)(
                batch
            )
            for way in (True, False)
        ]
        for view in VIEWS:
            assert made[0].logits[view.target].shape == (len(batch[view.target].target), 40)
            assert torch.allclose(
                made[0].logits[view.target], made[1].logits[view.target], atol=1e-5
            )
        assert [len(one.encoder) for one in made] == [2, 2] and [
            len(one.decoder) for one in made
        ] == [1, 1]
        for ours, theirs in zip(
            [*made[0].encoder, *made[0].decoder], [*made[1].encoder, *made[1].decoder], strict=True
        ):
            assert ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=1e-5)
        assert made[0].labels is not None and made[1].labels is not None
        assert torch.allclose(made[0].labels, made[1].labels, atol=1e-5)


def test_a_labels_score_is_the_log_probability_of_its_text() -> None:
    model = t5()
    scores = ForwardRunner(model, VIEWS, without_padding=True, labels=LABELS)(collate(ROWS)).labels
    assert scores is not None and scores.shape == (8, 3)
    for row, of_row in zip(ROWS, scores.tolist(), strict=True):
        for label, score in zip(LABELS, of_row, strict=True):
            said = model(input_ids=torch.tensor([row["label"][0][0]]), labels=torch.tensor([label]))
            assert score == pytest.approx(-float(said.loss.detach()) * len(label), rel=1e-4)


@pytest.mark.parametrize("name", TERMS)
def test_padding_changes_neither_a_term_nor_its_gradients(name: str) -> None:
    (ours, with_ours), (theirs, with_theirs) = (
        gradients(name, without_padding=way) for way in (True, False)
    )
    assert ours > 0 and ours == pytest.approx(theirs, rel=1e-4)
    assert set(with_ours) == set(with_theirs)
    for key, value in with_ours.items():
        assert torch.allclose(value, with_theirs[key], rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("name", TERMS)
def test_with_its_weight_to_0_a_term_leaves_the_students_own_gradients(name: str) -> None:
    model = t5()
    patch_forward(model, VIEWS, without_padding=True)
    sums = model(batch=collate(ROWS))
    (sums["label"] + sums["rationale"]).backward()
    plain = {key: parameter.grad for key, parameter in model.named_parameters()}
    for weight, alike in ((1e-9, True), (10.0, False)):
        found = gradients(name, without_padding=True, weight=weight)[1]
        same = [
            torch.allclose(found[key], plain[key], rtol=1e-4, atol=1e-5)
            for key in plain
            if plain[key] is not None
        ]
        assert all(same) == alike, weight


def trained(
    folder: Path,
    terms: DistillationLoss | None,
    micro: int = 8,
    steps: int = 3,
    world_size: int = 1,
    model: Any = None,
    rows: Any = ROWS,
    views: tuple[View, ...] = VIEWS,
    **keys: Any,
) -> Any:
    """A student after some steps of plain gradient descent, and the logged losses."""
    model = model or t5()
    section = TrainSection(max_steps=steps, **keys)
    if terms is not None:
        terms.attach(model, seed=0)
    trainer = StepTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro // world_size,
            max_steps=steps,
            learning_rate=1e-2 if steps < 10 else 5e-2, max_grad_norm=1.0 if steps > 9 else 0.0, lr_scheduler_type="constant",
            report_to=[], save_strategy="no", logging_steps=1, remove_unused_columns=False, disable_tqdm=True, use_cpu=True,
            seed=0, train_sampling_strategy="sequential", optim="sgd",
        ),
        train_dataset=rows, data_collator=terms.collate if terms else collate, views=views, section=section, validate=dict,
        terms=terms,
    )  # fmt: skip
    trainer.train()
    return model, [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("name", CUT_ALIKE)
def test_steps_are_the_same_however_they_are_cut_into_micro_batches(
    tmp_path: Path, name: str
) -> None:
    whole, lines = trained(tmp_path, distilling([name]))
    assert lines[0][f"{name}_loss"] > 0
    own = (lines[0]["label_loss"] + lines[0]["rationale_loss"]) / 2
    assert lines[0]["loss"] == pytest.approx(own + lines[0][f"{name}_loss"], rel=1e-3)
    for micro in (4, 2):
        parts, parts_lines = trained(tmp_path, distilling([name]), micro)
        assert [row[f"{name}_loss"] for row in parts_lines] == pytest.approx(
            [row[f"{name}_loss"] for row in lines], rel=1e-3
        )
        for key, value in whole.state_dict().items():
            assert torch.allclose(value, parts.state_dict()[key], atol=1e-5), key


def measure(model: Any, name: str) -> float:
    """A term's value for a trained student; its projections, if it has any, are the ones that it learned."""
    terms = distilling([name])
    terms.attach(fresh := t5(), seed=0)
    fresh.load_state_dict(model.state_dict(), strict=False)
    batch = terms.collate(ROWS)
    counts = {view.target: float(len(batch[view.target].target)) for view in VIEWS} | terms.tally(
        batch
    )
    patch_forward(fresh.eval(), VIEWS, without_padding=True, terms=terms)
    with torch.no_grad():
        return float(
            fresh(batch=batch, step=StepTotals(counts, {"label": 1.0, "rationale": 1.0}))[name]
        )


@pytest.mark.parametrize("name", TERMS)
def test_a_term_goes_down_and_brings_the_student_nearer_than_one_without_it(
    tmp_path: Path, name: str
) -> None:
    with_term, lines = trained(tmp_path, distilling([name]), steps=40)
    without, _ = trained(tmp_path, None, steps=40)
    assert lines[-1][f"{name}_loss"] < lines[0][f"{name}_loss"]
    assert measure(with_term, name) < measure(without, name)


def test_published_means_take_each_micro_batch_for_itself(tmp_path: Path) -> None:
    _, lines = trained(
        tmp_path,
        distilling(["response"], TrainSection(loss_mean="micro")),
        micro=4,
        loss_mean="micro",
    )
    _, whole = trained(tmp_path, distilling(["response"]))
    assert lines[0]["response_loss"] > 0 and lines[0]["response_loss"] != pytest.approx(
        whole[0]["response_loss"], rel=1e-4
    )


def test_two_teachers_of_which_one_counts_for_nothing_are_one(tmp_path: Path) -> None:
    second = teacher("other", weight=1e-12, seed=9)
    for name in ("response", "from-teachers", "relation"):
        _, alone = trained(tmp_path, distilling([name]), steps=1)
        _, both = trained(tmp_path, distilling([name], teachers=[teacher(), second]), steps=1)
        _, equal = trained(
            tmp_path, distilling([name], teachers=[teacher(), teacher("other", seed=9)]), steps=1
        )
        values = [lines[0][f"{name}_loss"] for lines in (alone, both, equal)]
        assert values[1] == pytest.approx(values[0], rel=1e-4) and values[2] != pytest.approx(
            values[0], rel=1e-4
        )


def test_a_layer_that_is_not_there_is_said_before_training() -> None:
    term = TermSection(kind="feature", layers={2: 4})
    terms = DistillationLoss([term], TrainSection(), VIEWS, teachers=[teacher()])
    with pytest.raises(UserError, match=r"the encoder's layers: .*the teacher has layers 1 to 3"):
        terms.attach(t5(), seed=0)


def test_projections_depend_on_the_seed_alone_and_leave_dropouts_generator_as_it_was() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model, terms = t5(), distilling(["feature"])
        before = torch.get_rng_state()
        terms.attach(model, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        drawn.append(torch.cat([one.flatten() for one in getattr(model, PROJECTIONS).parameters()]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("name", TERMS)
def test_published_means_do_with_micro_batches_that_lack_a_view(tmp_path: Path, name: str) -> None:
    _, lines = trained(
        tmp_path,
        distilling([name], TrainSection(loss_mean="micro")),
        micro=1,
        steps=2,
        loss_mean="micro",
    )
    assert all(np.isfinite(row["loss"]) for row in lines)


def test_a_relation_weighs_the_same_however_many_targets_its_examples_have(tmp_path: Path) -> None:
    views = (View("rationale-then-label", "", 1.0),)
    texts = [([3 + i] * (2 + i % 3), [10 + i, 9, 1]) for i in range(6)]
    found = []
    for times in (1, 3):
        rows: list[Encoded] = [{"rationale-then-label": [pair] * times} for pair in texts]
        terms = DistillationLoss(
            [TermSection(kind="relation")], TrainSection(), views, teachers=[teacher()]
        )
        model, batch = t5(), terms.collate(rows)
        patch_forward(model, views, without_padding=True, terms=terms)
        tally = terms.tally(batch)
        assert (tally["targets"], tally["examples"]) == (6 * times, 6)
        step = StepTotals(
            {"rationale-then-label": 18.0 * times, **tally}, {"rationale-then-label": 1.0}
        )
        found.append(float(model(batch=batch, step=step)["relation"].detach()))
    assert found[0] > 0 and found[1] == pytest.approx(found[0], rel=1e-5)
