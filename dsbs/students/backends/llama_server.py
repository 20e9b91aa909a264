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
SLOTS = 4  # requests decoded side by side; more made two cores slower
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


def start_server(
    model: Path,
    *,
    context_tokens: int,
    slots: int,
    needed_by: str,
    hint: str,
    cores: int | None = None,
    full_precision: bool = False,
) -> Any:
    """Start llama.cpp's HTTP server in this process, on a free loopback port.

    ``context_tokens`` is the context of one request; ``slots`` requests are decoded side by side,
    with ``cores`` threads (None: the cores of this process). ``full_precision`` keeps the cache in
    float32 and turns flash attention off, for scores that must be reproduced. ``needed_by`` begins
    the message when the package is missing.

    Raises UserError without xllamacpp, DsbsError where the server does not start.
    """
    runtime = xllamacpp(needed_by)
    params = runtime.CommonParams()
    params.model.path = str(model)
    params.port = 0
    params.n_parallel = slots
    params.n_ctx = context_tokens * slots
    params.cpuparams.n_threads = cores or len(os.sched_getaffinity(0))
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    params.cpuparams.poll = 0  # spinning threads starve whatever else the machine runs
    params.cpuparams_batch.poll = 0
    if full_precision:
        params.cache_type_k = runtime.ggml_type.GGML_TYPE_F32
        params.cache_type_v = runtime.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.offline = True
    params.ui = False
    params.verbosity = -1
    try:
        return runtime.Server(params)
    except Exception as error:  # the binding raises bare RuntimeError for every failure
        raise DsbsError(f"llama.cpp cannot serve {model} ({error})", hint=hint) from None


class LlamaCpp:
    """Prompts go there as ids, so that special tokens in a text stay its characters; longer ones are cut in their text."""

    def __init__(
        self, server: Any, prompts: StoredPrompts, folder: Path, card: StudentCard
    ) -> None:
        self.model, self.tokenizer, self._folder = server, prompts.tokenizer, folder
        self._prompts, self._max_input = prompts, card.max_input_tokens

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> LlamaCpp:
        answer_tokens = max(card.max_target_tokens, _ANSWER)
        server = start_server(
            path / MODEL,
            context_tokens=card.max_input_tokens + answer_tokens,
            slots=SLOTS,
            needed_by="the format gguf",
            hint="export the student again",
            cores=threads() or None,
            full_precision=True,  # half precision would move the scores
        )
        try:
            return cls(server, StoredPrompts(path), path, card)
        except Exception as error:  # tokenizers raises bare Exception
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
