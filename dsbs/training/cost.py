"""What a training costs, as far as its machine tells. What the machine does not tell is None, never an estimate."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dsbs.training.distributed import world_size

POWERCAP = Path("/sys/class/powercap")

EnergyOf = Literal["cpu packages", "gpus"]
MemoryOf = Literal["process", "gpu"]


@dataclass(frozen=True, slots=True)
class Counter:
    """A device's running count of the energy that it took. ``read`` is None where the device stopped telling."""

    read: Callable[[], int | None]
    per_joule: float  # counts
    range: int | None = None  # the count that it begins anew at; None: never


class Energy:
    """Joules since this was made; ``of`` says whose. Read it more often than a counter begins anew (some twenty minutes)."""

    def __init__(self, counters: Sequence[Counter], of: EnergyOf | None) -> None:
        self._counters, self._last = counters, [counter.read() for counter in counters]
        self._joules: float | None = 0.0 if counters else None
        self.of: EnergyOf | None = of if counters else None

    def joules(self) -> float | None:
        """None where no device tells, or one of them stopped telling."""
        for i, counter in enumerate(self._counters):
            now, before = counter.read(), self._last[i]
            if now is None or before is None or self._joules is None:
                self._joules = None
                return None
            if now < before and counter.range is None:
                self._joules = None  # it was set back: what it had counted by then is lost
                return None
            taken = now - before if now >= before else now - before + (counter.range or 0)
            self._joules += taken / counter.per_joule
            self._last[i] = now
        return self._joules


def energy() -> Energy:
    """The counters of what this machine trains on: its NVIDIA GPUs, or the packages of its CPU with all that runs there.

    Nothing where a training runs on several machines: one does not know of the others.
    """
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))
    if here < world_size():
        return Energy([], None)
    import torch

    if torch.cuda.is_available():
        uuids = [
            str(torch.cuda.get_device_properties(i).uuid)
            for i in range(min(here, torch.cuda.device_count()))
        ]
        return Energy(nvidia_counters(uuids), "gpus")
    return Energy(package_counters(POWERCAP), "cpu packages")


def nvidia_counters(uuids: Sequence[str]) -> list[Counter]:
    """NVML's count of millijoules since the driver was loaded (Volta and later), through nvidia-ml-py where it is installed."""
    try:
        import pynvml
    except ImportError:
        return []

    def counter(uuid: str) -> Counter:
        handle = pynvml.nvmlDeviceGetHandleByUUID(
            uuid if uuid.startswith("GPU-") else f"GPU-{uuid}"
        )
        pynvml.nvmlDeviceGetTotalEnergyConsumption(
            handle
        )  # raises where this device does not count

        def read() -> int | None:
            try:
                return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))
            except pynvml.NVMLError:
                return None

        return Counter(read, per_joule=1e3)

    try:
        pynvml.nvmlInit()
        return [counter(uuid) for uuid in uuids]
    except pynvml.NVMLError:
        return []


def package_counters(powercap: Path) -> list[Counter]:
    """Linux' RAPL counters of microjoules, Intel's and AMD's, of whole CPU packages (kernel: power/powercap).

    A package's own zones (cores, memory controller) are parts of it, and the platform's zone holds it: neither is added. None
    at all where one cannot be read: since 2020 kernels show them to root alone.
    """
    found = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        if zone.name.count(":") > 1:
            continue
        try:
            if not (zone / "name").read_text(encoding="utf-8").startswith("package"):
                continue
            limit = int((zone / "max_energy_range_uj").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
        counter = Counter(_reader(zone / "energy_uj"), per_joule=1e6, range=limit)
        if counter.read() is None:
            return []
        found.append(counter)
    return found


def _reader(path: Path) -> Callable[[], int | None]:
    def read() -> int | None:
        try:
            return int(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    return read


def peak_memory() -> tuple[float, MemoryOf]:
    """Megabytes at most and of what: PyTorch's tensors on the GPU, or this process with all that it did before as well."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6, "gpu"
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, "process"
