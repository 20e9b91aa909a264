"""llama.cpp backend: its HTTP server in this process, for GGUF students and local teachers."""

from __future__ import annotations

import json
import math
import shutil
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, needs_extra
from dsbs.students.backends import GeneratedText, export_error, omp_threads
from dsbs.students.card import Start, StudentCard
from dsbs.students.formats import PROMPT_FORMAT_FILE, ExportedPrompts
from dsbs.students.weights import usable_cores

MODEL = "model.gguf"
SLOTS = 4  # requests decoded side by side; 8, 16 and 32 are no faster on two cores
_MIN_ANSWER_TOKENS = 256


def xllamacpp(feature: str) -> Any:
    """The package, which ``feature`` needs. Raises UserError where it is not installed."""
    with needs_extra("local", feature):
        import xllamacpp as runtime
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
    saved_slots: str = "",
) -> Any:
    """Start llama.cpp's HTTP server in this process, on a free loopback port.

    ``context_tokens`` is the context of one request; ``slots`` requests are decoded side by side,
    with ``cores`` threads (None: the cores of this process). ``full_precision`` keeps the cache in
    float32 and turns flash attention off, for scores that must be reproduced. ``saved_slots`` is
    the folder where slots can be saved. ``needed_by`` begins the message when the package is
    missing.

    Raises UserError without xllamacpp, DsbsError where the server does not start.
    """
    runtime = xllamacpp(needed_by)
    params = runtime.CommonParams()
    params.model.path = str(model)
    params.port = 0
    params.n_parallel = slots
    params.n_ctx = context_tokens * slots
    params.cpuparams.n_threads = cores or usable_cores()
    params.cpuparams_batch.n_threads = params.cpuparams.n_threads
    params.cpuparams.poll = 0  # spinning threads starve whatever else the machine runs
    params.cpuparams_batch.poll = 0
    if full_precision:
        params.cache_type_k = runtime.ggml_type.GGML_TYPE_F32
        params.cache_type_v = runtime.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = runtime.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.slot_save_path = f"{saved_slots}/" if saved_slots else ""
    params.offline = True
    params.ui = False
    params.verbosity = -1
    try:
        return runtime.Server(params)
    except Exception as error:  # the binding raises bare RuntimeError for every failure
        raise DsbsError(f"llama.cpp cannot serve {model} ({error})", hint=hint) from None


class LlamaServerBackend:
    """A decoder-only student in a GGUF file.

    Prompts are sent as ids, so that special tokens in a text stay text. Those over the card's
    ``max_input_tokens`` are truncated in their text.
    """

    def __init__(
        self, server: Any, prompts: ExportedPrompts, folder: Path, card: StudentCard
    ) -> None:
        self.model = server
        self.tokenizer = prompts.tokenizer
        self._folder = folder
        self._prompts = prompts
        self._max_input_tokens = card.max_input_tokens

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> LlamaServerBackend:
        answer_tokens = max(card.max_target_tokens, _MIN_ANSWER_TOKENS)
        server = start_server(
            path / MODEL,
            context_tokens=card.max_input_tokens + answer_tokens,
            slots=SLOTS,
            needed_by="the format gguf",
            hint="export the student again",
            cores=omp_threads() or None,
            full_precision=True,  # half precision would change the scores
        )
        try:
            return cls(server, ExportedPrompts(path), path, card)
        except Exception as error:  # tokenizers raises bare Exception
            raise export_error(path, error) from None

    def save(self, folder: Path) -> None:
        for name in (MODEL, "tokenizer.json", PROMPT_FORMAT_FILE):
            shutil.copyfile(self._folder / name, folder / name)

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        _start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """See ``Backend``. Raises DsbsError where the server refuses."""
        response = self.model.handle_completions(
            {
                "prompt": self._prompts.read(texts, self._max_input_tokens),
                "max_tokens": max_new_tokens,
                "temperature": 0,
                "samplers": ["temperature"],  # greedy, without a repetition penalty
                "logprobs": 1,  # for the token ids, which are decoded as in every other backend
                "cache_prompt": False,  # otherwise scores depend on earlier requests
            }
        )
        if "choices" not in response:
            message = response.get("error", {}).get("message", response)
            raise DsbsError(
                f"llama.cpp refused the request ({message})", hint="export the student again"
            )
        choices = sorted(response["choices"], key=lambda choice: choice["index"])
        rows = [(choice.get("logprobs") or {}).get("content", []) for choice in choices]
        texts_out = self._prompts.decode([[token["id"] for token in row] for row in rows])
        return [
            GeneratedText(
                text,
                choice["finish_reason"] == "length",
                _probability(row) if probabilities else None,
                tokens=_tokens(row) if probabilities else (),
            )
            for text, choice, row in zip(texts_out, choices, rows, strict=True)
        ]

    def tokenize(self, text: str) -> list[int]:
        """A text's ids by the tokenizer in the GGUF file, which recognizes special tokens.

        Sends one request to the server, on loopback.
        """
        request = urllib.request.Request(
            f"{self.model.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": False, "parse_special": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
            body: Mapping[str, list[int]] = json.loads(response.read())
        return body["tokens"]

    @property
    def parameters(self) -> None:
        """Unknown for this format."""
        return None


def _probability(tokens: Sequence[Mapping[str, float]]) -> float:
    return min(1.0, math.exp(sum(token["logprob"] for token in tokens)))


def _tokens(tokens: Sequence[Mapping[str, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((int(token["id"]), float(token["logprob"])) for token in tokens)
