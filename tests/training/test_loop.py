"""Training from annotations to student folders: resuming, setting aside, the best step."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, run_dsbs, start_dsbs
from loopback import LoopbackServer

from dsbs import UserError, annotate, load_recipe, train
from dsbs.config import Recipe
from dsbs.students.calibration import read_calibration
from dsbs.training.grid import grid, last_checkpoint
from dsbs.training.rows import gather


@pytest.fixture
def annotated(toy: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Recipe]]:
    """A toy run whose teacher has answered; returns recipes on the same run folder."""
    with LoopbackServer(good_answer) as server:
        path = toy()
        base = [f"teacher.base_url={server.url}"]
        annotate(load_recipe(path, base), out=tmp_path / "run")
        yield lambda *overrides: load_recipe(path, [*base, *overrides])


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_spec_becomes_a_student_with_its_record_and_separate_losses(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    result = train(annotated("train.labels=[gold, teacher]"), out=tmp_path / "run")
    assert [s.name for s in result.students] == [
        "step-by-step-gold-s0",
        "step-by-step-teacher-s0",
        "finetune-gold-s0",
        "distill-teacher-s0",
    ]
    folder = tmp_path / "run" / "train" / "step-by-step-gold-s0"
    assert {
        "model.safetensors",
        "tokenizer.json",
        "student.json",
        "train.json",
        "metrics.jsonl",
    } <= {p.name for p in folder.iterdir()}
    assert not (folder / "checkpoints").exists()
    steps = [row for row in lines(folder / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for row in steps:
        assert row["loss"] == pytest.approx(
            (row["label_loss"] + row["rationale_loss"]) / 2, rel=1e-4
        )
    validations = [row for row in lines(folder / "metrics.jsonl") if "eval_accuracy" in row]
    assert [row["step"] for row in validations] == [3, 6]
    record = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    assert record["student"]["valid_accuracy"] in {row["eval_accuracy"] for row in validations}
    assert record["valid_labels"] == "gold"
    cost = record["student"]["cost"]
    assert cost["device"] and cost["processes"] == 1 and cost["peak_memory_mb"] > 0
    assert cost["tokens"] == validations[-1]["tokens"] and cost["tokens_per_s"] > 0
    assert record["rows"] == 39 and validations[-1]["examples"] == 39 + 8, (
        "an epoch's last step has the rows that are left"
    )
    assert all(row["examples_per_s"] > 0 for row in steps)
    counts = [row["tokens"] for row in steps]
    assert counts == sorted(set(counts)), "tokens so far, more at each step"


def test_the_loss_on_valid_is_the_same_however_its_rows_are_batched(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    found = []
    for size in (1, 3, 64):
        recipe = annotated(
            "train.methods=finetune",
            "train.max_steps=2",
            "task.data.valid_fraction=0.3",
            f"eval.batch_size={size}",
        )
        train(recipe, out=tmp_path / f"of-{size}")
        rows = lines(tmp_path / f"of-{size}" / "train" / "finetune-gold-s0" / "metrics.jsonl")
        found.append([row["eval_label_loss"] for row in rows if "eval_label_loss" in row])
    assert (
        found[0]
        and found[0] == pytest.approx(found[1], rel=1e-4)
        and found[0] == pytest.approx(found[2], rel=1e-4)
    )


def test_finished_students_are_kept_and_changed_recipes_set_them_aside_and_bring_them_back(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    only = "train.methods=finetune"
    train(annotated(only), out=run)
    folder = run / "train" / "finetune-gold-s0"
    first = weights(folder)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    train(annotated(only), out=run)
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    train(annotated(only, "train.learning_rate=0.01"), out=run)
    assert weights(folder) != first
    assert [weights(p) for p in (run / "train" / "aside").iterdir()] == [first]
    train(annotated(only), out=run)
    assert weights(folder) == first
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp, (
        "brought back, not trained again"
    )


def is_whole(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")))
    except ValueError:
        return False  # it is being written


def test_a_killed_training_continues_to_the_weights_of_an_undisturbed_one(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = annotated(
        "train.methods=step-by-step",
        "train.max_steps=20",
        "train.eval_every=5",
        "train.batch_size=4",
    )
    train(recipe, out=tmp_path / "run")
    undisturbed = tmp_path / "run" / "train" / "step-by-step-gold-s0"
    other = tmp_path / "other"
    other.mkdir()
    (tmp_path / "run" / "annotate").rename(other / "annotate")
    arguments = [
        "train",
        str(tmp_path / "toy.yaml"),
        f"teacher.base_url={recipe.teacher.base_url}",
        "train.methods=step-by-step",
        "train.max_steps=20",
        "train.eval_every=5",
        "train.batch_size=4",
        "--out",
        str(other),
    ]
    folder = other / "train" / "step-by-step-gold-s0"
    process = start_dsbs(*arguments)
    deadline = time.monotonic() + 120
    while not any(map(is_whole, folder.glob("checkpoints/checkpoint-*/trainer_state.json"))):
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert not (folder / "train.json").exists(), "killed before its end"
    resumed_from = last_checkpoint(folder / "checkpoints")
    assert resumed_from is not None
    again = run_dsbs(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert weights(folder) == weights(undisturbed)
    rows = [
        [row for row in lines(path / "metrics.jsonl") if "loss" in row]
        for path in (folder, undisturbed)
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, 21)), (
        "no step is missing or logged twice"
    )
    assert [(row["tokens"], row["examples"]) for row in rows[0]] == [
        (row["tokens"], row["examples"]) for row in rows[1]
    ]
    costs = [
        json.loads((path / "train.json").read_text(encoding="utf-8"))["student"]["cost"]
        for path in (folder, undisturbed)
    ]
    assert costs[0]["tokens"] == costs[1]["tokens"] == rows[0][-1]["tokens"]


@pytest.mark.parametrize(("steps", "every", "validations"), [(3, 100, [3]), (5, 2, [2, 4, 5])])
def test_the_last_step_is_validated_whatever_eval_every_is(
    annotated: Callable[..., Recipe], tmp_path: Path, steps: int, every: int, validations: list[int]
) -> None:
    recipe = annotated(
        "train.methods=finetune", f"train.max_steps={steps}", f"train.eval_every={every}"
    )
    train(recipe, out=tmp_path / "run")
    rows = lines(tmp_path / "run" / "train" / "finetune-gold-s0" / "metrics.jsonl")
    assert [row["step"] for row in rows if "eval_accuracy" in row] == validations


def test_a_kill_between_the_last_step_and_the_saved_student_costs_no_step(
    annotated: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsbs.training import grid

    recipe = annotated("train.methods=finetune")
    folder = tmp_path / "run" / "train" / "finetune-gold-s0"
    with monkeypatch.context() as patch:
        patch.setattr(grid.shutil, "rmtree", lambda *args, **kwargs: None)
        train(recipe, out=tmp_path / "run")
    first, steps = weights(folder), lines(folder / "metrics.jsonl")
    (folder / "train.json").unlink()
    (folder / "model.safetensors").write_bytes(b"half of it")
    result = train(recipe, out=tmp_path / "run")
    assert weights(folder) == first and result.students[0].steps == 6
    assert lines(folder / "metrics.jsonl") == steps


def test_a_half_written_checkpoint_is_not_resumed_from(tmp_path: Path) -> None:
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_'), (15, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-5"


def test_validation_rows_are_held_out_of_training_and_test_rows_never_seen(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    from dsbs.tasks import make_task

    recipe = annotated("task.data.valid_fraction=0.3")
    data = gather(recipe, make_task(recipe.task), tmp_path / "run", grid(recipe.train))
    train_ids, valid_ids = {row.id for row in data.train}, {row.id for row in data.valid}
    assert valid_ids and not train_ids & valid_ids
    assert train_ids | valid_ids == {f"r{i}" for i in range(40)}


def test_rejected_rows_keep_their_gold_label(toy: Callable[..., Path], tmp_path: Path) -> None:
    from dsbs.tasks import make_task

    def half(body: dict[str, Any], number: int) -> str:
        return (
            good_answer(body, number)
            if "parcel" in body["messages"][-1]["content"]
            else "I would rather not say."
        )

    with LoopbackServer(half) as server:
        recipe = load_recipe(toy(), [f"teacher.base_url={server.url}"])
        annotate(recipe, out=tmp_path / "run")
    data = gather(recipe, make_task(recipe.task), tmp_path / "run", grid(recipe.train))
    without = [row for row in data.train if not row.rationales]
    assert without and all(row.gold == "billing" and row.teacher is None for row in without)
    assert all(row.rationales for row in data.train if row.gold == "shipping")


def test_training_before_annotating_says_what_to_do(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="dsbs annotate"):
        train(load_recipe(toy()), out=tmp_path / "nothing")


def test_training_on_another_teachers_annotations_is_refused(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="another teacher, prompt or sampling"):
        train(annotated("teacher.model=other"), out=tmp_path / "run")


def test_finetuning_alone_needs_no_teacher(toy: Callable[..., Path], tmp_path: Path) -> None:
    result = train(load_recipe(toy(), ["train.methods=finetune"]), out=tmp_path / "alone")
    assert [student.name for student in result.students] == ["finetune-gold-s0"]


def test_bf16_is_refused_where_there_is_no_gpu_for_it(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="bf16"):
        train(annotated("train.precision=bf16"), out=tmp_path / "run")


def test_dry_run_trains_nothing(annotated: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = annotated()
    done = run_dsbs(
        "train",
        str(tmp_path / "toy.yaml"),
        f"teacher.base_url={recipe.teacher.base_url}",
        "--dry-run",
        "--out",
        "run",
        cwd=tmp_path,
    )
    assert done.returncode == 0 and "step-by-step-gold-s0: " in done.stdout
    assert not (tmp_path / "run" / "train").exists()


def test_a_weight_that_rises_from_nothing_trains_rationales(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    rising = [
        "train.rationale_weight=0",
        "train.rationale_schedule=linear",
        "train.rationale_weight_end=1",
    ]
    train(annotated("train.methods=step-by-step", *rising), out=tmp_path / "run")
    first, *_, last = (
        row
        for row in lines(tmp_path / "run/train/step-by-step-gold-s0/metrics.jsonl")
        if "loss" in row
    )
    assert (
        first["loss"] == pytest.approx(first["label_loss"], rel=1e-4)
        and first["rationale_loss"] > 0
    )
    weight = 5 / 6
    mixed = (last["label_loss"] + weight * last["rationale_loss"]) / (1 + weight)
    assert last["loss"] == pytest.approx(mixed, rel=1e-4)


def test_a_constant_rate_has_its_warm_up(annotated: Callable[..., Recipe], tmp_path: Path) -> None:
    train(
        annotated("train.methods=finetune", "train.schedule=constant", "train.warmup_steps=3"),
        out=tmp_path / "run",
    )
    rates = [
        row["learning_rate"]
        for row in lines(tmp_path / "run/train/finetune-gold-s0/metrics.jsonl")
        if "loss" in row
    ]
    assert rates[0] < rates[1] < rates[2] and rates[3:] == [0.001] * 3


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "size"),
    [(14, 7, 2, 1), (36, 9, 2, 3), (20, 10, 4, 1), (64, 64, 2, 32), (8, 1, 2, 1)],
)
def test_a_step_has_its_batch_on_any_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, batch: int, micro: int, processes: int, size: int
) -> None:
    from dsbs.training.distributed import per_device_batch_size

    monkeypatch.setenv("WORLD_SIZE", str(processes))
    assert per_device_batch_size(batch, micro) == size and batch % (size * processes) == 0


def test_a_part_without_what_a_method_learns_is_refused_before_anything_is_trained(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def few(body: dict[str, Any], number: int) -> str:
        return (
            good_answer(body, number)
            if "number 3 " in body["messages"][-1]["content"]
            else "I would rather not say."
        )

    with LoopbackServer(few) as server:
        base = [f"teacher.base_url={server.url}", "train.subset=[1.0, 0.05]"]
        annotate(load_recipe(toy(), base), out=tmp_path / "run")
    for method, said in (
        ("distill", "distill learns teacher labels"),
        ("step-by-step", "learns rationales"),
    ):
        with pytest.raises(UserError, match=f"{said}.*train.subset 0.05"):
            train(
                load_recipe(tmp_path / "toy.yaml", [*base, f"train.methods={method}"]),
                out=tmp_path / "run",
            )
    assert not list((tmp_path / "run" / "train").glob("*-s0"))


def test_weights_that_training_starts_from_are_part_of_the_student(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:

    only = ["train.methods=finetune", "train.max_steps=2"]
    train(annotated(*only), out=tmp_path / "run")
    start = tmp_path / "start"
    (tmp_path / "run" / "train" / "finetune-gold-s0").rename(start)
    recipe = annotated(*only, "student.init=null", f"train.init={start}")
    train(recipe, out=tmp_path / "run")
    student = tmp_path / "run" / "train" / "finetune-gold-s0"
    first = weights(student)
    shutil.copy(student / "model.safetensors", start / "model.safetensors")
    train(recipe, out=tmp_path / "run")
    assert weights(student) != first


def test_labels_that_are_scored_later_are_calibrated_without_training(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    settings = ["train.methods=finetune", "train.max_steps=2", "train.eval_every=2"]
    (student,) = train(load_recipe(toy(), settings), out=tmp_path / "run").students
    assert read_calibration(student.path) is None
    before = weights(Path(student.path))
    again = load_recipe(toy(), [*settings, "eval.score_labels=true"])
    train(again, out=tmp_path / "run")
    assert weights(Path(student.path)) == before
    calibration = read_calibration(student.path)
    assert calibration is not None and calibration.rows > 0
