"""Checks of a machine: packages, cores, memory, GPUs, disk, writable folders."""

from __future__ import annotations

import contextlib
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from dsbs.config import StudentRecipe
from dsbs.errors import DsbsError, UserError
from dsbs.files import expand_user, versions
from dsbs.students.card import count_parameters
from dsbs.students.weights import (
    BYTES_IN_TRAINING,
    BYTES_OF_WEIGHT,
    CGROUP,
    usable_cores,
    usable_memory,
)

# The optional dependencies of pyproject.toml: modules, and what needs them. A test compares them.
EXTRAS = {
    "local": (("xllamacpp",), "teacher.kind: llamacpp, dsbs export --format gguf"),
    "lora": (("peft",), "train.lora"),
    "ray": (("ray",), "annotate.engine: ray"),
    "tensorboard": (("tensorboard",), "report.trackers: [tensorboard]"),
    "mlflow": (("mlflow",), "report.trackers: [mlflow]"),
    "wandb": (("wandb",), "report.trackers: [wandb]"),
    "trackio": (("trackio",), "report.trackers: [trackio]"),
    "ct2": (("ctranslate2",), "dsbs export --format ct2, and int8 students"),
    "onnx": (("onnxruntime",), "dsbs export --format onnx"),
    "gguf": (("gguf",), "students from GGUF files, dsbs export --format gguf"),
    "re2": (("re2",), "pattern in a prompt file"),
    "serve": (("fastapi", "uvicorn"), "dsbs serve"),
    "review": (("fastapi", "uvicorn", "cleanlab"), "dsbs review"),
    "redact": (("presidio_analyzer",), "dsbs import --redact"),
}
_GB = 1e9
_LOW_MEMORY = 2 * _GB
_LOW_DISK = 5 * _GB
_FULL_DISK = 0.2 * _GB
_TORCH_TIMEOUT_S = 120  # to import torch: a cold disk, a GPU that wakes up

# Runs in its own process: importing torch may hit an illegal instruction or hang in a driver.
_PROBE_TORCH = """
import json, torch
gpus = []
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        gpus.append({"name": torch.cuda.get_device_name(i), "free": free, "total": total})
elif torch.backends.mps.is_available():
    total = torch.mps.recommended_max_memory()
    free = total - torch.mps.driver_allocated_memory()
    gpus.append({"name": "Apple GPU", "free": free, "total": total})
bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
print(json.dumps({"gpus": gpus, "bf16": bf16, "cuda": torch.version.cuda}))
"""

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check: what was checked, what was observed, what to do (None: nothing)."""

    name: str
    status: Status
    message: str
    hint: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.status,
            "said": self.message,
            "hint": self.hint,
        }


def run_check(name: str, check: Callable[[], Iterator[Check]]) -> list[Check]:
    """The results of a check. An error in the check itself is a result as well."""
    results: list[Check] = []
    try:
        results.extend(check())
    except DsbsError as error:
        results.append(Check(name, "problem", error.problem, error.hint))
    except Exception as error:
        message = f"the check itself failed ({type(error).__name__}: {str(error)[:300]})"
        results.append(Check(name, "problem", message, f"check by hand whether {name} works"))
    return results


def packages() -> Iterator[Check]:
    """Python, and whether all required packages are installed in a suitable version."""
    from packaging.requirements import Requirement

    yield Check("python", "ok", f"{platform.python_version()} ({sys.executable})")
    requirements: list[Requirement] = []
    try:
        requirements = [Requirement(text) for text in metadata.requires("dsbs") or ()]
    except metadata.PackageNotFoundError:
        message = "dsbs runs from a folder and is not installed"
        yield Check("packages", "warning", message, "pip install -e . in that folder")
    problems = []
    to_install = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        problem = _requirement_problem(requirement.name, requirement.specifier)
        if problem is not None:
            problems.append(f"{requirement.name} {problem}")
            to_install.append(f"'{requirement.name}{requirement.specifier}'")
    if problems:
        hint = f"{sys.executable} -m pip install {' '.join(to_install)}"
        yield Check("packages", "problem", ", ".join(problems), hint)
    installed = [f"{name} {version}" for name, version in versions().items() if name != "python"]
    yield Check("versions", "ok", ", ".join(installed))


def _requirement_problem(name: str, specifier: Any) -> str | None:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return "is missing"
    if not specifier.contains(version, prereleases=True):
        return f"is {version}"
    return None


def extras() -> Iterator[Check]:
    for extra, (_, use) in EXTRAS.items():
        state = "installed" if has_extra(extra) else "not installed"
        yield Check(f"extra {extra}", "ok", f"{state}, for {use}")


def has_extra(extra: str) -> bool:
    modules, _ = EXTRAS[extra]
    return all(importlib.util.find_spec(module) is not None for module in modules)


def processor() -> Iterator[Check]:
    """Cores and memory that this process may use; a container's limits count, not the host's."""
    cores = usable_cores()
    quota = _cpu_quota()
    if quota is not None:
        cores = max(1, min(cores, math.ceil(quota)))
    yield Check("cores", "ok", f"{cores} of {os.cpu_count() or 1}, {platform.machine()}")
    total, free = usable_memory()
    message = f"{free / _GB:.1f} of {total / _GB:.1f} GB free"
    if free < _LOW_MEMORY:
        hint = (
            "close other programs, or lower train.micro_batch_size and set "
            "train.gradient_checkpointing"
        )
        yield Check("memory", "warning", message, hint)
    else:
        yield Check("memory", "ok", message)


def training_memory() -> tuple[int, str]:
    """The bytes of memory where models train, and its owner: the first GPU's, or this machine's."""
    return _gpu_memory() or (usable_memory()[0], "this machine")


@cache
def _gpu_memory() -> tuple[int, str] | None:
    """The first GPU's memory and name. It is asked once, in a process of its own: that takes long.
    None: there is no GPU.
    """
    if Path("/dev/nvidiactl").exists():
        with contextlib.suppress(OSError, subprocess.SubprocessError, ValueError, IndexError):
            probe = subprocess.run(
                [sys.executable, "-c", _PROBE_TORCH],
                capture_output=True,
                encoding="utf-8",
                check=True,
                timeout=_TORCH_TIMEOUT_S,
            )
            gpu = json.loads(probe.stdout.splitlines()[-1])["gpus"][0]
            return int(gpu["total"]), str(gpu["name"])
    return None


def check_memory(recipe: StudentRecipe) -> None:
    """Raises UserError where a student in training and its local teachers do not fit in memory.

    Counted are weights, gradients and the optimizer's state; activations come on top.
    """
    if not recipe.train.teachers:
        return
    state = BYTES_IN_TRAINING[recipe.train.optimizer]
    student_bytes = BYTES_OF_WEIGHT if recipe.train.lora else state
    if all(getattr(term, "top_k", None) for term in recipe.train.terms if term.needs_teacher):
        student_bytes = BYTES_OF_WEIGHT  # the teachers are gone when the training begins
    models = [("the student", recipe.train.init or recipe.student.source, student_bytes)]
    for section in recipe.train.teachers:
        if section.model is None:  # it is trained first, alone
            _check_fit([("the training of a teacher", section.start, state)])
        models.append(("a teacher", section.model or section.start, BYTES_OF_WEIGHT))
    _check_fit(models)


def _check_fit(models: Sequence[tuple[str, str | None, int]]) -> None:
    """``models``: name, source and bytes of each parameter."""
    total = 0
    parts: list[str] = []
    for name, source, size in models:
        parameters = count_parameters(source)
        total += parameters * size
        parts.append(
            f"{name} {parameters * size / _GB:.1f} GB ({parameters / 1e6:,.0f} million parameters "
            f"of {size} bytes)"
        )
    available, owner = training_memory()
    if total > available:
        raise UserError(
            f"train.teachers: {' and '.join(parts)} need {total / _GB:.1f} GB before any "
            f"activation, and {owner} has {available / _GB:.1f} GB",
            hint="use a smaller teacher, train.lora or train.optimizer: adafactor",
        )


def accelerators(needs_bf16: bool = False) -> Iterator[Check]:
    """GPUs as torch sees them. ``needs_bf16``: the recipe asks for bf16, which some lack."""
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _PROBE_TORCH],
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=_TORCH_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        message = f"importing torch took more than {_TORCH_TIMEOUT_S} s"
        yield Check("GPU", "problem", message, "check whether the GPU's driver hangs")
        return
    if probe.returncode:
        hint = "reinstall torch for this machine: https://pytorch.org"
        yield Check("torch", "problem", _torch_error(probe), hint)
        return
    yield from describe_gpus(json.loads(probe.stdout.splitlines()[-1]), needs_bf16)


def describe_gpus(probe: dict[str, Any], needs_bf16: bool) -> Iterator[Check]:
    """``probe``: "gpus" (each its name, and bytes "free" and "total"), "bf16", "cuda" (or None)."""
    gpus = probe["gpus"]
    bf16 = "with bf16" if probe["bf16"] else "without bf16"
    for gpu in gpus:
        memory = f"{gpu['free'] / _GB:.1f} of {gpu['total'] / _GB:.1f} GB free"
        runtime = f"CUDA {probe['cuda']}" if probe["cuda"] else "Metal"
        yield Check("GPU", "ok", f"{gpu['name']}, {memory}, {runtime}, {bf16}")
    if not gpus and probe["cuda"] and Path("/dev/nvidiactl").exists():
        hint = (
            f"check that the driver supports CUDA {probe['cuda']} (nvidia-smi), "
            "or install torch for the driver's version"
        )
        yield Check("GPU", "warning", "there is an NVIDIA device, but torch cannot use it", hint)
    elif not gpus:
        yield Check("GPU", "ok", "none: students train on the CPU, in fp32")
    if needs_bf16 and not probe["bf16"]:
        message = "bf16 needs a GPU that supports it"
        yield Check("train.precision", "problem", message, "set train.precision: auto")


def disk(run: Path) -> Iterator[Check]:
    """Free space where a run is written."""
    if not is_writable(run):
        yield Check("disk", "problem", f"{run} is not writable", "choose a run folder with --out")
        return
    free = shutil.disk_usage(_nearest_existing(run)).free
    message = f"{free / _GB:.1f} GB free for {run}"
    hint = (
        "free some space, or choose a folder on another disk with --out: "
        "a T5-base student takes 1 GB, its training 4"
    )
    if free < _FULL_DISK:
        yield Check("disk", "problem", message, hint)
    elif free < _LOW_DISK:
        yield Check("disk", "warning", message, hint)
    else:
        yield Check("disk", "ok", message)


def caches() -> Iterator[Check]:
    """Folders that libraries write to."""
    from huggingface_hub import constants

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folders = {
        "HF_HOME": Path(constants.HF_HOME),
        "MPLCONFIGDIR": Path(os.environ.get("MPLCONFIGDIR") or home / "matplotlib"),
        "TMPDIR": Path(tempfile.gettempdir()),
    }
    for variable, folder in folders.items():
        if is_writable(folder):
            yield Check("cache", "ok", f"{folder} is writable")
        else:
            hint = f"export {variable}=<a writable folder>"
            yield Check("cache", "warning", f"{folder} is not writable", hint)


def is_writable(folder: Path) -> bool:
    """Whether a folder is writable, or could be created."""
    existing = _nearest_existing(folder)
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    path = expand_user(path).absolute()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _cpu_quota() -> float | None:
    """Cores that a container may use (cgroup v2, ``cpu.max``); None: no known limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _torch_error(probe: subprocess.CompletedProcess[str]) -> str:
    """How the process that imported torch ended."""
    if probe.returncode < 0:
        return f"importing torch ended the process with {signal.Signals(-probe.returncode).name}"
    reason = f"exit code {probe.returncode}"
    lines = probe.stderr.strip().splitlines()
    if lines:
        reason = lines[-1][:300]
    return f"torch cannot be imported ({reason})"
