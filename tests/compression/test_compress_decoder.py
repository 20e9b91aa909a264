"""Steps on decoders compute what the full decoder would without the removed parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_models import config, save
from conftest import TEAMS, toy_rows, write_csv
from transformers import AutoModelForCausalLM

from dsbs import compress, load_recipe, train
from dsbs.compression.decoders import (
    decoder_shape,
    gated_decoder_units,
    gated_groups,
    keep_decoder_units,
    keep_groups,
    units_of,
)
from dsbs.compression.layers import DropLayers, keep_layers
from dsbs.compression.low_rank import LowRankStep
from dsbs.compression.pruning import PruneFeedForward, PruneHeads, importance
from dsbs.errors import UserError
from dsbs.students.card import read_card
from dsbs.students.heads import LabelHeadModel
from dsbs.students.student import Student
from dsbs.students.weights import load_model
from dsbs.training.encode import collate, pad_prompts

IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 4, 3, 0, 0]])
BATCH = {
    "input_ids": IDS,
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([[-100, -100, 8, 9, 1], [-100, 3, 1, -100, -100]]),
}
families = pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt2"])


class Rows:
    """Stands in for the rows of a run."""

    def batches(self, _model: Any, _tokenizer: Any, _split: str = "train") -> Any:
        yield BATCH

    def inputs(self) -> list[str]:
        return []


def decoder(family: str, **changes: Any) -> Any:
    """Four layers with large weights, so that what is removed matters."""
    torch.manual_seed(1)
    settings = config(family, 40)
    settings.num_hidden_layers = 4
    if getattr(settings, "layer_types", None):
        settings.layer_types = settings.layer_types * 2
    for key, value in changes.items():
        setattr(settings, key, value)
    model = AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.2)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def without(model: Any, gated: Any, removed: int) -> torch.Tensor:
    """The logits of the whole model with the first ``removed`` parts of each gate at zero."""

    def zero(count: int) -> Any:
        def hook(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            parts = inputs[0].unflatten(-1, (count, -1)).clone()
            parts[..., :removed, :] = 0
            return (parts.flatten(-2),)

        return hook

    hooks = [matrix.register_forward_pre_hook(zero(count)) for matrix, count in gated.values()]
    result = logits(model)
    for hook in hooks:
        hook.remove()
    return result


def plain(model: Any, folder: Path) -> Any:
    """The model as plain transformers loads it from disk."""
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@families
def test_fewer_units_compute_what_is_left_in_a_plain_model(tmp_path: Path, family: str) -> None:
    model = decoder(family)
    shape = decoder_shape(model, "prune-ff")
    total = units_of(model, shape)
    gated = gated_decoder_units(model, shape)
    smaller = keep_decoder_units(
        model, shape, {name: torch.arange(total // 2, total) for name in gated}
    )
    expected = without(model, gated, total // 2)
    assert not torch.allclose(expected, logits(model), atol=1e-2)
    assert torch.allclose(logits(smaller), expected, atol=1e-5)
    assert torch.allclose(logits(plain(smaller, tmp_path)), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_whole_groups_of_heads_go_and_the_model_stays_plain(tmp_path: Path, family: str) -> None:
    model = decoder(family)
    shape = decoder_shape(model, "prune-heads")
    gated = gated_groups(model, shape)
    assert {count for _, count in gated.values()} == {2}
    smaller = keep_groups(model, shape, {name: torch.tensor([1]) for name in gated})
    expected = without(model, gated, 1)
    assert not torch.allclose(expected, logits(model), atol=1e-2)
    again = plain(smaller, tmp_path)
    assert torch.allclose(logits(again), expected, atol=1e-5)
    assert (again.config.num_attention_heads, again.config.num_key_value_heads) == (2, 1)


@families
def test_fewer_layers_compute_what_the_others_would(tmp_path: Path, family: str) -> None:
    model = decoder(family)
    smaller = keep_layers(model, {"decoder": [1, 3]})
    shape = decoder_shape(model, "drop-layers")
    with torch.no_grad():
        for index, layer in enumerate(shape.all_layers(model)):
            if index in (0, 2):
                for name in (shape.attention_output, shape.outer):
                    matrix = layer.get_submodule(name)
                    matrix.weight.zero_()
                    if matrix.bias is not None:
                        matrix.bias.zero_()
    again = plain(smaller, tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert again.config.num_hidden_layers == 2


def test_low_rank_pairs_of_a_decoder_are_loaded_again(tmp_path: Path) -> None:
    model = decoder("llama")
    thin = LowRankStep("0.25").change(model, None, Rows())
    thin.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert torch.allclose(logits(again), logits(thin), atol=1e-5)
    assert set(again.config.low_rank.values()) == {8, 4}


def test_what_gpt2_cannot_lose_is_refused_with_what_to_use() -> None:
    with pytest.raises(UserError, match="prune-heads does not support gpt2"):
        PruneHeads("0.5").change(decoder("gpt2"), None, Rows())
    with pytest.raises(UserError, match="low-rank does not support gpt2"):
        LowRankStep("0.25").change(decoder("gpt2"), None, Rows())
    model = decoder("llama")
    model.config.model_type = "phi"
    with pytest.raises(UserError, match="prune-ff does not support decoders of type phi"):
        PruneFeedForward("0.5").change(model, None, Rows())


def test_importance_comes_from_the_target_tokens_of_a_decoder() -> None:
    model = decoder("llama").double()
    shape = decoder_shape(model, "prune-heads")
    gated = gated_groups(model, shape)
    values = importance(model, gated, [BATCH])
    name, (matrix, _) = next(iter(gated.items()))
    weights = matrix.weight.detach().clone()
    expected = 0.0
    for row in range(2):
        losses = []
        for step in (1e-3, -1e-3):  # the norms are computed in float32
            with torch.no_grad():
                matrix.weight.copy_(weights)
                matrix.weight[:, :16] *= 1 + step
                tokens = model(input_ids=IDS[row : row + 1]).logits[0].log_softmax(-1)
            targets = BATCH["labels"][row]
            chosen = [-tokens[i, t] for i, t in enumerate(targets.tolist()) if t != -100]
            losses.append(float(sum(chosen) / len(chosen)))
        expected += abs(losses[0] - losses[1]) / 2e-3 / 2
    assert float(values[name][0]) == pytest.approx(expected, rel=1e-3)


def test_units_go_in_rounds_with_importance_measured_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dsbs.compression import pruning

    measured: list[int] = []

    def count(model: Any, gated: Any, batches: Any) -> Any:
        measured.append(next(iter(gated.values()))[1])
        return importance(model, gated, batches)

    monkeypatch.setattr(pruning, "importance", count)
    step = PruneFeedForward("0.5")
    step.rounds = 3
    smaller = step.change(decoder("llama"), None, Rows())
    assert measured == [48, 40, 32]
    assert smaller.config.intermediate_size == 24
    assert step.settings == {"rounds": 3}


def test_prompt_and_target_are_padded_into_one_row() -> None:
    rows: list[Any] = [{"label": [([5, 6, 7], [8, 9, 1])]}, {"label": [([9, 4], [3, 1])]}]
    padded = pad_prompts(collate(rows)["label"], 0)
    assert padded["input_ids"].tolist() == [[5, 6, 7, 8, 9], [9, 4, 3, 0, 0]]
    assert padded["attention_mask"].tolist() == BATCH["attention_mask"].tolist()
    assert padded["labels"].tolist() == BATCH["labels"].tolist()


def test_a_label_head_stays_on_its_smaller_decoder() -> None:
    class ClassRows(Rows):
        def batches(self, _model: Any, _tokenizer: Any, _split: str = "train") -> Any:
            yield BATCH | {"labels": torch.tensor([1, 0])}

    model = LabelHeadModel(decoder("llama"), 2, "causal").eval()
    shallow = DropLayers("0.5").change(model, None, ClassRows())
    narrow = PruneHeads("0.5").change(shallow, None, ClassRows())
    assert narrow.config.num_hidden_layers == 2 and narrow.config.num_key_value_heads == 1
    assert torch.equal(narrow.classifier.weight, model.classifier.weight)
    assert narrow(BATCH["input_ids"], BATCH["attention_mask"]).shape == (2, 2)


def test_a_decoder_is_cut_and_healed_by_the_original(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", toy_rows(40))
    recipe: dict[str, Any] = {
        "name": "toy",
        "task": {
            "name": "classification",
            "labels": list(TEAMS),
            "columns": {"label": "team"},
            "data": {"train": str(tmp_path / "train.csv"), "valid_fraction": 0.3},
        },
        "teacher": {"model": "none", "base_url": "http://127.0.0.1:9/v1"},
        "student": {
            "model": save(tmp_path / "model"),
            "max_input_tokens": 64,
            "max_target_tokens": 16,
        },
        "train": {"methods": "finetune", "batch_size": 8, "max_steps": 2, "eval_every": 2},
        "eval": {"latency_calls": 0, "max_label_tokens": 4},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    (trained,) = train(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "run").students
    chain = ["drop-layers=0.5", "prune-heads=0.5", "prune-ff=0.5"]
    result = compress(trained.path, chain, heal_steps=2, max_drop=1.0)
    # The rows are read by the template that the student was trained with.
    templates = [read_card(folder).template for folder in (trained.path, *result.folders)]
    assert templates == ["chat"] * 4
    lines = (result.folders[0] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    row = next(row for row in map(json.loads, lines) if "loss" in row)
    terms = row["response_loss"] + row["decoder-feature_loss"]
    assert row["loss"] == pytest.approx(terms, rel=1e-4)
    assert result.steps[0].layer_scores["decoder"].keys() == {1, 2}
    student = Student.load(result.folders[-1])
    settings = student.backend.model.config  # type: ignore[attr-defined]
    assert settings.num_hidden_layers == settings.num_key_value_heads == 1
    assert settings.intermediate_size == 24
    AutoModelForCausalLM.from_pretrained(result.folders[-1])
