"""PyTorch format: a folder that transformers loads, or dynamic int8 where CTranslate2 is absent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dsbs.errors import UserError
from dsbs.exporting import FLOAT32, decoder_script, label_view, write_prompt_format
from dsbs.students.backends.transformers import embeddings_name, quantize_int8, save_int8
from dsbs.students.low_rank import KEY
from dsbs.students.student import Student

_QUANTIZATION_IMPORT = """from torch.ao.quantization import (
    float_qparams_weight_only_qconfig,
    per_channel_dynamic_qconfig,
    quantize_dynamic,
)
"""
_T5_FLOAT32 = """model = AutoModelForSeq2SeqLM.from_pretrained(here, dtype=torch.float32)
"""
_T5_INT8 = """model = AutoModelForSeq2SeqLM.from_config(AutoConfig.from_pretrained(here)).eval()
configurations = {
    torch.nn.Linear: per_channel_dynamic_qconfig,
    "shared": float_qparams_weight_only_qconfig,
}
quantize_dynamic(model, configurations, dtype=torch.qint8, inplace=True)
# The embeddings of both stacks are the shared ones, which the file has.
model.encoder.embed_tokens = model.decoder.embed_tokens = None
model.load_state_dict(torch.load(here / "model-int8.pt", weights_only=True))
model.encoder.embed_tokens = model.decoder.embed_tokens = model.shared
"""
_T5_SCRIPT = '''"""Print the student's output for each line of stdin."""
import sys
from pathlib import Path

import torch
{imports}from transformers import {names}

here = Path(__file__).resolve().parent
tokenizer = T5Tokenizer.from_pretrained(here)
{model}sys.stdout.reconfigure(encoding="utf-8")
for line in open(0, encoding="utf-8-sig"):
    text = {prefix} + line.strip()
    inputs = tokenizer(text, truncation=True, max_length={max_input_tokens}, return_tensors="pt")
    ids = model.generate(
        **inputs,
        max_new_tokens={max_tokens},
        decoder_start_token_id={start_id},
        num_beams=1,
        do_sample=False,
    )
    print(tokenizer.decode(ids[0], skip_special_tokens=True).strip(), flush=True)
'''
_DECODER_FLOAT32 = "model = AutoModelForCausalLM.from_pretrained(here, dtype=torch.float32)"
_DECODER_INT8 = """model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(here)).eval()
configurations = {
    torch.nn.Linear: per_channel_dynamic_qconfig,
    EMBEDDINGS: float_qparams_weight_only_qconfig,
}
quantize_dynamic(model, configurations, dtype=torch.qint8, inplace=True)
model.load_state_dict(torch.load(here / "model-int8.pt", weights_only=True))"""
_DECODER_WRITE = """    output = model.generate(
        input_ids=torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        max_new_tokens=MAX_TOKENS,
        do_sample=False,
        num_beams=1,
        eos_token_id=prompt_format["stops"],
        pad_token_id=prompt_format["stops"][0],
    )
    print(tokenizer.decode(output[0, len(ids) :].tolist()).strip(), flush=True)"""


class TorchFormat:
    """Needs torch and transformers where it runs."""

    kinds = ("seq2seq", "causal")
    quantizations = (FLOAT32, "int8")
    packages = ("torch", "transformers")

    def check(self, student: Student, quantize: str) -> str | None:
        model = student.backend.model
        remark = None
        if not _is_plain(model):
            remark = "only dsbs can load this model: the export has no predict.py"
        if student.card.kind == "causal":
            if quantize == "int8" and not _has_linear_layers(model):
                raise UserError(
                    f"{student.card.name} is a {model.config.model_type}, whose matrices PyTorch "
                    "does not quantize",
                    hint="remove --quantize, or use --format ct2",
                )
            return remark
        has_t5_parts = all(hasattr(model, name) for name in ("shared", "encoder", "decoder"))
        if quantize == "int8" and not has_t5_parts:
            raise UserError(
                f"{student.card.name} is not a T5: int8 does not find its embeddings",
                hint="remove --quantize",
            )
        return remark

    def write(self, student: Student, folder: Path, quantize: str) -> None:
        student.backend.tokenizer.save_pretrained(folder)
        if student.card.kind == "causal":
            write_prompt_format(student, folder)
        if quantize == FLOAT32:
            student.backend.model.save_pretrained(folder)
            return
        student.backend.model.config.save_pretrained(folder)
        save_int8(quantize_int8(student.backend.model), folder)

    def script(self, student: Student, quantize: str) -> str | None:
        if not _is_plain(student.backend.model):
            return None
        is_float32 = quantize == FLOAT32
        quantization_import = "" if is_float32 else _QUANTIZATION_IMPORT
        config_name = "" if is_float32 else "AutoConfig, "
        if student.card.kind == "causal":
            load = _DECODER_FLOAT32
            if not is_float32:
                embeddings = repr(embeddings_name(student.backend.model))
                load = _DECODER_INT8.replace("EMBEDDINGS", embeddings)
            return decoder_script(
                student,
                imports=f"import tokenizers\nimport torch\n{quantization_import}"
                f"from transformers import {config_name}AutoModelForCausalLM",
                load=load,
                write=_DECODER_WRITE,
            )
        view = label_view(student)
        return _T5_SCRIPT.format(
            imports=quantization_import,
            names=f"{config_name}AutoModelForSeq2SeqLM, T5Tokenizer",
            model=_T5_FLOAT32 if is_float32 else _T5_INT8,
            prefix=repr(view.prefix),
            start_id=view.start_id,
            max_input_tokens=student.card.max_input_tokens,
            max_tokens=view.max_tokens,
        )


def _is_plain(model: Any) -> bool:
    """Whether transformers alone loads the model, and as a script of this format does: a T5 or a
    decoder without low-rank matrices.
    """
    config = model.config
    is_supported = not config.is_encoder_decoder or config.model_type in ("t5", "mt5")
    return is_supported and not getattr(config, KEY, None)


def _has_linear_layers(model: Any) -> bool:
    """Whether there is a Linear besides the head: GPT-2 uses a class of transformers instead."""
    from torch.nn import Linear

    return any(isinstance(module, Linear) for module in model.base_model.modules())
