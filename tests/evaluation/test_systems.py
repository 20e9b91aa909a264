"""Systems: comparisons without a model; pairs, clusters, learning curves and costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, run_dsbs, toy_rows, write_csv, write_jsonl

from dsbs import UserError, evaluate, load_recipe
from dsbs.config import EvalSection, Recipe
from dsbs.evaluation.costs import break_evens, teacher_bill, teacher_price
from dsbs.evaluation.metrics import Scored, score
from dsbs.evaluation.predictions import read_predictions, update_marks
from dsbs.evaluation.systems import (
    System,
    clusters_of,
    compare,
    headline_system,
    label_efficiencies,
    pairs,
)
from dsbs.records import Example, Prediction, TrainedStudent
from dsbs.records.subsets import Subset, subset_suffix
from dsbs.records.summary import label_efficiency_sentence
from dsbs.run_folder import RunFolder
from dsbs.tasks import make_task


def hand_made(tmp_path: Path, files: dict[str, list[str | None]], **section: Any) -> Path:
    """A recipe over six rows and a prediction file for each system."""
    rows = toy_rows(len(next(iter(files.values()))))
    write_csv(tmp_path / "train.csv", toy_rows(40, start=100))
    write_csv(tmp_path / "test.csv", rows)
    for name, answers in files.items():
        lines = [
            {"id": row["id"], "prediction": answer}
            for row, answer in zip(rows, answers, strict=True)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", lines)
    recipe = {
        "name": "hand",
        "task": {
            "name": "classification",
            "labels": ["billing", "shipping"],
            "columns": {"label": "team"},
            "data": {"train": "train.csv", "test": "test.csv"},
        },
        "teacher": {"kind": "human"},
        "eval": {"predictions": {name: f"{name}.jsonl" for name in files}} | section,
    }
    (tmp_path / "hand.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    return tmp_path / "hand.yaml"


B, S = "billing", "shipping"
GOLD = [B, S] * 10
FLIPPED = [S, B] * 10


def test_three_files_made_by_hand_are_compared_without_a_model(tmp_path: Path) -> None:
    files = {"old": FLIPPED[:12] + GOLD[12:], "new": GOLD, "odd": [*GOLD[:18], None, "Kaufhaus"]}
    recipe = hand_made(tmp_path, files)
    # a model cannot be loaded where torch is not importable
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "raise ImportError('a model is loaded')\n", encoding="utf-8"
    )
    done = run_dsbs(
        "eval",
        str(recipe),
        "--score-only",
        "--json",
        cwd=tmp_path,
        env={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    systems = {system["name"]: system for system in results["systems"]}
    assert {name: system["accuracy"] for name, system in systems.items()} == {
        "old": 0.4,
        "new": 1.0,
        "odd": 0.9,
    }
    assert results["baseline"] == "old" and results["headline"] == "new"
    assert systems["odd"]["unreadable"] == pytest.approx(0.1)
    gap = systems["new"]["versus"]["old"]
    # exact McNemar with 12 wins and no losses: 2 / 2^12
    assert gap["delta"] == pytest.approx(0.6) and gap["p"] == pytest.approx(2 / 2**12, abs=1e-12)
    assert (gap["wins"], gap["losses"]) == (12, 0)
    assert (
        set(systems["odd"]["versus"]) == {"old"}
        and systems["odd"]["versus"]["old"]["p_holm"] >= gap["p_holm"]
    )


def test_the_baseline_may_be_an_external_file(tmp_path: Path) -> None:
    recipe = load_recipe(hand_made(tmp_path, {"old": FLIPPED, "new": GOLD}, baseline=["new"]))
    results = evaluate(recipe, out=tmp_path / "run", score_only=True)
    assert results.baseline == "new" and results.system("old") is not None
    assert results.system("old").versus["new"].delta == -1.0  # type: ignore[union-attr]


def test_rows_of_a_cluster_are_resampled_together(tmp_path: Path) -> None:
    recipe = load_recipe(
        hand_made(tmp_path, {"old": FLIPPED[:10] + GOLD[10:], "new": GOLD}, cluster="text")
    )
    results = evaluate(recipe, out=tmp_path / "run", score_only=True)
    assert (results.cluster, results.clusters) == ("text", 20)
    assert "cluster" in results.systems[0].interval
    with pytest.raises(UserError, match=r"eval.cluster.*no field 'premise'.*fields: text"):
        evaluate(
            recipe.model_copy(
                update={"eval": EvalSection(cluster="premise", predictions=recipe.eval.predictions)}
            )
        )


def test_clusters_are_numbered_by_equal_values() -> None:
    rows = [Example(str(i), {"premise": text}) for i, text in enumerate("abacb")]
    numbers = clusters_of(rows, "premise")
    assert numbers is not None and numbers.tolist() == [0, 1, 0, 2, 1]
    assert clusters_of(rows, None) is None


def student(method: str, subset: Subset = 1.0, source: str | None = "s") -> TrainedStudent:
    name = f"{method}{subset_suffix(subset)}-s0"
    return TrainedStudent(
        name=name,
        method=method,
        labels="gold",
        seed=0,
        path="x",
        valid_accuracy=0.5,
        best_step=1,
        steps=1,
        examples_per_s=1,
        wall_s=1,
        parameters=1,
        fingerprint="f",
        subset=subset,
        source=source,
    )


def system(
    method: str, subset: Subset = 1.0, right: float = 0.5, rows: int = 100, source: str | None = "s"
) -> System:
    trained = student(method, subset, source)
    correct = np.arange(100) < 100 * right
    return System(
        trained.system, "student", [Scored([], [], [], correct)], [trained], training_rows=rows
    )


def test_students_meet_the_baselines_of_their_own_share_and_no_pair_twice() -> None:
    systems = [
        System("teacher", "teacher", [Scored([], [], [], np.ones(100, dtype=bool))]),
        system("finetune"),
        system("finetune", 0.5),
        system("distill"),
        system("distill", 0.5),
        system("step-by-step"),
        system("step-by-step", 0.5),
    ]
    met = [(a.name, b.name) for a, b in pairs(systems, EvalSection())]
    assert ("step-by-step", "finetune") in met and ("step-by-step-n0.5", "finetune-n0.5") in met
    assert ("step-by-step-n0.5", "distill-n0.5") in met and ("teacher", "finetune") in met
    assert ("distill", "finetune") in met and ("finetune", "distill") not in met
    assert ("teacher", "finetune-n0.5") not in met and ("step-by-step", "finetune-n0.5") not in met
    assert len(met) == len(set(met)) == 3 + 2 + 2 + 1  # with finetune 3 and 2, with distill 2 and 1
    assert pairs([systems[0], systems[5]], EvalSection()) == []


def test_a_student_with_terms_meets_its_own_method_without_them() -> None:
    systems = [
        system("finetune"),
        system("step-by-step"),
        system("step-by-step", 0.5),
        system("step-by-step+response"),
        system("finetune+response"),
        system("step-by-step+response", 0.25),
    ]
    chosen = pairs(systems, EvalSection())
    met = [(a.name, b.name) for a, b in chosen]
    assert met == [
        ("step-by-step", "finetune"),
        ("step-by-step+response", "finetune"),
        ("finetune+response", "finetune"),
        ("step-by-step+response", "step-by-step"),
    ]
    from_teacher = systems[3].students[0].model_copy(update={"labels": "teacher"})
    systems[3].students = [from_teacher]
    assert ("step-by-step+response", "step-by-step") not in [
        (a.name, b.name) for a, b in pairs(systems, EvalSection())
    ]


def test_the_comparison_with_the_method_without_terms_is_among_those_corrected() -> None:
    systems = [
        system("finetune", right=0.5),
        system("step-by-step", right=0.6),
        system("step-by-step+response", right=0.75),
    ]
    comparisons = compare(pairs(systems, EvalSection()), None)
    assert list(comparisons["step-by-step+response"]) == [
        "finetune",
        "step-by-step",
    ]  # the first is what a headline speaks of
    comparison = comparisons["step-by-step+response"]["finetune"]
    assert comparison.p_holm == pytest.approx(min(1.0, 3 * comparison.p))


def test_adjusted_p_values_are_over_all_comparisons() -> None:
    systems = [
        system("finetune", right=0.5),
        system("distill", right=0.6),
        system("step-by-step", right=0.75),
    ]
    comparisons = compare(pairs(systems, EvalSection()), None)
    comparison = comparisons["step-by-step"]["finetune"]
    assert comparison.delta == pytest.approx(0.25) and (comparison.wins, comparison.losses) == (
        25,
        0,
    )
    assert comparison.p_holm == pytest.approx(min(1.0, 3 * comparison.p))  # the smallest of three


def test_label_efficiency_is_read_off_the_curve() -> None:
    curve = [
        system("step-by-step", 0.25, 0.4, 100),
        system("step-by-step", 0.5, 0.5, 200),
        system("step-by-step", 1.0, 0.6, 400),
    ]
    (efficiency,) = label_efficiencies(
        [*curve, system("finetune", 1.0, 0.5, 400)], [system("finetune", 1.0, 0.5, 400)], None
    )
    assert (efficiency.method, efficiency.system, efficiency.rows, efficiency.largest) == (
        "step-by-step",
        "finetune",
        200,
        400,
    )
    (never,) = label_efficiencies(curve, [system("finetune", 1.0, 0.9, 400)], None)
    assert never.rows is None
    (at_once,) = label_efficiencies(curve, [system("finetune", 1.0, 0.2, 400)], None)
    assert (at_once.rows, at_once.smallest) == (
        100,
        100,
    ) and "at most 100 rows" in label_efficiency_sentence(at_once)


def test_distilling_pays_once_the_teacher_would_have_cost_more() -> None:
    manifest = {
        "splits": {
            "train": {"usd": 1.0, "rows": 1000},
            "test": {"usd": 0.1, "rows": 50},
            "hinted": {"usd": 0.3, "usd_of_hints": 0.1, "rows": 100},
            "valid": {"usd": None, "rows": 5},
            "recorded": {"usd": 0.0, "rows": 5, "usage": {"prompt_tokens": 0}},
        }
    }
    assert (
        teacher_bill(manifest, "train") == (1.0, 0.001)
        and teacher_bill(manifest, "hinted") == (0.3, pytest.approx(0.003))
        and teacher_price(manifest, "hinted") == pytest.approx(0.002)
        and teacher_price(manifest, "test") == pytest.approx(0.002)
        and teacher_price(manifest, "valid") is None
        and teacher_bill(manifest, "recorded") == (None, None)
        and teacher_bill(manifest, "valid") == (None, None)
        and teacher_bill({}, "test") == (None, None)
    )
    learned, gold = system("step-by-step", 0.5), system("finetune", source=None)
    (break_even,) = break_evens([learned, gold], 1.0, 0.002)
    assert (break_even.system, break_even.spent_usd, break_even.predictions) == (
        "step-by-step-n0.5",
        0.5,
        250,
    )
    few_shot = system("step-by-step", "5-per-label", rows=20)
    (break_even,) = break_evens([few_shot], 1.0, 0.002, 0.001)
    assert (break_even.spent_usd, break_even.predictions) == (0.02, 10)
    assert list(break_evens([learned], None, 0.002)) == [] == list(break_evens([learned], 1.0, 0.0))


def test_the_headline_is_the_first_method_that_is_no_baseline() -> None:
    def headline(*methods: str, trained: tuple[str, ...] | None = None) -> str | None:
        recipe = Recipe.model_validate(
            {
                "name": "x",
                "task": {"name": "esnli", "data": {"train": "a.jsonl"}},
                "teacher": {"kind": "human"},
                "train": {"methods": methods},
            }
        )
        return headline_system(recipe, [system(method) for method in trained or methods])

    assert headline("finetune", "distill", "step-by-step") == "step-by-step"
    assert headline("rationale-then-label", "step-by-step", "finetune") == "rationale-then-label"
    assert headline("finetune", "distill") == "distill", "it is compared with the first baseline"
    assert headline("step-by-step", "finetune", trained=("finetune",)) is None, (
        "no other one stands in for it"
    )


def test_a_metric_that_grades_rows_is_compared_where_both_have_it() -> None:
    systems = [system("finetune"), system("distill"), system("step-by-step")]
    draw = np.random.default_rng(0)
    base = draw.uniform(0, 0.5, (2, 100))
    systems[0].compared["rouge_l"], systems[2].compared["rouge_l"] = base, base + 0.25
    systems[2].compared["rouge_l"][:, :10] = np.nan
    comparisons = compare(pairs(systems, EvalSection()), None)
    graded = comparisons["step-by-step"]["finetune"].graded["rouge_l"]
    assert graded.delta == pytest.approx(0.25) and graded.n == 90 and graded.p_holm < 0.001
    assert (
        comparisons["step-by-step"]["distill"].graded
        == {}
        == comparisons["distill"]["finetune"].graded
    )


def test_corrected_gold_labels_reach_the_prediction_file(tmp_path: Path) -> None:
    path = hand_made(tmp_path, {"old": FLIPPED, "new": GOLD})
    first = evaluate(load_recipe(path), out=tmp_path / "run", score_only=True)
    prediction_file = tmp_path / "run" / "eval" / "predictions" / "old.jsonl"
    rows = [json.loads(line) for line in prediction_file.read_text(encoding="utf-8").splitlines()]
    task = make_task(load_recipe(path).task)
    predictions = read_predictions(prediction_file)
    corrected = [Example(row["id"], row["input"], label=row["prediction"]) for row in rows]
    update_marks(
        RunFolder(tmp_path / "run"), "old", score(task, corrected, predictions, "old"), task
    )
    marked = [json.loads(line) for line in prediction_file.read_text(encoding="utf-8").splitlines()]
    assert all(row["correct"] and row["gold"] == row["prediction"] for row in marked)
    assert [row["raw"] for row in marked] == [row["raw"] for row in rows] and first.system(
        "old"
    ).accuracy == 0.0  # type: ignore[union-attr]


def test_predictions_of_other_inputs_are_not_scored(tmp_path: Path) -> None:
    task = make_task(load_recipe(hand_made(tmp_path, {"old": GOLD})).task)
    predictions = {"r": Prediction(id="r", input={"text": "before"}, raw="billing", made_by="m")}
    same = Example("r", {"text": "before"}, label="billing")
    changed = Example("r", {"text": "after"}, label="billing")
    assert score(task, [same], predictions, "s").correct.all()
    with pytest.raises(UserError, match=r"made for other inputs in 1 of 1 rows .*'r'"):
        score(task, [changed], predictions, "s")
