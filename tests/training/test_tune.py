"""Tuning: every system has the same trials; the best is the student; none is trained twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer, run_dsbs
from loopback import LoopbackServer

from dsbs import DsbsError, UserError, annotate, evaluate, load_recipe, train
from dsbs.config import Recipe, TrainSection
from dsbs.progress import NoProgress
from dsbs.training import run as training_run
from dsbs.training.student_run import StudentRun

GRID = "train.tune={learning_rate: [0.00001, 0.01], warmup_steps: [0, 2]}"


@pytest.fixture
def annotated(toy: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Recipe]]:
    with LoopbackServer(good_answer) as server:
        base = [f"teacher.base_url={server.url}", "train.methods=[step-by-step, finetune]"]
        annotate(load_recipe(toy(), base), out=tmp_path / "run")
        yield lambda *overrides: load_recipe(tmp_path / "toy.yaml", [*base, *overrides])


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    return found


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_every_system_tries_every_setting_and_its_seeds_take_the_best(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = annotated(GRID, "train.seeds=[3, 4]", "train.max_steps=4", "train.eval_every=2")
    result = train(recipe, out=tmp_path / "run")
    folder = tmp_path / "run" / "train"
    for system in ("step-by-step-gold", "finetune-gold"):
        trial_records = {path.name: record(path) for path in (folder / "trials" / system).iterdir()}
        assert set(trial_records) == {
            f"learning_rate={rate},warmup_steps={n}" for rate in ("1e-05", "0.01") for n in (0, 2)
        }
        assert all(trial_record["student"]["seed"] == 3 for trial_record in trial_records.values())
        best = max(trial_records, key=lambda name: trial_records[name]["selection"])
        first, second = folder / f"{system}-s3", folder / f"{system}-s4"
        assert weights(first) == weights(folder / "trials" / system / best), (
            "the trial is the student"
        )
        for student in (first, second):
            chosen = record(student)["student"]["tuned"]
            assert ",".join(f"{key}={value:g}" for key, value in chosen.items()) == best
            trials = record(student)["trials"]
            assert [t["selection"] for t in trials] == [
                trial_records[
                    f"learning_rate={t['setting']['learning_rate']:g},warmup_steps={t['setting']['warmup_steps']}"
                ]["selection"]
                for t in trials
            ]
        assert len({trial_record["selection"] for trial_record in trial_records.values()}) > 1, (
            "the settings differ"
        )
    assert [s.tuned["learning_rate"] for s in result.students] == [
        record(Path(s.path))["student"]["tuned"]["learning_rate"] for s in result.students
    ]
    assert {system.name for system in evaluate(recipe, out=tmp_path / "run").systems} >= {
        "step-by-step-gold",
        "finetune-gold",
    }


def test_a_tuned_student_is_the_one_that_its_setting_alone_would_give(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    tuned = train(
        annotated(
            "train.tune.learning_rate=[0.01, 0.003]", "train.methods=finetune", "train.seeds=[0, 1]"
        ),
        out=tmp_path / "run",
    ).students
    chosen = tuned[0].tuned["learning_rate"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "run" / "annotate").rename(tmp_path / "plain" / "annotate")
    plain = train(
        annotated(f"train.learning_rate={chosen}", "train.methods=finetune", "train.seeds=[0, 1]"),
        out=tmp_path / "plain",
    ).students
    assert [weights(Path(s.path)) for s in tuned] == [weights(Path(s.path)) for s in plain]


def test_run_again_nothing_is_trained_and_a_wider_grid_tries_only_the_new(
    annotated: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []
    real = StudentRun._train
    monkeypatch.setattr(
        StudentRun,
        "_train",
        lambda self, progress: (trained.append(self.spec.title), real(self, progress))[1],
    )
    only = "train.methods=finetune"
    train(annotated(only, "train.tune.learning_rate=[0.01, 0.003]"), out=tmp_path / "run")
    assert len(trained) == 2, "two trials, and the better one is the student"
    train(annotated(only, "train.tune.learning_rate=[0.01, 0.003]"), out=tmp_path / "run")
    assert len(trained) == 2
    wider = annotated(only, "train.tune.learning_rate=[0.01, 0.003, 0.00001]")
    train(wider, out=tmp_path / "run")
    assert trained[2:] == ["finetune-gold-s0 with learning_rate=1e-05"]
    assert len(record(tmp_path / "run" / "train" / "finetune-gold-s0")["trials"]) == 3
    assert evaluate(wider, out=tmp_path / "run").n, "the kept student is the wider grid's now"
    chosen = record(tmp_path / "run" / "train" / "finetune-gold-s0")["student"]["tuned"][
        "learning_rate"
    ]
    plain = annotated(only, f"train.learning_rate={chosen}")
    train(plain, out=tmp_path / "run")
    assert len(trained) == 3 and evaluate(plain, out=tmp_path / "run").n, (
        "and the plain recipe's, which says the same"
    )
    assert record(tmp_path / "run" / "train" / "finetune-gold-s0")["trials"] == []


def test_students_of_another_grid_are_not_taken_for_this_ones(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    train(
        annotated("train.methods=finetune", "train.tune.learning_rate=[0.01, 0.003]"),
        out=tmp_path / "run",
    )
    with pytest.raises(UserError, match="settings, labels or annotations have changed"):
        evaluate(
            annotated("train.methods=finetune", "train.tune.learning_rate=[0.01, 0.02]"),
            out=tmp_path / "run",
        )


def test_the_plan_counts_the_trials_once(annotated: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = annotated(GRID, "train.seeds=[0, 1]", "train.methods=finetune")
    assert [line["trials"] for line in training_run.planned(recipe, tmp_path / "run")] == [4, 0]


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ("{learning_rate: []}", "at least one value"),
        ("{}", "names no setting"),
        ("{learning_rate: [0.1, 0.1]}", "each value once"),
        ("{rationale_weight: [1, 1.0]}", "each value once"),
        ("{rationale_weight: [light]}", "balanced, or a mapping"),
        ("{max_steps: [3], max_epochs: [1]}", "exclude each other"),
        ("{batch_size: [4, 6]}", "multiple of train.micro_batch_size"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(
    toy: Callable[..., Path], tune: str, message: str, tmp_path: Path
) -> None:
    done = run_dsbs(
        "validate", str(toy()), f"train.tune={tune}", "train.micro_batch_size=4", cwd=tmp_path
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_setting_takes_the_place_of_the_sections_own() -> None:
    section = TrainSection(learning_rate=0.5, tune={"learning_rate": 0.25})  # type: ignore[arg-type]
    assert (
        section.tune is not None and section.tuned(section.tune.settings[0]).learning_rate == 0.25
    )


def test_a_setting_whose_loss_diverges_is_left_out(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    short = ("train.methods=finetune", "train.max_steps=4", "train.eval_every=2")
    says: list[str] = []
    progress = NoProgress()
    progress.say = says.append  # type: ignore[method-assign]
    recipe = annotated("train.tune.learning_rate=[1.0e+30, 0.003]", *short)
    (student,) = train(recipe, out=tmp_path / "run", progress=progress).students
    assert student.tuned == {"learning_rate": 0.003}
    assert any("learning_rate=1e+30: the loss is" in line for line in says)
    hopeless = annotated("train.tune.learning_rate=[1.0e+30]", *short)
    with pytest.raises(DsbsError, match="diverged with every setting") as ended:
        train(hopeless, out=tmp_path / "run")
    assert "train.tune.learning_rate" in ended.value.hint
