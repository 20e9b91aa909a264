"""Students of several labels and of a scale, served: answers are JSON, and completions text."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from encoder_models import encoder, sharpen, word_tokenizer
from serving.test_served_label_head import TEXT, answers
from several_labels import TASKS

from dsbs.config import TaskSection
from dsbs.serving.chat_completions import ChatForm
from dsbs.serving.model import Item, Model
from dsbs.serving.settings import ApiError, Settings
from dsbs.students.card import StudentCard
from dsbs.students.heads import LabelHeadModel
from dsbs.students.student import Answer, Student
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
    schema = {"type": "object", "properties": {"answer": {}}}
    asked: dict[str, Any] = {"type": "json_schema", "json_schema": {"schema": schema}}
    wrong = {"json_schema": {"schema": {"properties": {"a": {}, "b": {}}}}}
    predicted, chatted, scored, bare, wrapped, refused = answers(
        student,
        ("/predict", {"inputs": [TEXT]}),
        ("/v1/chat/completions", {"messages": message}),
        ("/v1/completions", {"prompt": TEXT, "logprobs": 2}),
        ("/v1/completions", {"prompt": TEXT, "response_format": {"type": "json_object"}}),
        ("/v1/chat/completions", {"messages": message, "response_format": asked}),
        ("/v1/chat/completions", {"messages": message, "response_format": asked | wrong}),
    )
    assert json.loads(bare[1]["choices"][0]["text"]) == expected.value
    content = json.loads(wrapped[1]["choices"][0]["message"]["content"])
    assert content == {"answer": expected.value}
    assert refused[0] == 400 and "the schema has a, b" in refused[1]["error"]["message"]
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


def test_fields_are_an_object_where_the_client_asks_for_json() -> None:
    student = head_student("multilabel")
    student.task = make_task(
        TaskSection.model_validate(TASKS["extraction"] | {"data": {"train": "none.csv"}})
    )
    model = Model(student, Settings())
    label = "kind: box\nnumber: null"

    def text(json_names: tuple[str, ...] | None, read: str | None = label) -> str:
        value = None if read is None else student.task.value(read)
        answer = Answer(label, read, None, False, "So.", None, 0.0, value=value)
        options = replace(model.completion_options(None), predicts=False)
        item = Item(TEXT, answer=answer, json_names=json_names)
        (outcome,) = model.answer([item], options)
        assert outcome.completion is not None and outcome.completion.finish_reason == "stop"
        return outcome.completion.text

    def names(*properties: str, explains: bool = False) -> tuple[str, ...] | None:
        schema = {"properties": {name: {"type": "string"} for name in properties}}
        form = ChatForm(
            messages=[],
            response_format={"type": "json_schema", "json_schema": {"schema": schema}},
        )
        return form.json_names(student.task, explains=explains)

    assert text(None).split() == label.split()
    assert json.loads(text(names("number", "kind"))) == {"kind": "box", "number": None}
    wrapped = json.loads(text(names("rationale", "label", explains=True)))
    assert wrapped == {"rationale": "So.", "label": {"kind": "box", "number": None}}
    assert text(names(), None) == "null"
    assert names("answer") == ("answer",)
    for wrong in (("kind",), ("kind", "size"), ("kind", "number", "size"), ("rationale",)):
        with pytest.raises(ApiError, match="fields kind, number"):
            names(*wrong, explains=True)
    with pytest.raises(ApiError, match="step-by-step"):
        names("rationale", "label")
    assert ChatForm(messages=[]).json_names(student.task, explains=False) is None
    empty = {"type": "json_schema", "json_schema": 3}
    form = ChatForm(messages=[], response_format=empty)
    assert form.json_names(student.task, explains=False) == ()
    for garbage in ({"type": "xml"}, {}, 3, "json_object", ["text"]):
        form = ChatForm(messages=[], response_format=garbage)
        with pytest.raises(ApiError, match="response_format"):
            form.json_names(student.task, explains=False)
