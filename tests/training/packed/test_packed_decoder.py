"""Decoder-only students: losses on target tokens only, and the train stage around them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import causal_models
import pytest
import torch
from torch.nn.functional import log_softmax
from transformers import Seq2SeqTrainingArguments

from dsbs import DsbsError, Student, UserError, load_recipe, train
from dsbs.config import LoraSection, Recipe, TrainSection
from dsbs.students.formats import ChatFormat
from dsbs.training.adapters import add_adapters, count_trainable, merge_adapters
from dsbs.training.encode import Encoded, Encoder, PackedBatch, collate
from dsbs.training.grid import last_checkpoint
from dsbs.training.methods import View
from dsbs.training.packed.decoder import DecoderRunner, summed_losses
from dsbs.training.rows import Row
from dsbs.training.tokens import Tokens
from dsbs.training.trainer import StepTrainer

WEIGHT = 0.5
VIEWS = (View("label", "predict: ", 1.0), View("rationale", "explain: ", WEIGHT))
STEPS = 6
TERMS = (
    "train.methods=finetune+response+feature",
    "train.terms=[{kind: response}, {kind: feature, weight: 0.01}]",
)


def encoded_rows(count: int = 8) -> list[Encoded]:
    """Rows of very different lengths; some have no rationale, one has two."""
    rows: list[Encoded] = []
    for i in range(count):
        row: Encoded = {"label": [([5 + i] * (2 + i), [30 + i] * (i % 3) + [1])]}
        if i not in (1, 4, 5):
            pair = ([60 + i, 9] * (1 + 2 * i), [10 + i] * (1 + 3 * i) + [1])
            row["rationale"] = [pair, pair] if i == 2 else [pair]
        rows.append(row)
    return rows


def pairs_of(view: str, rows: list[Encoded]) -> list[tuple[Any, Any]]:
    return [pair for row in rows for pair in row.get(view, ())]


def logprobs_row_by_row(model: Any, pairs: list[tuple[Any, Any]]) -> list[torch.Tensor]:
    """Log-probabilities (T, V) of each row's target tokens, from one plain pass per row."""
    logprobs: list[torch.Tensor] = []
    for source, target in pairs:
        logits = model(input_ids=torch.tensor([[*source, *target]]), use_cache=False).logits
        logprobs.append(log_softmax(logits[0, len(source) - 1 : -1], dim=-1))
    return logprobs


def summed_nll_row_by_row(model: Any, pairs: list[tuple[Any, Any]]) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for logprobs, (_, target) in zip(logprobs_row_by_row(model, pairs), pairs, strict=True):
        total = total - logprobs[range(len(target)), target].sum()
    return total


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def target_logits(model: Any, packed: PackedBatch, *, without_padding: bool) -> torch.Tensor:
    """Logits (M, V) of one view's target tokens, teacher-forced, in their order."""
    runner = DecoderRunner(model, [View("label", "", 1.0)], without_padding=without_padding)
    return runner({"label": packed}).logits["label"]


def packed_pairs(packed: PackedBatch) -> list[tuple[list[int], list[int]]]:
    sources = torch.split(packed.source, packed.source_lengths.tolist())
    targets = torch.split(packed.target, packed.target_lengths.tolist())
    return [(s.tolist(), t.tolist()) for s, t in zip(sources, targets, strict=True)]


@pytest.mark.parametrize("without_padding", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "checkpointing"])
def test_logits_and_gradients_equal_those_of_single_rows(kind: str, without_padding: bool) -> None:
    model = causal_models.model("llama" if kind == "checkpointing" else kind).double().train()
    if kind == "checkpointing":
        model.activation_checkpointing_enable()
    for view, packed in collate(encoded_rows(24)).items():
        expected = torch.cat(logprobs_row_by_row(model, packed_pairs(packed)))
        expected_gradients = gradients(model, (expected**2).mean())
        logits = target_logits(model, packed, without_padding=without_padding)
        assert logits.shape == (len(packed.target), model.config.vocab_size), view
        logprobs = log_softmax(logits, dim=-1)
        assert torch.allclose(logprobs, expected, atol=1e-10), view
        ours = gradients(model, (logprobs**2).mean())
        assert ours.keys() == expected_gradients.keys()
        for name, gradient in ours.items():
            assert torch.allclose(gradient, expected_gradients[name], atol=1e-10), (view, name)


@pytest.mark.parametrize("without_padding", [True, False])
def test_each_view_has_the_summed_loss_of_its_target_tokens(without_padding: bool) -> None:
    model = causal_models.model().train()
    losses = summed_losses(model, collate(encoded_rows()), without_padding=without_padding)
    assert set(losses) == {"label", "rationale"}
    for view, loss in losses.items():
        expected = summed_nll_row_by_row(model, pairs_of(view, encoded_rows()))
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)


@pytest.fixture(scope="module")
def expected_weights() -> dict[str, torch.Tensor]:
    """The objective row by row in float64, with plain gradient descent."""
    model = causal_models.model().double()
    for _ in range(STEPS):
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for view, weight in (("label", 1.0), ("rationale", WEIGHT)):
            pairs = pairs_of(view, encoded_rows())
            tokens = sum(len(target) for _, target in pairs)
            total = total + weight * summed_nll_row_by_row(model, pairs) / tokens
        (total / (1 + WEIGHT)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(3e-2 * parameter.grad)
    return {name: weights.detach() for name, weights in model.state_dict().items()}


@pytest.mark.parametrize("padding", ["none", "batch"])
@pytest.mark.parametrize("micro_batch", [8, 4, 2])
def test_steps_equal_an_independent_loop_for_every_micro_batch_size(
    tmp_path: Path, expected_weights: dict[str, torch.Tensor], micro_batch: int, padding: Any
) -> None:
    model = causal_models.model()
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch,
        max_steps=STEPS,
        learning_rate=3e-2,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        train_sampling_strategy="sequential",
        optim="sgd",
    )
    trainer = StepTrainer(
        model=model,
        args=arguments,
        train_dataset=encoded_rows(),
        data_collator=collate,
        views=VIEWS,
        validate=dict,
        section=TrainSection(rationale_weight=WEIGHT, max_steps=STEPS, padding=padding),
    )
    trainer.train()
    start = causal_models.model().state_dict()
    changes = [float((expected_weights[name] - start[name]).abs().max()) for name in start]
    assert max(changes) > 1e-4, "the steps changed something"
    for name, weights in model.state_dict().items():
        assert torch.allclose(weights.double(), expected_weights[name], atol=1e-6), name


def test_inputs_have_the_chat_template_and_targets_the_end_of_the_turn() -> None:
    chat = ChatFormat(causal_models.tokenizer(), "chat")
    tokens = Tokens(causal_models.tokenizer(), input_format=chat)
    text = "My parcel is wrong " * 9
    row = Row("r", text, "billing", None, ("a parcel it is, a parcel",))
    (encoded,) = Encoder(tokens, 24, 4).rows([row], VIEWS, "gold")
    for (view, pairs), prefix in zip(encoded.items(), ("predict: ", "explain: "), strict=True):
        ((source, target),) = pairs
        assert len(source) == 24
        assert source.tolist() == chat.read([prefix + text], 24)[0], view
        assert target[-1] == chat.end
        assert list(target).count(chat.end) == 1, view
    assert len(encoded["rationale"][0][1]) == 4, "a cut target keeps its end token"


# --- LoRA


def test_adapters_find_q_proj_for_q_and_merge_into_a_plain_model(tmp_path: Path) -> None:
    adapted = add_adapters(causal_models.model(), LoraSection(rank=3)).eval()
    adapters = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(adapters) == 2 * 2 * 2
    assert all(".q_proj." in name or ".v_proj." in name for name in adapters)
    assert count_trainable(adapted) < count_trainable(causal_models.model())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name in adapters:
                parameter.normal_(std=0.3)
    packed = collate(encoded_rows())["label"]
    expected = target_logits(adapted, packed, without_padding=True)
    adapted.save_pretrained(tmp_path)
    plain = merge_adapters(causal_models.model(), tmp_path).eval()
    logits = target_logits(plain, packed, without_padding=True)
    assert torch.allclose(logits, expected, atol=1e-5)
    start = causal_models.model()
    start_logits = target_logits(start, packed, without_padding=True)
    assert not torch.allclose(start_logits, expected, atol=1e-2)
    assert dict(plain.named_parameters()).keys() == dict(start.named_parameters()).keys()


def test_an_unknown_lora_target_is_reported_with_the_existing_ones() -> None:
    existing = r"'query'.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(UserError, match=existing):
        add_adapters(causal_models.model(), LoraSection(targets=("q", "query")))
    gpt2 = add_adapters(causal_models.model("gpt2"), LoraSection(rank=2, targets=("c_attn",)))
    assert count_trainable(gpt2) == 2 * 2 * (32 + 96)


# --- the train stage


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return causal_models.save(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def recipe_for(toy: Callable[..., Path]) -> Callable[..., Recipe]:
    """Recipes on the toy data that finetune the model in a folder."""

    def make(folder: str, *overrides: str) -> Recipe:
        student = f"student={{model: {folder}, max_input_tokens: 64, max_target_tokens: 32}}"
        steps = ("train.max_steps=12", "train.eval_every=3", "train.learning_rate=0.01")
        return load_recipe(toy(), [student, "train.methods=finetune", *steps, *overrides])

    return make


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def metrics(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    "changes",
    [(), ("train.lora={rank: 4, dropout: 0.1}",), TERMS],
    ids=["all weights", "lora", "terms"],
)
def test_an_interrupted_training_resumes_to_the_weights_of_an_uninterrupted_one(
    recipe_for: Callable[..., Recipe],
    llama: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: tuple[str, ...],
) -> None:
    from dsbs.training.callbacks import MetricsLogger

    teacher = f"train.teachers=[{{start: {llama}, max_steps: 2}}]"
    teachers = [teacher] if changes is TERMS else []
    dropout = ("student.dropout=0.1", "train.gradient_checkpointing=true")
    recipe = recipe_for(llama, *dropout, *changes, *teachers)
    uninterrupted = Path(train(recipe, out=tmp_path / "uninterrupted").students[0].path)
    on_step_end = MetricsLogger.on_step_end

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 8 and state.max_steps == 12:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLogger, "on_step_end", interrupted)
        train(recipe, out=tmp_path / "interrupted")
    folder = tmp_path / "interrupted" / "train" / uninterrupted.name
    checkpoint = last_checkpoint(folder / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-6"
    torch.manual_seed(99)  # a new process would not know the old generator's state
    resumed = Path(train(recipe, out=tmp_path / "interrupted").students[0].path)
    assert weights_hash(resumed) == weights_hash(uninterrupted)
    steps = [line["step"] for line in metrics(resumed) if "loss" in line]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_student_learns_its_task_and_is_a_plain_model(
    recipe_for: Callable[..., Recipe], llama: str, tmp_path: Path, template: str
) -> None:
    recipe = recipe_for(
        llama,
        f"student.template={template}",
        "train.max_steps=80",
        "train.eval_every=20",
        "train.learning_rate=0.003",
    )
    record = train(recipe, out=tmp_path / "run").students[0]
    student = Student.load(record.path)
    assert (student.card.kind, student.card.template) == ("causal", template)
    answers = student.predict(["My invoice number 99 is wrong.", "My parcel number 98 is wrong."])
    assert [answer.label for answer in answers] == ["billing", "shipping"]
    assert record.valid_accuracy == 1.0
    parameters = student.backend.model.parameters()
    assert sum(parameter.numel() for parameter in parameters) == record.parameters
    assert (Path(record.path) / "generation_config.json").is_file()
    assert train(recipe, out=tmp_path / "run").students[0] == record, "a finished student is kept"


def test_the_validation_loss_does_not_depend_on_the_batch_size(
    recipe_for: Callable[..., Recipe], llama: str, tmp_path: Path
) -> None:
    losses: list[float] = []
    for size in (1, 64):
        recipe = recipe_for(llama, f"eval.batch_size={size}", "train.max_steps=1")
        folder = Path(train(recipe, out=tmp_path / f"run{size}").students[0].path)
        lines = [line for line in metrics(folder) if "eval_label_loss" in line]
        losses.append(lines[0]["eval_label_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("train.task_token=decoder",), r"train\.task_token: decoder"),
        (
            ("student.max_input_tokens=240",),
            r"max_input_tokens \(240\) and student\.max_target_tokens \(32\).*256 tokens",
        ),
        (
            ("student.max_input_tokens=200", "eval.max_label_tokens=100"),
            r"eval\.max_label_tokens \(100\)",
        ),
        (("student.max_input_tokens=8",), "leaves no tokens"),
    ],
    ids=["task token", "positions", "label tokens", "template"],
)
def test_settings_that_a_decoder_does_not_support_are_refused_before_training(
    recipe_for: Callable[..., Recipe],
    llama: str,
    tmp_path: Path,
    overrides: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        train(recipe_for(llama, *overrides), out=tmp_path / "run")
    assert not (tmp_path / "run" / "train" / "teachers").exists()


def test_a_chat_template_needs_a_decoder_that_has_one(
    recipe_for: Callable[..., Recipe], toy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = causal_models.save(tmp_path / "model", chat=False)
    with pytest.raises(UserError, match="no chat template"):
        train(recipe_for(folder, "student.template=chat"), out=tmp_path / "run")
    scratch = load_recipe(toy(), ["student.template=chat", "train.methods=finetune"])
    with pytest.raises(UserError, match=r"student\.template: chat is for decoder-only"):
        train(scratch, out=tmp_path / "run")


def test_a_dropout_that_the_model_does_not_have_is_reported(
    recipe_for: Callable[..., Recipe], tmp_path: Path
) -> None:
    gpt2 = causal_models.save(tmp_path / "model", "gpt2")
    with pytest.raises(DsbsError, match=r"student\.dropout"):
        train(recipe_for(gpt2, "student.dropout=0.1"), out=tmp_path / "run")


def test_the_default_template_changes_no_students_settings(toy: Callable[..., Path]) -> None:
    path = toy()

    def settings(*overrides: str) -> str:
        return load_recipe(path, ["student={model: x}", *overrides]).students[None].training

    assert settings() == settings("student.template=auto")
    assert settings() != settings("student.template=chat")
