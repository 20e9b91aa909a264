"""ONNX Runtime backend: a T5 encoder and a decoder step with a cache, without torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dsbs.errors import needs_extra
from dsbs.students.backends import GeneratedText, export_error, omp_threads
from dsbs.students.backends.scoring import SCORED_TOGETHER
from dsbs.students.card import Start, StudentCard
from dsbs.students.tokenizer import load_export_tokenizer, without_limit

ENCODER = "encoder.onnx"
DECODER = "decoder.onnx"
CONFIG = "config.json"
_PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")


def onnxruntime() -> Any:
    """The package. Raises UserError where it is not installed."""
    with needs_extra("onnx", "the format onnx"):
        import onnxruntime as runtime
    return runtime


def load_session(file: Path) -> Any:
    """A graph, ready to run. Raises UserError where the package is not installed."""
    runtime = onnxruntime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = omp_threads()
    options.log_severity_level = 3
    available = runtime.get_available_providers()
    providers = [provider for provider in _PROVIDERS if provider in available]
    return runtime.InferenceSession(str(file), options, providers=providers)


class OnnxBackend:
    """A T5. Inputs over the card's ``max_input_tokens`` are truncated."""

    def __init__(self, encoder: Any, decoder: Any, tokenizer: Any, folder: Path) -> None:
        self.model = decoder
        self.tokenizer = tokenizer
        self._encoder = encoder
        self._folder = folder
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        self._end_id = int(config["eos_token_id"])
        self._pad_id = int(config["pad_token_id"])
        self._start_ids: dict[Start, int] = {
            "pad": int(config["decoder_start_token_id"]),
            "eos": self._end_id,
        }
        self._cache_shapes = {
            tensor.name: tensor.shape
            for tensor in decoder.get_inputs()
            if tensor.name.startswith("past")
        }

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> OnnxBackend:
        onnxruntime()
        try:
            encoder, decoder = (load_session(path / name) for name in (ENCODER, DECODER))
            return cls(encoder, decoder, load_export_tokenizer(path, card.max_input_tokens), path)
        except Exception as error:  # both packages raise errors of their compiled parts
            raise export_error(path, error) from None

    def save(self, folder: Path) -> None:
        for name in (ENCODER, DECODER, CONFIG, "tokenizer.json"):
            shutil.copyfile(self._folder / name, folder / name)

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """See ``Backend``."""
        import numpy as np

        feed = self._encode(texts, start)
        rows: list[list[int]] = [[] for _ in texts]
        is_open = np.ones(len(rows), dtype=bool)
        log_probabilities: list[list[float]] = [[] for _ in texts]
        for _ in range(max_new_tokens):
            # scores (B, V), then keys and values (B, H, T, D) of each layer
            scores, *cache = self.model.run(None, feed)
            feed |= dict(zip(self._cache_shapes, cache, strict=True))
            best = scores.argmax(-1)
            open_rows = np.flatnonzero(is_open).tolist()
            if probabilities:
                top = scores.max(-1)
                normalizer = np.exp(scores - top[:, None], dtype=np.float64).sum(-1)
                for row in open_rows:
                    log_probabilities[row].append(-math.log(normalizer[row]))
            for row in open_rows:
                rows[row].append(int(best[row]))
            is_open &= best != self._end_id
            if not is_open.any():
                break
            feed["token"] = np.where(is_open, best, self._pad_id)[:, None]
        decoded = self.tokenizer.decode_batch(rows)
        return [
            GeneratedText(
                text.strip(),
                bool(truncated),
                math.exp(sum(of_tokens)) if probabilities else None,
                tokens=tuple(zip(token_ids, of_tokens, strict=True)) if probabilities else (),
            )
            for text, truncated, token_ids, of_tokens in zip(
                decoded, is_open, rows, log_probabilities, strict=True
            )
        ]

    def score(self, texts: Sequence[str], answers: Sequence[str]) -> list[list[float]]:
        """See ``ScoringBackend``. The inputs are encoded once, and decoded for every answer."""
        import numpy as np

        targets = [encoding.ids for encoding in self._answer_tokenizer.encode_batch(list(answers))]
        scores = np.zeros((len(texts), len(answers)))
        rows_together = max(1, SCORED_TOGETHER // len(answers))
        for first in range(0, len(texts), rows_together):
            rows = slice(first, first + rows_together)
            feed = self._encode(texts[rows], "pad")
            for first_answer in range(0, len(answers), SCORED_TOGETHER):
                columns = slice(first_answer, first_answer + SCORED_TOGETHER)
                scores[rows, columns] = self._score(feed, targets[columns])
        return [list(map(float, row)) for row in scores]

    @cached_property
    def _answer_tokenizer(self) -> Any:
        return without_limit(self.tokenizer)

    def _score(self, feed: dict[str, Any], targets: Sequence[Sequence[int]]) -> Any:
        """Log-probabilities (rows, answers) of answers' ids after the encoded rows of ``feed``."""
        import numpy as np

        rows = len(feed["token"])
        answer_ids = np.full((len(targets), max(map(len, targets))), self._pad_id, dtype=np.int64)
        is_token = np.zeros_like(answer_ids, dtype=bool)
        for index, ids in enumerate(targets):
            answer_ids[index, : len(ids)] = ids
            is_token[index, : len(ids)] = True
        answer_ids = np.tile(answer_ids, (rows, 1))
        is_token = np.tile(is_token, (rows, 1))
        feed = {name: value.repeat(len(targets), axis=0) for name, value in feed.items()}
        totals = np.zeros(len(answer_ids))
        for step in range(answer_ids.shape[1]):
            logits, *cache = self.model.run(None, feed)  # (rows * answers, V)
            feed |= dict(zip(self._cache_shapes, cache, strict=True))
            token = answer_ids[:, step : step + 1]
            top = logits.max(-1)
            normalizer = np.exp(logits - top[:, None], dtype=np.float64).sum(-1)
            chosen = np.take_along_axis(logits, token, axis=-1)[:, 0]
            totals += np.where(is_token[:, step], chosen - top - np.log(normalizer), 0.0)
            feed["token"] = token
        return totals.reshape(rows, len(targets))

    def _encode(self, texts: Sequence[str], start: Start) -> dict[str, Any]:
        """The decoder's inputs for its first step."""
        import numpy as np

        inputs = [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]
        token_ids = np.full((len(inputs), max(map(len, inputs))), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(token_ids)
        for row, row_ids in enumerate(inputs):
            token_ids[row, : len(row_ids)] = row_ids
            mask[row, : len(row_ids)] = 1
        names = [tensor.name for tensor in self._encoder.get_outputs()]
        states = self._encoder.run(None, {"ids": token_ids, "mask": mask})
        feed = dict(zip(names, states, strict=True)) | {"mask": mask}
        for name, (_, heads, _, size) in self._cache_shapes.items():
            feed[name] = np.zeros((len(inputs), heads, 0, size), dtype=np.float32)
        feed["token"] = np.full((len(inputs), 1), self._start_ids[start], dtype=np.int64)
        return feed

    @property
    def parameters(self) -> None:
        """Unknown for this format."""
        return None
