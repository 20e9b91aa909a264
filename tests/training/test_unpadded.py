"""T5 without padding against transformers' own: the same logits, the same gradients, the same dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from dsbs.config import TrainSection
from dsbs.training.encode import Encoded, collate, pad
from dsbs.training.methods import method_of
from dsbs.training.packed.t5 import TargetBlock, dropout, is_t5, logits_of
from dsbs.training.trainer import patch_forward

SHAPE: dict[str, Any] = {
    "vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0, "pad_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
}  # fmt: skip
ROWS: list[Encoded] = [
    {"label": [([3] * 2, [5])], "rationale": [([4, 9] * 9, [6, 7, 8] * 11), ([4, 9] * 9, [5])]},
    {"label": [(list(range(3, 40)), [7, 1])]},
    {"label": [([9], [8, 1, 1])], "rationale": [([9, 3, 9], [2])]},
    *(
        {
            "label": [([5 + i, 6], [4 + i, 1])],
            "rationale": [([5 + i] * (i + 1), [4 + i] * (2 * i + 1))],
        }
        for i in range(20)
    ),
]


def t5(**changes: Any) -> Any:
    torch.manual_seed(1)
    return T5ForConditionalGeneration(T5Config(**SHAPE | changes)).double().train()


def models() -> dict[str, Any]:
    untied = t5(feed_forward_proj="gated-gelu")
    untied.config.scale_decoder_outputs = False  # as v1.1 is told apart
    return {
        "t5": t5(),
        "v1.1": untied,
        "mt5": MT5ForConditionalGeneration(MT5Config(**SHAPE)).double().train(),
        "checkpointing": t5(),
    }


@pytest.mark.parametrize("name", ["t5", "v1.1", "mt5", "checkpointing"])
def test_logits_and_gradients_are_those_of_padded_rows(name: str) -> None:
    model = models()[name]
    if name == "checkpointing":
        model.activation_checkpointing_enable()
    assert is_t5(model)
    for target, flat in collate(ROWS).items():
        batch = pad(flat, 0, start=3)
        reading, writing = flat.source_lengths.tolist(), flat.target_lengths.tolist()
        model.zero_grad()
        expected = model(**batch, use_cache=False).logits[batch["labels"] != -100]
        (expected**2).mean().backward()
        theirs = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        ours = logits_of(
            model,
            flat.source,
            reading,
            flat.target,
            writing,
            [TargetBlock(range(len(reading)), start=3)],
        )
        assert torch.allclose(ours, expected, atol=1e-10), target
        (ours**2).mean().backward()
        for n, p in model.named_parameters():
            if n in theirs:
                assert torch.allclose(p.grad, theirs[n], atol=1e-10), (target, n)


@pytest.mark.parametrize("task_token", ["prefix", "decoder"])
def test_both_views_at_once_give_each_its_own_sum_and_gradient(task_token: str) -> None:
    together, apart = t5(), t5()
    views = method_of("step-by-step").views(TrainSection(task_token=task_token))  # type: ignore[arg-type]
    patch_forward(together, views, without_padding=True)
    patch_forward(apart, views, without_padding=False)
    rows = ROWS
    if task_token == "decoder":  # both views read the same
        rows = [
            {
                name: [(row["label"][0][0], target) for _, target in pairs]
                for name, pairs in row.items()
            }
            for row in ROWS
        ]
    batch = collate(rows)
    ours, theirs = together(batch=batch), apart(batch=batch)
    assert set(ours) == set(theirs) == {"label", "rationale"}
    for name in ours:
        assert float(ours[name].detach()) == pytest.approx(float(theirs[name].detach()), rel=1e-6)
    for sums in (ours, theirs):
        (sums["label"] + 0.3 * sums["rationale"]).backward()
    theirs_by_name = dict(apart.named_parameters())
    for name, parameter in together.named_parameters():
        assert torch.allclose(parameter.grad, theirs_by_name[name].grad, rtol=1e-5, atol=1e-5), name
    assert together(**pad(batch["label"], 0, start=0)).loss is not None, (
        "what is not about views is answered as before"
    )


def test_the_decoders_start_tells_the_tasks_apart() -> None:
    model = t5()
    views = method_of("step-by-step").views(TrainSection(task_token="decoder"))
    patch_forward(model, views, without_padding=True)
    same = collate([{"label": [([4, 5], [7, 1])], "rationale": [([4, 5], [7, 1])]}])
    found = model(batch=same)
    assert float(found["label"].detach()) != pytest.approx(
        float(found["rationale"].detach()), rel=1e-3
    )


def test_rows_that_read_the_same_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = t5(), []
    monkeypatch.setattr(
        model.encoder.embed_tokens, "forward", _counting(model.encoder.embed_tokens.forward, seen)
    )
    for token, factor in (("prefix", 2), ("decoder", 1)):
        fresh = collate(
            [
                {
                    "label": [([4, 5, 6], [7, 1])],
                    "rationale": [([4, 5, 6], [8, 9, 1]), ([4, 5, 6], [8])],
                }
            ]
        )
        seen.clear()
        model.forward = type(model).forward.__get__(model)
        views = method_of("step-by-step").views(TrainSection(task_token=token))  # type: ignore[arg-type]
        patch_forward(model, views, without_padding=True)
        model(batch=fresh)
        assert sum(seen) == factor * 3


def _counting(forward: Any, seen: list[int]) -> Any:
    return lambda ids: (seen.append(len(ids)), forward(ids))[1]


@pytest.mark.parametrize("p", [0.2, 0.0])
def test_a_mask_for_relu_and_dropout_together(p: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 700, requires_grad=True)
    made = dropout(x, p, True, rectified=True)
    kept = made.detach() != 0
    assert not (kept & (x.detach() <= 0)).any()
    assert float(kept.float().mean()) == pytest.approx((1 - p) / 2, abs=0.005)
    scale = made.detach()[kept] / x.detach()[kept]
    assert torch.allclose(scale, torch.full_like(scale, 1 / (1 - p)), rtol=1e-4)
    made.sum().backward()
    assert torch.allclose(x.grad[kept], scale) and (x.grad[~kept] == 0).all()
    assert torch.equal(dropout(x, p, False, rectified=True), torch.relu(x))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.0])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(400, 1003, requires_grad=True)
    made = dropout(x, p, True)
    kept = made.detach() != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.003)
    assert float(made.detach().mean()) == pytest.approx(1.0, abs=0.005)
    # neighbours are drawn from one number: they must not know of one another
    pairs = (kept[:, :-1] & kept[:, 1:]).float().mean()
    assert float(pairs) == pytest.approx((1 - p) ** 2, abs=0.004)
    made.sum().backward()
    assert torch.equal(x.grad, made.detach()), "what was dropped learns nothing"
    assert torch.equal(dropout(x, p, False), x)


def test_dropout_follows_the_seed() -> None:
    x = torch.ones(1000)
    torch.manual_seed(5)
    first = dropout(x, 0.3, True)
    second = dropout(x, 0.3, True)
    torch.manual_seed(5)
    assert torch.equal(first, dropout(x, 0.3, True)) and not torch.equal(first, second)
