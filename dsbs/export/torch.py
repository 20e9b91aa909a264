"""torch: a folder that transformers loads, or torch's dynamic int8 for machines without CTranslate2."""

from __future__ import annotations

from pathlib import Path

from dsbs.errors import UserError
from dsbs.export.formats import PLAIN, first_task
from dsbs.student import Student
from dsbs.student.dynamic import quantized, save_quantized

_PLAIN = """model = AutoModelForSeq2SeqLM.from_pretrained(here, dtype=torch.float32)
"""
_INT8 = """model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(here)).eval()
kinds = {torch.nn.Linear: per_channel_dynamic_qconfig, "shared": float_qparams_weight_only_qconfig}
quantize_dynamic(model, kinds, dtype=torch.qint8, inplace=True)
model.encoder.embed_tokens = model.decoder.embed_tokens = None  # the same as shared, which the file has
model.load_state_dict(torch.load(here / "model-int8.pt", weights_only=True))
model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
"""
_SCRIPT = '''"""Prints what the student writes to each line of stdin."""
import sys
from pathlib import Path

import torch
{imports}from transformers import {names}

here = Path(__file__).resolve().parent
tokenizer = T5Tokenizer.from_pretrained(here)
{model}for line in sys.stdin:
    inputs = tokenizer({prefix} + line.strip(), truncation=True, max_length={longest}, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens={most}, decoder_start_token_id={start}, num_beams=1, do_sample=False)
    print(tokenizer.decode(ids[0], skip_special_tokens=True).strip(), flush=True)
'''
_AO = "from torch.ao.quantization import float_qparams_weight_only_qconfig, per_channel_dynamic_qconfig, quantize_dynamic\n"


class TorchFormat:
    """Needs torch and transformers where it runs."""

    kinds = ("seq2seq",)
    quantizations = (PLAIN, "int8")
    packages = ("torch", "transformers")
    weights = ("*.safetensors", "*.pt")

    def check(self, student: Student, quantize: str) -> str | None:
        model = student.engine.model
        if quantize == "int8" and not all(hasattr(model, part) for part in ("shared", "encoder", "decoder")):
            raise UserError(
                f"{student.card.name} is no T5: its embeddings are not where int8 needs them", hint="leave --quantize out"
            )
        if getattr(model.config, "low_rank", None):
            return "its low-rank matrices are loaded by dsbs alone: predict.py beside it does not know them"
        return None

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        student.engine.tokenizer.save_pretrained(folder)
        if quantize == PLAIN:
            student.engine.model.save_pretrained(folder)
            return
        student.engine.model.config.save_pretrained(folder)
        save_quantized(quantized(student.engine.model), folder)

    def script(self, student: Student, quantize: str) -> str:
        first = first_task(student)
        plain = quantize == PLAIN
        return _SCRIPT.format(
            imports="" if plain else _AO,
            names=f"{'' if plain else 'AutoConfig, '}AutoModelForSeq2SeqLM, T5Tokenizer",
            model=_PLAIN if plain else _INT8,
            prefix=repr(first.prefix),
            start=first.start,
            longest=student.card.max_input_tokens,
            most=first.most,
        )
