"""FSDP on two CPU processes: the steps, the saved student and resuming are a single process's."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import good_answer, launcher, on_two_processes
from fsdp_on_cpu import ENVIRONMENT
from loopback import LoopbackServer
from test_trainer import independent_weights

from dsbs import Student, annotate, load_recipe
from dsbs.training.grid import last_checkpoint

TESTS = Path(__file__).resolve().parents[1]

WORKER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:4]
import fsdp_on_cpu
fsdp_on_cpu.allow()
import torch
from dsbs.training.distributed import gather_weights
import test_trainer
folder, options = Path(sys.argv[4]), dict(pair.split("=") for pair in sys.argv[5:])
model = test_trainer.tiny_model(layers=2)
if options.get("checkpointing") == "yes":
    model.activation_checkpointing_enable()
test_trainer.train(model, folder, micro=2, steps=4, world_size=2, padding=options["padding"])
assert hasattr(model.decoder.block[1], "unshard") and not hasattr(model.decoder.block[0], "unshard")
weights = gather_weights(model)
if torch.distributed.get_rank() == 0:
    torch.save(weights, folder / "weights.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("options", [("padding=none",), ("padding=batch", "checkpointing=yes")])
def test_a_divided_model_takes_the_steps_of_a_whole_one(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    paths = (str(TESTS / "training"), str(TESTS), str(TESTS.parent))
    command = [str(tmp_path / "worker.py"), *paths, str(tmp_path), *options]
    on_two_processes(*command, env=ENVIRONMENT)
    theirs = independent_weights(steps=4, layers=2)
    found = torch.load(tmp_path / "weights.pt")
    assert set(found) == set(theirs)
    for name, value in found.items():
        assert torch.allclose(value.double(), theirs[name], atol=1e-6), name


@pytest.mark.slow
def test_a_killed_divided_training_continues_to_the_weights_of_an_undisturbed_one(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        overrides = [
            f"teacher.base_url={server.url}",
            "train.methods=step-by-step",
            "train.max_steps=30",
            "train.eval_every=10",
        ]
        annotate(load_recipe(toy(), overrides), out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")

    def run(out: str, **environment: str) -> subprocess.CompletedProcess[str]:
        arguments = ["train", str(tmp_path / "toy.yaml"), *overrides, "--out", str(tmp_path / out)]
        command = [*launcher(), str(TESTS / "fsdp_on_cpu.py"), *arguments]
        env = dict(os.environ) | ENVIRONMENT | environment
        return subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=240, env=env
        )

    def student(out: str) -> Path:
        return tmp_path / out / "train" / "step-by-step-gold-s0"

    whole = run("whole")
    assert whole.returncode == 0, whole.stderr[-2000:]
    run("broken", DIE_AT_STEP="17")
    assert not (student("broken") / "train.json").exists(), "killed before its end"
    assert (
        last_checkpoint(student("broken") / "checkpoints")
        == student("broken") / "checkpoints" / "checkpoint-10"
    )
    again = run("broken")
    assert again.returncode == 0, again.stderr[-2000:]
    hashes = {
        hashlib.sha256((student(out) / "model.safetensors").read_bytes()).hexdigest()
        for out in ("whole", "broken")
    }
    assert len(hashes) == 1
    assert Student.load(student("whole")).predict(["My parcel is wrong."], rationale=True)
