"""The student's own vocabulary, shape and memory of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsbs import DsbsError, Student, UserError
from dsbs.recipe import DataSection, StudentSection, TaskSection
from dsbs.student import StudentCard, learn_vocabulary, load_tokenizer, new_model, tokenizer_hash

TEXTS = [f"Premise {i}: a man with {i} dogs walks. ( {i}.0 * 2.0 ) {{x}}" for i in range(200)]


def make_student(seed: int = 0) -> Student:
    tokenizer = learn_vocabulary(TEXTS, 300)
    task = TaskSection(name="classification", labels=("a", "b"), data=DataSection(train="x.csv"))
    card = StudentCard(
        name="s", method="finetune", labels="gold", seed=seed, task=task, prefixes={"label": ""}, max_input_tokens=64,
        max_target_tokens=32,
    )  # fmt: skip
    return Student(new_model(StudentSection(vocab_size=300), tokenizer, seed), tokenizer, card)


def test_a_learned_vocabulary_knows_every_character_of_its_text_and_agrees_with_sentencepiece() -> None:
    tokenizer = learn_vocabulary(TEXTS, 300)
    assert 100 < len(tokenizer) <= 300
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text


def test_the_same_text_gives_the_same_vocabulary() -> None:
    assert tokenizer_hash(learn_vocabulary(TEXTS, 300)) == tokenizer_hash(learn_vocabulary(TEXTS, 300))
    assert tokenizer_hash(learn_vocabulary(TEXTS, 300)) != tokenizer_hash(learn_vocabulary(TEXTS[:100], 300))


def test_a_saved_student_loads_with_the_same_weights_and_tokenizer_and_answers_the_same(tmp_path: Path) -> None:
    student = make_student()
    student.save(tmp_path)
    loaded = Student.load(tmp_path)
    assert tokenizer_hash(loaded.tokenizer) == tokenizer_hash(student.tokenizer)
    before, after = student.predict(["a man walks", "dogs"]), loaded.predict(["a man walks", "dogs"])
    assert [a.raw for a in before] == [a.raw for a in after]
    assert loaded.card == student.card


def test_initial_weights_depend_on_the_seed_alone() -> None:
    a, b, c = make_student(0), make_student(0), make_student(1)
    name = "shared.weight"
    assert (a.model.state_dict()[name] == b.model.state_dict()[name]).all()
    assert not (a.model.state_dict()[name] == c.model.state_dict()[name]).all()


def test_batches_do_not_change_answers_or_their_order() -> None:
    student = make_student()
    texts = ["dogs", "a man with 7 dogs walks", "x", "Premise 3: a man"]
    assert [a.raw for a in student.predict(texts, batch_size=1)] == [a.raw for a in student.predict(texts, batch_size=4)]


def test_a_pretrained_student_comes_from_a_local_folder(tmp_path: Path) -> None:
    make_student().save(tmp_path)
    section = StudentSection(model=str(tmp_path))
    tokenizer = load_tokenizer(str(tmp_path))
    model = new_model(section, tokenizer, seed=5)
    assert model.config.vocab_size == len(tokenizer)


def test_sizes_have_about_the_parameters_they_promise() -> None:
    counts = {}
    tokenizer = learn_vocabulary(TEXTS, 300)
    for size in ("nano", "mini", "small"):
        model = new_model(StudentSection(size=size), tokenizer, 0)
        counts[size] = sum(p.numel() for p in model.parameters()) / 1e6 + (4000 - len(tokenizer)) * model.config.d_model / 1e6
    assert 1.5 < counts["nano"] < 2.5 and 9 < counts["mini"] < 13 and 30 < counts["small"] < 50, counts


def test_a_folder_without_a_student_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no student"):
        Student.load(tmp_path)


def test_a_model_that_cannot_be_loaded_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DsbsError, match="local folder"):
        load_tokenizer(str(tmp_path))


def test_tokenizing_needs_no_torch() -> None:
    code = (
        "import sys; from dsbs.student import learn_vocabulary; "
        "learn_vocabulary([f'line {i} of text' for i in range(99)], 80)(['x']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
