"""What the engines of torch models have in common: how they are loaded, saved, counted, and how sure they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsbs.students.card import StudentCard
from dsbs.students.tokenizer import load_tokenizer
from dsbs.students.weights import load_model


class TorchEngine:
    """Of a model of transformers, its tokenizer and the card: inputs longer than ``max_input_tokens`` are cut."""

    def __init__(self, model: Any, tokenizer: Any, card: StudentCard) -> None:
        self.model, self.tokenizer, self._max_input = model, tokenizer, card.max_input_tokens

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> TorchEngine:
        import torch

        model = load_model(str(path))
        return cls(
            model.to("cuda") if torch.cuda.is_available() else model,
            load_tokenizer(str(path)),
            card,
        )

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

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

        logs = torch.stack(
            self._steps[: open_.shape[1]], 1
        ).double()  # on some devices decoding takes a step too many
        total = torch.where(open_, logs, 0.0).sum(1).clamp(max=0.0)
        return [float(one) for one in total.exp()]
