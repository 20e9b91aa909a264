"""Steps that change a model's shape compute what the full model would without the removed parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from dsbs.compression import attentions, feed_forwards
from dsbs.compression.layers import evenly_spaced, keep_layers
from dsbs.compression.low_rank import LowRankStep, factorize, factors
from dsbs.compression.pruning import (
    importance,
    keep_heads,
    keep_units,
    largest,
    most_important_heads,
    zero_smallest,
)
from dsbs.students.weights import load_model
from dsbs.training.encode import collate, pad
from dsbs.training.packed.t5 import TargetBlock, is_t5, packed_logits

V11 = {"feed_forward_proj": "gated-gelu", "scale_decoder_outputs": False}
SHAPES = [pytest.param({}, id="v1.0"), pytest.param(V11, id="v1.1")]
BATCH = {
    "input_ids": torch.tensor([[5, 6, 7, 8, 1], [9, 4, 1, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "decoder_input_ids": torch.tensor([[0, 7, 3], [0, 9, 0]]),
    "labels": torch.tensor([[7, 3, 1], [9, 1, -100]]),
}


def t5(**changes: Any) -> Any:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 24}
    shape |= {"num_layers": 4, "num_decoder_layers": 3, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**shape | changes)).double().eval()


def factorize_t5(**changes: Any) -> Any:
    model = factorize(t5(**changes), LowRankStep("0.4"))
    assert model is not None
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**BATCH, use_cache=False).logits
    return found


def inner(matrix: Any) -> torch.Tensor:
    """The weights that a matrix's inputs meet first: of a pair the thin matrix below."""
    found: torch.Tensor = (matrix.down if hasattr(matrix, "down") else matrix).weight
    return found


def silence(matrix: Any, kept: torch.Tensor, width: int = 1) -> None:
    """Make a matrix deaf to all of its inputs, in parts of ``width``, but those that are kept."""
    places = (kept[:, None] * width + torch.arange(width)).flatten()
    deaf = torch.ones(inner(matrix).shape[1], dtype=torch.bool)
    deaf[places] = False
    with torch.no_grad():
        inner(matrix)[:, deaf] = 0


@pytest.mark.parametrize("make", [t5, factorize_t5])
@pytest.mark.parametrize("shape", SHAPES)
def test_keep_heads_a_model_is_the_whole_one_with_those_heads_masked(
    make: Any, shape: dict[str, Any]
) -> None:
    model = make(**shape)
    kept = {
        name: torch.tensor([1, 3] if "EncDec" not in name else [0, 2] if ".0." in name else [2, 3])
        for name, _ in attentions(model)
    }
    smaller = keep_heads(model, kept)
    before = logits(model)
    for name, module in attentions(model):
        silence(module.o, kept[name], width=4)
    assert torch.allclose(logits(smaller), logits(model), atol=1e-12)
    assert not torch.allclose(logits(model), before, atol=1e-3), "what went mattered"
    assert smaller.config.num_heads == 2
    assert all(module.q.weight.shape[0] == 8 for _, module in attentions(smaller))


@pytest.mark.parametrize("make", [t5, factorize_t5])
@pytest.mark.parametrize("shape", SHAPES)
def test_keep_units_a_model_is_the_whole_one_with_those_units_masked(
    make: Any, shape: dict[str, Any]
) -> None:
    model = make(**shape)
    names = [name for name, _ in feed_forwards(model)]
    kept = {name: torch.arange(i % 3, 24, 3) for i, name in enumerate(names)}
    smaller = keep_units(model, kept)
    before = logits(model)
    for name, module in feed_forwards(model):
        silence(module.wo, kept[name])
    assert torch.allclose(logits(smaller), logits(model), atol=1e-12)
    assert not torch.allclose(logits(model), before, atol=1e-3), "what went mattered"
    assert smaller.config.d_ff == 8


@pytest.mark.parametrize("make", [t5, factorize_t5])
@pytest.mark.parametrize("shape", SHAPES)
def test_of_some_layers_a_model_is_the_whole_one_whose_other_layers_add_nothing(
    make: Any, shape: dict[str, Any]
) -> None:
    model = make(**shape)
    smaller = keep_layers(model, {"encoder": [0, 3], "decoder": [0, 2]})
    for name, module in (*attentions(model), *feed_forwards(model)):
        if name.startswith(("encoder.block.1.", "encoder.block.2.", "decoder.block.1.")):
            silence(
                module.o if "Attention" in name else module.wo, torch.tensor([], dtype=torch.long)
            )
    assert torch.allclose(logits(smaller), logits(model), atol=1e-12)
    assert (smaller.config.num_layers, smaller.config.num_decoder_layers) == (2, 2)


def test_kept_layers_are_evenly_spaced_from_the_first() -> None:
    assert [evenly_spaced(6, count) for count in (1, 2, 3, 6)] == [
        [0],
        [0, 5],
        [0, 2, 5],
        [0, 1, 2, 3, 4, 5],
    ]


def test_a_pruned_students_folder_is_a_plain_t5s(tmp_path: Path) -> None:
    model = t5()
    smaller = keep_heads(model, {name: torch.tensor([0, 2]) for name, _ in attentions(model)})
    smaller = keep_layers(
        keep_units(smaller, {name: torch.arange(8) for name, _ in feed_forwards(smaller)}),
        {"encoder": [0, 3], "decoder": [0, 2]},
    )
    smaller.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert type(again) is T5ForConditionalGeneration
    assert torch.allclose(logits(again), logits(smaller), atol=1e-6)


def test_an_importance_is_the_mean_size_of_the_losss_derivative_by_a_gate() -> None:
    model = t5()
    gated = {name: (module.o, 4) for name, module in attentions(model)} | {
        name: (module.wo, 24) for name, module in feed_forwards(model)
    }
    found = importance(model, gated, [BATCH])

    def loss(row: int) -> float:
        whole = {name: value[row : row + 1] for name, value in BATCH.items()}
        with torch.no_grad():
            return float(model(**whole, use_cache=False).loss)

    for name, (module, parts) in gated.items():
        width, part, step = module.weight.shape[1] // parts, 2, 1e-3  # T5's norms are of float32
        columns, plain = slice(part * width, (part + 1) * width), module.weight.detach().clone()
        slopes = []
        for row in (0, 1):
            sides = []
            for gate in (1 + step, 1 - step):
                with torch.no_grad():
                    module.weight[:, columns] = plain[:, columns] * gate
                sides.append(loss(row))
                with torch.no_grad():
                    module.weight.copy_(plain)
            slopes.append(abs(sides[0] - sides[1]) / (2 * step))
        assert float(found[name][part]) == pytest.approx(sum(slopes) / 2, rel=5e-3, abs=1e-6), name


def test_a_stacks_self_attention_keeps_one_set_of_heads_and_what_matters_least_goes() -> None:
    model = t5()
    for name, module in attentions(model):
        dead = 1 if name.startswith("encoder") else 2
        silence(module.o, torch.tensor([head for head in range(4) if head != dead]), width=4)
    kept = most_important_heads(model, 3, [BATCH])
    assert {name: heads.tolist() for name, heads in kept.items()} == {
        name: [0, 2, 3] if name.startswith("encoder") else [0, 1, 3] for name in kept
    }
    assert len(kept) == 4 + 3 + 3


def test_the_largest_of_equals_are_the_first() -> None:
    assert largest(torch.tensor([1.0, 3.0, 1.0, 2.0]), 3).tolist() == [0, 1, 3]


def test_at_full_rank_the_factors_multiply_to_the_matrix_and_below_it_err_by_what_was_cut() -> None:
    torch.manual_seed(2)
    matrix = torch.randn(12, 7, dtype=torch.float64)
    decomposed = torch.linalg.svd(matrix, full_matrices=False)
    down, up = factors(decomposed, 7)
    assert (down.shape, up.shape) == ((7, 7), (12, 7))
    assert torch.allclose(up @ down, matrix, atol=1e-12)
    down, up = factors(decomposed, 3)
    assert float((up @ down - matrix).norm()) == pytest.approx(
        float(decomposed[1][3:].norm()), rel=1e-9
    )


def test_the_rank_is_a_share_or_the_least_that_keeps_the_energy() -> None:
    singular = torch.tensor([3.0, 2.0, 1.0, 1.0])  # squares: 9, 4, 1, 1 of 15
    values = ("0.5", "0.1", "energy:0.6", "energy:0.61", "energy:0.9")
    assert [LowRankStep(value).rank(singular) for value in values] == [2, 1, 1, 2, 3]


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_that_are_of_low_rank_become_pairs_that_compute_the_same(
    shape: dict[str, Any], tmp_path: Path
) -> None:
    model = t5(**shape)
    with torch.no_grad():
        for _, layer in (*attentions(model), *feed_forwards(model)):
            for matrix in layer.children():
                if isinstance(matrix, torch.nn.Linear):
                    rows, columns = matrix.weight.shape
                    product = torch.randn(rows, 2, dtype=torch.float64) @ torch.randn(
                        2, columns, dtype=torch.float64
                    )
                    matrix.weight.copy_(product / 8)
    smaller = factorize(model, LowRankStep("energy:0.999999999"))
    assert smaller is not None
    assert torch.allclose(logits(smaller), logits(model), atol=1e-9)
    assert set(smaller.config.low_rank.values()) == {2}
    count = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, smaller)]
    assert count[1] < count[0]

    smaller.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dropout=0.3).double().eval()
    assert again.config.dropout_rate == 0.3
    assert again.config.low_rank == smaller.config.low_rank
    assert torch.allclose(logits(again), logits(smaller), atol=1e-5), "it is loaded in float32"


def test_a_matrix_that_factors_would_not_make_smaller_stays() -> None:
    assert factorize(t5(), LowRankStep("0.9")) is None
    model = factorize_t5(d_ff=96)
    sizes = {name.rpartition(".")[2]: rank for name, rank in model.config.low_rank.items()}
    assert sizes["wi"] == round(0.4 * 16)
    again = factorize(model, LowRankStep("0.2"))
    assert again is not None
    assert set(again.config.low_rank.values()) == {3}, "pairs are made thinner still"


def test_pairs_learn_without_padding_as_they_do_with_it() -> None:
    model = factorize_t5().train()
    model.config.dropout_rate = 0.0
    model.encoder.config.dropout_rate = model.decoder.config.dropout_rate = 0.0
    model.eval()
    assert is_t5(model)
    rows = [{"label": [([5, 6, 7, 1], [8, 1])]}, {"label": [([9, 1], [4, 3, 1])]}]
    flat = collate(rows)["label"]
    padded = pad(flat, 0, start=0)
    expected = model(**padded, use_cache=False).logits[padded["labels"] != -100]
    reading, writing = flat.source_lengths.tolist(), flat.target_lengths.tolist()
    ours = packed_logits(
        model, flat.source, reading, flat.target, writing, [TargetBlock(range(2), start=0)]
    )
    assert torch.allclose(ours, expected, atol=1e-12)


def test_magnitude_zeroes_the_smallest_weights_of_all_matrices_and_no_others() -> None:
    model, whole = t5(), t5()
    zero_smallest(model, 0.6)
    now, before = dict(model.named_parameters()), dict(whole.named_parameters())
    matrices = [
        name
        for name in now
        if name.endswith(
            (".q.weight", ".k.weight", ".v.weight", ".o.weight", ".wi.weight", ".wo.weight")
        )
    ]
    assert len(matrices) == (4 + 3 + 3) * 4 + 7 * 2
    assert all(torch.equal(now[name], before[name]) for name in now if name not in matrices)
    gone = torch.cat([before[name][now[name] == 0].abs() for name in matrices]).detach()
    left = torch.cat([before[name][now[name] != 0].abs() for name in matrices]).detach()
    assert len(gone) / (len(gone) + len(left)) == pytest.approx(0.6, abs=1e-3)
    assert float(gone.max()) <= float(left.min())
    assert all(
        torch.equal(now[name][now[name] != 0], before[name][now[name] != 0]) for name in matrices
    )
