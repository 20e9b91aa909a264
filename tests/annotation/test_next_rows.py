"""`dsbs annotate --next`: which rows are chosen, and what later stages make of the choice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import good_answer, run_dsbs, toy_rows, write_csv
from label_heads import save_encoder
from loopback import LoopbackServer, read_rows

from dsbs import PartialError, Student, UserError, annotate, evaluate, load_recipe, train
from dsbs.annotation import next_rows
from dsbs.annotation.next_rows import choose, clustered
from dsbs.config import Recipe
from dsbs.run_folder import RunFolder
from dsbs.tasks.data import position


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def recipes(toy: Callable[..., Path], *settings: str) -> Callable[..., Recipe]:
    path = toy(train=60)
    common = ["annotate.splits=train", "annotate.next.random_share=0.3", *settings]
    return lambda *overrides: load_recipe(path, [*common, *overrides])


def test_rounds_are_annotated_trained_on_and_chosen_by_the_newest_student(
    toy: Callable[..., Path], tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(texts: object) -> None:
        raise UserError("not installed", hint="")

    monkeypatch.setattr(next_rows, "_encoder_states", missing)
    encoder = save_encoder(tmp_path / "encoder")
    with LoopbackServer(good_answer) as server:
        recipe = recipes(
            toy,
            f"teacher.base_url={server.url}",
            f"student={{model: {encoder}}}",
            "train={methods: distill, max_steps: 2, micro_batch_size: 4}",
            "eval.floors=majority",
        )
        first = choose(recipe(), 10, out=run).rounds[-1]
        assert (first.by, first.states, first.student) == ("diversity", "TF-IDF", None)
        assert len(first.rows) == len(set(first.rows)) == 10 and len(first.random) == 3
        result = annotate(recipe(), out=run)
        assert server.requests == 10 and result.splits["train"].rows == 10
        marks = {row["id"]: row["chosen_by"] for row in read_rows(run)}
        assert marks == {i: "random" if i in first.random else "diversity" for i in first.rows}
        figures = result.as_json()
        assert figures["remaining"] == 48 and figures["splits"]["train"]["random"] == 3
        assert figures["splits"]["train"]["label_accuracy_random"] == 1.0

        [student] = train(recipe(), out=run).students
        results = evaluate(recipe(), out=run)
        assert [system.training_rows for system in results.systems] == [10, 10]
        rounds = choose(recipe("annotate.next.by=uncertainty"), 10, out=run)
        second = rounds.rounds[-1]
        assert second.student == student.name and second.fingerprint == student.fingerprint
        assert second.by == "uncertainty" and not set(second.rows) & set(first.rows)
        assert annotate(recipe(), out=run).splits["train"].rows == 20
        assert server.requests == 20, "nothing is bought twice"

        # of the rows that could be chosen, the student was least sure of these
        loaded = Student.load(student.path)
        texts = {row["id"]: row["text"] for row in toy_rows(60)}
        pool = [i for i in texts if i not in rounds.chosen and position(i, "valid") >= 0.1]
        active = [i for i in second.rows if i not in second.random]

        def margins(ids: list[str]) -> list[float]:
            answers = loaded.predict([texts[i] for i in ids])
            return [loaded.confidence(answer, {}, "margin") or 0.0 for answer in answers]

        assert max(margins(active)) <= min(margins(pool)) + 1e-6

        third = choose(recipe(), 10, out=run, write=False).rounds[-1]
        assert (third.by, third.states) == ("both", student.name)
        assert len(RunFolder(run).next_rounds().rounds) == 2, "nothing was written"


def test_the_random_rows_of_all_rounds_are_the_first_of_one_random_order(
    toy: Callable[..., Path], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_rows, "_encoder_states", lambda texts: np.eye(len(texts)))
    recipe = recipes(toy, "teacher={kind: human}", "task.data.valid=test.csv")
    write_csv(run.parent / "test.csv", toy_rows(12, start=1000))
    for _ in range(3):
        choose(recipe(), 12, out=run)
        next_rows.finish_round(RunFolder(run), is_complete=True)
    rounds = RunFolder(run).next_rounds()
    sample = [row for entry in rounds.rounds for row in entry.random]
    order = sorted((row["id"] for row in toy_rows(60)), key=lambda i: position(i, "next-0"))
    assert set(sample) == set(order[: len(set(sample))])
    assert set(sample) <= set(rounds.chosen) and len(rounds.chosen) == 36
    assert sum(by == "random" for by in rounds.chosen.values()) == len(set(sample)) >= 12


def test_a_round_that_did_not_end_is_continued_with_the_same_rows(
    toy: Callable[..., Path], run: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        recipe = recipes(toy, f"teacher.base_url={server.url}", "annotate.next.by=random")
        chosen = choose(recipe(), 10, out=run)
        with pytest.raises(PartialError, match="max_requests"):
            annotate(recipe("annotate.max_requests=4"), out=run)
        assert choose(recipe(), 25, out=run) == chosen, "its rows are not annotated yet"
        annotate(recipe(), out=run)
        assert server.requests == 10
        rounds = choose(recipe(), 100, out=run)
        assert len(rounds.chosen) == 58, "all but the held-out rows, which have gold labels"
        annotate(recipe(), out=run)
        with pytest.raises(UserError, match="every train row is annotated"):
            choose(recipe(), 1, out=run)


def test_rows_that_were_annotated_before_the_first_round_stay(
    toy: Callable[..., Path], tmp_path: Path, run: Path
) -> None:
    with LoopbackServer(good_answer) as server:
        recipe = recipes(toy, f"teacher.base_url={server.url}", "annotate.next.by=random")
        annotate(recipe(), out=run)
        write_csv(tmp_path / "train.csv", toy_rows(80))
        rounds = choose(recipe(), 5, out=run)
        assert [entry.by for entry in rounds.rounds] == ["earlier", "random"]
        assert len(rounds.rounds[0].rows) == 60
        assert annotate(recipe(), out=run).splits["train"].rows == 65
        assert server.requests == 65
    assert sum("chosen_by" in row for row in read_rows(run)) >= 5


def test_held_out_rows_without_gold_are_chosen_at_random_in_their_share(
    toy: Callable[..., Path], tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(next_rows, "_encoder_states", lambda texts: np.eye(len(texts)))
    recipe = recipes(toy, "task.columns={}", "task.data.valid_fraction=0.3")
    rows = [{"id": row["id"], "text": row["text"]} for row in toy_rows(60)]
    write_csv(tmp_path / "train.csv", rows)
    entry = choose(recipe(), 20, out=run).rounds[-1]
    held_out = {row["id"] for row in rows if position(row["id"], "valid") < 0.3}
    validating = held_out & set(entry.rows)
    assert len(validating) == round(20 * len(held_out) / 60) and validating <= set(entry.random)


def test_clusters_give_a_row_each_and_weights_move_their_centres() -> None:
    centres = np.eye(3)[[0, 0, 0, 1, 1, 1, 2, 2, 2]]
    states = (centres + np.linspace(0, 0.1, 27).reshape(9, 3)).astype(np.float32)
    chosen = clustered(states, np.ones(9, np.float32), 3, seed=0)
    assert sorted(index // 3 for index in chosen) == [0, 1, 2]
    heavy = np.array([1, 1, 500] * 3, np.float32)
    assert sorted(clustered(states, heavy, 3, seed=0)) == [2, 5, 8]
    same = np.ones((4, 2), np.float32)
    assert len(set(clustered(same, np.ones(4, np.float32), 3, seed=0))) == 3


def test_the_command_shows_a_choice_without_writing_it_and_explains_mistakes(
    toy: Callable[..., Path], tmp_path: Path, run: Path
) -> None:
    path = str(toy(train=60, annotate={"next": {"by": "random"}, "splits": "train"}))
    arguments = ("annotate", path, "--next", "10", "--out", str(run))
    done = run_dsbs(*arguments, "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert plan["requests"] == plan["rows"] == len(plan["next"]["rows"]) == 10
    assert "10 rows of 58 without an annotation, at random" in done.stderr
    assert not run.exists()
    done = run_dsbs(*arguments, "--pilot", "3", cwd=tmp_path)
    assert done.returncode == 2 and "--next and --pilot exclude each other" in done.stderr
    for setting, message in {
        "annotate.splits=test": "annotate.splits does not include train",
        "annotate.next={student: none}": "has no student none",
    }.items():
        with pytest.raises(UserError, match=message):
            choose(load_recipe(path, [setting]), 10, out=run, write=False)
    (run / "annotate").mkdir(parents=True)
    (run / "annotate" / "next.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"next.json cannot be read"):
        annotate(load_recipe(path), out=run)
