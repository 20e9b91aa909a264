"""Label-head backends: a distribution over the labels in one pass, in PyTorch or from an export.

The PyTorch one writes rationales on request. Those of exports need neither torch nor transformers.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbs.students.backends import GeneratedText, export_error
from dsbs.students.backends.ctranslate2 import ctranslate2, runtime_device
from dsbs.students.backends.onnxruntime import load_session, onnxruntime
from dsbs.students.backends.scoring import padded
from dsbs.students.backends.transformers import (
    DecoderBackend,
    EncoderDecoderBackend,
    TransformersBackend,
)
from dsbs.students.card import Start, StudentCard
from dsbs.students.formats import PAIR_SEPARATOR, SpecialTokens, input_format_of
from dsbs.students.long_texts import WINDOW_SEPARATOR
from dsbs.students.novelty import Novelty
from dsbs.students.tokenizer import load_export_tokenizer, load_tokenizer
from dsbs.students.weights import device, load_model
from dsbs.tasks import CHOICE_SEPARATOR, make_task

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRAPH = "model.onnx"  # input_ids and attention_mask (B, S) -> probabilities (B, L)
HEAD = "head.npz"  # of a CTranslate2 export: weight (L, D), bias (L,) and separator ()
# Rows of similar length that an export reads together: little is padding.
_GROUP = 16


class LabelHeadBackend(TransformersBackend):
    """A student with a label head. See ``Backend``."""

    def __init__(self, model: Any, tokenizer: Any, card: StudentCard) -> None:
        super().__init__(model, tokenizer, card)
        self._card = card
        self._answers = _Answers(card)
        self.novelty: Novelty | None = None
        self.input_format = input_format_of(tokenizer, card.kind, card.template)

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> LabelHeadBackend:
        model = load_model(str(path), labels=card.outputs).to(device())
        return cls(model, load_tokenizer(str(path)), card)

    @property
    def parameters(self) -> int:
        """See ``Backend``: without the layers that only write rationales."""
        used = (self.model.reader, self.model.classifier)
        return sum(parameter.numel() for part in used for parameter in part.parameters())

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
        if self.novelty is not None:
            return self._measure(texts, self.novelty)
        if not self._card.scores_choices:
            pooled = self.pooled_states(texts)
            with torch.inference_mode():
                return self._answers.of(self._shares(self.model.classify(pooled).float()))
        choices = [text.split(CHOICE_SEPARATOR) for text in texts]
        with torch.inference_mode():
            logits = self.model(**self._encode([text for row in choices for text in row])).float()
        scores = logits[:, 0].split(list(map(len, choices)))
        names = [[text.partition(PAIR_SEPARATOR)[2] for text in row] for row in choices]
        return _likeliest([row.softmax(-1).tolist() for row in scores], names)

    def _shares(self, logits: Any) -> list[list[float]]:
        """logits (B, L) -> the probability of each label, as ``Task.has_several_labels`` says."""
        shares = logits.sigmoid() if self._answers.are_several else logits.softmax(-1)
        rows: list[list[float]] = shares.tolist()
        return rows

    def pooled_states(self, texts: Sequence[str]) -> Any:
        """What the label head reads: (texts, D). Of a text with windows, their mean by tokens."""
        import torch

        self.model.eval()
        windows = [[text] for text in texts]
        if self._card.reads_windows:
            windows = [text.split(WINDOW_SEPARATOR) for text in texts]
        with torch.inference_mode():
            encoded = self._encode([text for row in windows for text in row])
            pooled = self.model.pool(self.model.states(**encoded), encoded["attention_mask"])
            if len(pooled) == len(texts):
                return pooled
            lengths = encoded["attention_mask"].sum(1, keepdim=True)
            sizes = list(map(len, windows))
            parts = zip(pooled.split(sizes), lengths.split(sizes), strict=True)
            return torch.stack([(row * size).sum(0) / size.sum() for row, size in parts])

    def _measure(self, texts: Sequence[str], novelty: Novelty) -> list[GeneratedText]:
        """Labels, and how far the inputs are from the validation rows."""
        import torch

        pooled = self.pooled_states(texts)
        with torch.inference_mode():
            shares = self._shares(self.model.classify(pooled).float())
        distances = novelty.distances(pooled.cpu().double().numpy())
        labels = self._answers.of(shares)
        return [
            label._replace(distance=distance)
            for label, distance in zip(labels, distances, strict=True)
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
        input_ids, is_token = padded(rows, self.model.device, SpecialTokens.of(self.tokenizer).pad)
        return {"input_ids": input_ids, "attention_mask": is_token.long()}


class _Answers:
    """Turns distributions over a student's classes into its answers."""

    def __init__(self, card: StudentCard) -> None:
        self._task = make_task(card.task)
        self._classes = card.classes
        self.are_several = self._task.has_several_labels

    def of(self, distributions: Sequence[Sequence[float]]) -> list[GeneratedText]:
        """What the task chooses of each distribution, as text; without a calibration."""
        outputs = []
        for shares in distributions:
            label = self._task.choose(self._classes, shares)
            distribution = dict(zip(self._classes, shares, strict=True))
            probability = self._task.probability_of(label, distribution)
            outputs.append(GeneratedText(label, False, probability, distribution=tuple(shares)))
        return outputs


def _likeliest(
    distributions: Sequence[Sequence[float]], labels: Sequence[Sequence[str]]
) -> list[GeneratedText]:
    """The likeliest label of each distribution, as text; the first of equally likely ones."""
    outputs = []
    for distribution, row_labels in zip(distributions, labels, strict=True):
        probability = max(distribution)
        label = row_labels[distribution.index(probability)]
        outputs.append(GeneratedText(label, False, probability, distribution=tuple(distribution)))
    return outputs


class _ExportedLabelHead(ABC):
    """An exported label head. Inputs over the card's ``max_input_tokens`` are truncated."""

    files: tuple[str, ...]
    parameters = None  # unknown for an export

    def __init__(self, model: Any, folder: Path, card: StudentCard) -> None:
        self.model = model
        self.tokenizer = load_export_tokenizer(folder, card.max_input_tokens)
        self._folder = folder
        self._card = card
        self._answers = _Answers(card)

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> _ExportedLabelHead:
        cls.check_package()
        try:
            return cls(cls.load_weights(path), path, card)
        except Exception as error:  # the packages raise errors of their compiled parts
            raise export_error(path, error) from None

    @staticmethod
    @abstractmethod
    def check_package() -> None:
        """Raises UserError where the runtime is not installed."""

    @staticmethod
    @abstractmethod
    def load_weights(folder: Path) -> Any: ...

    @abstractmethod
    def distributions(
        self, token_ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """token_ids and mask (B, S), padded on the right -> probabilities (B, L)."""

    def generate(
        self,
        texts: Sequence[str],
        max_new_tokens: int,
        start: Start = "pad",
        *,
        probabilities: bool = False,
    ) -> list[GeneratedText]:
        """See ``Backend``: labels alone."""
        import numpy as np

        rows = self._read(texts)
        result = np.empty((len(rows), len(self._card.classes)), dtype=np.float32)
        longest_first = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for first in range(0, len(rows), _GROUP):
            group = longest_first[first : first + _GROUP]
            token_ids = np.zeros((len(group), len(rows[group[0]])), dtype=np.int64)
            mask = np.zeros_like(token_ids)
            for slot, row in enumerate(group):
                token_ids[slot, : len(rows[row])] = rows[row]
                mask[slot, : len(rows[row])] = 1
            result[group] = self.distributions(token_ids, mask)
        return self._answers.of(result.tolist())

    def _read(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as ``EncoderFormat`` or ``PlainFormat`` reads it."""
        inputs: list[Any] = list(texts)
        if self._card.kind == "encoder":
            for index, text in enumerate(texts):
                first, separator, second = text.partition(PAIR_SEPARATOR)
                if separator:
                    inputs[index] = (first, second)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(inputs)]

    def save(self, folder: Path) -> None:
        for name in self.files:
            shutil.copyfile(self._folder / name, folder / name)


class OnnxLabelHeadBackend(_ExportedLabelHead):
    """One graph, in ONNX Runtime."""

    files = (GRAPH, "tokenizer.json")

    @staticmethod
    def check_package() -> None:
        onnxruntime()

    @staticmethod
    def load_weights(folder: Path) -> Any:
        return load_session(folder / GRAPH)

    def distributions(
        self, token_ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        feed = {"input_ids": token_ids, "attention_mask": mask}
        result: NDArray[np.float32] = self.model.run(None, feed)[0]
        return result


class CTranslate2LabelHeadBackend(_ExportedLabelHead):
    """An encoder in CTranslate2, and its head in NumPy."""

    files = ("model.bin", "config.json", "vocabulary.json", HEAD, "tokenizer.json")

    def __init__(self, model: Any, folder: Path, card: StudentCard) -> None:
        import numpy as np

        super().__init__(model, folder, card)
        with np.load(folder / HEAD, allow_pickle=False) as head:
            self._weight = head["weight"]
            self._bias = head["bias"]
            self._separator = int(head["separator"])

    @staticmethod
    def check_package() -> None:
        ctranslate2()

    @staticmethod
    def load_weights(folder: Path) -> Any:
        runtime = ctranslate2()
        return runtime.Encoder(str(folder), device=runtime_device(runtime))

    def distributions(
        self, token_ids: NDArray[np.int64], mask: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        import numpy as np

        runtime = ctranslate2()
        is_separator = (token_ids == self._separator).astype(np.int32)
        segments = np.minimum(is_separator.cumsum(1) - is_separator, 1)
        output = self.model.forward_batch(
            runtime.StorageView.from_array(token_ids.astype(np.int32)),
            runtime.StorageView.from_array(mask.sum(1).astype(np.int32)),
            token_type_ids=segments.tolist(),
        )
        states = np.array(output.last_hidden_state.to_device(runtime.Device.cpu))  # (B, S, D)
        is_token = mask[..., None].astype(bool)
        pooled = np.where(is_token, states, 0).sum(1) / mask.sum(1, keepdims=True)
        logits = pooled @ self._weight.T + self._bias
        if self._answers.are_several:
            each: NDArray[np.float32] = 1 / (1 + np.exp(-logits))
            return each
        exponentials = np.exp(logits - logits.max(1, keepdims=True))
        result: NDArray[np.float32] = exponentials / exponentials.sum(1, keepdims=True)
        return result
