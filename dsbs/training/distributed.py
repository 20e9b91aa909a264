"""Several processes that train one student together (`accelerate launch -m dsbs train …`, `torchrun`)."""

from __future__ import annotations

import os


def world_size() -> int:
    """How many there are; 1 where no launcher started this one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the files and speaks to people."""
    return int(os.environ.get("RANK", "0")) == 0


def destroy_process_group() -> None:
    """End the group, all at once: one that leaves early takes the others down with it."""
    wait()
    if world_size() > 1:
        import torch

        torch.distributed.destroy_process_group()


def wait() -> None:
    """Until all have come here: what the leader wrote before is there for the others."""
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()
