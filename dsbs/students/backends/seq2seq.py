"""A T5, or another encoder-decoder of transformers, that writes greedily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsbs.students.backends import GeneratedText
from dsbs.students.backends.torch_base import Confidence, TorchEngine
from dsbs.students.targets import Start, start_token


class Seq2Seq(TorchEngine):
    """See ``Engine`` and ``Searcher``."""

    def write(
        self, texts: Sequence[str], most: int, start: Start = "pad", *, probabilities: bool = False
    ) -> list[GeneratedText]:
        """See ``Engine``; probabilities cost about a hundredth of the decoding's time more."""
        import torch

        self.model.eval()
        batch = self._encoded(texts)
        confidence = Confidence()
        with torch.inference_mode():
            ids = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=most,
                decoder_start_token_id=start_token(self.model.config, start),
                num_beams=1,
                do_sample=False,
                logits_processor=[confidence] if probabilities else None,
            )
            ends = (
                ids[:, 1:] == self.model.config.eos_token_id
            ).long()  # (B, T) without the token it starts with
            whole = ends.any(1).tolist()
            given: Sequence[float | None] = [None] * len(texts)
            if probabilities:
                given = confidence.probabilities(ends.cumsum(1) - ends == 0)
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            GeneratedText(text.strip(), not ended, one)
            for text, ended, one in zip(decoded, whole, given, strict=True)
        ]

    def search(
        self, texts: Sequence[str], most: int, start: Start, beams: int
    ) -> list[GeneratedText]:
        """See ``Searcher``."""
        import torch

        self.model.eval()
        batch = self._encoded(texts)
        with torch.inference_mode():
            found = self.model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=most,
                decoder_start_token_id=start_token(self.model.config, start),
                num_beams=beams,
                do_sample=False,
                length_penalty=0.0,  # else the score is a mean over the tokens
                output_scores=True,
                return_dict_in_generate=True,
            )
        ids = found.sequences
        whole = (ids[:, 1:] == self.model.config.eos_token_id).any(1).tolist()
        likely = found.sequences_scores.double().clamp(max=0.0).exp().tolist()
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [
            GeneratedText(text.strip(), not ended, one)
            for text, ended, one in zip(decoded, whole, likely, strict=True)
        ]

    def _encoded(self, texts: Sequence[str]) -> Any:
        """Ids and mask, (B, T) each."""
        return self.tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._max_input,
            return_tensors="pt",
        ).to(self.model.device)
