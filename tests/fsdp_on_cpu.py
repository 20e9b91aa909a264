"""`python fsdp_on_cpu.py …` is `python -m dsbs …` with FSDP on CPU processes, for tests.

PyTorch shards a model over CPU processes as well; only accelerate asks for a GPU before it hands
its settings on.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_CPU": "true",
    "FSDP_VERSION": "2",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "T5Block",
}


def allow() -> None:
    plain = AcceleratorState.__init__

    def with_settings(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        self.__dict__.setdefault("fsdp_plugin", fsdp_plugin)
        if self.__dict__["fsdp_plugin"] is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = with_settings


def die_at(step: int) -> None:
    """Kill each process after ``step``: those of a killed launcher work on for a while."""
    from dsbs.training.callbacks import MetricsLogger

    passed = MetricsLogger.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        passed(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsLogger.on_step_end = on_step_end  # type: ignore[method-assign]


if __name__ == "__main__":
    allow()
    if "DIE_AT_STEP" in os.environ:
        die_at(int(os.environ["DIE_AT_STEP"]))
    from dsbs.cli import main

    main()
