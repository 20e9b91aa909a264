"""Both in one sequence, subsets of the data, early ends: what the paper's ablations need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, launcher, on_two_processes, run_python
from forked import DSBS
from hypothesis import given
from hypothesis import strategies as st
from loopback import LoopbackServer

from dsbs import Student, annotate, evaluate, load_recipe, train
from dsbs.config import Recipe
from dsbs.students.card import SECOND_PART
from dsbs.students.targets import compose_target, split_target
from dsbs.tasks import make_task
from dsbs.training.grid import grid
from dsbs.training.rows import gather


@pytest.mark.parametrize("target", ["label", "rationale-then-label", "label-then-rationale"])
@pytest.mark.parametrize("rationale", ["Because: it is so. Answer: no", "It is a box.", None])
def test_what_is_put_together_comes_apart_again(target: str, rationale: str | None) -> None:
    text = compose_target(target, "shipping", rationale)  # type: ignore[arg-type]
    assert text is not None
    label, why = split_target(target, text)  # type: ignore[arg-type]
    assert label == "shipping"
    assert why == (None if target == "label" else rationale)


PIECES = st.sampled_from(["Answer:", "Answer':", "Because:", "Because''':", "'", ":", "a box"])


@given(
    st.sampled_from(["rationale-then-label", "label-then-rationale"]),
    st.lists(PIECES, min_size=1),
    st.lists(PIECES),
)
def test_texts_with_the_mark_between_them_come_apart_again(
    target: Any, label: list[str], rationale: list[str]
) -> None:
    text = compose_target(target, " ".join(label), " ".join(rationale))
    assert text is not None and text.count(SECOND_PART[target]) <= 1
    assert split_target(target, text) == (" ".join(label), " ".join(rationale) or None)


def test_a_sequence_that_never_came_to_its_label_has_none() -> None:
    assert split_target("rationale-then-label", "It is a box that is") == (
        "",
        "It is a box that is",
    )
    assert (
        compose_target("rationale-then-label", None, "why") is None
        and compose_target("label-then-rationale", None, "why") is None
    )


@pytest.fixture
def annotated(toy: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    with LoopbackServer(good_answer) as server:
        url = f"teacher.base_url={server.url}"
        annotate(load_recipe(toy(), [url]), out=tmp_path / "run")
    return lambda *overrides: load_recipe(tmp_path / "toy.yaml", [url, *overrides])


def test_one_sequence_students_train_and_answer(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = annotated(
        "train.methods=[finetune, rationale-then-label, label-then-rationale]", "train.max_steps=4"
    )
    result = train(recipe, out=tmp_path / "run")
    assert [student.name for student in result.students] == [
        "finetune-gold-s0",
        "rationale-then-label-gold-s0",
        "label-then-rationale-gold-s0",
    ]
    found = evaluate(recipe, out=tmp_path / "run").as_json()
    assert {system["name"] for system in found["systems"]} >= {
        "rationale-then-label-gold",
        "label-then-rationale-gold",
    }
    record = json.loads(
        (tmp_path / "run" / "train" / "rationale-then-label-gold-s0" / "train.json").read_text()
    )
    assert record["rationales"] > 0
    student = Student.load(tmp_path / "run" / "train" / "rationale-then-label-gold-s0")
    assert student.card.reasons_first and student.card.explains
    line = (
        (tmp_path / "run" / "train" / "rationale-then-label-gold-s0" / "metrics.jsonl")
        .read_text()
        .splitlines()[0]
    )
    assert "rationale-then-label_loss" in json.loads(line)


def test_a_student_with_decoder_task_tokens_labels_and_explains(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = annotated(
        "train.methods=step-by-step",
        "train.task_token=decoder",
        "train.max_steps=180",
        "train.eval_every=180",
        "train.learning_rate=0.003",
        "student.dropout=0",
    )
    train(recipe, out=tmp_path / "run")
    student = Student.load(tmp_path / "run" / "train" / "step-by-step-gold-s0")
    assert (
        student.card.prefixes == {"label": "", "rationale": ""}
        and student.card.starts["rationale"] == "eos"
    )
    answer = student.predict(["My parcel number 3 is wrong."], rationale=True)[0]
    assert answer.label == "shipping"
    assert answer.rationale is not None and answer.rationale.startswith("The message is about")


def test_subsets_nest_and_have_students_of_their_own(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = annotated(
        "train.methods=[finetune, step-by-step]",
        "train.subset=[0.25, 0.5, 1.0]",
        "train.max_steps=2",
    )
    data = gather(recipe, make_task(recipe.task), tmp_path / "run", grid(recipe.train))
    subsets = [{row.id for row in data.subset(share)} for share in (0.25, 0.5, 1.0)]
    assert subsets[0] < subsets[1] < subsets[2] and len(subsets[1]) == round(len(data.train) / 2)
    assert [row.id for row in data.subset(0.5)] == [
        row.id for row in data.train if row.id in subsets[1]
    ]
    names = [student.name for student in train(recipe, out=tmp_path / "run").students]
    assert names[::2] == ["finetune-gold-s0", "finetune-gold-n0.5-s0", "finetune-gold-n0.25-s0"]
    systems = {
        system["name"]: system
        for system in evaluate(recipe, out=tmp_path / "run").as_json()["systems"]
    }
    for share in ("", "-n0.5", "-n0.25"):
        assert systems[f"finetune-gold{share}"]["versus"] == {}
        assert list(systems[f"step-by-step-gold{share}"]["versus"]) == [f"finetune-gold{share}"], (
            "compared at equal data"
        )
    assert list(systems["teacher"]["versus"]) == ["finetune-gold"]


def test_patience_ends_a_student_and_a_second_run_keeps_it(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = annotated(
        "train.methods=finetune",
        "train.max_steps=40",
        "train.eval_every=1",
        "train.patience=2",
        "train.learning_rate=1.0e-9",
    )
    (student,) = train(recipe, out=tmp_path / "run").students
    assert student.steps < 40 and student.steps - student.best_step == 2
    assert train(recipe, out=tmp_path / "run").students == [student]


def test_another_recipes_students_are_not_scored_as_this_ones(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    from dsbs import UserError

    train(
        annotated("train.methods=finetune", "train.max_steps=2", "task.limit=30"),
        out=tmp_path / "run",
    )
    assert not evaluate(
        annotated("train.methods=finetune", "train.max_steps=2"), out=tmp_path / "run"
    ).reportable
    with pytest.raises(UserError, match="have changed since the training of"):
        evaluate(annotated("train.methods=finetune", "train.max_steps=3"), out=tmp_path / "run")


def test_a_loss_that_diverges_is_reported_and_saves_no_student(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    from dsbs import DsbsError

    recipe = annotated(
        "train.methods=finetune",
        "train.learning_rate=1.0e+30",
        "train.max_steps=8",
        "train.schedule=constant",
    )
    with pytest.raises(DsbsError, match="loss"):
        train(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run" / "train" / "finetune-gold-s0" / "train.json").exists()


def test_how_a_step_is_cut_changes_no_students_identity(annotated: Callable[..., Recipe]) -> None:
    same = annotated(
        "train.micro_batch_size=4", "train.gradient_checkpointing=true", "train.padding=batch"
    )
    assert same.students[None].training == annotated().students[None].training
    assert (
        annotated("train.loss_mean=micro", "train.micro_batch_size=4").students[None].training
        != annotated("train.loss_mean=micro").students[None].training
    )
    assert (
        annotated("train.max_steps=7").students[None].training
        != annotated().students[None].training
    )


def test_memory_that_runs_out_halves_the_micro_batch_and_goes_on(
    annotated: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from dsbs.training.trainer import StepTrainer

    real = StepTrainer.compute_loss
    seen: list[int] = []

    def small_memory(
        self: StepTrainer,
        model: object,
        inputs: dict[str, dict[str, torch.Tensor]],
        **kwargs: object,
    ) -> object:
        rows = len(inputs["label"].target_lengths)
        seen.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError
        return real(self, model, inputs, **kwargs)

    monkeypatch.setattr(StepTrainer, "compute_loss", small_memory)
    (student,) = train(
        annotated("train.methods=finetune", "train.max_steps=3"), out=tmp_path / "run"
    ).students
    assert student.steps == 3 and seen[:3] == [8, 4, 2] and set(seen[2:]) == {2}


@pytest.mark.parametrize("by", ["fork", pytest.param("launcher", marks=pytest.mark.slow)])
def test_two_processes_train_the_grid_together(
    annotated: Callable[..., Recipe], tmp_path: Path, by: str
) -> None:
    """Over gloo: one lock, one set of files, and the figures of one process.

    The epoch's last step has seven of 39 rows, so that one process gets an empty one.
    """
    changes = ["train.methods=[step-by-step, finetune]", "train.max_steps=6", "student.dropout=0"]
    changes += ["train.rationale_weight=0.5", "report.trackers=[tensorboard]"]
    recipe = annotated(*changes)
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "annotate").symlink_to(tmp_path / "run" / "annotate")
    train(recipe, out=tmp_path / "one")
    changes.append(f"teacher.base_url={recipe.teacher.base_url}")
    command = ["train", str(tmp_path / "toy.yaml"), *changes]
    command += ["--out", str(tmp_path / "two"), "--json"]
    if by == "fork":
        first, second = on_two_processes(DSBS, *command)
        assert second.stdout == "", "one of the two prints results"
    else:
        first = run_python(*launcher()[1:], "-m", "dsbs", *command, cwd=tmp_path)
        assert first.returncode == 0, first.stderr[-3000:]
    students = json.loads(first.stdout)["students"]
    names = ["step-by-step-gold-s0", "finetune-gold-s0"]
    assert [student["name"] for student in students] == names
    for name in names:
        of_one, of_two = (losses_by_step(tmp_path / run / "train" / name) for run in ("one", "two"))
        assert list(of_two) == [1, 2, 3, 4, 5, 6]
        for step, row in of_two.items():
            for key in ("loss", "label_loss", "tokens", "examples"):
                assert row[key] == pytest.approx(of_one[step][key], rel=2e-3), (step, key)
            if name.startswith("step-by-step"):
                loss = (row["label_loss"] + 0.5 * row["rationale_loss"]) / 1.5
                assert row["loss"] == pytest.approx(loss, rel=1e-4)
            else:
                assert row["loss"] == pytest.approx(row["label_loss"], rel=1e-4)
        events = list((tmp_path / "two" / "train" / name / "tensorboard").iterdir())
        assert len(events) == 1, "one of the two writes events"


def losses_by_step(folder: Path) -> dict[int, dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["step"]: row for row in map(json.loads, lines) if "loss" in row}


def test_a_seed_that_is_missing_is_named_by_its_part_of_the_data(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    from dsbs.evaluation.run import missing_students
    from dsbs.run_folder import RunFolder

    part = ["train.methods=finetune", "train.subset=0.5", "train.max_steps=1"]
    train(annotated(*part), out=tmp_path / "run")
    students = RunFolder(tmp_path / "run").students()
    assert missing_students(annotated(*part), students) == []
    assert missing_students(annotated(*part, "train.seeds=[0, 1]"), students) == [
        "finetune-gold-n0.5-s1"
    ]
