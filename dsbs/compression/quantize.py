"""``quantize=int8``, ``int16`` or ``float16``: weights in fewer bits, by an export; the last step of a chain.

CTranslate2 where it is installed and carries the model; torch's dynamic int8 elsewhere, which keeps embeddings in float32.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from dsbs.compression.base import Examples
from dsbs.errors import UserError
from dsbs.students import read_card

_BITS = ("int8", "int16", "float16")


class Quantize:
    heals, sparse, learns_from_rows = False, False, False

    def __init__(self, value: str) -> None:
        if value not in _BITS:
            raise UserError(
                f"--method quantize={value}: no number format",
                hint=f"quantize={', quantize='.join(_BITS)}",
            )
        self.value = value

    def make(self, source: Path, into: Path, examples: Examples) -> None:
        from dsbs.exporting.run import export

        export(
            source,
            self.format_for(source),
            quantize=self.value,
            out=into,
            examples=examples.inputs(),
        )

    def format_for(self, source: Path) -> str:
        """``ct2`` or ``torch``. Raises UserError where only the latter would do, and has not these bits."""
        from dsbs.students.low_rank import ranks_of

        if find_spec("ctranslate2") and not ranks_of(str(source)) and _is_known(source):
            return "ct2"
        if self.value == "int8":
            return "torch"
        if ranks_of(str(source)):
            raise UserError(
                f"quantize={self.value} is CTranslate2's, which has no low-rank matrices",
                hint="quantize=int8 (torch's), or chain it after pruning in place of low-rank",
            )
        raise UserError(
            f"quantize={self.value} needs the package ctranslate2 and a model that it carries",
            hint="pip install 'dsbs[ct2]'",
        )


def _is_known(source: Path) -> bool:
    """Whether CTranslate2 carries the student's kind of model."""
    from transformers import AutoConfig

    from dsbs.exporting.ct2_causal import LOADERS
    from dsbs.students.weights import located

    return (
        read_card(source).kind == "seq2seq"
        or AutoConfig.from_pretrained(**located(str(source))).model_type in LOADERS
    )
