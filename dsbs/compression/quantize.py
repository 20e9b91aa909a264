"""Quantization (``quantize=int8``, ``int16``, ``float16``): the last step of a chain, by an export.

CTranslate2 where it is installed and supports the model. Otherwise int8 by ONNX Runtime for a label
head, or PyTorch's dynamic int8, which keeps embeddings in float32.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dsbs.compression import Examples
from dsbs.errors import UserError
from dsbs.students.card import read_card

_NUMBER_FORMATS = ("int8", "int16", "float16")


class Quantize:
    name = "quantize"
    heals = False
    sparse = False
    learns_from_rows = False

    def __init__(self, value: str) -> None:
        if value not in _NUMBER_FORMATS:
            raise UserError(
                f"--method quantize={value}: not a number format",
                hint=f"quantize={', quantize='.join(_NUMBER_FORMATS)}",
            )
        self.value = value

    @property
    def settings(self) -> dict[str, Any]:
        return {}

    def make(self, source: Path, target: Path, examples: Examples) -> None:
        from dsbs.exporting.run import export

        export(
            source,
            self.export_format(source),
            quantize=self.value,
            out=target,
            examples=examples.inputs(),
        )

    def export_format(self, source: Path) -> str:
        """``ct2``, or ``onnx`` for a label head, else ``torch``.

        Raises UserError where none supports the number format.
        """
        from transformers import AutoConfig

        from dsbs.exporting.ct2 import ct2_problem
        from dsbs.students.weights import pretrained_arguments

        card = read_card(source)
        config = AutoConfig.from_pretrained(**pretrained_arguments(str(source)))
        problem = ct2_problem(card, config)
        if find_spec("ctranslate2") and problem is None:
            return "ct2"
        if self.value == "int8":
            return "onnx" if card.head == "labels" else "torch"
        if problem:
            raise UserError(
                f"quantize={self.value} needs CTranslate2, which cannot run {source}: {problem}",
                hint="quantize=int8, which does not need it",
            )
        raise UserError(
            f"quantize={self.value} needs the package ctranslate2", hint="pip install 'dsbs[ct2]'"
        )
