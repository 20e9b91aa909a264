"""LoRA (Hu et al., 2021, arXiv:2106.09685) through peft; the finished student is a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsbs.config import LoraSection, unknown
from dsbs.errors import UserError, needs_extra
from dsbs.training.distillation.objective import PROJECTIONS


def add_adapters(model: Any, section: LoraSection) -> Any:
    """Freeze a model's weights and give each target matrix an adapter B·A of rank ``rank``.

    B begins at 0, so the model computes the same before training. Raises UserError for targets that
    no block has.
    """
    with needs_extra("lora", "train.lora"):
        from peft import LoraConfig, TaskType, get_peft_model
    targets = _target_modules(model, section.targets)
    model.name_or_path = ""  # peft would look the name up on the hub at every checkpoint
    task_type = TaskType.CAUSAL_LM
    if model.config.is_encoder_decoder:
        task_type = TaskType.SEQ_2_SEQ_LM
    config = LoraConfig(
        task_type=task_type,
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
    )
    return get_peft_model(model, config)


def merge_adapters(model: Any, checkpoint: Path) -> Any:
    """``model``, as the training began with it, plus the adapters of a checkpoint."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload()


def count_trainable(model: Any) -> int:
    """The number of trainable parameters, without the projections that only serve training."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(f"{PROJECTIONS}.")
    )


def _target_modules(model: Any, targets: tuple[str, ...]) -> list[str]:
    """The target matrices' names; q means q_proj where a model has no q, as in most decoders.

    Checked here, since peft ignores a name that fits no module as long as another does.
    """
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's matrices

    stacks = [model.get_decoder()]
    if model.config.is_encoder_decoder:
        stacks.append(model.get_encoder())
    modules = {
        name.rpartition(".")[2]
        for stack in stacks
        for name, module in stack.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    names = []
    for target in targets:
        name = target
        if target not in modules and f"{target}_proj" in modules:
            name = f"{target}_proj"
        if name not in modules:
            raise UserError(
                f"train.lora.targets: {unknown('matrix', target, sorted(modules))}",
                hint="q and v are usual, in a T5 and where they are called q_proj and v_proj",
            )
        names.append(name)
    return names
