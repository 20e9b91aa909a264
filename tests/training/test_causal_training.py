"""Decoder-only students in training: the exact objective on targets alone, and everything that a T5's training has."""

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
from dsbs.students import ChatFormat
from dsbs.training.checkpoints import last_checkpoint
from dsbs.training.encode import Encoded, Encoder, collate
from dsbs.training.lora import adapt, merged, trainable
from dsbs.training.methods import View
from dsbs.training.packed.decoder import logits_of, summed_losses
from dsbs.training.rows import Row
from dsbs.training.tokens import Tokens
from dsbs.training.trainer import StepTrainer

WEIGHT = 0.5
VIEWS = (View("label", "predict: ", 1.0), View("rationale", "explain: ", WEIGHT))


def rows(count: int = 8) -> list[Encoded]:
    """Rows of very different lengths; some have no rationale, one has two."""
    found: list[Encoded] = []
    for i in range(count):
        row: Encoded = {"label": [([5 + i] * (2 + i), [30 + i] * (i % 3) + [1])]}
        if i not in (1, 4, 5):
            row["rationale"] = [([60 + i, 9] * (1 + 2 * i), [10 + i] * (1 + 3 * i) + [1])] * (
                2 if i == 2 else 1
            )
        found.append(row)
    return found


def row_by_row(model: Any, pairs: list[tuple[Any, Any]]) -> list[torch.Tensor]:
    """Log-probabilities (T, V) of each row's targets, by one plain forward pass for each row."""
    said = []
    for source, target in pairs:
        ids = torch.tensor([[*source, *target]])
        said.append(
            log_softmax(
                model(input_ids=ids, use_cache=False).logits[0, len(source) - 1 : -1], dim=-1
            )
        )
    return said


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("without_padding", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "checkpointing"])
def test_logits_and_gradients_are_those_of_rows_one_by_one(
    kind: str, without_padding: bool
) -> None:
    model = causal_models.model("llama" if kind == "checkpointing" else kind).double().train()
    if kind == "checkpointing":
        model.activation_checkpointing_enable()
    for name, flat in collate(rows(24)).items():
        sources = torch.split(flat.source, flat.source_lengths.tolist())
        targets = torch.split(flat.target, flat.target_lengths.tolist())
        pairs = [
            (source.tolist(), target.tolist())
            for source, target in zip(sources, targets, strict=True)
        ]
        expected = torch.cat(row_by_row(model, pairs))
        theirs = gradients(model, (expected**2).mean())
        made = log_softmax(logits_of(model, flat, without_padding=without_padding), dim=-1)
        assert made.shape == expected.shape == (len(flat.target), model.config.vocab_size), name
        assert torch.allclose(made, expected, atol=1e-10), name
        ours = gradients(model, (made**2).mean())
        assert ours.keys() == theirs.keys()
        assert all(torch.allclose(ours[one], theirs[one], atol=1e-10) for one in ours), name


@pytest.mark.parametrize("without_padding", [True, False])
def test_each_view_has_its_own_sum_over_its_targets_and_nothing_else(without_padding: bool) -> None:
    model = causal_models.model().train()
    found = summed_losses(model, collate(rows()), without_padding=without_padding)
    assert set(found) == {"label", "rationale"}
    for name, value in found.items():
        pairs = [pair for row in rows() for pair in row.get(name, ())]
        said = row_by_row(model, pairs)
        taken = [
            logs[range(len(target)), target].sum()
            for logs, (_, target) in zip(said, pairs, strict=True)
        ]
        total = -float(sum(taken).detach())
        assert float(value.detach()) == pytest.approx(total, rel=1e-5)


def independent_weights(steps: int) -> dict[str, torch.Tensor]:
    """The objective written out row by row, with plain gradient descent, in float64."""
    model = causal_models.model().double()
    for _ in range(steps):
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for name, weight in (("label", 1.0), ("rationale", WEIGHT)):
            pairs = [pair for row in rows() for pair in row.get(name, ())]
            said = row_by_row(model, pairs)
            nll = -sum(
                logs[range(len(target)), target].sum()
                for logs, (_, target) in zip(said, pairs, strict=True)
            )
            total = total + weight * nll / sum(len(target) for _, target in pairs)
        (total / (1 + WEIGHT)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(3e-2 * parameter.grad)
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("padding", ["none", "batch"])
@pytest.mark.parametrize("micro", [8, 4, 2])
def test_steps_equal_an_independent_loop_however_they_are_cut(
    tmp_path: Path, micro: int, padding: Any
) -> None:
    model, steps = causal_models.model(), 6
    trainer = StepTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=micro, gradient_accumulation_steps=8 // micro,
            max_steps=steps, learning_rate=3e-2, max_grad_norm=0.0, lr_scheduler_type="constant", report_to=[],
            save_strategy="no", logging_strategy="no", remove_unused_columns=False, disable_tqdm=True, use_cpu=True, seed=0,
            train_sampling_strategy="sequential", optim="sgd",
        ),
        train_dataset=rows(), data_collator=collate, views=VIEWS, validate=dict,
        section=TrainSection(rationale_weight=WEIGHT, max_steps=steps, padding=padding),
    )  # fmt: skip
    trainer.train()
    theirs, start = independent_weights(steps), causal_models.model().state_dict()
    assert any(float((theirs[name] - start[name]).abs().max()) > 1e-4 for name in theirs), (
        "the steps changed something"
    )
    for name, value in model.state_dict().items():
        assert torch.allclose(value.double(), theirs[name], atol=1e-6), name


def test_ids_have_the_template_around_inputs_and_the_turns_end_after_targets() -> None:
    wording = ChatFormat(causal_models.tokenizer(), "chat")
    tokens = Tokens(causal_models.tokenizer(), wording=wording)
    (made,) = Encoder(tokens, 24, 4).rows([Row("r", "My parcel is wrong " * 9, "billing", None, ("a parcel it is, a parcel",))],
                                          VIEWS, "gold")  # fmt: skip
    for (name, pairs), prefix in zip(made.items(), ("predict: ", "explain: "), strict=True):
        ((source, target),) = pairs
        assert (
            len(source) == 24
            and source.tolist() == wording.read([prefix + "My parcel is wrong " * 9], 24)[0]
        ), name
        assert target[-1] == wording.end and list(target).count(wording.end) == 1, name
    assert len(made["rationale"][0][1]) == 4, "the end token stays where a target is cut"


# --- LoRA


def test_adapters_find_q_where_it_is_called_q_proj_and_merge_into_a_plain_model(
    tmp_path: Path,
) -> None:
    adapted = adapt(causal_models.model(), LoraSection(rank=3)).eval()
    ours = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(ours) == 2 * 2 * 2 and all(".q_proj." in name or ".v_proj." in name for name in ours)
    assert trainable(adapted) < trainable(causal_models.model())
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if name in ours:
                parameter.normal_(std=0.3)
    flat = collate(rows())["label"]
    said = logits_of(adapted, flat, without_padding=True)
    adapted.save_pretrained(tmp_path)
    plain = merged(causal_models.model(), tmp_path).eval()
    assert torch.allclose(logits_of(plain, flat, without_padding=True), said, atol=1e-5)
    assert not torch.allclose(
        logits_of(causal_models.model(), flat, without_padding=True), said, atol=1e-2
    )
    assert {name for name, _ in plain.named_parameters()} == {
        name for name, _ in causal_models.model().named_parameters()
    }


def test_a_target_that_no_block_has_is_told_with_those_there_are() -> None:
    with pytest.raises(
        UserError, match=r"'query'.*down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ):
        adapt(causal_models.model(), LoraSection(targets=("q", "query")))
    assert trainable(
        adapt(causal_models.model("gpt2"), LoraSection(rank=2, targets=("c_attn",)))
    ) == 2 * 2 * (32 + 96)


# --- a whole training


def recipe_on(toy: Callable[..., Path], folder: str, *overrides: str) -> Recipe:
    student = f"student={{model: {folder}, max_input_tokens: 64, max_target_tokens: 32}}"
    steps = (
        "train.methods=finetune",
        "train.max_steps=12",
        "train.eval_every=3",
        "train.learning_rate=0.01",
    )
    return load_recipe(toy(), [student, *steps, *overrides])


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("lora", ["train.lora=null", "train.lora={rank: 4, dropout: 0.1}"])
def test_a_killed_training_continues_to_the_weights_of_an_undisturbed_one(
    toy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str
) -> None:
    from dsbs.training.callbacks import MetricsLogger

    keys = (lora, "student.dropout=0.1", "train.gradient_checkpointing=true")
    recipe = recipe_on(toy, causal_models.save(tmp_path / "model"), *keys)
    undisturbed = Path(train(recipe, out=tmp_path / "run").students[0].path)
    passed = MetricsLogger.on_step_end

    def killed(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passed(self, args, state, control, **kwargs)
        if state.global_step == 8:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLogger, "on_step_end", killed)
        train(recipe, out=tmp_path / "other")
    checkpoint = last_checkpoint(tmp_path / "other" / "train" / "finetune-gold-s0" / "checkpoints")
    assert checkpoint is not None and checkpoint.name == "checkpoint-6"
    torch.manual_seed(99)  # what a new process would not know of the old one
    again = Path(train(recipe, out=tmp_path / "other").students[0].path)
    assert weights(again) == weights(undisturbed)
    said = [
        json.loads(line)
        for line in (again / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["step"] for row in said if "loss" in row] == list(range(1, 13))


@pytest.mark.parametrize("template", ["chat", "plain"])
def test_a_student_learns_its_task_and_is_a_plain_model_of_its_kind(
    toy: Callable[..., Path], tmp_path: Path, template: str
) -> None:
    keys = (
        f"student.template={template}",
        "train.max_steps=80",
        "train.eval_every=20",
        "train.learning_rate=0.003",
    )
    recipe = recipe_on(toy, causal_models.save(tmp_path / "model"), *keys)
    result = train(recipe, out=tmp_path / "run")
    student = Student.load(result.students[0].path)
    assert (student.card.kind, student.card.template) == ("causal", template)
    answers = student.predict(["My invoice number 99 is wrong.", "My parcel number 98 is wrong."])
    assert [answer.label for answer in answers] == ["billing", "shipping"]
    assert result.students[0].valid_accuracy == 1.0
    folder = Path(result.students[0].path)
    assert (
        sum(p.numel() for p in student.engine.model.parameters()) == result.students[0].parameters
    )
    again = train(recipe, out=tmp_path / "run").students[0]
    assert again == result.students[0], "what is finished is kept"
    assert (folder / "generation_config.json").is_file()


def test_the_loss_on_valid_is_the_same_however_its_rows_are_batched(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = causal_models.save(tmp_path / "model")
    said = []
    for size in (1, 64):
        recipe = recipe_on(toy, folder, f"eval.batch_size={size}", "train.max_steps=1")
        path = Path(train(recipe, out=tmp_path / f"run{size}").students[0].path) / "metrics.jsonl"
        looks = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        said.append(next(row["eval_label_loss"] for row in looks if "eval_label_loss" in row))
    assert said[0] == pytest.approx(said[1], rel=1e-5)


def test_a_decoder_start_for_each_task_is_refused(toy: Callable[..., Path], tmp_path: Path) -> None:
    recipe = recipe_on(toy, causal_models.save(tmp_path / "model"), "train.task_token=decoder")
    with pytest.raises(UserError, match=r"train\.task_token: decoder"):
        train(recipe, out=tmp_path / "run")


def test_further_terms_are_refused_before_any_teacher_is_trained(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    keys = (
        "train.methods=[finetune+feature]",
        "train.terms=[{kind: feature}]",
        "train.teachers=[{size: nano}]",
    )
    with pytest.raises(UserError, match="learned by T5 students alone"):
        train(recipe_on(toy, causal_models.save(tmp_path / "model"), *keys), out=tmp_path / "run")
    assert not (tmp_path / "run" / "train" / "teachers").exists()


def test_more_tokens_than_positions_are_refused_before_anything_is_trained(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = causal_models.save(tmp_path / "model")
    with pytest.raises(
        UserError,
        match=r"max_input_tokens \(240\) and student\.max_target_tokens \(32\).*256 tokens",
    ):
        train(recipe_on(toy, folder, "student.max_input_tokens=240"), out=tmp_path / "run")
    with pytest.raises(UserError, match=r"eval\.max_label_tokens \(100\)"):
        train(
            recipe_on(toy, folder, "student.max_input_tokens=200", "eval.max_label_tokens=100"),
            out=tmp_path / "run",
        )
    with pytest.raises(UserError, match="leaves no room"):
        train(recipe_on(toy, folder, "student.max_input_tokens=8"), out=tmp_path / "run")


def test_a_template_is_of_decoder_only_students_that_have_one(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    folder = causal_models.save(tmp_path / "model", chat=False)
    with pytest.raises(UserError, match="no chat template"):
        train(recipe_on(toy, folder, "student.template=chat"), out=tmp_path / "run")
    scratch = load_recipe(toy(), ["student.template=chat", "train.methods=finetune"])
    with pytest.raises(UserError, match=r"student\.template: chat belongs to decoder-only"):
        train(scratch, out=tmp_path / "run")


def test_a_dropout_that_the_model_does_not_have_is_told(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = recipe_on(toy, causal_models.save(tmp_path / "model", "gpt2"), "student.dropout=0.1")
    with pytest.raises(DsbsError, match=r"student\.dropout"):
        train(recipe, out=tmp_path / "run")


def test_a_template_that_is_not_given_changes_no_students_settings(
    toy: Callable[..., Path], tmp_path: Path
) -> None:
    path = toy()
    plain, auto, chat = (
        load_recipe(path, ["student={model: x}", *more]).training
        for more in ([], ["student.template=auto"], ["student.template=chat"])
    )
    assert plain == auto != chat
