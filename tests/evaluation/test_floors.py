"""Floors: what they learn from, what they answer, and how results speak of them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from causal_models import save
from conftest import TEAMS, good_answer, toy_rows, write_csv, write_jsonl
from loopback import LoopbackServer

from dsbs import UserError, annotate, evaluate, load_recipe, report
from dsbs.config import Recipe, StudentSection
from dsbs.evaluation import floors
from dsbs.evaluation.floors import check_floors, floor_systems
from dsbs.evaluation.systems import System
from dsbs.progress import NoProgress
from dsbs.records.summary import headline, headline_details
from dsbs.run_folder import RunFolder
from dsbs.tasks import make_task
from dsbs.tasks.data import load
from dsbs.training.grid import grid
from dsbs.training.rows import gather


class Sayings(NoProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def say(self, text: str) -> None:
        self.texts.append(text)


@pytest.fixture
def with_predictions(toy: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """The toy recipe with default floors and two external systems: always billing, and right."""

    def make(**section: Any) -> Recipe:
        rows = toy_rows(12, start=1000)
        constant = [{"id": row["id"], "prediction": "billing"} for row in rows]
        right = [{"id": row["id"], "prediction": row["team"]} for row in rows]
        predictions = {
            "right": str(write_jsonl(tmp_path / "right.jsonl", right)),
            "constant": str(write_jsonl(tmp_path / "constant.jsonl", constant)),
        }
        return load_recipe(toy(eval={"predictions": predictions, "floors": None} | section))

    return make


def make_floors(
    recipe: Recipe, run: Path, training_rows: dict[float, int | None] | None = None
) -> tuple[dict[str, System], list[str]]:
    """A recipe's floors by name, and what was said."""
    task = make_task(recipe.task)
    rows = load(recipe, task, recipe.eval.split)
    progress = Sayings()
    systems = floor_systems(
        recipe, task, rows, RunFolder(run), training_rows or {}, progress, score_only=False
    )
    return {system.name: system for system in systems}, progress.texts


def test_floors_are_compared_outside_holms_family_and_said_first(
    with_predictions: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = with_predictions()
    run = RunFolder(tmp_path / "run")
    results = evaluate(recipe, out=run.path)
    systems = {system.name: system for system in results.systems}
    assert list(systems) == ["right", "constant", "majority", "tfidf"]
    assert systems["tfidf"].accuracy == 1.0 and systems["majority"].accuracy == 0.5
    assert systems["tfidf"].kind == "floor" and systems["tfidf"].labels == "gold"
    assert {"log_loss", "brier", "ece"} <= set(systems["tfidf"].metrics)
    assert "tfidf" not in systems["constant"].versus and not systems["tfidf"].versus
    below = systems["constant"].versus_floors
    assert below["tfidf"].delta == -0.5 and not below["tfidf"].is_beaten
    assert not below["majority"].is_beaten, "equal is not better"
    assert systems["right"].versus_floors["majority"].is_beaten

    assert results.headline == "constant"
    assert headline(results).startswith("constant does not beat the floors majority (+0.0 points")
    assert "outside Holm's correction" in " ".join(headline_details(results))
    text = (run.path / "eval" / "results.md").read_text(encoding="utf-8")
    assert text.index("does not beat the floors") < text.index("## Systems") < text.index("## Flo")
    page = report(recipe, out=run.path).read_text(encoding="utf-8")
    verdict = page[page.index('class="sentence"') :]
    assert verdict[:200].count("constant does not beat the floors") == 1
    assert "the most frequent label of the train rows" in page and "not beaten" in page
    with (run.report / "comparisons.csv").open(encoding="utf-8") as file:
        rows = {(row["system"], row["against"]): row for row in csv.DictReader(file)}
    assert rows["constant", "tfidf"]["beaten"] == "no" and not rows["constant", "tfidf"]["p_holm"]

    # Nothing is learned again, and scoring alone gives the same.
    paths = [run.predictions("majority"), run.predictions("tfidf")]
    times = [path.stat().st_mtime_ns for path in paths]
    assert evaluate(recipe, out=run.path) == results
    assert evaluate(recipe, out=run.path, score_only=True) == results
    assert times == [path.stat().st_mtime_ns for path in paths]

    # Other train rows make other floors; the old ones are set aside.
    write_csv(tmp_path / "train.csv", toy_rows(20))
    evaluate(recipe, out=run.path)
    assert len(list((run.path / "eval" / "predictions" / "aside").iterdir())) == 2

    # External predictions may have a floor's name.
    named = {"tfidf": str(tmp_path / "right.jsonl")}
    renamed = load_recipe(tmp_path / "toy.yaml", [f"eval.predictions={json.dumps(named)}"])
    kinds = {system.name: system.kind for system in evaluate(renamed, out=run.path).systems}
    assert kinds == {"tfidf": "external", "majority": "floor"}


def test_floors_learn_from_the_rows_of_each_subset(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(
        toy(train=60, eval={"floors": ["majority", "tfidf"]}),
        ["train.methods=[finetune]", "train.subset=[2-per-label, 0.25, 1.0]"],
    )
    task = make_task(recipe.task)
    data = gather(recipe, task, tmp_path, grid(recipe.train))
    labeled = floors._labeled_rows(recipe, task, RunFolder(tmp_path))
    for subset in ("2-per-label", 0.25, 1.0):
        ids = [row.id for row, _ in labeled.of_subset(subset)]
        assert ids == [row.id for row in data.subset(subset)]
    assert [row.id for row, _ in labeled.valid] == [row.id for row in data.valid]
    systems, _ = make_floors(recipe, tmp_path / "run", {"2-per-label": 4, 0.25: 13, 1.0: 54})
    assert list(systems) == [
        f"{floor}{suffix}"
        for floor in ("majority", "tfidf")
        for suffix in ("", "-n0.25", "-2-per-label")
    ]
    assert systems["tfidf-n0.25"].subset == 0.25 and systems["tfidf-n0.25"].training_rows == 13


def test_a_field_alone_can_tell_the_label(tmp_path: Path) -> None:
    words = {"entailment": "outdoors", "neutral": "tall", "contradiction": "sleeping"}
    rows = [
        {
            "id": f"p{i}",
            "premise": f"Scene {i % 7} shows a man",
            "hypothesis": f"He is {words[label]}",
            "label": label,
        }
        for i in range(20)
        for label in words
    ]
    rows = [row | {"id": f"{row['id']}-{row['label']}"} for row in rows]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = {
        "name": "pairs",
        "task": {"name": "esnli", "data": {"train": str(tmp_path / "rows.jsonl")}},
        "teacher": {"kind": "recorded"},
        "eval": {"floors": ["tfidf", "tfidf-hypothesis", "tfidf-premise"]},
    }
    systems, _ = make_floors(Recipe.model_validate(recipe), tmp_path / "run")
    accuracy = {name: float(system.scores.mean()) for name, system in systems.items()}
    assert accuracy["tfidf-hypothesis"] == accuracy["tfidf"] == 1.0
    assert accuracy["tfidf-premise"] < 0.7
    recipe["eval"] = {"floors": ["tfidf-sentence"]}
    with pytest.raises(UserError, match=r"no such field \(fields: premise, hypothesis\)"):
        make_floors(Recipe.model_validate(recipe), tmp_path / "run")


def test_floors_learn_the_teachers_labels_where_there_are_no_gold_ones(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy(eval={"floors": None})
    unlabeled = [row | {"team": ""} for row in toy_rows(40)]
    write_csv(tmp_path / "train.csv", unlabeled)
    systems, sayings = make_floors(load_recipe(path), tmp_path / "run")
    assert not systems and sayings[0].startswith("no floors: "), "a default is no error"
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(path, [f"teacher.base_url={server.url}"])
        annotate(recipe, out=tmp_path / "run")
    systems, _ = make_floors(recipe, tmp_path / "run")
    assert systems["tfidf"].labels == "teacher" and systems["tfidf"].scores.mean() == 1.0


def test_the_untrained_student_chooses_the_likeliest_label(
    with_predictions: Callable[..., Recipe], tmp_path: Path
) -> None:
    student = StudentSection(model=save(tmp_path / "model"), max_input_tokens=200)
    recipe = with_predictions(floors=["untrained"]).model_copy(update={"student": student})
    systems, _ = make_floors(recipe, tmp_path / "run")
    (scored,) = systems["untrained"].files
    for prediction in scored.predictions:
        assert prediction.distribution is not None and set(prediction.distribution) == set(TEAMS)
        assert prediction.prediction == max(
            prediction.distribution, key=prediction.distribution.__getitem__
        )
    assert systems["untrained"].subset is None


def test_a_student_without_an_untrained_floor_says_so(
    with_predictions: Callable[..., Recipe], tmp_path: Path
) -> None:
    systems, sayings = make_floors(with_predictions(floors=["untrained"]), tmp_path / "run")
    assert not systems
    assert sayings == ["no floor untrained: the student starts from random weights"]


def test_a_single_label_is_always_predicted(toy: Callable[..., Path], tmp_path: Path) -> None:
    path = toy(eval={"floors": ["tfidf"]})
    write_csv(tmp_path / "train.csv", [row | {"team": "shipping"} for row in toy_rows(30)])
    systems, _ = make_floors(load_recipe(path), tmp_path / "run")
    assert systems["tfidf"].scores.mean() == 0.5


def test_default_floors_take_less_than_a_minute(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load_recipe(toy(eval={"floors": None}))
    monkeypatch.setattr(floors, "_MAX_DEFAULT_COST", 1000)
    assert list(make_floors(recipe, tmp_path / "run")[0]) == ["majority"]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"floors": ["majority-text"]}, "only tfidf can be limited"),
        ({"floors": ["tfidf"]}, "tfidf needs a closed set of labels"),
        ({"score_labels": True}, "score_labels needs a closed set of labels"),
    ],
)
def test_floors_that_a_task_cannot_have_are_refused(section: dict[str, Any], message: str) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "open",
            "task": {"name": "svamp", "data": {"train": "rows.jsonl"}},
            "teacher": {"kind": "recorded"},
            "eval": section,
        }
    )
    with pytest.raises(UserError, match=message):
        check_floors(recipe, make_task(recipe.task))


def test_an_open_task_has_no_default_floors(tmp_path: Path) -> None:
    rows = [
        {"id": f"s{i}", "body": f"{i} pens.", "question": "How many?", "label": f"{i} + 0"}
        for i in range(40)
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe = Recipe.model_validate(
        {
            "name": "open",
            "task": {"name": "svamp", "data": {"train": str(tmp_path / "rows.jsonl")}},
            "teacher": {"kind": "recorded"},
        }
    )
    assert make_floors(recipe, tmp_path / "run") == ({}, [])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"floors": ["tfdif"]}, "unknown floor 'tfdif'.*tfidf"),
        ({"floors": ["tfidf", "tfidf"]}, "given twice"),
        ({"floors": ["tfidf"], "predictions": {"tfidf": "x.jsonl"}}, "rename the predictions"),
    ],
)
def test_mistakes_in_eval_floors_are_recipe_errors(
    toy: Callable[..., Path], section: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(toy(eval=section))
