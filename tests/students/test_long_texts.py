"""Texts longer than a student reads: the part that `task.max_input` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import causal_models
import pytest
from conftest import write_csv
from encoder_models import word_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from label_heads import save_encoder

from dsbs import Student, UserError, load_recipe, train
from dsbs.students.formats import input_format_of
from dsbs.students.long_texts import shortened, text_limit
from dsbs.students.tokenizer import learn_vocabulary

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
        (part,) = shortened([text], tokenizer, limit, strategy)
        if length(tokenizer, text) <= limit:
            assert part == text
            continue
        assert length(tokenizer, part) <= limit
        head, gap, tail = part.partition(" … ")
        assert text.startswith(head if gap else "") and text.endswith(tail if gap else head)


def test_the_limit_leaves_room_for_prefix_and_template() -> None:
    chat = input_format_of(TOKENIZERS["bytes"], "causal", "chat")
    template = len(chat.read(["explain: "])[0])
    assert text_limit("tail", chat, ["", "explain: "], template + 5) == 5
    assert text_limit("head", chat, [""], 3) is None
    with pytest.raises(UserError, match="leaves no tokens for the text"):
        text_limit("tail", chat, [""], 3)


def test_a_student_learns_and_predicts_from_the_end_of_its_texts(tmp_path: Path) -> None:
    ends = [("is wrong", "a"), ("is late", "b")]
    rows = [
        {"text": f"parcel {number} " + "and the invoice " * 6 + end, "team": team}
        for number in range(30)
        for end, team in ends
    ]
    write_csv(tmp_path / "train.csv", rows)
    model = save_encoder(tmp_path / "encoder", words=["parcel", "invoice", "late", "wrong", "and"])
    (tmp_path / "r.yaml").write_text(
        f"""
name: long
task:
  name: classification
  labels: [a, b]
  columns: {{label: team}}
  data: {{train: {tmp_path / "train.csv"}, valid_fraction: 0.3}}
  max_input: {{strategy: tail}}
teacher: {{kind: human}}
student: {{model: {model}, max_input_tokens: 8}}
train: {{methods: finetune, max_steps: 30, learning_rate: 0.01, batch_size: 8}}
"""
    )
    (trained,) = train(load_recipe(tmp_path / "r.yaml"), out=tmp_path / "run").students
    student = Student.load(trained.path)
    assert student.card.max_text_tokens == 6
    answers = student.predict([str(row["text"]) for row in rows])
    assert [answer.label for answer in answers] == [row["team"] for row in rows]
    head = load_recipe(tmp_path / "r.yaml", ["task.max_input.strategy=head"])
    (blind,) = train(head, out=tmp_path / "head").students
    blind_answers = Student.load(blind.path).predict([str(row["text"]) for row in rows])
    for first, second in zip(blind_answers[::2], blind_answers[1::2], strict=True):
        assert first.label == second.label, "their beginnings are the same"
