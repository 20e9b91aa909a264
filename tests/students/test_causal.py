"""Decoder-only students write greedily, the same in every batch, up to their end token."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import causal_models
import pytest
import torch

from dsbs import Student, UserError
from dsbs.students.tokenizer import load_tokenizer, tokenizer_hash

TEXTS = [
    "My parcel number 3 is wrong.",
    "invoice",
    "My invoice is wrong, and my parcel as well, so is all the rest.",
    "x y",
]


@pytest.fixture(scope="module", params=["chat", "plain", "gpt2"])
def taught(request: pytest.FixtureRequest) -> Student:
    return (
        causal_models.trained_student("chat", "gpt2")
        if request.param == "gpt2"
        else causal_models.trained_student(request.param)
    )


def forced(student: Student, text: str, most: int) -> tuple[str, float, bool]:
    """Text, probability and whether it ended, with one forward pass per token and no cache."""
    engine: Any = student.backend
    (ids,) = engine.input_format.read([text], student.card.max_input_tokens)
    own: list[int] = []
    total = 0.0
    with torch.inference_mode():
        while len(own) < most and (not own or own[-1] not in engine.input_format.stops):
            logits = engine.model(input_ids=torch.tensor([[*ids, *own]])).logits[0, -1]
            own.append(int(logits.argmax()))
            total += float(torch.log_softmax(logits.double(), -1)[own[-1]])
    ended = own[-1] in engine.input_format.stops
    return (
        engine.tokenizer.decode(own[: len(own) - ended], skip_special_tokens=True).strip(),
        math.exp(total),
        ended,
    )


def test_a_label_has_the_tokens_of_the_students_own_limit(taught: Student) -> None:
    free = taught.predict(TEXTS)
    card = taught.card
    taught.card = card.model_copy(update={"max_label_tokens": 1})
    try:
        cut = taught.predict(TEXTS)
        assert [answer.truncated for answer in cut] == [True] * 4
        assert [answer.raw for answer in taught.predict(TEXTS, max_label_tokens=64)] == [
            answer.raw for answer in free
        ]
        assert taught.card.model_dump()["max_label_tokens"] == 1
    finally:
        taught.card = card
    assert "max_label_tokens" not in card.model_dump(), "the default is not written"
    for single in (TEXTS[0], {"text": TEXTS[0]}):
        with pytest.raises(UserError, match="a list of texts or rows"):
            taught.predict(single)  # type: ignore[arg-type]


def test_texts_are_cut_at_their_end_whatever_the_tokenizer_says(tmp_path: Path) -> None:
    folder = causal_models.save(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"truncation_side": "left"}
    file.write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    whole = tokenizer(TEXTS[2])["input_ids"]
    assert tokenizer(TEXTS[2], truncation=True, max_length=5)["input_ids"] == whole[:5]


@pytest.mark.parametrize("budget", [1, 2, 16])
def test_texts_and_probabilities_are_those_of_tokens_one_by_one_in_every_batch(
    taught: Student, budget: int
) -> None:
    for size in (1, 2, 4):
        written = taught.generate(TEXTS, budget, size, probabilities=True)
        for text, one in zip(TEXTS, written, strict=True):
            said, probability, ended = forced(taught, text, budget)
            assert one.text == said and one.truncated is not ended
            assert one.probability == pytest.approx(probability, abs=1e-5) and 0 < probability < 1
    if budget == 16:
        assert not all(one.truncated for one in written), (
            "none came to its end: nothing after it was left out"
        )
    assert [one.probability for one in taught.generate(TEXTS, budget, 4)] == [None] * 4


def test_a_models_own_ways_of_sampling_do_not_reach_its_answers(
    taught: Student, tmp_path: Path
) -> None:
    taught.save(tmp_path)
    taught.backend.model.generation_config.save_pretrained(tmp_path)
    config = (tmp_path / "generation_config.json").read_text(encoding="utf-8")
    hot = config.replace(
        "{", '{"do_sample": true, "temperature": 9.0, "repetition_penalty": 5.0,', 1
    )
    (tmp_path / "generation_config.json").write_text(hot, encoding="utf-8")
    loaded = Student.load(tmp_path)
    assert [one.text for one in loaded.generate(TEXTS, 16, 4)] == [
        one.text for one in taught.generate(TEXTS, 16, 4)
    ]


def test_a_saved_student_loads_with_the_same_weights_and_answers_the_same(
    taught: Student, tmp_path: Path
) -> None:
    taught.save(tmp_path)
    loaded = Student.load(tmp_path)
    assert loaded.card == taught.card and loaded.backend.parameters == taught.backend.parameters
    assert tokenizer_hash(loaded.backend.tokenizer) == tokenizer_hash(taught.backend.tokenizer)
    for a, b in zip(loaded.predict(TEXTS), taught.predict(TEXTS), strict=True):
        assert (a.raw, a.label, a.probability, a.truncated) == (
            b.raw,
            b.label,
            b.probability,
            b.truncated,
        )


def test_what_is_saved_stops_where_the_student_does_in_transformers_alone(
    taught: Student, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    taught.save(tmp_path)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    ids = taught.backend.input_format.read(TEXTS[:1])  # type: ignore[attr-defined]
    made = model.generate(
        torch.tensor(ids), attention_mask=torch.ones(1, len(ids[0])), max_new_tokens=16
    )[0, len(ids[0]) :]
    (one,) = taught.generate(TEXTS[:1], 16, 1)
    assert tokenizer.decode(made, skip_special_tokens=True).strip() == one.text


def test_inputs_are_cut_at_the_cards_limit(taught: Student) -> None:
    long = TEXTS[2] * 20
    engine: Any = taught.backend
    (kept,) = engine.input_format.read([long], 48)
    assert len(kept) == 48
    assert [one.text for one in taught.generate([long], 8, 1)] == [forced(taught, long, 8)[0]]


def test_a_byte_level_vocabulary_loses_nothing(tmp_path: Path) -> None:
    from dsbs.config import StudentSection
    from dsbs.students.tokenizer import vocabulary_warnings

    folder = causal_models.save(tmp_path / "model")
    texts = {"inputs": ["two\nlines\tand 駅 {x} <y> ~ é"] * 9}
    assert (
        vocabulary_warnings(
            StudentSection(model=folder), load_tokenizer(folder), ["rücksendung", "a\nb"], texts
        )
        == []
    )
