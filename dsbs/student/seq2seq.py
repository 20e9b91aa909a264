"""A T5, or another encoder-decoder of transformers, that writes greedily."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsbs.student.card import StudentCard
from dsbs.student.engine import Said
from dsbs.student.targets import Start, start_token
from dsbs.student.tokenizer import load_tokenizer
from dsbs.student.weights import load_model


class Seq2Seq:
    """Inputs longer than the card's ``max_input_tokens`` are cut."""

    def __init__(self, model: Any, tokenizer: Any, card: StudentCard) -> None:
        self.model, self.tokenizer, self._max_input = model, tokenizer, card.max_input_tokens

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> Seq2Seq:
        import torch

        model = load_model(str(path))
        return cls(model.to("cuda") if torch.cuda.is_available() else model, load_tokenizer(str(path)), card)

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def write(self, texts: Sequence[str], most: int, start: Start = "pad", *, probabilities: bool = False) -> list[Said]:
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
            ends = (ids[:, 1:] == self.model.config.eos_token_id).long()  # (B, T) without the token it starts with
            whole = ends.any(1).tolist()
            given: Sequence[float | None] = [None] * len(texts)
            if probabilities:
                given = confidence.probabilities(ends.cumsum(1) - ends == 0)
        decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [Said(text.strip(), not ended, one) for text, ended, one in zip(decoded, whole, given, strict=True)]

    def search(self, texts: Sequence[str], most: int, start: Start, beams: int) -> list[Said]:
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
        return [Said(text.strip(), not ended, one) for text, ended, one in zip(decoded, whole, likely, strict=True)]

    def _encoded(self, texts: Sequence[str]) -> Any:
        """Ids and mask, (B, T) each."""
        return self.tokenizer(list(texts), padding=True, truncation=True, max_length=self._max_input, return_tensors="pt").to(
            self.model.device
        )

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


class Confidence:
    """Sees each decoding step's scores go by and keeps the log-probability of the likeliest token, which greedy decoding takes.

    Keeping the scores themselves would take batch × tokens × vocabulary floats; forced decoding afterwards, a second pass.
    """

    def __init__(self) -> None:
        self._steps: list[Any] = []

    def __call__(self, ids: Any, scores: Any) -> Any:
        """ids (B, T), scores (B, V) in nats up to a constant -> the same scores. A step adds (B,) log-probabilities."""
        del ids
        self._steps.append(scores.amax(-1) - scores.logsumexp(-1))
        return scores

    def probabilities(self, open_: Any) -> list[float]:
        """open_ (B, T), true where a row's own tokens are -> their joint probability for each row, in [0, 1]."""
        import torch

        logs = torch.stack(self._steps[: open_.shape[1]], 1).double()  # on some devices decoding takes a step too many
        total = torch.where(open_, logs, 0.0).sum(1).clamp(max=0.0)
        return [float(one) for one in total.exp()]
