"""CTranslate2: a compiled runtime on a CPU or a GPU, in float32 or quantised."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from dsbs.errors import DsbsError, UserError
from dsbs.exporting import ct2_causal
from dsbs.exporting.formats import PLAIN, first_task, write_wording
from dsbs.students import Student
from dsbs.students.backends.ctranslate2 import ctranslate2

_SCRIPT = '''"""Prints what the student writes to each line of stdin."""
import sys
from pathlib import Path

import ctranslate2
import tokenizers

here = Path(__file__).resolve().parent
tokenizer = tokenizers.Tokenizer.from_file(str(here / "tokenizer.json"))
model = ctranslate2.Translator(str(here))
for line in sys.stdin:
    pieces = [tokenizer.id_to_token(i) for i in tokenizer.encode({prefix} + line.strip()).ids]
    found = model.translate_batch(
        [pieces], target_prefix=[[{start}]], beam_size=1, min_decoding_length=0, max_decoding_length={most},
        max_input_length=0,  # the tokenizer has cut, and has kept the end token
    )
    ids = [tokenizer.token_to_id(piece) for piece in found[0].hypotheses[0]]
    print(tokenizer.decode([i for i in ids if i is not None]).strip(), flush=True)
'''


class Ct2Format:
    """Of T5 and its kin and of decoders alone, by CTranslate2's own converter (Klein et al., 2020, for the runtime)."""

    kinds = ("seq2seq", "causal")
    quantizations = ("int8", PLAIN, "int8_float32", "int16", "float16")
    packages = ("ctranslate2", "tokenizers")

    def check(self, student: Student, quantize: str) -> str | None:
        runtime = ctranslate2()
        if student.card.kind == "causal":
            ct2_causal.check(student)
        elif student.engine.model.config.model_type not in ("t5", "mt5"):
            raise UserError(
                f"CTranslate2 is not asked to convert a model of type {student.engine.model.config.model_type} here",
                hint="try --format onnx or torch",
            )
        if getattr(student.engine.model.config, "low_rank", None):
            raise UserError(
                f"{student.card.name} has low-rank matrices, which CTranslate2 does not know",
                hint="use --format torch --quantize int8, or compress by pruning in place of low-rank",
            )
        if quantize not in runtime.get_supported_compute_types("cpu"):
            return f"this machine's CPU does not compute in {quantize}: the file is smaller, and no faster"
        return None

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        import torch
        from ctranslate2.converters.converter import Converter

        is_causal = student.card.kind == "causal"
        loader = (
            ct2_causal.loader_of(student.engine.model.config.model_type) if is_causal else _loader()
        )
        model = deepcopy(student.engine.model).to(
            "cpu"
        )  # the converter scales and quantises in the model's own memory

        class Convert(Converter):  # type: ignore[misc]
            def _load(self) -> Any:
                with torch.no_grad():
                    return loader(model, student.engine.tokenizer)

        made = folder / "ct2"  # the converter empties the folder that it writes to
        try:
            Convert().convert(str(made), quantization=None if quantize == PLAIN else quantize)
        except (ValueError, NotImplementedError, AttributeError) as error:
            raise DsbsError(
                f"CTranslate2 cannot convert {student.card.name} ({error})",
                hint="try --format torch --quantize int8",
            ) from None
        for path in made.iterdir():
            path.rename(folder / path.name)
        made.rmdir()
        if is_causal:
            write_wording(student, folder)

    def script(self, student: Student, quantize: str) -> str:
        if student.card.kind == "causal":
            return ct2_causal.script(student)
        first = first_task(student)
        start = student.engine.tokenizer.convert_ids_to_tokens(first.start)
        return _SCRIPT.format(prefix=repr(first.prefix), start=repr(start), most=first.most)


def _loader() -> Any:
    from ctranslate2.converters.transformers import T5Loader

    class Loader(T5Loader):  # type: ignore[misc]
        """The converter's loader, right for v1.1 shapes and for both tokens that a decoder may begin with."""

        def get_model_spec(self, model: Any) -> Any:
            spec = super().get_model_spec(model)
            if (
                not model.config.scale_decoder_outputs
            ):  # it goes by the ties of the embeddings, which are always tied now
                spec.decoder.scale_outputs = 1.0
            return spec

        def get_vocabulary(self, model: Any, tokenizer: Any) -> list[str]:
            known = [
                piece
                for piece, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
            ]
            # embeddings beyond the vocabulary, by names that are no piece's
            return known + [
                f"<unused_{index}>" for index in range(len(known), model.config.vocab_size)
            ]

        def set_config(self, config: Any, model: Any, tokenizer: Any) -> None:
            super().set_config(config, model, tokenizer)
            config.decoder_start_token = None  # each call says what the decoder begins with
            config.layer_norm_epsilon = model.config.layer_norm_epsilon

    return Loader()
