"""Packed T5 against transformers' padded T5: equal logits, gradients and dropout distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_t5 import ROWS, SHAPE, t5
from transformers import MT5Config, MT5ForConditionalGeneration

from dsbs.config import TrainSection
from dsbs.training.encode import Encoded, collate, pad
from dsbs.training.methods import method_of
from dsbs.training.packed.layout import dropout
from dsbs.training.packed.t5 import TargetBlock, is_t5, packed_logits
from dsbs.training.trainer import patch_forward


def v1_1() -> Any:
    model = t5(feed_forward_proj="gated-gelu")
    model.config.scale_decoder_outputs = False  # the setting that v1.1 checkpoints have
    return model


def checkpointing() -> Any:
    model = t5()
    model.activation_checkpointing_enable()
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "t5": t5,
    "v1.1": v1_1,
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**SHAPE)).double().train(),
    "checkpointing": checkpointing,
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_equal_those_of_padded_rows(name: str) -> None:
    model = MODELS[name]()
    assert is_t5(model)
    for view, packed in collate(ROWS).items():
        batch = pad(packed, 0, start=3)
        model.zero_grad()
        expected = model(**batch, use_cache=False).logits[batch["labels"] != -100]
        (expected**2).mean().backward()
        expected_gradients = {
            parameter_name: parameter.grad.clone()
            for parameter_name, parameter in model.named_parameters()
            if parameter.grad is not None
        }
        model.zero_grad()
        source_lengths = packed.source_lengths.tolist()
        logits = packed_logits(
            model,
            packed.source,
            source_lengths,
            packed.target,
            packed.target_lengths.tolist(),
            [TargetBlock(range(len(source_lengths)), start=3)],
        )
        assert torch.allclose(logits, expected, atol=1e-10), view
        (logits**2).mean().backward()
        parameters = dict(model.named_parameters())
        for parameter_name, gradient in expected_gradients.items():
            ours = parameters[parameter_name].grad
            assert torch.allclose(ours, gradient, atol=1e-10), (view, parameter_name)


@pytest.mark.parametrize("task_token", ["prefix", "decoder"])
def test_both_views_in_one_pass_have_their_own_losses_and_gradients(task_token: Any) -> None:
    packed_model = t5()
    padded_model = t5()
    views = method_of("step-by-step").views(TrainSection(task_token=task_token))
    patch_forward(packed_model, views, without_padding=True)
    patch_forward(padded_model, views, without_padding=False)
    rows: list[Encoded] = ROWS
    if task_token == "decoder":  # both views have the same input
        rows = [
            {
                view: [(row["label"][0][0], target) for _, target in pairs]
                for view, pairs in row.items()
            }
            for row in ROWS
        ]
    batch = collate(rows)
    packed_losses = packed_model(batch=batch)
    padded_losses = padded_model(batch=batch)
    assert set(packed_losses) == set(padded_losses) == {"label", "rationale"}
    for view, loss in packed_losses.items():
        assert float(loss.detach()) == pytest.approx(float(padded_losses[view].detach()), rel=1e-6)
    for losses in (packed_losses, padded_losses):
        (losses["label"] + 0.3 * losses["rationale"]).backward()
    expected = dict(padded_model.named_parameters())
    for name, parameter in packed_model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name].grad, rtol=1e-5, atol=1e-5), name
    plain = packed_model(**pad(batch["label"], 0, start=0))
    assert plain.loss is not None, "a call without a batch is transformers' own"


def test_the_decoder_start_token_distinguishes_the_views() -> None:
    model = t5()
    views = method_of("step-by-step").views(TrainSection(task_token="decoder"))
    patch_forward(model, views, without_padding=True)
    losses = model(batch=collate([{"label": [([4, 5], [7, 1])], "rationale": [([4, 5], [7, 1])]}]))
    label_loss = float(losses["label"].detach())
    assert label_loss != pytest.approx(float(losses["rationale"].detach()), rel=1e-3)


@pytest.mark.parametrize(("task_token", "inputs"), [("prefix", 2), ("decoder", 1)])
def test_an_input_is_encoded_once_for_all_its_targets(
    monkeypatch: pytest.MonkeyPatch, task_token: Any, inputs: int
) -> None:
    model = t5()
    embed = model.encoder.embed_tokens.forward
    token_counts: list[int] = []

    def counting(ids: torch.Tensor) -> Any:
        token_counts.append(len(ids))
        return embed(ids)

    monkeypatch.setattr(model.encoder.embed_tokens, "forward", counting)
    source = [4, 5, 6]
    batch = collate(
        [{"label": [(source, [7, 1])], "rationale": [(source, [8, 9, 1]), (source, [8])]}]
    )
    views = method_of("step-by-step").views(TrainSection(task_token=task_token))
    patch_forward(model, views, without_padding=True)
    model(batch=batch)
    assert sum(token_counts) == inputs * len(source)


@pytest.mark.parametrize("p", [0.2, 0.0])
def test_relu_and_dropout_share_one_mask(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 700, requires_grad=True)
    output = dropout(x, p, True, rectified=True)
    survives = output.detach() != 0
    assert not (survives & (x.detach() <= 0)).any()
    assert float(survives.float().mean()) == pytest.approx((1 - p) / 2, abs=0.005)
    scale = output.detach()[survives] / x.detach()[survives]
    assert torch.allclose(scale, torch.full_like(scale, 1 / (1 - p)), rtol=1e-4)
    output.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad[survives], scale)
    assert (x.grad[~survives] == 0).all()
    assert torch.equal(dropout(x, p, False, rectified=True), torch.relu(x))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.0])
def test_dropout_has_the_right_share_and_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 1003, requires_grad=True)
    output = dropout(x, p, True)
    survives = output.detach() != 0
    assert float(survives.float().mean()) == pytest.approx(1 - p, abs=0.003)
    assert float(output.detach().mean()) == pytest.approx(1.0, abs=0.005)
    # four neighbors are drawn from one random number and must still be independent
    both_survive = (survives[:, :-1] & survives[:, 1:]).float().mean()
    assert float(both_survive) == pytest.approx((1 - p) ** 2, abs=0.004)
    output.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, output.detach()), "a dropped element has no gradient"
    assert torch.equal(dropout(x, p, False), x)


def test_dropout_follows_the_seed() -> None:
    x = torch.ones(1000)
    torch.manual_seed(5)
    first = dropout(x, 0.3, True)
    second = dropout(x, 0.3, True)
    torch.manual_seed(5)
    assert torch.equal(first, dropout(x, 0.3, True))
    assert not torch.equal(first, second)
