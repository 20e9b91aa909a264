"""llama.cpp teacher: a GGUF file served in this process and called by the OpenAI client."""

from __future__ import annotations

import asyncio
import json
import tempfile
from dataclasses import replace
from typing import Any

from dsbs.annotation.backends import Reply, Request, Teacher, TransientError
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
        slots = self.max_in_flight(recipe)
        self._saved_slots = tempfile.TemporaryDirectory(prefix="dsbs-slots-")
        self._server: Any = start_server(
            gguf_file(str(recipe.teacher.model), recipe.folder),
            context_tokens=recipe.teacher.context_tokens or self.default_context_tokens,
            slots=slots,
            needed_by="teacher.kind llamacpp",
            hint="check the file and teacher.context_tokens",
            cores=recipe.teacher.threads,
            saved_slots=self._saved_slots.name,
        )
        address = EndpointSection(base_url=f"{self._server.listening_address}/v1")
        identity = self.identities(recipe)[0]
        self._endpoint = LlamaCppEndpoint(recipe.teacher, address, None, identity)
        self._endpoint.slots = slots
        self.endpoints = [self._endpoint]

    async def close(self) -> None:
        await self._endpoint.close()
        self._server = None
        self._saved_slots.cleanup()

    @classmethod
    def max_in_flight(cls, recipe: Recipe) -> int:
        return min(SLOTS, recipe.annotate.concurrency)

    @classmethod
    def identities(cls, recipe: Recipe) -> list[str]:
        """Identify the weights: the port differs from run to run."""
        weights = gguf_fingerprint(gguf_file(str(recipe.teacher.model), recipe.folder))
        return [f"llamacpp:{weights}#{recipe.teacher.endpoint}"]


class LlamaCppEndpoint(OpenAIEndpoint):
    """A server whose slots share the beginning of the prompt, instruction and exemplars.

    A slot reuses the tokens that its last prompt has in common with the next one. The first request
    is answered alone and its slot copied to the others, so that they do not compute the common
    tokens again. Slots are saved and restored by
    ``POST /slots/{id}?action=save`` (https://github.com/ggml-org/llama.cpp/tree/master/tools/server).
    """

    slots = 1
    _is_first = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._first_request = asyncio.Lock()

    async def complete(self, request: Request) -> Reply:
        """See ``Endpoint``."""
        async with self._first_request:
            if self._is_first and self.slots > 1:
                self._is_first = False
                reply = await super().complete(replace(request, body=request.body | {"id_slot": 0}))
                await self._copy_first_slot()
                return reply
        return await super().complete(request)

    async def _copy_first_slot(self) -> None:
        """Copy slot 0 to the others. A failure costs only time: they compute their own."""
        assert self._session is not None
        server = self.name.removesuffix("/v1")
        body = json.dumps({"filename": "first"}).encode()
        actions = ["0?action=save", *(f"{slot}?action=restore" for slot in range(1, self.slots))]
        for action in actions:
            try:
                status, _, _ = await self._exchange(
                    self._session.post,
                    f"{server}/slots/{action}",
                    self._teacher.timeout_s,
                    data=body,
                )
            except TransientError:
                return
            if status != 200:
                return
