"""A T5 in CTranslate2, which needs neither torch nor transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError
from dsbs.students.backends import GeneratedText
from dsbs.students.card import StudentCard
from dsbs.students.targets import Start
from dsbs.students.tokenizer import read_pieces

CPU_ROWS = 16  # decoded together on a CPU: 64 short rows took 57 ms at once and 28 to 42 ms in parts of 16, on one thread
_FILES = ("model.bin", "config.json", "shared_vocabulary.json", "tokenizer.json")


def ctranslate2() -> Any:
    """The package. Raises UserError where it is missing."""
    try:
        import ctranslate2 as runtime
    except ImportError:
        raise UserError(
            "the format ct2 needs the package ctranslate2", hint="pip install 'dsbs[ct2]'"
        ) from None
    return runtime


class Ct2:
    """Inputs longer than the card's ``max_input_tokens`` are cut."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path) -> None:
        self.model, self.tokenizer, self._folder = model, tokenizer, folder
        self._pieces = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._starts: dict[Start, str] = {"pad": config["bos_token"], "eos": config["eos_token"]}
        self._end = tokenizer.token_to_id(config["eos_token"])

    @classmethod
    def load(cls, path: Path, card: StudentCard) -> Ct2:
        runtime = ctranslate2()
        try:
            tokenizer = read_pieces(path, card.max_input_tokens)
            model = runtime.Translator(
                str(path), device="cuda" if runtime.get_cuda_device_count() else "cpu"
            )
            return cls(model, tokenizer, path)
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
        """See ``Engine``."""
        return self._decode(texts, most, start, 1, probabilities)

    def search(
        self, texts: Sequence[str], most: int, start: Start, beams: int
    ) -> list[GeneratedText]:
        """Beam search without length penalty: the likeliest text that it finds for each input."""
        return self._decode(texts, most, start, beams, True)

    def _decode(
        self, texts: Sequence[str], most: int, start: Start, beams: int, scores: bool
    ) -> list[GeneratedText]:
        pieces = self._pieces
        found = self.model.translate_batch(
            [
                [pieces[index] for index in one.ids]
                for one in self.tokenizer.encode_batch(list(texts))
            ],
            target_prefix=[[self._starts[start]]] * len(texts),
            max_batch_size=CPU_ROWS
            if self.model.device == "cpu"
            else 0,  # by length, in the inputs' order again after
            beam_size=beams,
            max_decoding_length=most,
            min_decoding_length=0,  # else the end token is no first token, and all others are likelier than they are
            max_input_length=0,  # the tokenizer has cut
            length_penalty=0,  # else the score is a mean over the tokens
            return_scores=scores,
            return_end_token=True,
        )
        written = [one.hypotheses[0] for one in found]
        known = [
            [index for index in map(self.tokenizer.token_to_id, one) if index is not None]
            for one in written
        ]
        decoded = self.tokenizer.decode_batch(known)
        return [
            GeneratedText(
                text.strip(),
                self._end not in ids[-1:],
                min(1.0, math.exp(one.scores[0])) if scores else None,
            )
            for text, ids, one in zip(decoded, known, found, strict=True)
        ]

    @property
    def parameters(self) -> None:
        """The format does not tell."""
        return None
