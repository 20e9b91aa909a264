"""Which layers are dropped, and with which of the original's layers the others are compared."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_models import save_label_head
from test_compress_decoder import BATCH, Rows, decoder
from test_compress_encoder import BATCH as ENCODER_BATCH
from test_shapes import BATCH as T5_BATCH
from test_shapes import t5
from torch.nn.functional import cross_entropy

from dsbs.compression import left_after_rounds
from dsbs.compression.healing import implied_layer_map
from dsbs.compression.layers import (
    LAYERS_FILE,
    DropLayers,
    block_influence,
    dropped_layers,
    keep_layers,
    layers_to_keep,
    loss_increase,
)
from dsbs.students.weights import load_model


def cosine(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    products = (before * after).sum(-1)
    return products / (before.square().sum(-1).sqrt() * after.square().sum(-1).sqrt())


def test_the_influence_of_a_decoders_layer_is_one_minus_the_mean_cosine() -> None:
    model = decoder("llama")
    last: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda _m, inputs: last.append(inputs[0]))
    with torch.no_grad():
        states = model(input_ids=BATCH["input_ids"], output_hidden_states=True).hidden_states
    hook.remove()
    states = [*states[:-1], last[0]]  # the last one is normalized
    real = BATCH["attention_mask"].bool()
    expected = [
        float(1 - cosine(before.double(), after.double())[real].mean())
        for before, after in pairwise(states)
    ]
    assert block_influence(model, [BATCH]) == {"decoder": pytest.approx(expected, abs=1e-6)}


def test_the_influences_of_a_t5_count_inputs_and_targets_apart() -> None:
    model = t5()
    last: dict[str, torch.Tensor] = {}
    hooks = [
        stack.final_layer_norm.register_forward_pre_hook(
            lambda _m, inputs, name=name: last.update({name: inputs[0]})
        )
        for name, stack in (("encoder", model.encoder), ("decoder", model.decoder))
    ]
    with torch.no_grad():
        output = model(**T5_BATCH, use_cache=False, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    masks = {"encoder": T5_BATCH["attention_mask"].bool(), "decoder": T5_BATCH["labels"] != -100}
    found = block_influence(model, [T5_BATCH])
    for name, mask in masks.items():
        states = [*getattr(output, f"{name}_hidden_states")[:-1], last[name]]
        expected = [
            float(1 - cosine(before, after)[mask].mean()) for before, after in pairwise(states)
        ]
        assert found[name] == pytest.approx(expected, abs=1e-6), name


def test_the_influence_of_an_encoders_layer(tmp_path: Path) -> None:
    model = load_model(str(save_label_head(tmp_path)), labels=2).eval()
    inputs = (ENCODER_BATCH["input_ids"], ENCODER_BATCH["attention_mask"])
    with torch.no_grad():
        embedded = model._read(*inputs, output_hidden_states=True).hidden_states[0]
        states = [embedded, *model.layer_states(*inputs)]
    real = ENCODER_BATCH["attention_mask"].bool()
    expected = [float(1 - cosine(before, after)[real].mean()) for before, after in pairwise(states)]
    assert block_influence(model, [ENCODER_BATCH])["encoder"] == pytest.approx(expected, abs=1e-5)


def mean_loss(model: Any) -> float:
    with torch.no_grad():
        logits = model(input_ids=BATCH["input_ids"]).logits
    labels = BATCH["labels"]
    rows = [cross_entropy(row, target) for row, target in zip(logits, labels, strict=True)]
    return float(sum(rows) / len(rows))


def test_the_loss_without_a_layer_is_that_of_the_model_without_it() -> None:
    model = decoder("llama")
    expected = [
        mean_loss(keep_layers(model, {"decoder": [i for i in range(4) if i != left_out]}))
        - mean_loss(model)
        for left_out in range(4)
    ]
    assert loss_increase(model, [BATCH])["decoder"] == pytest.approx(expected, abs=1e-5)


def test_the_least_important_layers_go_and_a_t5s_first_layer_stays() -> None:
    scores = [0.1, 0.5, 0.2, 0.5, 0.3]
    assert layers_to_keep(scores, 3, first_stays=False) == [1, 3, 4]
    assert layers_to_keep(scores, 3, first_stays=True) == [0, 1, 3]


@pytest.mark.parametrize(
    ("total", "left", "rounds", "expected"),
    [(6, 3, 1, [3]), (6, 3, 3, [5, 4, 3]), (6, 3, 2, [4, 3]), (6, 5, 9, [5]), (3, 3, 2, [])],
)
def test_a_share_goes_in_equal_parts(
    total: int, left: int, rounds: int, expected: list[int]
) -> None:
    assert left_after_rounds(total, left, rounds) == expected


@pytest.mark.parametrize("by", ["influence", "loss", "position"])
def test_the_choice_is_noted_and_rounds_measure_what_is_left(by: Any) -> None:
    step = DropLayers("0.5")
    step.layers_by = by
    step.rounds = 2
    model = decoder("llama")
    smaller = step.change(model, None, Rows())
    choice = step._choice
    assert choice.totals == {"decoder": 4}
    assert len(choice.layers["decoder"]) == smaller.config.num_hidden_layers == 2
    if by == "position":
        assert choice.scores == {} and choice.layers == {"decoder": [1, 4]}
        assert step.settings == {"layers_by": "position"}, "nothing is measured: one round"
        return
    measure = block_influence if by == "influence" else loss_increase
    first = measure(model, [BATCH])["decoder"]
    gone = min(range(4), key=first.__getitem__)
    left = [i for i in range(4) if i != gone]
    second = measure(keep_layers(model, {"decoder": left}), [BATCH])["decoder"]
    expected = {gone + 1: first[gone]} | {i + 1: s for i, s in zip(left, second, strict=True)}
    assert choice.scores["decoder"] == pytest.approx(expected, abs=1e-6)
    again = left[min(range(3), key=second.__getitem__)]
    assert choice.layers["decoder"] == [i + 1 for i in left if i != again]


def test_a_copys_layers_meet_those_they_were_and_its_last_meets_the_last() -> None:
    assert implied_layer_map([1, 2, 5], 6) == {1: 1, 2: 2, 3: 6}
    assert implied_layer_map([1, 4, 6], 6) == {1: 1, 2: 4, 3: 6}
    assert implied_layer_map([], 6) == {}, "no layer was dropped: all meet their own"


def test_the_layers_of_a_chain_are_counted_in_the_originals_numbers(tmp_path: Path) -> None:
    def made(folder: Path, layers: list[int], total: int, **record: Any) -> Path:
        choice = {
            "totals": {"encoder": total},
            "layers": {"encoder": layers},
            "scores": {"encoder": {str(i): i / 10 for i in range(1, total + 1)}},
        }
        folder.mkdir()
        (folder / LAYERS_FILE).write_text(json.dumps(choice), encoding="utf-8")
        return folder

    original = tmp_path / "original"
    original.mkdir()
    first = dropped_layers(original, made(tmp_path / "first", [1, 3, 4, 6], 6))
    assert first["layers"] == {"encoder": [1, 3, 4, 6]}
    assert first["dropped_layers"] == {"encoder": [2, 5]}
    compressed = tmp_path / "compressed"
    compressed.mkdir()
    measured = {"accuracy": 1.0, "megabytes": 1.0, "latency": []}
    record = {
        "student": "s",
        "fingerprint": "f",
        "chain": ["drop-layers=0.3"],
        "n": 1,
        "original": measured,
        "compressed": measured,
        "agreement": 1.0,
        "max_drop": 1.0,
        "accepted": True,
        "seconds": 1.0,
    }
    path = compressed / "compress.json"
    path.write_text(json.dumps(record | {"layers": first["layers"]}), encoding="utf-8")
    second = dropped_layers(compressed, made(tmp_path / "second", [1, 3], 4))
    assert second["layers"] == {"encoder": [1, 4]}
    assert second["dropped_layers"] == {"encoder": [3, 6]}
    assert second["layer_scores"] == {"encoder": {1: 0.1, 3: 0.2, 4: 0.3, 6: 0.4}}
    path.write_text(json.dumps(record), encoding="utf-8")  # an earlier version notes no layers
    assert dropped_layers(compressed, tmp_path / "second") == {"layers": {}}
