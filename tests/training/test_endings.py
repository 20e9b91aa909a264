"""Interrupted trainings: a full disk, a signal, no memory. Each says so and can be resumed."""

from __future__ import annotations

import errno
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_dsbs, small_disk_at, start_dsbs
from test_loop import lines, weights

from dsbs import DsbsError, PartialError, Student, load_recipe, train
from dsbs.training.callbacks import MetricsLogger
from dsbs.training.grid import last_checkpoint
from dsbs.training.trainer import StepTrainer

NAME = "finetune-gold-s0"
ONLY = "train.methods=finetune"


# A checkpoint of the toy student is 16 MB, the student 5; the largest disk holds one checkpoint
# and a part of the next.
@pytest.mark.parametrize(
    ("megabytes", "kept"),
    [
        (3, None),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in ((10, None), (17, 3), (25, 3))),
        (20, 3),
    ],
)
def test_a_full_disk_ends_with_exit_code_3_and_the_same_command_goes_on(
    toy: Callable[..., Path], tmp_path: Path, megabytes: int, kept: int | None
) -> None:
    path = toy()
    with small_disk_at(tmp_path / "disk", megabytes) as disk:
        folder = disk / "run" / "train" / NAME
        command = ["train", str(path), ONLY, "--out", str(disk / "run")]
        ended = run_dsbs(*command, cwd=tmp_path)
        assert ended.returncode == 3, ended.stderr
        assert "Traceback" not in ended.stderr and "free some space" in ended.stderr
        last = last_checkpoint(folder / "checkpoints")
        assert (last and last.name) == (kept and f"checkpoint-{kept}"), (
            "what was whole is kept, what was not is gone"
        )
        subprocess.run(["mount", "-o", "remount,size=120m", str(disk)], check=True)
        again = run_dsbs(*command, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        train(load_recipe(path, [ONLY]), out=tmp_path / "undisturbed")
        assert weights(folder) == weights(tmp_path / "undisturbed" / "train" / NAME)


def test_a_disk_that_fills_up_between_checkpoints_is_reported_and_loses_no_line(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = MetricsLogger.on_log

    def full_at_step_5(
        self: MetricsLogger, args: Any, state: Any, *rest: Any, **kwargs: Any
    ) -> None:
        if state.global_step == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, args, state, *rest, **kwargs)

    recipe = load_recipe(toy(), [ONLY])
    with monkeypatch.context() as patch, pytest.raises(PartialError, match="disk seems full"):
        patch.setattr(MetricsLogger, "on_log", full_at_step_5)
        train(recipe, out=tmp_path / "run")
    train(recipe, out=tmp_path / "run")
    rows = lines(tmp_path / "run" / "train" / NAME / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_an_error_other_than_a_full_disk_is_raised_unchanged(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: StepTrainer, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(StepTrainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        train(load_recipe(toy(), [ONLY]), out=tmp_path / "run")


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_training_with_one_line_and_the_same_command_goes_on(
    toy: Callable[..., Path], tmp_path: Path, signal_number: signal.Signals
) -> None:
    command = [
        "train",
        str(toy()),
        ONLY,
        "train.max_steps=20",
        "train.eval_every=5",
        "--out",
        str(tmp_path / "run"),
    ]
    folder = tmp_path / "run" / "train" / NAME
    process = start_dsbs(*command)
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/checkpoint-*/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    process.send_signal(signal_number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        said.endswith("dsbs: interrupted; run the same command to continue\n")
        and "Traceback" not in said
    )
    assert '"interrupted"' in (tmp_path / "run" / "train" / "manifest.json").read_text(
        encoding="utf-8"
    )
    assert run_dsbs(*command, cwd=tmp_path).returncode == 0
    assert [row["step"] for row in lines(folder / "metrics.jsonl") if "loss" in row] == list(
        range(1, 21)
    )


@pytest.mark.parametrize("how", ["tensor", "python"])
def test_a_machine_without_memory_takes_smaller_micro_batches(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    real = StepTrainer.compute_loss

    def small_memory(
        self: StepTrainer, model: Any, inputs: dict[str, dict[str, torch.Tensor]], **kwargs: Any
    ) -> Any:
        if len(inputs["label"].target_lengths) > 4:
            if how == "python":
                raise MemoryError
            torch.empty(
                1 << 60, dtype=torch.uint8, device="cpu"
            )  # as PyTorch says it of a machine's memory
        return real(self, model, inputs, **kwargs)

    monkeypatch.setattr(StepTrainer, "compute_loss", small_memory)
    (student,) = train(load_recipe(toy(), [ONLY]), out=tmp_path / "run").students
    assert student.steps == 6


def test_a_loss_that_diverges_after_a_checkpoint_keeps_it_and_ends_with_exit_code_1(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StepTrainer.compute_loss

    def lost_at_step_5(self: StepTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 4 else loss

    recipe = load_recipe(toy(), [ONLY])
    with monkeypatch.context() as patch:
        patch.setattr(StepTrainer, "compute_loss", lost_at_step_5)
        with pytest.raises(DsbsError, match="the loss is nan at step 5") as ended:
            train(recipe, out=tmp_path / "run")
    assert ended.value.exit_code == 1
    kept = last_checkpoint(tmp_path / "run" / "train" / NAME / "checkpoints")
    assert kept is not None and kept.name == "checkpoint-3"


def test_no_memory_in_validation_names_the_batches_of_validation(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(*_args: Any, **_options: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Student, "generate", no_memory)
    with pytest.raises(
        DsbsError, match="out of memory in validation, which reads 64 rows"
    ) as ended:
        train(load_recipe(toy(), [ONLY, "eval.batch_size=64"]), out=tmp_path / "run")
    assert "eval.batch_size" in ended.value.hint
