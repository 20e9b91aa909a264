"""What a vocabulary cannot say is told before training, in the characters that people typed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import toy_rows, write_csv

from dsbs import UserError, load_recipe, train, validate
from dsbs.config import StudentSection
from dsbs.progress import NoProgress
from dsbs.students.card import StudentCard
from dsbs.students.student import Student
from dsbs.students.tokenizer import learn_vocabulary, vocabulary_warnings
from dsbs.students.weights import new_model

PRETRAINED, SCRATCH = StudentSection(model="some/t5"), StudentSection()
# letters, digits and plain punctuation, as a T5's vocabulary has them; no braces, no < and no ~
PLAIN = [
    f"The man number {i} said: my invoice, or parcel, is wrong (very wrong). Billing? Zx qjk! é"
    for i in range(100)
]


@pytest.fixture(scope="module")
def t5_like() -> Any:
    return learn_vocabulary(PLAIN, 200)


@pytest.mark.parametrize("text", ["a" * 3_000_000, "Zx " * 1_000_000], ids=["word", "line"])
def test_a_vocabulary_is_learned_from_a_text_of_megabytes(text: str) -> None:
    tokenizer = learn_vocabulary([*PLAIN, text], 200)
    assert tokenizer.unk_token_id not in tokenizer("invoice 42 Zx aaaa")["input_ids"]


def test_text_within_the_vocabulary_gives_no_warning(t5_like: Any) -> None:
    texts = [
        "The parcel is wrong.",
        "is </s> wrong",
        "e\u0301",
        "my\u00a0invoice",
    ]  # an end token, a composed letter, a hard space
    assert (
        vocabulary_warnings(
            PRETRAINED, t5_like, ["billing", "very  wrong"], {"inputs": texts, "rationales": []}
        )
        == []
    )


def test_unknown_characters_are_named_with_the_share_of_the_texts(t5_like: Any) -> None:
    texts = ["{a}", "a {b", "x < y </s> z", *["plain"] * 7]
    (warning,) = vocabulary_warnings(PRETRAINED, t5_like, [], {"inputs": texts})
    assert (
        warning.startswith("30.0% of the inputs")
        and "'{' in 2, " in warning
        and "'}' in 1" in warning
        and "'<' in 1" in warning
    )
    assert "init: scratch" in warning and "'/'" not in warning


def test_line_breaks_are_told_as_spaces(t5_like: Any) -> None:
    (warning,) = vocabulary_warnings(
        PRETRAINED, t5_like, ["very\nwrong"], {"rationales": ["my\ninvoice", "wrong"]}
    )
    assert (
        warning.startswith("50.0% of the rationales")
        and r"'\n' in 1" in warning
        and "space" in warning
    )


def test_a_label_that_cannot_be_written_comes_first_and_says_what_becomes_of_it(
    t5_like: Any,
) -> None:
    first, second = vocabulary_warnings(
        PRETRAINED, t5_like, ["parcel", "{billing}", "a ~ b", "parcel"], {"inputs": ["{x}"]}
    )
    assert (
        first.startswith("the student can never write 2 of 3 labels")
        and "'a ~ b' becomes 'a  b'" in first
    )
    assert second.startswith("100.0% of the inputs")


def test_a_few_texts_in_thousands_are_not_worth_a_word(t5_like: Any) -> None:
    assert (
        vocabulary_warnings(PRETRAINED, t5_like, [], {"inputs": ["{x}", *["wrong"] * 1999]}) == []
    )


def test_a_scratch_student_is_not_told_to_be_one(t5_like: Any) -> None:
    (warning,) = vocabulary_warnings(SCRATCH, t5_like, [], {"inputs": ["{x}"]})
    assert "init: scratch" not in warning


class Told(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def pretrained(folder: Path, tokenizer: Any, recipe: Any) -> Path:
    card = StudentCard(
        name="s",
        method="finetune",
        labels="gold",
        seed=0,
        task=recipe.task,
        prefixes={"label": ""},
        max_input_tokens=64,
        max_target_tokens=32,
    )
    Student.of(new_model(StudentSection(vocab_size=200), tokenizer, 0), tokenizer, card).save(
        folder
    )
    return folder


def test_train_and_validate_warn_before_anything_else(
    toy: Callable[..., Path], tmp_path: Path, t5_like: Any
) -> None:
    path = toy(student={"init": None})
    rows = [
        row
        | {"text": "{" + row["text"] + "}", "team": row["team"].replace("shipping", "~shipping")}
        for row in toy_rows(40)
    ]
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", rows[:8])
    labels = "task.labels=[billing, ~shipping]"
    folder = pretrained(tmp_path / "t5", t5_like, load_recipe(path, [labels]))
    changes = [
        labels,
        f"student.model={folder}",
        "train.methods=finetune",
        "train.max_steps=1",
        "student.max_target_tokens=2",
    ]
    told = Told()
    train(load_recipe(path, changes), out=tmp_path / "run", progress=told)
    assert (
        told.lines[0].startswith("warning: the student can never write 1 of 2 labels")
        and "'~shipping' becomes" in told.lines[0]
    )
    assert told.lines[1].startswith("warning: 100.0% of the inputs") and "'{' in" in told.lines[1]
    assert told.lines[2].startswith(
        "warning: 100.0% of the label targets reach student.max_target_tokens (2)"
    )
    assert len(told.lines) == 3
    with pytest.raises(UserError, match="'~shipping' is written"):
        validate(load_recipe(path, changes))


def test_a_scratch_student_of_plain_data_is_trained_without_a_warning(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    told = Told()
    train(
        load_recipe(toy(), ["train.methods=finetune", "train.max_steps=1"]),
        out=tmp_path / "run",
        progress=told,
    )
    assert told.lines == []
