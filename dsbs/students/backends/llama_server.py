"""A decoder alone in llama.cpp's server inside this process, which needs neither torch nor transformers."""

from __future__ import annotations

import json
import math
import os
import shutil
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError
from dsbs.students.backends import GeneratedText, threads
from dsbs.students.card import StudentCard
from dsbs.students.instructions import WORDING, StoredPrompts
from dsbs.students.targets import Start

MODEL = "model.gguf"
_SLOTS = 4  # requests decoded side by side; more made two cores slower
_ANSWER = 256  # tokens that an answer has room for at least


def xllamacpp(what: str) -> Any:
    """The package, for ``what`` needs it. Raises UserError where it is missing."""
    try:
        import xllamacpp as runtime
    except ImportError:
        raise UserError(
            f"{what} needs the package xllamacpp", hint="pip install 'dsbs[local]'"
        ) from None
    return runtime


class LlamaCpp:
    """Prompts go there as ids, so that special tokens in a text stay its characters; longer ones are cut in their text."""

    def __init__(
        self, server: Any, prompts: StoredPrompts, folder: Path, card: StudentCard
    ) -> None:
        self.model, self.tokenizer, self._folder = server, prompts.tokenizer, folder
        self._prompts, self._max_input = prompts, card.max_input_tokens

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> LlamaCpp:
        runtime = xllamacpp("the format gguf")
        params = runtime.CommonParams()
        params.model.path = str(path / MODEL)
        params.port = 0
        params.n_parallel = _SLOTS
        params.n_ctx = (card.max_input_tokens + max(card.max_target_tokens, _ANSWER)) * _SLOTS
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads() or len(
            os.sched_getaffinity(0)
        )
        params.cpuparams.poll = params.cpuparams_batch.poll = (
            0  # spinning threads starve whatever else the machine runs
        )
        params.cache_type_k = params.cache_type_v = (
            runtime.ggml_type.GGML_TYPE_F32
        )  # half of it would move the scores
        params.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.offline = True
        params.ui = False
        params.verbosity = -1
        try:
            return cls(runtime.Server(params), StoredPrompts(path), path, card)
        except Exception as error:  # the binding raises bare RuntimeError for every failure
            raise DsbsError(
                f"the export in {path} cannot be loaded ({error})", hint="export the student again"
            ) from None

    def save(self, folder: Path) -> None:
        for name in (MODEL, "tokenizer.json", WORDING):
            shutil.copyfile(self._folder / name, folder / name)

    def write(
        self, texts: Sequence[str], most: int, start: Start = "pad", *, probabilities: bool = False
    ) -> list[GeneratedText]:
        """See ``Engine``; ``start`` is of encoder-decoders, and means nothing here.

        Raises DsbsError where the server refuses.
        """
        found = self.model.handle_completions(
            {
                "prompt": self._prompts.read(texts, self._max_input),
                "max_tokens": most,
                "temperature": 0,
                "samplers": [
                    "temperature"
                ],  # 0: the likeliest token; and nothing that holds back what was said before
                "logprobs": 1,  # for the ids, which are decoded as in every other engine
                "cache_prompt": False,  # else the numbers depend on what was asked before
            }
        )
        if "choices" not in found:
            raise DsbsError(
                f"llama.cpp refuses ({found.get('error', {}).get('message', found)})",
                hint="export the student again",
            )
        said = sorted(found["choices"], key=lambda choice: choice["index"])
        rows = [(choice.get("logprobs") or {}).get("content", []) for choice in said]
        decoded = self._prompts.decode([[token["id"] for token in row] for row in rows])
        return [
            GeneratedText(
                text,
                choice["finish_reason"] == "length",
                min(1.0, math.exp(sum(token["logprob"] for token in row)))
                if probabilities
                else None,
            )
            for text, choice, row in zip(decoded, said, rows, strict=True)
        ]

    def pieces(self, text: str) -> list[int]:
        """A text's ids by the tokenizer in the GGUF file, whose special tokens it sees. One request on loopback."""
        request = urllib.request.Request(
            f"{self.model.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": False, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
            found: Mapping[str, list[int]] = json.loads(answer.read())
        return found["tokens"]

    @property
    def parameters(self) -> None:
        """The format does not tell."""
        return None
