"""The eval stage: from students and teacher to prediction files, results and a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import good_answer, run_dsbs
from loopback import LoopbackServer
from made_students import make_student

from dsbs import Student, UserError, annotate, evaluate, load_recipe, report, train
from dsbs.config import Recipe, registry
from dsbs.evaluation.metrics import Metric, RowValues, SystemPredictions
from dsbs.run_folder import RunFolder

SYSTEMS = ["finetune-gold", "distill-teacher", "step-by-step-gold"]


def words_per_output(predictions: SystemPredictions) -> RowValues:
    return predictions.each_file(lambda file: [len(p.raw.split()) for p in file.predictions])


WORDS_PER_OUTPUT = Metric(
    title="Words per output",
    source="a metric of this test",
    higher_is_better=None,
    row_values=words_per_output,
)


@pytest.fixture
def trained(toy: Callable[..., Path], tmp_path: Path) -> Recipe:
    """Two seeds of three methods, barely trained, in ``run``."""
    overrides = [
        "train.max_steps=2",
        "train.eval_every=2",
        "train.seeds=[0, 1]",
        "eval.latency_calls=0",
    ]
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(toy(test=10), [*overrides, f"teacher.base_url={server.url}"])
        annotate(recipe, out=tmp_path / "run")
    train(recipe, out=tmp_path / "run")
    return recipe


def test_all_systems_are_compared_from_their_prediction_files(
    trained: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")
    results = evaluate(trained, out=run.path)
    assert [system.name for system in results.systems] == ["teacher", *SYSTEMS]
    assert results.n == 10 and results.baseline == "finetune-gold"
    assert results.headline == "step-by-step-gold"
    teacher, finetuned, _, step_by_step = results.systems
    assert teacher.accuracy == 1.0 and teacher.interval == "wilson"
    assert finetuned.seeds == [0, 1] and finetuned.interval == "bootstrap over rows"
    assert finetuned.accuracy == pytest.approx(sum(finetuned.accuracy_per_seed) / 2)
    assert set(step_by_step.versus) == {"finetune-gold", "distill-teacher"}
    by_seed = zip(step_by_step.accuracy_per_seed, finetuned.accuracy_per_seed, strict=True)
    assert step_by_step.versus["finetune-gold"].delta_per_seed == pytest.approx(
        {seed: ours - theirs for seed, (ours, theirs) in enumerate(by_seed)}
    )
    assert "seed" not in teacher.versus["finetune-gold"].model_dump_json()
    assert run.read_results() == results

    files = sorted((run.path / "eval" / "predictions").glob("*.jsonl"))
    students = {f"{system}-s{seed}.jsonl" for system in SYSTEMS for seed in (0, 1)}
    assert {path.name for path in files} == {"teacher.jsonl"} | students
    lines = run.predictions("finetune-gold-s0").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(1000, 1010)]
    assert sum(row["correct"] for row in rows) / 10 == pytest.approx(finetuned.accuracy_per_seed[0])

    # Evaluating again predicts nothing, and scoring alone gives the same results.
    times = {path: path.stat().st_mtime_ns for path in files if path.name != "teacher.jsonl"}
    assert evaluate(trained, out=run.path, score_only=True) == results
    evaluate(trained, out=run.path)
    assert times == {path: path.stat().st_mtime_ns for path in times}

    # Predictions that do not fit are set aside.
    changed = run.predictions("finetune-gold-s0")
    content = changed.read_text(encoding="utf-8")
    changed.write_text(content.replace('"made_by":"', '"made_by":"x'), encoding="utf-8")
    evaluate(trained, out=run.path)
    assert len(list((run.path / "eval" / "predictions" / "aside").iterdir())) == 1

    # A metric is registered in one place, and is in results and report.
    name = f"{__name__}:WORDS_PER_OUTPUT"
    monkeypatch.setitem(registry.METRICS, "words_per_output", name)
    results = evaluate(trained, out=run.path, score_only=True)
    measure = results.systems[0].metrics["words_per_output"]
    assert measure.value == 1.0 and measure.n == 10
    assert list(results.systems[0].metrics)[-1] == "words_per_output"
    page = report(trained, out=run.path).read_text(encoding="utf-8")
    assert "words per output" in page and "a metric of this test" in page
    assert "step-by-step-gold" in page
    local = page.replace(trained.teacher.base_url, "").replace("http://www.w3.org/", "")
    assert "http://" not in local


def test_a_student_predicts_alike_from_python_and_the_command_line(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = load_recipe(toy())
    student = make_student(recipe, tmp_path, "step-by-step").path
    (answer,) = Student.load(student).predict(["My invoice number 7 is wrong."], rationale=True)
    assert answer.rationale is not None
    second = {"id": "p", "text": "My parcel number 8 is wrong."}
    done = run_dsbs(
        "predict",
        student,
        "--rationale",
        cwd=tmp_path,
        input=f"My invoice number 7 is wrong.\n\n{json.dumps(second)}\n",
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in rows] == ["1", "p"]
    assert (rows[0]["raw"], rows[0]["prediction"]) == (answer.raw, answer.label)
    assert rows[0]["rationale_is_causal"] is False
    refused = run_dsbs(
        "predict", make_student(recipe, tmp_path).path, "--rationale", cwd=tmp_path, input="x\n"
    )
    assert refused.returncode == 2 and "without rationales" in refused.stderr


def test_evaluating_before_training_says_what_to_do(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="has no finished student") as error:
        evaluate(load_recipe(toy()), out=tmp_path / "nothing")
    assert "dsbs train" in (error.value.hint or "")


def test_the_removed_simulator_is_a_recipe_error(toy: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="simulator"):
        load_recipe(toy(eval={"simulator": True}))


def test_results_of_an_older_schema_say_how_to_rebuild_them(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.results.parent.mkdir(parents=True)
    run.results.write_text('{"schema": "dsbs.results/2"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"dsbs\.results/2.*reads 'dsbs\.results/5'") as error:
        run.read_results()
    assert "--score-only" in (error.value.hint or "")
    run.results.write_text('{"schema": "dsbs.results/5"}', encoding="utf-8")
    with pytest.raises(UserError, match="is not valid"):
        run.read_results()
    run.results.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="is not JSON"):
        run.read_results()
