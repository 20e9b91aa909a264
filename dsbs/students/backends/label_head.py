"""Label-head backend: chooses a label in one pass, and writes rationales on request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsbs.students.backends import GeneratedText
from dsbs.students.backends.scoring import padded
from dsbs.students.backends.transformers import (
    DecoderBackend,
    EncoderDecoderBackend,
    TransformersBackend,
)
from dsbs.students.card import Start, StudentCard
from dsbs.students.formats import input_format_of
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import device, load_model


class LabelHeadBackend(TransformersBackend):
    """A student with a label head. See ``Backend``."""

    def __init__(self, model: Any, tokenizer: Any, card: StudentCard) -> None:
        super().__init__(model, tokenizer, card)
        self._card = card
        self.input_format = input_format_of(tokenizer, card.kind, card.template)

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> LabelHeadBackend:
        model = load_model(str(path), labels=len(card.classes)).to(device())
        return cls(model, load_tokenizer(str(path)), card)

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """See ``Backend``: labels, or rationales where ``start`` is "eos"."""
        import torch

        if start == "eos":
            return self._write(texts, max_new_tokens)
        self.model.eval()
        with torch.inference_mode():
            distributions = self.model(**self._encode(texts)).float().softmax(-1)
        chosen = distributions.argmax(-1).tolist()
        return [
            GeneratedText(
                text=self._card.classes[index],
                truncated=False,
                probability=distribution[index],
                distribution=tuple(distribution),
            )
            for index, distribution in zip(chosen, distributions.tolist(), strict=True)
        ]

    def _write(self, texts: Sequence[str], max_new_tokens: int) -> list[GeneratedText]:
        """Rationales, by greedy decoding."""
        if self._card.kind == "seq2seq":
            writer = EncoderDecoderBackend(self.model.body, self.tokenizer, self._card)
            return writer.generate(texts, max_new_tokens)
        if self._card.kind == "causal":
            decoder = DecoderBackend(self.model.body, self.tokenizer, self._card)
            return decoder.generate(texts, max_new_tokens)
        self.model.eval()
        rows = self.model.write_rationales(**self._encode(texts), max_new_tokens=max_new_tokens)
        end = self.model.rationale_decoder.config.eos_token_id
        decoded = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        return [
            GeneratedText(text.strip(), end not in row, None)
            for text, row in zip(decoded, rows, strict=True)
        ]

    def _encode(self, texts: Sequence[str]) -> Any:
        """input_ids and attention_mask, (B, S) each, padded on the right."""
        rows = self.input_format.read(texts, self._max_input_tokens)
        input_ids, is_token = padded(rows, self.model.device, self.tokenizer.pad_token_id)
        return {"input_ids": input_ids, "attention_mask": is_token.long()}
