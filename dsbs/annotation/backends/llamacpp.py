"""llama.cpp teacher: a GGUF file behind a server in this process, asked through the OpenAI client."""

from __future__ import annotations

from typing import Any

from dsbs.annotation.backends.openai import OpenAIEndpoint
from dsbs.config import EndpointSection, Recipe
from dsbs.students.backends.llama_server import SLOTS, start_server
from dsbs.students.gguf import fingerprint, gguf_file

CONTEXT_TOKENS = 2048  # of one request, where the recipe does not say


class LlamaCppTeacher:
    def __init__(self, recipe: Recipe) -> None:
        self.max_concurrency = in_flight(recipe)
        self._server: Any = start_server(
            gguf_file(str(recipe.teacher.model), recipe.folder),
            context_tokens=recipe.teacher.context_tokens or CONTEXT_TOKENS,
            slots=self.max_concurrency,
            needed_by="teacher.kind llamacpp",
            hint="check the file and teacher.context_tokens",
            cores=recipe.teacher.threads,
        )
        address = EndpointSection(base_url=f"{self._server.listening_address}/v1")
        self.endpoints = [OpenAIEndpoint(recipe.teacher, address, None, identities(recipe)[0])]

    async def close(self) -> None:
        await self.endpoints[0].close()
        self._server = None


def in_flight(recipe: Recipe) -> int:
    return min(SLOTS, recipe.annotate.concurrency)


def identities(recipe: Recipe) -> list[str]:
    """Not the address: the port differs from run to run, the weights do not."""
    weights = fingerprint(gguf_file(str(recipe.teacher.model), recipe.folder))
    return [f"llamacpp:{weights}#{recipe.teacher.endpoint}"]
