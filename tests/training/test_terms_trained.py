"""Terms beside what else a training may be: two processes, gradient checkpointing, LoRA, tuning, drawn rationales, a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import on_two_processes
from loopback import LoopbackServer
from safetensors.torch import load_file
from test_distil import distilling, t5, trained
from test_loop import lines, weights
from test_rationales import answer

from dsbs import annotate, load_recipe, train
from dsbs.config import LoraSection
from dsbs.training.checkpoints import last_checkpoint
from dsbs.training.lora import adapt, merged

TEACHERS = "train.teachers=[{size: nano, max_steps: 2}]"
RESPONSE = ("train.methods=finetune+response", "train.terms=[{kind: response}]", TEACHERS)

WORKER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import torch
from test_distil import distilling, trained
model, _ = trained(Path(sys.argv[2]), distilling(sys.argv[3:]), micro=2, world=2)
if torch.distributed.get_rank() == 0:
    torch.save(model.state_dict(), Path(sys.argv[2]) / "said.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def test_two_processes_learn_terms_as_one_does(tmp_path: Path) -> None:
    """Over gloo; the rows without a rationale fall unevenly on the two."""
    names = ["response", "feature"]
    whole, _ = trained(tmp_path / "one", distilling(names))
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    result = on_two_processes(
        str(tmp_path / "worker.py"), str(Path(__file__).parent), str(tmp_path), *names
    )
    assert result.returncode == 0, result.stderr[-2000:]
    ours = torch.load(tmp_path / "said.pt")
    start = t5().state_dict()
    assert any(
        float((value - whole.state_dict()[name]).abs().max()) > 1e-4
        for name, value in start.items()
    ), "it learned"
    for name, value in whole.state_dict().items():
        assert torch.allclose(ours[name], value, atol=1e-5), name


@pytest.mark.parametrize("padding", ["none", "batch"])
def test_gradient_checkpointing_changes_no_step_with_a_term(tmp_path: Path, padding: Any) -> None:
    found = []
    for checkpointing in (False, True):
        model = t5()
        if checkpointing:
            model.activation_checkpointing_enable()
        found.append(trained(tmp_path, distilling(["response"]), model=model, padding=padding))
    assert found[0][1][0]["response_loss"] > 0
    for name, value in found[0][0].state_dict().items():
        assert torch.allclose(found[1][0].state_dict()[name], value, atol=1e-6), name


def test_adapters_alone_learn_a_term_and_merge_into_a_plain_student(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model = adapt(t5(), LoraSection(rank=4, alpha=8, targets=("q", "k", "v", "o", "wi", "wo")))
    learned, logged = trained(tmp_path, distilling(["response"]), steps=20, model=model)
    assert logged[-1]["response_loss"] < logged[0]["response_loss"]
    start = t5().state_dict()
    base = {
        name.replace(".base_layer", ""): value
        for name, value in learned.get_base_model().state_dict().items()
    }
    for name, value in start.items():
        assert torch.equal(base[name], value), name
    learned.save_pretrained(tmp_path / "adapters")
    plain = merged(t5(), tmp_path / "adapters").eval()
    batch = {"input_ids": torch.tensor([[3, 4, 1]]), "labels": torch.tensor([[6, 7, 1]])}
    assert torch.allclose(plain(**batch).logits, learned.eval()(**batch).logits, atol=1e-5)


def test_every_setting_that_is_tried_learns_the_term_by_one_teacher(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    tune = "train.tune={learning_rate: [0.0001, 0.01]}"
    result = train(load_recipe(toy(), [*RESPONSE, tune, "train.max_steps=2"]), out=tmp_path / "run")
    folder = tmp_path / "run" / "train"
    tried = sorted((folder / "trials" / "finetune+response-gold").iterdir())
    assert [path.name for path in tried] == ["learning_rate=0.0001", "learning_rate=0.01"]
    for path in tried:
        assert all(
            row["response_loss"] > 0 for row in lines(path / "metrics.jsonl") if "loss" in row
        )
    assert [teacher.name for teacher in result.teachers] == ["1-nano-finetune-gold"]
    (student,) = result.students
    assert weights(Path(student.path)) in {weights(path) for path in tried}, (
        "the trial is the student"
    )
    said = [
        json.loads((path / "train.json").read_text(encoding="utf-8"))
        for path in (*tried, Path(student.path))
    ]
    assert len({json.dumps(one["teachers"]) for one in said}) == 1


def test_drawn_rationales_find_what_the_teacher_said_of_each(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(answer) as server:
        base = [
            f"teacher.base_url={server.url}", "annotate.samples=4", "annotate.temperature=0.7", "annotate.stop_early=false",
            "annotate.min_rationale_words=3", "train.methods=step-by-step+response", "train.rationales=drawn", TEACHERS,
            "train.max_steps=12", "train.eval_every=12", "student.dropout=0",
        ]  # fmt: skip
        annotate(
            load_recipe(toy(), [*base, "train.terms=[{kind: response}]"]), out=tmp_path / "run"
        )
    found = []
    for term in (
        "{kind: response}",
        "{kind: response, top_k: 1000}",
    ):  # of 200 entries all are kept
        recipe = load_recipe(tmp_path / "toy.yaml", [*base, f"train.terms=[{term}]"])
        (student,) = train(recipe, out=tmp_path / "run").students
        rows = [row for row in lines(Path(student.path) / "metrics.jsonl") if "loss" in row]
        found.append([row["response_loss"] for row in rows])
    assert len(found[0]) == 12 and min(found[0]) > 0
    assert found[1] == pytest.approx(found[0], rel=1e-3), (
        "two epochs and more, each with rationales of its own"
    )


@pytest.mark.slow
def test_a_killed_training_with_terms_continues_to_the_weights_of_an_undisturbed_one(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    keys = [
        "train.methods=finetune+response+feature", "train.terms=[{kind: response}, {kind: feature, weight: 0.01}]", TEACHERS,
        "train.max_steps=24", "train.eval_every=3", "train.batch_size=4", "eval.max_label_tokens=2",
    ]  # fmt: skip
    path = toy()
    (undisturbed,) = train(load_recipe(path, keys), out=tmp_path / "whole").students
    command = [
        sys.executable,
        "-m",
        "dsbs",
        "train",
        str(path),
        *keys,
        "--out",
        str(tmp_path / "cut"),
    ]
    folder = tmp_path / "cut" / "train" / undisturbed.name
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(folder.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "train.json").exists(), "killed before its end"
    assert last_checkpoint(folder / "checkpoints") is not None
    again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert again.returncode == 0, again.stderr
    assert weights(folder) == weights(Path(undisturbed.path))
    logged = [
        [row for row in lines(of / "metrics.jsonl") if "loss" in row]
        for of in (folder, Path(undisturbed.path))
    ]
    assert [row["step"] for row in logged[0]] == list(range(1, 25)), (
        "no step is missing or told twice"
    )
    assert [row["feature_loss"] for row in logged[0]] == [row["feature_loss"] for row in logged[1]]
    assert "projections" not in "".join(load_file(folder / "model.safetensors"))
