"""Students with a label head, from the recipe to the saved folder."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import causal_models
import pytest
import torch
from conftest import good_answer, on_two_processes, write_jsonl
from encoder_models import encoder
from forked import DSBS
from label_heads import save_encoder, seq2seq_model
from loopback import LoopbackServer
from safetensors.torch import load_file
from transformers import GemmaTokenizer

from dsbs import Student, UserError, annotate, evaluate, export, load_recipe, train, validate
from dsbs.config import Recipe, StudentSection
from dsbs.students.calibration import read_calibration
from dsbs.students.card import StudentCard, new_head_warning, read_card
from dsbs.students.heads import load_body
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import new_model
from dsbs.tasks import make_task
from dsbs.training import run as training_run
from dsbs.training.grid import last_checkpoint

pytest.importorskip("peft")
LORA = "train.lora={rank: 4, alpha: 8}"


@pytest.fixture
def recipe(toy: Callable[..., Path], tmp_path: Path) -> Iterator[Callable[..., Recipe]]:
    """Recipes of a tiny encoder on a toy run whose teacher has answered."""
    model = save_encoder(tmp_path / "encoder")
    with LoopbackServer(good_answer) as server:
        base = [
            f"teacher.base_url={server.url}",
            f"student={{model: {model}, max_target_tokens: 16}}",
            "train.methods=[step-by-step]",
            "train.learning_rate=0.003",
            "train.micro_batch_size=4",
        ]
        annotate(load_recipe(toy(), base), out=tmp_path / "run")
        yield lambda *overrides: load_recipe(tmp_path / "toy.yaml", [*base, *overrides])


def trained(recipe: Recipe, tmp_path: Path, number: int = 0) -> Path:
    return Path(train(recipe, out=tmp_path / "run").students[number].path)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = ["model.safetensors", "head.safetensors", "rationale_decoder/model.safetensors"]
    return {
        f"{file}:{name}": value
        for file in files
        if (folder / file).is_file()
        for name, value in load_file(folder / file).items()
    }


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name in ours.keys() & theirs.keys():
        assert torch.equal(ours[name], theirs[name]), name


def record_rows(folder: Path) -> int:
    record = json.loads((folder / "train.json").read_text(encoding="utf-8"))
    return int(record["valid_rows"])


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_saved_head_is_kept_by_the_names_of_its_labels(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    source = str(save_encoder(tmp_path / "encoder"))
    tokenizer = load_tokenizer(source)
    section = StudentSection(model=source)
    recipe = load_recipe(
        toy(), [f"student={{model: {source}}}", f"train.init={tmp_path / 'saved'}"]
    )
    card = StudentCard(
        name="saved",
        method="finetune",
        labels="gold",
        seed=0,
        task=recipe.task,
        prefixes={"label": ""},
        max_input_tokens=16,
        max_target_tokens=16,
        kind="encoder",
        head="labels",
        classes=("a", "b", "c"),
    )
    saved = new_model(section, tokenizer, 0, labels=3, classes=card.classes)
    Student.of(saved, tokenizer, card).save(tmp_path / "saved")

    def started(*classes: str) -> torch.Tensor:
        model = new_model(
            section, tokenizer, 1, str(tmp_path / "saved"), labels=len(classes), classes=classes
        )
        return model.classifier.weight.detach()

    head = saved.classifier.weight.detach()
    assert torch.equal(started("a", "b", "c"), head)
    assert torch.equal(started("c", "a", "b"), head[[2, 0, 1]])
    for other in (("a", "b", "d"), ("a", "b")):
        assert not torch.isin(started(*other), head).any(), "a new head"
    warning = new_head_warning(recipe, make_task(recipe.task))
    assert warning is not None and "is for a, b, c, not for this task's labels" in warning


@pytest.mark.parametrize("changes", [[], [LORA], ["train.gradient_checkpointing=true"]])
def test_a_student_learns_predicts_and_explains(
    recipe: Callable[..., Recipe], tmp_path: Path, changes: list[str]
) -> None:
    steps = ["train.max_epochs=12", "train.max_steps=null", "train.head_learning_rate=0.03"]
    folder = trained(recipe(*steps, *changes, "train.eval_every=30"), tmp_path)
    record = json.loads((folder / "train.json").read_text(encoding="utf-8"))["student"]
    assert record["steps"] == 12 * 5  # 36 of 40 rows, in batches of 8
    assert record["valid_accuracy"] == 1.0
    answers = Student.load(folder).predict(
        ["My invoice number 5 is wrong.", "My parcel number 6 is wrong."], rationale=True
    )
    assert [answer.label for answer in answers] == ["billing", "shipping"]
    for answer in answers:
        assert answer.distribution is not None and answer.rationale is not None
        assert sum(answer.distribution.values()) == pytest.approx(1)
    assert not list(folder.rglob("adapter*"))
    calibration = read_calibration(folder)
    assert calibration is not None
    assert (calibration.rows, calibration.labels) == (record_rows(folder), "gold")
    assert calibration.after.log_loss <= calibration.before.log_loss + 1e-9


@pytest.mark.parametrize(
    "changes",
    [
        [LORA],
        ["train.rationale_weight={share: 0.5, every: 4}"],
        [
            "train.methods=step-by-step+response+feature",
            "train.terms=[{kind: response}, {kind: feature, weight: 0.1}]",
        ],
    ],
    ids=["lora", "balanced", "terms"],
)
def test_a_killed_training_continues_to_the_weights_of_an_undisturbed_one(
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: list[str],
) -> None:
    from dsbs.training.callbacks import MetricsLogger

    if "+" in changes[0]:
        larger = save_encoder(tmp_path / "larger", layers=3)
        changes = [*changes, f"train.teachers=[{{start: {larger}, max_steps: 2}}]"]
    settings = recipe("train.max_steps=10", "train.eval_every=3", *changes)
    undisturbed = trained(settings, tmp_path)
    expected = weights(undisturbed)
    expected_lines = lines(undisturbed)
    undisturbed.rename(tmp_path / "undisturbed")
    passed = MetricsLogger.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passed(self, args, state, control, **kwargs)
        if state.global_step == 8 and state.max_steps == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLogger, "on_step_end", killed)
        trained(settings, tmp_path)
    checkpoint = last_checkpoint(undisturbed / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-6"
    torch.manual_seed(99)  # what a new process would not know of the old one
    again = trained(settings, tmp_path)
    assert_equal(weights(again), expected)
    names = ("step", "loss", "rationale_weight")
    assert [[row.get(name) for name in names] for row in lines(again)] == [
        [row.get(name) for name in names] for row in expected_lines
    ]


@pytest.mark.parametrize("changes", [[], [LORA]], ids=["all weights", "lora"])
def test_without_weight_the_student_is_the_finetuned_one(
    recipe: Callable[..., Recipe], tmp_path: Path, changes: list[str]
) -> None:
    settings = recipe(
        "train.methods=[step-by-step, finetune]", "train.rationale_weight=0", *changes
    )
    weightless, finetuned = (
        weights(Path(student.path)) for student in train(settings, out=tmp_path / "run").students
    )
    assert "head.safetensors:weight" in finetuned
    assert_equal(weightless, finetuned)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["train.methods=[step-by-step, finetune]", "train.weight_decay=0.1"],
        ["train.rationale_weight=balanced", "train.class_weights={billing: 3}"],
        [LORA],
        ["student={init: scratch, vocab_size: 200, head: labels, dropout: 0}"],
    ],
    ids=["methods", "balanced", "lora", "t5"],
)
def test_two_processes_train_the_student_of_one(
    recipe: Callable[..., Recipe], tmp_path: Path, changes: list[str]
) -> None:
    exact = ["student.dropout=0", "train.max_steps=4", "train.learning_rate=0.001"]
    settings = recipe(*exact, *changes)
    students = train(settings, out=tmp_path / "run").students
    one = {student.name: weights(Path(student.path)) for student in students}
    (tmp_path / "run" / "train").rename(tmp_path / "one")
    path = tmp_path / "both.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")), encoding="utf-8")
    on_two_processes(DSBS, "train", str(path), "--out", str(tmp_path / "run"))
    for name, expected in one.items():
        ours = weights(tmp_path / "run" / "train" / name)
        for key, value in expected.items():
            assert torch.allclose(ours[key], value, atol=1e-5), (name, key)


@pytest.mark.slow
def test_without_weight_two_processes_train_the_finetuned_student(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = recipe("train.methods=[step-by-step, finetune]", "train.rationale_weight=0")
    path = tmp_path / "both.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")), encoding="utf-8")
    on_two_processes(DSBS, "train", str(path), "--out", str(tmp_path / "run"))
    folder = tmp_path / "run" / "train"
    assert_equal(weights(folder / "step-by-step-gold-s0"), weights(folder / "finetune-gold-s0"))


def test_tuning_tries_rationale_weights_where_there_are_rationales(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    tune = "train.tune={rationale_weight: [0.1, balanced], learning_rate: [0.001]}"
    settings = recipe("train.methods=[step-by-step, finetune]", tune, "train.max_steps=3")
    plan = training_run.planned(settings, tmp_path / "run")
    assert [entry["trials"] for entry in plan] == [2, 1]
    result = train(settings, out=tmp_path / "run")
    trials = tmp_path / "run" / "train" / "trials" / "step-by-step-gold"
    assert {path.name.partition("rationale_weight=")[2] for path in trials.iterdir()} == {
        "0.1",
        "balanced-0.5-every-20",
    }
    assert "rationale_weight" in result.students[0].tuned
    chosen = Student.load(result.students[0].path)
    assert chosen.predict(["My parcel is wrong."], rationale=True)[0].rationale is not None
    assert "rationale_weight" not in result.students[1].tuned


@pytest.mark.parametrize("teacher", ["larger", "itself", "other vocabulary", "decoder"])
def test_loss_terms_work_on_classes_and_encoder_states(
    recipe: Callable[..., Recipe], tmp_path: Path, teacher: str
) -> None:
    """From an encoder of the family, a trained student, another encoder, and a decoder."""
    if teacher == "itself":
        source = f"model: {trained(recipe('train.max_steps=2'), tmp_path)}"
    elif teacher == "decoder":
        source = f"start: {causal_models.save(tmp_path / 'teacher')}, max_steps: 1"
    else:
        words = ["zebra"] if teacher == "other vocabulary" else []
        folder = save_encoder(tmp_path / "teacher", layers=4, words=words)
        source = f"start: {folder}, max_steps: 1"
    names = ["labels", "feature", "relation", "soft", "response", "kept"]
    settings = recipe(
        "train.terms=[{kind: labels}, {kind: feature}, {kind: relation}, "
        "{kind: labels, name: soft, source: teachers, temperature: 2.0}, "
        "{kind: response, temperature: 2.0}, "
        "{kind: response, name: kept, temperature: 2.0, top_k: 9}]",
        f"train.teachers=[{{{source}}}]",
        f"train.methods=[{'+'.join(['step-by-step', *names])}]",
        "student.max_input_tokens=64",
        "train.max_steps=2",
        "train.micro_batch_size=8",
    )
    validate(settings)
    folder = trained(settings, tmp_path)
    losses = next(row for row in lines(folder) if "loss" in row)
    assert all(losses[f"{term}_loss"] > 0 for term in names), losses
    # KL over the classes, whether as labels or as response, computed or from disk
    assert losses["soft_loss"] == pytest.approx(losses["response_loss"], rel=1e-4)
    assert losses["kept_loss"] == pytest.approx(losses["response_loss"], rel=1e-4)
    assert Student.load(folder).predict(["My invoice is wrong."])[0].label


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            [
                "train.terms=[{kind: response, targets: rationale}]",
                "train.methods=[step-by-step+response]",
                "train.teachers=[{start: x}]",
            ],
            "add label to targets",
        ),
        (["train.class_weights={biling: 2}"], "did you mean 'billing'"),
        (
            ["student={init: scratch}", "train.class_weights=balanced"],
            "class_weights is for label heads",
        ),
    ],
)
def test_what_a_head_cannot_learn_is_refused(
    recipe: Callable[..., Recipe], tmp_path: Path, changes: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(recipe(*changes), out=tmp_path / "run")


def test_choices_of_a_row_are_scored(toy: Callable[..., Path], tmp_path: Path) -> None:
    colors = ["invoice", "parcel", "number", "wrong"]
    rows = [
        {
            "id": str(i),
            "question": f"my {colors[i % 4]} is",
            "choices": [colors[(i + k) % 4] for k in range(2 + i % 3)],
            "label": colors[i % 4],
        }
        for i in range(48)
    ]
    data = {"train": str(write_jsonl(tmp_path / "cqa.jsonl", rows))}
    model = save_encoder(tmp_path / "encoder")
    settings = load_recipe(
        toy(),
        [
            f"task={{name: cqa, data: {json.dumps(data)}}}",
            f"student={{model: {model}}}",
            "train={methods: finetune, max_epochs: 25, batch_size: 8, learning_rate: 0.005, "
            "eval_every: 50}",
            "eval={split: valid, latency_calls: 0, floors: []}",
        ],
    )
    result = train(settings, out=tmp_path / "run")
    assert result.students[0].valid_accuracy > 0.8
    [answer] = Student.load(result.students[0].path).predict(
        [{"question": "my parcel is", "choices": ["number", "parcel", "invoice"]}]
    )
    assert answer.distribution is not None
    assert list(answer.distribution) == ["number", "parcel", "invoice"]
    assert answer.label == max(answer.distribution, key=answer.distribution.__getitem__)
    assert answer.probability == pytest.approx(max(answer.distribution.values()))
    (system,) = evaluate(settings, out=tmp_path / "run").systems
    predictions = (tmp_path / "run" / "eval" / "predictions" / "finetune-gold-s0.jsonl").open()
    shares = [row["distribution"][row["gold"]] for row in map(json.loads, predictions)]
    expected = -sum(map(math.log, shares)) / len(shares)
    assert system.metrics["log_loss"].value == pytest.approx(expected)
    assert system.selective is not None


@pytest.mark.parametrize("family", ["t5gemma", "t5gemma2"])
@pytest.mark.parametrize("head", ["text", "labels"])
def test_t5gemma_is_a_student(
    toy: Callable[..., Path], tmp_path: Path, family: str, head: str
) -> None:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.printable]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=[])
    tokenizer.save_pretrained(tmp_path / "gemma")
    special = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    body = seq2seq_model(family, vocab_size=len(tokenizer) + 2, **special)
    body.save_pretrained(tmp_path / "gemma")
    path = toy(student={"init": None, "model": str(tmp_path / "gemma"), "head": head})
    steps = {"labels": 40, "text": 120}[head]
    changes = ["train.methods=finetune", f"train.max_steps={steps}", "train.learning_rate=0.01"]
    changes += [f"train.eval_every={steps // 2}", "eval.max_label_tokens=12"]
    folder = trained(load_recipe(path, changes), tmp_path)
    student = Student.load(folder)
    assert student.card.kind == "seq2seq"
    answers = student.predict(["My invoice number 5 is wrong.", "My parcel number 6 is wrong."])
    labels = [answer.label for answer in answers]
    if head == "labels":
        assert labels == ["billing", "shipping"]
    assert set(labels) <= {"billing", "shipping"}  # letter by letter, up to the end token
    assert not any(answer.truncated for answer in answers)
    if (family, head) == ("t5gemma", "text"):
        exported = export(folder, "torch", examples=["My invoice number 5 is wrong."])
        assert not (exported.path / "predict.py").exists(), "it would read a T5's tokenizer"


def test_a_head_of_renamed_labels_is_another_student(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    short = ("train.methods=finetune", "train.max_steps=2", "train.eval_every=2")
    first = trained(recipe(*short), tmp_path)
    fingerprint = json.loads((first / "work.json").read_text(encoding="utf-8"))["fingerprint"]
    for split in ("train", "test"):
        file = tmp_path / f"{split}.csv"
        file.write_text(file.read_text(encoding="utf-8").replace(",shipping", ",delivery"))
    renamed = recipe(*short, "task.labels=[billing, delivery]")
    with pytest.raises(UserError, match="settings, labels or annotations have changed"):
        evaluate(renamed, out=tmp_path / "run")
    folder = trained(renamed, tmp_path)
    assert read_card(folder).classes == ("billing", "delivery")
    again = json.loads((folder / "work.json").read_text(encoding="utf-8"))["fingerprint"]
    assert again != fingerprint


def test_a_start_with_a_shorter_rationale_decoder_gets_one_of_its_own(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    short = ("train.max_steps=2", "train.eval_every=2")
    start = trained(recipe(*short), tmp_path).rename(tmp_path / "start")
    for change, layers in (("max_target_tokens=24", 2), ("rationale_decoder={layers: 1}", 1)):
        changed = recipe(*short, f"train.init={start}", f"student.{change}")
        folder = trained(changed, tmp_path)
        decoder = Student.load(folder).backend.model.rationale_decoder.config
        assert decoder.num_hidden_layers == layers
        assert decoder.max_position_embeddings == changed.student.max_target_tokens + 1


@pytest.mark.parametrize("family", ["bert", "modernbert", "distilbert"])
def test_the_recipe_s_dropout_is_that_of_every_encoder(tmp_path: Path, family: str) -> None:
    encoder(family, 50).save_pretrained(tmp_path)
    body = load_body(str(tmp_path), 0.25)
    rates = {m.p for name, m in body.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert 0.25 in rates and rates <= {0.25, 0.0}
