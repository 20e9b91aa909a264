"""A T5 in onnxruntime: an encoder, and a decoder that takes one step over what it has kept. Needs no torch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError
from dsbs.students.backends import GeneratedText, threads
from dsbs.students.card import StudentCard
from dsbs.students.targets import Start
from dsbs.students.tokenizer import read_pieces

ENCODER, DECODER, CONFIG = "encoder.onnx", "decoder.onnx", "config.json"


def onnxruntime() -> Any:
    """The package. Raises UserError where it is missing."""
    try:
        import onnxruntime as runtime
    except ImportError:
        raise UserError(
            "the format onnx needs the package onnxruntime", hint="pip install 'dsbs[onnx]'"
        ) from None
    return runtime


class Onnx:
    """Inputs longer than the card's ``max_input_tokens`` are cut."""

    def __init__(self, encoder: Any, decoder: Any, tokenizer: Any, folder: Path) -> None:
        self.model, self._encoder, self.tokenizer, self._folder = (
            decoder,
            encoder,
            tokenizer,
            folder,
        )
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        self._end, self._pad = int(config["eos_token_id"]), int(config["pad_token_id"])
        self._starts: dict[Start, int] = {
            "pad": int(config["decoder_start_token_id"]),
            "eos": self._end,
        }
        self._past = {
            one.name: one.shape for one in decoder.get_inputs() if one.name.startswith("past")
        }

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> Onnx:
        runtime = onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads()
        options.log_severity_level = 3
        wanted = [
            one
            for one in ("CUDAExecutionProvider", "CPUExecutionProvider")
            if one in runtime.get_available_providers()
        ]
        try:
            encoder, decoder = (
                runtime.InferenceSession(str(path / name), options, providers=wanted)
                for name in (ENCODER, DECODER)
            )
            return cls(encoder, decoder, read_pieces(path, card.max_input_tokens), path)
        except Exception as error:  # both packages raise what their compiled parts say
            raise DsbsError(
                f"the export in {path} cannot be loaded ({error})", hint="export the student again"
            ) from None

    def save(self, folder: Path) -> None:
        for name in (ENCODER, DECODER, CONFIG, "tokenizer.json"):
            shutil.copyfile(self._folder / name, folder / name)

    def write(
        self, texts: Sequence[str], most: int, start: Start = "pad", *, probabilities: bool = False
    ) -> list[GeneratedText]:
        """See ``Engine``."""
        import numpy as np

        inputs = [one.ids for one in self.tokenizer.encode_batch(list(texts))]
        ids = np.full((len(inputs), max(map(len, inputs))), self._pad, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, found in enumerate(inputs):
            ids[row, : len(found)], mask[row, : len(found)] = found, 1
        names = [one.name for one in self._encoder.get_outputs()]
        feed = dict(
            zip(names, self._encoder.run(None, {"ids": ids, "mask": mask}), strict=True)
        ) | {"mask": mask}
        for name, (_, heads, _, size) in self._past.items():
            feed[name] = np.zeros((len(inputs), heads, 0, size), dtype=np.float32)
        feed["token"] = np.full((len(inputs), 1), self._starts[start], dtype=np.int64)
        written: list[list[int]] = [[] for _ in inputs]
        open_, likely = np.ones(len(inputs), dtype=bool), np.zeros(len(inputs))
        for _ in range(most):
            scores, *kept = self.model.run(
                None, feed
            )  # (B, V), then (B, H, T, D) for each layer's keys and values
            feed |= dict(zip(self._past, kept, strict=True))
            best = scores.argmax(-1)
            if probabilities:
                top = scores.max(-1)
                likely -= np.where(
                    open_, np.log(np.exp(scores - top[:, None], dtype=np.float64).sum(-1)), 0.0
                )
            for row in np.flatnonzero(open_).tolist():
                written[row].append(int(best[row]))
            open_ &= best != self._end
            if not open_.any():
                break
            feed["token"] = np.where(open_, best, self._pad)[:, None]
        decoded = self.tokenizer.decode_batch(written)
        return [
            GeneratedText(text.strip(), bool(still), math.exp(one) if probabilities else None)
            for text, still, one in zip(decoded, open_, likely, strict=True)
        ]

    @property
    def parameters(self) -> None:
        """The format does not tell."""
        return None
