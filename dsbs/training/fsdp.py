"""FSDP for T5: weights, gradients and optimizer state divided among processes, a block's weights whole only while it works.

accelerate's own way of wrapping leaves T5's shared embedding in two groups, which PyTorch 2.13 refuses: encoder, decoder and
head hold the same tensor. Here each block is a group, and all that is left, the embedding among it, is the root's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsbs.errors import UserError
from dsbs.training.distributed import is_main_process
from dsbs.training.packed.t5 import is_t5


def shard(model: Any, accelerator: Any) -> None:
    """Divide a T5 (or LoRA around one) as accelerate's FSDP settings say; the trainer then finds it divided already."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or "FULL" not in str(plugin.state_dict_type):
        raise UserError(
            "accelerate's FSDP settings are not those that dsbs knows",
            hint="set fsdp_version: 2 and fsdp_state_dict_type: FULL_STATE_DICT, as recipes/accelerate/fsdp.yaml does",
        )
    if not is_t5(model):
        raise UserError(
            "FSDP divides T5 and mT5 only", hint="start without accelerate's FSDP settings"
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    how: dict[str, Any] = {
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        "mesh": getattr(accelerator, "torch_device_mesh", None),
    }
    for stack in (inner.encoder, inner.decoder):
        for block in stack.block[
            1:
        ]:  # the first one holds the positions' bias for all, and stays with the root
            fully_shard(block, reshard_after_forward=plugin.reshard_after_forward, **how)
            block.forward = _for_work(block, block.forward)
    fully_shard(model, **how)
    plugin.auto_wrap_policy = (
        None  # nothing is left for it, and it looks for blocks by a class that they no longer have
    )


def _for_work(block: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Let a block's call, which is when its weights are gathered, do other work on its layers (see ``unpadded``)."""

    def forward(
        hidden: Any, *args: Any, work: Callable[..., Any] | None = None, **kwargs: Any
    ) -> Any:
        return plain(hidden, *args, **kwargs) if work is None else work(block.layer, hidden, *args)

    return forward


def whole_weights(model: Any) -> dict[str, Any]:
    """All weights of a divided model, gathered on the leading process; the others get nothing. All must call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )


def save_whole(model: Any, folder: str) -> None:
    """Save a divided model as any other is saved, by the leading process (of LoRA the adapters alone). All must call it."""
    from transformers import AutoModelForSeq2SeqLM

    weights = whole_weights(model)
    if not is_main_process():
        return
    if hasattr(model, "get_base_model"):
        model.save_pretrained(folder, state_dict=weights)
    else:
        whole = AutoModelForSeq2SeqLM.from_config(model.config)
        whole.load_state_dict(weights)
        whole.save_pretrained(folder)
