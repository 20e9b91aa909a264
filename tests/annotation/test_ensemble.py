"""Ensembles: the weights of the members' votes, and members that cannot vote."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import run_dsbs

from dsbs import UserError, annotate, load_recipe, validate
from dsbs.annotation.summary import AnnotateResult
from dsbs.annotation.vote import weighted_majority
from dsbs.config import Recipe, TaskSection
from dsbs.project.doctor import _teacher
from dsbs.prompting import learned_source, source_fingerprint
from dsbs.records import Annotation, Sample, TeacherName, Usage
from dsbs.run_folder import RunFolder
from dsbs.tasks import make_task
from dsbs.training.rows import vote_distribution

Toy = Callable[..., Path]
ESNLI = TaskSection.model_validate({"name": "esnli", "data": {"train": "-"}})
RowSamples = list[
    tuple[str | None, float | None]
]  # a row's samples: label (None: unreadable) and its log-probability


def sample(label: str | None, run: str = "a", weight: float | None = 1.0, **more: Any) -> Sample:
    return Sample(
        text="…", label=label, rationale=f"{run} says {label}", run=run, weight=weight, **more
    )


def member(
    folder: Path,
    recipe: Recipe,
    samples_by_id: dict[str, RowSamples],
    model: str,
    usd: float | None = 0.5,
) -> Path:
    """A finished run over the toy rows, with the given samples of each."""
    texts = {f"r{i}": f"My {('invoice', 'parcel')[i % 2]} number {i} is wrong." for i in range(8)}
    stage = folder / "annotate"
    stage.mkdir(parents=True)
    rows = [
        Annotation(
            id=name,
            input={"text": texts[name]},
            samples=[
                Sample(
                    text="…",
                    label=label,
                    rationale=label and f"{model}: {label}",
                    label_logprob=logprob,
                    reason=None if label else "unparsed",
                )
                for label, logprob in samples
            ],
            usage=Usage(prompt_tokens=10, completion_tokens=3),
            usd=usd,
            teacher=TeacherName(kind="openai", model=model),
        )
        for name, samples in samples_by_id.items()
    ]  # fmt: skip
    (stage / "train.jsonl").write_text(
        "".join(row.model_dump_json(by_alias=True) + "\n" for row in rows), encoding="utf-8"
    )
    record = {
        "status": "done",
        "recipe": recipe.model_dump(mode="json") | {"teacher": {"kind": "openai", "model": model}},
        "source": f"source of {model}",
        "splits": {"train": {}},
    }
    (stage / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
    return folder


@pytest.fixture
def two(toy: Toy, tmp_path: Path) -> Path:
    """A recipe with two finished runs as its teacher: gpt, with twice the weight, and qwen.

    qwen has no annotation of row r3.
    """
    path = toy(train=4, test=2, annotate={"splits": ["train"]})
    recipe = load_recipe(path)
    gpt: dict[str, RowSamples] = {
        "r0": [("billing", None)],
        "r1": [("billing", None), ("shipping", None)],
        "r2": [(None, None)],
        "r3": [("shipping", math.log(0.6))],
    }
    qwen: dict[str, RowSamples] = {
        "r0": [("shipping", None)],
        "r1": [("shipping", None)] * 3,
        "r2": [("billing", math.log(0.9))],
    }
    member(tmp_path / "runs" / "gpt", recipe, gpt, "gpt-4.1-mini")
    member(tmp_path / "runs" / "qwen", recipe, qwen, "Qwen/Qwen3-32B", usd=0.25)
    return toy(
        train=4,
        test=2,
        annotate={"splits": ["train"]},
        teacher={
            "kind": "ensemble",
            "model": None,
            "members": [{"run": "runs/gpt", "weight": 2.0}, {"run": "runs/qwen"}],
        },
    )


def read(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "annotate" / "train.jsonl").open(encoding="utf-8")]


def voted(path: Path, changes: Sequence[str] = ()) -> tuple[AnnotateResult, list[dict[str, Any]]]:
    result = annotate(load_recipe(path, changes), out=path.parent / "voted")
    return result, read(path.parent / "voted")


def refused(path: Path, changes: Sequence[str] = ()) -> str:
    """The message, from a run that leaves nothing behind."""
    with pytest.raises(UserError) as caught:
        voted(path, changes)
    assert caught.value.hint and not (path.parent / "voted" / "annotate" / "train.jsonl").exists()
    return caught.value.problem


def with_valid(path: Path) -> Recipe:
    """Four rows are too few to hold a part out of."""
    return load_recipe(path, [f"task.data.valid={path.parent / 'test.csv'}"])


def change(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run / "annotate" / "manifest.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    change(record)
    path.write_text(json.dumps(record), encoding="utf-8")


# --- the vote


def test_a_members_weight_is_its_vote_however_many_samples_it_has(two: Path) -> None:
    result, rows = voted(two)
    assert result.splits["train"].requests == 0 and result.splits["train"].accepted == 4
    heavy, split, unread, alone = rows
    assert (heavy["label"], heavy["vote_share"], heavy["rationale"]) == (
        "billing",
        pytest.approx(2 / 3),
        "gpt-4.1-mini: billing",
    )
    assert (split["label"], split["vote_share"]) == ("shipping", pytest.approx((1 + 1) / 3))
    assert [row_sample["weight"] for row_sample in split["samples"]] == pytest.approx(
        [1, 1, 1 / 3, 1 / 3, 1 / 3]
    )
    assert [row_sample["run"] for row_sample in split["samples"]] == ["runs/gpt"] * 2 + [
        "runs/qwen"
    ] * 3
    assert split["rationale"] == "gpt-4.1-mini: shipping", (
        "of the heaviest member that voted for it"
    )
    assert (unread["label"], unread["vote_share"]) == ("billing", 1.0), (
        "what cannot be read is no vote"
    )
    assert "weight" not in unread["samples"][0] and unread["label_logprob"] == pytest.approx(
        math.log(0.9)
    )
    assert [row_sample["run"] for row_sample in alone["samples"]] == ["runs/gpt"], (
        "a row that a member lacks has no vote of it"
    )
    assert heavy["teacher"] == {"kind": "ensemble", "model": "gpt-4.1-mini + Qwen/Qwen3-32B"}


def test_the_bill_is_the_members_and_an_unknown_price_makes_it_unknown(two: Path) -> None:
    result, rows = voted(two)
    assert [row["usd"] for row in rows] == [0.75, 0.75, 0.75, 0.5] and result.splits[
        "train"
    ].usd == 2.75
    assert rows[0]["usage"] == {"prompt_tokens": 20, "completion_tokens": 6, "cached_tokens": None}
    path = two.parent / "runs" / "qwen" / "annotate" / "train.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"usd":0.25', '"usd":null'), encoding="utf-8"
    )
    result, rows = voted(two)
    assert [row["usd"] for row in rows] == [None, None, None, 0.5] and result.splits[
        "train"
    ].usd is None


def test_a_hinted_sample_of_a_member_does_not_vote(two: Path) -> None:
    path = two.parent / "runs" / "qwen" / "annotate" / "train.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"hinted":false', '"hinted":true'),
        encoding="utf-8",
    )
    _, rows = voted(two)
    assert {row_sample["run"] for row in rows for row_sample in row["samples"]} == {"runs/gpt"}
    assert (rows[2]["accepted"], rows[2]["reject_reason"]) == (False, "unparsed")


@pytest.mark.parametrize(
    ("logprobs", "winner"),
    [
        ((None, None), "neutral"),
        ((-2.0, -1.0), "entailment"),
        ((-1.0, -2.0), "neutral"),
        ((-2.0, None), "neutral"),
    ],
)
def test_in_a_tie_the_surer_label_wins_else_the_earlier_members(
    logprobs: tuple[float | None, float | None], winner: str
) -> None:
    first, second = (
        sample(label, run, 0.3, label_logprob=logprob)
        for label, run, logprob in zip(("neutral", "entailment"), "ab", logprobs, strict=True)
    )
    vote = weighted_majority([first, second], make_task(ESNLI))
    assert (vote.label, vote.share, vote.run) == (winner, 0.5, "a" if winner == "neutral" else "b")


def test_weights_that_add_up_to_the_same_are_a_tie_in_spite_of_rounding() -> None:
    votes = [
        sample("neutral", "a", 0.3),
        sample("entailment", "b", 0.1),
        sample("entailment", "c", 0.2),
    ]
    assert 0.1 + 0.2 > 0.3 and weighted_majority(votes, make_task(ESNLI)).label == "neutral"


def test_the_log_probability_is_the_weighted_mean_of_the_winners() -> None:
    votes = [
        sample("neutral", "a", 3.0, label_logprob=-1.0),
        sample("neutral", "b", 1.0, label_logprob=-2.0),
        sample("neutral", "c", 5.0),
        sample("entailment", "d", 1.0, label_logprob=-9.0),
    ]
    assert weighted_majority(votes, make_task(ESNLI)).logprob == pytest.approx(-1.25)


def test_a_flawed_rationale_gives_way_to_that_of_a_lighter_member() -> None:
    flawed = sample("neutral", "a", 3.0, reason="too-short")
    vote = weighted_majority(
        [flawed, sample("neutral", "b"), sample("neutral", "c", 2.0)], make_task(ESNLI)
    )
    assert (vote.rationale, vote.run, vote.reason) == ("c says neutral", "c", None)
    alone = weighted_majority([flawed, sample("entailment", "b")], make_task(ESNLI))
    assert (alone.label, alone.rationale, alone.reason) == ("neutral", None, "too-short")


def test_without_a_readable_member_the_reason_is_more_telling_than_no_reply() -> None:
    nothing = Sample(text="", reason="no-reply", run="a")
    assert (
        weighted_majority(
            [nothing, Sample(text="?", reason="unparsed", run="b")], make_task(ESNLI)
        ).reason
        == "unparsed"
    )
    assert (
        weighted_majority([nothing], make_task(ESNLI)).reason
        == weighted_majority([], make_task(ESNLI)).reason
        == "no-reply"
    )


# --- what later stages see


def test_the_soft_target_is_the_weighted_mean_of_the_members_distributions(two: Path) -> None:
    voted(two)
    recipe = load_recipe(two)
    task = make_task(recipe.task)
    annotations = RunFolder(two.parent / "voted").load_annotations(
        "train", source_fingerprint(recipe, task)
    )
    labels = ("billing", "shipping")
    targets = {name: vote_distribution(row, labels, task) for name, row in annotations.items()}
    assert targets["r0"] == pytest.approx([2 / 3, 1 / 3])
    assert targets["r1"] == pytest.approx([2 / 3 * 1 / 2, 2 / 3 * 1 / 2 + 1 / 3])
    assert targets["r2"] == pytest.approx([0.9, 0.1]), (
        "a single reply's probability, as without an ensemble"
    )
    both = annotations["r0"].model_copy(
        update={
            "samples": [
                sample("billing", "a", 3.0, label_logprob=math.log(0.6)),
                sample("shipping", "b", 1.0),
            ]
        }
    )
    assert vote_distribution(both, labels, task) == pytest.approx(
        [3 / 4 * 0.6, 3 / 4 * 0.4 + 1 / 4]
    )


def test_later_stages_notice_a_changed_weight_or_member(two: Path) -> None:
    voted(two)
    recipe = load_recipe(two)
    task, run = make_task(recipe.task), two.parent / "voted"
    assert RunFolder(run).load_annotations("train", source_fingerprint(recipe, task))
    members = "teacher.members=[{run: runs/gpt}, {run: runs/qwen}]"
    assert learned_source(load_recipe(two, [members]), task) != learned_source(recipe, task)
    change(two.parent / "runs" / "qwen", lambda record: record.update(source="another prompt"))
    with pytest.raises(UserError, match="another teacher"):
        RunFolder(run).load_annotations("train", source_fingerprint(recipe, task))


def test_a_member_may_move_and_the_annotations_stay_the_same_teachers(two: Path) -> None:
    before = source_fingerprint(load_recipe(two), make_task(load_recipe(two).task))
    (two.parent / "runs" / "qwen").rename(two.parent / "elsewhere")
    moved = load_recipe(two, ["teacher.members=[{run: runs/gpt, weight: 2.0}, {run: elsewhere}]"])
    assert source_fingerprint(moved, make_task(moved.task)) == before


def test_samples_of_a_single_teacher_are_written_as_before() -> None:
    assert set(json.loads(Sample(text="x").model_dump_json())) == {
        "text", "label", "rationale", "reason", "finish_reason", "hinted", "label_logprob",
    }  # fmt: skip


def test_an_ensemble_may_be_a_member_and_keeps_its_own_weights(two: Path) -> None:
    voted(two)
    changes = ["teacher.members=[{run: voted, weight: 3}, {run: runs/qwen}]"]
    annotate(load_recipe(two, changes), out=two.parent / "nested")
    row = read(two.parent / "nested")[0]
    assert [row_sample["weight"] for row_sample in row["samples"]] == pytest.approx([2, 1, 1])
    assert row["teacher"]["model"] == "gpt-4.1-mini + Qwen/Qwen3-32B + Qwen/Qwen3-32B"
    assert row["vote_share"] == pytest.approx(0.5)


# --- what stops it


def test_members_that_cannot_vote_are_errors(two: Path) -> None:
    gpt = two.parent / "runs" / "gpt"
    assert "runs/none is not a run with annotations" in refused(
        two, ["teacher.members=[{run: runs/gpt}, {run: runs/none}]"]
    )
    assert "are the same run" in refused(
        two, ["teacher.members=[{run: runs/gpt}, {run: runs/../runs/gpt}]"]
    )
    assert "no annotations of test" in refused(two, ["annotate.splits=[train, test]"])
    change(gpt, lambda record: record.update(status="interrupted"))
    assert "is interrupted, not done" in refused(two)
    change(gpt, lambda record: record.update(status="partial"))
    change(gpt, lambda record: record["recipe"]["task"].update(labels=["billing", "technical"]))
    assert "was annotated for another task (task.labels ['billing', 'technical'] there" in refused(
        two
    )


def test_people_cannot_be_a_member_since_their_labels_are_the_answers(two: Path) -> None:
    change(
        two.parent / "runs" / "gpt", lambda record: record["recipe"]["teacher"].update(kind="human")
    )
    assert "gold labels" in refused(two)


def test_other_inputs_under_the_same_ids_are_refused_and_the_earlier_file_stays(two: Path) -> None:
    voted(two)
    before = (two.parent / "voted" / "annotate" / "train.jsonl").read_bytes()
    path = two.parent / "runs" / "qwen" / "annotate" / "train.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace("parcel number 1", "parcel number 11"),
        encoding="utf-8",
    )
    with pytest.raises(UserError, match="row 'r1' of train has another input"):
        voted(two)
    with pytest.raises(UserError, match="row 'r1' of train has another input"):
        validate(with_valid(two))
    assert (two.parent / "voted" / "annotate" / "train.jsonl").read_bytes() == before


def test_a_member_without_any_of_the_rows_is_refused(two: Path) -> None:
    path = two.parent / "runs" / "qwen" / "annotate" / "train.jsonl"
    path.write_text(
        path.read_text(encoding="utf-8").replace('"id":"r', '"id":"s'), encoding="utf-8"
    )
    assert "runs/qwen has none of this recipe's train rows" in refused(two)


def test_a_run_cannot_be_a_member_of_its_own_ensemble(two: Path) -> None:
    gpt = two.parent / "runs" / "gpt"
    before = {path.name: path.read_bytes() for path in (gpt / "annotate").iterdir()}
    with pytest.raises(UserError, match="own run folder"):
        annotate(load_recipe(two), out=gpt)
    assert {path.name: path.read_bytes() for path in (gpt / "annotate").iterdir()} == before


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{kind: ensemble}", "two or more runs"),
        ("{kind: ensemble, members: [{run: a}]}", "two or more runs"),
        (
            "{kind: ensemble, model: m, members: [{run: a}, {run: b}]}",
            "do not belong to kind ensemble",
        ),
        ("{model: m, members: [{run: a}, {run: b}]}", "belongs to kind ensemble, not openai"),
        ("{kind: ensemble, members: [{run: a, weight: 0}, {run: b}]}", "greater than 0"),
    ],
)
def test_an_incomplete_ensemble_is_an_error_in_the_recipe(
    toy: Toy, teacher: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(toy(), [f"teacher={teacher}"])


# --- before it is run


def test_validate_and_doctor_name_what_the_members_have(two: Path) -> None:
    warnings = validate(with_valid(two)).warnings
    assert "train: runs/qwen has no annotation of 1 of 4 rows: it does not vote there" in warnings
    change(two.parent / "runs" / "qwen", lambda record: record.update(status="partial"))
    first, second = _teacher(load_recipe(two))
    assert (first.status, first.message) == ("ok", "runs/gpt: gpt-4.1-mini, weight 2, done")
    assert second.status == "warning" and second.hint and "do not vote" in second.hint


def test_the_shown_recipe_is_the_same_ensemble_and_nothing_can_be_sent(two: Path) -> None:
    shown = run_dsbs("show", two.name, cwd=two.parent)
    assert shown.returncode == 0, shown.stderr
    (two.parent / "shown.yaml").write_text(shown.stdout, encoding="utf-8")
    assert load_recipe(two.parent / "shown.yaml").teacher == load_recipe(two).teacher
    for flag in (["--dry-run"], ["--pilot", "2"], ["--batch-export", "x.jsonl"]):
        result = run_dsbs("annotate", two.name, *flag, cwd=two.parent)
        assert (
            result.returncode == 2
            and "kind ensemble" in result.stderr
            and "Traceback" not in result.stderr
        )
