"""A decoder alone in CTranslate2, which needs neither torch nor transformers."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError
from dsbs.students.backends import GeneratedText
from dsbs.students.backends.ctranslate2 import CPU_ROWS, ctranslate2
from dsbs.students.card import StudentCard
from dsbs.students.instructions import WORDING, StoredPrompts
from dsbs.students.targets import Start

_FILES = ("model.bin", "config.json", "vocabulary.json", "tokenizer.json", WORDING)


class Ct2Causal:
    """Texts whose prompts are longer than the card's ``max_input_tokens`` are cut; the template around them stays whole."""

    def __init__(self, model: Any, prompts: StoredPrompts, folder: Path, card: StudentCard) -> None:
        self.model, self.tokenizer, self._folder = model, prompts.tokenizer, folder
        self._prompts, self._max_input = prompts, card.max_input_tokens
        self._pieces = [
            self.tokenizer.id_to_token(index) for index in range(self.tokenizer.get_vocab_size())
        ]

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> Ct2Causal:
        runtime = ctranslate2()
        try:
            model = runtime.Generator(
                str(path), device="cuda" if runtime.get_cuda_device_count() else "cpu"
            )
            return cls(model, StoredPrompts(path), path, card)
        except Exception as error:  # both packages raise what their compiled parts say
            raise DsbsError(
                f"the export in {path} cannot be loaded ({error})", hint="export the student again"
            ) from None

    def save(self, folder: Path) -> None:
        for name in _FILES:
            shutil.copyfile(self._folder / name, folder / name)

    def write(
        self, texts: Sequence[str], most: int, start: Start = "pad", *, probabilities: bool = False
    ) -> list[GeneratedText]:
        """See ``Engine``; ``start`` is of encoder-decoders, and has no meaning here."""
        pieces = self._pieces
        found = self.model.generate_batch(
            [
                [pieces[index] for index in ids]
                for ids in self._prompts.read(texts, self._max_input)
            ],
            max_batch_size=CPU_ROWS
            if self.model.device == "cpu"
            else 0,  # by length, in the inputs' order again after
            beam_size=1,
            max_length=most,
            min_length=0,
            length_penalty=0,  # else the score is a mean over the tokens
            include_prompt_in_result=False,
            end_token=self._prompts.stops,
            return_end_token=True,
            return_scores=probabilities,
        )
        rows = [one.sequences_ids[0] for one in found]
        return [
            GeneratedText(
                text,
                not ids or ids[-1] not in self._prompts.stops,
                min(1.0, math.exp(one.scores[0])) if probabilities else None,
            )
            for text, ids, one in zip(self._prompts.decode(rows), rows, found, strict=True)
        ]

    @property
    def parameters(self) -> None:
        """The format does not tell."""
        return None
