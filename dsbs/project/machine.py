"""What a machine offers: packages, cores, memory, GPUs, disk, folders that can be written. Imports nothing heavy itself."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from dsbs.files import versions
from dsbs.project.checks import Check, Status

# What pyproject.toml calls optional: the modules that come with it, and what it is for. A test holds this to that file.
EXTRAS = {
    "local": (("xllamacpp",), "teacher.kind: llamacpp, dsbs export --format gguf"),
    "lora": (("peft",), "train.lora"),
    "ray": (("ray",), "annotate.engine: ray"),
    "tensorboard": (("tensorboard",), "report.tensorboard"),
    "ct2": (("ctranslate2",), "dsbs export --format ct2, and int8 students"),
    "onnx": (("onnxruntime",), "dsbs export --format onnx"),
    "gguf": (("gguf",), "students from GGUF files, dsbs export --format gguf"),
    "serve": (("fastapi", "uvicorn"), "dsbs serve"),
}
_CGROUP = Path("/sys/fs/cgroup")
_GB = 1e9
_LITTLE_MEMORY, _LITTLE_DISK, _NO_DISK = 2 * _GB, 5 * _GB, 0.2 * _GB  # bytes
_TORCH_S = 120  # seconds for torch to be imported: a cold disk, a GPU that wakes up

# In a process of its own: an import of torch may end in an illegal instruction, or find a driver that hangs.
_ASK_TORCH = """
import json, torch
gpus = []
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append({"name": torch.cuda.get_device_name(i), "free": free, "total": total})
print(json.dumps({"gpus": gpus, "bf16": bool(gpus) and torch.cuda.is_bf16_supported(), "cuda": torch.version.cuda}))
"""


def packages() -> Iterator[Check]:
    """Versions, and whether everything that dsbs needs is there in a version that it works with."""
    from packaging.requirements import Requirement

    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    try:
        needed = [Requirement(text) for text in metadata.requires("dsbs") or ()]
    except metadata.PackageNotFoundError:
        yield Check(
            "packages",
            "warning",
            "dsbs runs from a folder and is not installed",
            "pip install -e . in that folder",
        )
        needed = []
    wrong = []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append((requirement, "is missing"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append((requirement, f"is {version}"))
    if wrong:
        said = ", ".join(f"{requirement.name} {state}" for requirement, state in wrong)
        wanted = " ".join(
            f"'{requirement.name}{requirement.specifier}'" for requirement, _ in wrong
        )
        yield Check("packages", "problem", said, f"{sys.executable} -m pip install {wanted}")
    found = {name: version for name, version in versions().items() if name != "python"}
    yield Check("versions", "ok", ", ".join(f"{name} {version}" for name, version in found.items()))


def extras() -> Iterator[Check]:
    for extra, (_, use) in EXTRAS.items():
        yield Check(
            f"extra {extra}", "ok", f"{'there' if has_extra(extra) else 'not installed'}, for {use}"
        )


def has_extra(extra: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in EXTRAS[extra][0])


def processor() -> Iterator[Check]:
    """Cores and memory that this process may use: a container's limits count, not the host's size."""
    cores, host = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _quota()
    if quota is not None:
        cores = max(1, min(cores, math.ceil(quota)))
    yield Check("cores", "ok", f"{cores} of {host}, {platform.machine()}")
    import psutil

    memory = psutil.virtual_memory()
    total = min(memory.total, _number(_CGROUP / "memory.max") or memory.total)
    free = min(memory.available, total)
    said = f"{free / _GB:.1f} of {total / _GB:.1f} GB free"
    if free < _LITTLE_MEMORY:
        hint = (
            "close something, or lower train.micro_batch_size and use train.gradient_checkpointing"
        )
        yield Check("memory", "warning", said, hint)
    else:
        yield Check("memory", "ok", said)


def accelerators(needs_bf16: bool = False) -> Iterator[Check]:
    """GPUs as torch sees them; ``needs_bf16`` says that a recipe asks for what some do not have."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK_TORCH],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TORCH_S,
        )
    except subprocess.TimeoutExpired:
        yield Check(
            "GPU",
            "problem",
            f"torch was not imported within {_TORCH_S} s",
            "see whether the GPU's driver hangs",
        )
        return
    if done.returncode:
        yield Check(
            "torch",
            "problem",
            _last_words(done),
            "install torch again for this machine: https://pytorch.org",
        )
        return
    yield from describe_gpus(json.loads(done.stdout.splitlines()[-1]), needs_bf16)


def describe_gpus(found: dict[str, Any], needs_bf16: bool) -> Iterator[Check]:
    """``found``: "gpus" (name, and bytes "free" and "total", of each), "bf16" and torch's "cuda" version or None."""
    gpus = found["gpus"]
    for gpu in gpus:
        said = f"{gpu['name']}, {gpu['free'] / _GB:.1f} of {gpu['total'] / _GB:.1f} GB free, CUDA {found['cuda']}"
        yield Check("GPU", "ok", f"{said}, {'with' if found['bf16'] else 'without'} bf16")
    if not gpus and found["cuda"] and Path("/dev/nvidiactl").exists():
        hint = f"see whether the driver fits CUDA {found['cuda']} (nvidia-smi), or install torch for the driver's"
        yield Check("GPU", "warning", "there is an NVIDIA device, but torch cannot use it", hint)
    elif not gpus:
        yield Check("GPU", "ok", "none: students train on the CPU, in fp32")
    if needs_bf16 and not found["bf16"]:
        yield Check(
            "train.precision",
            "problem",
            "bf16 needs a GPU that has it",
            "set train.precision: auto",
        )


def disk(run: Path) -> Iterator[Check]:
    """Room where a run is written."""
    home = _existing(run)
    if not is_writable(run):
        yield Check(
            "disk", "problem", f"{run} cannot be written to", "give another run folder with --out"
        )
        return
    free = shutil.disk_usage(home).free
    said = f"{free / _GB:.1f} GB free where {run} lies"
    hint = "free some space, or give a folder on another disk with --out: a T5-base student takes 1 GB, its training 4"
    status: Status = "problem" if free < _NO_DISK else "warning" if free < _LITTLE_DISK else "ok"
    yield Check("disk", status, said, None if status == "ok" else hint)


def caches() -> Iterator[Check]:
    """Folders that libraries write to behind one's back."""
    from huggingface_hub import constants

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folders = {
        "HF_HOME": Path(constants.HF_HOME),
        "MPLCONFIGDIR": Path(os.environ.get("MPLCONFIGDIR") or home / "matplotlib"),
        "TMPDIR": Path(tempfile.gettempdir()),
    }
    for variable, folder in folders.items():
        if is_writable(folder):
            yield Check("cache", "ok", f"{folder} can be written to")
        else:
            yield Check(
                "cache",
                "warning",
                f"{folder} cannot be written to",
                f"export {variable}=<a folder that can>",
            )


def is_writable(folder: Path) -> bool:
    """Whether a folder could be made, or written to where it is there."""
    found = _existing(folder)
    return found.is_dir() and os.access(found, os.W_OK | os.X_OK)


def _existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that is there."""
    path = path.expanduser().absolute()
    return next(one for one in (path, *path.parents) if one.exists())


def _quota() -> float | None:
    """Cores that a container may keep busy (cgroup v2, ``cpu.max``); None: no limit, or none that is told."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _last_words(done: subprocess.CompletedProcess[str]) -> str:
    """How a Python process ended, in a line."""
    if done.returncode < 0:
        return f"importing torch ended the process by {signal.Signals(-done.returncode).name}"
    lines = done.stderr.strip().splitlines()
    return (
        f"torch cannot be imported ({lines[-1][:300] if lines else f'exit code {done.returncode}'})"
    )
