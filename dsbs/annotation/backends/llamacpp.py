"""A GGUF file behind an in-process llama.cpp server on loopback, spoken to through the very same client."""

from __future__ import annotations

import os
from typing import Any

from dsbs.annotation.backends.openai import OpenAIEndpoint
from dsbs.config import EndpointSection, Recipe
from dsbs.errors import DsbsError, UserError
from dsbs.students.gguf import fingerprint, gguf_file

CONTEXT_TOKENS = 2048  # of one request, where the recipe does not say
SLOTS = 4  # requests decoded side by side; more made two cores slower


class LlamaCppTeacher:
    def __init__(self, recipe: Recipe) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise UserError(
                "teacher.kind llamacpp needs the package xllamacpp",
                hint="pip install 'dsbs[local]'",
            ) from None
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
        params.cpuparams.poll = params.cpuparams_batch.poll = (
            0  # spinning threads starve whatever else the machine runs
        )
        params.offline = True
        params.ui = False
        params.verbosity = -1
        try:
            self._server: Any = xllamacpp.Server(params)
        except Exception as error:  # the binding raises bare RuntimeError for every failure
            raise DsbsError(
                f"llama.cpp cannot serve {file} ({error})",
                hint="check the file and teacher.context_tokens",
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
    return [
        f"llamacpp:{fingerprint(gguf_file(str(recipe.teacher.model), recipe.folder))}#{recipe.teacher.endpoint}"
    ]
