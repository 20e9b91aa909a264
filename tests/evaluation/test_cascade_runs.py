"""Cascades of a run: from recipe and predictions to results, records and the report."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import good_answer, toy_rows, write_jsonl
from label_heads import save_encoder
from loopback import LoopbackServer

from dsbs import UserError, annotate, evaluate, load_recipe, report, train
from dsbs.config import Recipe
from dsbs.evaluation.cascade import calibration_examples, rows_warning
from dsbs.progress import NoProgress
from dsbs.records import Annotation, TeacherName
from dsbs.records.gates import gate_failures
from dsbs.records.summary import headline, headline_details
from dsbs.students.calibration import read_calibration, read_threshold
from dsbs.tasks import make_task
from dsbs.tasks.data import load, validation_rows

TEST_ROWS = 200
WRONG = 20  # the external system's first answers


@pytest.fixture
def recipe(toy: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    """Recipes of a run with the teacher's answers, a tiny encoder and two external systems."""
    rows = toy_rows(TEST_ROWS, start=1000)
    systems: dict[str, Callable[[int], float]] = {
        "constant": lambda number: 0.5,
        "sorted": lambda number: (number + 0.5) / TEST_ROWS,
    }
    predictions = {}
    for name, probability in systems.items():
        lines: list[dict[str, Any]] = []
        for number, row in enumerate(rows):
            label = "shipping" if number < WRONG and row["team"] == "billing" else row["team"]
            line = {"id": row["id"], "prediction": label, "probability": probability(number)}
            lines.append(line)
        predictions[name] = str(write_jsonl(tmp_path / f"{name}.jsonl", lines))
    model = save_encoder(tmp_path / "encoder")
    with LoopbackServer(good_answer) as server:
        base = [
            f"teacher.base_url={server.url}",
            "teacher.price={input: 1.0, output: 1.0}",
            f"student={{model: {model}, max_target_tokens: 16}}",
            "train.methods=[finetune]",
            "train.max_steps=2",
            "eval.latency_calls=2",
            "eval.floors=[tfidf]",
        ]
        path = toy(test=TEST_ROWS, eval={"predictions": predictions})
        annotate(load_recipe(path, base), out=tmp_path / "run")
    return lambda *overrides: load_recipe(path, [*base, *overrides])


def test_a_cascade_from_the_recipe_to_the_report(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    section = recipe("eval.cascade={target: 0.9}")
    run = tmp_path / "run"
    folder = Path(train(section, out=run).students[0].path)
    results = evaluate(section, out=run)
    by_name = {cascade.student: cascade for cascade in results.cascades}
    assert set(by_name) == {"finetune-gold-s0", "constant", "sorted", "tfidf"}

    good = by_name["sorted"]
    assert good.source == "test" and good.folds is None
    assert good.rows + good.n == TEST_ROWS and 80 < good.n < 120
    assert good.threshold is not None and good.bound is not None and good.bound >= 0.9
    assert 0.9 < good.coverage.value <= 1.0 and good.agreement.value >= 0.9
    assert good.teacher_accuracy.value == 1.0
    assert good.accuracy.value == pytest.approx(good.agreement.value)
    assert good.usd_per_1000 is not None and good.teacher_usd_per_1000 is not None
    saved = 1 - good.usd_per_1000 / good.teacher_usd_per_1000
    assert saved == pytest.approx(good.coverage.value)
    assert good.teacher_ms is not None and good.teacher_ms > 0
    assert [point.coverage for point in good.curve] == sorted(p.coverage for p in good.curve)

    # The student's files, as serving reads them.
    calibration = read_calibration(folder)
    threshold = read_threshold(folder)
    assert calibration is not None and threshold is not None
    assert threshold.confidence == calibration.confidence
    assert threshold.temperature == calibration.temperature
    assert threshold.target == 0.9 and threshold.level == 0.95
    assert threshold.threshold == by_name["finetune-gold-s0"].threshold

    # Selective prediction of every system with a confidence: equal accuracies, another order.
    systems = {system.name: system for system in results.systems}
    orders = [systems[name].selective for name in ("sorted", "constant")]
    assert orders[0] is not None and orders[1] is not None
    assert orders[0].measures["e_aurc"].value < 0.1 * orders[1].measures["e_aurc"].value
    assert systems["teacher"].selective is None

    sentence = headline(results)
    assert "finetune-gold-s0" in sentence.partition(". ")[2]
    assert evaluate(section, out=run, score_only=True).cascades == results.cascades
    page = report(section, out=run).read_text(encoding="utf-8")
    assert "Students in front of their teacher" in page and "Risk and coverage" in page
    with (run / "report" / "cascades.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["student"] for row in rows] == list(by_name)
    text = (run / "eval" / "results.md").read_text(encoding="utf-8")
    assert "## Cascade" in text and "## Selective prediction" in text
    assert gate_failures(results, min_coverage=0.0) == []
    low = results.model_copy(update={"headline": "sorted"})
    (failure,) = gate_failures(low, min_coverage=1.0) or ("",)
    assert good.coverage.value == 1.0 or "below the gate of 100%" in failure
    with pytest.raises(UserError, match="--min-coverage"):
        gate_failures(results.model_copy(update={"cascades": []}), min_coverage=0.5)
    alone = recipe("eval.cascade={target: 0.9, calibration: 0.99999}")
    with pytest.raises(UserError, match=f"left beside {TEST_ROWS} calibration rows") as error:
        evaluate(alone, out=tmp_path / "run")
    assert "lower eval.cascade.calibration" in error.value.hint


class Messages(NoProgress):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_calibration_on_validation_rows_leaves_all_test_rows(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Rows that chose a student's best step are refused."""
    run = tmp_path / "run"
    section = recipe("eval.cascade={target: 0.98, calibration: valid}", "eval.predictions={}")
    train(section, out=run)
    with pytest.raises(UserError, match="best steps") as error:
        evaluate(section, out=run)
    assert "train.valid_limit" in (error.value.hint or "")
    limited = recipe(
        "eval.cascade={target: 0.98, calibration: valid}",
        "eval.predictions={}",
        "train.valid_limit=2",
        "task.data.valid_fraction=0.3",
    )
    train(limited, out=run)
    progress = Messages()
    results = evaluate(limited, out=run, progress=progress)
    (name,) = [file.stem for file in (run / "eval" / "predictions" / "calibration").iterdir()]
    purposes = [text.split(":")[0] for text in progress.said if text.endswith(f": {name}")]
    assert purposes == ["predict test", "predict calibration rows"]
    (cascade,) = results.cascades
    assert (cascade.source, cascade.n) == ("valid", TEST_ROWS)
    assert 1 < cascade.rows < 20
    assert cascade.threshold is None and cascade.rows_needed == 149
    assert cascade.coverage.value == 0.0 and cascade.agreement.value == 1.0
    assert "None of the teacher's requests" in headline(results)
    assert "about 149 rows, or more" in " ".join(headline_details(results))


def test_no_row_that_chose_the_step_calibrates_where_the_teachers_labels_chose_it(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    valid = [row | {"team": None} for row in toy_rows(60, start=500)]
    changes = [
        f"task.data.valid={write_jsonl(tmp_path / 'valid.jsonl', valid)}",
        "annotate.splits=[train, valid, test]",
        "train.valid_limit=20",
        "eval.cascade={target: 0.9, calibration: valid}",
    ]
    recipe = load_recipe(toy(), changes)
    ids = [row.id for row in validation_rows(load(recipe, make_task(recipe.task), "valid"), None)]
    annotations = {
        row_id: Annotation(
            id=row_id,
            input={},
            label="billing",
            own_label="billing",
            accepted=place % 3 != 0,
            teacher=TeacherName(kind="openai"),
        )
        for place, row_id in enumerate(ids)
    }
    rows = calibration_examples(recipe, make_task(recipe.task), None, annotations)
    accepted = [row_id for row_id in ids if annotations[row_id].accepted]
    assert {row.id for row in rows} == set(ids) - set(accepted[:20])


def test_a_cascades_intervals_draw_whole_clusters(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's mistakes all lie in one of ten clusters."""
    section = recipe("eval.cascade={target: 0.9}", "eval.floors=[]")
    alone, *_ = evaluate(section, out=tmp_path / "run").cascades
    monkeypatch.setattr(
        "dsbs.evaluation.run.clusters_of", lambda rows, _field: np.arange(len(rows)) // 20
    )
    together, *_ = evaluate(section, out=tmp_path / "run").cascades
    assert (together.student, together.n) == (alone.student, alone.n)
    assert together.student_accuracy.value == alone.student_accuracy.value < 1
    low, high = alone.student_accuracy.ci95
    wider_low, wider_high = together.student_accuracy.ci95
    assert wider_high - wider_low > 1.3 * (high - low)


def test_a_cascade_needs_the_teachers_answers(toy: Callable[..., Path], tmp_path: Path) -> None:
    rows = [{"id": row["id"], "prediction": "billing"} for row in toy_rows(12, start=1000)]
    path = write_jsonl(tmp_path / "external.jsonl", rows)
    recipe = load_recipe(toy(eval={"predictions": {"x": str(path)}, "cascade": {}}))
    with pytest.raises(UserError, match="needs the teacher's answers"):
        evaluate(recipe, out=tmp_path / "run")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"of": "accuracy"}, "target or a margin"),
        ({"margin": 0.01}, "of: accuracy"),
        ({"of": "accuracy", "margin": 0.01, "target": 0.9}, "exclude"),
        ({"calibration": "train"}, "calibration"),
    ],
)
def test_contradictions_are_recipe_errors(
    toy: Callable[..., Path], section: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(toy(eval={"cascade": section}))


@pytest.mark.parametrize(("rows", "warns"), [(100, True), (187, False), (298, False)])
def test_too_few_rows_for_any_threshold_are_said_beforehand(
    toy: Callable[..., Path], rows: int, warns: bool
) -> None:
    """A target of 0.98 needs 149 calibration rows: half of 298, or four fifths of 187."""
    recipe = load_recipe(toy(), ["eval.cascade.target=0.98"])
    assert (rows_warning(recipe, rows) is not None) == warns


def test_a_teacher_that_gives_no_readable_label_is_wrong_and_of_agreement_the_row_is_left_out(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    def silent_on_every_fourth(body: dict[str, Any], number: int) -> str:
        answer: str = good_answer(body, number)
        is_fourth = re.search(r"number \d*[02468][048] ", str(body)) is not None
        return "I cannot tell." if is_fourth else answer

    rows = toy_rows(TEST_ROWS, start=1000)
    lines = [{"id": r["id"], "prediction": r["team"], "probability": 0.9} for r in rows]
    path = toy(
        train=8,
        test=TEST_ROWS,
        eval={"predictions": {"x": str(write_jsonl(tmp_path / "x.jsonl", lines))}},
    )
    with LoopbackServer(silent_on_every_fourth) as server:
        base = [f"teacher.base_url={server.url}", "eval.floors=[]"]
        annotate(load_recipe(path, base), out=tmp_path / "run")
    (agreement,) = evaluate(
        load_recipe(path, [*base, "eval.cascade.target=0.9"]), out=tmp_path / "run"
    ).cascades
    assert agreement.left_out > 20 and agreement.teacher_accuracy.value == 1.0
    results = evaluate(
        load_recipe(path, [*base, "eval.cascade={of: accuracy, target: 0.9999}"]),
        out=tmp_path / "run",
    )
    details = " ".join(headline_details(results.model_copy(update={"headline": "x"})))
    assert "the teacher alone is right on" in details
    (accuracy,) = results.cascades
    assert accuracy.left_out == 0 and accuracy.rows + accuracy.n == TEST_ROWS
    assert 0.6 < accuracy.teacher_accuracy.value < 0.9
