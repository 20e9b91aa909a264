"""From students and teacher to results: files, reuse, rescoring, the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import good_answer, run_dsbs
from loopback import LoopbackServer

from dsbs import Student, UserError, annotate, evaluate, load_recipe, report, train
from dsbs.config import Recipe


@pytest.fixture
def trained(toy: Callable[..., Path], tmp_path: Path) -> Recipe:
    path = toy(train=80, test=30)
    overrides = [
        "train.max_steps=60",
        "train.eval_every=20",
        "train.batch_size=16",
        "train.seeds=[0, 1]",
        "train.learning_rate=0.003",
    ]
    with LoopbackServer(good_answer) as server:
        recipe = load_recipe(path, [*overrides, f"teacher.base_url={server.url}"])
        annotate(recipe, out=tmp_path / "run")
    train(recipe, out=tmp_path / "run")
    return recipe


def test_all_systems_go_through_files_and_one_table(trained: Recipe, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = evaluate(trained, out=run)
    assert [s.name for s in result.systems] == [
        "teacher",
        "finetune-gold",
        "distill-teacher",
        "step-by-step-gold",
    ]
    assert result.n == 30 and result.baseline == "finetune-gold"
    teacher = result.systems[0]
    assert teacher.accuracy == 1.0 and teacher.interval == "wilson"
    student = result.systems[1]
    assert student.seeds == [0, 1] and student.interval == "bootstrap over rows"
    assert student.accuracy == pytest.approx(sum(student.accuracy_per_seed) / 2)
    assert set(result.systems[3].versus) == {"finetune-gold", "distill-teacher"}
    assert result.headline == "step-by-step-gold"
    saved = json.loads((run / "eval" / "results.json").read_text(encoding="utf-8"))
    assert saved == json.loads(json.dumps(result.as_json()))
    names = {p.name for p in (run / "eval" / "predictions").glob("*.jsonl")}
    assert names == {"teacher.jsonl"} | {
        f"{m}-s{s}.jsonl"
        for m in ("finetune-gold", "distill-teacher", "step-by-step-gold")
        for s in (0, 1)
    }
    rows = [
        json.loads(line)
        for line in (run / "eval" / "predictions" / "finetune-gold-s0.jsonl").open(encoding="utf-8")
    ]
    assert [row["id"] for row in rows] == [f"r{i}" for i in range(1000, 1030)]
    assert sum(row["correct"] for row in rows) / 30 == pytest.approx(student.accuracy_per_seed[0])

    # a second look predicts nothing anew, scoring alone finds the same, other predictions are set aside
    stamps = {p: p.stat().st_mtime_ns for p in (run / "eval" / "predictions").glob("*-s*.jsonl")}
    again = evaluate(trained, out=run, score_only=True)
    assert again == result
    evaluate(trained, out=run)
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    changed = run / "eval" / "predictions" / "finetune-gold-s0.jsonl"
    changed.write_text(
        changed.read_text(encoding="utf-8").replace('"made_by":"', '"made_by":"x'), encoding="utf-8"
    )
    evaluate(trained, out=run)
    assert len(list((run / "eval" / "predictions" / "aside").iterdir())) == 1

    page = report(trained, out=run).read_text(encoding="utf-8")
    assert "step-by-step-gold" in page and "http://" not in page.replace(
        trained.teacher.base_url, ""
    ).replace("http://www.w3.org/", "")

    # the same students from Python and from the command line
    loaded = Student.load(run / "train" / "step-by-step-gold-s0")
    (answer,) = loaded.predict(["My invoice number 7 is wrong."], rationale=True)
    assert answer.label in ("billing", "shipping", None) and answer.rationale is not None
    done = run_dsbs(
        "predict", str(run / "train" / "step-by-step-gold-s0"), "--rationale", cwd=tmp_path,
        input='My invoice number 7 is wrong.\n\n{"id": "p", "text": "My parcel number 8 is wrong."}\n',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["id"] for row in out] == ["1", "p"]
    assert out[0]["prediction"] == answer.label and out[0]["rationale_is_causal"] is False
    refused = run_dsbs(
        "predict", str(run / "train" / "finetune-gold-s0"), "--rationale", cwd=tmp_path, input="x\n"
    )
    assert refused.returncode == 2 and "without rationales" in refused.stderr


def test_evaluating_before_training_says_what_to_do(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="dsbs train"):
        evaluate(load_recipe(toy()), out=tmp_path / "nothing")
