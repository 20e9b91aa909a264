"""dsbs compress: records, refusal, resuming, and what is set aside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEAMS, run_dsbs, toy_rows, write_csv
from safetensors.torch import load_file

from dsbs import UserError, compress, load_recipe, train
from dsbs.compression import WeightStep, read_step
from dsbs.compression.planning import Options
from dsbs.compression.run import TABLE_HEADINGS, prepare
from dsbs.compression.source import FineTuneData, find_source, importance_rows
from dsbs.config import registry
from dsbs.errors import GateError
from dsbs.progress import NoProgress
from dsbs.run_folder import RunFolder
from dsbs.students.student import Student
from dsbs.students.weights import load_model

NAME = "finetune-gold-s0"


@pytest.fixture(scope="session")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose student knows the toy task. It is copied before anything is made of it."""
    home = tmp_path_factory.mktemp("learned")
    write_csv(home / "train.csv", toy_rows(80))
    recipe: dict[str, Any] = {
        "name": "toy",
        "task": {
            "name": "classification",
            "labels": list(TEAMS),
            "columns": {"label": "team"},
            "data": {
                "train": str(home / "train.csv"),
                "test": str(home / "train.csv"),
                "valid_fraction": 0.3,
            },
        },
        "teacher": {"model": "none", "base_url": "http://127.0.0.1:9/v1"},
        "student": {
            "init": "scratch",
            "vocab_size": 200,
            "max_input_tokens": 32,
            "max_target_tokens": 16,
        },
        "train": {
            "methods": "finetune",
            "learning_rate": 0.002,
            "batch_size": 16,
            "max_steps": 60,
            "eval_every": 20,
        },
        "eval": {"max_label_tokens": 8, "latency_calls": 1},
    }
    (home / "toy.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    result = train(load_recipe(home / "toy.yaml"), out=home / "run")
    assert result.students[0].valid_accuracy > 0.9, "or nothing could be lost"
    return home / "run"


@pytest.fixture
def run(learned: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(learned, tmp_path / "run")
    yield tmp_path / "run"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "model.safetensors")
    return found


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_each_step_of_a_chain_is_a_student_with_its_record(run: Path) -> None:
    chain = ["prune-ff=0.5", "drop-layers=0.5", "prune-heads=0.50", "low-rank=0.25"]
    result = compress(run / "train" / NAME, chain, max_drop=1, heal_steps=4)
    names = [
        "prune-ff=0.5",
        "prune-ff=0.5+drop-layers=0.5",
        "prune-ff=0.5+drop-layers=0.5+prune-heads=0.5",
    ]
    names.append(f"{names[-1]}+low-rank=0.25")
    assert [record.name for record in result.steps] == names
    assert [record.name for record in RunFolder(run).read_compressed()] == names
    sizes = [
        result.steps[0].original.megabytes,
        *(record.compressed.megabytes for record in result.steps),
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 5
    gold = {row["text"]: row["team"] for row in toy_rows(80)}
    original = Student.load(run / "train" / NAME)
    for record, folder in zip(result.steps, result.folders, strict=True):
        assert folder == run / "compress" / NAME / record.name
        student = Student.load(folder)
        assert student.card.name == f"{NAME}+{record.name}"
        assert record.compressed.parameters == student.backend.parameters
        assert record.n == len(valid_texts(run))
        said = [answer.label for answer in student.predict(valid_texts(run), max_label_tokens=8)]
        theirs = [answer.label for answer in original.predict(valid_texts(run), max_label_tokens=8)]
        right = [label == gold[text] for label, text in zip(said, valid_texts(run), strict=True)]
        assert record.compressed.accuracy == pytest.approx(sum(right) / len(right))
        assert record.agreement == pytest.approx(
            sum(a == b for a, b in zip(said, theirs, strict=True)) / len(said)
        )
        assert record.original.accuracy > 0.9 and record.accepted and record.max_drop == 1
        assert (
            record.before_healing is not None
            and record.before_healing <= record.compressed.accuracy
        )
        assert [(one.batch_size, one.calls) for one in record.compressed.latency] == [
            (1, 1),
            (64, 1),
        ]
    config = load_model(str(result.folders[-1])).config
    assert (config.num_layers, config.num_decoder_layers, config.num_heads, config.d_ff) == (
        2,
        1,
        2,
        192,
    )
    assert not (run / "compress" / NAME / "work").exists() or not any(
        (run / "compress" / NAME / "work").iterdir()
    )
    table = result.table()
    assert [row[0] for row in table] == ["original", *names]
    assert {len(row) for row in table} == {len(TABLE_HEADINGS)}


def valid_texts(run: Path) -> list[str]:
    from dsbs.config.load import read_recorded
    from dsbs.tasks import make_task
    from dsbs.tasks.data import load

    recipe = read_recorded(
        json.loads((run / "train" / "manifest.json").read_text(encoding="utf-8"))
    )
    assert recipe is not None
    return [row.input["text"] for row in load(recipe, make_task(recipe.task), "valid")]


def test_a_step_that_loses_too_much_is_refused_kept_and_the_end_of_the_chain(run: Path) -> None:
    student, chain = (
        str(run / "train" / NAME),
        ["--method", "magnitude=0.99", "--method", "prune-ff=0.5", "--heal-steps", "0"],
    )
    found = run_dsbs("compress", student, *chain, "--json", cwd=run)
    assert found.returncode == 4, found.stderr
    said = json.loads(found.stdout)["steps"]
    assert [(step["chain"], step["accepted"], step["before_healing"]) for step in said] == [
        (["magnitude=0.99"], False, None)
    ]
    lost = said[0]["original"]["accuracy"] - said[0]["compressed"]["accuracy"]
    assert lost > 0.02
    assert (
        f"a loss of 2 points, the loss {100 * lost:.1f}" in found.stderr
        and "--max-drop" in found.stderr
    )
    folder = run / "compress" / NAME / "magnitude=0.99"
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert json.loads((folder / "compress.json").read_text(encoding="utf-8"))["accepted"] is False
    result = compress(
        run / "train" / NAME, ["magnitude=0.99", "prune-ff=0.5"], max_drop=1, heal_steps=0
    )
    assert [record.accepted for record in result.steps] == [True, True] and result.refusal() is None
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp, "judged anew, not made anew"
    assert json.loads((folder / "compress.json").read_text(encoding="utf-8"))["max_drop"] == 1


def test_a_refusal_says_what_was_lost(run: Path) -> None:
    refusal = compress(
        run / "train" / NAME, ["magnitude=0.99"], max_drop=0.001, heal_steps=1
    ).refusal()
    assert isinstance(refusal, GateError)
    assert "magnitude=0.99 is refused" in refusal.problem and "--heal-steps" in refusal.hint


def test_finished_steps_are_kept_and_what_no_longer_fits_is_set_aside_and_comes_back(
    run: Path,
) -> None:
    def made(**how: Any) -> tuple[Path, int]:
        (folder,) = compress(run / "train" / NAME, ["prune-ff=0.5"], max_drop=1, **how).folders
        return folder, (folder / "model.safetensors").stat().st_mtime_ns

    folder, first = made(heal_steps=2)
    assert made(heal_steps=2) == (folder, first)
    assert made(heal_steps=0)[1] != first
    aside = run / "compress" / NAME / "aside"
    assert [path.name.rpartition("-")[0] for path in aside.iterdir()] == ["prune-ff=0.5"]
    assert made(heal_steps=2) == (folder, first), "brought back, not made anew"


def test_a_chain_goes_on_from_a_compressed_student(run: Path) -> None:
    (first,) = compress(run / "train" / NAME, ["prune-ff=0.5"], max_drop=1, heal_steps=0).folders
    (second,) = compress(first, ["drop-layers=0.5"], max_drop=1, heal_steps=0).folders
    assert second.name == "prune-ff=0.5+drop-layers=0.5"
    stamp = (second / "model.safetensors").stat().st_mtime_ns
    both = compress(
        run / "train" / NAME, ["prune-ff=0.5", "drop-layers=0.5"], max_drop=1, heal_steps=0
    ).folders
    assert both == [first, second]
    assert (second / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("at", ["healing", "measuring"])
def test_a_killed_step_continues_to_the_student_of_an_undisturbed_one(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    from dsbs.compression.source import Evaluator
    from dsbs.training.callbacks import MetricsLogger

    shutil.copytree(run, tmp_path / "other")
    how: dict[str, Any] = {"max_drop": 1, "heal_steps": 12}
    (undisturbed,) = compress(run / "train" / NAME, ["magnitude=0.9"], **how).folders
    passed = MetricsLogger.on_step_end
    compare = Evaluator.compare
    steps: list[int] = []

    def step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passed(self, args, state, control, **kwargs)
        steps.append(state.global_step)
        if at == "healing" and state.global_step == 8:
            raise KeyboardInterrupt

    def measure(self: Any, *args: Any) -> Any:
        if at == "measuring":
            raise KeyboardInterrupt
        return compare(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLogger, "on_step_end", step)
        patch.setattr(Evaluator, "compare", measure)
        compress(tmp_path / "other" / "train" / NAME, ["magnitude=0.9"], **how)
    assert not list((tmp_path / "other" / "compress").glob("*/*/compress.json"))
    steps.clear()
    with monkeypatch.context() as patch:
        at = "never"
        patch.setattr(MetricsLogger, "on_step_end", step)
        (again,) = compress(tmp_path / "other" / "train" / NAME, ["magnitude=0.9"], **how).folders
    assert same(again, undisturbed)
    assert steps in ([7, 8, 9, 10, 11, 12], []), (
        "from the last checkpoint, or not at all where healing was done"
    )


def test_zeros_stay_zero_while_the_rest_heals_and_in_later_steps_too(run: Path) -> None:
    chain = ["magnitude=0.8", "prune-ff=0.25"]
    first, second = compress(run / "train" / NAME, chain, max_drop=1, heal_steps=6).folders
    unhealed = Path(shutil.copytree(run, run.parent / "unhealed"))
    shutil.rmtree(unhealed / "compress")
    (start,) = compress(
        unhealed / "train" / NAME, ["magnitude=0.8"], max_drop=1, heal_steps=0
    ).folders
    healed, begun = weights(first), weights(start)
    zeros = {name: begun[name] == 0 for name in begun}
    assert sum(int(mask.sum()) for mask in zeros.values()) > 100_000
    assert all(bool((healed[name][mask] == 0).all()) for name, mask in zeros.items())
    assert not same(first, start), "the others moved"
    matrix = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(weights(second)[matrix] == 0, zeros[matrix])


def test_healing_brings_back_what_was_lost_by_its_own_learning_rate(run: Path) -> None:
    (record,) = compress(
        run / "train" / NAME,
        ["drop-layers=0.5"],
        max_drop=1,
        heal_from="rows",
        heal_steps=20,
        layers_by="position",
    ).steps
    assert record.before_healing is not None
    lost = record.original.accuracy - record.before_healing
    assert lost > 0.2 and record.compressed.accuracy - record.before_healing >= lost / 2
    lines = [
        json.loads(line)
        for line in (run / "compress" / NAME / record.name / "metrics.jsonl")
        .read_text()
        .splitlines()
    ]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert 0.0006 < max(rates) <= 0.002 / 3


@pytest.mark.parametrize("heal_from", ["original", "both"])
def test_the_original_teaches_its_smaller_copy(run: Path, heal_from: Any) -> None:
    result = compress(
        run / "train" / NAME,
        ["drop-layers=0.5", "prune-ff=0.5"],
        max_drop=1,
        heal_from=heal_from,
        heal_steps=2,
    )
    suffix = "" if heal_from == "original" else "@both"
    names = [f"drop-layers=0.5{suffix}", f"drop-layers=0.5{suffix}+prune-ff=0.5{suffix}"]
    assert [folder.name for folder in result.folders] == names
    for record, folder in zip(result.steps, result.folders, strict=True):
        assert record.healer == heal_from and record.chain[0] == "drop-layers=0.5"
        assert record.layers.keys() == {"encoder", "decoder"}, "the second step keeps the first's"
        assert [len(kept) for kept in record.layers.values()] == [2, 1]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for row in rows:
            if "loss" not in row:
                continue
            terms = row["response_loss"]
            terms += 0.5 * (row["encoder-feature_loss"] + row["decoder-feature_loss"])
            of_targets = row["label_loss"] if heal_from == "both" else 0.0
            assert row["loss"] == pytest.approx(of_targets + terms, rel=1e-4)
        assert Student.load(folder).card.method == "finetune"
        assert not (folder / "layers.json").exists()
    first, second = result.steps
    assert first.layers_by == "loss" and second.layers_by is None
    assert first.dropped_layers.keys() == first.layer_scores.keys() == first.layers.keys()
    assert sorted(first.layers["encoder"] + first.dropped_layers["encoder"]) == [1, 2, 3, 4]
    scores = first.layer_scores["encoder"]
    kept = [scores[layer] for layer in first.layers["encoder"][1:]]
    assert min(kept) >= max(scores[layer] for layer in first.dropped_layers["encoder"])
    assert second.dropped_layers == {} and second.layers == first.layers


def test_a_model_too_large_to_stand_beside_its_copy_is_healed_by_its_rows(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsbs.compression import healing

    notes: list[str] = []

    class Progress(NoProgress):
        def say(self, message: str) -> None:
            notes.append(message)

    monkeypatch.setattr(healing, "device_memory", lambda: 10_000_000)
    source = find_source(run / "train" / NAME)
    _, (step,) = prepare(source, ["prune-ff=0.5"], Options(heal_steps=2), Progress())
    assert step.healing.source == "rows" and step.name == "prune-ff=0.5@rows"
    needed = source.student.parameters * 20 / 1e9
    assert f"need about {needed:.1f} GB" in notes[0] and "this machine has 0.0 GB" in notes[0]
    with pytest.raises(UserError, match="--heal-from both: the original and a copy"):
        prepare(source, ["prune-ff=0.5"], Options("both", heal_steps=2), Progress())
    _, (step,) = prepare(source, ["prune-ff=0.5"], Options("both", heal_steps=0), Progress())
    assert step.healing.source is None and step.name == "prune-ff=0.5"
    section = source.recipe.train.model_copy(update={"optimizer": "adafactor"})
    recipe = source.recipe.model_copy(update={"train": section})
    prepare(replace(source, recipe=recipe), ["prune-ff=0.5"], Options(heal_steps=2), Progress())
    assert "4 and 8 bytes each" in notes[-1]


def test_a_choice_that_does_not_exist_is_told(run: Path) -> None:
    for options in ({"heal_from": "teacher"}, {"layers_by": "size"}, {"rounds": 0}):
        with pytest.raises(UserError):
            compress(run / "train" / NAME, ["prune-ff=0.5"], **options)  # type: ignore[arg-type]


def test_a_quantized_student_is_the_last_of_its_chain_and_four_times_smaller(run: Path) -> None:
    pytest.importorskip("ctranslate2")
    (record,) = compress(run / "train" / NAME, ["quantize=int8"], max_drop=1).steps
    assert record.before_healing is None and record.healing_steps == 0
    assert record.original.megabytes / record.compressed.megabytes > 3
    folder = run / "compress" / NAME / "quantize=int8"
    student = Student.load(folder)
    assert student.card.format == "ct2"
    assert student.predict(["My invoice is wrong."])[0].label == "billing"
    with pytest.raises(UserError, match=r"prune-ff=0\.5 comes after quantize=int8"):
        compress(folder, ["prune-ff=0.5"])


def test_a_low_rank_student_is_quantized_by_torch_alone(run: Path) -> None:
    (folder,) = compress(run / "train" / NAME, ["low-rank=0.25"], max_drop=1, heal_steps=0).folders
    with pytest.raises(UserError, match=r"low-rank") as refusal:
        compress(folder, ["quantize=int16"])
    assert "quantize=int8" in refusal.value.hint and "pip install" not in refusal.value.hint
    from dsbs import export

    with pytest.raises(UserError, match="low-rank matrices, which CTranslate2 does not support"):
        export(folder, "ct2")
    plain = export(folder, "torch", examples=["My invoice is wrong."]).path
    assert not (plain / "predict.py").exists(), "transformers would load random matrices"
    assert "Only dsbs can load" in (plain / "README.md").read_text(encoding="utf-8")
    (record,) = compress(folder, ["quantize=int8"], max_drop=1).steps
    student = Student.load(run / "compress" / NAME / record.name)
    assert student.card.format == "torch"
    assert record.compressed.megabytes < 0.5 * (folder / "model.safetensors").stat().st_size / 1e6


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        (["prune-fff=0.5"], "did you mean 'prune-ff'"),
        (["prune-ff"], "needs a value"),
        (["prune-ff=1.5"], "not a share above 0 and below 1"),
        (["low-rank=energy:2"], "not a share above 0 and below 1"),
        (["quantize=int4"], "not a number format"),
        (["quantize=int8", "prune-ff=0.5"], "comes after quantize=int8"),
        (["prune-heads=0.05"], "removes none of 4 heads"),
        (["low-rank=0.9"], "makes no matrix smaller"),
        ([], "no compression step is given"),
    ],
)
def test_a_step_that_cannot_be_is_told_with_what_to_do(
    run: Path, steps: list[str], problem: str
) -> None:
    with pytest.raises(UserError, match=problem):
        compress(run / "train" / NAME, steps)
    assert not list(run.glob("compress/*/*/compress.json"))


@pytest.mark.parametrize("rate", [0.0, -0.1, float("nan")])
def test_a_learning_rate_of_healing_that_trains_nothing_is_refused(run: Path, rate: float) -> None:
    with pytest.raises(UserError, match="would train nothing"):
        compress(run / "train" / NAME, ["prune-ff=0.5"], heal_learning_rate=rate)


def test_a_student_outside_of_a_run_is_refused(run: Path) -> None:
    lone = shutil.copytree(run / "train" / NAME, run.parent / "lone")
    with pytest.raises(UserError, match="not part of a run"):
        compress(lone, ["prune-ff=0.5"])
    with pytest.raises(UserError, match="is a run folder, not a student"):
        compress(run, ["prune-ff=0.5"])


def test_a_compressed_student_of_an_earlier_original_is_not_compressed_further(run: Path) -> None:
    (folder,) = compress(run / "train" / NAME, ["prune-ff=0.5"], max_drop=1, heal_steps=0).folders
    path = run / "train" / NAME / "train.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    said["student"]["fingerprint"] = "another"
    path.write_text(json.dumps(said), encoding="utf-8")
    with pytest.raises(UserError, match="an earlier version of student"):
        compress(folder, ["drop-layers=0.5"])
    assert (
        compress(run / "train" / NAME, ["prune-ff=0.5"], max_drop=1, heal_steps=0)
        .steps[0]
        .fingerprint
        == "another"
    )


def test_a_dry_run_tells_the_chain_and_makes_nothing(run: Path) -> None:
    steps = ["--method", "prune-ff=0.5", "--method", "quantize=int8"]
    found = run_dsbs("compress", str(run / "train" / NAME), *steps, "--dry-run", "--json", cwd=run)
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)["steps"]
    assert [(line["name"], line["healing_steps"], line["done"]) for line in said] == [
        ("prune-ff=0.5", 6, False),
        ("prune-ff=0.5+quantize=int8", 0, False),
    ]
    assert not (run / "compress").exists()


def test_the_value_of_a_step_is_normalized() -> None:
    texts = ("prune-ff=0.50", "low-rank=energy:.9", "quantize=int8")
    assert [read_step(text).value for text in texts] == ["0.5", "energy:0.9", "int8"]


class Halve(WeightStep):
    """A toy step: halves every bias-free matrix of the decoder."""

    name = "halve"

    def change(self, model: Any, _tokenizer: Any, _examples: Any) -> Any:
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter.mul_(self.share)
        return model


def test_a_step_that_is_registered_in_one_place_is_made_healed_and_reported(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.COMPRESSION_STEPS, "halve", f"{__name__}:Halve")
    chain = ["halve=0.5", "prune-ff=0.5"]
    result = compress(run / "train" / NAME, chain, max_drop=1, heal_steps=2)
    assert [record.name for record in result.steps] == ["halve=0.5", "halve=0.5+prune-ff=0.5"]
    assert result.steps[0].healing_steps == 2
    assert [row[0] for row in result.table()][1] == "halve=0.5"


@pytest.mark.parametrize("subset", [0.5, "2-per-label"])
def test_importance_is_measured_on_rows_that_the_student_learned(
    run: Path, subset: float | str
) -> None:
    data = FineTuneData(find_source(run / "train" / NAME), NoProgress(), needs_train=True).data
    rows = importance_rows(data, subset)
    assert {row.id for row in rows} == {row.id for row in data.subset(subset)}
    if subset == 0.5:
        first = [data.train[i].id for i in data.order[: len(rows)]]
        assert [row.id for row in rows] == first, "by a hash of their ids"
