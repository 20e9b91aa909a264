"""Students of several labels and of a scale, served: answers are JSON, and completions text."""

from __future__ import annotations

from typing import Any

import pytest
from encoder_models import encoder, sharpen, word_tokenizer
from serving.test_served_label_head import TEXT, answers
from several_labels import TASKS

from dsbs.config import TaskSection
from dsbs.students.card import StudentCard
from dsbs.students.heads import LabelHeadModel
from dsbs.students.student import Student
from dsbs.tasks import make_task


def head_student(kind: str) -> Student:
    """A student with random weights and a label head."""
    section = TaskSection.model_validate(TASKS[kind] | {"data": {"train": "none.csv"}})
    classes = make_task(section).head_labels
    tokenizer = word_tokenizer()
    model = LabelHeadModel(encoder("bert", len(tokenizer)), len(classes), "encoder")
    sharpen(model)
    card = StudentCard(
        name="tiny",
        method="finetune",
        labels="gold",
        seed=0,
        task=section,
        prefixes={"label": ""},
        max_input_tokens=24,
        max_target_tokens=12,
        kind="encoder",
        head="labels",
        classes=classes,
    )
    return Student.of(model, tokenizer, card)


@pytest.mark.parametrize("kind", ["multilabel", "score"])
def test_labels_are_json_and_completions_their_text(kind: str) -> None:
    student = head_student(kind)
    (expected,) = student.predict([TEXT])
    message: list[dict[str, Any]] = [{"role": "user", "content": TEXT}]
    predicted, chatted, scored = answers(
        student,
        ("/predict", {"inputs": [TEXT]}),
        ("/v1/chat/completions", {"messages": message}),
        ("/v1/completions", {"prompt": TEXT, "logprobs": 2}),
    )
    (prediction,) = predicted[1]["predictions"]
    assert isinstance(prediction["label"], list if kind == "multilabel" else int)
    assert prediction["label"] == expected.value and prediction["raw"] == expected.label
    assert prediction["distribution"] == pytest.approx(expected.distribution)
    assert chatted[1]["choices"][0]["message"]["content"] == expected.label
    if kind == "multilabel":
        assert scored[0] == 400, "the labels of a row are no single token"
        assert "expected_number" not in prediction
    else:
        assert prediction["expected_number"] == pytest.approx(expected.expected_number)
        logprobs = scored[1]["choices"][0]["logprobs"]
        assert logprobs["tokens"] == [expected.label], "not the likeliest point"
        assert len(logprobs["top_logprobs"][0]) == 2
