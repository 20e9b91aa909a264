"""Scoring every label of a closed set with students that write their label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from causal_models import LABELS, TEXTS, trained_student
from conftest import toy_rows
from encoder_models import label_head_student

from dsbs import UserError
from dsbs.config import DataSection, StudentSection, TaskSection
from dsbs.students.backends import scoring
from dsbs.students.card import StudentCard, Target
from dsbs.students.novelty import Novelty
from dsbs.students.student import Student
from dsbs.students.tokenizer import learn_vocabulary
from dsbs.students.weights import new_model
from dsbs.training.validation import novelty_of


def t5_student(
    prefixes: dict[Target, str] | None = None, task: TaskSection | None = None
) -> Student:
    """A T5 with random weights, whose outputs are not labels."""
    tokenizer = learn_vocabulary([row["text"] for row in toy_rows(80)], 200)
    card = StudentCard(
        name="s",
        method="finetune",
        labels="gold",
        seed=0,
        task=task
        or TaskSection(name="classification", labels=LABELS, data=DataSection(train="x.csv")),
        prefixes=prefixes or {"label": "predict: "},
        max_input_tokens=48,
        max_target_tokens=16,
    )
    return Student.of(new_model(StudentSection(vocab_size=200), tokenizer, 0), tokenizer, card)


def one_by_one(student: Student, texts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
    """The log-probability of each answer, a pass for each, without padding or cache."""
    engine: Any = student.backend
    scores = []
    for text in texts:
        row = []
        for answer in answers:
            if student.card.kind == "causal":
                (source,) = engine.input_format.read([text], 48)
                (target,) = engine.input_format.write([answer])
                with torch.no_grad():
                    logits = engine.model(input_ids=torch.tensor([source + target])).logits[0]
                logits = logits[len(source) - 1 : -1]
            else:
                source = engine.tokenizer(text, truncation=True, max_length=48)["input_ids"]
                target = engine.tokenizer(answer)["input_ids"]
                with torch.no_grad():
                    logits = engine.model(
                        input_ids=torch.tensor([source]), labels=torch.tensor([target])
                    ).logits[0]
            log_probabilities = logits.double().log_softmax(-1)
            row.append(sum(float(log_probabilities[i, t]) for i, t in enumerate(target)))
        scores.append(row)
    return scores


@pytest.fixture(scope="module")
def decoder() -> Student:
    return trained_student()


@pytest.mark.parametrize("together", [256, 2])
@pytest.mark.parametrize("kind", ["t5", "causal", "causal-plain", "gpt2", "lfm2", "mamba"])
def test_scores_equal_a_pass_for_each_answer(
    kind: str, together: int, decoder: Student, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SCORED_TOGETHER", together)
    students = {
        "t5": t5_student,
        "causal": lambda: decoder,
        "causal-plain": lambda: trained_student("plain", "qwen3"),
        "gpt2": lambda: trained_student("plain", "gpt2"),
        "lfm2": lambda: trained_student("plain", "lfm2"),
        "mamba": lambda: trained_student("plain", "mamba"),
    }
    student = students[kind]()
    student.backend.model.eval()
    texts = ["My invoice", TEXTS[3], "x", TEXTS[8][:30]]
    scores = student.backend.score(texts, LABELS)  # type: ignore[attr-defined]
    for row, expected in zip(scores, one_by_one(student, texts, LABELS), strict=True):
        assert row == pytest.approx(expected, abs=2e-4)


def test_the_written_label_has_its_share_of_the_distribution(decoder: Student) -> None:
    texts = TEXTS[:12]
    plain = decoder.predict(texts)
    scored = decoder.predict(texts, score_labels=True, batch_size=5)
    for before, after in zip(plain, scored, strict=True):
        assert before.distribution is None and after.distribution is not None
        assert after.raw == before.raw and sum(after.distribution.values()) == pytest.approx(1)
        assert set(after.distribution) == set(LABELS)
        if before.label is None:
            assert after.label == max(after.distribution, key=after.distribution.__getitem__)
            continue
        assert after.label == before.label
        assert after.probability == after.distribution[before.label]
        assert before.probability is not None
        assert after.probability >= before.probability - 1e-6, "the labels' shares sum to one"
        if before.raw == before.label:
            (scores,) = decoder.backend.score([texts[plain.index(before)]], LABELS)  # type: ignore[attr-defined]
            joint = math.exp(scores[LABELS.index(before.label)])
            assert joint == pytest.approx(before.probability, rel=1e-3)


def test_pooled_states_are_a_row_each_whatever_the_batch(decoder: Student) -> None:
    rows = [{"text": text} for text in TEXTS[:7]]
    for student in (t5_student(), decoder, trained_student("plain", "gpt2")):
        states = student.pooled_states(rows)
        assert states.shape == (7, student.backend.model.config.hidden_size)
        assert states == pytest.approx(student.pooled_states(rows, batch_size=1), abs=1e-5)
        assert len({tuple(row.round(4)) for row in states}) == 7


def test_an_unreadable_label_becomes_the_likeliest_one() -> None:
    student = t5_student()
    (before,) = student.predict(["My invoice number 7 is wrong."], max_label_tokens=4)
    (after,) = student.predict(
        ["My invoice number 7 is wrong."], max_label_tokens=4, score_labels=True
    )
    assert before.label is None and after.distribution is not None
    assert after.label == max(after.distribution, key=after.distribution.__getitem__)
    assert after.probability == max(after.distribution.values())


def test_students_that_cannot_score_labels_say_why() -> None:
    both = t5_student({"label-then-rationale": ""})
    with pytest.raises(UserError, match="has no probability for every label"):
        both.predict(["x"], score_labels=True)
    task = TaskSection(name="generation", data=DataSection(train="x.csv"))
    with pytest.raises(UserError, match="has no probability for every label"):
        t5_student(task=task).predict(["x"], score_labels=True)


def test_nothing_becomes_float64_on_a_device_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple GPUs refuse float64: every tensor counts as one of theirs until it is on the CPU."""
    to_double, to_cpu = torch.Tensor.double, torch.Tensor.cpu
    on_cpu: list[torch.Tensor] = []

    def double(tensor: torch.Tensor) -> torch.Tensor:
        if not any(tensor is known for known in on_cpu):
            raise TypeError("the MPS framework doesn't support float64")
        return to_double(tensor)

    def cpu(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        on_cpu.append(to_cpu(tensor, *arguments, **options).clone())
        return on_cpu[-1]

    head = label_head_student()
    head.novelty = Novelty(np.eye(16, dtype=np.float16), 0.5)
    writer = trained_student("plain")
    rows = [SimpleNamespace(label_text=text) for text in TEXTS[:20]] * 2
    data: Any = SimpleNamespace(valid=rows)
    recipe: Any = SimpleNamespace(eval=SimpleNamespace(batch_size=8))
    view: Any = SimpleNamespace(prefix="")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "double", double)
        patch.setattr(torch.Tensor, "cpu", cpu)
        assert head.measure_novelty() is not None
        assert head.predict(TEXTS[:2])[0].distance is not None
        assert novelty_of(head, recipe, data, view) is not None
        assert writer.predict(TEXTS[:2], score_labels=True)[0].distribution
