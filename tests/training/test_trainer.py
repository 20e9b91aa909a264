"""The trainer's gradients: equal to an independent loop's for every micro-batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import on_two_processes
from torch.nn.functional import log_softmax
from transformers import Seq2SeqTrainingArguments, T5Config, T5ForConditionalGeneration

from dsbs.config import TrainSection
from dsbs.training.encode import Encoded, collate
from dsbs.training.methods import View
from dsbs.training.trainer import StepTrainer

WEIGHT = 0.5
STEPS = 10
VIEWS = (View("label", "predict: ", 1.0), View("rationale", "explain: ", WEIGHT))


def tiny_model(layers: int = 1) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=layers,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def rows(count: int = 8) -> list[Encoded]:
    """Rows of very different lengths; some have no rationale."""
    found: list[Encoded] = []
    for i in range(count):
        row: Encoded = {"label": [([5 + i] * (2 + i), [3 + i] * (1 + i % 3))]}
        if i not in (1, 4, 5):
            row["rationale"] = [([6 + i] * (1 + 2 * i), [10 + i] * (1 + 3 * i))]
        found.append(row)
    return found


def weights_after(
    folder: Path, micro: int, steps: int = STEPS, world_size: int = 1, **keys: Any
) -> dict[str, torch.Tensor]:
    model = tiny_model()
    train(model, folder, micro, steps, world_size, **keys)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(
    model: Any,
    folder: Path,
    micro: int,
    steps: int = STEPS,
    world_size: int = 1,
    count: int = 8,
    order: str = "sequential",
    **keys: Any,
) -> None:
    """Plain gradient descent by the real trainer, steps of 8 of ``count`` rows."""
    section = TrainSection(rationale_weight=WEIGHT, max_steps=steps, **keys)
    trainer = StepTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=8 // micro // world_size,
            max_steps=steps,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
            train_sampling_strategy=order,
            optim="sgd",
        ),
        train_dataset=rows(count),
        data_collator=collate,
        views=VIEWS,
        section=section,
        validate=dict,
    )
    trainer.train()


def independent_weights(steps: int = STEPS, layers: int = 1) -> dict[str, torch.Tensor]:
    """The paper's objective written out row by row, with plain gradient descent, in float64."""
    model = tiny_model(layers).double()
    for _ in range(steps):
        model.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        for target, weight in (("label", 1.0), ("rationale", WEIGHT)):
            pairs = [pair for row in rows() for pair in row.get(target, ())]
            nll = torch.zeros((), dtype=torch.float64)
            for source, wanted in pairs:
                logits = model(
                    input_ids=torch.tensor([source]), labels=torch.tensor([wanted])
                ).logits[0]
                nll = nll - log_softmax(logits, dim=-1)[range(len(wanted)), wanted].sum()
            total = total + weight * nll / sum(len(wanted) for _, wanted in pairs)
        (total / (1 + WEIGHT)).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(1e-2 * parameter.grad)
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("padding", ["none", "batch"])
@pytest.mark.parametrize("micro", [8, 4, 2, 1])
def test_steps_equal_an_independent_loop_however_they_are_cut(
    tmp_path: Path, micro: int, padding: str
) -> None:
    ours, theirs = weights_after(tmp_path, micro, padding=padding), independent_weights()
    start: dict[str, Any] = tiny_model().state_dict()
    assert any(float((theirs[name] - start[name]).abs().max()) > 1e-4 for name in theirs), (
        "the steps changed something"
    )
    for name, value in ours.items():
        assert torch.allclose(value.double(), theirs[name], atol=1e-6), name


WORKER = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
import torch
from test_trainer import weights_after
weights = weights_after(
    Path(sys.argv[2]), micro=int(sys.argv[3]), world_size=2,
    count=int(sys.argv[4]), order=sys.argv[5],
)
if torch.distributed.get_rank() == 0:
    torch.save(weights, Path(sys.argv[2]) / "weights.pt")
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("micro", [4, 2])
def test_two_processes_take_the_steps_of_one(tmp_path: Path, micro: int) -> None:
    """Over gloo; the rows without a rationale fall unevenly on the two."""
    theirs = independent_weights()
    for name, value in on_two(tmp_path, micro, 8, "sequential").items():
        assert torch.allclose(value.double(), theirs[name], atol=1e-6), name


@pytest.mark.parametrize(("count", "order"), [(13, "random"), (9, "sequential")])
def test_two_processes_take_the_short_last_step_of_an_epoch_as_one_does(
    tmp_path: Path, count: int, order: str
) -> None:
    """Of 13 rows five are left for it, of 9 one, so that one process has none."""
    alone = weights_after(tmp_path / "alone", 4, count=count, order=order)
    for name, value in on_two(tmp_path, 2, count, order).items():
        assert torch.allclose(value, alone[name], atol=1e-6), name


def on_two(folder: Path, micro: int, count: int, order: str) -> dict[str, torch.Tensor]:
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    arguments = (str(Path(__file__).parent), str(folder), str(micro), str(count), order)
    on_two_processes(str(folder / "worker.py"), *arguments)
    weights: dict[str, torch.Tensor] = torch.load(folder / "weights.pt")
    return weights


def test_micro_means_are_the_published_codes(tmp_path: Path) -> None:
    """Means of micro-batches, averaged: another objective where rows differ in length."""
    ours = weights_after(tmp_path, 4, loss_mean="micro")
    model = tiny_model().double()
    for _ in range(STEPS):
        model.zero_grad()
        for chunk in (rows()[:4], rows()[4:]):
            parts = []
            for target, weight in (("label", 1.0), ("rationale", WEIGHT)):
                pairs = [pair for row in chunk for pair in row.get(target, ())]
                nll = torch.zeros((), dtype=torch.float64)
                for source, wanted in pairs:
                    logits = model(
                        input_ids=torch.tensor([source]), labels=torch.tensor([wanted])
                    ).logits[0]
                    nll = nll - log_softmax(logits, dim=-1)[range(len(wanted)), wanted].sum()
                parts.append(weight * nll / sum(len(wanted) for _, wanted in pairs))
            (sum(parts) / (1 + WEIGHT) / 2).backward()  # type: ignore[union-attr]
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(1e-2 * parameter.grad)
    for name, value in model.state_dict().items():
        assert torch.allclose(ours[name].double(), value.detach(), atol=1e-6), name
