"""Terms of decoder-only students and teachers that read other tokens, from recipe to metrics."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import causal_models
import encoder_models
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, TEAMS, toy_rows, write_csv
from safetensors.torch import save_file
from tiny_training import VIEWS, loss_lines
from transformers import LlamaConfig, LlamaForCausalLM

from dsbs import Student, UserError, load_recipe, train, validate
from dsbs.config import TrainSection
from dsbs.project import machine
from dsbs.students.card import count_parameters, read_card
from dsbs.training.distillation.local_teachers import (
    LocalTeacher,
    add_own_inputs,
    teacher_runners,
)
from dsbs.training.distillation.own_inputs import OwnInputs
from dsbs.training.encode import collate
from dsbs.training.losses import IGNORED

UNWRITTEN = "{kind: labels, source: teachers}, {kind: feature}, {kind: relation}"
TERMS = (
    f"train.terms=[{UNWRITTEN}, {{kind: response, temperature: 2.0}}, "
    "{kind: response, name: kept, temperature: 2.0, top_k: 400}]"
)
ALL = "finetune+response+labels+feature+relation+kept"


@pytest.fixture
def decoder(toy: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Recipes of a tiny Llama on the toy data."""
    folder = causal_models.save(tmp_path / "student")
    student = f"student={{model: {folder}, max_input_tokens: 64, max_target_tokens: 32}}"
    path = toy()
    changes = [student, "train.methods=finetune", "train.max_steps=2", "eval.max_label_tokens=2"]
    return lambda *overrides: load_recipe(path, [*changes, *overrides])


def deeper(folder: Path, **tokenizer: Any) -> str:
    """A Llama with three layers of another width, and the student's tokenizer by default."""
    bpe = causal_models.tokenizer(**tokenizer)
    torch.manual_seed(5)
    shape = causal_models.SHAPE | {"hidden_size": 48, "num_hidden_layers": 3}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(bpe) + 4, **shape)).save_pretrained(folder)
    bpe.save_pretrained(folder)
    return str(folder)


def test_a_decoder_learns_every_term_from_a_larger_one(
    decoder: Callable[..., Any], tmp_path: Path
) -> None:
    teacher = f"train.teachers=[{{start: {deeper(tmp_path / 'teacher')}, max_steps: 1}}]"
    recipe = decoder(TERMS, teacher, f"train.methods={ALL}", "report.trackers=[tensorboard]")
    validate(recipe)
    result = train(recipe, out=tmp_path / "run")
    folder = Path(result.students[0].path)
    assert [teacher.name for teacher in result.teachers] == ["1-teacher-finetune-gold"]
    lines = loss_lines(folder)
    for line in lines:
        assert all(line[f"{term}_loss"] > 0 for term in ALL.split("+")[1:])
        assert line["kept_loss"] == pytest.approx(line["response_loss"], rel=1e-4), "all tokens"
    parameters = sum(weights.numel() for weights in causal_models.model().parameters())
    assert result.students[0].parameters == parameters, "no projection is left"
    board = b"".join(path.read_bytes() for path in (folder / "tensorboard").rglob("events*"))
    assert all(term.encode() in board for term in ALL.split("+")[1:])


def test_another_vocabulary_is_refused_for_written_tokens_alone(
    decoder: Callable[..., Any], tmp_path: Path
) -> None:
    texts = [f"{row['text'][::-1]} zebra" for row in toy_rows(60)]
    teacher = f"train.teachers=[{{start: {deeper(tmp_path / 'other', texts=texts)}, max_steps: 1}}]"
    message = r"response compares .* every written token, .*other has a different vocabulary"
    with pytest.raises(UserError, match=message) as refusal:
        validate(decoder(TERMS, teacher, f"train.methods={ALL}"))
    assert re.search(r"source: teachers.*trl", str(refusal.value))
    with pytest.raises(UserError, match=message):
        train(decoder(TERMS, teacher, f"train.methods=[finetune, {ALL}]"), out=tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors")), "refused before any training"
    terms = f"train.terms=[{UNWRITTEN}]"
    allowed = decoder(terms, teacher, "train.methods=finetune+labels+feature+relation")
    validate(allowed)
    (student,) = train(allowed, out=tmp_path / "run").students
    (line, *_) = loss_lines(Path(student.path))
    assert all(line[f"{term}_loss"] > 0 for term in ("labels", "feature", "relation"))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{size: nano}", "a teacher from scratch is a T5, and the student is a decoder-only model"),
        ("{model: ENCODER}", "is an encoder, and the student a decoder-only model"),
    ],
)
def test_a_teacher_of_another_kind_is_refused_where_tokens_are_compared(
    decoder: Callable[..., Any], tmp_path: Path, teacher: str, message: str
) -> None:
    folder = encoder_models.save_label_head(tmp_path / "encoder")
    entry = teacher.replace("ENCODER", str(folder))
    recipe = decoder(TERMS, f"train.teachers=[{entry}]", f"train.methods={ALL}")
    with pytest.raises(UserError, match=message):
        validate(recipe)


def test_an_encoder_teaches_a_decoder_what_is_not_written(
    decoder: Callable[..., Any], tmp_path: Path
) -> None:
    folder = encoder_models.save_label_head(tmp_path / "encoder")
    recipe = decoder(
        f"train.terms=[{UNWRITTEN}]",
        f"train.teachers=[{{model: {folder}}}]",
        "train.methods=finetune+labels+feature+relation",
    )
    (student,) = train(recipe, out=tmp_path / "run").students
    (line, *_) = loss_lines(Path(student.path))
    assert all(line[f"{term}_loss"] > 0 for term in ("labels", "feature", "relation"))


def test_a_teacher_with_own_inputs_gives_the_distributions_that_it_predicts(
    tmp_path: Path,
) -> None:
    folder = encoder_models.save_label_head(tmp_path / "encoder")
    texts = encoder_models.texts(5)
    own = OwnInputs(str(folder), read_card(folder), TEAMS)
    teacher = LocalTeacher("teacher", folder, 1.0, "fingerprint", own_inputs=own)
    ids = [[7 + i, 3] for i in range(5)]
    own.add([np.array(source, np.int64).tobytes() for source in ids], texts)
    rows: list[Any] = [{"label": [(source, [1])]} for source in ids]
    batch = collate([*rows, {"label": [([9, 9, 9], [IGNORED])]}])
    add_own_inputs([teacher], batch["label"])
    (runner,) = teacher_runners(
        [teacher], VIEWS, TrainSection(), "cpu", hidden_states=True, scores_labels=True
    )
    output = runner(batch)
    assert output.label_scores is not None
    student = Student.load(folder)
    for scores, answer in zip(output.label_scores, student.predict(texts), strict=False):
        assert answer.distribution is not None
        assert scores.exp().tolist() == pytest.approx(list(answer.distribution.values()), rel=1e-4)
    assert output.example_means(-1).shape == (5, 16), "without the filler"
    empty = runner({"rationale": batch["label"]})
    assert empty.label_scores is None


def test_two_models_that_do_not_fit_are_refused_with_numbers(
    decoder: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deeper(tmp_path / "teacher")
    assert count_parameters(folder) == sum(
        weights.numel() for weights in LlamaForCausalLM.from_pretrained(folder).parameters()
    )
    weights = LlamaForCausalLM.from_pretrained(folder)
    torch.save(weights.state_dict(), tmp_path / "teacher" / "pytorch_model.bin")
    save_file({"weight": torch.zeros(3, 5)}, str(tmp_path / "teacher" / "more.safetensors"))
    whole = count_parameters(folder)
    assert whole == sum(weight.numel() for weight in weights.parameters()), "once, in one form"
    for file in (tmp_path / "teacher").glob("*.safetensors"):
        file.rename(file.with_suffix(".away"))
    assert count_parameters(folder) == pytest.approx(whole, rel=0.2), "by the size of the pickle"
    for file in (tmp_path / "teacher").glob("*.away"):
        file.rename(file.with_suffix(".safetensors"))
    monkeypatch.setattr(machine, "count_parameters", lambda source: int(1e9))
    monkeypatch.setattr(machine, "training_memory", lambda: (int(18e9), "this machine"))
    terms = ("train.terms=[{kind: response}]", "train.methods=finetune+response")
    teacher = f"train.teachers=[{{start: {folder}}}]"
    message = (
        r"the student 16\.0 GB \(1,000 million parameters of 16 bytes\) and a teacher 4\.0 GB .*"
        r"need 20\.0 GB before any activation, and this machine has 18\.0 GB"
    )
    with pytest.raises(UserError, match=message):
        validate(decoder(*terms, teacher))
    for change in ("train.lora={}", "train.optimizer=adafactor"):
        machine.check_memory(decoder(*terms, teacher, change))
    kept = "train.terms=[{kind: response, top_k: 8}]"
    machine.check_memory(decoder(kept, terms[1], teacher))
    machine.check_memory(decoder())


def test_the_recipe_of_two_decoders_in_the_documentation_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "distillation-terms.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(name: two-decoders\n.*?)```", text, re.DOTALL)
    assert len(block.splitlines()) <= 10
    write_csv(tmp_path / "tickets.csv", toy_rows(48))
    folders = {
        "HuggingFaceTB/SmolLM2-135M": causal_models.save(tmp_path / "small", chat=False),
        "HuggingFaceTB/SmolLM2-360M": deeper(tmp_path / "large", chat=False),
        "tickets.csv": str(tmp_path / "tickets.csv"),
    }
    for name, folder in folders.items():
        assert name in block
        block = block.replace(name, folder)
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(yaml.safe_load(block)), encoding="utf-8")
    short = ["student.max_input_tokens=64", "student.max_target_tokens=16"]
    recipe = load_recipe(path, [*short, "train.max_epochs=1", "eval.max_label_tokens=2"])
    students = train(recipe, out=tmp_path / "run").students
    assert [student.method for student in students] == ["finetune", "finetune+response"]
    line = loss_lines(Path(students[1].path))[0]
    term = recipe.train.terms[0]
    total = line["label_loss"] + term.weight * line["response_loss"]
    assert line["loss"] == pytest.approx(total, rel=1e-3)
