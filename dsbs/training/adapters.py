"""Adapters: LoRA (Hu et al., 2021, arXiv:2106.09685) through peft. The finished student has them
merged into its weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsbs.config import LoraSection, unknown
from dsbs.errors import UserError, needs_extra
from dsbs.students.heads import LabelHeadModel
from dsbs.training.distillation.objective import PROJECTIONS

# Other names of a matrix: BERT's, DeBERTa's, DistilBERT's, and ModernBERT's for all three together.
_OTHER_NAMES = {
    "q": ("q_proj", "query", "query_proj", "q_lin", "Wqkv"),
    "k": ("k_proj", "key", "key_proj", "k_lin", "Wqkv"),
    "v": ("v_proj", "value", "value_proj", "v_lin", "Wqkv"),
}


def add_adapters(model: Any, section: LoraSection) -> Any:
    """Freeze a model's weights and give each target matrix an adapter B·A of rank ``rank``.

    B begins at 0, so the model computes the same before training. A label head and a rationale
    decoder are trained in full, except for embeddings that the decoder shares with the model.
    Raises UserError for targets that no block has.
    """
    if isinstance(model, LabelHeadModel):
        model.body = add_adapters(model.body, section)
        return model
    with needs_extra("lora", "train.lora"):
        from peft import LoraConfig, TaskType, get_peft_model
    targets = _target_modules(model, section.targets)
    model.name_or_path = ""  # peft would look the name up on the hub at every checkpoint
    task_type = None  # an encoder
    if model.get_output_embeddings() is not None:
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

    if isinstance(model, LabelHeadModel):
        model.body = PeftModel.from_pretrained(model.body, str(checkpoint)).merge_and_unload()
        model.load_new_layers(checkpoint)
        return model
    return PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload()


def count_trainable(model: Any) -> int:
    """The number of trainable parameters, without the projections that only serve training."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.startswith(f"{PROJECTIONS}.")
    )


def _target_modules(model: Any, targets: tuple[str, ...]) -> list[str]:
    """The target matrices' names; q means q_proj or query where a model has no q.

    Checked here, since peft ignores a name that fits no module as long as another does.
    """
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's matrices

    stacks = [model]
    if model.get_output_embeddings() is not None:
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
        candidates = (target, f"{target}_proj", *_OTHER_NAMES.get(target, ()))
        name = next((name for name in candidates if name in modules), None)
        if name is None:
            raise UserError(
                f"train.lora.targets: {unknown('matrix', target, sorted(modules))}",
                hint="q and v are usual, in a T5 and where they are called q_proj and v_proj",
            )
        names.append(name)
    return list(dict.fromkeys(names))
