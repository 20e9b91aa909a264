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
        from dsbs.students.low_rank import ranks_of

        ranks = ranks_of(str(source))
        if find_spec("ctranslate2") and not ranks and _is_supported(source):
            return "ct2"
        if self.value == "int8":
            return "onnx" if read_card(source).head == "labels" else "torch"
        if ranks:
            raise UserError(
                f"quantize={self.value} needs CTranslate2, which does not support low-rank "
                "matrices",
                hint="quantize=int8 (by PyTorch), or pruning instead of low-rank",
            )
        raise UserError(
            f"quantize={self.value} needs the package ctranslate2 and a model that it supports",
            hint="pip install 'dsbs[ct2]'",
        )


def _is_supported(source: Path) -> bool:
    """Whether CTranslate2 supports the student's architecture."""
    from transformers import AutoConfig

    from dsbs.exporting.ct2 import unsupported_feature
    from dsbs.exporting.label_head import CT2_LOADERS
    from dsbs.students.backends.ctranslate2 import DECODER_LOADERS
    from dsbs.students.low_rank import is_changed
    from dsbs.students.weights import pretrained_arguments

    card = read_card(source)
    if card.kind == "seq2seq":
        return card.head == "text"
    config = AutoConfig.from_pretrained(**pretrained_arguments(str(source)))
    if card.head == "labels":
        is_encoder = card.kind == "encoder" and not is_changed(str(source))
        return is_encoder and config.model_type in CT2_LOADERS
    return config.model_type in DECODER_LOADERS and unsupported_feature(config) is None
