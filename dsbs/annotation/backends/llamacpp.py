"""llama.cpp teacher: a GGUF file served in this process and called by the OpenAI client."""

from __future__ import annotations

from typing import Any

from dsbs.annotation.backends import Teacher
from dsbs.annotation.backends.adaptation import DEFAULT_REPLY_TOKENS
from dsbs.annotation.backends.openai import OpenAIEndpoint
from dsbs.config import EndpointSection, Recipe
from dsbs.students.backends.llama_server import SLOTS, start_server
from dsbs.students.weights import gguf_file, gguf_fingerprint


class LlamaCppTeacher(Teacher):
    """Raises UserError without the package or the file, DsbsError for a file it cannot serve."""

    title = "llama.cpp"
    extra = "local"
    default_context_tokens = 2048
    default_reply_tokens = DEFAULT_REPLY_TOKENS

    def __init__(self, recipe: Recipe) -> None:
        self._server: Any = start_server(
            gguf_file(str(recipe.teacher.model), recipe.folder),
            context_tokens=recipe.teacher.context_tokens or self.default_context_tokens,
            slots=self.max_in_flight(recipe),
            needed_by="teacher.kind llamacpp",
            hint="check the file and teacher.context_tokens",
            cores=recipe.teacher.threads,
        )
        address = EndpointSection(base_url=f"{self._server.listening_address}/v1")
        identity = self.identities(recipe)[0]
        self._endpoint = OpenAIEndpoint(recipe.teacher, address, None, identity)
        self.endpoints = [self._endpoint]

    async def close(self) -> None:
        await self._endpoint.close()
        self._server = None

    @classmethod
    def max_in_flight(cls, recipe: Recipe) -> int:
        return min(SLOTS, recipe.annotate.concurrency)

    @classmethod
    def identities(cls, recipe: Recipe) -> list[str]:
        """Identify the weights: the port differs from run to run."""
        weights = gguf_fingerprint(gguf_file(str(recipe.teacher.model), recipe.folder))
        return [f"llamacpp:{weights}#{recipe.teacher.endpoint}"]
