"""torch: a folder that transformers loads, or torch's dynamic int8 for machines without CTranslate2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsbs.errors import UserError
from dsbs.exporting.causal_script import causal_script
from dsbs.exporting.formats import PLAIN, first_task, write_wording
from dsbs.students import Student
from dsbs.students.backends.int8 import embeddings, quantized, save_quantized

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
_CAUSAL_PLAIN = "model = AutoModelForCausalLM.from_pretrained(here, dtype=torch.float32)"
_CAUSAL_INT8 = """model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(here)).eval()
kinds = {torch.nn.Linear: per_channel_dynamic_qconfig, EMBEDDINGS: float_qparams_weight_only_qconfig}
quantize_dynamic(model, kinds, dtype=torch.qint8, inplace=True)
model.load_state_dict(torch.load(here / "model-int8.pt", weights_only=True))"""
_CAUSAL_WRITE = """    found = model.generate(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=MOST,
        do_sample=False, num_beams=1, eos_token_id=wording["stops"], pad_token_id=wording["stops"][0],
    )
    print(whole.decode(found[0, len(ids) :].tolist()).strip(), flush=True)"""
_AO = "from torch.ao.quantization import float_qparams_weight_only_qconfig, per_channel_dynamic_qconfig, quantize_dynamic\n"


class TorchFormat:
    """Needs torch and transformers where it runs."""

    kinds = ("seq2seq", "causal")
    quantizations = (PLAIN, "int8")
    packages = ("torch", "transformers")

    def check(self, student: Student, quantize: str) -> str | None:
        model = student.engine.model
        if student.card.kind == "causal":
            if quantize == "int8" and not _has_matrices(model):
                raise UserError(
                    f"{student.card.name} is a {model.config.model_type}, whose matrices torch does not quantise",
                    hint="leave --quantize out, or give --format ct2",
                )
            return None
        if quantize == "int8" and not all(
            hasattr(model, part) for part in ("shared", "encoder", "decoder")
        ):
            raise UserError(
                f"{student.card.name} is no T5: its embeddings are not where int8 needs them",
                hint="leave --quantize out",
            )
        if getattr(model.config, "low_rank", None):
            return "its low-rank matrices are loaded by dsbs alone: predict.py beside it does not know them"
        return None

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        student.engine.tokenizer.save_pretrained(folder)
        if student.card.kind == "causal":
            write_wording(student, folder)
        if quantize == PLAIN:
            student.engine.model.save_pretrained(folder)
            return
        student.engine.model.config.save_pretrained(folder)
        save_quantized(quantized(student.engine.model), folder)

    def script(self, student: Student, quantize: str) -> str:
        plain = quantize == PLAIN
        if student.card.kind == "causal":
            return causal_script(
                student,
                imports=f"import tokenizers\nimport torch\n{'' if plain else _AO}"
                f"from transformers import {'' if plain else 'AutoConfig, '}AutoModelForCausalLM",
                load=(
                    _CAUSAL_PLAIN
                    if plain
                    else _CAUSAL_INT8.replace("EMBEDDINGS", repr(embeddings(student.engine.model)))
                ),
                write=_CAUSAL_WRITE,
            )
        first = first_task(student)
        return _SCRIPT.format(
            imports="" if plain else _AO,
            names=f"{'' if plain else 'AutoConfig, '}AutoModelForSeq2SeqLM, T5Tokenizer",
            model=_PLAIN if plain else _INT8,
            prefix=repr(first.prefix),
            start=first.start,
            longest=student.card.max_input_tokens,
            most=first.most,
        )


def _has_matrices(model: Any) -> bool:
    """Whether there is a Linear besides the head: GPT-2's matrices are of a kind of transformers' own."""
    from torch.nn import Linear

    return any(isinstance(module, Linear) for module in model.base_model.modules())
