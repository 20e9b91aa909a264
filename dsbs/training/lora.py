"""LoRA (Hu et al., 2021, arXiv:2106.09685) through peft: adapters learn, the student that comes of them is a plain model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsbs.config import LoraSection, unknown
from dsbs.errors import UserError
from dsbs.training.distillation.objective import PROJECTIONS


def adapt(model: Any, section: LoraSection) -> Any:
    """A model whose own weights stand still and whose target matrices each learn a product B·A of rank ``rank``.

    B begins at 0, so that what training starts from is ``model``. Raises UserError for targets that no block has.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError:
        raise UserError(
            "train.lora needs the package peft", hint="pip install 'dsbs[lora]'"
        ) from None
    targets = _targets(model, section.targets)
    model.name_or_path = (
        ""  # by its name peft would look the model up on the hub at every checkpoint
    )
    config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM,
        r=section.rank,
        lora_alpha=section.alpha,
        lora_dropout=section.dropout,
        target_modules=targets,
    )
    return get_peft_model(model, config)


def merged(model: Any, checkpoint: Path) -> Any:
    """``model``, from which a training with LoRA started, with the adapters of one of its checkpoints added to its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(checkpoint)).merge_and_unload()


def trainable(model: Any) -> int:
    """How many of the model's parameters learn, without the projections that end with its training."""
    named = model.named_parameters()
    return sum(
        one.numel()
        for name, one in named
        if one.requires_grad and not name.startswith(f"{PROJECTIONS}.")
    )


def _targets(model: Any, targets: tuple[str, ...]) -> list[str]:
    """The matrices' own names. Where a model has no q but a q_proj, as most decoders alone have, q means that.

    peft says nothing of a name that fits no module as long as another does; lm_head often shares its weights.
    """
    import torch
    from transformers.pytorch_utils import Conv1D  # GPT-2's matrices

    stacks = (
        (model.get_encoder(), model.get_decoder())
        if model.config.is_encoder_decoder
        else (model.get_decoder(),)
    )
    found = {
        name.rpartition(".")[2]
        for stack in stacks
        for name, module in stack.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    own = []
    for target in targets:
        name = f"{target}_proj" if target not in found and f"{target}_proj" in found else target
        if name not in found:
            usual = (
                "q and v are the usual ones, in a T5 and where they are called q_proj and v_proj"
            )
            raise UserError(
                f"train.lora.targets: {unknown('matrix', target, sorted(found))}", hint=usual
            )
        own.append(name)
    return own
