"""Label heads: losses and steps against an independent loop, for each family of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import label_heads
import pytest
import torch
from label_heads import FAMILIES, SEPARATOR, choice_rows, label_head, rows
from torch.nn.functional import cross_entropy, softplus
from transformers import Seq2SeqTrainingArguments

from dsbs.config import TrainSection
from dsbs.students.heads import LabelHeadModel
from dsbs.training.encode import Encoded, collate
from dsbs.training.methods import views_of
from dsbs.training.packed.label_head import LabelHeadRunner, split_new_layers
from dsbs.training.trainer import StepTrainer

STEPS = 10
WEIGHT = 0.5
RATE = 3e-2
Losses = dict[str, torch.Tensor]


def states_of(model: LabelHeadModel, source: Any) -> torch.Tensor:
    """transformers' own pass over one input without padding (S, D)."""
    ids = torch.tensor([source])
    body = model.body
    if model.architecture == "seq2seq":
        return torch.as_tensor(body.get_encoder()(input_ids=ids).last_hidden_state[0])
    if model.architecture == "causal":
        return torch.as_tensor(body.base_model(input_ids=ids).last_hidden_state[0])
    inputs = {"input_ids": ids}
    if model.config.model_type in ("bert", "albert", "electra"):
        end = source.index(SEPARATOR) + 1
        inputs["token_type_ids"] = torch.tensor([[0] * end + [1] * (len(source) - end)])
    return torch.as_tensor(body(**inputs).last_hidden_state[0])


def class_logits(model: LabelHeadModel, source: Any) -> torch.Tensor:
    states = states_of(model, source)
    pooled = states[-1] if model.architecture == "causal" else states.mean(0)
    head = model.classifier
    return head.weight @ pooled + head.bias


def rationale_nll(model: LabelHeadModel, source: Any, target: Any) -> torch.Tensor:
    ids = torch.tensor([source])
    if model.architecture == "causal":
        logits = model.body(input_ids=torch.tensor([[*source, *target]])).logits
        logits = logits[0, len(source) - 1 : -1]
    elif model.architecture == "seq2seq":
        logits = model.body(input_ids=ids, labels=torch.tensor([target])).logits[0]
    else:
        start = [model.rationale_decoder.config.bos_token_id, *target[:-1]]
        logits = model.rationale_decoder(
            input_ids=torch.tensor([start]), encoder_hidden_states=states_of(model, source)[None]
        ).logits[0]
    return cross_entropy(logits, torch.tensor(target), reduction="sum")


def losses_row_by_row(
    model: LabelHeadModel,
    data: Sequence[Encoded],
    class_weights: Sequence[float] = (),
    label_sets: Sequence[Sequence[int]] | None = None,
) -> Losses:
    """By view, the mean cross-entropy of plain passes over single rows without padding."""
    total = {
        view: torch.zeros((), dtype=model.classifier.weight.dtype)
        for view in ("label", "rationale")
    }
    weight_sum = 0.0
    tokens = 0
    for row in data:
        if model.classifier.out_features == 1:
            scores = torch.cat([class_logits(model, source) for source, _ in row["label"]])
            label = [target[0] for _, target in row["label"]].index(1)
        else:
            [(source, (label,))] = row["label"]
            scores = class_logits(model, source)
        if label_sets is not None:
            weight_sum += 1
            for z, y, weight in zip(
                scores, label_sets[label], class_weights or [1.0] * len(scores), strict=True
            ):
                nll = weight * y * softplus(-z) + (1 - y) * softplus(z)
                total["label"] = total["label"] + nll / len(scores)
        else:
            weight = class_weights[label] if class_weights else 1.0
            weight_sum += weight
            total["label"] = total["label"] + weight * cross_entropy(scores, torch.tensor(label))
        for source, target in row.get("rationale", ()):
            total["rationale"] = total["rationale"] + rationale_nll(model, source, target)
            tokens += len(target)
    return {"label": total["label"] / weight_sum, "rationale": total["rationale"] / tokens}


def gradients_of(model: LabelHeadModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.any()
    }


@pytest.mark.parametrize("without_padding", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_those_of_single_rows(
    family: str, without_padding: bool
) -> None:
    model = label_head(family).double().train()
    views = views_of("step-by-step", TrainSection(), "labels")
    runner = LabelHeadRunner(model, views, without_padding=without_padding)
    batch = collate(rows())
    sums, _ = runner.run(batch)
    for view, expected in losses_row_by_row(model, rows()).items():
        mean = sums[view] / (len(rows()) if view == "label" else len(batch[view].target))
        assert float(mean.detach()) == pytest.approx(float(expected.detach()), rel=1e-6), view
        ours = gradients_of(model, mean)
        theirs = gradients_of(model, expected)
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert torch.allclose(ours[name], gradient, atol=1e-6), (view, name)


def descend(
    model: LabelHeadModel,
    data: Sequence[Encoded],
    weights: Sequence[float] = (),
    label_sets: Sequence[Sequence[int]] | None = None,
) -> None:
    """The independent loop: plain gradient descent on the formula."""
    for _ in range(STEPS):
        losses = losses_row_by_row(model, data, weights, label_sets)
        loss = (losses["label"] + WEIGHT * losses["rationale"]) / (1 + WEIGHT)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(RATE * parameter.grad)


def train(model: Any, folder: Path, micro_batch: int, **changes: Any) -> StepTrainer:
    """Train with plain gradient descent."""
    method = changes.pop("method", "step-by-step")
    data = changes.pop("data", rows())
    class_weights = changes.pop("class_weights", ())
    label_sets = changes.pop("label_sets", None)
    section = TrainSection(
        batch_size=8, max_steps=STEPS, learning_rate=RATE, head_learning_rate=RATE, **changes
    )
    views = views_of(method, section, "labels")
    supervised = {view.target for view in views if view.supervised}
    dataset = [{name: pairs for name, pairs in row.items() if name in supervised} for row in data]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch,
        max_steps=STEPS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
    )
    trainer = StepTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        views=views,
        section=section.resolved(is_scratch=False),
        validate=lambda: {},
        class_weights=class_weights,
        scores_choices=model.classifier.out_features == 1,
        label_sets=label_sets,
        optimizers=(torch.optim.SGD(model.parameters(), lr=RATE), None),
    )
    trainer.train()
    return trainer


def assert_equal_weights(model: LabelHeadModel, reference: LabelHeadModel) -> None:
    # Gemma's norms compute in float32 whatever their input is.
    tolerance = 1e-4 if "gemma" in model.config.model_type else 1e-6
    for name, weights in reference.state_dict().items():
        difference = float((model.state_dict()[name] - weights).abs().max())
        assert difference < tolerance, (name, difference)


@pytest.mark.parametrize("family", FAMILIES)
def test_ten_steps_equal_an_independent_loop(tmp_path: Path, family: str) -> None:
    reference = label_head(family).double()
    descend(reference, rows())
    model = label_head(family).double()
    train(model, tmp_path, 2 if family in label_heads.ENCODERS else 8, rationale_weight=WEIGHT)
    assert_equal_weights(model, reference)


def test_class_weights_give_a_weighted_mean_over_the_step(tmp_path: Path) -> None:
    weights = (0.5, 3.0, 1.0)
    reference = label_head("bert").double()
    descend(reference, rows(), weights)
    model = label_head("bert").double()
    train(model, tmp_path, 2, rationale_weight=WEIGHT, class_weights=weights)
    assert_equal_weights(model, reference)


LABEL_SETS = ((0, 0, 0), (1, 0, 1), (0, 1, 0))


@pytest.mark.parametrize("weights", [(), (0.5, 3.0, 1.0)])
@pytest.mark.parametrize(("family", "micro_batch"), [("bert", 1), ("bert", 8), ("t5", 4)])
def test_several_labels_have_a_mean_of_binary_losses_over_the_step(
    tmp_path: Path, family: str, micro_batch: int, weights: tuple[float, ...]
) -> None:
    reference = label_head(family).double()
    descend(reference, rows(), weights, LABEL_SETS)
    model = label_head(family).double()
    changes = {"class_weights": weights, "label_sets": LABEL_SETS}
    train(model, tmp_path, micro_batch, rationale_weight=WEIGHT, **changes)
    assert_equal_weights(model, reference)


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_choices_are_scored_by_a_softmax_over_their_row(tmp_path: Path, family: str) -> None:
    reference = label_head(family, outputs=1).double()
    descend(reference, choice_rows())
    model = label_head(family, outputs=1).double()
    train(model, tmp_path, 2, rationale_weight=WEIGHT, data=choice_rows())
    assert_equal_weights(model, reference)


def test_new_layers_have_their_own_learning_rate() -> None:
    model = label_head("bert")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    split_new_layers(optimizer, model, 1e-3)
    pretrained, new = optimizer.param_groups
    assert (pretrained["lr"], new["lr"]) == (1e-4, 1e-3)
    assert {id(p) for p in pretrained["params"]} == {id(p) for p in model.body.parameters()}
    assert len(pretrained["params"]) + len(new["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
def test_without_weight_a_rationale_changes_no_bit(tmp_path: Path, family: str) -> None:
    finetuned = label_head(family, dropout=0.1)
    weightless = label_head(family, dropout=0.1)
    train(finetuned, tmp_path / "a", 4, method="finetune")
    train(weightless, tmp_path / "b", 4, rationale_weight=0.0)
    for name, weights in finetuned.state_dict().items():
        assert torch.equal(weightless.state_dict()[name], weights), name


@pytest.mark.parametrize("micro_batch", [8, 2])
def test_balanced_weight_keeps_the_share_of_the_gradients(tmp_path: Path, micro_batch: int) -> None:
    reference = label_head("bert").double()
    losses = losses_row_by_row(reference, rows())
    gradients = {view: gradients_of(reference, loss) for view, loss in losses.items()}
    shared = gradients["label"].keys() & gradients["rationale"].keys()
    assert "body.encoder.layer.0.output.dense.weight" in shared
    assert not any(name.startswith(("classifier", "rationale_decoder.bert.enc")) for name in shared)
    label, rationale = (
        torch.cat([gradients[view][name].flatten() for name in sorted(shared)]).norm()
        for view in ("label", "rationale")
    )
    model = label_head("bert").double()
    balance = {"share": 0.3, "every": 4}
    trainer = train(model, tmp_path, micro_batch, rationale_weight=balance)
    first = next(row for row in trainer.state.log_history if "rationale_weight" in row)
    assert first["rationale_weight"] == pytest.approx(float(0.3 * label / rationale), rel=1e-6)
    assert first["label_gradient"] == pytest.approx(float(label), rel=1e-6)
    measured = [row["rationale_weight"] for row in trainer.state.log_history if "loss" in row]
    assert [measured.index(weight) for weight in measured] == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_weights_that_no_view_trains_are_frozen(tmp_path: Path) -> None:
    model = label_head("t5")
    train(model, tmp_path, 8, method="finetune")
    trained = {name for name, weights in model.named_parameters() if weights.requires_grad}
    assert not any("decoder" in name for name in trained)
    assert {"body.shared.weight", "classifier.weight"} <= trained
