"""Where a student's weights come from: a Hub id, a local folder, or chance."""

from __future__ import annotations

import copy
import hashlib
import io
import platform
from contextlib import nullcontext, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any

from dsbs.config import StudentSection
from dsbs.errors import DsbsError, UserError
from dsbs.students.gguf import fingerprint, gguf_file, is_gguf

CPUINFO = Path("/proc/cpuinfo")

# Shapes of students made from scratch (T5 v1.0 layout, Raffel et al., 2020; embeddings are tied).
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

# Files of weights: of transformers, CTranslate2 (model.bin), ONNX with its outside data, torch and llama.cpp.
_WEIGHTS = (
    *("model*.safetensors", "pytorch_model*.bin", "model*.bin"),
    *("*.onnx", "*.onnx_data", "*.onnx.data", "*.pt", "*.pt2", "*.gguf"),
)


def megabytes(student_path: str | Path) -> float:
    """Of a student's weight files on disk, in 10^6 bytes, whatever their format. Raises UserError where there is none."""
    files = {file for pattern in _WEIGHTS for file in Path(student_path).glob(pattern)}
    if not files:
        raise UserError(
            f"{student_path} has no weights ({' or '.join(_WEIGHTS)})",
            hint="train that student again",
        )
    return sum(file.stat().st_size for file in files) / 1e6


def load_model(source: str, dropout: float | None = None) -> Any:
    """The model of a Hub id, a local folder or a GGUF file, in float32 whatever it was saved in, in main memory.

    ``dropout`` takes the place of the model's own rate, of a decoder-only one that of its attention.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    quiet()
    place = located(source)
    try:
        # a GGUF file takes seconds to be read, and is a decoder's
        is_seq2seq = not is_gguf(source) and AutoConfig.from_pretrained(**place).is_encoder_decoder
        own = low_rank_class(local(source)) if is_seq2seq else None
        kind: Any = own or (AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM)
        changes = (
            {}
            if dropout is None
            else {"dropout_rate" if is_seq2seq else "attention_dropout": dropout}
        )
        # a GGUF file's bar heeds no setting of transformers
        with redirect_stderr(io.StringIO()) if is_gguf(source) else nullcontext():
            model = kind.from_pretrained(**place, dtype=torch.float32, **changes)
    except Exception as error:
        if "attention_dropout" in str(error):
            raise UserError(
                f"student.dropout: {source} has no one rate of that kind",
                hint="leave student.dropout out",
            ) from None
        raise not_loaded("model", source, error) from None
    # not every decoder's configuration has the key: this transformers' Llama has none
    if (
        not is_seq2seq
        and not getattr(model.config, "is_decoder", False)
        and model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    ):
        raise UserError(
            f"{source} is an encoder ({model.config.model_type}): each token sees those after it, so it would read its targets",
            hint="a student is a T5, or a decoder such as Qwen, Llama or SmolLM",
        )
    return _dense(model) if is_gguf(source) else model


def _dense(model: Any) -> Any:
    """A model of a GGUF file's unpacked weights that is like any other: transformers would not save what it unpacked."""
    from transformers.initialization import no_init_weights

    config = copy.deepcopy(model.config)
    del config.quantization_config
    config.name_or_path = ""
    with no_init_weights():
        dense = type(model)(config)
    dense.load_state_dict(model.state_dict())
    dense.tie_weights()  # not done where nothing is initialised
    return dense


def located(source: str) -> dict[str, Any]:
    """Where ``from_pretrained`` finds a Hub id, a local folder or a GGUF file, whose own code is never run.

    Unless it is told so, transformers asks on stdin, where `dsbs predict` has its rows: one that says "y" would be the answer.
    """
    if not is_gguf(source):
        return {"pretrained_model_name_or_path": local(source), "trust_remote_code": False}
    try:
        import gguf
    except ImportError:
        raise UserError(
            "a student from a GGUF file needs the package gguf", hint="pip install 'dsbs[gguf]'"
        ) from None
    del gguf
    file = gguf_file(source)
    return {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "trust_remote_code": False,
    }


def low_rank_class(folder: str) -> Any:
    """The class of a model some of whose matrices are pairs (see ``low_rank``); None for any other."""
    from dsbs.students.low_rank import ranks_of, with_low_rank

    if not ranks_of(folder):
        return None
    from transformers import AutoConfig, MT5ForConditionalGeneration, T5ForConditionalGeneration

    multilingual = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type == "mt5"
    return with_low_rank(
        MT5ForConditionalGeneration if multilingual else T5ForConditionalGeneration
    )


def local(source: str) -> str:
    path = Path(source).expanduser()
    return str(path) if path.is_dir() else source


def not_loaded(what: str, source: str, error: Exception) -> DsbsError:
    said = " ".join(str(error).split())[:240]
    return DsbsError(
        f"the {what} of student {source!r} cannot be loaded ({type(error).__name__}: {said})",
        hint="check student.model and the network, give a local folder, or use student: {init: scratch}",
    )


def start_hash(start: str | None) -> tuple[str, ...]:
    """Of the weights on disk that training starts from; nothing for a Hub id, whose name stands in the recipe."""
    if start and is_gguf(start):
        return (fingerprint(gguf_file(start)),)
    folder = Path(start or "").expanduser()
    if not start or not folder.is_dir():
        return ()
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    ]
    return tuple(
        _file_hash(path, stat.st_mtime_ns, stat.st_size) for path in files for stat in [path.stat()]
    )


@cache
def _file_hash(path: Path, changed_ns: int, size: int) -> str:
    """Of a file as it is: one that was written anew since is read again."""
    del changed_ns, size
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def new_model(section: StudentSection, tokenizer: Any, seed: int, init: str | None = None) -> Any:
    """The model that training starts from: ``init`` or pretrained weights, or random ones that depend on ``seed`` alone."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    start = init or section.source
    if start is not None:
        model = load_model(start, section.dropout)
        if len(tokenizer) > model.config.vocab_size:
            raise UserError(
                f"{start} has {model.config.vocab_size} embeddings for a tokenizer of {len(tokenizer)} pieces",
                hint="its weights and its tokenizer are of two models: save both of one into the folder",
            )
        return model
    quiet()
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
        "dropout_rate": 0.1 if section.dropout is None else section.dropout,
    }
    config = T5Config(**shape | SIZES[section.size])
    torch.manual_seed(seed)
    return T5ForConditionalGeneration(config)


def quiet() -> None:
    """Transformers' own bars and notes do not belong between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def device_name(cpuinfo: Path = CPUINFO) -> str:
    """The name of the device that models run on: the GPU's, or the CPU's."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
