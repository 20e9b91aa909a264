"""Local teachers and terms through the whole stage: who is trained, kept, resumed, refused, and asked once."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer
from loopback import LoopbackServer
from pydantic import ValidationError

from dsbs import DsbsError, Student, UserError, annotate, load_recipe, train
from dsbs.config import Recipe, TrainSection
from dsbs.students import learn_vocabulary
from dsbs.training import cell
from dsbs.training.distillation import local_teachers as teachers
from dsbs.training.distillation.local_teachers import planned_teachers
from dsbs.training.methods import grid
from dsbs.training.packed.forward import ForwardRunner
from dsbs.training.run import planned
from dsbs.training.trainer import StepTrainer

PANGRAM = "The quick brown fox jumps over a lazy dog; SPHINX of black quartz, JUDGE my VOW"
TEACHERS = "train.teachers=[{size: nano, max_steps: 2}]"
RESPONSE = ("train.methods=finetune+response", "train.terms=[{kind: response}]", TEACHERS)
KEPT = ("train.methods=finetune+response", "train.terms=[{kind: response, top_k: 4}]", TEACHERS)
FEATURE = ("train.methods=finetune+feature", "train.terms=[{kind: feature}]", TEACHERS)


@pytest.fixture
def on_toy(toy: Callable[..., Path]) -> Callable[..., Recipe]:
    """Recipes on the toy data; a method that learns gold labels alone needs no annotation."""
    path = toy()
    return lambda *overrides: load_recipe(path, ["train.methods=finetune", *overrides])


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_teacher_is_trained_first_and_its_student_says_so(
    on_toy: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe, run = on_toy(*RESPONSE), tmp_path / "run"
    assert [(line["name"], line["done"]) for line in planned(recipe, run)] == [
        ("teacher 1-nano-finetune-gold", False),
        ("finetune+response-gold-s0", False),
    ]
    result = train(recipe, out=run)
    assert [one.name for one in result.students] == ["finetune+response-gold-s0"]
    assert [one.name for one in result.teachers] == ["1-nano-finetune-gold"]
    assert result.as_json()["teachers"][0]["valid_accuracy"] >= 0
    folder, teachers = run / "train" / "finetune+response-gold-s0", run / "train" / "teachers"
    logged = [row for row in lines(folder / "metrics.jsonl") if "loss" in row]
    for row in logged:
        assert row["response_loss"] > 0 and row["loss"] == pytest.approx(
            row["label_loss"] + row["response_loss"], rel=1e-4
        )
    record = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    assert [one["path"] for one in record["teachers"]] == [str(teachers / "1-nano-finetune-gold")]
    assert all(line["done"] for line in planned(recipe, run))
    stamps = [
        (path / "model.safetensors").stat().st_mtime_ns
        for path in (folder, teachers / "1-nano-finetune-gold")
    ]
    train(recipe, out=run)
    assert stamps == [
        (path / "model.safetensors").stat().st_mtime_ns
        for path in (folder, teachers / "1-nano-finetune-gold")
    ]
    other = on_toy(*RESPONSE[:2], "train.teachers=[{size: nano, max_steps: 3}]")
    train(other, out=run)
    assert [path.name[:21] for path in (teachers / "aside").iterdir()] == [
        "1-nano-finetune-gold-"
    ], "moved aside, not lost"
    assert len(list((run / "train" / "aside").iterdir())) == 1, (
        "a student of another teacher is another student"
    )


def test_adding_a_term_trains_nothing_else_anew(
    on_toy: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (plain,) = train(on_toy(), out=run).students
    both = on_toy("train.methods=[finetune, finetune+response]", *RESPONSE[1:])
    assert both.training_of("finetune") == on_toy().training == plain.settings
    (first, second) = train(both, out=run).students
    assert first.fingerprint == plain.fingerprint and second.settings != plain.settings
    more = on_toy(
        "train.methods=[finetune, finetune+response, finetune+relation]", TEACHERS,
        "train.terms=[{kind: response}, {kind: relation, weight: 0.5}]",
    )  # fmt: skip
    assert [one.fingerprint for one in train(more, out=run).students[:2]] == [
        first.fingerprint,
        second.fingerprint,
    ]


@pytest.mark.parametrize(
    "overrides", [RESPONSE, KEPT, FEATURE], ids=["response", "top_k", "feature"]
)
def test_an_interrupted_training_with_a_term_ends_in_the_weights_of_an_undisturbed_one(
    on_toy: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
) -> None:
    recipe = on_toy(
        *overrides, "train.max_steps=8", "train.eval_every=2", "eval.max_label_tokens=2"
    )
    (whole,) = train(recipe, out=tmp_path / "whole").students
    real, looks = cell.CellTraining._validate, []

    def stop(self: cell.CellTraining, *args: Any) -> dict[str, float]:
        looks.append(self.name)
        if self.name == whole.name and looks.count(whole.name) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(cell.CellTraining, "_validate", stop)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out=tmp_path / "cut")
    folder = tmp_path / "cut" / "train" / whole.name
    assert not (folder / "train.json").exists() and list(folder.glob("checkpoints/checkpoint-*"))
    (again,) = train(recipe, out=tmp_path / "cut").students
    assert weights(folder) == weights(Path(whole.path)) and again.fingerprint == whole.fingerprint
    assert (
        Student.load(folder).engine.parameters == again.parameters == again.trainable_parameters
    ), "no projection is left in it"


def test_kept_log_probabilities_are_asked_for_once_and_for_all_seeds(
    on_toy: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, asked, run = on_toy(*KEPT), [], tmp_path / "run"
    real = ForwardRunner.__call__

    def counting(self: ForwardRunner, batch: Any) -> Any:
        if not self._model.training:
            asked.append(len(batch))
        return real(self, batch)

    monkeypatch.setattr(ForwardRunner, "__call__", counting)
    (first,) = train(recipe, out=run).students
    assert asked, "the first student's rows are asked for"
    (folder,) = (run / "train" / "logprobs").iterdir()
    assert not list(folder.glob(".*"))
    asked.clear()
    seeds = on_toy(*KEPT, "train.seeds=[0, 1]")
    assert train(seeds, out=run).students[0].fingerprint == first.fingerprint
    assert not asked, "the second seed's rows are the same"
    for path in folder.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    (folder / "damaged.npz").write_bytes(b"PK")
    train(on_toy(*KEPT, "train.seeds=[0, 2]"), out=run)
    assert asked, "what is damaged is asked for anew"
    assert not (folder / "damaged.npz").exists()


def test_a_trained_student_teaches_where_its_vocabulary_and_prefixes_fit(
    on_toy: Callable[..., Recipe], tmp_path: Path
) -> None:
    (there,) = train(on_toy(), out=tmp_path / "first").students
    by = f"train.teachers=[{{model: '{there.path}'}}]"
    (taught,) = train(on_toy(*RESPONSE[:2], by), out=tmp_path / "second").students
    assert taught.method == "finetune+response"
    tokenizer = learn_vocabulary(
        [f"{word} {word[::-1]} {word}s" for word in PANGRAM.split()] * 9, 90
    )
    tokenizer.save_pretrained(there.path)
    with pytest.raises(UserError, match="has another vocabulary than the student"):
        train(on_toy(*RESPONSE[:2], by), out=tmp_path / "third")
    card = json.loads((Path(there.path) / "student.json").read_text(encoding="utf-8"))
    card["prefixes"] = {"label": "say: "}
    (Path(there.path) / "student.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(UserError, match="never learned the label after ''"):
        train(on_toy(*RESPONSE[:2], by), out=tmp_path / "fourth")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methods": ["finetun+response"]}, "did you mean 'finetune'"),
        ({"methods": ["finetune+response"]}, "there is no term 'response': train.terms is empty"),
        (
            {"methods": ["finetune+respons"], "terms": [{"kind": "response"}]},
            "did you mean 'response'",
        ),
        (
            {"methods": ["finetune+labels+labels"], "terms": [{"kind": "labels"}]},
            "names the term 'labels' twice",
        ),
        (
            {"methods": ["finetune+labels"], "terms": [{"kind": "labels"}, {"kind": "labels"}]},
            "two terms are called 'labels'",
        ),
        (
            {"methods": ["finetune"], "terms": [{"kind": "labels"}]},
            r"e.g. methods: \[finetune, finetune\+labels\]",
        ),
        (
            {"methods": ["finetune+response"], "terms": [{"kind": "response"}]},
            "compares with a local model; add one",
        ),
        ({"methods": ["finetune"], "teachers": [{"size": "mini"}]}, "no term compares with them"),
        (
            {"methods": ["finetune"], "terms": [{"kind": "consistency"}]},
            "the experimental term consistency was removed",
        ),
        (
            {"methods": ["finetune+label"], "terms": [{"kind": "labels", "name": "label"}]},
            "take another name",
        ),
        (
            {"methods": ["finetune+train"], "terms": [{"kind": "labels", "name": "train"}]},
            "take another name",
        ),
        (
            {"methods": ["finetune+eval"], "terms": [{"kind": "labels", "name": "eval"}]},
            "take another name",
        ),
        (
            {
                "methods": ["finetune+feature"],
                "terms": [{"kind": "feature"}],
                "teachers": [{}],
                "lora": {},
            },
            "which train.lora's adapters cannot hold",
        ),
    ],
)
def test_a_mistake_in_methods_and_terms_is_said_with_its_remedy(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSection.model_validate(section)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("train.terms=[{kind: response, targets: rationale}]", TEACHERS),
            "which finetune.response does not learn",
        ),
        (
            (
                "train.terms=[{kind: labels, name: response}]",
                "train.methods=rationale-then-label+response",
            ),
            "writes them beside a rationale",
        ),
    ],
)
def test_a_term_that_a_method_has_nothing_for_is_refused_before_training(
    on_toy: Callable[..., Recipe], tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        planned(on_toy("train.methods=finetune+response", *overrides), tmp_path)


def test_a_recipe_with_terms_reads_again_as_it_was_written_down(
    on_toy: Callable[..., Recipe],
) -> None:
    first = on_toy(
        "train.methods=[finetune+response+hints]", "train.teachers=[{size: nano}, {model: /somewhere}]",
        "train.terms=[{kind: response, temperature: 2.0}, {kind: feature, name: hints, layers: {1: 2}}]",
    )  # fmt: skip
    again = Recipe.model_validate(json.loads(json.dumps(first.model_dump(mode="json"))))
    assert again.model_dump() == first.model_dump()
    assert again.training_of("finetune+response+hints") == first.training_of(
        "finetune+response+hints"
    )


def test_the_teachers_own_recipe_is_the_same_for_each_student_of_a_base_method(
    on_toy: Callable[..., Recipe],
) -> None:
    recipe = on_toy(
        *RESPONSE[1:],
        "train.methods=[finetune, finetune+response]",
        "train.tune={learning_rate: [0.1, 0.2]}",
    )
    cells = grid(recipe.train)
    ((taught, job),) = planned_teachers(recipe, cells, Path("train"))
    assert (
        job.folder == Path("train/teachers/1-nano-finetune-gold") and job.cell.method == "finetune"
    )
    assert taught.train.tune is None and taught.train.max_steps == 2 and not taught.train.terms


def test_a_teacher_learns_by_the_defaults_of_its_own_start(
    on_toy: Callable[..., Recipe], tmp_path: Path
) -> None:
    def learning(*overrides: str) -> tuple[float, int]:
        recipe = on_toy(*RESPONSE[:2], *overrides)
        ((taught, _),) = planned_teachers(recipe, grid(recipe.train), tmp_path)
        return taught.train.learning_rate, taught.train.max_steps

    plain = ("train.learning_rate=0.001", "train.max_steps=1000")
    assert learning(*plain, "train.teachers=[{size: nano}]") == (1e-3, 1000), (
        "as a student from scratch"
    )
    pretrained = (
        "student={model: somewhere}",
        "train.learning_rate=0.00005",
        "train.max_steps=10000",
    )
    assert learning(*pretrained, "train.teachers=[{size: nano}]") == (1e-3, 1000)
    assert learning(*pretrained, "train.teachers=[{start: elsewhere}]") == (5e-5, 10_000)
    assert learning(*pretrained, "train.max_steps=70", "train.teachers=[{size: nano}]") == (
        1e-3,
        70,
    )
    assert learning(*pretrained, "train.teachers=[{size: nano, learning_rate: 0.01}]") == (
        0.01,
        1000,
    )


def test_votes_of_annotations_are_learned_and_tell_students_apart(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    found = []
    for half in (False, True):
        with LoopbackServer(
            good_answer if not half else lambda body, n: good_answer(body, n) if n % 2 else "No."
        ) as server:
            over = [
                f"teacher.base_url={server.url}",
                "train.methods=[finetune, finetune+labels]",
                "train.terms=[{kind: labels}]",
            ]
            recipe, run = load_recipe(toy(), over), tmp_path / f"run-{half}"
            annotate(recipe, out=run)
            found.append(train(recipe, out=run).students)
            logged = lines(run / "train" / "finetune+labels-gold-s0" / "metrics.jsonl")
            losses = [row["labels_loss"] for row in logged if "loss" in row]
            assert (
                min(losses) >= 0 and max(losses) > 0
            )  # which rows have a vote is chance: a line may know of none
    assert found[0][1].source and not found[0][0].source, (
        "one learned from annotations, the other did not"
    )
    assert found[0][1].fingerprint != found[1][1].fingerprint


def test_votes_that_no_train_row_has_are_said_before_training(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    with LoopbackServer(lambda body, n: "No.") as server:
        over = [
            f"teacher.base_url={server.url}",
            "train.methods=finetune+labels",
            "train.terms=[{kind: labels}]",
        ]
        recipe = load_recipe(toy(), over)
        annotate(recipe, out=tmp_path / "run")
    with pytest.raises(UserError, match="no train row has a vote of it"):
        train(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run" / "train").exists()


def test_relation_depends_on_the_examples_of_a_forward_pass_and_no_other_term_does(
    on_toy: Callable[..., Recipe],
) -> None:
    terms = (
        "train.methods=[finetune, finetune+response, finetune+relation]",
        "train.terms=[{kind: response}, {kind: relation}]",
    )
    whole, parts = (
        on_toy(*terms, TEACHERS, f"train.micro_batch_size={size}") for size in ("null", 4)
    )
    same = {
        name: whole.training_of(name) == parts.training_of(name) for name in whole.train.methods
    }
    assert same == {"finetune": True, "finetune+response": True, "finetune+relation": False}


def test_relation_takes_no_smaller_passes_where_memory_is_full(
    on_toy: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StepTrainer.compute_loss

    def small_memory(self: StepTrainer, model: Any, inputs: Any, **kwargs: Any) -> Any:
        if len(inputs["label"].target_lengths) > 4:
            raise MemoryError
        return real(self, model, inputs, **kwargs)

    monkeypatch.setattr(StepTrainer, "compute_loss", small_memory)
    with pytest.raises(DsbsError, match="with fewer relation would mean something else"):
        train(
            on_toy("train.methods=finetune+relation", "train.terms=[{kind: relation}]", TEACHERS),
            out=tmp_path,
        )
    assert (tmp_path / "train/teachers/1-nano-finetune-gold/train.json").is_file(), (
        "its teacher took them"
    )


def test_a_teacher_leaves_memory_when_no_later_student_needs_it(
    on_toy: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, loaded, there = teachers.load_model, [], []

    def loading(folder: str) -> Any:
        model = real(folder)
        there.append([one() is not None for one in loaded])
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(teachers, "load_model", loading)
    for seeds, before in (("[0]", [[], [False]]), ("[1, 2]", [[], [True]])):
        loaded.clear()
        there.clear()
        train(
            on_toy(
                *RESPONSE, "train.max_steps=1", "train.subset=[1.0, 0.5]", f"train.seeds={seeds}"
            ),
            out=tmp_path / seeds,
        )
        assert there == before and not any(one() for one in loaded), (
            "each part of the rows has a teacher of its own"
        )
