"""Consistency: where an answer begins, and students that answer alike after different rationales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_distil import t5, trained

from dsbs.config import TermSection, TrainSection
from dsbs.students import learn_vocabulary
from dsbs.training.distillation.objective import Distilling, Step
from dsbs.training.encode import Encoded, Encoder
from dsbs.training.methods import method_of
from dsbs.training.rows import Row
from dsbs.training.tokens import Tokens
from dsbs.training.trainer import speak

VIEWS = method_of("rationale-then-label").views(TrainSection())
RATIONALES = ("It is about billing.", "Many an Answer: was read as billing", "billing")
TEXTS = [*RATIONALES, "Answer: billing", "Answer: shipping again", "My parcel number 7 is wrong."]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return learn_vocabulary(TEXTS * 9, 90)


def encoded(
    tokenizer: Any, label: str, limit: int = 64
) -> tuple[list[list[int]], dict[bytes, int]]:
    """The targets of a row of three rationales, and the answers that the encoder finds in them."""
    encoder = Encoder(Tokens(tokenizer), 64, limit)
    rows = [
        Row("one", "My parcel", label, None, RATIONALES),
        Row("two", "My parcel", label, None, RATIONALES[:1]),
    ]
    targets = [
        np.asarray(target).tolist()
        for _, target in encoder.rows(rows, VIEWS, "gold")[0]["rationale-then-label"]
    ]
    return targets, encoder.answers(rows, VIEWS[0], "gold")


def key(ids: list[int]) -> bytes:
    return np.array(ids, np.int64).tobytes()


@pytest.mark.parametrize("label", ["billing", "shipping again"])
def test_an_answer_is_the_labels_own_tokens_whatever_its_rationale_ends_in(
    tokenizer: Any, label: str
) -> None:
    targets, answers = encoded(tokenizer, label)
    assert len(answers) == 3, "of rows with several rationales alone"
    for target in targets:
        answer = target[-answers[key(target)] :]
        assert (
            answer == tokenizer(label)["input_ids"]
            and tokenizer.decode(answer, skip_special_tokens=True) == label
        )
    _, second, third = targets
    assert second[-len(third) :] == third, (
        "equal ends are longer than the answer: all of the third target is one"
    )


def test_an_answer_that_may_have_been_cut_is_none(tokenizer: Any) -> None:
    whole, _ = encoded(tokenizer, "billing")
    lengths = sorted(len(target) for target in whole)
    for limit, known in ((lengths[0], 0), (lengths[0] + 1, 1), (lengths[-1] + 1, 3)):
        assert len(encoded(tokenizer, "billing", limit)[1]) == known


ANSWERS = [[5, 1], [6, 7, 1]]
ROWS: list[Encoded] = [
    {
        "rationale-then-label": [
            (
                [3 + i] * (2 + i % 3),
                [10 + (7 * i + 5 * way) % 20] * (2 + way) + [9] + ANSWERS[i % 2],
            )
            for way in range(3)
        ]
    }
    for i in range(8)
]
LENGTHS = {
    key(target): len(ANSWERS[i % 2])
    for i, row in enumerate(ROWS)
    for _, target in row["rationale-then-label"]
}  # type: ignore[arg-type]


def learning() -> Distilling:
    term = TermSection(kind="consistency", weight=4.0)
    return Distilling([term], TrainSection(rationales="all"), VIEWS, answers=LENGTHS)


def disagreement(model: Any) -> float:
    """The term's mean over all answers, in nats per token."""
    fresh, terms = t5(), learning()
    fresh.load_state_dict(model.state_dict())
    batch = terms.collate(ROWS)
    tally = terms.tally(batch)
    assert tally["again"] == sum(2 * length for i in range(8) for length in [len(ANSWERS[i % 2])])
    speak(fresh.eval(), VIEWS, without_padding=True, terms=terms)
    with torch.no_grad():
        step = Step({"rationale-then-label": 1.0, **tally}, {"rationale-then-label": 1.0})
        return float(fresh(batch=batch, step=step)["consistency"])


def test_consistency_comes_down_and_the_student_answers_more_alike_than_one_without_it(
    tmp_path: Path,
) -> None:
    section: dict[str, Any] = {"rows": ROWS, "views": VIEWS, "rationales": "all", "steps": 30}
    with_term, lines = trained(tmp_path, learning(), **section)
    without, _ = trained(tmp_path, None, **section)
    assert lines[-1]["consistency_loss"] < lines[0]["consistency_loss"]
    assert 0 < disagreement(with_term) < disagreement(without)


def test_consistency_is_the_same_however_a_step_is_cut(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path, learning(), rows=ROWS, views=VIEWS, steps=2)
    parts, _ = trained(tmp_path, learning(), micro=2, rows=ROWS, views=VIEWS, steps=2)
    for name, value in whole.state_dict().items():
        assert torch.allclose(value, parts.state_dict()[name], atol=1e-5), name
