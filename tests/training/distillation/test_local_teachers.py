"""Local teachers in the train stage: training, reuse, resumption, refusals and caching."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import good_answer
from loopback import LoopbackServer
from pydantic import ValidationError
from tiny_training import loss_lines, weights_hash

from dsbs import DsbsError, Student, UserError, annotate, load_recipe, train
from dsbs.config import Recipe, TrainSection
from dsbs.students.tokenizer import learn_vocabulary
from dsbs.training.distillation import local_teachers
from dsbs.training.distillation.local_teachers import LocalTeacher, planned_teachers
from dsbs.training.grid import grid
from dsbs.training.packed import ForwardRunner
from dsbs.training.run import planned
from dsbs.training.student_run import StudentRun
from dsbs.training.trainer import StepTrainer

PANGRAM = "The quick brown fox jumps over a lazy dog; SPHINX of black quartz, JUDGE my VOW"
TEACHERS = "train.teachers=[{size: nano, max_steps: 2}]"
RESPONSE = ("train.methods=finetune+response", "train.terms=[{kind: response}]", TEACHERS)
TOP_K = ("train.methods=finetune+response", "train.terms=[{kind: response, top_k: 4}]", TEACHERS)
FEATURE = ("train.methods=finetune+feature", "train.terms=[{kind: feature}]", TEACHERS)


@pytest.fixture
def recipe_with(toy: Callable[..., Path]) -> Callable[..., Recipe]:
    """Recipes on the toy data; methods that learn gold labels need no annotations."""
    path = toy()
    return lambda *overrides: load_recipe(path, ["train.methods=finetune", *overrides])


def test_a_teacher_is_trained_first_and_recorded_by_its_student(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    recipe = recipe_with(*RESPONSE)
    run = tmp_path / "run"
    assert [(line["name"], line["done"]) for line in planned(recipe, run)] == [
        ("teacher 1-nano-finetune-gold", False),
        ("finetune+response-gold-s0", False),
    ]
    result = train(recipe, out=run)
    assert [student.name for student in result.students] == ["finetune+response-gold-s0"]
    assert [teacher.name for teacher in result.teachers] == ["1-nano-finetune-gold"]
    assert result.as_json()["teachers"][0]["valid_accuracy"] >= 0
    folder = run / "train" / "finetune+response-gold-s0"
    teachers = run / "train" / "teachers"
    for line in loss_lines(folder):
        assert line["response_loss"] > 0
        assert line["loss"] == pytest.approx(line["label_loss"] + line["response_loss"], rel=1e-4)
    record = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    paths = [teacher["path"] for teacher in record["teachers"]]
    assert paths == [str(teachers / "1-nano-finetune-gold")]
    assert all(line["done"] for line in planned(recipe, run))

    def timestamps() -> list[int]:
        folders = (folder, teachers / "1-nano-finetune-gold")
        return [(path / "model.safetensors").stat().st_mtime_ns for path in folders]

    before = timestamps()
    train(recipe, out=run)
    assert timestamps() == before, "both are finished"
    train(recipe_with(*RESPONSE[:2], "train.teachers=[{size: nano, max_steps: 3}]"), out=run)
    aside = [path.name[:21] for path in (teachers / "aside").iterdir()]
    assert aside == ["1-nano-finetune-gold-"], "set aside, not deleted"
    assert len(list((run / "train" / "aside").iterdir())) == 1, "its student has another teacher"


def test_adding_a_term_retrains_nothing_else(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (plain,) = train(recipe_with(), out=run).students
    both = recipe_with("train.methods=[finetune, finetune+response]", *RESPONSE[1:])
    assert (
        both.students[None].training_of("finetune")
        == recipe_with().students[None].training
        == plain.settings
    )
    (first, second) = train(both, out=run).students
    assert first.fingerprint == plain.fingerprint
    assert second.settings != plain.settings
    three = recipe_with(
        "train.methods=[finetune, finetune+response, finetune+relation]",
        TEACHERS,
        "train.terms=[{kind: response}, {kind: relation, weight: 0.5}]",
    )
    students = train(three, out=run).students
    assert [student.fingerprint for student in students[:2]] == [
        first.fingerprint,
        second.fingerprint,
    ]


@pytest.mark.parametrize(
    "overrides", [RESPONSE, TOP_K, FEATURE], ids=["response", "top_k", "feature"]
)
def test_an_interrupted_training_with_a_term_resumes_to_the_same_weights(
    recipe_with: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
) -> None:
    steps = ("train.max_steps=8", "train.eval_every=2", "eval.max_label_tokens=2")
    recipe = recipe_with(*overrides, *steps)
    (expected,) = train(recipe, out=tmp_path / "uninterrupted").students
    validate = StudentRun._validate
    validated: list[str] = []

    def interrupted(self: StudentRun, *args: Any) -> dict[str, float]:
        validated.append(self.spec.name)
        if self.spec.name == expected.name and validated.count(expected.name) == 3:
            raise KeyboardInterrupt
        return validate(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(StudentRun, "_validate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, out=tmp_path / "interrupted")
    folder = tmp_path / "interrupted" / "train" / expected.name
    assert not (folder / "train.json").exists()
    assert list(folder.glob("checkpoints/checkpoint-*"))
    (student,) = train(recipe, out=tmp_path / "interrupted").students
    assert weights_hash(folder) == weights_hash(Path(expected.path))
    assert student.fingerprint == expected.fingerprint
    parameters = Student.load(folder).backend.parameters
    assert parameters == student.parameters == student.trainable_parameters, "no projection is left"


def test_top_k_log_probabilities_are_computed_once_for_all_seeds(
    recipe_with: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    teacher_calls: list[int] = []
    call = ForwardRunner.__call__

    def counting(self: ForwardRunner, batch: Any) -> Any:
        if not self._model.training:
            teacher_calls.append(len(batch))
        return call(self, batch)

    monkeypatch.setattr(ForwardRunner, "__call__", counting)
    (first,) = train(recipe_with(*TOP_K), out=run).students
    assert teacher_calls
    (folder,) = (run / "train" / "logprobs").iterdir()
    assert not list(folder.glob(".*"))
    teacher_calls.clear()
    two_seeds = recipe_with(*TOP_K, "train.seeds=[0, 1]")
    with monkeypatch.context() as patch:
        patch.setattr(LocalTeacher, "model", lambda _: pytest.fail("no teacher is needed"))
        assert train(two_seeds, out=run).students[0].fingerprint == first.fingerprint
    assert not teacher_calls, "the second seed has the same rows"
    for path in folder.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-40])
    (folder / "damaged.npz").write_bytes(b"PK")
    train(recipe_with(*TOP_K, "train.seeds=[0, 2]"), out=run)
    assert teacher_calls, "damaged files are computed again"
    assert not (folder / "damaged.npz").exists()


def test_a_trained_student_can_be_the_teacher_if_vocabulary_and_prefixes_match(
    recipe_with: Callable[..., Recipe], tmp_path: Path
) -> None:
    (trained,) = train(recipe_with(), out=tmp_path / "first").students
    teacher = f"train.teachers=[{{model: '{trained.path}'}}]"
    (student,) = train(recipe_with(*RESPONSE[:2], teacher), out=tmp_path / "second").students
    assert student.method == "finetune+response"
    card_path = Path(trained.path) / "student.json"
    card = json.loads(card_path.read_text(encoding="utf-8"))
    card["prefixes"] = {"label": "say: "}
    card_path.write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(UserError, match="was not trained on the label with prefix ''"):
        train(recipe_with(*RESPONSE[:2], teacher), out=tmp_path / "third")
    words = [f"{word} {word[::-1]} {word}s" for word in PANGRAM.split()]
    learn_vocabulary(words * 9, 90).save_pretrained(trained.path)
    with pytest.raises(UserError, match="has a different vocabulary from the student's"):
        train(recipe_with(*RESPONSE[:2], teacher), out=tmp_path / "fourth")


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
            {
                "methods": ["finetune+labels"],
                "terms": [{"kind": "labels", "divergence": "js"}],
            },
            "divergence belongs to response, not to labels",
        ),
        (
            {"methods": ["finetune+labels"], "terms": [{"kind": "labels", "tempature": 2.0}]},
            "unknown key 'tempature'; did you mean 'temperature'",
        ),
        (
            {"methods": ["finetune+label"], "terms": [{"kind": "labels", "name": "label"}]},
            "use another name",
        ),
        (
            {"methods": ["finetune+train"], "terms": [{"kind": "labels", "name": "train"}]},
            "use another name",
        ),
        (
            {"methods": ["finetune+eval"], "terms": [{"kind": "labels", "name": "eval"}]},
            "use another name",
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
def test_a_mistake_in_methods_and_terms_is_reported_with_a_fix(
    section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainSection.model_validate(section)


@pytest.mark.parametrize(
    ("method", "term", "message"),
    [
        (
            "finetune",
            "{kind: response, targets: rationale}",
            "compares rationale tokens, which finetune.response does not learn",
        ),
        (
            "rationale-then-label",
            "{kind: labels, name: response}",
            "writes them beside a rationale",
        ),
    ],
)
def test_a_term_that_a_method_cannot_learn_is_refused_before_training(
    recipe_with: Callable[..., Recipe], tmp_path: Path, method: str, term: str, message: str
) -> None:
    overrides = [f"train.methods={method}+response", f"train.terms=[{term}]"]
    if "labels" not in term:
        overrides.append(TEACHERS)
    with pytest.raises(UserError, match=message):
        planned(recipe_with(*overrides), tmp_path)


def test_a_recipe_with_terms_survives_a_round_trip_through_json(
    recipe_with: Callable[..., Recipe],
) -> None:
    response = "{kind: response, temperature: 2.0}"
    hints = "{kind: feature, name: hints, layers: {1: 2}}"
    recipe = recipe_with(
        "train.methods=[finetune+response+hints]",
        "train.teachers=[{size: nano}, {model: /somewhere}]",
        f"train.terms=[{response}, {hints}]",
    )
    restored = Recipe.model_validate(json.loads(json.dumps(recipe.model_dump(mode="json"))))
    assert restored.model_dump() == recipe.model_dump()
    method = "finetune+response+hints"
    assert restored.students[None].training_of(method) == recipe.students[None].training_of(method)


def test_students_of_one_base_method_share_their_teacher(
    recipe_with: Callable[..., Recipe],
) -> None:
    recipe = recipe_with(
        *RESPONSE[1:],
        "train.methods=[finetune, finetune+response]",
        "train.tune={learning_rate: [0.1, 0.2]}",
    )
    ((teacher_recipe, teacher),) = planned_teachers(recipe.students[None], grid(recipe.train))
    assert teacher.path(Path("train")) == Path("train/teachers/1-nano-finetune-gold")
    assert teacher.method == "finetune"
    assert teacher_recipe.train.tune is None
    assert teacher_recipe.train.max_steps == 2
    assert not teacher_recipe.train.terms


def test_a_teacher_trains_with_the_defaults_of_its_own_start(
    recipe_with: Callable[..., Recipe],
) -> None:
    def settings(*overrides: str) -> tuple[float, int]:
        recipe = recipe_with(*RESPONSE[:2], *overrides)
        ((teacher_recipe, _),) = planned_teachers(recipe.students[None], grid(recipe.train))
        resolved = teacher_recipe.resolved_train
        return resolved.learning_rate, resolved.max_steps

    nano = "train.teachers=[{size: nano}]"
    unset = ("train.learning_rate=null", "train.max_steps=null")
    assert settings(*unset, nano) == (1e-3, 1000)
    pretrained = ("student={model: somewhere}", *unset)
    assert settings(*pretrained, nano) == (1e-3, 1000)
    assert settings(*pretrained, "train.teachers=[{start: elsewhere}]") == (5e-5, 10_000)
    assert settings(*pretrained, "train.max_steps=70", nano) == (1e-3, 70)
    own_rate = "train.teachers=[{size: nano, learning_rate: 0.01}]"
    assert settings(*pretrained, own_rate) == (0.01, 1000)


@pytest.mark.parametrize("rate", [5e-5, 1e-3])
def test_a_teacher_trains_with_the_recipes_learning_rate_even_if_it_is_a_default(
    recipe_with: Callable[..., Recipe], rate: float
) -> None:
    for student in ("student={model: somewhere}", "student={size: nano}"):
        for teacher in ("size: nano", "start: elsewhere"):
            teachers = f"train.teachers=[{{{teacher}}}]"
            recipe = recipe_with(*RESPONSE[:2], student, f"train.learning_rate={rate}", teachers)
            ((teacher_recipe, _),) = planned_teachers(recipe.students[None], grid(recipe.train))
            assert teacher_recipe.resolved_train.learning_rate == rate


def test_votes_of_annotations_decide_the_student(toy: Callable[..., Path], tmp_path: Path) -> None:
    def half_answered(body: dict[str, Any], number: int) -> str:
        return good_answer(body, number) if number % 2 else "No."

    students = []
    for name, answer in (("all", good_answer), ("half", half_answered)):
        run = tmp_path / name
        with LoopbackServer(answer) as server:
            overrides = [
                f"teacher.base_url={server.url}",
                "train.methods=[finetune, finetune+labels]",
                "train.terms=[{kind: labels}]",
            ]
            recipe = load_recipe(toy(), overrides)
            annotate(recipe, out=run)
            students.append(train(recipe, out=run).students)
        lines = loss_lines(run / "train" / "finetune+labels-gold-s0")
        losses = [line["labels_loss"] for line in lines]
        assert min(losses) >= 0  # chance decides which rows have a vote: a line may have none
        assert max(losses) > 0
    (plain, with_votes), (_, with_half) = students
    assert with_votes.source, "it learned from annotations"
    assert not plain.source
    assert with_votes.fingerprint != with_half.fingerprint


def test_a_training_without_any_vote_is_refused(toy: Callable[..., Path], tmp_path: Path) -> None:
    with LoopbackServer(lambda body, number: "No.") as server:
        overrides = [
            f"teacher.base_url={server.url}",
            "train.methods=finetune+labels",
            "train.terms=[{kind: labels}]",
        ]
        recipe = load_recipe(toy(), overrides)
        annotate(recipe, out=tmp_path / "run")
    with pytest.raises(UserError, match="no train row has a vote"):
        train(recipe, out=tmp_path / "run")
    assert not (tmp_path / "run" / "train").exists()


def test_only_relation_depends_on_the_micro_batch_size(
    recipe_with: Callable[..., Recipe],
) -> None:
    overrides = (
        "train.methods=[finetune, finetune+response, finetune+relation]",
        "train.terms=[{kind: response}, {kind: relation}]",
        TEACHERS,
    )
    one_pass = recipe_with(*overrides)
    two_passes = recipe_with(*overrides, "train.micro_batch_size=4")
    is_equal = {
        method: one_pass.students[None].training_of(method)
        == two_passes.students[None].training_of(method)
        for method in one_pass.train.methods
    }
    assert is_equal == {"finetune": True, "finetune+response": True, "finetune+relation": False}


def test_relation_refuses_smaller_micro_batches_when_memory_runs_out(
    recipe_with: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute_loss = StepTrainer.compute_loss

    def small_memory(self: StepTrainer, model: Any, inputs: Any, **kwargs: Any) -> Any:
        if len(inputs["label"].target_lengths) > 4:
            raise MemoryError
        return compute_loss(self, model, inputs, **kwargs)

    monkeypatch.setattr(StepTrainer, "compute_loss", small_memory)
    overrides = ("train.methods=finetune+relation", "train.terms=[{kind: relation}]", TEACHERS)
    with pytest.raises(DsbsError, match="smaller micro-batch would change relation"):
        train(recipe_with(*overrides), out=tmp_path)
    teacher = tmp_path / "train/teachers/1-nano-finetune-gold/train.json"
    assert teacher.is_file(), "its teacher was trained with smaller ones"


def test_a_teacher_is_freed_once_no_later_student_needs_it(
    recipe_with: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each share of the rows has a teacher of its own."""
    load_model = local_teachers.load_model
    loaded: list[weakref.ref[Any]] = []
    alive_at_load: list[list[bool]] = []

    def recording(folder: str, *, labels: int) -> Any:
        model = load_model(folder, labels=labels)
        alive_at_load.append([reference() is not None for reference in loaded])
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(local_teachers, "load_model", recording)
    for seeds, expected in (("[0]", [[], [False]]), ("[1, 2]", [[], [True]])):
        loaded.clear()
        alive_at_load.clear()
        subsets = "train.subset=[1.0, 0.5]"
        recipe = recipe_with(*RESPONSE, "train.max_steps=1", subsets, f"train.seeds={seeds}")
        train(recipe, out=tmp_path / seeds)
        assert alive_at_load == expected
        assert not any(reference() for reference in loaded)
