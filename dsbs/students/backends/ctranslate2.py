"""CTranslate2 backends: T5 and decoder-only students, without torch or transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dsbs.errors import needs_extra
from dsbs.students.backends import GeneratedText, export_error
from dsbs.students.card import Start, StudentCard
from dsbs.students.formats import PROMPT_FORMAT_FILE, ExportedPrompts
from dsbs.students.tokenizer import load_export_tokenizer

# Rows decoded together on a CPU: on one thread, 64 short rows took 57 ms at once and 28 to 42 ms in
# batches of 16.
_CPU_BATCH_SIZE = 16

# The converter's loader by a configuration's model_type; tests compare each with transformers.
DECODER_LOADERS = {
    "gpt2": "GPT2Loader",
    "llama": "LlamaLoader",
    "qwen2": "Qwen2Loader",
    "qwen3": "Qwen3Loader",
}


def ctranslate2() -> Any:
    """The package. Raises UserError where it is not installed."""
    with needs_extra("ct2", "the format ct2"):
        import ctranslate2 as runtime
    return runtime


class _CTranslate2Backend:
    files: tuple[str, ...]

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._folder = folder
        self._pieces = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]

    def save(self, folder: Path) -> None:
        for name in self.files:
            shutil.copyfile(self._folder / name, folder / name)

    def _tokens(self, token_ids: Iterable[int]) -> list[str]:
        return [self._pieces[index] for index in token_ids]

    @property
    def parameters(self) -> None:
        """Unknown for this format."""
        return None

    @property
    def _batch_size(self) -> int:
        """Batches are made by length, and the results put back into order; 0: no limit."""
        return _CPU_BATCH_SIZE if self.model.device == "cpu" else 0


class CTranslate2Backend(_CTranslate2Backend):
    """A T5. Inputs over the card's ``max_input_tokens`` are truncated."""

    files = ("model.bin", "config.json", "shared_vocabulary.json", "tokenizer.json")

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        super().__init__(model, tokenizer, folder)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._start_tokens: dict[Start, str] = {
            "pad": config["bos_token"],
            "eos": config["eos_token"],
        }
        self._end_id = tokenizer.token_to_id(config["eos_token"])

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> CTranslate2Backend:
        runtime = ctranslate2()
        try:
            tokenizer = load_export_tokenizer(path, card.max_input_tokens)
            model = runtime.Translator(str(path), device=runtime_device(runtime))
            return cls(model, tokenizer, path)
        except Exception as error:  # both packages raise errors of their compiled parts
            raise export_error(path, error) from None

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """See ``Backend``."""
        return self._decode(texts, max_new_tokens, start, 1, probabilities)

    def beam_search(
        self, texts: Sequence[str], max_new_tokens: int, start: Start, beams: int
    ) -> list[GeneratedText]:
        """See ``BeamSearchBackend``."""
        return self._decode(texts, max_new_tokens, start, beams, True)

    def _decode(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        start: Start,
        beams: int,
        probabilities: bool,
    ) -> list[GeneratedText]:
        encodings = self.tokenizer.encode_batch(list(texts))
        results = self.model.translate_batch(
            [self._tokens(encoding.ids) for encoding in encodings],
            target_prefix=[[self._start_tokens[start]]] * len(texts),
            max_batch_size=self._batch_size,
            beam_size=beams,
            max_decoding_length=max_new_tokens,
            # By default the end token cannot come first, which makes all others likelier.
            min_decoding_length=0,
            max_input_length=0,  # the tokenizer has truncated
            length_penalty=0,  # otherwise the score is a mean over the tokens
            return_scores=probabilities,
            return_end_token=True,
        )
        rows = []
        for result in results:
            token_ids = map(self.tokenizer.token_to_id, result.hypotheses[0])
            rows.append([index for index in token_ids if index is not None])
        decoded = self.tokenizer.decode_batch(rows)
        return [
            GeneratedText(
                text.strip(),
                self._end_id not in token_ids[-1:],
                _probability(result.scores) if probabilities else None,
            )
            for text, token_ids, result in zip(decoded, rows, results, strict=True)
        ]


class CTranslate2DecoderBackend(_CTranslate2Backend):
    """A decoder-only student.

    Prompts over the card's ``max_input_tokens`` are truncated in their text.
    """

    files = ("model.bin", "config.json", "vocabulary.json", "tokenizer.json", PROMPT_FORMAT_FILE)

    def __init__(
        self, model: Any, prompts: ExportedPrompts, folder: Path, card: StudentCard
    ) -> None:
        super().__init__(model, prompts.tokenizer, folder)
        self._prompts = prompts
        self._max_input_tokens = card.max_input_tokens

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> CTranslate2DecoderBackend:
        runtime = ctranslate2()
        try:
            model = runtime.Generator(str(path), device=runtime_device(runtime))
            return cls(model, ExportedPrompts(path), path, card)
        except Exception as error:  # both packages raise errors of their compiled parts
            raise export_error(path, error) from None

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        _start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """See ``Backend``."""
        prompts = self._prompts.read(texts, self._max_input_tokens)
        results = self.model.generate_batch(
            [self._tokens(prompt) for prompt in prompts],
            max_batch_size=self._batch_size,
            beam_size=1,
            max_length=max_new_tokens,
            min_length=0,
            length_penalty=0,  # otherwise the score is a mean over the tokens
            include_prompt_in_result=False,
            end_token=self._prompts.stops,
            return_end_token=True,
            return_scores=probabilities,
        )
        rows = [result.sequences_ids[0] for result in results]
        return [
            GeneratedText(
                text,
                not token_ids or token_ids[-1] not in self._prompts.stops,
                _probability(result.scores) if probabilities else None,
            )
            for text, token_ids, result in zip(
                self._prompts.decode(rows), rows, results, strict=True
            )
        ]

    def score(self, texts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """See ``ScoringBackend``."""
        prompts = self._prompts.read(texts, self._max_input_tokens)
        targets = self._prompts.write(answers)
        results = self.model.score_batch(
            [self._tokens([*prompt, *target]) for prompt in prompts for target in targets],
            max_batch_size=self._batch_size,
            max_input_length=0,
        )
        lengths = [len(target) for _ in prompts for target in targets]
        scores = [
            math.fsum(result.log_probs[-length:])
            for result, length in zip(results, lengths, strict=True)
        ]
        return _by_text(scores, len(answers))


def _by_text(scores: Sequence[float], answers: int) -> list[list[float]]:
    """One list for each text, of ``answers`` scores."""
    return [list(scores[first : first + answers]) for first in range(0, len(scores), answers)]


def runtime_device(runtime: Any) -> str:
    return "cuda" if runtime.get_cuda_device_count() else "cpu"


def _probability(scores: Sequence[float]) -> float:
    return min(1.0, math.exp(scores[0]))
