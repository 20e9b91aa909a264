"""Several rationales of one row: all of them, or one drawn in each epoch."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from loopback import LoopbackServer

from dsbs import annotate, load_recipe, train
from dsbs.config import Recipe
from dsbs.tasks import make_task
from dsbs.training.encode import Encoded, ResampledRows, collate
from dsbs.training.grid import grid
from dsbs.training.rows import Row, gather
from dsbs.training.student_run import StudentRun

WAYS = ["It speaks of {}, plainly.", "We read of {} in it.", "Only {} is named here.", "Too short"]


def answer(body: dict[str, Any], number: int) -> str:
    """Four samples a row: two sound rationales, one for the wrong label, one flawed."""
    question = body["messages"][-1]["content"]
    right, wrong = ("billing", "shipping") if "invoice" in question else ("shipping", "billing")
    seed = body.get("seed", number) % 4
    word = "an invoice" if right == "billing" else "a parcel"
    why = WAYS[seed].format(word)
    return f"{why}\nAnswer: {wrong if seed == 2 else right}"


@pytest.fixture
def annotated(toy: Callable[..., Path], tmp_path: Path) -> Callable[..., Recipe]:
    with LoopbackServer(answer) as server:
        base = [
            f"teacher.base_url={server.url}",
            "annotate.samples=4",
            "annotate.temperature=0.7",
            "annotate.stop_early=false",
            "annotate.min_rationale_words=3",
            "train.methods=step-by-step",
        ]
        annotate(load_recipe(toy(), base), out=tmp_path / "run")
    return lambda *overrides: load_recipe(tmp_path / "toy.yaml", [*base, *overrides])


def rows_of(recipe: Recipe, run: Path) -> list[Row]:
    return gather(recipe, make_task(recipe.task), run, grid(recipe.train)).train


def test_all_are_the_sound_ones_that_came_to_the_label_and_the_chosen_one_is_first(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    chosen = {row.id: row.rationales for row in rows_of(annotated(), tmp_path / "run")}
    every = {
        row.id: row.rationales
        for row in rows_of(annotated("train.rationales=all"), tmp_path / "run")
    }
    annotations = {
        row["id"]: row
        for row in map(
            json.loads, (tmp_path / "run" / "annotate" / "train.jsonl").read_text().splitlines()
        )
    }
    assert max(len(texts) for texts in every.values()) == 2
    for row_id, texts in every.items():
        samples = annotations[row_id]["samples"]
        sound = {
            s["rationale"]
            for s in samples
            if s["reason"] is None and s["label"] == annotations[row_id]["label"]
        }
        assert set(texts) == sound and len(texts) == len(sound)
        assert texts[:1] == chosen[row_id]


def test_all_rationales_of_a_row_are_targets_of_the_same_step(
    annotated: Callable[..., Recipe], tmp_path: Path
) -> None:
    record = {}
    for which in ("chosen", "all"):
        run = tmp_path / which
        shutil.copytree(tmp_path / "run", run)
        train(annotated(f"train.rationales={which}"), out=run)
        record[which] = json.loads(
            (run / "train" / "step-by-step-gold-s0" / "train.json").read_text(encoding="utf-8")
        )
    assert record["all"]["rows"] == record["chosen"]["rows"], "an example stays one example"
    assert record["all"]["rationales"] > record["chosen"]["rationales"]


ENCODED: list[Encoded] = [
    {"label": [([3], [9])], "rationale": [([4], [5]), ([4], [6]), ([4], [7])]},
    {"label": [([3, 3], [9])]},
    {"label": [([3, 3, 3], [9])], "rationale": [([4, 4], [8])]},
]


def test_second_targets_follow_all_first_ones() -> None:
    flat = collate(ENCODED)["rationale"]
    assert flat.rows.tolist() == [0, 2, 0, 0] and flat.target.tolist() == [5, 8, 6, 7]
    assert flat.source_lengths.tolist() == [1, 2, 1, 1]


def test_a_sample_is_one_of_the_rows_rationales_and_depends_on_seed_and_epoch_alone() -> None:
    rows = ResampledRows(ENCODED * 50, seed=1)
    assert len(rows) == 150
    seen = []
    for epoch in range(3):
        rows.epoch = epoch
        drawn = [rows[i]["rationale"] for i in range(0, 150, 3)]
        assert all(len(pairs) == 1 for pairs in drawn)
        seen.append([pairs[0][1][0] for pairs in drawn])
        assert set(seen[-1]) == {5, 6, 7}
    assert seen[0] != seen[1] != seen[2]
    again = ResampledRows(ENCODED * 50, seed=1)
    again.epoch = 2
    assert [again[i]["rationale"][0][1][0] for i in range(0, 150, 3)] == seen[2]
    assert "rationale" not in rows[1]


def test_a_resumed_training_samples_as_an_uninterrupted_one(
    annotated: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 rows, 10 held out at most: an epoch has about five steps, so 15 steps draw three times."""
    overrides = ["train.rationales=drawn", "train.max_steps=15", "train.eval_every=4"]
    for name in ("whole", "broken"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    student = "train/step-by-step-gold-s0/model.safetensors"
    train(annotated(*overrides), out=tmp_path / "whole")

    class Killed(Exception):
        pass

    def stop(self: StudentRun, *args: Any) -> dict[str, float]:
        validations.append(1)
        if len(validations) == 3:
            raise Killed
        return real(self, *args)

    validations: list[int] = []
    real = StudentRun._validate
    with monkeypatch.context() as patch:
        patch.setattr(StudentRun, "_validate", stop)
        with pytest.raises(Killed):
            train(annotated(*overrides), out=tmp_path / "broken")
    train(annotated(*overrides), out=tmp_path / "broken")
    hashes = {
        hashlib.sha256((tmp_path / name / student).read_bytes()).hexdigest()
        for name in ("whole", "broken")
    }
    assert len(hashes) == 1
    shutil.copytree(tmp_path / "run", tmp_path / "chosen")
    train(annotated("train.max_steps=15", "train.eval_every=4"), out=tmp_path / "chosen")
    assert hashlib.sha256((tmp_path / "chosen" / student).read_bytes()).hexdigest() not in hashes, (
        "drawing changes something"
    )
