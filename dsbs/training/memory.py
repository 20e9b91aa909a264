"""Whether it was memory that ended a training, and giving memory back."""

from __future__ import annotations

import gc


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU or of the machine, for which PyTorch has no class of its own."""
    import torch

    return isinstance(
        error, torch.OutOfMemoryError | MemoryError
    ) or "DefaultCPUAllocator: can't allocate" in str(error)


def free() -> None:
    """Give back what nobody holds any more: a trainer and its models are a ring of objects, which holds itself."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
