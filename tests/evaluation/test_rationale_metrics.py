"""Metrics of rationales: by hand, and ROUGE-L against the rouge-score package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from dsbs.config import TaskSection
from dsbs.config.registry import METRICS, entry
from dsbs.evaluation.bootstrap import Clusters
from dsbs.evaluation.metrics import Scored, SystemPredictions, measure, score
from dsbs.evaluation.rationales import ROUGE_L, rouge_l, words
from dsbs.records import Example, Prediction
from dsbs.records.measures import Measure
from dsbs.tasks import Task, make_task

NLI = make_task(TaskSection(name="esnli", data={"train": "-"}))
SVAMP = make_task(TaskSection(name="svamp", data={"train": "-"}))
FREE = make_task(TaskSection(name="generation", data={"train": "-"}))


NAMES = [name for name in METRICS if entry(METRICS, name).of_rationales]


def measured(
    task: Task,
    files: Sequence[Scored],
    references: Mapping[str, str | None] | None,
    clusters: Clusters = None,
) -> dict[str, Measure]:
    """The metrics of rationales alone."""
    metrics = measure(SystemPredictions(task, files, clusters, references)).metrics
    return {name: metrics[name] for name in metrics if name in NAMES}


def explained(
    rationales: Sequence[str | None],
    labels: Sequence[str] | None = None,
    truncated: Sequence[bool | None] | None = None,
    task: Task = NLI,
    gold: str = "neutral",
) -> Scored:
    rows = [Example(id=str(i), input={}, label=gold) for i in range(len(rationales))]
    predictions = {
        str(i): Prediction(
            id=str(i),
            raw=labels[i] if labels else gold,
            rationale=text,
            rationale_truncated=truncated[i] if truncated else None,
            made_by="test",
        )
        for i, text in enumerate(rationales)
    }
    return score(task, rows, predictions, "system")


# --- ROUGE-L


def test_rouge_l_on_lins_example() -> None:
    """Lin (2004), section 3.1: the LCS with the reference has 3 words in S2, and 2 in S3."""
    reference = ["police", "killed", "the", "gunman"]
    assert rouge_l(["police", "kill", "the", "gunman"], reference) == 0.75
    assert rouge_l(["the", "gunman", "kill", "police"], reference) == 0.5


@given(
    *[
        st.lists(st.sampled_from(["a", "b", "cat", "don't", "X9", "-", "…"]), max_size=12).map(
            " ".join
        )
    ]
    * 2
)
def test_rouge_l_is_the_rouge_score_packages(candidate: str, reference: str) -> None:
    theirs = RougeScorer(["rougeL"]).score(reference, candidate)["rougeL"].fmeasure
    assert rouge_l(words(candidate), words(reference)) == pytest.approx(theirs, abs=1e-12)


def test_words_of_every_script_count() -> None:
    assert rouge_l(words("Кошка спит."), words("кошка ест")) == 0.5


def test_rouge_l_covers_the_rows_that_the_teacher_explained() -> None:
    file = explained(["it is so", None, "it was so", "x"])
    metrics = measured(NLI, [file], {"0": "it is so", "1": "it is so", "2": None, "9": "it is so"})
    assert (metrics["rouge_l"].value, metrics["rouge_l"].n) == (
        0.5,
        2,
    )  # the same words, and none at all
    assert "rouge_l" not in measured(NLI, [file], {})


def test_rouge_is_never_called_faithful() -> None:
    assert "secondary" in ROUGE_L.source
    for name in NAMES:
        metric = entry(METRICS, name)
        assert "faithful" not in f"{metric.title} {metric.source}".lower()


# --- the other metrics


def test_the_teachers_own_rationales_are_not_measured() -> None:
    assert measured(NLI, [explained(["because", "so"])], None) == {}


def test_files_without_a_rationale_have_no_such_metrics() -> None:
    assert measured(NLI, [explained([None, None])], {"0": "because"}) == {}


def test_a_seed_that_was_predicted_without_rationales_is_left_out() -> None:
    metrics = measured(NLI, [explained(["why", ""]), explained([None, None])], {})
    assert metrics["rationale_empty"].value == 0.5


def test_empty_and_truncated_rationales_are_counted() -> None:
    metrics = measured(
        NLI, [explained(["why", " ", None, "so"], truncated=[True, None, None, False])], {}
    )
    assert (metrics["rationale_empty"].value, metrics["rationale_empty"].n) == (0.5, 4)
    assert (metrics["rationale_truncated"].value, metrics["rationale_truncated"].n) == (0.5, 2)
    assert "rationale_truncated" not in measured(NLI, [explained(["why"])], {})


def test_consistency_covers_the_rationales_that_state_a_conclusion() -> None:
    rationales = [
        "A man sleeps. So the answer is neutral.",
        "A man sleeps. So the answer is entailment.",
        "It may be neutral or not.",
        "The man is asleep, so it is a contradiction",
        "Therefore the answer is neutral",
    ]
    labels = ["neutral", "neutral", "neutral", "contradiction", "no label at all"]
    consistency = measured(NLI, [explained(rationales, labels)], {})["consistency"]
    assert (consistency.value, consistency.n) == (2 / 4, 4)


def test_consistency_goes_by_an_equations_value_and_is_undefined_for_free_text() -> None:
    gold = "( 3.0 + 4.0 )"
    file = explained(["He has both. The answer is 7.", "The answer is 8."], task=SVAMP, gold=gold)
    assert measured(SVAMP, [file], {})["consistency"].value == 0.5
    free = explained(["The answer is Paris."], task=FREE, gold="Paris")
    assert "consistency" not in measured(FREE, [free], {})


def test_seeds_are_averaged_within_the_rows_for_which_they_have_a_value() -> None:
    agrees, differs, silent = "The answer is neutral.", "The answer is entailment.", "Hm."
    files = [explained([agrees, agrees, silent]), explained([differs, silent, silent])]
    consistency = measured(NLI, files, {}, np.array([0, 1, 1]))["consistency"]
    assert (consistency.value, consistency.n) == ((0.5 + 1) / 2, 2)


def test_names_come_in_the_described_order() -> None:
    metrics = measured(
        NLI, [explained(["The answer is neutral."], truncated=[False])], {"0": "why"}
    )
    assert list(metrics) == NAMES
