"""Terms with the rest of training: processes, checkpointing, LoRA, tuning, rationales, a kill."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import on_two_processes, run_dsbs, start_dsbs
from loopback import LoopbackServer
from safetensors.torch import load_file
from tiny_training import (
    distillation_loss,
    loss_lines,
    tiny_model,
    train_steps,
    weights_hash,
)

from dsbs import annotate, load_recipe, train
from dsbs.config import LoraSection
from dsbs.training.adapters import add_adapters, merge_adapters
from dsbs.training.grid import last_checkpoint

TEACHERS = "train.teachers=[{size: nano, max_steps: 2}]"
RESPONSE = ("train.methods=finetune+response", "train.terms=[{kind: response}]", TEACHERS)

WORKER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parents[1])]
import torch
from tiny_training import distillation_loss, train_steps
out = Path(sys.argv[2])
for kind in sys.argv[3].split(","):
    terms = distillation_loss(sys.argv[4:], kind=kind)
    model, lines = train_steps(out, terms, micro_batch=2, steps=2, processes=2, kind=kind)
    if torch.distributed.get_rank() == 0:
        torch.save((model.state_dict(), lines), out / f"{kind}.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


def four_samples(body: dict[str, Any], number: int) -> str:
    """By seed, two usable rationales for the right label, one for a wrong one, one too short."""
    question = body["messages"][-1]["content"]
    right, wrong = "billing", "shipping"
    subject = "an invoice"
    if "invoice" not in question:
        right, wrong = wrong, right
        subject = "a parcel"
    seed = body.get("seed", number) % 4
    rationale = [
        f"It is about {subject}, plainly.",
        f"We read of {subject} in it.",
        f"Only {subject} is named here.",
        "Too short",
    ][seed]
    return f"{rationale}\nAnswer: {wrong if seed == 2 else right}"


def test_two_processes_learn_terms_as_one_does(tmp_path: Path) -> None:
    """Over gloo; the rows without a rationale are split unevenly between the two."""
    titles = ["response", "feature"]
    kinds = ["t5", "decoder"]
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    here = str(Path(__file__).parent)
    on_two_processes(str(script), here, str(tmp_path), ",".join(kinds), *titles)
    for kind in kinds:
        terms = distillation_loss(titles, kind=kind)
        expected, expected_lines = train_steps(tmp_path / "one", terms, steps=2, kind=kind)
        weights, lines = torch.load(tmp_path / f"{kind}.pt")
        changes = [
            float((value - expected.state_dict()[name]).abs().max())
            for name, value in tiny_model(kind).state_dict().items()
        ]
        assert max(changes) > 1e-4, "it learned"
        for name, value in expected.state_dict().items():
            assert torch.allclose(weights[name], value, atol=1e-5), (kind, name)
        for title in titles:  # logged is the sum over the processes
            assert [line[f"{title}_loss"] for line in lines] == pytest.approx(
                [line[f"{title}_loss"] for line in expected_lines], rel=1e-3
            )


@pytest.mark.parametrize(
    ("kind", "padding"), [("t5", "none"), ("t5", "batch"), ("decoder", "none")]
)
def test_gradient_checkpointing_changes_no_step_with_a_term(
    tmp_path: Path, kind: str, padding: Any
) -> None:
    checkpointing = tiny_model(kind)
    checkpointing.activation_checkpointing_enable()
    runs = [
        train_steps(
            tmp_path,
            distillation_loss(["response"], kind=kind),
            model=model,
            kind=kind,
            padding=padding,
        )
        for model in (None, checkpointing)
    ]
    (plain, lines), (student, _) = runs
    assert lines[0]["response_loss"] > 0
    for name, value in plain.state_dict().items():
        assert torch.allclose(student.state_dict()[name], value, atol=1e-6), name


@pytest.mark.parametrize("kind", ["t5", "decoder"])
def test_adapters_learn_a_term_and_merge_into_a_plain_student(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("peft")
    more = ("wi", "wo") if kind == "t5" else ("gate_proj", "up_proj", "down_proj")
    section = LoraSection(rank=4, alpha=8, targets=("q", "k", "v", "o", *more))
    model = add_adapters(tiny_model(kind), section)
    terms = distillation_loss(["response"], kind=kind)
    student, lines = train_steps(tmp_path, terms, steps=20, model=model, kind=kind)
    assert lines[-1]["response_loss"] < lines[0]["response_loss"]
    base = {
        name.replace(".base_layer", ""): value
        for name, value in student.get_base_model().state_dict().items()
    }
    for name, value in tiny_model(kind).state_dict().items():
        assert torch.equal(base[name], value), name
    student.save_pretrained(tmp_path / "adapters")
    plain = merge_adapters(tiny_model(kind), tmp_path / "adapters").eval()
    batch = {"input_ids": torch.tensor([[3, 4, 1]]), "labels": torch.tensor([[6, 7, 1]])}
    assert torch.allclose(plain(**batch).logits, student.eval()(**batch).logits, atol=1e-5)


def test_all_settings_of_a_tuning_learn_the_term_from_one_teacher(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    tune = "train.tune={learning_rate: [0.0001, 0.01]}"
    result = train(load_recipe(toy(), [*RESPONSE, tune, "train.max_steps=2"]), out=tmp_path / "run")
    trials = sorted((tmp_path / "run/train/trials/finetune+response-gold").iterdir())
    assert [trial.name for trial in trials] == ["learning_rate=0.0001", "learning_rate=0.01"]
    for trial in trials:
        assert all(line["response_loss"] > 0 for line in loss_lines(trial))
    assert [teacher.name for teacher in result.teachers] == ["1-nano-finetune-gold"]
    student = Path(result.students[0].path)
    assert weights_hash(student) in {weights_hash(trial) for trial in trials}
    teachers = {
        json.dumps(json.loads((folder / "train.json").read_text(encoding="utf-8"))["teachers"])
        for folder in (*trials, student)
    }
    assert len(teachers) == 1


def test_drawn_rationales_find_their_cached_teacher_log_probabilities(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(four_samples) as server:
        base = [
            f"teacher.base_url={server.url}",
            "annotate.samples=4",
            "annotate.temperature=0.7",
            "annotate.stop_early=false",
            "annotate.min_rationale_words=3",
            "train.methods=step-by-step+response",
            "train.rationales=drawn",
            TEACHERS,
            "train.max_steps=12",
            "train.eval_every=12",
            "student.dropout=0",
        ]
        recipe = load_recipe(toy(), [*base, "train.terms=[{kind: response}]"])
        annotate(recipe, out=tmp_path / "run")
    losses: list[list[float]] = []
    for term in ("{kind: response}", "{kind: response, top_k: 1000}"):  # of 200 entries, all
        recipe = load_recipe(tmp_path / "toy.yaml", [*base, f"train.terms=[{term}]"])
        (student,) = train(recipe, out=tmp_path / "run").students
        losses.append([line["response_loss"] for line in loss_lines(Path(student.path))])
    assert len(losses[0]) == 12, "more than two epochs, each with rationales of its own"
    assert min(losses[0]) > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_a_killed_training_with_terms_resumes_to_the_weights_of_an_uninterrupted_one(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    keys = [
        "train.methods=finetune+response+feature",
        "train.terms=[{kind: response}, {kind: feature, weight: 0.01}]",
        TEACHERS,
        "train.max_steps=24",
        "train.eval_every=3",
        "train.batch_size=4",
        "eval.max_label_tokens=2",
    ]
    path = toy()
    (uninterrupted,) = train(load_recipe(path, keys), out=tmp_path / "uninterrupted").students
    out = ["--out", str(tmp_path / "killed")]
    command = ["train", str(path), *keys, *out]
    folder = tmp_path / "killed" / "train" / uninterrupted.name
    process = start_dsbs(*command)
    deadline = time.monotonic() + 240
    while not list(folder.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None, "it ended without a checkpoint"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / "train.json").exists(), "killed before its end"
    assert last_checkpoint(folder / "checkpoints") is not None
    resumed = run_dsbs(*command, cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert weights_hash(folder) == weights_hash(Path(uninterrupted.path))
    lines = loss_lines(folder)
    expected_lines = loss_lines(Path(uninterrupted.path))
    assert [line["step"] for line in lines] == list(range(1, 25)), "no step is lost or repeated"
    assert [line["feature_loss"] for line in lines] == [
        line["feature_loss"] for line in expected_lines
    ]
    assert "projections" not in "".join(load_file(folder / "model.safetensors"))
