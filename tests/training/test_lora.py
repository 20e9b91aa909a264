"""LoRA: adapters learn, the finished student is a plain T5 that answers as the adapted one did."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsdp_on_cpu
import pytest
import torch
from conftest import launcher, on_two_processes
from forked import DSBS
from safetensors.torch import load_file
from small_t5 import ROWS, t5

from dsbs import Student, UserError, load_recipe, train
from dsbs.config import LoraSection, TrainSection
from dsbs.training.adapters import add_adapters, count_trainable, merge_adapters
from dsbs.training.encode import collate, pad
from dsbs.training.grid import last_checkpoint
from dsbs.training.methods import method_of
from dsbs.training.packed.t5 import TargetBlock, is_t5, packed_logits
from dsbs.training.trainer import patch_forward

pytest.importorskip("peft")
EVERYWHERE = LoraSection(rank=3, alpha=5, targets=("q", "k", "v", "o", "wi", "wo"))


def disturbed(model: Any) -> Any:
    """Adapters as training leaves them: none of them zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def adapted(section: LoraSection = EVERYWHERE, **changes: Any) -> Any:
    return disturbed(add_adapters(t5(**changes), section))


@pytest.fixture
def pretrained(toy: Callable[..., Path], tmp_path: Path) -> str:
    """A small T5 that knows a little of the toy task."""
    result = train(
        load_recipe(toy(), ["train.methods=finetune", "train.max_steps=4"]), out=tmp_path / "before"
    )
    return result.students[0].path


def recipe_on(pretrained: str, toy: Callable[..., Path], *overrides: str) -> Any:
    steps = (
        "train.methods=finetune",
        "train.max_steps=12",
        "train.eval_every=3",
        "train.learning_rate=0.01",
    )
    limits = "max_input_tokens: 64, max_target_tokens: 32"
    base = f"student={{model: {pretrained}, {limits}, dropout: 0.1}}"
    return load_recipe(
        toy(), [base, "train.lora={rank: 4, alpha: 8, dropout: 0.1}", *steps, *overrides]
    )


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_logits_and_gradients_without_padding_are_those_of_padded_rows(checkpointing: bool) -> None:
    model = adapted().double().train()
    if checkpointing:
        model.get_base_model().activation_checkpointing_enable()
    assert is_t5(model)
    for target, flat in collate(ROWS).items():
        batch = pad(flat, 0, start=3)
        reading, writing = flat.source_lengths.tolist(), flat.target_lengths.tolist()
        model.zero_grad()
        expected = model(**batch, use_cache=False).logits[batch["labels"] != -100]
        (expected**2).mean().backward()
        theirs = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        adapters = {name for name, _ in model.named_parameters() if "lora_" in name}
        assert set(theirs) == adapters, "they learn, and they alone"
        assert all(float(grad.abs().max()) > 1e-6 for grad in theirs.values())
        model.zero_grad()
        parts = [TargetBlock(range(len(reading)), start=3)]
        ours = packed_logits(
            model.get_base_model(), flat.source, reading, flat.target, writing, parts
        )
        assert torch.allclose(ours, expected, atol=1e-10), target
        (ours**2).mean().backward()
        for name, parameter in model.named_parameters():
            if name in theirs:
                assert torch.allclose(parameter.grad, theirs[name], atol=1e-10), (target, name)


@pytest.mark.parametrize("without_padding", [True, False])
def test_the_trainers_forward_reaches_the_adapters(without_padding: bool) -> None:
    model = adapted().train()
    patch_forward(
        model, method_of("step-by-step").views(TrainSection()), without_padding=without_padding
    )
    sum(model(batch=collate(ROWS)).values()).backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters())


def test_a_merged_student_answers_as_the_adapted_model_did(tmp_path: Path) -> None:
    model = adapted().eval()
    model.save_pretrained(tmp_path)
    plain = merge_adapters(t5(), tmp_path).eval()
    batch = {"input_ids": torch.tensor([[3, 4, 5, 1]]), "labels": torch.tensor([[7, 8, 1]])}
    assert torch.allclose(plain(**batch).logits, model(**batch).logits, atol=1e-6)
    assert not torch.allclose(plain(**batch).logits, t5().eval()(**batch).logits, atol=1e-2), (
        "the adapters matter"
    )
    assert {name for name, _ in plain.named_parameters()} == {
        name for name, _ in t5().named_parameters()
    }


def test_training_starts_from_the_model_as_it_is() -> None:
    batch = {"input_ids": torch.tensor([[3, 4, 5, 1]]), "labels": torch.tensor([[7, 8, 1]])}
    started = add_adapters(t5(), EVERYWHERE).eval()
    assert torch.allclose(started(**batch).logits, t5().eval()(**batch).logits, atol=1e-12)
    assert count_trainable(started) < count_trainable(t5())


def test_only_what_is_targeted_has_moved_in_the_finished_student(
    pretrained: str, toy: Callable[..., Path], tmp_path: Path
) -> None:
    result = train(recipe_on(pretrained, toy), out=tmp_path / "run")
    folder = Path(result.students[0].path)
    before, after = (load_file(Path(where) / "model.safetensors") for where in (pretrained, folder))
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if name.endswith((".q.weight", ".v.weight"))}
    said = json.loads((folder / "train.json").read_text(encoding="utf-8"))["student"]
    wide, rank = before["encoder.block.0.layer.0.SelfAttention.q.weight"].shape, 4
    assert said["trainable_parameters"] == len(moved) * rank * sum(wide)
    assert said["parameters"] == sum(
        p.numel() for p in Student.load(folder).backend.model.parameters()
    )
    assert not list(folder.rglob("adapter*"))


def test_a_finished_student_needs_no_peft(
    pretrained: str, toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(recipe_on(pretrained, toy), out=tmp_path / "run")
    monkeypatch.setitem(sys.modules, "peft", None)
    assert (
        Student.load(result.students[0].path).predict(["My invoice is wrong."])[0].raw is not None
    )
    with pytest.raises(UserError, match=r"dsbs\[lora\]"):
        train(recipe_on(pretrained, toy), out=tmp_path / "other")


def test_a_killed_training_continues_to_the_weights_of_an_undisturbed_one(
    pretrained: str, toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsbs.training.callbacks import MetricsLogger

    recipe = recipe_on(pretrained, toy)
    undisturbed = Path(train(recipe, out=tmp_path / "run").students[0].path)
    passed = MetricsLogger.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passed(self, args, state, control, **kwargs)
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLogger, "on_step_end", killed)
        train(recipe, out=tmp_path / "other")
    checkpoint = last_checkpoint(tmp_path / "other" / "train" / "finetune-gold-s0" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-6"
    assert not (checkpoint / "model.safetensors").exists(), (
        "the frozen weights are not written again and again"
    )
    torch.manual_seed(99)  # what a new process would not know of the old one
    again = Path(train(recipe, out=tmp_path / "other").students[0].path)
    assert weights(again) == weights(undisturbed)
    steps = [
        json.loads(line)
        for line in (again / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["step"] for row in steps if "loss" in row] == list(range(1, 13))


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(
    pretrained: str, toy: Callable[..., Path], tmp_path: Path
) -> None:
    exact = (
        "student.dropout=0",
        "train.lora.dropout=0",
        "train.learning_rate=0.001",
        "train.max_steps=4",
    )
    recipe = recipe_on(
        pretrained, toy, *exact
    )  # an epoch at most: the last step of one is filled up with rows seen before
    one = Path(train(recipe, out=tmp_path / "one").students[0].path)
    path = tmp_path / "both.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")), encoding="utf-8")
    on_two_processes(DSBS, "train", str(path), "--out", str(tmp_path / "two"))
    two = tmp_path / "two" / "train" / one.name
    start, theirs, ours = (
        load_file(folder / "model.safetensors") for folder in (Path(pretrained), one, two)
    )
    assert any(float((theirs[name] - start[name]).abs().max()) > 1e-4 for name in theirs), (
        "it learned something"
    )
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-5), name


def on_two_divided(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [*launcher(), str(fsdp_on_cpu.__file__), *arguments]
    env = dict(os.environ) | fsdp_on_cpu.ENVIRONMENT | environment
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, env=env
    )


@pytest.mark.slow
def test_divided_by_fsdp_the_adapters_become_those_of_one_process_and_resume(
    pretrained: str, toy: Callable[..., Path], tmp_path: Path
) -> None:
    exact = (
        "student.dropout=0",
        "train.lora.dropout=0",
        "train.learning_rate=0.001",
        "train.max_steps=4",
    )
    recipe = recipe_on(pretrained, toy, *exact)
    one = Path(train(recipe, out=tmp_path / "one").students[0].path)
    path = tmp_path / "both.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")), encoding="utf-8")
    result = on_two_divided("train", str(path), "--out", str(tmp_path / "two"), "--json")
    assert result.returncode == 0, result.stderr[-3000:]
    two = json.loads(result.stdout)["students"][0]
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (one, Path(two["path"])))
    for name, value in ours.items():
        assert torch.allclose(value, theirs[name], atol=1e-5), name
    assert (
        two["trainable_parameters"]
        == json.loads((one / "train.json").read_text())["student"]["trainable_parameters"]
    )

    on_two_divided("train", str(path), "--out", str(tmp_path / "broken"), DIE_AT_STEP="4")
    left = tmp_path / "broken" / "train" / "finetune-gold-s0"
    assert last_checkpoint(left / "checkpoints") == left / "checkpoints" / "checkpoint-3"
    assert on_two_divided("train", str(path), "--out", str(tmp_path / "broken")).returncode == 0
    assert weights(left) == weights(Path(two["path"]))


def test_a_target_that_no_block_has_is_told_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'query'.*k, o, q, v, wi, wo"):
        add_adapters(t5(), LoraSection(targets=("q", "query")))
    with pytest.raises(UserError, match="lm_head"):
        add_adapters(t5(), LoraSection(targets=("lm_head",)))


def test_the_order_of_targets_makes_no_other_student_and_the_rank_does(
    pretrained: str, toy: Callable[..., Path]
) -> None:
    one, same, other = (
        recipe_on(pretrained, toy, f"train.lora={{rank: {rank}, targets: {targets}}}")
        .students[None]
        .training
        for rank, targets in ((4, "[v, q]"), (4, "[q, v]"), (8, "[q, v]"))
    )
    assert one == same != other


def test_adapters_around_random_weights_are_refused(toy: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"train\.lora adapts"):
        load_recipe(toy(), ["train.lora={}"])
