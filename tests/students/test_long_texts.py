"""Texts longer than a student reads: the part that `task.max_input` names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import causal_models
import numpy as np
import pytest
import torch
from conftest import write_csv
from encoder_models import word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from label_heads import label_head, save_encoder

from dsbs import Student, UserError, load_recipe, train, validate
from dsbs.config.task import MaxInputSection
from dsbs.progress import NoProgress
from dsbs.students.formats import input_format_of
from dsbs.students.long_texts import WINDOW_SEPARATOR, shortened, text_limit
from dsbs.students.tokenizer import learn_vocabulary
from dsbs.training.encode import collate
from dsbs.training.methods import View
from dsbs.training.packed.label_head import LabelHeadRunner

TOKENIZERS = {
    "words": word_tokenizer(),
    "pieces": learn_vocabulary(["my parcel is late and the invoice is wrong"] * 30, 100),
    "bytes": causal_models.tokenizer(),
}


def length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


@given(
    st.lists(st.sampled_from(["parcel", "late", "the", "invoice", "é", "你好", "!"]), max_size=60),
    st.sampled_from(sorted(TOKENIZERS)),
    st.integers(3, 40),
)
def test_a_long_text_keeps_its_ends(words: list[str], name: str, limit: int) -> None:
    tokenizer = TOKENIZERS[name]
    text = " ".join(words)
    for strategy in ("tail", "head+tail"):
        (part,) = shortened([text], tokenizer, limit, MaxInputSection(strategy=strategy))
        if length(tokenizer, text) <= limit:
            assert part == text
            continue
        assert length(tokenizer, part) <= limit
        head, gap, tail = part.partition(" … ")
        assert text.startswith(head if gap else "") and text.endswith(tail if gap else head)


@given(st.lists(st.sampled_from(["parcel", "late", "é", "!"]), max_size=60), st.integers(3, 20))
def test_windows_are_the_text_in_parts(words: list[str], limit: int) -> None:
    tokenizer = TOKENIZERS["words"]
    text = " ".join(words)
    section = MaxInputSection(strategy="windows", windows=3)
    windows = shortened([text], tokenizer, limit, section)[0].split(WINDOW_SEPARATOR)
    assert [word for window in windows for word in window.split()] == words[: 3 * limit]
    assert all(length(tokenizer, window) <= limit for window in windows)


def test_the_limit_leaves_room_for_prefix_and_template() -> None:
    chat = input_format_of(TOKENIZERS["bytes"], "causal", "chat")
    template = len(chat.read(["explain: "])[0])
    assert text_limit("tail", chat, ["", "explain: "], template + 5) == 5
    assert text_limit("head", chat, [""], 3) is None
    with pytest.raises(UserError, match="leaves no tokens for the text"):
        text_limit("tail", chat, [""], 3)


ENDS = [("is wrong", "a"), ("is late", "b")]
ROWS = [
    {"text": f"parcel {number} " + "and the invoice " * 6 + end, "team": team}
    for number in range(30)
    for end, team in ENDS
]
TEXTS = [row["text"] for row in ROWS]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A recipe whose student reads a few words of texts that differ in their last ones."""
    write_csv(tmp_path / "train.csv", ROWS)
    model = save_encoder(tmp_path / "encoder", words=["parcel", "invoice", "late", "wrong", "and"])
    recipe = {
        "name": "long",
        "task": {
            "name": "classification",
            "labels": ["a", "b"],
            "columns": {"label": "team"},
            "data": {"train": str(tmp_path / "train.csv"), "valid_fraction": 0.3},
        },
        "teacher": {"kind": "human"},
        "student": {"model": model, "max_input_tokens": 8},
        "train": {
            "methods": "finetune", "max_steps": 30, "learning_rate": 0.01, "batch_size": 8,
            "micro_batch_size": 4,
        },
    }  # fmt: skip
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    return tmp_path / "r.yaml"


def student(path: Path, *overrides: str) -> Student:
    (trained,) = train(load_recipe(path, overrides), out=path.parent / "run").students
    return Student.load(trained.path)


@pytest.mark.parametrize("strategy", ["tail", "windows"])
def test_a_student_learns_from_the_end_of_its_texts(path: Path, strategy: str) -> None:
    reader = student(path, f"task.max_input.strategy={strategy}", "train.max_steps=80")
    assert reader.card.max_text_tokens == 6
    answers = reader.predict(TEXTS)
    pairs = zip(answers, ROWS, strict=True)
    assert sum(answer.label == row["team"] for answer, row in pairs) > 0.75 * len(ROWS)
    (alone,) = reader.predict(TEXTS[:1])
    assert alone.probability == pytest.approx(answers[0].probability, abs=1e-5)


@pytest.mark.parametrize(("strategy", "is_cut"), [("tail", True), ("windows", False)])
def test_texts_that_windows_read_whole_are_not_said_to_be_cut(
    path: Path, strategy: str, is_cut: bool
) -> None:
    recipe = load_recipe(path, [f"task.max_input.strategy={strategy}", "train.max_steps=1"])
    said: list[str] = []
    progress = NoProgress()
    progress.say = said.append  # type: ignore[method-assign]
    train(recipe, out=path.parent / "run", progress=progress)
    assert any("longer ones are cut" in text for text in said) == is_cut
    assert any("are truncated" in warning for warning in validate(recipe).warnings) == is_cut


def test_without_it_the_end_is_not_read(path: Path) -> None:
    answers = student(path).predict(TEXTS)
    for first, second in zip(answers[::2], answers[1::2], strict=True):
        assert first.label == second.label, "their beginnings are the same"


def test_the_loss_of_windows_is_that_of_their_tokens_mean_state() -> None:
    model = label_head("bert").double().eval()
    views = (View("label", "", "pad"),)
    windows = [[[5, 6, 7], [8, 9]], [[10, 11, 12, 13]], [[14], [15, 16], [17, 18, 19]]]
    classes = [2, 0, 1]
    encoded = [
        {"label": [(np.array(ids), np.array([label])) for ids in row]}
        for row, label in zip(windows, classes, strict=True)
    ]
    expected = 0.0
    for row, label in zip(windows, classes, strict=True):
        states = [model.states(torch.tensor([ids]), torch.ones(1, len(ids)))[0] for ids in row]
        logits = model.classifier(torch.cat(states).mean(0))
        expected += (torch.logsumexp(logits, 0) - logits[label]).item()
    for without_padding in (True, False):
        runner = LabelHeadRunner(model, views, without_padding=without_padding, reads_windows=True)
        parts = [collate(encoded), collate(encoded[:1]), collate(encoded[1:])]
        whole, first, rest = (float(runner.run(part)[0]["label"]) for part in parts)
        assert whole == pytest.approx(expected, abs=1e-9)
        assert first + rest == pytest.approx(expected, abs=1e-9)
        assert runner.label_count(parts[0]["label"]) == 3


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["student={init: scratch}"], "windows needs a label head"),
        (
            ["train.terms=[{kind: labels}]", "train.methods=finetune+labels"],
            "supports no train.terms",
        ),
        (["student.max_input_tokens=2"], "leaves no tokens for the text"),
        (["task.max_input.windows=1"], "greater than or equal to 2"),
    ],
)
def test_what_windows_do_not_go_with(path: Path, overrides: list[str], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        student(path, "task.max_input.strategy=windows", *overrides)
