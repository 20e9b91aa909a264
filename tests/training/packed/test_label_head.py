"""Label heads: losses and steps against an independent loop, for each kind of backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import causal_models
import pytest
import small_t5
import torch
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertModel,
    Seq2SeqTrainingArguments,
)

from dsbs.config import TrainSection
from dsbs.students.heads import LabelHeadModel, share_embeddings
from dsbs.training.encode import Encoded, collate
from dsbs.training.methods import views_of
from dsbs.training.packed.label_head import LabelHeadRunner, split_new_layers
from dsbs.training.trainer import StepTrainer

LABELS = 3
STEPS = 4
WEIGHT = 0.5
BACKBONES = ["encoder", "seq2seq", "causal"]


def rows(count: int = 8) -> list[Encoded]:
    """Rows of very different lengths; some have no rationale, one has two."""
    encoded: list[Encoded] = []
    for i in range(count):
        source = [5 + i, 9] * (1 + 2 * i)
        row: Encoded = {"label": [(source, [i % LABELS])]}
        if i not in (1, 4, 5):
            pair = (source, [10 + i] * (1 + 2 * i) + [1])
            row["rationale"] = [pair, (source, [7, 8, 1])] if i == 2 else [pair]
        encoded.append(row)
    return encoded


def label_head(architecture: Any, dropout: float = 0.0) -> LabelHeadModel:
    if architecture == "encoder":
        torch.manual_seed(1)
        shape: dict[str, Any] = {
            "vocab_size": 50,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "hidden_dropout_prob": dropout,
            "attention_probs_dropout_prob": dropout,
        }
        body: Any = BertModel(BertConfig(**shape, type_vocab_size=1))
        config = BertGenerationConfig(
            **shape, bos_token_id=2, eos_token_id=1, is_decoder=True, add_cross_attention=True
        )
        decoder = share_embeddings(BertGenerationDecoder(config), body)
        return LabelHeadModel(body, LABELS, architecture, decoder, dropout=dropout)
    body = small_t5.t5().float() if architecture == "seq2seq" else causal_models.model()
    torch.manual_seed(4)
    return LabelHeadModel(body, LABELS, architecture, dropout=dropout)


def losses_row_by_row(model: LabelHeadModel) -> dict[str, torch.Tensor]:
    """By view, the summed cross-entropy of plain passes over single rows without padding."""
    total = {
        view: torch.zeros((), dtype=model.classifier.weight.dtype)
        for view in ("label", "rationale")
    }
    for row in rows():
        for source, (target,) in row["label"]:
            ids = torch.tensor([source])
            logits = model(ids, torch.ones_like(ids))
            total["label"] = total["label"] + cross_entropy(logits, torch.tensor([target]))
        for source, target in row.get("rationale", ()):
            total["rationale"] = total["rationale"] + rationale_nll(model, source, target)
    return total


def rationale_nll(model: LabelHeadModel, source: Any, target: Any) -> torch.Tensor:
    ids = torch.tensor([source])
    if model.architecture == "causal":
        logits = model.body(input_ids=torch.tensor([[*source, *target]])).logits
        logits = logits[0, len(source) - 1 : -1]
    elif model.architecture == "seq2seq":
        logits = model.body(input_ids=ids, labels=torch.tensor([target])).logits[0]
    else:
        states = model.body(input_ids=ids).last_hidden_state
        start = [model.rationale_decoder.config.bos_token_id, *target[:-1]]
        logits = model.rationale_decoder(
            input_ids=torch.tensor([start]), encoder_hidden_states=states
        ).logits[0]
    return cross_entropy(logits, torch.tensor(target), reduction="sum")


@pytest.mark.parametrize("without_padding", [True, False])
@pytest.mark.parametrize("architecture", BACKBONES)
def test_losses_and_gradients_equal_those_of_single_rows(
    architecture: str, without_padding: bool
) -> None:
    model = label_head(architecture).double().train()
    views = views_of("step-by-step", TrainSection(), "labels")
    runner = LabelHeadRunner(model, views, without_padding=without_padding)
    ours = runner.summed_losses(collate(rows()))
    expected = losses_row_by_row(model)
    assert set(ours) == set(expected)
    for view, loss in expected.items():
        assert float(ours[view].detach()) == pytest.approx(float(loss.detach()), rel=1e-6), view
        model.zero_grad()
        loss.backward()
        gradients = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }
        model.zero_grad()
        ours[view].backward(retain_graph=True)
        for name, gradient in gradients.items():
            parameter = model.get_parameter(name)
            assert parameter.grad is not None and torch.allclose(
                parameter.grad, gradient, atol=1e-5
            )


@pytest.mark.parametrize("micro_batch", [8, 2])
@pytest.mark.parametrize("architecture", BACKBONES)
def test_steps_equal_an_independent_loop(
    tmp_path: Path, architecture: str, micro_batch: int
) -> None:
    reference = label_head(architecture).double()
    classes = len(rows())
    tokens = sum(len(target) for row in rows() for _, target in row.get("rationale", ()))
    for _ in range(STEPS):
        reference.zero_grad()
        losses = losses_row_by_row(reference)
        loss = losses["label"] / classes + WEIGHT * losses["rationale"] / tokens
        (loss / (1 + WEIGHT)).backward()
        with torch.no_grad():
            for parameter in reference.parameters():
                if parameter.grad is not None:
                    parameter.sub_(3e-2 * parameter.grad)
    model = label_head(architecture)
    train(model, tmp_path, micro_batch, rationale_weight=WEIGHT)
    for name, weights in reference.state_dict().items():
        assert torch.allclose(model.state_dict()[name].double(), weights, atol=1e-5), name


def train(model: LabelHeadModel, folder: Path, micro_batch: int, **changes: Any) -> None:
    """Train with plain gradient descent."""
    method = changes.pop("method", "step-by-step")
    section = TrainSection(
        batch_size=8, max_steps=STEPS, learning_rate=3e-2, head_learning_rate=3e-2, **changes
    )
    views = views_of(method, section, "labels")
    supervised = {view.target for view in views if view.supervised}
    dataset = [{name: pairs for name, pairs in row.items() if name in supervised} for row in rows()]
    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=8 // micro_batch,
        max_steps=STEPS,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        seed=3,
    )
    trainer = StepTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collate,
        views=views,
        section=section.resolved(is_scratch=False),
        validate=lambda: {},
        optimizers=(torch.optim.SGD(model.parameters(), lr=3e-2), None),
    )
    trainer.train()


def test_new_layers_have_their_own_learning_rate() -> None:
    model = label_head("encoder")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    split_new_layers(optimizer, model, 1e-3)
    pretrained, new = optimizer.param_groups
    assert (pretrained["lr"], new["lr"]) == (1e-4, 1e-3)
    assert {id(p) for p in pretrained["params"]} == {id(p) for p in model.body.parameters()}
    assert len(pretrained["params"]) + len(new["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("architecture", BACKBONES)
def test_without_weight_a_rationale_changes_no_bit(tmp_path: Path, architecture: str) -> None:
    finetuned = label_head(architecture, dropout=0.1)
    weightless = label_head(architecture, dropout=0.1)
    weightless.load_state_dict(finetuned.state_dict())
    train(finetuned, tmp_path / "a", 4, method="finetune")
    train(weightless, tmp_path / "b", 4, rationale_weight=0.0)
    for name, weights in finetuned.state_dict().items():
        assert torch.equal(weightless.state_dict()[name], weights), name
