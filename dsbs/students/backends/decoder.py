"""A decoder alone, such as Llama, Qwen or SmolLM, that writes greedily after its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsbs.students.backends import GeneratedText
from dsbs.students.backends.torch_base import Confidence, TorchEngine
from dsbs.students.card import StudentCard
from dsbs.students.formats import ChatFormat
from dsbs.students.targets import Start


class Causal(TorchEngine):
    """Texts whose prompts are longer than the card's ``max_input_tokens`` are cut; the template around them stays whole."""

    def __init__(self, model: Any, tokenizer: Any, card: StudentCard) -> None:
        from transformers import GenerationConfig

        super().__init__(model, tokenizer, card)
        self.wording = ChatFormat(tokenizer, card.template or "plain")
        model.config.pad_token_id = tokenizer.pad_token_id
        # in place of the model's own, which may have a temperature or a penalty of repetitions: a student is greedy
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=self.wording.stops,
            pad_token_id=tokenizer.pad_token_id,
        )

    def write(
        self, texts: Sequence[str], most: int, start: Start = "pad", *, probabilities: bool = False
    ) -> list[GeneratedText]:
        """See ``Engine``; ``start`` is of encoder-decoders, and has no meaning here."""
        import torch

        self.model.eval()
        rows = self.wording.read(texts, self._max_input)
        size = max(map(len, rows))
        # on the left, so that every row's answer begins at the same place; the padding is any token, and masked
        padded = torch.tensor(
            [[self.tokenizer.pad_token_id] * (size - len(ids)) + ids for ids in rows]
        )
        real = torch.tensor([[0] * (size - len(ids)) + [1] * len(ids) for ids in rows])
        confidence = Confidence()
        with torch.inference_mode():
            ids = self.model.generate(
                input_ids=padded.to(self.model.device),
                attention_mask=real.to(
                    self.model.device
                ),  # positions are counted from the first real token
                max_new_tokens=most,
                generation_config=self.model.generation_config,
                num_beams=1,
                do_sample=False,
                logits_processor=[confidence] if probabilities else None,
            )[:, size:]
            ends = torch.isin(
                ids, torch.tensor(self.wording.stops, device=ids.device)
            ).long()  # (B, T)
            own = ends.cumsum(1) - ends == 0  # up to the first end token and with it
            given: Sequence[float | None] = (
                confidence.probabilities(own) if probabilities else [None] * len(texts)
            )
        said = [row[keep] for row, keep in zip(ids, own & (ends == 0), strict=True)]
        decoded = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        return [
            GeneratedText(text.strip(), not ended, one)
            for text, ended, one in zip(decoded, ends.any(1).tolist(), given, strict=True)
        ]
