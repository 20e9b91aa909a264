"""Processes and memory: ranks, barriers, FSDP for T5, out-of-memory errors.

Several processes train one student together under ``accelerate launch -m dsbs train …`` or
``torchrun``. accelerate's own FSDP wrapping leaves T5's shared embedding in two groups, which
PyTorch 2.13 refuses: encoder, decoder and head hold the same tensor. Here each block is a group,
and everything else, the embedding included, belongs to the root.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

from dsbs.errors import UserError
from dsbs.students.weights import device, usable_memory

# PyTorch has no class for these errors.
_OUT_OF_MEMORY = ("DefaultCPUAllocator: can't allocate", "MPS backend out of memory")


def world_size() -> int:
    """The number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the files and reports progress."""
    return int(os.environ.get("RANK", "0")) == 0


def destroy_process_group() -> None:
    """End the process group in all processes at once: one that leaves early fails the others."""
    wait()
    if world_size() > 1:
        import torch

        torch.distributed.destroy_process_group()


def wait() -> None:
    """Wait until all processes are here: files that the main one wrote are then visible to all."""
    if world_size() > 1:
        from accelerate import PartialState

        PartialState(cpu=device() != "cuda").wait_for_everyone()


def per_device_batch_size(batch_size: int, micro_batch_size: int) -> int:
    """Examples of one process's forward pass.

    The largest divisor of the process's share of ``batch_size`` that is at most its share of
    ``micro_batch_size``.
    """
    share = batch_size // world_size()
    limit = max(1, micro_batch_size // world_size())
    return max(size for size in range(1, limit + 1) if share % size == 0)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU or the machine ran out of memory."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(message in str(error) for message in _OUT_OF_MEMORY)


def device_memory() -> int:
    """The bytes of memory of the device that models train on; a container's limit counts."""
    import torch

    if device() == "cuda":
        return int(torch.cuda.mem_get_info()[1])
    if device() == "mps":
        return int(torch.mps.recommended_max_memory())
    return usable_memory()[0]


def free_memory() -> None:
    """Free unreachable objects and cached GPU memory; a trainer and its model form a cycle."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    if device() == "mps":
        torch.mps.empty_cache()


def shard_model(model: Any, accelerator: Any) -> None:
    """Shard a T5, or LoRA around one, in place by accelerate's FSDP settings.

    Raises UserError for other models and for settings other than recipes/accelerate/fsdp.yaml's.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from dsbs.training.packed.t5 import is_t5

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2 or "FULL" not in str(plugin.state_dict_type):
        raise UserError(
            "accelerate's FSDP settings are not supported",
            hint="set fsdp_version: 2 and fsdp_state_dict_type: FULL_STATE_DICT, as "
            "recipes/accelerate/fsdp.yaml does",
        )
    if not is_t5(model):
        raise UserError(
            "FSDP is supported for T5 and mT5 only", hint="start without accelerate's FSDP settings"
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings: dict[str, Any] = {
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        "mesh": getattr(accelerator, "torch_device_mesh", None),
    }
    reshard = plugin.reshard_after_forward
    for stack in (inner.encoder, inner.decoder):
        # The first block holds the position bias of all blocks, so it stays in the root's group.
        for block in stack.block[1:]:
            fully_shard(block, reshard_after_forward=reshard, **settings)
            block.forward = _forward_or_work(block, block.forward)
    fully_shard(model, **settings)
    # Nothing is left to wrap, and the policy looks for a class that the blocks no longer have.
    plugin.auto_wrap_policy = None


def _forward_or_work(block: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a block's call, during which its weights are gathered, run ``work`` on its layers."""

    def call(hidden: Any, *args: Any, work: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
        if work is None:
            return forward(hidden, *args, **kwargs)
        return work(block.layer, hidden, *args)

    return call


def gather_weights(model: Any) -> dict[str, Any]:
    """All weights of a sharded model on the main process, nothing on the others. All must call."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def save_sharded_model(model: Any, folder: str) -> None:
    """Save a sharded model as any other is saved (of LoRA, the adapters alone). All must call."""
    from transformers import AutoModelForSeq2SeqLM

    weights = gather_weights(model)
    if not is_main_process():
        return
    if hasattr(model, "get_base_model"):
        model.save_pretrained(folder, state_dict=weights)
    else:
        plain = AutoModelForSeq2SeqLM.from_config(model.config)
        plain.load_state_dict(weights)
        plain.save_pretrained(folder)
