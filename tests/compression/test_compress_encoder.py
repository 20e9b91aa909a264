"""Steps on encoders compute what the full encoder would without the removed parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEAMS, toy_rows, write_csv
from encoder_models import FAMILIES, encoder, save_label_head, word_tokenizer

from dsbs import compress, load_recipe, train
from dsbs.compression import matrices
from dsbs.compression.encoders import (
    gated_heads,
    gated_units,
    keep_encoder_heads,
    keep_encoder_units,
    shape_of,
)
from dsbs.compression.layers import DropLayers, keep_layers
from dsbs.compression.low_rank import LowRankStep, factorize
from dsbs.compression.pruning import PruneFeedForward, PruneHeads, importance
from dsbs.errors import UserError
from dsbs.students.encoder_shapes import heads_of
from dsbs.students.student import Student
from dsbs.students.weights import load_model

BATCH = {
    "input_ids": torch.tensor([[1, 6, 7, 8, 2], [1, 4, 2, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "labels": torch.tensor([1, 0]),
}
families = pytest.mark.parametrize("family", FAMILIES)


class Rows:
    """Stands in for the rows of a run."""

    def batches(self, _model: Any, _tokenizer: Any, _split: str = "train") -> Any:
        yield BATCH

    def inputs(self) -> list[str]:
        return ["My parcel"]


def loaded(folder: Path) -> Any:
    model = load_model(str(folder), labels=2).eval()
    model.body.set_attn_implementation("eager")
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(BATCH["input_ids"], BATCH["attention_mask"])
    return result


def without(model: Any, gated: dict[str, tuple[Any, int]], removed: int) -> torch.Tensor:
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


@families
def test_a_smaller_encoder_computes_what_is_left_and_is_loaded_again(
    tmp_path: Path, family: str
) -> None:
    folder = save_label_head(tmp_path, family)
    model = loaded(folder)
    shape = shape_of(model.body, "prune-heads")
    names = list(gated_heads(model.body, shape))
    heads = {name: torch.arange(1, 4) for name in names}
    fewer_heads = model.with_body(keep_encoder_heads(model.body, shape, heads))
    expected = without(model, gated_heads(model.body, shape), 1)
    assert torch.allclose(logits(fewer_heads), expected, atol=1e-5)
    assert heads_of(fewer_heads.body.config) == 3

    units = {name: torch.arange(20, 32) for name in names}
    fewer_units = fewer_heads.with_body(keep_encoder_units(fewer_heads.body, shape, units))
    expected = without(fewer_heads, gated_units(fewer_heads.body, shape), 20)
    assert torch.allclose(logits(fewer_units), expected, atol=1e-5)

    low_rank = factorize(fewer_units.body, LowRankStep("energy:0.9999999"))
    thinner = fewer_units
    if low_rank is not None:  # none of its matrices may be smaller at full energy
        thinner = fewer_units.with_body(low_rank)
        assert torch.allclose(logits(thinner), logits(fewer_units), atol=1e-2)
    shallow = thinner.with_body(keep_layers(thinner.body, {"encoder": [0, 3]}))
    shallow.save_pretrained(tmp_path / "smaller")
    assert torch.allclose(logits(loaded(tmp_path / "smaller")), logits(shallow), atol=1e-5)


@families
def test_a_low_rank_pair_keeps_the_bias(tmp_path: Path, family: str) -> None:
    model = loaded(save_label_head(tmp_path, family))
    changed = factorize(model.body, LowRankStep("0.25"))
    assert changed is not None
    biases = [
        (matrix.bias, pair.up.bias)
        for (_, matrix), (_, pair) in zip(matrices(model.body), matrices(changed), strict=True)
        if hasattr(pair, "up") and matrix.bias is not None
    ]
    assert all(torch.equal(bias, kept_bias) for bias, kept_bias in biases)
    model.with_body(changed).save_pretrained(tmp_path / "thin")
    again = loaded(tmp_path / "thin")
    assert torch.allclose(logits(again), logits(model.with_body(changed)), atol=1e-5)


@pytest.mark.parametrize("step", [PruneHeads("0.5"), PruneFeedForward("0.5"), DropLayers("0.5")])
def test_a_step_writes_a_student(tmp_path: Path, step: Any) -> None:
    folder = save_label_head(tmp_path)
    target = tmp_path / "smaller"
    target.mkdir()
    step.make(folder, target, Rows())
    smaller = Student.load(target)
    assert smaller.backend.parameters is not None
    assert smaller.backend.parameters < Student.load(folder).backend.parameters  # type: ignore[operator]
    answer = smaller.predict(["My parcel"])[0]
    assert sum(answer.distribution.values()) == pytest.approx(1)  # type: ignore[union-attr]


def test_importance_is_that_of_the_labels_loss(tmp_path: Path) -> None:
    model = loaded(save_label_head(tmp_path))
    shape = shape_of(model.body, "prune-ff")
    gated = gated_units(model.body, shape)
    values = importance(model, gated, [BATCH])
    assert {name: tensor.shape for name, tensor in values.items()} == dict.fromkeys(
        gated, torch.Size([32])
    )
    assert all(bool((tensor > 0).any()) for tensor in values.values())


def test_a_family_without_a_table_entry_is_refused(tmp_path: Path) -> None:
    model = loaded(save_label_head(tmp_path))
    model.body.config.model_type = "mpnet"
    with pytest.raises(UserError, match="prune-heads does not support encoders of type mpnet"):
        shape_of(model.body, "prune-heads")


def test_a_chain_heals_the_head_and_ends_in_int8(tmp_path: Path) -> None:
    tokenizer = word_tokenizer()
    encoder("bert", len(tokenizer), num_hidden_layers=2).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    write_csv(tmp_path / "train.csv", toy_rows(100))
    recipe: dict[str, Any] = {
        "name": "toy",
        "task": {
            "name": "classification",
            "labels": list(TEAMS),
            "columns": {"label": "team"},
            "data": {"train": str(tmp_path / "train.csv"), "valid_fraction": 0.3},
        },
        "teacher": {"model": "none", "base_url": "http://127.0.0.1:9/v1"},
        "student": {"model": str(tmp_path / "bert"), "max_input_tokens": 24},
        "train": {"methods": "finetune", "batch_size": 16, "max_steps": 3, "eval_every": 3},
        "eval": {"latency_calls": 0},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    trained = train(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "run").students[0]
    result = compress(
        trained.path,
        ["prune-heads=0.5", "drop-layers=0.5", "quantize=int8"],
        heal_steps=2,
        max_drop=1.0,
        layers_by="loss",
    )
    lines = (result.folders[1] / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    row = next(row for row in map(json.loads, lines) if "loss" in row)
    terms = row["response_loss"] + row["encoder-feature_loss"]
    assert row["loss"] == pytest.approx(terms, rel=1e-4), "healed by the original"
    dropped = result.steps[1]
    assert dropped.layers == {"encoder": [1]} and dropped.layer_scores["encoder"].keys() == {1, 2}
    heads, layers, int8 = (Student.load(folder) for folder in result.folders)
    assert heads_of(heads.backend.model.body.config) == 2
    assert len(layers.backend.model.body.encoder.layer) == 1
    assert int8.card.format == "onnx", "CTranslate2 has no encoders with removed heads"
    (folder,) = compress(trained.path, ["prune-ff=0.5"], heal_steps=0, max_drop=1.0).folders
    unhealed = Student.load(folder)
    assert all(student.calibration is not None for student in (heads, layers, int8, unhealed))
    assert all(student.novelty is not None for student in (heads, layers, unhealed))
    assert [record.healing_steps for record in result.steps] == [2, 2, 0]
    healed = heads.backend.model.classifier.weight
    original = Student.load(trained.path).backend.model.classifier.weight
    assert torch.allclose(healed, original, atol=1e-2), "the head is the trained one, not a new one"
